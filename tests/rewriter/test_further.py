"""What else of an attention is read: weights, their sums over heads and log-sum-exps are outputs of one kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.codegen import several as kernels
from reattend.codegen import trained
from reattend.codegen.forms.program import program_text
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.passes.further import with_numbers
from reattend.patterns.verdict import Obstacle, Refusal
from reattend.rewriter.find import detect
from reattend.rewriter.find.detect import Found
from reattend.rewriter.find.place import with_further
from reattend.rewriter.graph.aliases import Aliases
from reattend.rewriter.graph.liveness import erase_dead

from .helpers import graph_of, values_of

Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
OURS = reattend.Policy(deny=("original",))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def causal(x: Tensor, fill: float = -math.inf, shift: int = 0) -> Tensor:
    return x.masked_fill(~torch.ones(x.shape[-2:], dtype=torch.bool).tril(shift), fill)


def averaged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    w = scores(q, k).softmax(-1)
    return w @ v, w.mean(1)


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    w = causal(scores(q, k)).softmax(-1)
    return w @ v, w


def emptied(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = causal(scores(q, k), shift=-3)
    w = x.softmax(-1)
    return w @ v, w.sum(1) / 4, torch.logsumexp(x, -1)


def filled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    w = causal(scores(q, k), torch.finfo(q.dtype).min, -3).softmax(-1)
    return w @ v, w.mean(1)


def logged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = scores(q, k)
    lse = torch.logsumexp(x, -1, keepdim=True)
    return (x - lse).exp() @ v, lse.squeeze(-1)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = causal(scores(q, k))
    top = x.amax(-1, keepdim=True)
    e = (x - top).exp()
    return e @ v / e.sum(-1, keepdim=True), top + e.sum(-1, keepdim=True).log()


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    x = causal(scores(q, k))
    w = x.softmax(-1)
    return w @ v, w.mean(1), torch.logsumexp(x, -1)


def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    x = 30 * (scores(q, k) / 30).tanh()
    return x.softmax(-1) @ v, torch.logsumexp(x, -1)


WAYS: tuple[Model, ...] = (averaged, returned, emptied, filled, logged, by_hand, grouped, soft_capped)


def inputs(p: int = 37, m: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((2, 4, p, 16), (2, 4, m or p, 16), (2, 4, m or p, 24))
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in sizes)
    return q, k, v


def found(model: Any, *given: Tensor) -> tuple[Found, dict[Any, Any]]:
    gm = graph_of(model, given)
    erase_dead(gm)
    (out,) = with_further(detect.find(gm)[0], Aliases(gm.graph))
    return out, values_of(gm, given)


@pytest.mark.parametrize("model", WAYS)
def test_outputs_of_the_cascade_are_what_the_model_reads(model: Model) -> None:
    f, values = found(model, *(x.double() for x in inputs()))
    assert f.several is not None
    out = evaluate(f.several, {name: values[n] for name, n in f.tensors.items()})
    for made, n in zip(out.values(), (f.output, *f.further), strict=True):
        torch.testing.assert_close(made.reshape(values[n].shape), values[n], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", WAYS)
def test_whole_rows_give_what_the_model_gives(model: Model, dtype: torch.dtype) -> None:
    f, values = found(model, *inputs(93, dtype=dtype))
    exact = found(model, *(x.double() for x in inputs(93, dtype=dtype)))
    assert f.several is not None
    given = [values[f.tensors[t.name]] for t in f.several.inputs]
    out = kernels.call(given, [], program_text(f.several, TileMapping(16, 16, body="whole")))
    if model is filled:
        # what a type's lowest number is depends on the type
        exact = (f, {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in values.items()})
    for made, mine, theirs in zip(out, (f.output, *f.further), (exact[0].output, *exact[0].further), strict=True):
        own, right = values[mine], exact[1][theirs]
        made = made.reshape(own.shape)
        assert made.dtype == own.dtype
        assert torch.equal(made.isnan(), own.isnan())
        error, theirs_error = (float((x.double() - right).nan_to_num(0, 0, 0).abs().max()) for x in (made, own))
        assert error <= 2 * theirs_error + 4 * torch.finfo(dtype).eps * float(right.nan_to_num(0, 0, 0).abs().max())


def test_a_mask_that_varies_keeps_nan_in_rows_without_a_key_and_zero_elsewhere() -> None:
    f, values = found(emptied, *inputs(93))
    assert f.several is not None
    given = [values[f.tensors[t.name]] for t in f.several.inputs]
    _, lse, w = kernels.call(given, [], program_text(f.several, TileMapping(16, 16, body="whole")))
    assert bool(w[:, :3].isnan().all())
    assert not bool(w[:, 3:].isnan().any())
    assert float(w[:, 40, 60:].abs().max()) == 0
    assert bool((lse[:, :, :3] == -math.inf).all())


NUMBERS: tuple[Model, ...] = (logged, soft_capped)


def gradients(f: Found, values: dict[Any, Any], body: str, flows: list[Tensor | None]) -> list[Tensor]:
    c = f.several
    assert c is not None
    given = [values[f.tensors[t.name]].detach().requires_grad_() for t in c.inputs]
    out = trained.numbers(given, [], program_text(c, TileMapping(32, 32, body=body)))
    kept = [(y, g.reshape(y.shape)) for y, g in zip(out, flows) if g is not None]
    return list(torch.autograd.grad([y for y, _ in kept], given, [g for _, g in kept], allow_unused=True))


@pytest.mark.parametrize("flowing", ["output", "number", "both"])
@pytest.mark.parametrize("body", ["fused", "product"])
@pytest.mark.parametrize("model", NUMBERS)
def test_a_log_sum_exp_has_its_gradient(model: Model, body: str, flowing: str) -> None:
    f, values = found(model, *inputs(53))
    leaves = [values[n].double().requires_grad_() for n in f.tensors.values()]
    want = model(*leaves)
    flows: list[Tensor | None] = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) for y in want]
    flows = [g if flowing in ("both", name) else None for g, name in zip(flows, ("output", "number"))]
    kept = [(y, g.double()) for y, g in zip(want, flows) if g is not None]
    exact = torch.autograd.grad([y for y, _ in kept], leaves, [g for _, g in kept], allow_unused=True)
    for made, right in zip(gradients(f, values, body, flows), exact):
        right = torch.zeros_like(made).double() if right is None else right
        torch.testing.assert_close(made.double(), right, rtol=1e-4, atol=1e-5)


def test_a_maximum_that_leaves_has_no_gradient_of_ours() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        x = scores(q, k)
        top = x.amax(-1, keepdim=True)
        e = (x - top).exp()
        return e @ v / e.sum(-1, keepdim=True), top

    f, _ = found(model, *inputs())
    assert f.several is not None
    assert not isinstance(with_numbers(f.several), Obstacle)
    made = trained.build(f.several, TileMapping(32, 32, body="product"))
    assert isinstance(made, Refusal)
    assert "no gradient" in made.reason


class MergedParts(nn.Module):
    """Two parts of the keys, merged by their log-sum-exps, as rings and cascades do."""

    def part(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        x = scores(q, k)
        return x.softmax(-1) @ v, torch.logsumexp(x, -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = k.shape[2] // 2
        (a, la), (b, lb) = self.part(q, k[:, :, :n], v[:, :, :n]), self.part(q, k[:, :, n:], v[:, :, n:])
        whole = torch.logaddexp(la, lb)
        return a * (la - whole).exp().unsqueeze(-1) + b * (lb - whole).exp().unsqueeze(-1)


def test_parts_that_a_model_merges_run_on_kernels_forward_and_backward() -> None:
    torch._dynamo.reset()
    given = [x.requires_grad_() for x in inputs(48)]
    ours = reattend.optimize(MergedParts(), policy=OURS)
    made, want = ours(*given), MergedParts()(*given)
    torch.testing.assert_close(made, want)
    flow = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(made, given, flow, create_graph=True), torch.autograd.grad(want, given, flow)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    report = reattend.report(ours)
    assert [s.kernel for s in report.sites] == ["reattend"] * 2
    assert [(c.verdict, c.gradients) for c in report.checks] == [("same", True)] * 2


def test_second_derivatives_are_the_models_own() -> None:
    torch._dynamo.reset()

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return logged(q, k, v)

    def second(model: Any) -> Tensor:
        given = [x.requires_grad_() for x in inputs(19)]
        out, lse = model(*given)
        (g,) = torch.autograd.grad(out.square().sum() + lse.square().sum(), given[:1], create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), given[:1])
        return h

    torch.testing.assert_close(second(reattend.optimize(Model(), policy=OURS)), second(Model()), rtol=1e-3, atol=1e-4)


class Weighed(nn.Module):
    def __init__(self, average: bool) -> None:
        super().__init__()
        self.attention, self.average = nn.MultiheadAttention(32, 4, batch_first=True), average

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, average_attn_weights=self.average)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("average", [True, False])
def test_weights_that_a_layer_gives_come_from_the_kernel(average: bool, batch: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Weighed(average).eval(), torch.randn(batch, 61, 32)
    with torch.no_grad():
        want = model(x)
        ours = reattend.optimize(model, policy=OURS)
        for made, own in zip(ours(x), want, strict=True):
            torch.testing.assert_close(made, own)
    report = reattend.report(ours)
    (site,) = report.sites
    assert site.kernel == "reattend"
    assert [c.verdict for c in report.checks] == ["same"]
    assert any("what else reads" in p for p in site.site.proofs)


def test_weights_with_gradients_keep_the_original_and_say_so() -> None:
    torch._dynamo.reset()
    model, x = Weighed(True).eval(), torch.randn(2, 61, 32)
    ours = reattend.optimize(model)
    assert ours(x)[1].requires_grad
    (site,) = reattend.report(ours).sites
    assert site.kernel == "original"
    assert "gradients flow through what is read beside the output" in site.site.chosen.why


def test_a_fault_in_what_else_is_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    right = kernels.call

    def wrong(*given: Any) -> tuple[Tensor, ...]:
        out, w = right(*given)
        return out, w * 1.01

    monkeypatch.setattr(kernels, "call", wrong)
    model, x = Weighed(True).eval(), torch.randn(2, 62, 32)
    with torch.no_grad():
        want = model(x)
        ours = reattend.optimize(model, policy=OURS)
        with pytest.warns(UserWarning, match="keeps the original code"):
            got = ours(x)
    for made, own in zip(got, want, strict=True):
        torch.testing.assert_close(made, own)
    assert [c.verdict for c in reattend.report(ours).checks] == ["differs"]


def test_scores_that_are_read_before_the_output_keep_the_original() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        w = scores(q, k).softmax(-1)
        gate = w.mean((1, 2)).sigmoid()
        return w @ (v * gate[:, None, :, None]), gate

    f, _ = found(model, *inputs(24))
    assert f.several is None


def test_sizes_stay_open() -> None:
    torch._dynamo.reset()

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return grouped(q, k, v)

    ours = reattend.optimize(Model(), policy=OURS)
    with torch.no_grad():
        for p in (33, 47, 65):
            for made, own in zip(ours(*inputs(p)), grouped(*inputs(p)), strict=True):
                torch.testing.assert_close(made, own)
    assert {s.kernel for s in reattend.report(ours).sites} == {"reattend"}


def test_inductor_compiles_a_graph_with_several_outputs() -> None:
    torch._dynamo.reset()
    model = torch.compile(MergedParts(), backend="reattend", options={"deny": ("original",)})  # type: ignore[dict-item]
    given = inputs(48)
    with torch.no_grad():
        torch.testing.assert_close(model(*given), MergedParts()(*given))


def test_a_bug_of_ours_in_what_else_is_read_takes_no_other_attention_along(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, w = averaged(q, k, v)
            return scores(out, k).softmax(-1) @ v + w.mean()

    def broken(*given: object) -> None:
        raise KeyError("broken on purpose")

    monkeypatch.setattr("reattend.rewriter.find.place.with_outputs", broken)
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    ours = reattend.optimize(Both(), policy=reattend.Policy(tune=False))
    with torch.no_grad(), pytest.warns(UserWarning, match="a bug in reattend"):
        torch.testing.assert_close(ours(q, k, v), Both()(q, k, v))
    plan = reattend.report(ours).plan
    assert plan is not None
    assert len(plan.sites) == 2
