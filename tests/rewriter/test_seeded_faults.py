"""The compiler broken on purpose, one fault at a time: the user gets the original's result and a warning.

    SEEDED_TOKENS=16384 ./run tests tests/rewriter/test_seeded_faults.py -k original_answers      every fault at 16k: 13 GB, half an hour
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import reattend
from reattend.codegen import operator
from reattend.codegen.cpu import kernel
from reattend.codegen.files import cache
from reattend.codegen.vendor import flex, sdpa
from reattend.patterns.cascade import parse, to_text
from reattend.rewriter.capture.capture import Captured
from reattend.rewriter.check import verdicts
from reattend.rewriter.choose import candidates, choose
from reattend.rewriter.find import detect
from reattend.rewriter.find.detect import Found

from .helpers import graph_of

HEADS, CHANNELS = 4, 32


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    a = q @ k.mT * 0.125 + bias
    i = torch.arange(q.shape[2])
    return a.masked_fill(i[:, None] < i[None], float("-inf")).softmax(-1) @ v


class Two(nn.Module):
    """Two attentions with keys and values of their own, and grouped heads, a bias of each head and a causal mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, bias: Tensor) -> Tensor:
        return attend(attend(q, k, v, bias), k2, v2, bias)


def inputs(tokens: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    keys = [torch.randn(1, HEADS // 2, tokens, CHANNELS) for _ in range(4)]
    return torch.randn(1, HEADS, tokens, CHANNELS), *keys, torch.randn(HEADS, 1, tokens)


# --- faults -----------------------------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    candidate: str
    apply: Break


def found_as(change: Callable[[list[Found]], list[Found]]) -> Break:
    """Detection answers something else."""
    find = detect.find

    def broken(gm: fx.GraphModule) -> Any:
        found, missed = find(gm)
        return change(found), missed

    return lambda patch: patch.setattr(choose, "find", broken)


def lifted(before: str, after: str) -> Break:
    """The cascade says something else: a piece of its canonical text is replaced."""

    def wrong(f: Found) -> Found:
        text = to_text(f.cascade)
        assert before in text, text
        return replace(f, cascade=parse(text.replace(before, after)))

    return found_as(lambda found: [wrong(f) for f in found])


def bound(names: Mapping[str, str]) -> Break:
    """Inputs of the second attention are bound to nodes of others: `K: 0.K` takes the first attention's keys."""

    def wrong(found: list[Found]) -> list[Found]:
        def node(text: str) -> fx.Node:
            at, _, name = text.partition(".")
            return found[int(at)].tensors[name]

        other = {name: node(text) for name, text in names.items()}
        return [found[0], replace(found[1], tensors={**found[1].tensors, **other})]

    return found_as(wrong)


def printed(before: str, after: str) -> Break:
    """The emitted code says something else, where it has this piece at all."""
    load = cache.load

    def broken(text: str) -> Any:
        return load(text.replace(before, after))

    return lambda patch: patch.setattr(cache, "load", broken)


def called(wrap: Callable[..., Tensor], maker: str) -> Break:
    """What is called does something else with its arguments or its result."""
    make = getattr(candidates, maker)

    def broken(*args: Any, **options: Any) -> Any:
        call = make(*args, **options)
        return replace(call, target=lambda *given: wrap(call.target, *given), fake=call.fake or call.target)

    return lambda patch: patch.setattr(candidates, maker, broken)


def rounded(target: Callable[..., Tensor], tensors: list[Tensor], *rest: Any) -> Tensor:
    return target([tensors[0], tensors[1].bfloat16().float(), *tensors[2:]], *rest)


def raising(target: Callable[..., Tensor], *given: Any) -> Tensor:
    raise RuntimeError("seeded")


def last_row(target: Callable[..., Tensor], *given: Any) -> Tensor:
    out = target(*given).clone()
    out[..., -1, :] += 0.01
    return out


def no_number(target: Callable[..., Tensor], *given: Any) -> Tensor:
    out = target(*given).clone()
    out[..., 0, 0] = float("nan")
    return out


CORRECTION = "sd_old * c + row_sum"
FAULTS: dict[str, Fault] = {
    "scale": Fault("reattend", lifted('"0.125"', '"0.127"')),
    "causal mask, one key less": Fault("reattend", lifted('["lt",[1,2],null,"b1"]', '["le",[1,2],null,"b1"]')),
    "fill": Fault("reattend", lifted('["const",[],"-inf","f32"]', '["const",[],-4.0,"f32"]')),
    "mask the other way round": Fault("reattend", lifted('["where",[10,11,16]', '["where",[10,16,11]')),
    "heads interleaved": Fault("reattend", lifted('["floordiv",[0,6]', '["mod",[0,6]')),
    "sign of the bias": Fault("reattend", lifted('["add",[14,15]', '["sub",[14,15]')),
    "bias of another head": Fault("reattend", lifted('["load",[0,3,2],"X2"', '["load",[3,3,2],"X2"')),
    "keys of the layer before": Fault("reattend", bound({"K": "0.K"})),
    "values of the layer before": Fault("sdpa", bound({"V": "0.V"})),
    "keys and values swapped": Fault("reattend", bound({"K": "1.V", "V": "1.K"})),
    "correction left out": Fault("reattend", printed(CORRECTION, "sd_old + row_sum")),
    "correction of the wrong sign": Fault("reattend", printed("c = exp_(gm_old - t", "c = 1.0f / exp_(gm_old - t")),
    "not normalised": Fault("reattend", printed("OUT(acc[i] * t)", "OUT(acc[i])")),
    "tile list one tile short": Fault("reattend", printed("some = m0 <= p1", "some = m0 <= p0 - 1")),
    "partial tiles taken for full": Fault("reattend", printed("every = m1 <= p0", "every = m0 <= p0")),
    "exponential of another base": Fault("reattend", printed("exp_(s_1 - t", "exp2_(s_1 - t")),
    "a vendor's scale": Fault("sdpa", printed("scale=0.125", "scale=0.12")),
    "a vendor's mask": Fault("sdpa", printed("p < m", "p + 1 < m")),
    "a vendor's heads": Fault("sdpa", printed("k, v = Q, K", "k, v = Q, K.flip(1)")),
    "an operand in 16 bits": Fault("reattend", called(rounded, "our_call")),
    "the last row": Fault("reattend", called(last_row, "our_call")),
    "a value that is no number": Fault("sdpa", called(no_number, "vendor_call")),
    "a kernel that raises": Fault("reattend", called(raising, "our_call")),
    "a vendor that raises": Fault("sdpa", called(raising, "vendor_call")),
}


def forget() -> None:
    candidates.answer.cache_clear()
    kernel.build.cache_clear()
    sdpa.sdpa.cache_clear()
    flex.flex.cache_clear()
    operator._runners.clear()
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No verdict or kernel of before, and none left behind."""
    monkeypatch.setattr(verdicts, "_path", lambda at: tmp_path / f"{at}.json")
    forget()
    yield
    forget()


def caught(name: str, tokens: int, patch: pytest.MonkeyPatch, calls: int = 2) -> None:
    fault = FAULTS[name]
    fault.apply(patch)
    model, given = Two(), inputs(tokens)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        want = model(*given)
        reattend.optimize(model, policy=reattend.Policy(allow=fault.candidate, deny="original", check="first"))
        answers = [model(*given) for _ in range(calls)]
    checks = reattend.report(model).checks
    wrong = [c for c in checks if c.verdict in ("differs", "raised")]
    assert wrong, checks
    for got in answers:
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    lines = [str(w.message) for w in said if "keeps the original code" in str(w.message)]
    assert len(lines) == len(wrong), lines
    assert all("please report it" in s for s in lines)
    assert str(reattend.report(model)).count("keeps the original: ") == len(wrong)


# One of each kind in the short run.
SHORT = (
    "scale", "keys of the layer before", "tile list one tile short", "a value that is no number", "a kernel that raises",
)


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_the_original_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caught(name, int(os.environ.get("SEEDED_TOKENS") or 512), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tile list one tile short", "keys of the layer before"])
def test_the_original_answers_at_16k(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sampled rows; the others by the command above."""
    caught(name, 16384, monkeypatch, calls=1)


def test_without_a_fault_everything_agrees() -> None:
    for candidate in ("reattend", "sdpa"):
        model, given = Two(), inputs(512)
        with torch.no_grad():
            reattend.optimize(model, policy=reattend.Policy(allow=candidate, deny="original", check="first"), example=given)
        checks = reattend.report(model).checks
        assert [(c.kernel, c.verdict) for c in checks] == [(candidate, "same")] * 2


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["scale"].apply(monkeypatch)
    policy = reattend.Policy(allow="reattend", deny="original", check="first", strict=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="keeps the original code: reattend is off by"):
        reattend.optimize(Two(), policy=policy, example=inputs(512))


def test_never_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["scale"].apply(monkeypatch)
    model, given = Two(), inputs(64)
    policy = reattend.Policy(allow="reattend", deny="original", check="never")
    with torch.no_grad():
        want = model(*given)
        got = reattend.optimize(model, policy=policy)(*given)
    assert (got - want).abs().max() > 1e-4
    assert reattend.report(model).checks == ()


def test_a_wrong_gradient_is_seen_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendor whose forward is right and whose backward is not."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, flow: Tensor) -> Tensor:
            return flow * 1.05

    def wrong(target: Callable[..., Tensor], q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        return target(q, Wrong.apply(k), *rest)  # type: ignore[no-untyped-call]

    called(wrong, "vendor_call")(monkeypatch)
    model, given = Two(), [x.requires_grad_() for x in inputs(128)]
    want = torch.autograd.grad(model(*given).sum(), given)
    with pytest.warns(UserWarning, match="its gradient is off by"):
        out = reattend.optimize(model, policy=reattend.Policy(allow="sdpa", deny="original", check="first"))(*given)
    got = torch.autograd.grad(out.sum(), given)
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(got, want))
    assert [(c.verdict, c.gradients) for c in reattend.report(model).checks] == [("differs", True)] * 2


def test_a_verdict_is_kept_on_disk_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run() -> tuple[verdicts.Check, ...]:
        forget()
        model = reattend.optimize(Two(), policy=reattend.Policy(allow="sdpa", deny="original", check="first"))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*inputs(128))
        return reattend.report(model).checks

    assert {c.how for c in run()} == {"in full"}
    # what this process found is no verdict of an earlier one
    assert {c.how for c in run()} == {"in full"}
    monkeypatch.setattr(verdicts, "_own", set())
    assert {(c.how, c.verdict) for c in run()} == {(verdicts.DISK, "same")}
    for file in tmp_path.glob("*.json"):
        file.write_text("{")
    assert {c.how for c in run()} == {"in full"}
    for file in tmp_path.glob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "verdict": "differs", "why": "seeded"}))
    monkeypatch.setattr(verdicts, "_own", set())
    assert {(c.how, c.verdict, c.why) for c in run()} == {(verdicts.DISK, "differs", "seeded")}


def test_what_one_attention_yields_is_read_by_the_next_one_as_it_was_put_in() -> None:
    """The first attention's own code is not computed beside it."""
    given = inputs(64)
    gm = graph_of(Two(), given)
    choose.rewrite(Captured(gm, "test", 0.0), choose.Request(reattend.Policy(deny="original", check="never")))
    assert "softmax" not in gm.code
