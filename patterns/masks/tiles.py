"""Tile classes of a mask: which query × key tiles are empty, full or partial, without a tensor of P × M elements.

    EMPTY  no point of the tile is kept      FULL  every point is kept      PARTIAL  anything else, or not known

    count_tiles   runs of tiles, for any length: in closed form where the mask is affine in query and key (closed_form.py),
                  from one row and one column where it repeats (periodic.py), else from coarse boxes (descent.py)
    classify      every tile of a short mask, for kernels that walk lists; of run-time data on the device that holds it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

import numpy as np

from .. import expr as ex
from ..expr import Expr
from ..terms.arithmetic import Array, Span
from ..terms.intervals import LoadSpan
from .closed_form import in_closed_form
from .descent import COARSE, Grid, KnownMask, at, descend, quarters, settled
from .periodic import repeated
from .runs import EMPTY, FULL, PARTIAL, KeyRun, TileRuns, tile_runs

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "KeyRun",
    "Rows",
    "TileMap",
    "TileRuns",
    "batch_ranks",
    "bind",
    "bound",
    "classify",
    "count_tiles",
    "pairs",
]


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

    def has_full(self) -> Array:
        """Query tiles with a full tile: [*batch, n_p]."""
        return (self.classes == FULL).any(-1)

    def has_visited(self) -> Array:
        """Query tiles with a visited tile: [*batch, n_p]."""
        return (self.classes != EMPTY).any(-1)

    def tiles_of(self, kind: int) -> tuple[Array, ...]:
        """The places of all tiles of one class, an index array per dimension."""
        return np.nonzero(self.classes == kind)

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

    def runs(self) -> list[list[KeyRun]]:
        """Per query tile, batch-major, the visited key tiles merged into slices of one class."""
        table = np.asarray(self.classes).reshape(-1, self.classes.shape[-1])
        edge = np.ones((table.shape[0], table.shape[1] + 1), dtype=np.bool_)
        edge[:, 1:-1] = table[:, 1:] != table[:, :-1]
        out: list[list[KeyRun]] = []
        for row, edges in zip(table, edge):
            at = np.flatnonzero(edges).tolist()
            out.append([
                KeyRun(a * self.tile_m, min(b * self.tile_m, self.keys), kind)
                for a, b, kind in zip(at, at[1:], row[at[:-1]].tolist())
                if kind != EMPTY
            ])
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


def count_tiles(
    keep: Expr, *, query: str, key: str, extents: Mapping[str, int], symbols: Mapping[str, int] | None = None,
    tile_p: int, tile_m: int, of_load: LoadSpan | None = None,
) -> TileRuns:
    """The visited `tile_p` × `tile_m` tiles of a mask as runs: sound always, exact where no unknown data decides.

    Arguments as given to `classify`. Takes as long as there are query tiles where the mask is affine in query and key,
    else as there are tiles touched. Raises ValueError for a rank without extent or a symbol without value.
    """
    keep = bind(keep, symbols)
    batch = batch_ranks(keep, query, key, extents)
    sizes = tuple((r, extents[r]) for r in (*batch, query, key))
    if not ex.loads(keep):
        return _static(keep, query, key, sizes, tile_p, tile_m)
    return _counted(KnownMask(keep, of_load), Grid(query, key, batch, dict(sizes), tile_p, tile_m))


@lru_cache(maxsize=256)
def _static(keep: Expr, query: str, key: str, sizes: tuple[tuple[str, int], ...], tile_p: int, tile_m: int) -> TileRuns:
    return _counted(KnownMask(keep, None), Grid(query, key, tuple(r for r, _ in sizes[:-2]), dict(sizes), tile_p, tile_m))


def _counted(work: KnownMask, grid: Grid) -> TileRuns:
    # what is not known at all stays open however small the boxes
    settle = work.of_load is not None or not ex.loads(work.keep)
    found = in_closed_form(work, grid) or repeated(work, grid) or descend(work, grid, settle=settle)
    sizes = grid.extents[grid.query], grid.extents[grid.key]
    entries = tuple(grid.extents[r] for r in grid.batch)
    data = bool(ex.loads(work.keep))
    return tile_runs(sizes, (grid.tile_p, grid.tile_m), grid.batch, entries, *found, data=data)


def classify(
    keep: Expr, *, query: str, key: str, extents: Mapping[str, int], symbols: Mapping[str, int] | None = None,
    tile_p: int, tile_m: int, of_load: LoadSpan | None = None, xp: ModuleType = np, settle: bool = False,
) -> TileMap:
    """Classify every `tile_p` × `tile_m` tile of a mask: sound always, exact where no run-time data decides.

    `extents` gives the size of every rank in elements; `of_load` the range of loads over coordinate boxes (default:
    nothing is known of them). `settle` spends more time where spans of loads leave tiles open; it pays for constants.
    With `xp` other than numpy, loads may bring arrays of that namespace, and so does the map.
    Maps of masks without loads are cached and read-only.
    Raises ValueError for a rank without extent or a symbol without value.
    """
    keep = bind(keep, symbols)
    batch = batch_ranks(keep, query, key, extents)
    sizes = tuple((r, extents[r]) for r in (*batch, query, key))
    if not ex.loads(keep):
        return _static_map(keep, query, key, sizes, tile_p, tile_m)
    grid = Grid(query, key, batch, dict(sizes), tile_p, tile_m)
    work = KnownMask(keep, of_load, xp)
    if xp is np and math.prod(grid.shape(1)) > COARSE:
        sides = extents[query], extents[key]
        entries = tuple(extents[r] for r in batch)
        classes = tile_runs(sides, (tile_p, tile_m), batch, entries, *descend(work, grid, settle=settle)).classes()
    else:
        classes = work.dense(grid)
        if settle and xp is np:
            where = np.nonzero(classes == PARTIAL)
            if len(where[-1]):
                classes[where] = settled(work, query, key, grid.box(where, 1))
    return TileMap(tile_p, tile_m, batch, classes, True, extents[query], extents[key])


@lru_cache(maxsize=64)
def _static_map(
    keep: Expr, query: str, key: str, sizes: tuple[tuple[str, int], ...], tile_p: int, tile_m: int
) -> TileMap:
    runs = _static(keep, query, key, sizes, tile_p, tile_m)
    classes = runs.classes()
    classes.flags.writeable = False
    return TileMap(tile_p, tile_m, runs.batch, classes, False, runs.queries, runs.keys)


def pairs(
    keep: Expr, tiles: TileMap | TileRuns, *, query: str, key: str, extents: Mapping[str, int],
    symbols: Mapping[str, int] | None = None, of_load: LoadSpan | None = None,
) -> int:
    """The number of kept (query, key) points, over the batch ranks of the map: full tiles by area, others by splitting.

    Arguments as given to `classify`; needs a numpy map and, for loads, spans that are exact on single elements.
    """
    grid = Grid(query, key, tiles.batch, extents, tiles.tile_p, tiles.tile_m)
    work = KnownMask(bind(keep, symbols), of_load, np)
    total = 0
    for kind in (FULL, PARTIAL):
        where = tiles.tiles_of(kind)
        for a in range(0, len(where[-1]), 4096):
            part = tuple(w[a : a + 4096] for w in where)
            box = grid.box(part, 1)
            owner = np.zeros(len(part[-1]), np.int64)
            while kind == PARTIAL and len(owner):
                box, owner = quarters(box, owner, query, key)
                yes, maybe = work.boxes(box, len(owner))
                total += _area(box, yes, grid)
                rest = np.flatnonzero(maybe & ~yes)
                box, owner = at(box, rest), owner[rest]
            if kind == FULL:
                total += _area(box, np.ones(len(owner), np.bool_), grid)
    return total


def _area(box: Mapping[str, Span], chosen: Array, grid: Grid) -> int:
    (a, b), (c, d) = box[grid.query], box[grid.key]
    return int(((b - a + 1) * (d - c + 1))[chosen].sum())
