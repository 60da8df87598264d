"""Tile classes by intervals: coarse boxes first, undecided ones split, until single tiles; then points settle the rest.

    box  →  EMPTY: forgotten      FULL: all its tiles      else: 4 × 4 smaller boxes, of tiles, then of points

Only boxes on the border of the mask are split, so the work is that of the tiles touched, whatever the length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ..expr import Expr
from ..terms.arithmetic import Array, Span
from ..terms.intervals import LoadSpan, native, spans
from .runs import EMPTY, FULL, PARTIAL, Intervals, Ints

# Boxes of the coarsest grid, boxes evaluated at once, and the most that settle the open tiles of one group.
COARSE = 4096
AT_ONCE = 1 << 16
BUDGET = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Geometry of boxes of `scale` × `scale` tiles."""

    query: str
    key: str
    batch: tuple[str, ...]
    extents: Mapping[str, int]
    tile_p: int
    tile_m: int

    def shape(self, scale: int) -> tuple[int, ...]:
        sides = [-(-self.extents[r] // (t * scale)) for r, t in ((self.query, self.tile_p), (self.key, self.tile_m))]
        return (*(self.extents[r] for r in self.batch), *sides)

    @property
    def entries(self) -> int:
        """Batch entries, which have a map each."""
        return math.prod(self.extents[r] for r in self.batch)

    @property
    def rows(self) -> int:
        return self.entries * self.shape(1)[-2]

    def box(self, where: Sequence[Array], scale: int, *, virtual: bool = False) -> dict[str, Span]:
        """Intervals of all ranks at grid positions `where` (one index array per dimension).

        `virtual` tiles are whole and may lie outside the extents.
        """
        out = {r: (w, w) for r, w in zip(self.batch, where)}
        for rank, tile, w in ((self.query, self.tile_p, where[-2]), (self.key, self.tile_m, where[-1])):
            lo = w * (tile * scale)
            hi = lo + (tile * scale - 1)
            out[rank] = (lo, hi if virtual else np.minimum(hi, self.extents[rank] - 1))
        return out


@dataclass(frozen=True)
class KnownMask:
    """A mask without symbols, and what is known of the tensors that it reads."""

    keep: Expr
    of_load: LoadSpan | None
    xp: ModuleType = np

    def dense(self, grid: Grid) -> Array:
        """Classes of the whole grid of tiles at once; each rank's intervals lie along its own dimension."""
        shape = grid.shape(1)
        n = len(shape)
        where = [np.arange(s).reshape([-1 if d == i else 1 for d in range(n)]) for i, s in enumerate(shape)]
        yes, maybe = spans(self.keep, grid.box(where, 1), of_load=self.of_load, xp=self.xp)
        if native(yes):
            classes = np.add(yes, maybe, dtype=np.uint8)
            return np.ascontiguousarray(np.broadcast_to(classes, shape)).copy()
        return (yes.to(self.xp.uint8) + maybe.to(self.xp.uint8)).expand(shape).contiguous()

    def boxes(self, box: Mapping[str, Span], count: int) -> Span:
        yes, maybe = spans(self.keep, box, of_load=self.of_load, xp=self.xp)
        return np.broadcast_to(yes, (count,)), np.broadcast_to(maybe, (count,))


def descend(work: KnownMask, grid: Grid, *, settle: bool) -> tuple[Intervals, Intervals]:
    """(full, partial) tiles of a mask as intervals that do not overlap; rows are query tiles, batch-major.

    `settle`: tiles that intervals leave open are decided point by point where need be.
    """
    scale = 1
    while math.prod(grid.shape(scale)) > COARSE and max(grid.shape(scale)[-2:]) > 1:
        scale *= 4
    full: list[Intervals] = []
    where: tuple[Array, ...] = np.unravel_index(np.arange(math.prod(grid.shape(scale))), grid.shape(scale))
    while True:
        yes, maybe = _evaluated(work, grid, where, scale)
        full.append(_tiles_of(grid, tuple(w[yes] for w in where), scale))
        where = tuple(w[maybe & ~yes] for w in where)
        if scale == 1:
            break
        scale //= 4
        where = _children(where, grid.shape(scale))
    if settle and len(where[-1]):
        kinds = settled(work, grid.query, grid.key, grid.box(where, 1))
        full.append(_tiles_of(grid, tuple(w[kinds == FULL] for w in where), 1))
        where = tuple(w[kinds == PARTIAL] for w in where)
    return Intervals.join(full), _tiles_of(grid, where, 1)


def _evaluated(work: KnownMask, grid: Grid, where: tuple[Array, ...], scale: int) -> tuple[Array, Array]:
    n = len(where[-1])
    yes, maybe = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    for a in range(0, n, AT_ONCE):
        part = tuple(w[a : a + AT_ONCE] for w in where)
        yes[a : a + AT_ONCE], maybe[a : a + AT_ONCE] = work.boxes(grid.box(part, scale), len(part[-1]))
    return yes, maybe


def _children(where: tuple[Array, ...], shape: tuple[int, ...]) -> tuple[Array, ...]:
    """The 4 × 4 boxes of each box, as far as the grid goes."""
    i = (where[-2][:, None] * 4 + np.repeat(np.arange(4), 4)).reshape(-1)
    j = (where[-1][:, None] * 4 + np.tile(np.arange(4), 4)).reshape(-1)
    out = (*(np.repeat(w, 16) for w in where[:-2]), i, j)
    inside = (i < shape[-2]) & (j < shape[-1])
    return out if inside.all() else tuple(w[inside] for w in out)


def _tiles_of(grid: Grid, where: tuple[Array, ...], scale: int) -> Intervals:
    """The tiles of boxes of `scale` × `scale` tiles, a row of a box as one interval."""
    *entries, n_p, n_m = grid.shape(1)
    entry = np.zeros_like(where[-1])
    for w, n in zip(where[:-2], entries):
        entry = entry * n + w
    row = (where[-2][:, None] * scale + np.arange(scale)).reshape(-1)
    start = np.repeat(where[-1] * scale, scale)
    out = Intervals(np.repeat(entry, scale) * n_p + row, start, np.minimum(start + scale, n_m))
    inside = row < n_p
    return out if inside.all() else Intervals(out.row[inside], out.start[inside], out.stop[inside])


# --- settling what interval analysis leaves open ----------------------------------------------------------------

# Places in a tile, as shares of its sides, that often show both answers: the ends of the diagonals, then others.
SAMPLES = ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.3, 0.8), (0.7, 0.2), (0.45, 0.6))


def settled(work: KnownMask, query: str, key: str, box: Mapping[str, Span]) -> NDArray[np.uint8]:
    """The classes of boxes: points that differ prove one partial, else it is split until all of it is decided."""
    n = len(box[key][0])
    kinds = np.full(n, PARTIAL, np.uint8)
    for a in range(0, n, AT_ONCE):
        part = np.arange(a, min(a + AT_ONCE, n))
        part = part[_unproved(work, query, key, at(box, part))]
        # few at a time, so that one with many pieces does not use up the budget of all
        for b in range(0, len(part), 1024):
            group = part[b : b + 1024]
            kinds[group] = _split(work, query, key, at(box, group))
    return kinds


def at(box: Mapping[str, Span], which: Array) -> dict[str, Span]:
    return {r: (lo[which], hi[which]) for r, (lo, hi) in box.items()}


def _unproved(work: KnownMask, query: str, key: str, box: dict[str, Span]) -> Ints:
    """Boxes in which a few sample points do not show both answers."""
    left = np.arange(len(box[key][0]))
    some, every = np.zeros(len(left), np.bool_), np.ones(len(left), np.bool_)
    for right, down in SAMPLES:
        point = at(box, left)
        for rank, t in ((query, right), (key, down)):
            lo, hi = point[rank]
            x = hi if t == 1 else lo + ((hi - lo) * t).astype(np.int64)
            point[rank] = (x, x)
        yes, maybe = work.boxes(point, len(left))
        some[left] |= yes
        every[left] &= maybe
        left = left[~(some[left] & ~every[left])]
    return left


def _split(work: KnownMask, query: str, key: str, box: dict[str, Span]) -> NDArray[np.uint8]:
    """Split boxes in four until each is decided or its owner shows both answers."""
    count = len(box[key][0])
    owner = np.arange(count)
    some, none = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    used = 0
    while len(owner):
        box, owner = quarters(box, owner, query, key)
        used += len(owner)
        if used > BUDGET:
            # what is left open may hold either
            some[owner], none[owner] = True, True
            break
        yes, maybe = work.boxes(box, len(owner))
        some[owner[yes]] = True
        none[owner[~maybe]] = True
        single = (box[query][0] == box[query][1]) & (box[key][0] == box[key][1])
        # a single point that is not decided (unknown functions) leaves its tile partial
        unknown = owner[single & maybe & ~yes]
        some[unknown], none[unknown] = True, True
        rest = np.flatnonzero(maybe & ~yes & ~(some & none)[owner])
        box, owner = at(box, rest), owner[rest]
    return np.where(~none, FULL, np.where(some, PARTIAL, EMPTY)).astype(np.uint8)


def quarters(box: dict[str, Span], owner: Array, query: str, key: str) -> tuple[dict[str, Span], Array]:
    """Every box in up to four, and the owner of each."""
    for rank in (query, key):
        lo, hi = box[rank]
        middle = (lo + hi) // 2
        two = np.flatnonzero(lo < hi)
        owner = np.concatenate([owner, owner[two]])
        box = {r: (np.concatenate([a, a[two]]), np.concatenate([b, b[two]])) for r, (a, b) in box.items()}
        box[rank] = (np.concatenate([lo, middle[two] + 1]), np.concatenate([np.where(lo < hi, middle, hi), hi[two]]))
    return box, owner
