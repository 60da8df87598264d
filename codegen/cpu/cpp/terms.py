"""What the fused CPU loop's program is printed from: the score and row state of a tile, and what the host tabulates.

    partial, full    the terms as the model wrote them, and where every key is known to be kept
    diagonal         a costly term over m − p alone: P + M − 1 numbers that are computed once
"""

from __future__ import annotations

from dataclasses import dataclass

from ....patterns import expr as ex
from ....patterns.attention.rowstate import RowState
from ....patterns.cascade import Size, size_term
from ....patterns.expr import TRUE, Expr
from ....patterns.terms.conditions import simplify_under
from ...forms.terms import Terms, mapped_elements
from ...text.tile_terms import largest_parts, relative


@dataclass(frozen=True)
class Tile:
    """The score and the row state of a tile: as the model wrote them, or where every key is known to be kept."""

    score: Expr
    state: RowState


def tiles(t: Terms) -> tuple[Tile, Tile]:
    """Partial and full tiles; equal where the mask changes nothing."""
    partial = Tile(t.score, t.state)
    if t.mask.keep is TRUE:
        return partial, partial
    facts = {t.mask.keep: True}

    def kept(e: Expr) -> Expr:
        return simplify_under(ex.substitute(e, {t.score: t.mask.full}), facts)

    return partial, Tile(t.mask.full, mapped_elements(t.state, kept))


@dataclass(frozen=True)
class Diagonal:
    """A term over m − p, tabulated: element [P − 1 − p, m] of a view in which both dimensions have stride 1."""

    name: str
    part: Expr
    shape: tuple[Size, Size]
    dtype: str

    def load(self, query: str, key: str) -> Expr:
        at = (size_term(self.shape[0]) - 1 - ex.index(query), ex.index(key))
        return ex.cast(ex.load(self.name, at, self.dtype), self.part.dtype)


# What takes longer to compute than to read.
COSTLY = frozenset(["pow", "floordiv", "mod", *ex.FLOAT_UNARY])


def costly(root: Expr, query: str, key: str) -> list[Expr]:
    """The largest sub-terms over m − p and sizes alone that are not quickly computed."""

    def over_distance(e: Expr) -> bool:
        return e.ranks == {query, key} and not ex.loads(e) and relative(e, query, key)

    parts = largest_parts(root, query, key, over_distance)
    return [e for e in parts if any(x.op in COSTLY and x.ranks for x in ex.walk(e))]


def reciprocals(root: Expr, value: str) -> Expr:
    """Quotients by what no value changes as products: one division a row."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op != "div" or value not in args[0].ranks or value in args[1].ranks:
            return None
        return args[0] * ex.unary("reciprocal", ex.cast(args[1], "f32"))

    return ex.rebuild(root, rule)
