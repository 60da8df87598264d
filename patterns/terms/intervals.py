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
from types import ModuleType
from typing import TypeAlias

import numpy as np

from .. import expr as ex
from ..expr import Expr
from .affine import Affine, affine
from .arithmetic import INTEGER_RANGE, LIMIT, Array, Span, clip_integer, floating, integer, rounded

__all__ = ["Array", "LoadSpan", "Span", "Step", "align", "native", "spans", "steps"]

# Atoms whose magnitude stays below LIMIT.
PLAIN = ("index", "symbol", "load")
# of_load(tensor, [(lo, hi) of each coordinate]) -> (lo, hi) of the elements; None: nothing is known of that tensor.
LoadSpan: TypeAlias = Callable[[str, Sequence[Span]], "Span | None"]


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
    root: Expr, box: Mapping[str, Span], *, symbols: Mapping[str, int] | None = None, of_load: LoadSpan | None = None,
    xp: ModuleType = np,
) -> Span:
    """The span of a term over boxes: `box[rank] = (lo, hi)`, inclusive, arrays that broadcast together.

    Raises ValueError for a rank or a symbol without a value.
    """
    with np.errstate(all="ignore"):
        memo: dict[Expr, Span] = {}
        for step in steps(root):
            args = align([memo[n] for n in step.needs], xp)
            lib = np if all(native(a) for span in args for a in span) else xp
            memo[step.term] = _span(step, args, lib, box, symbols or {}, of_load)
        return memo[root]


def native(a: Array) -> bool:
    return isinstance(a, (np.ndarray, np.generic))


def align(args: list[Span], xp: ModuleType) -> list[Span]:
    """Bring all operands into one namespace: that of the first operand that is not numpy."""
    foreign = next((a for span in args for a in span if not native(a)), None)
    if foreign is None:
        return args

    def move(a: Array) -> Array:
        return xp.asarray(np.asarray(a), device=foreign.device) if native(a) else a

    return [(move(lo), move(hi)) for lo, hi in args]


def _span(
    step: Step, args: list[Span], lib: ModuleType, box: Mapping[str, Span], symbols: Mapping[str, int],
    of_load: LoadSpan | None,
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
            return (value, value) if e.dtype in ex.INTEGERS else rounded((value, value), e.dtype, np)
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
            return _load(e, args, of_load)
        case "where":
            return _where(e, args, lib)
        case "cast":
            return _cast(args[0], e.args[0].dtype, e.dtype, lib)
    if e.dtype == "b1":
        return _predicate(e, args, lib)
    numbers = [_cast(span, a.dtype, e.dtype, lib) for span, a in zip(args, e.args)]
    if e.dtype in ex.INTEGERS:
        return clip_integer(integer(e, numbers, lib), e.dtype, lib)
    return rounded(floating(e, numbers, lib), e.dtype, lib)


# --- integers ---------------------------------------------------------------------------------------------------


def _sum(form: Affine, known: Mapping[Expr, Span], lib: ModuleType) -> Span:
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


def _where(e: Expr, args: list[Span], lib: ModuleType) -> Span:
    yes, maybe = args[0]
    if e.dtype == "b1":
        (a, b), (c, d) = args[1], args[2]
        return (yes & a) | (~maybe & c) | (a & c), (maybe & b) | (~yes & d)
    (a, b), (c, d) = (_cast(s, x.dtype, e.dtype, lib) for s, x in zip(args[1:], e.args[1:]))
    lo = lib.where(yes, a, lib.where(maybe, lib.minimum(a, c), c))
    return lo, lib.where(yes, b, lib.where(maybe, lib.maximum(b, d), d))


def _cast(span: Span, source: str, target: str, lib: ModuleType) -> Span:
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
        return clip_integer((lo, hi), target, lib)
    return rounded(span, target, lib)


def _number(x: Array, lib: ModuleType) -> Array:
    return x.astype(np.float64) if lib is np else x.to(lib.float64)


def _truth(lo: Array, hi: Array) -> Span:
    """`x ≠ 0`; a NaN is true as well."""
    return (lo > 0) | (hi < 0), ~((lo == 0) & (hi == 0))


def _load(e: Expr, args: list[Span], of_load: LoadSpan | None) -> Span:
    found = of_load(str(e.attr), args) if of_load is not None else None
    if found is not None:
        lo, hi = found
        return (lo != 0, hi != 0) if e.dtype == "b1" else (lo, hi)
    shape = np.broadcast_shapes(*(np.shape(x) for span in args for x in span)) if args else ()
    if e.dtype == "b1":
        return np.zeros(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
    lo, hi = INTEGER_RANGE.get(e.dtype, (math.nan, math.nan))
    return np.full(shape, lo), np.full(shape, hi)


# --- predicates -------------------------------------------------------------------------------------------------


def _predicate(e: Expr, args: list[Span], lib: ModuleType) -> Span:
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


