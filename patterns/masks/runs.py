"""Tile runs: the visited key tiles of every query tile as intervals of one class, so that long masks stay small.

    row i    [start, stop) FULL    [start, stop) PARTIAL    …            what lies between is EMPTY

A causal mask of a million tokens is 16 384 runs, not 67 million tiles. Rows are query tiles, batch-major. Runs of a row
are disjoint, in key order, and neighbours of one class are joined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

EMPTY, PARTIAL, FULL = 0, 1, 2
NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class KeyRun:
    """Consecutive key tiles of one class: keys `start` to `stop` (exclusive)."""

    start: int
    stop: int
    kind: int


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals of key tiles, [start, stop) in tiles, each in a row."""

    row: Ints
    start: Ints
    stop: Ints

    @staticmethod
    def join(parts: Sequence[Intervals]) -> Intervals:
        none = [np.zeros(0, np.int64)]
        return Intervals(*(np.concatenate([getattr(p, f) for p in parts] or none) for f in ("row", "start", "stop")))


@dataclass(frozen=True, eq=False)
class TileRuns:
    """The tiles of a mask over `queries` × `keys`, `tile_p` × `tile_m` each; `shape` is [*batch, n_p, n_m].

    `row`, `start`, `stop` (in tiles) and `kind` list the runs in order. `data`: run-time data decided.
    """

    tile_p: int
    tile_m: int
    batch: tuple[str, ...]
    shape: tuple[int, ...]
    queries: int
    keys: int
    row: NDArray[np.int32]
    start: NDArray[np.int32]
    stop: NDArray[np.int32]
    kind: NDArray[np.uint8]
    data: bool = False

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def visited(self) -> int:
        return int((self.stop - self.start).sum(dtype=np.int64))

    @property
    def full(self) -> int:
        return int((self.stop - self.start)[self.kind == FULL].sum(dtype=np.int64))

    @property
    def partial(self) -> int:
        return self.visited - self.full

    @property
    def density(self) -> float:
        """Share of the tiles that is visited."""
        return self.visited / self.total if self.total else 0.0

    def counts(self, kind: int | None = None) -> Ints:
        """Visited tiles of every query tile, of one class or of both: [*batch, n_p]."""
        length = (self.stop - self.start).astype(np.float64)
        if kind is not None:
            length = length * (self.kind == kind)
        return np.bincount(self.row, length, self.rows).astype(np.int64).reshape(self.shape[:-1])

    @cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """The first visited key tile of every row and the one after the last (0, 0 without any): [*batch, n_p] each."""
        first, last = np.zeros(self.rows, np.int64), np.zeros(self.rows, np.int64)
        head, tail = np.ones(len(self.row), np.bool_), np.ones(len(self.row), np.bool_)
        head[1:] = tail[:-1] = self.row[1:] != self.row[:-1]
        first[self.row[head]], last[self.row[tail]] = self.start[head], self.stop[tail]
        return first.reshape(self.shape[:-1]), last.reshape(self.shape[:-1])

    def has_full(self) -> NDArray[np.bool_]:
        """Query tiles with a full tile: [*batch, n_p]."""
        return self.counts(FULL) > 0

    def has_visited(self) -> NDArray[np.bool_]:
        """Query tiles with a visited tile: [*batch, n_p]."""
        return self.counts() > 0

    def intervals(self, kind: int | None = None) -> Intervals:
        at = slice(None) if kind is None else self.kind == kind
        return Intervals(*(x[at].astype(np.int64) for x in (self.row, self.start, self.stop)))

    def guarded(self, certain: NDArray[np.bool_]) -> TileRuns:
        """The runs a kernel may walk: query tiles with a row that may have no key visit every tile, mask as written.

        `certain`: bool [*batch, n_p] from `rows_with_key`.
        """
        open_ = np.flatnonzero(~np.broadcast_to(certain, self.shape[:-1]).reshape(-1))
        if not len(open_):
            return self
        every = Intervals(open_, np.zeros_like(open_), np.full_like(open_, self.shape[-1]))
        partial = Intervals.join([self.intervals(PARTIAL), every])
        return self._with(_overlaid(self.rows, self.shape[-1], (self.intervals(FULL), partial)))

    def merged(self) -> TileRuns:
        """One map for all batch entries together: full where all of them are, visited where any of them is."""
        n_p, entries = self.shape[-2], math.prod(self.shape[:-2])
        if entries == 1:
            return replace(self, batch=(), shape=self.shape[-2:])
        kinds = [replace(i, row=i.row % n_p) for i in (self.intervals(FULL), self.intervals(PARTIAL))]
        sets = _swept(n_p, self.shape[-1], kinds)
        kind = np.where(sets.depth[0] == entries, FULL, PARTIAL)
        return replace(self, batch=(), shape=self.shape[-2:])._with((sets.row, sets.start, sets.stop, kind))

    def outside(self, other: TileRuns) -> NDArray[np.bool_]:
        """Rows with a visited tile that is not full in `other`, a map over the same rows: bool [rows]."""
        sets = _swept(self.rows, self.shape[-1], (self.intervals(), other.intervals(FULL)))
        out = np.zeros(self.rows, np.bool_)
        out[sets.row[(sets.depth[0] > 0) & (sets.depth[1] == 0)]] = True
        return out

    def tiles_of(self, kind: int) -> tuple[Ints, ...]:
        """The places of all tiles of one class, an index array per dimension."""
        runs = self.intervals(kind)
        length = runs.stop - runs.start
        first = np.repeat(runs.start - (length.cumsum() - length), length)
        return (*np.unravel_index(np.repeat(runs.row, length), self.shape[:-1]), first + np.arange(len(first)))

    def lists(self, kind: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tiles of one class as FlexAttention's block masks hold them: int32 counts [*batch, n_p], and key tiles
        [*batch, n_p, longest], 0 past the count."""
        counts = self.counts(kind)
        *where, tile = self.tiles_of(kind)
        flat = counts.reshape(-1)
        row = np.ravel_multi_index(tuple(where), self.shape[:-1])
        indices = np.zeros((self.rows, int(flat.max(initial=0))), np.int32)
        indices[row, np.arange(len(row)) - (flat.cumsum() - flat)[row]] = tile
        return counts.astype(np.int32), indices.reshape(*self.shape[:-1], -1)

    def classes(self) -> NDArray[np.uint8]:
        """Every tile: uint8 [*batch, n_p, n_m]. For short masks: it takes a byte a tile."""
        step = np.zeros((self.rows, self.shape[-1] + 1), np.int8)
        # runs are disjoint, so no element is written twice by either line
        step[self.row, self.start] = self.kind
        step[self.row, self.stop] -= self.kind.astype(np.int8)
        return step[:, :-1].cumsum(1, dtype=np.int8).astype(np.uint8).reshape(self.shape)

    def runs(self) -> list[list[KeyRun]]:
        """Per query tile, batch-major, the visited key tiles merged into slices of one class, in keys."""
        out: list[list[KeyRun]] = [[] for _ in range(self.rows)]
        stops = np.minimum(self.stop.astype(np.int64) * self.tile_m, self.keys).tolist()
        starts = (self.start.astype(np.int64) * self.tile_m).tolist()
        for row, a, b, kind in zip(self.row.tolist(), starts, stops, self.kind.tolist()):
            out[row].append(KeyRun(a, b, kind))
        return out

    def heavy_first(self) -> NDArray[np.int32]:
        """Query tiles by falling number of visited key tiles, summed over batch: the order that balances the load."""
        counts = self.counts()
        return np.argsort(-counts.reshape(-1, counts.shape[-1]).sum(0), kind="stable").astype(np.int32)

    def picture(self, at_most: int = 256) -> dict[str, object]:
        """The mask as plain data for drawing, one entry of the batch after the other merged into one picture.

        {"tile": [tile_p, tile_m], "size": [queries, keys], "cell": [tiles, tiles], "grid": [rows, columns],
         "batch": [rank, …], "rows": [[[start, stop, class], …], …]}

        A cell is `cell` tiles high and wide (1 where the grid has at most `at_most` rows and columns); a row lists its
        visited cells as intervals of columns of class "full" or "partial". A cell of several tiles is full where all
        of them are. Raises ValueError for an `at_most` below 1.
        """
        if at_most < 1:
            raise ValueError(f"a picture needs at least one cell a side, not {at_most}")
        flat = self.merged()
        cell = tuple(-(-n // at_most) or 1 for n in flat.shape)
        coarse = flat._coarser(*cell)
        rows: list[list[list[int | str]]] = [[] for _ in range(coarse.shape[0])]
        for i, a, b, kind in zip(*(x.tolist() for x in (coarse.row, coarse.start, coarse.stop, coarse.kind))):
            rows[i].append([a, b, NAMES[kind]])
        return {
            "tile": [self.tile_p, self.tile_m], "size": [self.queries, self.keys], "cell": list(cell),
            "grid": list(coarse.shape), "batch": list(self.batch), "rows": rows,
        }

    def _coarser(self, high: int, wide: int) -> TileRuns:
        """Cells of `high` × `wide` tiles."""
        n_p, n_m = self.shape
        shape = -(-n_p // high), -(-n_m // wide)
        if (high, wide) == (1, 1):
            return self
        touched = self.intervals()
        some = Intervals(touched.row // high, touched.start // wide, (touched.stop - 1) // wide + 1)
        whole = self.intervals(FULL)
        # the last cell of a row may hold fewer tiles
        inner = np.where(whole.stop == n_m, shape[1], whole.stop // wide)
        every = Intervals(whole.row // high, -(-whole.start // wide), inner)
        sets = _swept(*shape, (some, every))
        tall = np.minimum((sets.row + 1) * high, n_p) - sets.row * high
        kind = np.where(sets.depth[1] == tall, FULL, PARTIAL)
        made = replace(self, tile_p=self.tile_p * high, tile_m=self.tile_m * wide, shape=shape)
        return made._with((sets.row, sets.start, sets.stop, kind))

    def _with(self, listed: tuple[Ints, Ints, Ints, Ints]) -> TileRuns:
        row, start, stop, kind = _joined(*listed)
        return replace(
            self, row=row.astype(np.int32), start=start.astype(np.int32), stop=stop.astype(np.int32),
            kind=kind.astype(np.uint8),
        )


def tile_runs(
    sizes: tuple[int, int], tile: tuple[int, int], batch: tuple[str, ...], entries: tuple[int, ...],
    full: Intervals, partial: Intervals, data: bool = False,
) -> TileRuns:
    """Runs from intervals of full and of partial tiles that do not overlap.

    `sizes` are (queries, keys), `entries` the extents of the batch ranks.
    """
    shape = (*entries, -(-sizes[0] // tile[0]), -(-sizes[1] // tile[1]))
    none = np.zeros(0, np.int32)
    blank = TileRuns(*tile, batch, shape, *sizes, none, none, none, none.astype(np.uint8), data)
    both = Intervals.join([full, partial])
    kind = np.repeat(np.array([FULL, PARTIAL]), [len(full.row), len(partial.row)])
    order = np.argsort(both.row * (shape[-1] + 1) + both.start, kind="stable")
    return blank._with((both.row[order], both.start[order], both.stop[order], kind[order]))


def between(rows: int, width: int, some: Intervals, open_: Intervals) -> tuple[Intervals, Intervals]:
    """(full, partial) intervals where `some` tiles keep a point and `open_` tiles lack one."""
    sets = _swept(rows, width, (some, open_))
    visited, lacking = sets.depth[0] > 0, sets.depth[1] > 0
    full, partial = visited & ~lacking, visited & lacking
    return sets.where(full), sets.where(partial)


# --- sweeping ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sets:
    """Segments of constant depth, in order; `depth` [layers, segments] counts the intervals of each layer over them."""

    row: Ints
    start: Ints
    stop: Ints
    depth: Ints

    def where(self, chosen: NDArray[np.bool_]) -> Intervals:
        return Intervals(self.row[chosen], self.start[chosen], self.stop[chosen])


def _swept(rows: int, width: int, layers: Sequence[Intervals]) -> _Sets:
    """Cut the rows where any interval begins or ends; segments that nothing covers are left out."""
    places, signs = [], []
    for i, layer in enumerate(layers):
        some = layer.start < layer.stop
        base = layer.row[some] * (width + 1)
        places += [base + layer.start[some], base + layer.stop[some]]
        change = np.zeros((2, len(layers)), np.int32)
        change[:, i] = 1, -1
        signs += [np.repeat(change[:1], len(base), 0), np.repeat(change[1:], len(base), 0)]
    place, sign = np.concatenate(places), np.concatenate(signs)
    order = np.argsort(place, kind="stable")
    place, depth = place[order], sign[order].cumsum(0)
    last = np.ones(len(place), np.bool_)
    last[:-1] = place[1:] != place[:-1]
    at, depth = place[last], depth[last]
    covered = np.flatnonzero(depth.any(1))
    row, start = np.divmod(at[covered], width + 1)
    # every interval of a row ends in it, so what follows a covered place lies in the same row
    return _Sets(row, start, at[covered + 1] - row * (width + 1), depth[covered].T)


def _overlaid(rows: int, width: int, layers: tuple[Intervals, Intervals]) -> tuple[Ints, Ints, Ints, Ints]:
    """Runs of full and partial intervals, where full wins."""
    sets = _swept(rows, width, layers)
    return sets.row, sets.start, sets.stop, np.where(sets.depth[0] > 0, FULL, PARTIAL)


def _joined(row: Ints, start: Ints, stop: Ints, kind: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Neighbouring runs of one class become one."""
    head, tail = np.ones(len(row), np.bool_), np.ones(len(row), np.bool_)
    head[1:] = (row[1:] != row[:-1]) | (kind[1:] != kind[:-1]) | (start[1:] != stop[:-1])
    tail[:-1] = head[1:]
    return row[head], start[head], stop[tail], kind[head]
