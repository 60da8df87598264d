"""Key ranges of row blocks, beside every point of the mask."""

from __future__ import annotations

import numpy as np
import pytest

from reattend.patterns import expr as ex
from reattend.patterns.expr import FALSE, Expr
from reattend.patterns.masks.ranges import FIRST, LAST, key_range
from reattend.patterns.terms.intervals import spans

P, M, B = (ex.index(r) for r in "pmb")
SIZE = ex.symbol("n")
LENGTH = ex.load("length", (B,), "i64")
MASKS = {
    "causal": M <= P, "later": M >= P, "strict": M < P, "aligned at the end": M <= P + 7, "window": (M <= P) & (P - M < 9),
    "band": ex.unary("abs", P - M) < 5, "blocks": ex.equal(P // 8, M // 8), "chunks": M // 4 <= P // 6,
    "shifted blocks": (M + 3) // 8 <= (P + 1) // 8, "far": (P - M > 3) & (M > 2), "lengths": (M < LENGTH) & (M <= P),
    "rows": (P < 13) & (M <= P), "double": (M * 2 <= P) & (M * 3 >= P), "none": (M < P) & (M > P),
}
# What bounds of rows say of the rows between them is not exact there.
ROUGH = ("blocks", "chunks", "shifted blocks", "double")


def value(e: Expr, first: int, last: int, keys: int, length: int) -> int:
    e = ex.substitute(e, {SIZE: ex.const(keys), LENGTH: ex.const(length), FIRST: ex.const(first), LAST: ex.const(last)})
    low, high = spans(e, {})
    assert low == high
    return int(low)


def brute(keep: Expr, rows: int, keys: int, length: int) -> np.ndarray:
    keep = ex.substitute(keep, {SIZE: ex.const(keys), LENGTH: ex.const(length)})
    p, m = np.arange(rows)[:, None], np.arange(keys)[None, :]
    yes, maybe = spans(keep, {"p": (p, p), "m": (m, m)})
    assert (yes == maybe).all()
    return np.broadcast_to(yes, (rows, keys))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("rows", "keys", "tile"), [(40, 40, 8), (37, 61, 16), (61, 23, 5), (1, 9, 16)])
def test_ranges_are_those_of_the_points(name: str, rows: int, keys: int, tile: int) -> None:
    found = key_range(MASKS[name], "p", "m", SIZE)
    assert found is not None
    for length in (0, 11, keys):
        kept = brute(MASKS[name], rows, keys, length)
        for first in range(0, rows, tile):
            block = kept[first : first + tile]
            low, high, full_low, full_high, alive = (
                value(e, first, first + len(block) - 1, keys, length) for e in found.terms
            )
            some, every = np.flatnonzero(block.any(0)), np.flatnonzero(block.all(0))
            if len(some):
                assert (low, high) == (some[0], some[-1] + 1)
            else:
                assert low >= high
            if len(every):
                assert (full_low, full_high) == (every[0], every[-1] + 1)
            else:
                assert full_low >= full_high
            certain = bool(block.any(1).all())
            assert (not alive or certain) if name in ROUGH else bool(alive) == certain


@pytest.mark.parametrize(
    "keep",
    [(M <= P) | (M < 6), ex.equal((P + M) % 2, 0), ex.load("pad", (B, M), "b1"), (P * 3 - M * 2 < 20) & (M * 2 - P * 3 < 20)],
    ids=str,
)
def test_other_masks_have_none(keep: Expr) -> None:
    assert key_range(keep, "p", "m", SIZE) is None


def test_rows_between_the_ends_are_not_vouched_for_where_bounds_jump() -> None:
    found = key_range(MASKS["blocks"], "p", "m", SIZE)
    assert found is not None
    assert found.alive is FALSE


def test_later_blocks_of_a_triangle_have_more_to_do() -> None:
    growing = {n: r.growing for n in ("causal", "window", "later", "lengths") if (r := key_range(MASKS[n], "p", "m", SIZE))}
    assert growing == {"causal": True, "window": True, "later": False, "lengths": True}
