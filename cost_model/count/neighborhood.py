"""Tiles of several dimensions: a mask that is a product of one predicate a dimension is counted dimension by dimension.

    keep(y, x, y', x')  =  k₀(y, y') ∧ k₁(x, x')     ⟹     visited = v₀ · v₁,  full = f₀ · f₁,  pairs likewise

so that ΠL² points cost ΣL. Tiles are boxes of `tile_q` queries and `tile_k` keys a dimension. With static tiling the key
tiles lie on a fixed grid; with dynamic tiling they begin where the query tile's first key is.
Source: Hassani et al., "Generalized Neighborhood Attention" (2504.16922), section 4 (its simulator is not published).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from ...patterns.expr import Expr
from ...patterns.masks.split import FULL, TileRuns, count_tiles
from ...patterns.masks.tiles import pairs
from ...patterns.terms.conditions import conjunction, conjuncts, normal
from ...patterns.verdict import Obstacle
from .tiles import Jobs

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenAxis:
    """One dimension: its query and its key rank, and the sides of a tile over them."""

    query: str
    key: str
    tile_q: int
    tile_k: int


@dataclass(frozen=True, eq=False)
class Side:
    """Key tiles of one dimension for each of its query tiles; `tiles` is how many there are."""

    axis: TokenAxis
    keep: Expr
    visited: Ints
    full: Ints
    tiles: int
    runs: TileRuns


@dataclass(frozen=True, eq=False)
class GridTiles:
    """Key tiles of boxes of queries; a program is a box."""

    sides: tuple[Side, ...]
    extents: Mapping[str, int]

    @property
    def programs(self) -> int:
        return math.prod(len(s.visited) for s in self.sides)

    @property
    def tiles(self) -> int:
        """Key tiles that a program without a mask visits."""
        return math.prod(s.tiles for s in self.sides)

    @property
    def visited(self) -> int:
        """Over all programs."""
        return math.prod(int(s.visited.sum()) for s in self.sides)

    @property
    def full(self) -> int:
        return math.prod(int(s.full.sum()) for s in self.sides)

    @property
    def partial(self) -> int:
        return self.visited - self.full

    @property
    def most(self) -> int:
        """Of the program that visits most."""
        return math.prod(int(s.visited.max()) for s in self.sides)

    @property
    def mean(self) -> float:
        return self.visited / self.programs

    @property
    def bound(self) -> float:
        """The speed-up over no mask, were every program as long as the longest (NATTENSim's rule)."""
        return self.tiles / self.most

    @property
    def pairs(self) -> int:
        """Kept (query, key) points."""
        found = (
            pairs(s.keep, s.runs, query=s.axis.query, key=s.axis.key, extents=self.extents) for s in self.sides
        )
        return math.prod(found)

    @property
    def flop_bound(self) -> float:
        """The speed-up over no mask if only kept points took time."""
        every = math.prod(self.extents[s.axis.query] * self.extents[s.axis.key] for s in self.sides)
        return every / self.pairs

    def jobs(self, heads: int = 1) -> Jobs:
        """The programs, boxes in row-major order, for `heads` equal heads."""
        full, visited = (_outer([count(s) for s in self.sides])[None] for count in (_full, _visited))
        return Jobs(full, visited - full, heads, None, self.programs * self.tiles)


def _full(s: Side) -> Ints:
    return s.full


def _visited(s: Side) -> Ints:
    return s.visited


def _outer(counts: Sequence[Ints]) -> NDArray[np.float64]:
    multiply: Callable[[Ints, Ints], Ints] = np.multiply.outer
    return reduce(multiply, counts).reshape(-1).astype(np.float64)


def grid_tiles(
    keep: Expr, axes: Sequence[TokenAxis], extents: Mapping[str, int], *, dynamic: bool = False,
    symbols: Mapping[str, int] | None = None,
) -> GridTiles | Obstacle:
    """The tiles of a mask over the ranks of `axes`, or why it is no product over them.

    Raises ValueError for a rank without extent or a symbol without value.
    """
    parts = separated(keep, axes)
    if isinstance(parts, Obstacle):
        return parts
    sides = tuple(_side(part, a, extents, dynamic, symbols) for part, a in zip(parts, axes))
    return GridTiles(sides, extents)


def separated(keep: Expr, axes: Sequence[TokenAxis]) -> tuple[Expr, ...] | Obstacle:
    """The predicate of every dimension, whose conjunction the mask is; an Obstacle names the condition that ties two."""
    found: list[list[Expr]] = [[] for _ in axes]
    for part in conjuncts(normal(keep)):
        owners = [i for i, a in enumerate(axes) if part.ranks & {a.query, a.key}]
        known = frozenset(r for i in owners for r in (axes[i].query, axes[i].key))
        if len(owners) > 1 or not part.ranks <= known:
            return Obstacle(
                f"{part} ties {', '.join(sorted(part.ranks))}: count the mask in its one-dimensional layout"
            )
        found[owners[0] if owners else 0].append(part)
    return tuple(conjunction(tuple(p)) for p in found)


def _side(
    keep: Expr, a: TokenAxis, extents: Mapping[str, int], dynamic: bool, symbols: Mapping[str, int] | None
) -> Side:
    runs = count_tiles(
        keep, query=a.query, key=a.key, extents={r: extents[r] for r in (a.query, a.key)}, symbols=symbols,
        tile_p=a.tile_q, tile_m=1 if dynamic else a.tile_k,
    )
    visited, full = _moved(runs, a.tile_k) if dynamic else (runs.counts(), runs.counts(FULL))
    return Side(a, keep, visited, full, -(-extents[a.key] // a.tile_k), runs)


def _moved(runs: TileRuns, tile: int) -> tuple[Ints, Ints]:
    """(visited, full) tiles of `tile` keys that begin at each query tile's first key, from runs of single keys."""
    first, last = runs.ends
    whole = runs.intervals(FULL)
    start, stop = whole.start - first[whole.row], whole.stop - first[whole.row]
    # the last tile ends with the last key
    end = np.where(whole.stop == last[whole.row], -(-stop // tile), stop // tile)
    inner = np.maximum(end + -start // tile, 0)
    full = np.bincount(whole.row, inner, len(first)).astype(np.int64)
    return -(-(last - first) // tile), full


def end_to_end(share: float, speedup: float) -> float:
    """The speed-up of a whole of which `share` gets `speedup` times faster (Amdahl)."""
    return 1 / (1 - share + share / speedup)
