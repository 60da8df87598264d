"""Guards: a call runs where its conditions hold, the original where they do not, and every fall-back is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import reattend
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.mapping import TileMapping
from reattend.rewriter.capture import export
from reattend.rewriter.choose import candidates, choose
from reattend.rewriter.find import detect, place
from reattend.rewriter.splice import guards, splice
from tests.tiers import one_in

from .helpers import graph_of, values_of

pytestmark = pytest.mark.thin(3)

SDPA = reattend.Policy(deny=("original", "flex", "reattend"))


class Padded(nn.Module):
    """Padding by −∞ before softmax: a row without a key is NaN, where SDPA would give 0."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q = self.q(x)
        s = (q @ x.transpose(-1, -2)).masked_fill(~keep[:, None, :], float("-inf"))
        out: Tensor = s.softmax(-1) @ x
        return out


def mask(*lengths: int) -> Tensor:
    return torch.arange(24) < torch.tensor(lengths)[:, None]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_the_call_runs_where_every_row_keeps_a_key_and_the_original_elsewhere() -> None:
    model = reattend.optimize(Padded(), policy=SDPA)
    x = torch.randn(2, 24, 16)
    for lengths, fell_back in (((24, 9), 0), ((24, 0), 1), ((3, 1), 1)):
        out = model(x, mask(*lengths))
        same(out, model.forward(x, mask(*lengths)))
        assert bool(out.isnan().any()) == (0 in lengths)
        report = reattend.report(model)
        assert report.fallbacks == fell_back
    (site,) = reattend.report(model).sites
    assert site.site.guards == ("every row keeps a key",)
    assert reattend.report(model).kernels == {"sdpa": 2, "original": 1}
    assert "every row keeps a key" in site.site.chosen.why


class Added(nn.Module):
    """A mask that is given as numbers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = (q @ k.mT + mask).softmax(-1) @ v
        return out


def rows_of(*fills: float) -> Tensor:
    """A causal mask of zeros and −∞, and rows that hold one number."""
    out = torch.zeros(24, 24).masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), float("-inf"))
    for i, fill in enumerate(fills):
        out[5 + i] = fill
    return out


@pytest.mark.parametrize(
    ("gradients", "mask", "fell_back"),
    [
        (False, rows_of(), 0), (False, rows_of(-1e4), 0), (False, rows_of(float("-inf")), 1),
        (True, rows_of(), 0), (True, rows_of(-3.0), 0), (True, rows_of(-1e4), 1), (True, rows_of(float("-inf")), 1),
    ],
)
def test_rows_of_data_are_looked_at(gradients: bool, mask: Tensor, fell_back: int) -> None:
    """Forward only rows of −∞ end in another way; a backward loses the logarithm of a sum beside a large number."""
    model = reattend.optimize(Added(), policy=SDPA)
    q, k, v = (torch.randn(2, 3, 24, 16).requires_grad_(gradients) for _ in range(3))
    with torch.set_grad_enabled(gradients):
        out, want = model(q, k, v, mask), model.forward(q, k, v, mask)
    same(out, want)
    if gradients:
        for ours, theirs in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, want)), strict=True):
            same(ours, theirs)
    assert reattend.report(model).fallbacks == fell_back


def test_a_proof_speaks_of_rows_that_data_may_empty() -> None:
    plan = reattend.plan(Added(), (*(torch.randn(2, 3, 24, 16) for _ in range(3)), rows_of()))
    (site,) = plan.sites
    assert "a row without a key gives NaN, as in the original" in site.proofs
    assert "no mask can leave a row without a key" not in site.proofs


def test_gradients_flow_on_both_sides_of_a_guard() -> None:
    model = reattend.optimize(Padded(), policy=SDPA)
    x = torch.randn(2, 24, 16)
    weight = model.q.weight
    for keep in (mask(24, 9), mask(5, 24)):
        (ours,) = torch.autograd.grad(model(x, keep).sum(), weight)
        (theirs,) = torch.autograd.grad(model.forward(x, keep).sum(), weight)
        same(ours, theirs)
    assert reattend.report(model).kernels == {"sdpa": 2}


def captured(model: nn.Module, *args: Tensor) -> tuple[Any, detect.Found]:
    graph = export.from_export(model, args, None).graph
    (found,), _ = detect.find(graph)
    return graph, found


def test_a_call_that_cannot_run_gives_way_to_the_original_once_and_for_all() -> None:
    x, keep = torch.randn(2, 24, 16), mask(24, 9)
    model = Padded()
    graph, found = captured(model, x, keep)
    runs = []

    def failing(*tensors: Tensor) -> Tensor:
        runs.append(1)
        raise RuntimeError("no such compiler\nand more")

    names = [t.name for t in found.cascade.inputs]
    fake = candidates.our_call(found.cascade, TileMapping(32, 32, body="sdpa"))
    call = splice.Call(
        "failing", failing, lambda tensors, size: tuple(tensors[n] for n in names), fragile=True,
        fake=lambda *given: fake.target(list(given), [], fake.arguments(dict(zip(names, given)), int)[2]),
    )
    original = guards.original_subgraph(graph, found.output, place.interior(found))
    assert original is not None
    splice.replace(graph, found.output, found.tensors, found.scalars, call, name="here", original=original)
    splice.finish(graph)
    with pytest.warns(UserWarning, match="here keeps the original code: RuntimeError: no such compiler"):
        same(graph(x, keep), model(x, keep))
    same(graph(x, keep), model(x, keep))
    assert len(runs) == 1
    assert graph.guarded_0.fallbacks == {"here": 2}


def test_the_condition_is_proved_from_mask_and_data() -> None:
    x = torch.randn(2, 24, 16)
    graph, found = captured(Padded(), x, mask(24, 9))
    view = attention(found.cascade)
    assert isinstance(view, Attention)
    condition = guards.every_row_keeps_a_key(view)
    (name,) = condition.tensors
    for lengths in ((24, 24), (24, 1), (24, 0)):
        run = fx.Interpreter(graph, garbage_collect_values=False)
        run.run(x, mask(*lengths))
        assert condition.holds({name: run.env[found.tensors[name]]}, {}) == (0 not in lengths)


class Between(nn.Module):
    """Keys from the first one that is kept on, as many as are kept: both numbers are sums over the mask."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        i = torch.arange(24)
        start = (keep.long().cumsum(-1) == 0).long().sum(-1)[:, None, None]
        stop = start + keep.long().sum(-1)[:, None, None]
        allowed = (i >= start) & (i < stop) & (i[:, None] >= i - 20)
        s = (x @ x.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
        out: Tensor = s.softmax(-1) @ x
        return out


class Last(nn.Module):
    """The last five tokens attend to those before them: where they stand is a matter of how many there are."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        p = torch.arange(5) + (x.shape[1] - 5)
        allowed = keep[:, None] & (torch.arange(x.shape[1]) <= p[:, None])
        s = (x[:, -5:] @ x.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
        out: Tensor = s.softmax(-1) @ x
        return out


@pytest.mark.parametrize(
    ("model", "first", "end", "holds"),
    one_in(3, [
        (Between(), 3, 9, True), (Between(), 0, 24, True), (Between(), 5, 5, False), (Between(), 22, 24, False),
        (Last(), 0, 24, True), (Last(), 19, 24, True), (Last(), 20, 24, False), (Last(), 20, 30, True), (Last(), 26, 30, False),
    ]),
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x),
)
def test_the_condition_reads_sums_and_sizes(model: nn.Module, first: int, end: int, holds: bool) -> None:
    length = max(end, 24)
    keep = (torch.arange(length) >= first) & (torch.arange(length) < end)
    args = (torch.randn(2, length, 16), torch.stack((torch.ones(length, dtype=torch.bool), keep)))
    graph = export.from_export(model, args, None, dynamic=True).graph
    (found,), _ = detect.find(graph)
    view = attention(found.cascade)
    assert isinstance(view, Attention)
    condition = guards.every_row_keeps_a_key(view)
    run = fx.Interpreter(graph, garbage_collect_values=False)
    out = run.run(*args)
    tensors = {name: run.env[node] for name, node in found.tensors.items()}
    assert condition.holds(tensors, {}) == holds
    # or the sizes by name, beside what it asks for
    sizes = guards.bind_shapes(found.cascade, tensors, {})
    assert condition.holds({n: tensors[n] for n in condition.tensors}, {n: sizes[n] for n in condition.sizes}) == holds
    assert bool(out.isnan().any()) != holds


def scores_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s.mul_(0.25)
    return s.softmax(-1) @ v


def keys_written_afterwards(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k = k.relu()
    out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return out, k.zero_()


def scores_written_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    weights = s.softmax(-1)
    s.zero_()
    return weights @ v


def test_the_original_computes_what_the_graph_does_with_its_own_writes() -> None:
    args = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    graph = graph_of(scores_written, args)
    (found,), _ = detect.find(graph)
    original = guards.original_subgraph(graph, found.output, place.interior(found))
    assert original is not None
    module, read = original
    values = values_of(graph, args)
    torch.testing.assert_close(module(*(values[n] for n in read)), scores_written(*args))
    # run again, it finds its inputs as they were
    torch.testing.assert_close(module(*(values[n] for n in read)), scores_written(*args))


def test_what_is_written_before_the_output_has_no_original_to_run_later() -> None:
    graph = graph_of(scores_written_afterwards, [torch.randn(1, 2, 8, 16) for _ in range(3)])
    (found,), _ = detect.find(graph)
    assert guards.original_subgraph(graph, found.output, place.interior(found)) is None


def test_what_is_written_after_the_output_is_read_by_the_original_before() -> None:
    args = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    graph = graph_of(keys_written_afterwards, args)
    (found,), _ = detect.find(graph)
    original = guards.original_subgraph(graph, found.output, place.interior(found))
    assert original is not None
    module, read = original
    last = max(list(graph.graph.nodes).index(n) for n in read)
    assert last < list(graph.graph.nodes).index(found.output)
    assert not any(n.target is torch.ops.aten.relu.default for n in module.graph.nodes)


def test_a_write_that_is_left_out_of_the_original_is_read_as_its_value() -> None:
    """Without its own write the subgraph would run on what was written and write nothing again."""
    args = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    graph = graph_of(scores_written, args)
    (found,), _ = detect.find(graph)
    inside = place.interior(found)
    (write,) = (n for n in inside if n.target is torch.ops.aten.mul_.Tensor)
    original = guards.original_subgraph(graph, found.output, inside - {write})
    assert original is not None
    module, read = original
    assert write in read
    values = values_of(graph, args)
    torch.testing.assert_close(module(*(values[n] for n in read)), scores_written(*args))


def test_a_guarded_call_without_an_original_is_an_error() -> None:
    graph, found = captured(Padded(), torch.randn(2, 24, 16), mask(24, 9))
    call = splice.Call("x", lambda: None, lambda tensors, size: (), fragile=True)
    with pytest.raises(splice.SpliceError, match="no original"):
        splice.replace(graph, found.output, found.tensors, found.scalars, call)


def test_inductor_gets_no_guarded_candidates() -> None:
    graph, _ = captured(Padded(), torch.randn(2, 24, 16), mask(24, 9))
    (decision,), _ = choose.decide(graph, choose.Request(SDPA, traced=True))
    assert decision.site.choice == "original"
    assert "NaN" in decision.site.candidate("sdpa").why


def test_a_guard_computes_what_its_mask_reads_of_the_prelude() -> None:
    """Chunks that are counted from the first token that is no padding: their start is a sum over the mask."""

    class Chunked(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            i = torch.arange(24)
            start = (keep.long().cumsum(-1) == 0).long().sum(-1)[:, None]
            chunk = (i[None] - start) // 8
            allowed = (chunk[:, :, None] == chunk[:, None, :]) & keep[:, None, :] & (i[:, None] >= i)
            s = (x @ x.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
            out: Tensor = s.softmax(-1) @ x
            return out

    x = torch.randn(2, 24, 16)
    model = reattend.optimize(Chunked(), policy=reattend.Policy(allow=("sdpa", "flex"), deny="original"))
    for padded in (0, 5):
        keep = torch.arange(24) >= torch.tensor([0, padded])[:, None]
        same(model(x, keep), model.forward(x, keep))
    report = reattend.report(model)
    assert not any(p.error for p in report.pieces)
    assert report.fallbacks == 1


def test_equal_own_code_is_one_module_and_other_code_is_not() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for scale in (0.25, 0.25, 0.5):
            q = (q @ k.mT * scale).softmax(-1) @ v
        return q.mT.contiguous().mT @ k.mT @ v + (q.mT.contiguous().mT @ k.mT * 0.25).softmax(-1) @ v

    graph = graph_of(layers, [torch.randn(2, 2, 8, 16) for _ in range(3)])
    found, _ = detect.find(graph)
    originals = guards.Originals(graph)
    made = [o for f in found if f.cascade.einsums and (o := originals.of(f.output, place.interior(f))) is not None]
    modules = [m for m, _ in made]
    assert modules[0] is modules[1]
    assert len({id(m) for m in modules}) == len(modules) - 1 >= 3


class Gated(nn.Module):
    """A bias is scaled by a gate that queries make: a sum over as many elements as there are keys, read at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.bias = nn.Linear(16, 8), nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = self.gate(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, -1)
        scores = q @ k.mT * 0.25 + (first * (second * 0.5 - 1) + 2) * self.bias
        out: Tensor = scores.softmax(-1) @ v
        return out


def test_a_product_that_is_read_at_two_places_is_guarded_where_it_stands() -> None:
    plan = reattend.plan(Gated().eval(), tuple(torch.randn(2, 3, 4, 16) for _ in range(3)))
    assert [s.kind for s in plan.sites] == ["softmax"]
    assert not plan.misses, plan.misses
