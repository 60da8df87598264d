"""Masks: the predicate `keep` that a score program hides in fills, and which rows certainly keep a key.

    where(c, s, −∞)      s + where(c, 0, −3e38)      s − 1e4·(1 − f32(c))      max(s + where(c, 0, −3e38), −3e38)
        keep = c          full = s (the score where keep holds, same arithmetic)          fills = the constants written

A term counts as masked where it is a fill, −∞ or at most −1e3, plus anything finite. A factor that is not proved to be
0 or 1, an additive load, or a mask inside a bounded function is no mask and stays in `full`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from . import expr as ex
from .affine import affine
from .expr import FALSE, TRUE, Expr
from .intervals import Array, Bounds, spans
from .tiles import EMPTY, FULL, PARTIAL, Rows, Run, TileMap, batch_ranks, bind, classify

__all__ = [
    "EMPTY", "FULL", "PARTIAL", "Mask", "Rows", "Run", "TileMap", "classify", "conjuncts", "rows_with_key",
    "simplify_under", "spans", "split", "witnesses",
]  # fmt: skip

# A constant counts as a fill at or below this; below VANISHING its weight underflows beside any finite score.
FILL = -1e3
VANISHING = -1e30


@dataclass(frozen=True)
class Mask:
    """`score = full` wherever `keep` holds; elsewhere it is one of `fills`, plus finite terms where it was added."""

    keep: Expr
    full: Expr
    fills: tuple[float, ...]

    @property
    def vanishing(self) -> bool:
        """Masked weights of a row that keeps a key are exactly 0, without a bound on the scores."""
        return all(f <= VANISHING for f in self.fills)


@dataclass(frozen=True)
class _Part:
    keep: Expr
    full: Expr
    fills: tuple[float, ...] = ()


@lru_cache(maxsize=512)
def split(score: Expr, key: str) -> Mask:
    """Separate a score into its mask and the score without it. `keep` is TRUE when nothing is masked over `key`."""
    plain = normal(score)
    parts: dict[Expr, _Part] = {}
    for e in ex.walk(plain):
        parts[e] = _part(e, parts)
    found = parts[plain]
    if key not in found.keep.ranks:
        return Mask(TRUE, score, ())
    keep = _all(conjuncts(found.keep))
    full = ex.cast(simplify_under(found.full, {keep: True}), score.dtype)
    return Mask(keep, full, tuple(sorted(set(found.fills))))


def _part(e: Expr, parts: Mapping[Expr, _Part]) -> _Part:
    whole = _Part(TRUE, e)
    args = [parts[a] for a in e.args]
    masked = [a for a in args if a.fills]
    match e.op:
        case "where":
            return _part_where(e, parts)
        case _ if not masked:
            return whole
        case "add" | "sub":
            if e.op == "sub" and args[1].fills:
                return whole
            keep = args[0].keep & args[1].keep
            return _Part(keep, ex.binary(e.op, args[0].full, args[1].full), args[0].fills + args[1].fills)
        case "cast" if e.dtype in ex.FLOATS:
            return _Part(args[0].keep, ex.cast(args[0].full, e.dtype), args[0].fills)
        case "mul" | "div" | "max" | "min":
            return _part_monotone(e, args) or whole
    return whole


def _part_monotone(e: Expr, args: list[_Part]) -> _Part | None:
    """A masked term times or over a positive number, or bounded by a number that is a fill itself."""
    at = 0 if args[0].fills else 1
    other = constant(e.args[1 - at])
    if other is None or not other == other or (e.op == "div" and at == 1):
        return None
    if e.op in ("mul", "div") and not 0 < other < math.inf:
        return None
    change = {
        "mul": lambda f: f * other, "div": lambda f: f / other, "max": lambda f: max(f, other),
        "min": lambda f: min(f, other),
    }[e.op]  # fmt: skip
    fills = tuple(change(f) for f in args[at].fills)
    if not all(_is_fill(f) for f in fills):
        return None
    full = [e.args[0], e.args[1]]
    full[at] = args[at].full
    return _Part(args[at].keep, ex.binary(e.op, *full), fills)


def _part_where(e: Expr, parts: Mapping[Expr, _Part]) -> _Part:
    cond, a, b = e.args
    low_a, low_b = constant(a), constant(b)
    if low_b is not None and _is_fill(low_b):
        chosen, fill, given = parts[a], low_b, cond
    elif low_a is not None and _is_fill(low_a):
        chosen, fill, given = parts[b], low_a, negated(cond)
    elif parts[a].fills or parts[b].fills:
        yes, no = parts[a], parts[b]
        keep = (~cond | yes.keep) & (cond | no.keep) if yes.fills and no.fills else (
            negated(cond) | yes.keep if yes.fills else cond | no.keep
        )  # fmt: skip
        return _Part(keep, ex.where(cond, yes.full, no.full), yes.fills + no.fills)
    else:
        return _Part(TRUE, e)
    return _Part(given & chosen.keep, ex.cast(chosen.full, e.dtype), (*chosen.fills, fill))


def _is_fill(value: float) -> bool:
    return value <= FILL


def constant(e: Expr) -> float | None:
    """The value of a term without coordinates, loads or sizes, as an upper bound where a cast rounds it."""
    if e.op == "const":
        return float(e.value)
    if e.ranks or e.op in ("index", "symbol", "load") or any(a.op in ("symbol", "load") for a in ex.walk(e)):
        return None
    return float(spans(e, {})[1])


# --- normal form of conditions and choices ----------------------------------------------------------------------

_FLIP = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_MIRROR = {"gt": "lt", "ge": "le"}


def normal(root: Expr) -> Expr:
    """An equal term in which operations with numbers are inside choices, and casts of predicates are choices.

        1 − f32(c)  →  where(c, 0, 1)        where(c, 0, 1)·k  →  where(c, 0, k)        (where(c, 1, 0) = 0)  →  ¬c
    """  # fmt: skip
    return ex.rebuild(root, _normal)


def _normal(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
    match e.op:
        case "cast":
            return _normal_cast(args[0], e.dtype)
        case "where":
            return _normal_where(args[0], args[1], args[2], e.dtype)
        case "not" if e.dtype == "b1":
            return negated(args[0])
        case "const" | "index" | "symbol" | "load":
            return None
    return _pushed(e.op, args)


def _normal_cast(x: Expr, dtype: str) -> Expr:
    if dtype == "b1":
        return x if x.dtype == "b1" else _pushed("ne", (x, ex.const(0, x.dtype)))
    if x.dtype == "b1":
        return ex.where(x, ex.const(1, dtype), ex.const(0, dtype))
    if _is_choice(x):
        return ex.where(x.args[0], ex.cast(x.args[1], dtype), ex.cast(x.args[2], dtype))
    return ex.cast(x, dtype)


def _normal_where(cond: Expr, a: Expr, b: Expr, dtype: str) -> Expr:
    a, b = ex.cast(a, dtype), ex.cast(b, dtype)
    if dtype == "b1":
        return _choose(cond, a, b)
    if cond.op == "ne" and not cond.args[0].is_const:
        b = ex.substitute(b, {cond.args[0]: ex.cast(cond.args[1], cond.args[0].dtype)})
    if cond.op == "eq" and not cond.args[0].is_const:
        a = ex.substitute(a, {cond.args[0]: ex.cast(cond.args[1], cond.args[0].dtype)})
    if a.op == "where" and a.args[0] is cond:
        a = a.args[1]
    if b.op == "where" and b.args[0] is cond:
        b = b.args[2]
    return ex.where(cond, a, b)


def _choose(cond: Expr, a: Expr, b: Expr) -> Expr:
    """A choice between predicates, by `and` and `or`."""
    if a is TRUE:
        return cond | b
    if a is FALSE:
        return negated(cond) & b
    if b is TRUE:
        return negated(cond) | a
    if b is FALSE:
        return cond & a
    return ex.where(cond, a, b)


def _is_choice(e: Expr) -> bool:
    return e.op == "where" and (constant(e.args[1]) is not None or constant(e.args[2]) is not None)


def _is_flag(e: Expr) -> bool:
    """`where(c, 1, 0)`"""
    return e.op == "where" and constant(e.args[1]) == 1 and constant(e.args[2]) == 0


def _pushed(op: str, args: tuple[Expr, ...]) -> Expr:
    """Build `op(args)`, moved inside a choice when its other operand is a number."""
    if len(args) == 1:
        if not _is_choice(args[0]):
            return ex.unary(op, args[0])
        cond, a, b = args[0].args
        return _rechoose(cond, ex.unary(op, a), ex.unary(op, b))
    x, y = args
    if op == "sub" and _is_choice(y) and y.is_float:
        return _pushed("add", (x, _pushed("neg", (y,))))
    if _is_flag(x) and _is_flag(y) and op in ("mul", "min", "max"):
        cond = x.args[0] | y.args[0] if op == "max" else x.args[0] & y.args[0]
        dtype = ex.promote(x.dtype, y.dtype)
        return ex.where(cond, ex.const(1, dtype), ex.const(0, dtype))
    if x.op == "where" and y.op == "where" and x.args[0] is y.args[0]:
        return _rechoose(x.args[0], _pushed(op, (x.args[1], y.args[1])), _pushed(op, (x.args[2], y.args[2])))
    if _is_choice(x) and constant(y) is not None:
        return _rechoose(x.args[0], _pushed(op, (x.args[1], y)), _pushed(op, (x.args[2], y)))
    if _is_choice(y) and constant(x) is not None:
        return _rechoose(y.args[0], _pushed(op, (x, y.args[1])), _pushed(op, (x, y.args[2])))
    if op in _MIRROR:
        return ex.binary(_MIRROR[op], y, x)
    return ex.binary(op, x, y)


def _rechoose(cond: Expr, a: Expr, b: Expr) -> Expr:
    return _choose(cond, a, b) if a.dtype == b.dtype == "b1" else ex.where(cond, a, b)


def negated(e: Expr) -> Expr:
    """`¬e`, moved to the leaves; comparisons turn only between integers, where there is no NaN."""
    if e.dtype != "b1":
        return ex.unary("not", e)
    if e.op in _FLIP and (e.op in ("eq", "ne") or not any(a.is_float for a in e.args)):
        op = _FLIP[e.op]
        return ex.binary(_MIRROR[op], e.args[1], e.args[0]) if op in _MIRROR else ex.binary(op, *e.args)
    if e.op == "and":
        return negated(e.args[0]) | negated(e.args[1])
    if e.op == "or":
        return negated(e.args[0]) & negated(e.args[1])
    return ex.unary("not", e)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """The distinct terms whose conjunction a predicate is."""
    out: dict[Expr, None] = {}
    stack = [e]
    while stack:
        x = stack.pop()
        if x.op == "and" and x.dtype == "b1":
            stack.extend(reversed(x.args))
        elif x is not TRUE:
            out[x] = None
    return tuple(out)


def _all(terms: tuple[Expr, ...]) -> Expr:
    out = TRUE
    for t in terms:
        out = out & t
    return out


def simplify_under(term: Expr, facts: Mapping[Expr, bool]) -> Expr:
    """The term where the given predicates have the given values; what they imply directly is used as well."""
    known: dict[Expr, Expr] = {}
    stack = list(facts.items())
    while stack:
        e, value = stack.pop()
        if e in known or e.is_const:
            continue
        known[e] = TRUE if value else FALSE
        if e.op == "not" and e.dtype == "b1":
            stack.append((e.args[0], not value))
        elif e.op == ("and" if value else "or") and e.dtype == "b1":
            stack.extend((a, value) for a in e.args)
        else:
            stack.append((negated(e), not value))
    return ex.substitute(term, known)


# --- rows that keep a key ---------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def witnesses(keep: Expr, query: str, key: str, size: Expr) -> tuple[Expr, ...]:
    """Keys w(query) worth testing as proof that a row keeps one: the diagonal, the ends, the bounds in the predicate.

    `size` is the number of keys. A candidate proves nothing by itself: `keep` at `key := w` must be certain, and w valid.
    """
    p, m = ex.index(query), ex.index(key)
    out: dict[Expr, None] = {p: None, ex.const(0): None, size - 1: None}
    for e in ex.walk(keep):
        if e.op in ex.COMPARISONS and all(a.dtype in ex.INTEGERS for a in e.args):
            form = affine(e.args[0]) - affine(e.args[1])
            c = form.coefficient(m)
            rest = (form - affine(m).scaled(c)).scaled(-c)
            if abs(c) == 1 and not any(key in a.ranks for a in rest.atoms) and not ex.loads(rest.term()):
                # m + rest ∘ 0: the bound itself and its neighbours
                for step in (0, -1, 1):
                    out[ex.minimum(ex.maximum(rest.term() + step, 0), size - 1)] = None
    return tuple(out)[:12]


def rows_with_key(
    keep: Expr, tiles: TileMap, *, query: str, key: str, extents: Mapping[str, int],
    symbols: Mapping[str, int] | None = None, bounds: Bounds | None = None, xp: Any = np,
) -> Array:  # fmt: skip
    """bool [*batch, n_p]: True only where every row of the query tile certainly keeps at least one key.

    Arguments as given to `classify`. A full tile proves its rows; else some witness must hold in each row.
    """
    keep = bind(keep, symbols)
    certain = (tiles.classes == FULL).any(-1)
    native = isinstance(certain, (np.ndarray, np.generic))
    if native and certain.all():
        return certain
    rows = _Rows(keep, query, key, batch_ranks(keep, query, key, extents), extents, bounds, xp)
    certain = certain | rows.blocks(tiles.tile_p)
    if native:
        opened = np.flatnonzero(~certain)
        if len(opened) and extents[key]:
            certain.reshape(-1)[opened] = rows.single(np.unravel_index(opened, certain.shape), tiles.tile_p)
    return certain


@dataclass(frozen=True)
class _Rows:
    keep: Expr
    query: str
    key: str
    batch: tuple[str, ...]
    extents: Mapping[str, int]
    bounds: Bounds | None
    xp: Any

    @property
    def candidates(self) -> tuple[Expr, ...]:
        return witnesses(self.keep, self.query, self.key, ex.const(self.extents[self.key]))

    def holds(self, witness: Expr) -> Expr:
        """The witness is a key and is kept."""
        kept = ex.substitute(self.keep, {ex.index(self.key): witness})
        return kept & (witness >= 0) & (witness < self.extents[self.key])

    def blocks(self, tile: int) -> Array:
        """Proof by one witness for all rows of a tile."""
        n = -(-self.extents[self.query] // tile)
        lo = np.arange(n) * tile
        box = {self.query: (lo, np.minimum(lo + tile, self.extents[self.query]) - 1)}
        for i, r in enumerate(self.batch):
            at = np.arange(self.extents[r]).reshape([-1] + [1] * (len(self.batch) - i))
            box[r] = (at, at)
        shape = (*(self.extents[r] for r in self.batch), n)
        out: Array = np.zeros(shape, np.bool_)
        for w in self.candidates:
            yes = spans(self.holds(w), box, bounds=self.bounds, xp=self.xp)[0]
            out = yes | out if not isinstance(yes, (np.ndarray, np.generic)) else out | yes
        return out

    def single(self, where: tuple[Array, ...], tile: int) -> Array:
        """Proof row by row, each by its own witness; a witness may also move to the nearest key that loads allow."""
        count = len(where[0])
        row = where[-1][:, None] * tile + np.arange(tile)
        beyond = row >= self.extents[self.query]
        row = np.minimum(row, self.extents[self.query] - 1)
        box = {r: (w[:, None], w[:, None]) for r, w in zip(self.batch, where)}
        box[self.query] = (row, row)
        proved = beyond
        for w in self.candidates:
            proved = proved | spans(self.holds(w), box, bounds=self.bounds)[0]
        near = self.nearest() if not proved.all() else None
        for w in self.candidates if near is not None else ():
            at = np.clip(np.broadcast_to(spans(w, box)[0], (count, tile)), 0, self.extents[self.key] - 1)
            for table in near or ():
                index = [np.broadcast_to(b[:, None], at.shape) for b in where[:-1]]
                m = table[(*index, at.astype(np.int64))]
                kept = spans(self.keep, {**box, self.key: (m, m)}, bounds=self.bounds)[0]
                proved = proved | (kept & (m >= 0) & (m < self.extents[self.key]))
        return np.broadcast_to(proved, (count, tile)).all(-1)

    def nearest(self) -> tuple[Array, Array] | None:
        """[*batch, M]: the last key at or before m, and the first at or after, that query-free conditions keep."""
        free = _all(tuple(c for c in conjuncts(self.keep) if self.query not in c.ranks))
        if not ex.loads(free):
            return None
        size = self.extents[self.key]
        keys = np.arange(size)
        box = {self.key: (keys, keys)}
        for i, r in enumerate(self.batch):
            at = np.arange(self.extents[r]).reshape([-1] + [1] * (len(self.batch) - i))
            box[r] = (at, at)
        yes = np.broadcast_to(spans(free, box, bounds=self.bounds)[0], (*(self.extents[r] for r in self.batch), size))
        before = np.maximum.accumulate(np.where(yes, keys, -1), axis=-1)
        after = np.minimum.accumulate(np.where(yes, keys, size)[..., ::-1], axis=-1)[..., ::-1]
        return before, after
