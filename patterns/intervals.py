"""Interval analysis of terms: which values a term can take while the coordinates run over boxes, for many boxes at once.

    spans(term, box)  =  (lo, hi), arrays with  lo ≤ term(point) ≤ hi  for every point of each box

A predicate's span is a pair of booleans: *certainly true*, *possibly true*. Numbers are float64; an end that is NaN says
that nothing is known there, NaN itself included, and it decides no comparison. Spans are sound for every term, and
exact when the parts that vary do so independently; differences of coordinates go through the affine normal form.
Geometry is numpy; loads may bring arrays of another namespace (torch on a device), which then joins in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from . import expr as ex
from .affine import Affine, affine
from .expr import Expr

Array: TypeAlias = Any
Span: TypeAlias = tuple[Array, Array]
# bounds(tensor, [(lo, hi) of each coordinate]) -> (lo, hi) of the elements; None: nothing is known of that tensor.
Bounds: TypeAlias = Callable[[str, Sequence[Span]], "Span | None"]

# The magnitude of integers above which a span gives up: sums of eight such numbers are exact in float64.
LIMIT = 2.0**50
PLAIN = ("index", "symbol", "load")
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


@dataclass(frozen=True)
class Step:
    """One term to evaluate, the terms it needs, and its affine form: of the term, or of left minus right."""

    term: Expr
    needs: tuple[Expr, ...]
    form: Affine | None


@lru_cache(maxsize=1024)
def steps(root: Expr) -> tuple[Step, ...]:
    """The terms that the span of `root` needs, in order; sums of integers are read through their normal form."""
    for e in ex.walk(root):
        if e.dtype in ex.INTEGERS:
            affine(e)
    out: dict[Expr, Step] = {}
    stack: list[tuple[Step, bool]] = [(_step(root), False)]
    while stack:
        step, ready = stack.pop()
        if step.term in out:
            continue
        if ready:
            out[step.term] = step
            continue
        stack.append((step, True))
        stack.extend((_step(n), False) for n in step.needs if n not in out)
    return tuple(out.values())


def _step(e: Expr) -> Step:
    if e.op in ex.COMPARISONS and all(a.dtype in ex.INTEGERS for a in e.args):
        form = affine(e.args[0]) - affine(e.args[1])
        return Step(e, form.atoms, form)
    if e.dtype == "i64":
        form = affine(e)
        if form.terms != ((e, 1),):
            return Step(e, form.atoms, form)
    return Step(e, e.args, None)


def spans(
    root: Expr, box: Mapping[str, Span], *, symbols: Mapping[str, int] | None = None, bounds: Bounds | None = None,
    xp: Any = np,
) -> Span:  # fmt: skip
    """The span of a term over boxes: `box[rank] = (lo, hi)`, inclusive, arrays that broadcast together.

    Raises ValueError for a rank or a symbol without a value.
    """
    with np.errstate(all="ignore"):
        memo: dict[Expr, Span] = {}
        for step in steps(root):
            args = _align([memo[n] for n in step.needs], xp)
            lib = np if all(_native(a) for span in args for a in span) else xp
            memo[step.term] = _span(step, args, lib, box, symbols or {}, bounds)
        return memo[root]


def _native(a: Array) -> bool:
    return isinstance(a, (np.ndarray, np.generic))


def _align(args: list[Span], xp: Any) -> list[Span]:
    """Bring all operands into one namespace: that of the first operand that is not numpy."""
    foreign = next((a for span in args for a in span if not _native(a)), None)
    if foreign is None:
        return args

    def move(a: Array) -> Array:
        return xp.asarray(np.asarray(a), device=foreign.device) if _native(a) else a

    return [(move(lo), move(hi)) for lo, hi in args]


def _span(
    step: Step, args: list[Span], lib: Any, box: Mapping[str, Span], symbols: Mapping[str, int], bounds: Bounds | None
) -> Span:
    e = step.term
    if step.form is not None:
        known = dict(zip(step.needs, args))
        lo, hi = _sum(step.form, known, lib)
        return _against_zero(e.op, lo, hi, step.form) if e.dtype == "b1" else (lo, hi)
    match e.op:
        case "const":
            if e.dtype == "b1":
                return np.bool_(e.value), np.bool_(e.value)
            value = np.float64(e.value)
            return (value, value) if e.dtype in ex.INTEGERS else _rounded((value, value), e.dtype, np)
        case "index":
            if str(e.attr) not in box:
                raise ValueError(f"rank {e.attr} has no interval")
            lo, hi = box[str(e.attr)]
            return np.asarray(lo, dtype=np.float64), np.asarray(hi, dtype=np.float64)
        case "symbol":
            if str(e.attr) not in symbols:
                raise ValueError(f"size {e.attr} has no value")
            return np.float64(symbols[str(e.attr)]), np.float64(symbols[str(e.attr)])
        case "load":
            return _load(e, args, bounds)
        case "where":
            return _where(e, args, lib)
        case "cast":
            return _cast(args[0], e.args[0].dtype, e.dtype, lib)
    if e.dtype == "b1":
        return _predicate(e, args, lib)
    numbers = [_cast(span, a.dtype, e.dtype, lib) for span, a in zip(args, e.args)]
    if e.dtype in ex.INTEGERS:
        return _clip_integer(_integer(e, numbers, lib), e.dtype, lib)
    return _rounded(_float(e, numbers, lib), e.dtype, lib)


# --- integers ---------------------------------------------------------------------------------------------------


def _sum(form: Affine, known: Mapping[Expr, Span], lib: Any) -> Span:
    if not form.terms:
        return np.float64(form.constant), np.float64(form.constant)
    lo: Array = float(form.constant)
    hi: Array = lo
    size: Array = abs(lo)
    for a, c in form.terms:
        left, right = known[a] if c > 0 else known[a][::-1]
        lo, hi = lo + left * c, hi + right * c
        if abs(c) > 1 or a.op not in PLAIN:
            size = size + lib.maximum(abs(left), abs(right)) * abs(c)
    # Float64 counts to 2^53, nothing is claimed beyond; up to eight plain coordinates and loads stay below it.
    if isinstance(size, float) and size <= LIMIT and len(form.terms) <= 8:
        return lo, hi
    safe = size <= LIMIT
    return lib.where(safe, lo, -math.inf), lib.where(safe, hi, math.inf)


def _against_zero(op: str, lo: Array, hi: Array, form: Affine) -> Span:
    """`left ∘ right` as `left − right ∘ 0`."""
    match op:
        case "lt":
            return hi < 0, lo < 0
        case "le":
            return hi <= 0, lo <= 0
        case "gt":
            return lo > 0, hi > 0
        case "ge":
            return lo >= 0, hi >= 0
    # g divides every value of the sum but for the constant: then the difference is never 0
    never = form.divisor > 1 and form.constant % form.divisor != 0
    same = (lo == 0) & (hi == 0)
    maybe = (lo <= 0) & (hi >= 0)
    if never:
        maybe = maybe & ~maybe
    return (same, maybe) if op == "eq" else (~maybe, ~same)


def _clip_integer(span: Span, dtype: str, lib: Any) -> Span:
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


def _integer(e: Expr, args: list[Span], lib: Any) -> Span:
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
            return f(a), f(b)
        case "not":
            return -b - 1, -a - 1
    return None


def _where(e: Expr, args: list[Span], lib: Any) -> Span:
    yes, maybe = args[0]
    if e.dtype == "b1":
        (a, b), (c, d) = args[1], args[2]
        return (yes & a) | (~maybe & c) | (a & c), (maybe & b) | (~yes & d)
    (a, b), (c, d) = (_cast(s, x.dtype, e.dtype, lib) for s, x in zip(args[1:], e.args[1:]))
    lo = lib.where(yes, a, lib.where(maybe, lib.minimum(a, c), c))
    return lo, lib.where(yes, b, lib.where(maybe, lib.maximum(b, d), d))


def _cast(span: Span, source: str, target: str, lib: Any) -> Span:
    lo, hi = span
    if source == target:
        return span
    if target == "b1":
        return _truth(lo, hi)
    if source == "b1":
        return _number(lo, lib), _number(hi, lib)
    if target in ex.INTEGERS:
        if source in ex.FLOATS:
            lo, hi = lib.trunc(lo), lib.trunc(hi)
            lo, hi = lib.where(lo != lo, -math.inf, lo), lib.where(hi != hi, math.inf, hi)
        return _clip_integer((lo, hi), target, lib)
    return _rounded(span, target, lib)


def _number(x: Array, lib: Any) -> Array:
    return x.astype(np.float64) if lib is np else x.to(lib.float64)


def _truth(lo: Array, hi: Array) -> Span:
    """`x ≠ 0`; a NaN is true as well."""
    return (lo > 0) | (hi < 0), ~((lo == 0) & (hi == 0))


def _load(e: Expr, args: list[Span], bounds: Bounds | None) -> Span:
    found = bounds(str(e.attr), args) if bounds is not None else None
    if found is not None:
        lo, hi = found
        return (lo != 0, hi != 0) if e.dtype == "b1" else (lo, hi)
    shape = np.broadcast_shapes(*(np.shape(x) for span in args for x in span)) if args else ()
    if e.dtype == "b1":
        return np.zeros(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
    lo, hi = INTEGER_RANGE.get(e.dtype, (math.nan, math.nan))
    return np.full(shape, lo), np.full(shape, hi)


# --- predicates -------------------------------------------------------------------------------------------------


def _predicate(e: Expr, args: list[Span], lib: Any) -> Span:
    (a, b) = args[0]
    match e.op:
        case "not":
            return ~b, ~a
        case "isnan":
            unknown = (a != a) | (b != b)
            return unknown & ~unknown, unknown
        case "isinf":
            unknown = (a != a) | (b != b)
            infinite = abs(a) == math.inf
            return infinite & (a == b), unknown | infinite | (abs(b) == math.inf)
    (c, d) = args[1]
    if e.op in ex.COMPARISONS and any(x.dtype != "b1" for x in e.args):
        common = ex.promote(e.args[0].dtype, e.args[1].dtype)
        (a, b), (c, d) = (_cast(span, x.dtype, common, lib) for span, x in zip(args, e.args))
        return _compare(e.op, a, b, c, d)
    match e.op:
        case "and":
            return a & c, b & d
        case "or":
            return a | c, b | d
        case "xor" | "ne":
            return (a & ~d) | (~b & c), ~((a & c) | (~b & ~d))
        case "eq":
            return (a & c) | (~b & ~d), ~((a & ~d) | (~b & c))
        case "lt":
            return ~b & c, ~a & d
        case "gt":
            return a & ~d, b & ~c
        case "le":
            return ~b | c, ~a | d
        case "ge":
            return a | ~d, b | ~c
        case "min" | "mul":
            return a & c, b & d
        case "max" | "add":
            return a | c, b | d
    nothing = a & c & ~a
    return nothing, ~nothing


def _compare(op: str, a: Array, b: Array, c: Array, d: Array) -> Span:
    """Comparison of [a, b] with [c, d]; an unknown (NaN) end leaves both answers possible."""
    match op:
        case "lt":
            return b < c, ~(a >= d)
        case "le":
            return b <= c, ~(a > d)
        case "gt":
            return a > d, ~(b <= c)
        case "ge":
            return a >= d, ~(b < c)
    same = (a == b) & (c == d) & (a == c)
    apart = (b < c) | (a > d)
    return (same, ~apart) if op == "eq" else (apart, ~same)


# --- floats -----------------------------------------------------------------------------------------------------

_INCREASING = ("exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sqrt")
_RANGE: Mapping[str, tuple[float, float]] = {"sigmoid": (0.0, 1.0), "erf": (-1.0, 1.0)}


def _float(e: Expr, args: list[Span], lib: Any) -> Span:
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


def _rounded(span: Span, dtype: str, lib: Any) -> Span:
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
