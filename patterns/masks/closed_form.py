"""Tiles of a mask that is affine in query and key, without looking at a tile: one interval of keys a half-plane and row.

    keep  =  ∨ ∧ (a·x + c·y + r ≤ 0)        x = (p + i) // n, y = (m + j) // k, r free of both (heads, tables, sizes)
    a tile keeps a point       its keys meet  ∃p: keep          a tile is full       its keys miss  ∃p: ¬keep

For a fixed key every half-plane bounds x from one side, so that some x of the tile satisfies all of them exactly when
each lower bound is at most each upper one (Fourier and Motzkin; exact over the integers where one of the two has a
coefficient of ±1). What is left are bounds on y: the keys of a conjunction are one interval in every row. Conditions
with |·|, min, max and choices are taken apart first. `not` is another disjunction, so nothing is an approximation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .. import expr as ex
from ..expr import Expr
from ..terms.affine import Affine, affine
from ..terms.arithmetic import Span
from ..terms.conditions import normal
from ..terms.intervals import spans
from .descent import Grid, KnownMask
from .runs import Intervals, Ints, between

# Conjunctions of a mask and half-planes of a conjunction above which intervals are the better way; and what a mask may
# hold of predicates and of choices between numbers, each of which doubles the cases.
CONJUNCTIONS, HALVES = 48, 24
PREDICATES, CHOICES = 96, 10
# The largest number that rows are computed with.
EXACT = 1 << 40


@dataclass(frozen=True)
class Stair:
    """(rank + shift) // step: it takes every whole number between the values at the ends of an interval."""

    shift: int
    step: int


@dataclass(frozen=True)
class Half:
    """a·x + c·y + rest ≤ 0"""

    a: int
    x: Stair | None
    c: int
    y: Stair | None
    rest: Affine


Conjunction = tuple[Half, ...]
Disjunction = tuple[Conjunction, ...]


def in_closed_form(work: KnownMask, grid: Grid) -> tuple[Intervals, Intervals] | None:
    """(full, partial) tiles of a mask as intervals that do not overlap, or None where it has no closed form."""
    parts = _parts(work.keep, grid.query, grid.key)
    if parts is None:
        return None
    some, open_ = (_meeting(d, work, grid) for d in parts)
    if some is None or open_ is None:
        return None
    return between(grid.rows, grid.shape(1)[-1], some, open_)


def halves(keep: Expr, query: str, key: str) -> tuple[Conjunction, Conjunction, Conjunction] | None:
    """A mask that is one conjunction of half-planes: as written, with the query eliminated, and the negation of each.

    None: it has another form, or a half-plane that is never true.
    """
    terms = _Cases(query, key, {})
    plain = normal(keep)
    written, against = terms.cases(plain, True), terms.cases(plain, False)
    joined = _eliminated(written)
    if written is None or joined is None or against is None or len(written) != 1 or any(len(c) != 1 for c in against):
        return None
    return written[0], joined[0], tuple(c[0] for c in against)


# --- terms --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _parts(keep: Expr, query: str, key: str) -> tuple[Disjunction, Disjunction] | None:
    """The mask and its negation as disjunctions of conjunctions of half-planes that rows can be solved for."""
    plain = normal(keep)
    ops = [e for e in ex.walk(plain) if e.ranks & {query, key}]
    if sum(e.dtype == "b1" for e in ops) > PREDICATES or sum(bool(_branches(e)) for e in ops) > CHOICES:
        return None
    terms = _Cases(query, key, {})
    some, open_ = (_eliminated(terms.cases(plain, yes)) for yes in (True, False))
    return None if some is None or open_ is None else (some, open_)


@dataclass(frozen=True)
class _Cases:
    query: str
    key: str
    known: dict[tuple[Expr, bool], Disjunction | None]

    def cases(self, e: Expr, yes: bool) -> Disjunction | None:
        """The cases in which a predicate is `yes`, as conjunctions of half-planes. None: it is not made of any."""
        if (e, yes) not in self.known:
            self.known[e, yes] = self.made(e, yes)
        return self.known[e, yes]

    def made(self, e: Expr, yes: bool) -> Disjunction | None:
        if e.is_const:
            return ((),) if bool(e.value) == yes else ()
        match e.op:
            case "not" if e.dtype == "b1":
                return self.cases(e.args[0], not yes)
            case "and" | "or" if e.dtype == "b1":
                join = _all_of if (e.op == "and") == yes else _any_of
                return join(self.cases(a, yes) for a in e.args)
            case "where":
                cond, a, b = e.args
                return self.choice(cond, self.cases(a, yes), self.cases(b, yes))
            case "xor" | "eq" | "ne" if all(a.dtype == "b1" for a in e.args):
                x, y = e.args
                alike = (e.op == "eq") == yes
                return self.choice(x, self.cases(y, alike), self.cases(y, not alike))
        if e.op in ex.COMPARISONS and all(a.dtype in ex.INTEGERS for a in e.args):
            return self.comparison(e.op if yes else _OPPOSITE[e.op], affine(e.args[0]) - affine(e.args[1]))
        if e.ranks & {self.query, self.key}:
            return None
        flag = affine(ex.cast(e, "i64"))
        return self.at_most_zero(Affine((), 1) - flag if yes else flag)

    def choice(self, cond: Expr, a: Disjunction | None, b: Disjunction | None) -> Disjunction | None:
        return _any_of((_all_of((self.cases(cond, True), a)), _all_of((self.cases(cond, False), b))))

    def comparison(self, op: str, form: Affine) -> Disjunction | None:
        """`form ∘ 0`"""
        one, back = Affine((), 1), form.scaled(-1)
        match op:
            case "le":
                return self.at_most_zero(form)
            case "lt":
                return self.at_most_zero(form + one)
            case "ge":
                return self.at_most_zero(back)
            case "gt":
                return self.at_most_zero(back + one)
            case "eq":
                return _all_of((self.at_most_zero(form), self.at_most_zero(back)))
        return _any_of((self.at_most_zero(form + one), self.at_most_zero(back + one)))

    def at_most_zero(self, form: Affine) -> Disjunction | None:
        for atom, c in form.terms:
            if atom.dtype == "i64" and atom.ranks & {self.query, self.key}:
                rest = form - Affine(((atom, c),), 0)
                branches = [self.at_most_zero(affine(b).scaled(c) + rest) for b in _branches(atom)]
                if atom.op in ("max", "abs", "min"):
                    # c·max(u, v) ≤ r holds where both do, when c > 0; c·min(u, v) where either does
                    return (_all_of if (c > 0) == (atom.op != "min") else _any_of)(branches)
                if branches:
                    cond = atom.args[0]
                    return self.choice(cond, branches[0], branches[1])
        half = self.half(form)
        return None if half is None else ((half,),)

    def half(self, form: Affine) -> Half | None:
        x: tuple[int, Stair | None] = (0, None)
        y: tuple[int, Stair | None] = (0, None)
        rest: list[tuple[Expr, int]] = []
        for atom, c in form.terms:
            if self.query in atom.ranks:
                if x[1] is not None or (stair := _stair(atom, self.query)) is None:
                    return None
                x = (c, stair)
            elif self.key in atom.ranks:
                if y[1] is not None or (stair := _stair(atom, self.key)) is None:
                    return None
                y = (c, stair)
            else:
                rest.append((atom, c))
        return Half(*x, *y, Affine(tuple(rest), form.constant))


_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


def _branches(atom: Expr) -> tuple[Expr, ...]:
    """The terms between which an integer atom chooses; none where it does not."""
    match atom.op:
        case "max" | "min":
            return atom.args
        case "abs":
            return atom.args[0], -atom.args[0]
        case "where" if atom.dtype == "i64":
            return atom.args[1:]
        case "cast" if atom.args[0].dtype == "b1":
            return ex.const(1), ex.const(0)
    return ()


def _stair(atom: Expr, rank: str) -> Stair | None:
    if atom.op == "index":
        return Stair(0, 1)
    if atom.op != "floordiv" or not atom.args[1].is_const:
        return None
    inner, step = affine(atom.args[0]), int(atom.args[1].value)
    return Stair(inner.constant, step) if inner.terms == ((ex.index(rank), 1),) and step > 0 else None


def _any_of(parts: Iterable[Disjunction | None]) -> Disjunction | None:
    out: dict[Conjunction, None] = {}
    for d in parts:
        if d is None:
            return None
        out.update(dict.fromkeys(d))
    return tuple(out) if len(out) <= CONJUNCTIONS else None


def _all_of(parts: Iterable[Disjunction | None]) -> Disjunction | None:
    out: Disjunction = ((),)
    for d in parts:
        if d is None:
            return None
        out = tuple(dict.fromkeys(tuple(dict.fromkeys((*a, *b))) for a in out for b in d))
        if len(out) > CONJUNCTIONS or any(len(c) > HALVES for c in out):
            return None
    return out


# --- elimination of the query -------------------------------------------------------------------------------------


def _eliminated(cases: Disjunction | None) -> Disjunction | None:
    """Every conjunction with, for each lower and upper bound on x, what they say of y together."""
    if cases is None:
        return None
    out = []
    for conjunction in cases:
        joined = [
            _joined(upper, lower)
            for upper in conjunction if upper.a > 0
            for lower in conjunction if lower.a < 0
        ]
        if None in joined:
            return None
        out.append((*conjunction, *(h for h in joined if h is not None)))
    return tuple(out)


def _joined(upper: Half, lower: Half) -> Half | None:
    """`lower ≤ upper` for some whole x; None where that is not one half-plane."""
    if upper.x != lower.x or (upper.a != 1 and lower.a != -1):
        return None
    if upper.y is not None and lower.y is not None and upper.y != lower.y:
        return None
    c = upper.c * -lower.a + lower.c * upper.a
    rest = upper.rest.scaled(-lower.a) + lower.rest.scaled(upper.a)
    return Half(0, None, c, (upper.y or lower.y) if c else None, rest)


# --- rows ---------------------------------------------------------------------------------------------------------


def _meeting(cases: Disjunction, work: KnownMask, grid: Grid) -> Intervals | None:
    """The key tiles in which some point of a row satisfies one of the cases."""
    first = np.arange(grid.shape(1)[-2]) * grid.tile_p
    rows = first, np.minimum(first + grid.tile_p, grid.extents[grid.query]) - 1
    at = np.unravel_index(np.arange(grid.entries), [grid.extents[r] for r in grid.batch] or [1])
    box = {r: (w[:, None], w[:, None]) for r, w in zip(grid.batch, at)}
    known: dict[Affine, Ints] = {}
    for half in {h for c in cases for h in c}:
        if half.rest not in known:
            value = _value(half.rest, work, box, grid.entries)
            if value is None:
                return None
            known[half.rest] = value
    found = [_interval(c, known, rows, grid) for c in cases]
    return Intervals.join(found)


def _value(rest: Affine, work: KnownMask, box: Mapping[str, Span], entries: int) -> Ints | None:
    """A term without query and key for every batch entry, [entries, 1]; None where it is not known exactly."""
    ends = spans(rest.term(), box, of_load=work.of_load)
    lo, hi = (np.broadcast_to(np.asarray(v, np.float64), (entries, 1)) for v in ends)
    return lo.astype(np.int64) if bool(((lo == hi) & (abs(lo) <= EXACT)).all()) else None


def _interval(conjunction: Conjunction, known: Mapping[Affine, Ints], rows: tuple[Ints, Ints], grid: Grid) -> Intervals:
    """Of every row the one interval of key tiles that a conjunction meets; rows without any are left out."""
    lo = np.zeros((grid.entries, len(rows[0])), np.int64)
    hi = np.full_like(lo, grid.extents[grid.key] - 1)
    for h in conjunction:
        rest = known[h.rest]
        if h.x is not None:
            # the end of the row block that helps most
            rest = rest + h.a * ((rows[0 if h.a > 0 else 1] + h.x.shift) // h.x.step)
        if h.y is None:
            hi = np.where(rest <= 0, hi, -1)
        elif h.c > 0:
            hi = np.minimum(hi, ((-rest) // h.c + 1) * h.y.step - 1 - h.y.shift)
        else:
            lo = np.maximum(lo, -((-rest) // -h.c) * h.y.step - h.y.shift)
    row = np.flatnonzero(lo <= hi)
    return Intervals(row, lo.reshape(-1)[row] // grid.tile_m, hi.reshape(-1)[row] // grid.tile_m + 1)
