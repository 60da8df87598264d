"""Whether integers of a score may pass their 64 or 32 bits: tensors wrap around there, and no reasoning about them does.

    (m · 6364136223846793005 + p) > 0      passes        p · M + m        does not, below 16 million tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from .. import expr as ex
from ..cascade import Rank
from ..expr import Expr
from .interval_rules import BITWISE, LIMITS, PLAIN, bitwise, interval

# What coordinates and sizes stay below where they are symbolic, and what run-time integers do (positions, segments): tables
# beyond 16 million rows use 64-bit terms anyhow.
REACH, DATA = 2**24, 2**29
HELD: Mapping[str, int] = {d: LIMITS[d][1] for d in ("i32", "i64")}
_DATA = (-DATA, DATA)
_Interval: TypeAlias = tuple[float, float]


def passes(root: Expr, ranks: Mapping[str, Rank]) -> Expr | None:
    """The first integer term that may be too large for its type, or None."""
    known: dict[Expr, _Interval] = {}
    for e in ex.walk(root):
        if e.dtype != "b1" and e.dtype not in ex.INTEGERS:
            continue
        lo, hi = known[e] = _reached(e, [known.get(a, _DATA) for a in e.args], ranks)
        if max(-lo, hi) > HELD.get(e.dtype, math.inf):
            return e
    return None


def _reached(e: Expr, args: list[_Interval], ranks: Mapping[str, Rank]) -> _Interval:
    """What a term stays in, its ends included."""
    if e.dtype in LIMITS and e.dtype not in HELD:
        return LIMITS[e.dtype]
    match e.op:
        case "const":
            return int(e.value), int(e.value)
        case "index":
            extent = ranks[str(e.attr)].size if str(e.attr) in ranks else REACH
            return 0, extent if isinstance(extent, int) else REACH
        case "symbol":
            return 0, REACH
        case "cast":
            return args[0]
        case "load":
            return _DATA
        case "pow" if not e.args[1].is_const:
            # no base but 0, 1 and −1 has a 64th power of 64 bits
            base, exponent = (int(max(-lo, hi)) for lo, hi in args)
            return -(max(base, 1) ** min(exponent, 64)), max(base, 1) ** min(exponent, 64)
    return (bitwise(e.op, args, PLAIN) if e.op in BITWISE else interval(e, args, PLAIN)) or _DATA
