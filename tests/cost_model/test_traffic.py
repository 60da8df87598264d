"""Traffic: how many elements of a tensor one tile reads, against the coordinates that it reaches wherever it lies."""

import itertools

import pytest
import sympy

from reattend.cost_model.count.work import footprint
from reattend.patterns import expr as ex

P, M, N = ex.index("p"), ex.index("m"), ex.symbol("n")
MOVING = [
    P, P * 3, P * -2, 5 - P, P + M, P - M, (P - M) * -1 + 8, P // 3, (P + M) // 4, P // -3, P % 5, (P - M) % 4, (P * 4) // 8,
    ex.minimum(ex.maximum(P - M + 2, 0), 4), ex.minimum(P + M, N),
]


@pytest.mark.parametrize("term", MOVING, ids=str)
def test_a_footprint_holds_what_a_tile_reads_wherever_it_lies(term: ex.Expr) -> None:
    load = ex.load("table", (term,), "f32")
    for wide, high in itertools.product((1, 2, 4, 6), (1, 3, 4)):
        found = footprint(load, (1000,), {"p": wide, "m": high})
        assert isinstance(found, int)
        assert found <= wide * high
        # tiles lie on multiples of what a quotient divides by
        for p0, m0 in itertools.product((0, 24, 60), (0, 12, 48)):
            table = {N: ex.const(40)}
            seen = {
                ex.substitute(term, table | {P: ex.const(p0 + p), M: ex.const(m0 + m)}).value
                for p in range(wide) for m in range(high)
            }
            assert found >= len(seen), (term, wide, high, p0, m0)


@pytest.mark.parametrize(("term", "expected"), [
    (P * -1, 6), (P - M, 9), (M - P, 9), (P * -1 + 5, 6), (P // 3, 2), (P % 4, 4), (P * M, 24), (P // N, 6), (ex.minimum(P + M, N), 9),
    (ex.load("at", (P,), "i64") % 4, 4), (ex.load("at", (P,), "i64"), 6), (ex.unary("abs", P - M), 24),
], ids=str)
def test_footprints(term: ex.Expr, expected: int) -> None:
    assert footprint(ex.load("table", (term,), "f32"), (1000,), {"p": 6, "m": 4}) == expected


def test_a_footprint_ends_with_its_tensor_and_is_0_for_an_empty_rank() -> None:
    load = ex.load("table", (P - M,), "f32")
    assert footprint(load, (5,), {"p": 6, "m": 4}) == 5
    assert footprint(load, (5,), {"p": 0, "m": 4}) == 0


def test_a_footprint_of_symbolic_sizes_counts_every_point() -> None:
    size = sympy.Symbol("P", integer=True, positive=True)
    assert footprint(ex.load("table", (P % 4,), "f32"), (1000,), {"p": size, "m": 4}) == size
    assert footprint(ex.load("table", (P + M, M), "f32"), (1000, 3), {"p": size, "m": 4}) == size * 4 * 3
