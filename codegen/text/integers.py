"""What integer terms can reach: which of them need 64 bits, and which coordinates need no clamp.

    p − m, p < 2²⁴, m < 2²⁴        in [−2²⁴, 2²⁴]        h // 2 of 8 heads        inside a dimension of 4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import sympy

from ...patterns import expr as ex
from ...patterns.cascade import Size
from ...patterns.expr import Expr
from ...patterns.operators import facts
from ...patterns.terms.interval_rules import LIMITS, PLAIN, interval
from ...patterns.terms.overflow import REACH

INT32 = LIMITS["i32"][1]
READ = ("add", "sub", "mul", "neg", "abs", "max", "min", "mod", "floordiv")
Interval: TypeAlias = tuple[float, float]
ANY = (-math.inf, math.inf)


def span_of(e: Expr, extent: Mapping[str, Size]) -> Interval:
    """A range that an integer term cannot leave while sizes and coordinates stay below REACH."""
    memo: dict[Expr, Interval] = {}
    for t in ex.walk(e):
        memo[t] = _span_of(t, [memo[a] for a in t.args], extent)
    return memo[e]


def _span_of(e: Expr, args: list[Interval], extent: Mapping[str, Size]) -> Interval:
    match e.op:
        case "const":
            return (e.value, e.value) if e.value == e.value else ANY
        case "index":
            size = extent.get(str(e.attr), REACH)
            return 0, size - 1 if isinstance(size, int) else REACH
        case "symbol":
            return 0, REACH
        case "cast" if e.dtype in ("i32", "i64") and e.args[0].dtype in ("i32", "i64", "b1"):
            return args[0]
        case "where" if e.dtype in ex.INTEGERS:
            return interval(e, args, PLAIN) or ANY
        case "draw":
            return facts(e.op).range
    if e.dtype in LIMITS and e.dtype != "i64":
        return LIMITS[e.dtype]
    return (interval(e, args, PLAIN) if _is_read(e, args) else None) or ANY


def _is_read(e: Expr, args: list[Interval]) -> bool:
    """Is the text of an operator narrowed by what its operands reach? Over unknown operands it has 64 bits."""
    if e.dtype != "i64" or e.op not in READ or any(math.isinf(x) for a in args for x in a):
        return False
    least = args[1][0] if len(args) == 2 else 0
    return (e.op != "mod" or least >= 0) and (e.op != "floordiv" or least >= (1 if args[0][0] < 0 else 0))


def in_range(index: Expr, size: Size, extent: Mapping[str, Size]) -> bool:
    """Is the coordinate always inside a dimension of this size, while every rank stays inside its own?"""
    if index.op == "index":
        return bool(sympy.sympify(size) == sympy.sympify(extent[str(index.attr)]))
    if isinstance(size, int):
        lo, hi = span_of(index, extent)
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
