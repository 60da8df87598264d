"""Arithmetic on spans: the least and greatest value of one operator over intervals of its operands.

    Integers are exact below 2^50 and wrap as their type does; floats hold both the exact result and its rounding.
    NaN as an end means that nothing is known. `lib` is numpy, or a namespace like it (torch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from ..expr import Expr
from ..operators import OPERATORS, Operator
from .interval_rules import BITWISE, LIMITS, bitwise, interval

# numpy's or torch's, as its namespace says; torch is not imported here.
Array: TypeAlias = Any
Span: TypeAlias = tuple[Array, Array]

# The magnitude of integers above which a span gives up: sums of eight such numbers are exact in float64.
LIMIT = 2.0**50
# What float64 does not count may be anything.
INTEGER_RANGE: Mapping[str, tuple[float, float]] = {
    d: (float(lo), float(hi)) if hi <= LIMIT else (-math.inf, math.inf) for d, (lo, hi) in LIMITS.items() if d != "b1"
}
# Bits of the significand, smallest normal number, largest finite number.
FLOAT_FORMAT: Mapping[str, tuple[int, float, float]] = {
    "f16": (11, 2.0**-14, 65504.0), "bf16": (8, 2.0**-126, 3.3895313892515355e38),
    "f32": (24, 2.0**-126, 3.4028234663852886e38), "f64": (53, 2.0**-1022, 1.7976931348623157e308),
}
TORCH_NAME: Mapping[str, str] = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


# --- integers ---------------------------------------------------------------------------------------------------


def clip_integer(span: Span, dtype: str, lib: ModuleType) -> Span:
    """A result outside its type wraps: then the whole type is possible, unless it is a single number."""
    least, most = INTEGER_RANGE[dtype]
    if dtype == "i64":
        lo, hi = span
        return lib.where(lo >= -LIMIT, lo, least), lib.where(hi <= LIMIT, hi, most)
    (lo, hi), count = span, most - least + 1
    fits = (lo >= least) & (hi <= most)
    single = (lo == hi) & (abs(lo) <= LIMIT)
    around = lo - lib.floor((lo - least) / count) * count
    return lib.where(fits, lo, lib.where(single, around, least)), lib.where(fits, hi, lib.where(single, around, most))


def integer(e: Expr, args: list[Span], lib: ModuleType) -> Span:
    """An integer operator, before it wraps; everything where no rule knows."""
    numbers = Arrays(lib)
    found = bitwise(e.op, args, numbers) if e.op in BITWISE else interval(e, args, numbers)
    if found is not None:
        return found
    nothing = sum(lo * 0 for lo, _ in args)
    return nothing - math.inf, nothing + math.inf


@dataclass(frozen=True)
class Arrays:
    """Ends in arrays of float64, which are whole numbers or ±∞; torch has no `maximum` of a tensor and a number."""

    lib: ModuleType

    def least(self, x: Array, y: Array) -> Array:
        return x.clamp(max=y) if self.lib is not np and isinstance(y, int) else self.lib.minimum(x, y)

    def most(self, x: Array, y: Array) -> Array:
        return x.clamp(min=y) if self.lib is not np and isinstance(y, int) else self.lib.maximum(x, y)

    def times(self, x: Array, y: Array) -> Array:
        return self.lib.where((x == 0) | (y == 0), 0.0, x * y)

    def quotient(self, x: Array, y: Array) -> Array:
        found = self.lib.floor(x / y)
        # ∞ / ∞ lies between what its neighbours give
        return self.lib.where(found == found, found, 0.0)

    def rest(self, x: Array, turn: Array, y: Array) -> Array:
        return x - turn * y

    def natural(self, x: Array) -> Array:
        return x >= 0

    def same(self, x: Array, y: Array) -> Array:
        return (x == y) & (abs(x) <= LIMIT)

    def choose(self, proved: Array, tight: Array, safe: Array) -> Array:
        return self.lib.where(proved, tight, safe)

    def ones(self, x: Array) -> Array:
        bits = self.lib.floor(self.lib.log2(self.lib.where(x >= 1, x, 1.0))) + 1
        return self.lib.where(x >= 1, 2.0**bits - 1, 0.0)

    def bits(self, op: str, x: Array, y: Array) -> Array:
        known = (abs(x) <= LIMIT) & (abs(y) <= LIMIT)
        x, y = (self.lib.where(known, v, 0.0) for v in (x, y))
        x, y = (v.astype(np.int64) if self.lib is np else v.to(self.lib.int64) for v in (x, y))
        return BITWISE[op](x, y) * 1.0


# --- shared by integers and floats ------------------------------------------------------------------------------


def _corners(f: Callable[[Array, Array], Array], a: Array, b: Array, c: Array, d: Array, lib: ModuleType) -> Span:
    """Extremes of an operation that is monotone in each argument, as a product is."""
    w, x, y, z = f(a, c), f(a, d), f(b, c), f(b, d)
    return (
        lib.minimum(lib.minimum(w, x), lib.minimum(y, z)),
        lib.maximum(lib.maximum(w, x), lib.maximum(y, z)),
    )


def _square(a: Array, b: Array, lib: ModuleType) -> Span:
    lo, hi = lib.minimum(a * a, b * b), lib.maximum(a * a, b * b)
    return lib.where((a <= 0) & (b >= 0), 0.0, lo), hi


def _function(o: Operator, lib: ModuleType) -> Callable[..., Array]:
    return o.in_numpy(lib) if lib is np else o.in_torch(lib)


def _exact(o: Operator, a: Array, b: Array, lib: ModuleType) -> Span | None:
    """The span of an operator that rounds nothing: monotone, or the absolute value."""
    if o.name == "abs":
        zero = lib.zeros_like(a)
        return lib.maximum(lib.maximum(a, -b), zero), lib.maximum(abs(a), abs(b))
    if not (o.exact and o.monotone):
        return None
    f = _function(o, lib)
    # what is unknown stays so, whatever an operator makes of NaN
    lo, hi = (lib.where(x == x, f(x), math.nan) for x in ((a, b) if o.monotone > 0 else (b, a)))
    return lo, hi


# --- floats -----------------------------------------------------------------------------------------------------

def floating(e: Expr, args: list[Span], lib: ModuleType) -> Span:
    (a, b) = args[0]
    if len(args) == 1:
        return _float_unary(e, a, b, lib)
    (c, d) = args[1]
    match e.op:
        case "add" | "sub":
            if e.op == "sub":
                c, d = -d, -c
            # ∞ − ∞ anywhere inside is NaN
            bad = ((a == -math.inf) & (d == math.inf)) | ((b == math.inf) & (c == -math.inf))
            return lib.where(bad, math.nan, a + c), lib.where(bad, math.nan, b + d)
        case "mul":
            if e.args[0] is e.args[1]:
                return _square(a, b, lib)
            lo, hi = _corners(lambda x, y: x * y, a, b, c, d, lib)
            bad = _holds_infinity(a, b) & _holds_zero(c, d) | _holds_infinity(c, d) & _holds_zero(a, b)
            return lib.where(bad, math.nan, lo), lib.where(bad, math.nan, hi)
        case "div":
            lo, hi = _corners(lambda x, y: x / y, a, b, c, d, lib)
            bad = _holds_zero(c, d) | (_holds_infinity(a, b) & _holds_infinity(c, d))
            return lib.where(bad, math.nan, lo), lib.where(bad, math.nan, hi)
        case "max":
            return lib.maximum(a, c), lib.maximum(b, d)
        case "min":
            return lib.minimum(a, c), lib.minimum(b, d)
        case "pow":
            exponent = e.args[1]
            if exponent.op == "const" and exponent.value == 2:
                return _square(a, b, lib)
    nothing = (a + c) * math.nan
    return nothing, nothing


def _holds_zero(lo: Array, hi: Array) -> Array:
    return ~((lo > 0) | (hi < 0))


def _holds_infinity(lo: Array, hi: Array) -> Array:
    return (abs(lo) == math.inf) | (abs(hi) == math.inf)


def _float_unary(e: Expr, a: Array, b: Array, lib: ModuleType) -> Span:
    o = OPERATORS[e.op]
    exact = _exact(o, a, b, lib)
    if exact is not None:
        return exact
    nothing = (a + b) * math.nan
    if not (o.monotone > 0 or o.bounded):
        return nothing, nothing
    # domains are intervals: what is defined at both ends is so between them
    f = _function(o, lib)
    lo, hi = f(a), f(b)
    if o.monotone > 0:
        # library functions differ in their last places, but keep to their range
        slack = 2.0 ** (2 - FLOAT_FORMAT[e.dtype][0])
        low, high = lib.clip(lo - abs(lo) * slack, *o.range), lib.clip(hi + abs(hi) * slack, *o.range)
        return lib.where(abs(lo) == math.inf, lo, low), lib.where(abs(hi) == math.inf, hi, high)
    known = (lo == lo) & (hi == hi)
    return lib.where(known, o.range[0], nothing), lib.where(known, o.range[1], nothing)


def rounded(span: Span, dtype: str, lib: ModuleType) -> Span:
    """The hull of a value and of its rounding to the type: a kernel may hold either."""
    if dtype == "f64":
        return span
    bits, least, most = FLOAT_FORMAT[dtype]
    lo, hi = span

    def near(x: Array) -> Array:
        if lib is not np:
            return x.to(getattr(lib, TORCH_NAME[dtype])).to(lib.float64)
        mantissa, exponent = np.frexp(x)
        y = np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
        return np.where(abs(y) > most, np.copysign(math.inf, y), y)

    small_lo = (abs(lo) < least) & (lo != 0)
    small_hi = (abs(hi) < least) & (hi != 0)
    return (
        lib.where(small_lo, lo - least, lib.minimum(lo, near(lo))),
        lib.where(small_hi, hi + least, lib.maximum(hi, near(hi))),
    )
