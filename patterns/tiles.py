"""Tile classes of a mask: which query × key tiles are empty, full or partial, without a tensor of P × M elements.

    EMPTY  no point of the tile is kept      FULL  every point is kept      PARTIAL  anything else, or not known

Coarse boxes are classified first and only undecided ones are split, so causal at 128k × 128k costs the tiles on its
diagonal. Tiles that interval analysis leaves open are settled by splitting further, where no run-time data is involved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from . import expr as ex
from .arithmetic import Array, Span
from .expr import Expr
from .intervals import Bounds, native, spans

EMPTY, PARTIAL, FULL = 0, 1, 2

# Boxes classified at once at the coarsest level, and the largest number evaluated to settle open tiles.
COARSE = 4096
BUDGET = 1 << 20
CHUNK = 1 << 18


@dataclass(frozen=True)
class Run:
    """Consecutive key tiles of one class: keys `start` to `stop` (exclusive)."""

    start: int
    stop: int
    kind: int


@dataclass(frozen=True, eq=False)
class Rows:
    """For every query tile the key tiles to visit, in key order.

    `counts` int32 [..., n_p]; `indices` int32 [..., n_p, longest], key tile numbers, undefined past the count;
    `partial` bool [..., n_p, longest], True where the tile needs the mask. `longest` is the greatest count; outside
    numpy it is n_m, so that nothing waits for the device.
    """

    counts: Array
    indices: Array
    partial: Array


@dataclass(frozen=True, eq=False)
class TileMap:
    """`classes`: uint8 [*batch, n_p, n_m], numpy or the namespace it was computed in. `data`: run-time data decided."""

    tile_p: int
    tile_m: int
    batch: tuple[str, ...]
    classes: Array
    data: bool
    queries: int
    keys: int

    @property
    def visited(self) -> int:
        return int((self.classes != EMPTY).sum())

    @property
    def full(self) -> int:
        return int((self.classes == FULL).sum())

    @property
    def partial(self) -> int:
        return int((self.classes == PARTIAL).sum())

    @property
    def total(self) -> int:
        return math.prod(self.classes.shape)

    @property
    def density(self) -> float:
        """Share of the tiles that is visited."""
        return self.visited / self.total if self.total else 0.0

    def counts(self) -> Array:
        """Tiles visited by every query tile: [*batch, n_p]."""
        return (self.classes != EMPTY).sum(-1)

    def guarded(self, certain: Array) -> TileMap:
        """The map a kernel may walk: query tiles with a row that may have no key visit every tile, mask as written.

        `certain`: bool [*batch, n_p] from `rows_with_key`, in the namespace of `classes`.
        """
        everywhere = (~certain)[..., None] & (self.classes == EMPTY)
        return replace(self, classes=self.classes + everywhere * _like(self.classes, PARTIAL))

    def rows(self) -> Rows:
        """Compact visiting lists for a kernel that walks them."""
        visited = self.classes != EMPTY
        counts = visited.sum(-1)
        if isinstance(self.classes, np.ndarray):
            longest = int(counts.max()) if self.total else 0
            flat = counts.reshape(-1)
            row, tile = np.nonzero(visited.reshape(len(flat), -1))
            slot = np.arange(len(row)) - (np.cumsum(flat) - flat)[row]
            indices, partial = np.zeros((len(flat), longest), np.int32), np.zeros((len(flat), longest), np.bool_)
            indices[row, slot] = tile
            partial[row, slot] = self.classes.reshape(len(flat), -1)[row, tile] == PARTIAL
            shape = (*counts.shape, longest)
            return Rows(counts.astype(np.int32), indices.reshape(shape), partial.reshape(shape))
        order = (~visited).to(self.classes.dtype).argsort(dim=-1, stable=True)
        return Rows(counts.int(), order.int(), self.classes.gather(-1, order) == PARTIAL)

    def runs(self) -> list[list[Run]]:
        """Per query tile, batch-major, the visited key tiles merged into slices of one class."""
        table = np.asarray(self.classes).reshape(-1, self.classes.shape[-1])
        edge = np.ones((table.shape[0], table.shape[1] + 1), dtype=np.bool_)
        edge[:, 1:-1] = table[:, 1:] != table[:, :-1]
        out: list[list[Run]] = []
        for row, edges in zip(table, edge):
            at = np.flatnonzero(edges).tolist()
            out.append([
                Run(a * self.tile_m, min(b * self.tile_m, self.keys), kind)
                for a, b, kind in zip(at, at[1:], row[at[:-1]].tolist())
                if kind != EMPTY
            ])  # fmt: skip
        return out

    def heavy_first(self) -> Array:
        """Query tiles by falling number of visited key tiles, summed over batch: the order that balances the load."""
        counts = np.asarray(self.counts())
        return np.argsort(-counts.reshape(-1, counts.shape[-1]).sum(0), kind="stable").astype(np.int32)


def _like(classes: Array, value: int) -> Array:
    return np.uint8(value) if isinstance(classes, np.ndarray) else classes.new_tensor(value)


@lru_cache(maxsize=512)
def bound(term: Expr, sizes: tuple[tuple[str, int], ...]) -> Expr:
    """The term with its size symbols replaced by numbers."""
    return ex.substitute(term, {ex.symbol(n): ex.const(v) for n, v in sizes})


def bind(term: Expr, symbols: Mapping[str, int] | None) -> Expr:
    names = ex.symbols(term)
    missing = names - set(symbols or {})
    if missing:
        raise ValueError(f"mask {term}: no value for size {', '.join(sorted(missing))}")
    return bound(term, tuple((n, int((symbols or {})[n])) for n in sorted(names))) if names else term


def batch_ranks(keep: Expr, query: str, key: str, extents: Mapping[str, int]) -> tuple[str, ...]:
    """The other ranks that a mask depends on, in the order of `extents`. Raises ValueError for one without extent."""
    missing = keep.ranks - set(extents)
    if missing:
        raise ValueError(f"mask {keep}: no extent for rank {', '.join(sorted(missing))}")
    return tuple(r for r in extents if r in keep.ranks and r not in (query, key))


def classify(
    keep: Expr, *, query: str, key: str, extents: Mapping[str, int], symbols: Mapping[str, int] | None = None,
    tile_p: int, tile_m: int, bounds: Bounds | None = None, xp: Any = np, settle: bool = False,
) -> TileMap:  # fmt: skip
    """Classify every `tile_p` × `tile_m` tile of a mask: sound always, exact where no run-time data decides.

    `extents` gives the size of every rank in elements; `bounds` the range of loads over coordinate boxes (default:
    nothing is known of them). `settle` spends more time where bounds of loads leave tiles open; it pays for constants.
    With `xp` other than numpy, loads may bring arrays of that namespace, and so does the map.
    Maps of masks without loads are cached and read-only.
    Raises ValueError for a rank without extent or a symbol without value.
    """
    keep = bind(keep, symbols)
    batch = batch_ranks(keep, query, key, extents)
    sizes = tuple((r, extents[r]) for r in (*batch, query, key))
    if not ex.loads(keep):
        return _static(keep, query, key, sizes, tile_p, tile_m)
    grid = _Grid(query, key, batch, dict(sizes), tile_p, tile_m)
    return _classified(_Work(keep, bounds, xp), grid, data=True, settle=settle and xp is np)


@lru_cache(maxsize=64)
def _static(keep: Expr, query: str, key: str, sizes: tuple[tuple[str, int], ...], tile_p: int, tile_m: int) -> TileMap:
    grid = _Grid(query, key, tuple(r for r, _ in sizes[:-2]), dict(sizes), tile_p, tile_m)
    tiles = _classified(_Work(keep, None, np), grid, data=False, settle=True)
    tiles.classes.flags.writeable = False
    return tiles


def _classified(work: _Work, grid: _Grid, *, data: bool, settle: bool) -> TileMap:
    if work.xp is not np or math.prod(grid.shape(1)) <= COARSE:
        classes = work.dense(grid, 1)
    else:
        classes = _descend(work, grid)
    if settle:
        _settle(work, grid, classes)
    sizes = grid.extents[grid.query], grid.extents[grid.key]
    return TileMap(grid.tile_p, grid.tile_m, grid.batch, classes, data, *sizes)


def pairs(
    keep: Expr, tiles: TileMap, *, query: str, key: str, extents: Mapping[str, int],
    symbols: Mapping[str, int] | None = None, bounds: Bounds | None = None,
) -> int:  # fmt: skip
    """The number of kept (query, key) points, over the batch ranks of the map: full tiles by area, others by splitting.

    Arguments as given to `classify`; needs a numpy map and, for loads, bounds that are exact on single elements.
    """
    grid = _Grid(query, key, tiles.batch, extents, tiles.tile_p, tiles.tile_m)
    work = _Work(bind(keep, symbols), bounds, np)
    total = 0
    for kind in (FULL, PARTIAL):
        where = np.flatnonzero(tiles.classes == kind)
        for part in np.array_split(where, max(1, -(-len(where) // 64))):
            box = grid.box(np.unravel_index(part, tiles.classes.shape), 1)
            owner = np.zeros(len(part))
            while kind == PARTIAL and len(owner):
                box, owner = _quarters(box, owner, grid)
                yes, maybe = work.boxes(box, len(owner))
                total += _area(box, yes, grid)
                rest = np.flatnonzero(maybe & ~yes)
                box, owner = {r: (lo[rest], hi[rest]) for r, (lo, hi) in box.items()}, owner[rest]
            if kind == FULL:
                total += _area(box, np.ones(len(part), np.bool_), grid)
    return total


def _area(box: Mapping[str, Span], chosen: Array, grid: _Grid) -> int:
    (a, b), (c, d) = box[grid.query], box[grid.key]
    return int(((b - a + 1) * (d - c + 1))[chosen].sum())


@dataclass(frozen=True)
class _Grid:
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

    def box(self, where: Sequence[Array], scale: int) -> dict[str, Span]:
        """Intervals of all ranks at grid positions `where` (one index array per dimension)."""
        out = {r: (w, w) for r, w in zip(self.batch, where)}
        for rank, tile, w in ((self.query, self.tile_p, where[-2]), (self.key, self.tile_m, where[-1])):
            lo = w * (tile * scale)
            out[rank] = (lo, np.minimum(lo + tile * scale, self.extents[rank]) - 1)
        return out


@dataclass(frozen=True)
class _Work:
    keep: Expr
    bounds: Bounds | None
    xp: Any

    def dense(self, grid: _Grid, scale: int) -> Array:
        """Classes of a whole grid at once; each rank's intervals lie along its own dimension."""
        shape = grid.shape(scale)
        n = len(shape)
        where = [np.arange(s).reshape([-1 if d == i else 1 for d in range(n)]) for i, s in enumerate(shape)]
        yes, maybe = spans(self.keep, grid.box(where, scale), bounds=self.bounds, xp=self.xp)
        if native(yes):
            classes = np.add(yes, maybe, dtype=np.uint8)
            return np.ascontiguousarray(np.broadcast_to(classes, shape)).copy()
        return (yes.to(self.xp.uint8) + maybe.to(self.xp.uint8)).expand(shape).contiguous()

    def boxes(self, box: Mapping[str, Span], count: int) -> Span:
        yes, maybe = spans(self.keep, box, bounds=self.bounds, xp=self.xp)
        return np.broadcast_to(yes, (count,)), np.broadcast_to(maybe, (count,))


def _descend(work: _Work, grid: _Grid) -> Array:
    """From the coarsest grid of at most COARSE boxes to single tiles; only PARTIAL boxes are split, by 4 × 4."""
    scale = 1
    while math.prod(grid.shape(scale)) > COARSE and min(grid.shape(scale)[-2:]) > 1:
        scale *= 4
    classes = work.dense(grid, scale)
    while scale > 1:
        scale //= 4
        shape = grid.shape(scale)
        classes = np.repeat(np.repeat(classes, 4, axis=-2), 4, axis=-1)[..., : shape[-2], : shape[-1]].copy()
        flat = classes.reshape(-1)
        opened = np.flatnonzero(flat == PARTIAL)
        for part in np.array_split(opened, max(1, -(-len(opened) // CHUNK))):
            yes, maybe = work.boxes(grid.box(np.unravel_index(part, shape), scale), len(part))
            flat[part] = np.add(yes, maybe, dtype=np.uint8)
    return classes


# --- settling what interval analysis leaves open ----------------------------------------------------------------


def _settle(work: _Work, grid: _Grid, classes: Array) -> None:
    """Decide PARTIAL tiles exactly: points that differ prove a tile partial, else it is split until all is decided."""
    flat = classes.reshape(-1)
    shape = classes.shape
    opened = np.flatnonzero(flat == PARTIAL)
    left = BUDGET
    for part in np.array_split(opened, max(1, -(-len(opened) // (CHUNK // 8)))):
        part = _unproved(work, grid, part, shape)
        # few tiles at a time, so that one with many pieces does not use up the budget of all
        for group in np.array_split(part, max(1, -(-len(part) // 64))):
            if len(group) and left > 0:
                left -= _split(work, grid, group, shape, flat)


def _unproved(work: _Work, grid: _Grid, tiles: Array, shape: tuple[int, ...]) -> Array:
    """Tiles in which a few sample points do not show both answers."""
    box = grid.box(np.unravel_index(tiles, shape), 1)
    some, every = np.zeros(len(tiles), np.bool_), np.ones(len(tiles), np.bool_)
    for x, y in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.3, 0.8), (0.7, 0.2), (0.45, 0.6)):
        point = dict(box)
        for rank, t in ((grid.query, x), (grid.key, y)):
            lo, hi = box[rank]
            at = lo + ((hi - lo) * t).astype(np.int64)
            point[rank] = (at, at)
        yes, maybe = work.boxes(point, len(tiles))
        some, every = some | yes, every & maybe
    return tiles[~(some & ~every)]


def _split(work: _Work, grid: _Grid, tiles: Array, shape: tuple[int, ...], flat: Array) -> int:
    """Split boxes in four until each is decided or its tile shows both answers; returns the boxes evaluated."""
    box = grid.box(np.unravel_index(tiles, shape), 1)
    owner = np.arange(len(tiles))
    some, none = np.zeros(len(tiles), np.bool_), np.zeros(len(tiles), np.bool_)
    used = 0
    while len(owner):
        box, owner = _quarters(box, owner, grid)
        used += len(owner)
        if used > BUDGET:
            return used
        yes, maybe = work.boxes(box, len(owner))
        some[owner[yes]] = True
        none[owner[~maybe]] = True
        single = (box[grid.query][0] == box[grid.query][1]) & (box[grid.key][0] == box[grid.key][1])
        # a single point that is not decided (unknown functions) leaves its tile partial
        unknown = owner[single & maybe & ~yes]
        some[unknown], none[unknown] = True, True
        rest = np.flatnonzero(maybe & ~yes & ~(some & none)[owner])
        box, owner = {r: (lo[rest], hi[rest]) for r, (lo, hi) in box.items()}, owner[rest]
    flat[tiles[some & ~none]] = FULL
    flat[tiles[none & ~some]] = EMPTY
    return used


def _quarters(box: dict[str, Span], owner: Array, grid: _Grid) -> tuple[dict[str, Span], Array]:
    for rank in (grid.query, grid.key):
        lo, hi = box[rank]
        middle = (lo + hi) // 2
        two = np.flatnonzero(lo < hi)
        owner = np.concatenate([owner, owner[two]])
        box = {r: (np.concatenate([a, a[two]]), np.concatenate([b, b[two]])) for r, (a, b) in box.items()}
        box[rank] = (np.concatenate([lo, middle[two] + 1]), np.concatenate([np.where(lo < hi, middle, hi), hi[two]]))
    return box, owner
