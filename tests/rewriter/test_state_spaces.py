"""State spaces in chunks as transformers writes them (Mamba-2, SSD): no loop, all states between chunks from all before them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import reattend
from reattend.codegen.cpu.scan import ScanKernel, build, shared
from reattend.codegen.skeletons.carried import carried, side_by_side
from reattend.patterns.recurrence.low_rank import LowRank, low_rank
from reattend.rewriter.choose.scans import Scan, scans
from reattend.rewriter.fold.recurrences import FoundScan

from ..tiers import few
from .helpers import values_of
from .test_chunked_scans import plain, widened

models = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
CHUNK = 16
Results = tuple[Tensor, Tensor]


def state_space(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, s: Tensor | None = None) -> Results:
    y, s = plain(models.mamba2_chunk_scan)(
        x, dt, a, b, c, CHUNK, D=d, dt_bias=bias, initial_states=s, dt_softplus=True, return_final_states=True
    )
    return y * 1, s * 1


def from_nothing(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Results:
    return state_space(x, dt, a, b, c, d, bias)


def sines(*shape: int, by: float) -> Tensor:
    return torch.sin(by * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def inputs(t: int, groups: int = 2) -> tuple[Tensor, ...]:
    """Four heads of 6 values and 5 entries."""
    return (
        sines(1, t, 4, 6, by=0.7), sines(1, t, 4, by=0.9), -torch.tensor([0.1, 1, 4, 16], dtype=torch.float64),
        sines(1, t, groups, 5, by=1.1), sines(1, t, groups, 5, by=1.3), sines(4, by=0.5),
        torch.ones(4, dtype=torch.float64), sines(1, 4, 6, 5, by=0.3),
    )


def found(gm: fx.GraphModule) -> tuple[FoundScan, Scan]:
    (one,), misses = scans(gm.graph, Counter())
    assert not misses
    return one


@pytest.mark.parametrize(
    ("t", "groups", "starts"),
    few([(t, g, s) for t in (1, 16, 37, 64, 130, 200) for g in (1, 2, 4) for s in (True, False)], (1, 1, True), (37, 2, True), (64, 4, False)),
)
def test_chunks_without_a_loop_are_the_recurrence_over_their_tokens(t: int, groups: int, starts: bool) -> None:
    args = inputs(t, groups)
    args = args if starts else args[:-1]
    gm = widened(state_space if starts else from_nothing, args)
    scan, site = found(gm)
    values = values_of(gm, args)
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel), kernel
    form = low_rank(scan.recurrence, scan.recurrence.states[0])
    assert isinstance(form, LowRank)
    # heads of a group read the rows that lie there once
    assert len(shared(form)) == (0 if groups == 4 else 1)
    assert not site.bound
    c = scan.recurrence.cascade
    assert c.rank[scan.recurrence.rank].size == -(-t // CHUNK) * CHUNK
    got = dict(zip(kernel.outputs, kernel.entry(*(values[scan.tensors[n]].reshape(c.tensor[n].shape) for n in kernel.inputs))))
    assert set(scan.results) == {"O", "S"}
    for n, node in scan.results.items():
        want = values[node]
        assert (got[n].reshape(want.shape) - want).abs().max() <= 1e-14 * want.abs().max()


def quadratic(name: str) -> Callable[..., Results]:
    """Chunks of gated linear attention whose states are written at once, right or wrong by one change."""

    def segments(g: Tensor, first: int = -1) -> Tensor:
        n = g.shape[-1]
        rows = g[..., None].expand(*g.shape, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(first), 0)
        return rows.cumsum(-2).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(0), -math.inf)

    def fn(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Results:
        q, k, v = (x.reshape(2, 3, 16, -1) for x in (q, k, v))
        g = g.reshape(2, 3, 16)
        total = g.cumsum(-1)
        inside = 0 if name == "counts itself" else -1
        intra = ((q @ k.mT) * segments(g, inside).exp()) @ v
        fade = total if name == "from the start" else total[..., -1:] - total
        own = (k * fade.exp()[..., None]).mT @ v
        own = torch.cat([torch.zeros_like(own[:, :1]), own], 1)
        ends = torch.nn.functional.pad(total[..., -1], (1, 0))
        between = segments(ends, 0 if name == "fades twice" else -1).exp()
        states = torch.einsum("bcz,bzkv->bckv", between, own)
        states = states[:, 1:] if name == "reads ahead" else states[:, :-1]
        return (intra + (q * total.exp()[..., None]) @ states) * 1, total * 1

    return fn


def test_chunks_of_others_are_read_by_their_algebra() -> None:
    args = (*(sines(2, 48, n, by=by) for n, by in ((5, 0.7), (5, 0.9), (6, 1.1))), -1 - sines(2, 48, by=1.3))
    gm = widened(quadratic(""), args)
    scan, _ = found(gm)
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel)
    values = values_of(gm, args)
    got = kernel.entry(*(values[scan.tensors[n]] for n in kernel.inputs))[0]
    want = values[scan.output]
    assert (got.reshape(want.shape) - want).abs().max() <= 1e-14 * want.abs().max()


@pytest.mark.parametrize(("name", "why"), [
    ("counts itself", "by its place in its chunk"), ("from the start", "not what its tokens would compute"),
    ("fades twice", ""), ("reads ahead", "other states than their own"),
])
def test_chunks_that_are_no_recurrence_stay(name: str, why: str) -> None:
    args = (*(sines(2, 48, n, by=by) for n, by in ((5, 0.7), (5, 0.9), (6, 1.1))), -1 - sines(2, 48, by=1.3))
    made, misses = scans(widened(quadratic(name), args).graph, Counter())
    assert not made
    assert any(w in m.reason for m in misses for w in why.split("|")) == bool(why)


@pytest.mark.parametrize("after", [True, False])
def test_matrices_side_by_side_are_each_by_itself(after: bool) -> None:
    n, g = 9, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    state, decay = draw(2, 5, 3, 4), -draw(n, 2, 3).exp()
    decay[4, 1, 2] = -math.inf
    write, added, query = draw(n, 2, 5), draw(n, 2, 3, 4), draw(n, 2, 5)
    new, (out,) = side_by_side(state, decay, write, added, [(query, after)], True)
    each = [x[:, :, None].expand(n, 2, 3, 5) for x in (write, query)]
    want, (read,) = carried(state.transpose(1, 2), decay[..., None], each[0], added, None, [(each[1], after)], True)
    torch.testing.assert_close(new, want.transpose(1, 2), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out, read, rtol=1e-13, atol=1e-13)
    added[2, 0, 1, 1] = math.inf
    new, (out,) = side_by_side(state, decay, write, added, [(query, after)], True)
    assert out[:2].isfinite().all()
    assert out[:, 1].isfinite().all()


class Model(torch.nn.Module):
    def forward(self, *args: Tensor) -> Results:
        return state_space(*args)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_model_runs_our_scan_instead_of_its_state_space(dtype: torch.dtype) -> None:
    args = tuple(x.to(dtype) for x in inputs(40))
    torch._dynamo.reset()
    own = state_space(*args)
    model = reattend.optimize(Model().eval(), policy=reattend.Policy(tune=False, deny=("original",)))
    with torch.no_grad():
        got = model(*args)
    report = reattend.report(model)
    (site,) = [s for p in report.pieces if p.plan for s in p.plan.sites]
    assert (site.kind, site.choice, site.traits) == ("scan", "reattend", frozenset(["decay"]))
    assert [c.verdict for c in report.checks] == ["same"]
    for x, y in zip(got, own):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["decayed", "opened"])
def test_a_bug_of_ours_takes_no_attention_of_its_graph_along(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("somewhere")

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state, out = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                state = state * 0.5 + x[:, t]
                out.append(state)
            y = torch.stack(out, 1)
            return (y @ y.mT).softmax(-1) @ y

    monkeypatch.setattr(f"reattend.rewriter.choose.scans.{part}", broken)
    with pytest.warns(UserWarning, match="KeyError"):
        plan = reattend.plan(Model(), (torch.randn(2, 12, 8),))
    assert [s.kind for s in plan.sites if s.kind != "scan"] == ["softmax"]
    assert any("KeyError" in m.reason for m in plan.misses)
