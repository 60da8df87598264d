"""What a narrow float type makes of numbers beyond its range: ±∞. Kernels compute in wider types, so it is written down.

    f16(where(keep, 0, −1e9))     →  where(keep, 0, −∞)
    f16((1 − keep) · −1e9)        →  where((1 − keep) · −1e9 ≤ −65520, −∞, (1 − keep) · −1e9)

Only of terms without float data, such as masks: whether scores pass a type's range is not known, and not reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .. import expr as ex
from ..expr import Expr
from .intervals import spans

# The smallest numbers that are rounded to ∞.
BEYOND: Mapping[str, float] = {"f16": 65520.0, "bf16": 3.3961775292304601e38, "f32": 3.4028235677973366e38}
# The largest coordinate or size that proofs allow for.
LARGEST = 2.0**40


def narrowed(e: Expr, dtype: str) -> Expr:
    """The term, still in a type of its own, with ±∞ where a value of type `dtype` would be ±∞."""
    limit = BEYOND.get(dtype)
    if limit is None or not e.is_float or e.op == "load":
        return e
    if e.op == "where":
        return ex.where(e.args[0], narrowed(e.args[1], dtype), narrowed(e.args[2], dtype))
    if e.op == "cast":
        inner = narrowed(e.args[0], dtype)
        return e if inner is e.args[0] else ex.cast(inner, e.dtype)
    if any(x.is_float for x in ex.loads(e)):
        return e
    low, high = _span(e)
    if (-limit < low and high < limit) or not (math.isfinite(low) and math.isfinite(high)):
        return e
    out = e
    if low <= -limit:
        out = ex.where(e <= -limit, ex.const(-math.inf, e.dtype), out)
    if high >= limit:
        out = ex.where(e >= limit, ex.const(math.inf, e.dtype), out)
    return out


def _span(e: Expr) -> tuple[float, float]:
    """The range of the term where nothing is rounded."""

    def wide(t: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if t.op == "const" and t.is_float:
            return ex.const(t.value, "f64")
        return ex.cast(args[0], "f64") if t.op == "cast" and t.is_float else None

    e = ex.rebuild(e, wide)
    e = ex.substitute(e, {ex.symbol(n): ex.index(f"size {n}") for n in ex.symbols(e)})
    low, high = spans(e, {r: (np.float64(0), np.float64(LARGEST)) for r in e.ranks})
    return float(np.min(low)), float(np.max(high))
