"""What integer terms can reach: which of them need 64 bits, and which coordinates need no clamp.

    p − m, p < 2²⁴, m < 2²⁴        in [−2²⁴, 2²⁴]        h // 2 of 8 heads        inside a dimension of 4
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy

from ...patterns import expr as ex
from ...patterns.cascade import Size
from ...patterns.expr import Expr
from ...patterns.terms.overflow import REACH

INT32 = 2**31 - 1


def bounds(e: Expr, extent: Mapping[str, Size]) -> tuple[float, float]:
    """A range that an integer term cannot leave while sizes and coordinates stay below REACH."""
    memo: dict[Expr, tuple[float, float]] = {}
    for t in ex.walk(e):
        memo[t] = _bounds(t, [memo[a] for a in t.args], extent)
    return memo[e]


def _bounds(e: Expr, args: list[tuple[float, float]], extent: Mapping[str, Size]) -> tuple[float, float]:
    match e.op:
        case "const":
            return (float(e.value), float(e.value)) if e.value == e.value else (-math.inf, math.inf)
        case "index":
            size = extent.get(str(e.attr), REACH)
            return 0.0, float(size) - 1 if isinstance(size, int) else float(REACH)
        case "symbol":
            return 0.0, float(REACH)
        case "cast" if e.dtype in ("i32", "i64") and e.args[0].dtype in ("i32", "i64", "b1"):
            return args[0]
        case "where" if e.dtype in ex.INTEGERS:
            return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
    if e.dtype == "b1":
        return 0.0, 1.0
    if e.dtype in ("u8", "i8", "i16", "i32"):
        return {"u8": (0.0, 255.0), "i8": (-128.0, 127.0), "i16": (-32768.0, 32767.0)}.get(e.dtype, (-(2.0**31), INT32))
    if e.dtype != "i64" or any(math.isinf(x) for a in args for x in a):
        return -math.inf, math.inf
    match e.op:
        case "add":
            return args[0][0] + args[1][0], args[0][1] + args[1][1]
        case "sub":
            return args[0][0] - args[1][1], args[0][1] - args[1][0]
        case "mul":
            corners = [x * y for x in args[0] for y in args[1]]
            return min(corners), max(corners)
        case "neg":
            return -args[0][1], -args[0][0]
        case "abs":
            return 0.0 if args[0][0] <= 0 <= args[0][1] else min(map(abs, args[0])), max(map(abs, args[0]))
        case "max":
            return max(args[0][0], args[1][0]), max(args[0][1], args[1][1])
        case "min":
            return min(args[0][0], args[1][0]), min(args[0][1], args[1][1])
        case "mod" if args[1][0] >= 0:
            return 0.0, min(args[1][1] - 1, args[0][1]) if args[0][0] >= 0 else args[1][1] - 1
        case "floordiv" if args[1][0] >= 1:
            corners = [x // y for x in args[0] for y in args[1]]
            return min(corners), max(corners)
        case "floordiv" if args[0][0] >= 0 and args[1][0] >= 0:
            return 0.0, args[0][1]
    return -math.inf, math.inf


def in_range(index: Expr, size: Size, extent: Mapping[str, Size]) -> bool:
    """Is the coordinate always inside a dimension of this size, while every rank stays inside its own?"""
    if index.op == "index":
        return bool(sympy.sympify(size) == sympy.sympify(extent[str(index.attr)]))
    if isinstance(size, int):
        lo, hi = bounds(index, extent)
        if lo >= 0 and hi < size:
            return True
    # the head of a group: h // G with H = G·size heads, h % G with G ≤ size
    if index.op in ("floordiv", "mod") and index.args[0].op == "index" and index.args[1].is_const:
        group = int(index.args[1].value)
        heads = sympy.sympify(extent[str(index.args[0].attr)])
        if index.op == "floordiv":
            return bool(sympy.expand(heads - group * sympy.sympify(size)).is_nonpositive)
        return bool((sympy.sympify(size) - group).is_nonnegative)
    return False
