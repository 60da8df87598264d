"""Tiles: known answers and closed forms against the classification, skipping rules, and the makespan over units."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reattend.cost_model.count.schedule import launch_span, makespan, needs_split, order, schedule
from reattend.cost_model.count.tiles import expected, jobs, tile_map
from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.masks.split import Mask
from tests.tiers import examples

INF = float("inf")
P, M = ex.index("p"), ex.index("m")
CAUSAL = M <= P
BLOCK_F, BLOCK_S = 8, 256


def counts(
    keep: Expr, n: int, tile_p: int, tile_m: int, m: int | None = None, fills: tuple[float, ...] = (-INF,)
) -> tuple[int, int]:
    tiles = tile_map(Mask(keep, ex.const(0.0), fills), "p", "m", {"p": n, "m": m or n}, {}, tile_p, tile_m)
    assert tiles is not None
    return tiles.visited, tiles.full


def causal(n: int, tq: int, tk: int) -> tuple[int, int]:
    visited = sum(-(-min(n, q + tq) // tk) for q in range(0, n, tq))
    full = sum(min((q + 1) // tk, -(-n // tk)) for q in range(0, n, tq))
    return visited, full


def window(n: int, w: int, tq: int, tk: int) -> tuple[int, int]:
    visited = full = 0
    for a in range(0, n, tq):
        b = min(a + tq, n) - 1
        visited += b // tk - max(0, a - w + 1) // tk + 1
        full += max(0, (a + 1) // tk - 1 - -(-max(0, b - w + 1) // tk) + 1)
    return visited, full


def test_b1_causal() -> None:
    assert counts(CAUSAL, 8192, 128, 128) == (2080, 2016)
    assert 1 - 2080 / 64**2 == pytest.approx(0.4922, abs=5e-5)


def test_b2_causal_other_tiles() -> None:
    assert counts(CAUSAL, 8192, 128, 64) == (4160, 4032)
    assert counts(CAUSAL, 4096, 64, 128) == (1056, 992)


def test_b4_both_sides() -> None:
    near = (P - M <= 512) & (M - P <= 512)
    assert counts(near, 8192, 128, 128)[0] == 556


@pytest.mark.parametrize(("n", "sink", "w", "visited"), [(8192, 4, 1024, 595), (131072, 128, 2048, 18279)])
def test_b5_sink_and_window(n: int, sink: int, w: int, visited: int) -> None:
    keep = CAUSAL & ((P - M < w) | (M < sink))
    assert counts(keep, n, 128, 128)[0] == visited


@pytest.mark.parametrize(("f", "s", "visited", "full", "pairs"), [(8, 256, 144, 144, 2_359_296), (5, 200, 45, 32, 600_000)])
def test_b7_causal_over_frames(f: int, s: int, visited: int, full: int, pairs: int) -> None:
    keep = M // s <= P // s
    assert counts(keep, f * s, 128, 128) == (visited, full)
    assert s * s * f * (f + 1) // 2 == pairs


@given(st.integers(1, 700), st.sampled_from([16, 32, 48, 128]), st.sampled_from([16, 32, 80, 128]))
def test_causal_closed_form(n: int, tq: int, tk: int) -> None:
    visited, full = causal(n, tq, tk)
    found = counts(CAUSAL, n, tq, tk)
    assert found[0] == visited
    # a ragged last tile can be full of the keys that there are
    assert full <= found[1] <= full + -(-n // tq)


@given(st.integers(2, 700), st.integers(1, 300), st.sampled_from([16, 32, 128]), st.sampled_from([16, 32, 128]))
def test_window_closed_form(n: int, w: int, tq: int, tk: int) -> None:
    keep = CAUSAL & (P - M < w)
    visited, full = window(n, w, tq, tk)
    found = counts(keep, n, tq, tk)
    assert found[0] == visited
    assert full <= found[1] <= full + -(-n // tq)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([16, 64]), st.sampled_from([16, 64]))
def test_visited_lies_between_pairs_and_all(n: int, w: int, tq: int, tk: int) -> None:
    keep = CAUSAL & (P - M < w)
    visited, full = counts(keep, n, tq, tk)
    pairs = sum(min(q + 1, w) for q in range(n))
    assert full <= visited <= -(-n // tq) * -(-n // tk)
    assert visited >= -(-pairs // (tq * tk))


def test_no_mask_is_dense() -> None:
    assert tile_map(Mask(ex.TRUE, ex.const(0.0), ()), "p", "m", {"p": 64, "m": 64}, {}, 16, 16) is None
    j = jobs(None, 12, 4, 5)
    assert (j.full == 5).all()
    assert (j.partial == 0).all()
    assert j.repeat == 3


def test_fills_that_do_not_vanish_skip_nothing() -> None:
    assert counts(CAUSAL, 256, 64, 64, fills=(-INF,))[0] == 10
    assert counts(CAUSAL, 256, 64, 64, fills=(-1e4,))[0] == 16


def test_rows_that_may_keep_no_key_visit_all_tiles() -> None:
    # queries before 128 see no key: their uniform mean needs every key
    late = P - M >= 128
    visited, _ = counts(late, 256, 64, 64, fills=(-3e38,))
    assert visited == 4 + 4 + 1 + 2


def test_conditions_on_data_are_expected_to_keep() -> None:
    pad = ex.load("pad", (ex.index("b"), M), "b1")
    assert expected(CAUSAL & pad) is CAUSAL
    assert counts(CAUSAL & pad, 256, 64, 64) == counts(CAUSAL, 256, 64, 64)


# --- makespan ---------------------------------------------------------------------------------------------------


def causal_costs(heads: int) -> NDArray[np.float64]:
    return np.repeat(np.arange(1.0, 65.0)[None], heads, 0)


def test_b4_causal_makespans() -> None:
    costs = causal_costs(16)
    assert costs.sum() / 132 == pytest.approx(252.12, abs=5e-3)
    assert makespan(order(costs, 1, heavy_first=False), 132) == 292
    assert makespan(order(costs, 1, heavy_first=True), 132) == 282
    assert makespan(np.sort(costs.reshape(-1))[::-1], 132) == 253


def test_b4_orders() -> None:
    """FIFO 292, each head's heavy rows first 282, longest first over all heads 253, and no order beats 252.12."""
    found = schedule(causal_costs(16), 1, 132)
    assert (found.as_written, found.rows_first, found.longest_first) == (292, 282, 253)
    assert found.bound == pytest.approx(252.12, abs=5e-3)
    assert found.best == "longest_first"
    assert found.efficiency == pytest.approx(252.12 / 253, abs=1e-4)
    # heads that are alike may be given once
    alike = schedule(causal_costs(1), 16, 132)
    assert (alike.as_written, alike.longest_first, alike.bound) == (292, 253, found.bound)
    # the order is a result: heaviest programs first, whichever head they belong to
    assert found.order[:3].tolist() == [[0, 63], [1, 63], [2, 63]]
    assert sorted(map(tuple, found.order.tolist())) == [(h, i) for h in range(16) for i in range(64)]


def test_b4_one_long_program_wants_its_keys_split() -> None:
    assert needs_split(np.array([[100.0, 1.0]]), 4, 16)
    assert not needs_split(causal_costs(16), 1, 132)
    assert schedule(np.ones((1, 256)), 1, 132).efficiency == pytest.approx(0.97, abs=5e-3)
    assert schedule(np.ones((1, 128)), 1, 148).efficiency == 1.0
    with pytest.raises(ValueError, match="at least one unit"):
        schedule(np.ones((1, 4)), 1, 0)


def test_b4_dense_makespan() -> None:
    assert makespan(np.ones(1024), 132) == 8
    assert 1024 / 132 == pytest.approx(7.76, abs=5e-3)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 20))
def test_makespan_bounds(costs: list[int], slots: int) -> None:
    c = np.array(costs, dtype=float)
    found = makespan(c, slots)
    lower = max(c.sum() / slots, c.max())
    assert lower - 1e-9 <= found <= c.sum() / slots + c.max() + 1e-9
    heaviest_first = makespan(-np.sort(-c), slots)
    # the job that ends last began when all units were busy, and is none of the longest, one a unit
    behind = -np.sort(-c)[slots:]
    assert heaviest_first <= max(c.max(), c.sum() / slots + (behind.max() if len(behind) else 0)) + 1e-9


@examples(30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_first_is_within_a_third_of_the_best(costs: list[int], slots: int) -> None:
    """Graham's bound, against the best of all assignments."""
    c = np.array(costs, dtype=float)
    best = min(max(np.bincount(a, c, slots)) for a in product(range(slots), repeat=len(c)))
    assert schedule(c[None], 1, slots).longest_first <= (4 / 3 - 1 / (3 * slots)) * best + 1e-9


@given(st.integers(40, 90), st.integers(8, 40), st.booleans())
def test_long_queues_are_near_the_schedule(rows: int, heads: int, heavy_first: bool) -> None:
    costs = np.arange(1.0, rows + 1)[None]
    exact = makespan(order(costs, heads, heavy_first), 16)
    rough = launch_span(costs, heads, 16, heavy_first, scheduled=0)
    assert abs(rough - exact) <= rows


def test_more_units_never_take_longer() -> None:
    costs = order(causal_costs(4), 1, heavy_first=True)
    spans = [makespan(costs, n) for n in (8, 16, 32, 64, 128)]
    assert all(a >= b for a, b in pairwise(spans))
