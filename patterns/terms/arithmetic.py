"""Arithmetic on spans: the least and greatest value of one operator over intervals of its operands.

    Integers are exact below 2^50 and wrap as their type does; floats hold both the exact result and its rounding.
    NaN as an end means that nothing is known. `lib` is numpy, or a namespace like it (torch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from ..expr import Expr

Array: TypeAlias = Any
Span: TypeAlias = tuple[Array, Array]

# The magnitude of integers above which a span gives up: sums of eight such numbers are exact in float64.
LIMIT = 2.0**50
INTEGER_RANGE: Mapping[str, tuple[float, float]] = {
    "u8": (0.0, 255.0), "i8": (-128.0, 127.0), "i16": (-(2.0**15), 2.0**15 - 1), "i32": (-(2.0**31), 2.0**31 - 1),
    "i64": (-math.inf, math.inf),
}  # fmt: skip
# Bits of the significand, smallest normal number, largest finite number.
FLOAT_FORMAT: Mapping[str, tuple[int, float, float]] = {
    "f16": (11, 2.0**-14, 65504.0), "bf16": (8, 2.0**-126, 3.3895313892515355e38),
    "f32": (24, 2.0**-126, 3.4028234663852886e38), "f64": (53, 2.0**-1022, 1.7976931348623157e308),
}  # fmt: skip
TORCH_NAME: Mapping[str, str] = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


# --- integers ---------------------------------------------------------------------------------------------------


def clip_integer(span: Span, dtype: str, lib: Any) -> Span:
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


def integer(e: Expr, args: list[Span], lib: Any) -> Span:
    op = e.op
    (a, b) = args[0]
    if len(args) == 1:
        return _monotone_or_even(op, a, b, lib) or (np.float64(-math.inf), np.float64(math.inf))
    (c, d) = args[1]
    match op:
        case "add":
            return a + c, b + d
        case "sub":
            return a - d, b - c
        case "mul":
            if e.args[0] is e.args[1]:
                return _square(a, b, lib)
            return _corners(lambda x, y: x * y, a, b, c, d, lib)
        case "max":
            return lib.maximum(a, c), lib.maximum(b, d)
        case "min":
            return lib.minimum(a, c), lib.minimum(b, d)
        case "floordiv":
            lo, hi = _corners(lambda x, y: lib.floor(x / y), a, b, c, d, lib)
            known = (c > 0) | (d < 0)
            return lib.where(known, lo, -math.inf), lib.where(known, hi, math.inf)
        case "mod":
            return _mod(a, b, c, d, lib)
        case "pow":
            exponent = e.args[1]
            if exponent.op == "const" and exponent.value == 2:
                return _square(a, b, lib)
        case "and" | "or" | "xor":
            return _bits(op, a, b, c, d, lib)
    nothing = a * 0 + c * 0
    return nothing - math.inf, nothing + math.inf


def _mod(a: Array, b: Array, c: Array, d: Array, lib: Any) -> Span:
    """Remainder by a positive number: exact while the argument stays between two multiples of one modulus."""
    turn = lib.floor(a / c)
    inside = (c == d) & (c > 0) & (turn == lib.floor(b / c))
    positive = c > 0
    most = lib.where(positive, d - 1, math.inf)
    # an argument that is no negative number bounds its remainder
    most = lib.where(positive & (a >= 0), lib.minimum(most, b), most)
    return (
        lib.where(inside, a - turn * c, lib.where(positive, 0.0, -math.inf)),
        lib.where(inside, b - turn * c, most),
    )


def _bits(op: str, a: Array, b: Array, c: Array, d: Array, lib: Any) -> Span:
    """Bitwise operators on integers: exact for single values, else by the number of bits."""
    natural = (a >= 0) & (c >= 0) & (b <= LIMIT) & (d <= LIMIT)
    largest = lib.maximum(b, d)
    width = lib.floor(lib.log2(lib.where(largest >= 1, largest, 1.0))) + 1
    top = 2.0**width - 1
    zero = top * 0
    lo, hi = {
        "and": (zero, lib.minimum(b, d) + zero), "or": (lib.maximum(a, c) + zero, top), "xor": (zero, top),
    }[op]  # fmt: skip
    lo, hi = lib.where(natural, lo, -math.inf), lib.where(natural, hi, math.inf)
    single = (a == b) & (c == d) & (abs(a) <= LIMIT) & (abs(c) <= LIMIT)
    x, y = (lib.where(single, v, 0.0) for v in (a, c))
    x, y = (v.astype(np.int64) if lib is np else v.to(lib.int64) for v in (x, y))
    exact = ({"and": x & y, "or": x | y, "xor": x ^ y}[op]) * 1.0
    return lib.where(single, exact, lo), lib.where(single, exact, hi)


# --- shared by integers and floats ------------------------------------------------------------------------------


def _corners(f: Callable[[Array, Array], Array], a: Array, b: Array, c: Array, d: Array, lib: Any) -> Span:
    """Extremes of an operation that is monotone in each argument, as a product is."""
    w, x, y, z = f(a, c), f(a, d), f(b, c), f(b, d)
    return (
        lib.minimum(lib.minimum(w, x), lib.minimum(y, z)),
        lib.maximum(lib.maximum(w, x), lib.maximum(y, z)),
    )


def _square(a: Array, b: Array, lib: Any) -> Span:
    lo, hi = lib.minimum(a * a, b * b), lib.maximum(a * a, b * b)
    return lib.where((a <= 0) & (b >= 0), 0.0, lo), hi


def _monotone_or_even(op: str, a: Array, b: Array, lib: Any) -> Span | None:
    match op:
        case "neg":
            return -b, -a
        case "abs":
            zero = lib.zeros_like(a)
            return lib.maximum(lib.maximum(a, -b), zero), lib.maximum(abs(a), abs(b))
        case "relu":
            zero = lib.zeros_like(a)
            return lib.maximum(a, zero), lib.maximum(b, zero)
        case "floor" | "ceil" | "trunc" | "sign" | "round":
            f = getattr(lib, op)
            # torch's sign of NaN is 0
            return lib.where(a == a, f(a), a), lib.where(b == b, f(b), b)
        case "not":
            return -b - 1, -a - 1
    return None


# --- floats -----------------------------------------------------------------------------------------------------

_INCREASING = ("exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sqrt")
_RANGE: Mapping[str, tuple[float, float]] = {"sigmoid": (0.0, 1.0), "erf": (-1.0, 1.0)}


def floating(e: Expr, args: list[Span], lib: Any) -> Span:
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


def _float_unary(e: Expr, a: Array, b: Array, lib: Any) -> Span:
    simple = _monotone_or_even(e.op, a, b, lib)
    if simple is not None:
        return simple
    if e.op in _INCREASING:
        f = getattr(lib, e.op)
        lo, hi = f(a), f(b)
        # library functions differ in their last places
        slack = 2.0 ** (2 - FLOAT_FORMAT[e.dtype][0])
        low, high = lo - abs(lo) * slack, hi + abs(hi) * slack
        return lib.where(abs(lo) == math.inf, lo, low), lib.where(abs(hi) == math.inf, hi, high)
    nothing = (a + b) * math.nan
    if e.op in _RANGE:
        known = (a == a) & (b == b)
        return lib.where(known, _RANGE[e.op][0], nothing), lib.where(known, _RANGE[e.op][1], nothing)
    return nothing, nothing


def rounded(span: Span, dtype: str, lib: Any) -> Span:
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
