"""Selections: rows that name their keys by top-k, however the mask of all pairs is spelled, are read as names and gathered."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reattend.codegen.cpu.kernel import CpuKernel, build
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.traits import kind, traits
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.masks.selection import selection
from reattend.patterns.masks.split import split
from reattend.patterns.verdict import Refusal
from reattend.rewriter.find import detect
from reattend.rewriter.find.detect import Found
from reattend.rewriter.graph.functional import functional

from .helpers import graph_of, values_of

N, K, INF = 40, 7, math.inf
LOWEST = torch.finfo(torch.float64).min
SELECTED = TileMapping(16, 16, body="selected")


def waves(*shape: int, a: float) -> Tensor:
    """sin(a·n) for n = 1, 2, … in row-major order."""
    return (torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) * a).sin().view(shape)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return waves(2, N, 5, a=0.37), waves(2, N, 5, a=0.41), waves(2, N, 6, a=0.43)


def index_score() -> Tensor:
    """I = 3^-½ Σ w relu(½ q·k), over keys that a query sees."""
    q, k, w = waves(N, 3, 4, a=0.7), waves(N, 4, a=0.9), waves(N, 3, a=1.1)
    return 3**-0.5 * torch.einsum("pi,pim->pm", w, torch.relu(0.5 * torch.einsum("pie,me->pim", q, k)))


def causal() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def found(fn: Callable[..., Tensor], *args: Tensor) -> tuple[Found, dict[str, Tensor], Tensor]:
    """The one attention of a function that computes what it does, its inputs, and the function's value there."""
    gm = graph_of(fn, args)
    gm = functional(gm) or gm
    (here,), _ = detect.find(gm)
    values = values_of(gm, args)
    return here, {name: values[n] for name, n in here.tensors.items()}, values[here.output]


def gathered(c: Cascade, tensors: dict[str, Tensor]) -> Tensor:
    made = build(c, SELECTED)
    assert isinstance(made, CpuKernel), made
    return made.run(tensors, {})


def exact(fn: Callable[..., Tensor], *args: Tensor) -> Attention:
    """The attention of a function whose selection is gathered, to rounding in float64."""
    here, tensors, want = found(fn, *args)
    out = gathered(here.cascade, tensors)
    for other in (out, evaluate(here.cascade, tensors)[here.cascade.outputs[0]]):
        wrong = (other - want.reshape(out.shape)).abs() > 1e-14 * want.nan_to_num().abs().max()
        assert not wrong.any()
        assert torch.equal(other.isnan(), want.reshape(out.shape).isnan())
    view = attention(here.cascade)
    assert isinstance(view, Attention)
    return view


# --- spellings ------------------------------------------------------------------------------------------------------


def ones_without(s: Tensor, top: Tensor) -> Tensor:
    out = torch.ones(N, N, dtype=torch.bool).scatter(-1, top, False)
    return s.masked_fill(out | ~causal(), -INF)


def zeros_with(s: Tensor, top: Tensor) -> Tensor:
    keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, top, True)
    return s.masked_fill(~(keep & causal()), -INF)


def added_lowest(s: Tensor, top: Tensor) -> Tensor:
    mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(~causal(), LOWEST)
    return s + mask.masked_fill(torch.ones(N, N, dtype=torch.bool).scatter(-1, top, False), LOWEST)


def added_infinite(s: Tensor, top: Tensor) -> Tensor:
    bias = torch.full((N, N), -INF, dtype=torch.float64)
    bias.scatter_(-1, top, 0.0)
    return s + bias + torch.full((N, N), -INF, dtype=torch.float64).triu(1)


def compared(s: Tensor, top: Tensor) -> Tensor:
    bias = torch.full((N, N), -INF, dtype=torch.float64).scatter(-1, top, 0.0)
    return torch.where((bias == 0.0) & causal(), s, -INF)


def a_column_to_throw_away(s: Tensor, top: Tensor) -> Tensor:
    seen = top <= torch.arange(N)[:, None]
    keep = torch.zeros(N, N + 1, dtype=torch.bool)
    keep.scatter_(-1, torch.where(seen, top, N), True)
    return s.masked_fill(~keep[:, :-1], -INF)


def by_a_tensor(s: Tensor, top: Tensor) -> Tensor:
    keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, top, torch.ones_like(top, dtype=torch.bool))
    return s.masked_fill(~(keep & causal()), -INF)


def counted(s: Tensor, top: Tensor) -> Tensor:
    """How often each key is named, and −1 for nobody."""
    names = torch.where(top <= torch.arange(N)[:, None], top, -1)
    valid = names.ge(0) & names.lt(N)
    counts = torch.zeros(N, N, dtype=torch.int32)
    counts.scatter_add_(-1, names.clamp(0, N - 1), valid.to(torch.int32))
    return s.masked_fill(~counts.ne(0), -INF)


def in_int32(s: Tensor, top: Tensor) -> Tensor:
    return zeros_with(s, top.to(torch.int32).long())


SPELLINGS = [
    ones_without, zeros_with, added_lowest, added_infinite, compared, a_column_to_throw_away, by_a_tensor, in_int32,
    counted,
]


@pytest.mark.parametrize("masked", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(masked: Callable[[Tensor, Tensor], Tensor]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        top = i.masked_fill(~causal(), -INF).topk(K, -1).indices
        return masked(q @ k.mT * 5**-0.5, top).softmax(-1) @ v

    q, k, v = operands()
    view = exact(f, q, k, v, index_score())
    assert kind(view) == "selected"
    assert "top-k" in traits(view)
    out = f(q, k, v, index_score())
    assert float(out.sum()) == pytest.approx(-2.4679861175, abs=1e-9)
    assert float(out.square().sum()) == pytest.approx(55.4047705315, abs=1e-9)


def test_members_of_the_known_answer() -> None:
    top = index_score().masked_fill(~causal(), -INF).topk(K, -1).indices
    keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, top, True) & causal()
    assert int(keep.sum()) == 259
    assert int(keep.nonzero()[:, 1].sum()) == 2661


def test_rows_without_a_visible_key_give_what_the_spelling_gives() -> None:
    """Keys 0 … 4 are invisible: rows 0 … 4 are the mean over all values, which no named key tells."""
    hidden = torch.arange(N) < 5

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        seen = causal() & ~hidden
        top = i.masked_fill(~seen, -INF).topk(K, -1).indices
        mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(~seen, LOWEST)
        mask = mask.masked_fill(torch.ones(N, N, dtype=torch.bool).scatter(-1, top, False), LOWEST)
        return (q @ k.mT * 5**-0.5 + mask).softmax(-1) @ v

    q, k, v = operands()
    exact(f, q, k, v, index_score())
    out = f(q, k, v, index_score())
    assert float(out.sum()) == pytest.approx(-2.3648759689, abs=1e-9)
    assert float(out.square().sum()) == pytest.approx(51.1245207351, abs=1e-9)


@pytest.mark.parametrize("fill", [-INF, LOWEST], ids=["infinite", "lowest"])
@pytest.mark.parametrize("hidden", [-INF, LOWEST], ids=["hidden by infinity", "hidden by the lowest"])
def test_data_that_hides_all_keys_of_a_row(fill: float, hidden: float) -> None:
    """What is added to the scores hides the keys that some rows name: then it is up to the fill what the row is."""

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor, added: Tensor) -> Tensor:
        out = torch.ones(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, False)
        if fill == -INF:
            return (q @ k.mT * 5**-0.5 + added).masked_fill(out, fill).softmax(-1) @ v
        return (q @ k.mT * 5**-0.5 + added.masked_fill(out, fill)).softmax(-1) @ v

    added = torch.zeros(N, N, dtype=torch.float64).masked_fill(~causal(), hidden)
    added[3], added[:, :5] = hidden, hidden
    exact(f, *operands(), index_score(), added)


@pytest.mark.parametrize("safe", [True, False], ids=["zero", "nan"])
def test_rows_without_a_key_by_infinite_fills(safe: bool) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, True) & causal()
        if safe:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    # every row names its last keys, which the first rows do not see
    exact(f, *operands(), torch.arange(N, dtype=torch.float64).expand(N, N).contiguous())


def test_a_key_that_is_named_twice_counts_once() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, names, True)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    exact(f, *operands(), torch.randint(0, 6, (N, 9), generator=torch.Generator().manual_seed(0)))


def test_blocks_of_keys_by_group() -> None:
    """Each of two key heads names blocks of 8 keys for its group of heads; −1 is thrown away; the last block is short."""
    size, blocks, some = 8, 5, 36

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        p = torch.arange(some)
        best = i.masked_fill((torch.arange(blocks) * size)[None] > p[:, None], -INF).topk(3, -1)
        names = torch.where(best.values == -INF, -1, best.indices)
        mask = torch.full((2, some, blocks + 1), -INF, dtype=torch.float64)
        mask.scatter_(-1, torch.where(names < 0, blocks, names), 0.0)
        keep = (mask[..., :-1] == 0.0).repeat_interleave(size, -1)[..., :some].repeat_interleave(2, 0)
        keep = keep & (p[None] <= p[:, None])
        s = q @ k.repeat_interleave(2, 0).mT + torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, LOWEST)
        return s.softmax(-1) @ v.repeat_interleave(2, 0)

    q, k, v = waves(4, some, 5, a=0.37), waves(2, some, 5, a=0.41), waves(2, some, 6, a=0.43)
    view = exact(f, q, k, v, waves(2, some, blocks, a=0.7))
    assert {"top-k", "blocks", "gqa"} <= traits(view)
    chosen = selection(view, split(view.score, view.key).keep)
    assert chosen is not None
    assert chosen.block == size


def best_blocks(q: Tensor, k: Tensor) -> Tensor:
    """Of blocks of 8 keys the three whose best visible key a row of each index head scores highest, its own first; −1 for none."""
    p = torch.arange(q.shape[1])
    s = (q @ k.mT).masked_fill(p[None] > p[:, None], -INF)
    s = torch.nn.functional.pad(s, (0, -s.shape[-1] % 8), value=-INF).view(*s.shape[:2], -1, 8).amax(-1)
    top = s.scatter(-1, (p // 8)[None, :, None].expand(len(q), -1, -1), INF).topk(3, -1)
    return torch.where(top.values == -INF, -1, top.indices)


def test_known_answer_of_blocks() -> None:
    names = best_blocks(waves(2, 50, 4, a=0.7), waves(50, 4, a=0.9))
    valid = names >= 0
    assert (int(valid.sum()), int(names[valid].sum()), int((~valid).sum())) == (252, 442, 48)
    assert bool((names == (torch.arange(50) // 8)[None, :, None]).any(-1).all())

    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        mask = torch.full((2, 50, 8), -INF, dtype=torch.float64).scatter(-1, torch.where(names < 0, 7, names), 0.0)
        keep = (mask[..., :-1] == 0.0).repeat_interleave(8, -1)[..., :50] & torch.ones(50, 50, dtype=torch.bool).tril()
        return (q @ k.mT).masked_fill(~keep, LOWEST).softmax(-1) @ v

    view = exact(f, waves(2, 50, 5, a=0.37), waves(2, 50, 5, a=0.41), waves(2, 50, 6, a=0.43), names)
    assert "blocks" in traits(view)


def two_sets(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
    """A window of near keys, and of entries that stand for four keys each those that a row names; −1 is thrown away."""
    p = torch.arange(N)[N - q.shape[-2] :, None]
    behind, entries = p - torch.arange(N), 10
    near = torch.zeros(len(p), N, dtype=torch.float64).masked_fill(~((behind >= 0) & (behind < 8)), LOWEST)
    names = i[:, :entries].topk(3, -1).indices
    far = torch.full((len(p), entries + 1), -INF, dtype=torch.float64)
    far = far.scatter(-1, torch.where(names * 4 < p, names, entries), 0.0)[:, :entries]
    joined = [torch.cat([x, x[:, :entries] * 1.5], -2) for x in (k, v)]
    return (q @ joined[0].mT * 5**-0.5 + torch.cat([near, far], -1)).softmax(-1) @ joined[1]


@pytest.mark.parametrize("queries", [N, 3])
def test_one_of_two_joined_key_sets_is_named(queries: int) -> None:
    q, k, v = operands()
    view = exact(two_sets, q[:, :queries].contiguous(), k, v, index_score()[:queries])
    chosen = selection(view, split(view.score, view.key).keep)
    assert chosen is not None
    assert (chosen.first, chosen.block) == (N, 1)


def test_names_that_count_from_the_first_of_two_sets_are_not_shifted() -> None:
    """m < 8 ∨ IN[p,m]: the names are of all keys, not of those behind the eighth."""

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, True) | (torch.arange(N) < 8)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    here, tensors, want = found(f, *operands(), index_score())
    view = attention(here.cascade)
    assert isinstance(view, Attention)
    assert selection(view, split(view.score, view.key).keep) is None
    torch.testing.assert_close(evaluate(here.cascade, tensors)[here.cascade.outputs[0]], want)


def test_all_that_there_is_is_no_selection() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        top = i.masked_fill(~causal(), -INF).topk(N, -1).indices.to(torch.int32)
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, top.long(), True) & causal()
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    here, _, _ = found(f, *operands(), index_score())
    view = attention(here.cascade)
    assert isinstance(view, Attention)
    assert kind(view) == "softmax"
    assert not view.prelude
    assert str(split(view.score, view.key).keep) == "m − p ≤ 0"


def lowest_of(dtype: torch.dtype) -> Callable[..., Tensor]:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        out = torch.ones(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, False) | ~causal()
        mask = torch.zeros(N, N, dtype=dtype).masked_fill(out, torch.finfo(dtype).min)
        return (q @ k.mT * 5**-0.5 + mask).softmax(-1) @ v

    return f


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype) -> None:
    here, tensors, want = found(lowest_of(dtype), *(x.to(dtype) for x in operands()), index_score())
    out = gathered(here.cascade, tensors).double()
    exact = evaluate(here.cascade, tensors, widen=True)[here.cascade.outputs[0]]
    own = (want.double().reshape(exact.shape) - exact).abs().max()
    assert (out - exact).abs().max() <= 1.5 * own


# --- what is left alone -----------------------------------------------------------------------------------------------


def refused(c: Cascade) -> str:
    made = build(c, SELECTED)
    assert isinstance(made, Refusal)
    return made.reason


def test_a_fill_that_leaves_a_weight_is_not_gathered() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        out = torch.ones(N, N, dtype=torch.bool).scatter(-1, names, False)
        return (q @ k.mT).masked_fill(out, -20.0).softmax(-1) @ v

    names = torch.randint(0, N, (N, 9), generator=torch.Generator().manual_seed(0))
    assert "no row names its keys" in refused(found(f, *operands(), names)[0].cascade)


def test_a_fill_of_half_floats_is_no_lowest_score() -> None:
    here, _, _ = found(lowest_of(torch.float16), *(x.half() for x in operands()), index_score())
    assert "not proved" in refused(here.cascade)


def test_several_scattered_values_are_read_as_a_tensor() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor, some: Tensor) -> Tensor:
        bias = torch.full((N, N), -INF, dtype=torch.float64).scatter(-1, names, some)
        return (q @ k.mT + bias).softmax(-1) @ v

    names = torch.randint(0, N, (N, 9), generator=torch.Generator().manual_seed(0))
    here, _, _ = found(f, *operands(), names, waves(N, 9, a=0.3))
    assert not any(e.op == "or" for e in here.cascade.einsums)


def test_a_scatter_to_a_part_of_the_rows_is_read_as_a_tensor() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, names, True) | causal()
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    names = torch.randint(0, N, (N // 2, 9), generator=torch.Generator().manual_seed(0))
    here, _, _ = found(f, *operands(), names)
    assert not any(e.op == "or" for e in here.cascade.einsums)


def test_rows_that_name_nobody_beside_others_in_each_body() -> None:
    """−1 stands for nobody in a row's slots, and rows of nothing else are computed over all keys, or over none."""

    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        counts = torch.zeros(N, N, dtype=torch.int32)
        counts.scatter_add_(-1, names.clamp(0, N - 1), (names.ge(0) & names.lt(N)).to(torch.int32))
        return (q @ k.mT).masked_fill(~counts.ne(0), LOWEST).softmax(-1) @ v

    names = torch.randint(-3, N + 3, (N, 9), generator=torch.Generator().manual_seed(0))
    names[3], names[N - 1] = -1, N
    exact(f, *operands(), names)
    here, tensors, want = found(f, *operands(), names)
    made = build(here.cascade, TileMapping(16, 16, body="product"))
    assert isinstance(made, CpuKernel), made
    torch.testing.assert_close(made.run(tensors, {}), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spoilt", ["beyond the end", "from one on", "several at once"])
def test_counts_that_do_not_say_who_is_named(spoilt: str) -> None:
    """Names beyond the end come to the last key, a count that starts at 1 names everybody, and a sum may cancel."""

    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        valid = names.ge(0) if spoilt == "beyond the end" else names.ge(0) & names.lt(N)
        by = valid.to(torch.int32) - (1 if spoilt == "several at once" else 0)
        start = torch.full((N, N), int(spoilt == "from one on"), dtype=torch.int32)
        keep = start.scatter_add(-1, names.clamp(0, N - 1), by).ne(0)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    names = torch.randint(-3, N + 3, (N, 9), generator=torch.Generator().manual_seed(0))
    here, tensors, want = found(f, *operands(), names)
    assert not any(e.op == "or" for e in here.cascade.einsums)
    out = evaluate(here.cascade, tensors)[here.cascade.outputs[0]]
    torch.testing.assert_close(out, want, equal_nan=True)


# --- ties -------------------------------------------------------------------------------------------------------------


def test_ties_are_whoever_made_them() -> None:
    """Equal scores: the indices of torch's own operator are an input, so that no order is assumed of them."""

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, i.topk(4, -1).indices, True)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    exact(f, *operands(), torch.zeros(N, N, dtype=torch.float64))


def test_ties_are_not_the_lowest_indices() -> None:
    """Known answers of torch's operator on a CPU: no order among equals may be assumed of it."""
    assert set(torch.zeros(300).topk(4).indices.tolist()) == {0, 1, 2, 3}
    assert set(torch.zeros(16).topk(4).indices.tolist()) == {9, 10, 11, 12}
