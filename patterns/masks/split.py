"""Masks: the predicate `keep` that a score program hides in fills, and which rows certainly keep a key.

    where(c, s, −∞)      s + where(c, 0, −3e38)      s − 1e4·(1 − f32(c))      max(s + where(c, 0, −3e38), −3e38)
        keep = c          full = s (the score where keep holds, same arithmetic)          fills = the constants written

A term counts as masked where it is a fill, −∞ or at most −1e3, plus anything finite. A factor that is not proved to be
0 or 1, an additive load, or a mask inside a bounded function is no mask and stays in `full`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import mul, truediv

from .. import expr as ex
from ..expr import TRUE, Expr
from ..terms.block_spans import block_spans
from ..terms.conditions import FILL, conjunction, conjuncts, constant, negated, normal, simplify_under
from ..terms.intervals import spans
from .rows import Walk, rows_with_key, runtime_classify, witnesses
from .tiles import EMPTY, FULL, PARTIAL, KeyRun, Rows, TileMap, TileRuns, classify, count_tiles

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "KeyRun",
    "Mask",
    "Rows",
    "TileMap",
    "TileRuns",
    "Walk",
    "block_spans",
    "classify",
    "conjuncts",
    "count_tiles",
    "rows_with_key",
    "runtime_classify",
    "simplify_under",
    "spans",
    "split",
    "witnesses",
]

# Below this the weight of a fill underflows beside any finite score.
VANISHING = -1e30
# An additive mask that is read masks at or below this, so that a scale after it keeps it beyond VANISHING.
OPAQUE = -1e32


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
def split(score: Expr, key: str, opaque: frozenset[str] = frozenset()) -> Mask:
    """Separate a score into its mask and the score without it. `keep` is TRUE when nothing is masked; a mask of whole rows
    does not depend on `key`.

    `opaque` names tensors that hold additive masks as numbers: where such an element is next to −∞, it masks. It stays
    in `full`, so that only tiles without any kept element change; what they hold is known at run time alone.
    """
    plain = normal(score)
    parts: dict[Expr, _Part] = {}
    for e in ex.walk(plain):
        parts[e] = _part(e, parts, opaque)
    found = parts[plain]
    if not found.fills:
        return Mask(TRUE, score, ())
    keep = conjunction(conjuncts(found.keep))
    full = ex.cast(simplify_under(found.full, {keep: True}), score.dtype)
    return Mask(keep, full, tuple(sorted(set(found.fills))))


def _part(e: Expr, parts: Mapping[Expr, _Part], opaque: frozenset[str]) -> _Part:
    if e.op == "load" and e.is_float and str(e.attr) in opaque:
        return _Part(e > OPAQUE, e, (OPAQUE,))
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


_CHANGE: Mapping[str, Callable[[float, float], float]] = {"mul": mul, "div": truediv, "max": max, "min": min}


def _part_monotone(e: Expr, args: list[_Part]) -> _Part | None:
    """A masked term times or over a positive number, or bounded by a number that is a fill itself."""
    at = 0 if args[0].fills else 1
    other = constant(e.args[1 - at])
    if other is None or other != other or (e.op == "div" and at == 1):
        return None
    if e.op in ("mul", "div") and not 0 < other < math.inf:
        return None
    fills = tuple(_CHANGE[e.op](f, other) for f in args[at].fills)
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
        )
        return _Part(keep, ex.where(cond, yes.full, no.full), yes.fills + no.fills)
    else:
        return _Part(TRUE, e)
    return _Part(given & chosen.keep, ex.cast(chosen.full, e.dtype), (*chosen.fills, fill))


def _is_fill(value: float) -> bool:
    return value <= FILL
