"""Tokens that lie on a plane or in a volume, row by row: their coordinates as terms over their positions."""

from __future__ import annotations

import math

from .. import expr as ex
from ..attention.attention import Attention
from ..expr import Expr
from ..verdict import Refusal
from .method import TokenPositions

Axes = tuple[Expr, ...]


def coordinates(position: Expr, plane: tuple[int, ...]) -> Axes:
    """The coordinate on each axis of a token at a position; the last axis is the innermost."""
    out = []
    for axis, n in enumerate(plane):
        inner = math.prod(plane[axis + 1 :])
        at = position // inner if inner > 1 else position
        out.append(at if axis == 0 else at % n)
    return tuple(out)


def checked_plane(plane: tuple[int, ...], at: TokenPositions, a: Attention) -> tuple[Axes, Axes, Axes] | Refusal:
    """Coordinates of rows and keys, and the sizes of the axes. Refused where the tokens are not as many as the plane has."""
    rows, keys = (a.cascade.rank[r].size for r in (a.query, a.key))
    tokens = math.prod(plane)
    if rows != tokens or keys != tokens:
        said = " × ".join(map(str, plane))
        return Refusal("", f"its {rows} queries and {keys} keys are not the {tokens} tokens of a plane of {said}")
    return coordinates(at.row, plane), coordinates(at.key, plane), tuple(ex.const(n) for n in plane)
