"""Whether integers of a score may pass their 64 or 32 bits: tensors wrap around there, and no reasoning about them does.

    (m · 6364136223846793005 + p) > 0      passes        p · M + m        does not, below 16 million tokens
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import expr as ex
from ..cascade import Rank
from ..expr import Expr

# What coordinates and sizes stay below where they are symbolic, and what run-time integers do (positions, segments): tables
# beyond 16 million rows use 64-bit terms anyhow.
REACH, DATA = 2**24, 2**29
LARGEST: Mapping[str, int] = {"i32": 2**31 - 1, "i64": 2**63 - 1}
_WIDTH: Mapping[str, int] = {"b1": 1, "u8": 2**8, "i8": 2**7, "i16": 2**15}


def passes(root: Expr, ranks: Mapping[str, Rank]) -> Expr | None:
    """The first integer term that may be too large for its type, or None."""
    size: dict[Expr, int] = {}
    for e in ex.walk(root):
        if e.dtype != "b1" and e.dtype not in ex.INTEGERS:
            continue
        size[e] = _magnitude(e, [size.get(a, DATA) for a in e.args], ranks)
        if size[e] > LARGEST.get(e.dtype, size[e]):
            return e
    return None


def _magnitude(e: Expr, args: list[int], ranks: Mapping[str, Rank]) -> int:
    """What the absolute value of a term stays below or at."""
    match e.op:
        case "const":
            return abs(int(e.value))
        case "index":
            extent = ranks[str(e.attr)].size if str(e.attr) in ranks else REACH
            return extent if isinstance(extent, int) else REACH
        case "symbol":
            return REACH
        case "add" | "sub":
            return args[0] + args[1]
        case "mul":
            return args[0] * args[1]
        case "neg" | "abs" | "relu" | "sign" | "floordiv":
            return args[0]
        case "not" if e.dtype != "b1":
            return args[0] + 1
        case "mod":
            return args[1]
        case "pow":
            # no base but 0, 1 and −1 has a 64th power of 64 bits
            return int(args[0] ** min(args[1], 64))
        case "max" | "min":
            return max(args)
        case "where":
            return max(args[1:])
        case "and" | "or" | "xor" if e.dtype != "b1":
            return 2 * max(args)
    # loads, casts of floats, predicates
    return _WIDTH.get(e.dtype, args[0] if e.op == "cast" else DATA)
