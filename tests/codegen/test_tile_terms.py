"""The printed ends of a mask over a tile against the rules on numbers, and against every point of every tile."""

import itertools

import pytest

from reattend.codegen.text.tile_terms import TERMS, Corners
from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.terms.interval_rules import PLAIN, interval

P, M = ex.index("p"), ex.index("m")
INTERVALS = [(a, b) for a in range(-6, 7) for b in range(a, 7)]


def at(e: Expr, **where: int) -> Expr:
    """The term at numbers: a constant."""
    return ex.substitute(e, {ex.index(r): ex.const(v) for r, v in where.items()})


@pytest.mark.parametrize("e", [-P, ex.unary("abs", P), P // 3, P % 3, P // 2 + 1], ids=str)
def test_printed_ends_of_one_operand_are_those_of_numbers(e: Expr) -> None:
    for a, b in INTERVALS:
        found = Corners.of("p", "m", 4, 4).ends(e)
        assert found is not None
        lo, hi = (ex.substitute(x, {ex.index("p0"): ex.const(a), ex.index("p1"): ex.const(b)}) for x in found)
        known = [at(e, p=p).value for p in range(a, b + 1)]
        assert (lo.value, hi.value) == (min(known), max(known)), (e, a, b)


@pytest.mark.parametrize("op", ["max", "min"])
def test_printed_ends_of_two_operands_are_those_of_numbers(op: str) -> None:
    e = ex.binary(op, P, M)
    for x, y in itertools.product(INTERVALS, INTERVALS):
        printed = interval(e, [(ex.const(x[0]), ex.const(x[1])), (ex.const(y[0]), ex.const(y[1]))], TERMS)
        assert printed is not None
        assert tuple(end.value for end in printed) == interval(e, [x, y], PLAIN)


@pytest.mark.parametrize("keep", [
    M <= P, ex.unary("abs", P - M) < 3, ex.equal(P // 4, M // 4), (P - M) % 3 < 2,
    ex.minimum(P, M + 2) > ex.maximum(M, 4), ex.where(P < 4, P, M * 2) >= 5, ex.equal(P * P, M), ~(M > P) | (M % 4 < 2),
], ids=str)
def test_classes_of_tiles_hold_at_every_point(keep: Expr) -> None:
    every, some = Corners.of("p", "m", 4, 4).predicate(keep)
    for p0, p1, m0, m1 in ((a, b, c, d) for (a, b), (c, d) in itertools.product([(0, 3), (2, 2), (4, 9), (8, 15)], repeat=2)):
        tile = {ex.index("p0"): p0, ex.index("p1"): p1, ex.index("m0"): m0, ex.index("m1"): m1}
        table = {e: ex.const(v) for e, v in tile.items()}
        kept = [at(keep, p=p, m=m) is ex.TRUE for p in range(p0, p1 + 1) for m in range(m0, m1 + 1)]
        assert ex.substitute(every, table) is not ex.TRUE or all(kept)
        assert ex.substitute(some, table) is not ex.FALSE or not any(kept)


@pytest.mark.parametrize(("tile", "block"), [(4, 4), (8, 4), (4, 8), (4, 6), (6, 4)])
def test_a_table_of_blocks_is_read_where_a_tile_lies(tile: int, block: int) -> None:
    """Tiles in one block read its element, tiles of several blocks their extremes; tiles that cut a block know nothing."""
    keep = ex.load("T", (ex.index("h"), P // block, M // block), "b1") & (M <= P)
    corners = Corners.of("p", "m", tile, tile)
    every, some = corners.predicate(keep)
    read = {str(x.attr) for e in (every, some) for x in ex.loads(e)}
    whole = [t for t in corners.tables.values() if t.whole]
    if block % tile == 0:
        assert read == {"T"}
        assert not corners.tables
    elif tile % block == 0:
        assert [t.blocked for t in corners.tables.values()] == [((1, "p", block), (2, "m", block))]
        assert not whole
    else:
        assert whole
