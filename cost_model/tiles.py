"""Tiles: which key tiles the programs of an attention visit, and how long the units take to walk them.

    jobs      one a query tile and batch entry; its cost follows from its full and its partial tiles
    makespan  of the jobs on `slots` units, in the order in which they are handed out      ≥ max(Σ/slots, longest)

Conditions on run-time data (padding, segments) are counted as if they kept every key: an expectation, not a bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..patterns import expr as ex
from ..patterns.expr import Expr
from ..patterns.masks import PARTIAL, Mask, TileMap, classify, conjuncts, rows_with_key

# Programs above this are not scheduled one by one.
SCHEDULED = 1 << 13


@dataclass(frozen=True)
class Jobs:
    """Tiles of every program, [batch entries that differ, query tiles]; `repeat` batch entries are alike."""

    full: NDArray[np.int64]
    partial: NDArray[np.int64]
    repeat: int
    map: TileMap | None

    @property
    def visited(self) -> NDArray[np.int64]:
        return self.full + self.partial


def tile_map(
    mask: Mask, query: str, key: str, extents: Mapping[str, int], symbols: Mapping[str, int], tile_p: int, tile_m: int
) -> TileMap | None:
    """The tiles that a kernel walks under a mask, or None where nothing is masked.

    Query tiles in which some row may keep no key, and fills that do not vanish, visit every tile.
    """
    keep = expected(mask.keep)
    if keep is ex.TRUE:
        return None
    ranks = tuple((r, n) for r, n in extents.items() if r in keep.ranks or r in (query, key))
    names = ex.symbols(keep)
    known = tuple(sorted((s, n) for s, n in symbols.items() if s in names))
    return _classified(keep, mask.vanishing, query, key, ranks, known, tile_p, tile_m)


@lru_cache(maxsize=1024)
def _classified(
    keep: Expr, vanishing: bool, query: str, key: str, ranks: tuple[tuple[str, int], ...],
    known: tuple[tuple[str, int], ...], tile_p: int, tile_m: int,
) -> TileMap:  # fmt: skip
    extents, symbols = dict(ranks), dict(known)
    tiles = classify(keep, query=query, key=key, extents=extents, symbols=symbols, tile_p=tile_p, tile_m=tile_m)
    if not vanishing:
        return tiles.guarded(np.zeros(tiles.classes.shape[:-1], np.bool_))
    return tiles.guarded(rows_with_key(keep, tiles, query=query, key=key, extents=extents, symbols=symbols))


@lru_cache(maxsize=512)
def expected(keep: Expr) -> Expr:
    """The mask with every condition on run-time data taken as true."""
    out = ex.TRUE
    for part in conjuncts(keep):
        if not ex.loads(part):
            out = out & part
    return out


def jobs(tiles: TileMap | None, programs: int, query_tiles: int, key_tiles: int) -> Jobs:
    """The jobs of a launch with `programs` programs, `query_tiles` of them a batch entry."""
    if tiles is None:
        every = np.full((1, query_tiles), key_tiles, np.int64)
        return Jobs(every, np.zeros_like(every), programs // query_tiles, None)
    table = np.asarray(tiles.classes)
    flat = table.reshape(-1, *table.shape[-2:])
    partial = (flat == PARTIAL).sum(-1).astype(np.int64)
    visited = (flat != 0).sum(-1).astype(np.int64)
    return Jobs(visited - partial, partial, max(1, programs // (flat.shape[0] * query_tiles)), tiles)


def launch_span(
    costs: NDArray[np.float64], repeat: int, slots: int, heavy_first: bool, scheduled: int = SCHEDULED
) -> float:
    """The makespan of jobs [batch, query tiles], each `repeat` times, in launch order on `slots` units.

    Queues longer than `scheduled` are not run job by job: they end within half of their last jobs' length of an even
    load.
    """
    n = costs.size * repeat
    if n > max(scheduled, slots) and costs.min() < costs.max():
        even = float(costs.sum()) * repeat / slots
        last = costs.min() if heavy_first else costs.max()
        return max(even + float(last) / 2, float(costs.max()))
    return makespan(order(costs, repeat, heavy_first), slots)


def makespan(costs: NDArray[np.float64], slots: int) -> float:
    """Time until the last of these jobs ends, handed out in order to whichever of `slots` units is free."""
    n = len(costs)
    if n == 0:
        return 0.0
    longest = float(costs.max())
    if n <= slots:
        return longest
    if longest == float(costs.min()):
        return -(-n // slots) * longest
    ends = costs[:slots].tolist()
    heapq.heapify(ends)
    for c in costs[slots:].tolist():
        heapq.heapreplace(ends, ends[0] + c)
    return float(max(ends))


def order(costs: NDArray[np.float64], repeat: int, heavy_first: bool) -> NDArray[np.float64]:
    """The launch order of jobs [batch, query tiles]: one batch entry after the other, its dearest rows first or last."""
    if heavy_first:
        costs = costs[:, np.argsort(-costs.sum(0), kind="stable")]
    return np.tile(costs.reshape(-1), repeat)
