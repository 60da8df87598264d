"""The steps of selections against numbers known beforehand: R3 to R8, counts, bounds of the divergence, where slashes lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reattend.patterns import expr as ex
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selecting import steps as st
from reattend.patterns.methods.selecting.cells import Cells, causal, every
from reattend.patterns.methods.selecting.work import SelectionSizes, count
from tests.methods.attentions import view
from tests.methods.tables import cut, flat, pairs, run

Q, K = st.Queries(), st.Keys()


def scores_of(values: list[float]) -> tuple[st.Scores, torch.Tensor, torch.Tensor]:
    """A step whose softmax is these numbers, with the queries and keys that make it: one row over all keys."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor(values).log()[None, None, :, None]
    return st.RowSoftmax(st.Products(Q, K)), q, k


@pytest.mark.parametrize(("share", "kept"), [(0.4, 1), (0.49, 1), (0.79, 2), (0.9, 3), (0.96, 4), (1.0, 4)])
def test_the_cell_that_reaches_the_share_is_kept(share: float, kept: int) -> None:
    """p = (.5, .3, .15, .05): R5. Released codes keep 2 for 0.9, or 5 of 4 for 1."""
    s, q, k = scores_of([0.5, 0.3, 0.15, 0.05])
    assert int(run(q, k)(st.Mass(s, share)).sum()) == kept


@pytest.mark.parametrize("step", [st.Mass, st.Largest, st.Above])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (16, 16), (83, 83), (5, 83)])
def test_a_full_budget_is_the_whole_mask(step: type, queries: int, keys: int) -> None:
    q, k = flat(2, queries, 8), flat(1, keys, 8, 1) * 400
    e = run(q, k)
    s = st.RowSoftmax(st.Products(st.Pooled(Q, 16), st.Pooled(K, 16)))
    t = {st.Mass: st.Mass(s, 1.0), st.Largest: st.Largest(s, 99), st.Above: st.Above(s, 0.0)}[step]
    assert (e.table(t) == e.table(st.Everything(s))).all()
    places = torch.arange(queries) + keys - queries
    seen = torch.arange(keys)[None] <= places[:, None]
    tiles = [[bool(seen[i : i + 16, j : j + 16].any()) for j in range(0, keys, 16)] for i in range(0, queries, 16)]
    assert (e.table(t)[0, 1] == torch.tensor(tiles)).all()


def test_means_divide_by_the_tokens_that_are_there() -> None:
    x = torch.arange(10.0).view(1, 1, 10, 1)
    e = run(x, x)
    assert e(st.Pooled(K, 4)).flatten().tolist() == [1.5, 5.5, 8.5]
    assert e(st.Pooled(K, 4, ("max", "min"))).flatten().tolist() == [3, 0, 7, 4, 9, 8]


@pytest.mark.parametrize("stride", [4, 5, 8])
def test_products_of_folded_rows_are_antidiagonal_sums(stride: int) -> None:
    q, k = (torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    e = run(q, k, every(40, 40))
    found = e(st.Products(st.Folded(Q, stride, backwards=True), st.Folded(K, stride)))
    s = q.double() @ k.double().mT
    n = 40 // stride
    for i in range(n):
        for j in range(n):
            cell = s[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            assert (found[:, :, i, j] - cell.flip(3).diagonal(dim1=2, dim2=3).sum(-1)).abs().max() < 1e-4


def test_pieces_of_rows_sum_to_the_whole() -> None:
    """Few scores are held at once; what is held changes no sum."""
    from reattend.patterns.methods.selecting import execute

    q, k = flat(2, 96, 8), flat(2, 96, 8, 1)
    s = st.Summed(st.RowSoftmax(st.Products(Q, K)), 16, 16)
    whole, before = run(q, k)(s), execute.HELD
    execute.HELD = 1
    try:
        assert torch.equal(run(q, k)(s), whole)
    finally:
        execute.HELD = before
    p = (q.double() @ k.double().mT).masked_fill(torch.ones(96, 96).triu(1).bool(), -torch.inf).softmax(-1)
    assert (whole - cut(cut(p, 3, (-1, 16)).sum(-1), 2, (-1, 16)).sum(3)).abs().max() < 1e-5


@pytest.mark.parametrize(("a", "b", "distance"), [([0.5, 0.5], [0.5, 0.5], 0.0), ([1.0, 0.0], [0.0, 1.0], math.sqrt(math.log(2)))])
def test_the_divergence_has_its_bounds_where_numbers_are_0(a: list[float], b: list[float], distance: float) -> None:
    s = st.Products(Q, K)
    e = run(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 1))
    first, second = st.RowSoftmax(s), st.RowSoftmax(st.Products(Q, K, times=2.0))
    e.made[first], e.made[second] = torch.tensor([[[a]]]), torch.tensor([[[b]]])
    assert e._distance(st.Alike(first, second, 0.1)).item() == pytest.approx(distance, abs=1e-12)
    assert bool(e(st.Alike(first, second, 0.1))) is (distance < 0.1)


@pytest.mark.parametrize("cached", [0, 5, 64])
@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17, 40])
def test_a_slash_crosses_the_tiles_that_its_pairs_lie_in(offset: int, cached: int) -> None:
    n, size = 70, 16
    q, k = flat(1, n, 4), flat(1, n + cached, 4)
    e = run(q, k)
    s = st.Offsets(st.RowSoftmax(st.Products(st.Last(Q, 16), K)))
    kept = st.Largest(s, 1)
    e.made[kept] = (torch.arange(n + cached) == offset)[None, None, None]
    found = e(st.Slashes(kept, size))[0, 0]
    p, m = np.meshgrid(np.arange(n), np.arange(n + cached), indexing="ij")
    pair = (p + cached - m) == offset
    wanted = [[bool(pair[i : i + size, j : j + size].any()) for j in range(0, n + cached, size)] for i in range(0, n, size)]
    assert (found == torch.tensor(wanted)).all()


def test_no_row_is_left_without_a_key() -> None:
    """R3: thresholds that nothing reaches, tables that drop a row's own tile, over masks of every kind."""
    p, m = ex.index("p"), ex.index("m")
    window = Cells(70, 70, (m <= p) & (p - m < 9), p)
    for cells in (causal(70, 70), causal(6, 70), every(70, 50), window):
        q, k = flat(2, cells.queries, 4), flat(2, cells.keys, 4, 1)
        s = st.RowSoftmax(st.Products(st.Pooled(Q, 16), st.Pooled(K, 16)))
        for t in (st.Above(s, 2.0), st.Largest(s, 1)):
            kept = run(q, k, cells).table(t)
            pairs = kept.repeat_interleave(16, 2)[:, :, : cells.queries].repeat_interleave(16, 3)[..., : cells.keys]
            assert (pairs & torch.from_numpy(cells.some(1, 1))).any(-1).all()


def test_heads_that_share_keys_agree() -> None:
    q, k = flat(4, 64, 8) * 40, flat(2, 64, 8, 1) * 40
    e = run(q, k)
    s = st.RowSoftmax(st.Products(st.Pooled(Q, 8), st.Pooled(K, 8)))
    alone, mean = e(st.Largest(s, 2)), e(st.Largest(st.OverHeads(s, "mean"), 2))
    union = e(st.GroupUnion(st.Largest(s, 2)))
    assert (mean[:, 0] == mean[:, 1]).all()
    assert (union[:, :2] == (alone[:, 0] | alone[:, 1])[:, None]).all()
    assert (e(s)[:, :2].mean(1) - e(st.OverHeads(s, "mean"))[:, 0]).abs().max() < 1e-6


def test_nothing_is_drawn_and_equal_inputs_have_equal_tables() -> None:
    q, k = flat(2, 64, 8) * 40, flat(2, 64, 8, 1) * 40
    s = st.Forced(st.Mass(st.RowSoftmax(st.Products(st.Pooled(Q, 8), st.Pooled(K, 8))), 0.5))
    before = torch.get_rng_state()
    assert (run(q, k).table(s) == run(q, k).table(s)).all()
    assert (torch.get_rng_state() == before).all()


def test_work_is_counted_from_steps() -> None:
    """Pooled scores: 2·d flops a pair of tiles. Antidiagonals of a square: 1/S of 2·N²·d, half of it under a causal mask."""
    x, n = SelectionSizes(1, 2, 1, 64), 1024
    pooled = st.Products(st.Pooled(Q, 64), st.Pooled(K, 64))
    assert count(pooled, every(n, n), x).flops == 2 * 2 * 64 * 16 * 16
    folded = st.Products(st.Folded(Q, 8, True), st.Folded(K, 8))
    whole = 2 * 2 * 64 * n * n / 8
    assert count(folded, every(n, n), x).flops == whole
    assert count(folded, causal(n, n), x).flops == pytest.approx(whole / 2 * (1 + 8 / n))
    twice = st.Either(st.Largest(pooled, 1), st.Largest(pooled, 2))
    assert count(twice, every(n, n), x).flops == count(pooled, every(n, n), x).flops


def test_the_share_of_a_table_of_single_rows_is_that_of_the_tiles_that_are_visited() -> None:
    """32 rows that each ask for another block visit them all: a share of the rows' cells would be half of it."""
    a = view(P=256, M=256)
    sizes = {"B": 1, "H": 2, "E": 8, "F": 8}
    q, k = flat(2, 256, 8), flat(2, 256, 8, seed=1)
    made = MoBA(count=2, block=32).replace(a)
    assert isinstance(made, Replacement)
    assert made.program is not None
    table = made.program.run(torch, {"Q": q, "K": k}, {})
    seen = pairs(table, 1, 32, 256, 256).reshape(1, 2, 8, 32, 8, 32).any(-1).any(-2)
    assert made.program.share(table, sizes) == pytest.approx(float(seen.double().sum() / (2 * 36)))
    assert made.program.share(table, sizes) > 0.9 > 0.5 > float(table.double().sum() / (2 * 32 * 36))
