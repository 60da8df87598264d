"""The keys of a block of rows as one range, in closed form: terms over its first and last row, for a kernel to compute.

    keep  =  ∧ (a·x + c·y + r ≤ 0)        x = (p + i) // n, y = (m + j) // k, r free of both (sizes, lengths in tensors)
    some row keeps a key       only from `low` to below `high`
    all rows keep it           from `full_low` to below `full_high`

So a causal triangle, a window, blocks and `m < length[b]` need no list of tiles, and no look at data on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .. import expr as ex
from ..expr import FALSE, Expr
from ..terms.affine import Affine, affine
from ..terms.conditions import conjunction
from .closed_form import Half, halves

# Leaves of the terms: the first and the last row of a block.
FIRST, LAST = ex.index("$first"), ex.index("$last")


@dataclass(frozen=True)
class KeyRange:
    """Terms over FIRST and LAST. `alive`: every row between them keeps a key, or FALSE where the ends do not tell.

    `growing`: later rows reach further, so that the last blocks of a triangle have most to do.
    """

    low: Expr
    high: Expr
    full_low: Expr
    full_high: Expr
    alive: Expr
    growing: bool

    @property
    def terms(self) -> tuple[Expr, ...]:
        return self.low, self.high, self.full_low, self.full_high, self.alive


@lru_cache(maxsize=256)
def key_range(keep: Expr, query: str, key: str, size: Expr) -> KeyRange | None:
    """The range of a mask over `size` keys, or None where it is no conjunction of half-planes."""
    found = halves(keep, query, key)
    if found is None:
        return None
    written, joined, against = found
    low, high = _between(joined, None, size)
    full_low, full_high = ex.const(0), size
    for h in against:
        if h.y is None:
            full_high = ex.where(_rest(h, None).term() <= 0, ex.const(0), full_high)
        elif h.c > 0:
            full_low = ex.maximum(full_low, _past(h, None))
        else:
            full_high = ex.minimum(full_high, _least(h, None))
    # between the ends of the block a range is nowhere narrower: its bounds are maxima and minima of whole multiples of p
    even = all(abs(h.c) <= 1 and all(s is None or s.step == 1 for s in (h.x, h.y)) for h in written)
    alive = conjunction(tuple(_meets(written, row, size) for row in (FIRST, LAST))) if even else FALSE
    growing = any(h.c > 0 and h.a < 0 for h in written)
    return KeyRange(low, high, full_low, full_high, alive, growing)


def _meets(parts: tuple[Half, ...], row: Expr, size: Expr) -> Expr:
    low, high = _between(parts, row, size)
    return low < high


def _between(parts: tuple[Half, ...], row: Expr | None, size: Expr) -> tuple[Expr, Expr]:
    """The keys for which all hold in a row, or each in the row of the block that helps it most."""
    low, high = ex.const(0), size
    for h in parts:
        if h.y is None:
            high = ex.where(_rest(h, row).term() <= 0, high, ex.const(0))
        elif h.c > 0:
            high = ex.minimum(high, _past(h, row))
        else:
            low = ex.maximum(low, _least(h, row))
    return low, high


def _rest(h: Half, row: Expr | None) -> Affine:
    """What stands beside the key's part."""
    if h.x is None:
        return h.rest
    at = (FIRST if h.a > 0 else LAST) if row is None else row
    return h.rest + affine((at + h.x.shift) // h.x.step).scaled(h.a)


def _past(h: Half, row: Expr | None) -> Expr:
    """The key after the last one of c·y + rest ≤ 0 with c > 0."""
    assert h.y is not None
    y = affine(_rest(h, row).scaled(-1).term() // h.c)
    return ((y + Affine((), 1)).scaled(h.y.step) + Affine((), -h.y.shift)).term()


def _least(h: Half, row: Expr | None) -> Expr:
    """The first key of c·y + rest ≤ 0 with c < 0."""
    assert h.y is not None
    y = affine(_rest(h, row).scaled(-1).term() // -h.c).scaled(-1)
    return (y.scaled(h.y.step) + Affine((), -h.y.shift)).term()


__all__ = ["FIRST", "LAST", "KeyRange", "key_range"]
