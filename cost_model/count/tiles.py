"""Tiles: which key tiles the programs of an attention visit, and what run-time data is expected to keep of them.

    jobs      one a query tile and batch entry; its cost is  full + ρ · partial  tiles      (ρ: what the mask costs)
    tables    arrays that are known when planning (segment ids, spans by head): counted exactly
    other conditions on run-time data (padding, block tables, top-k): an expectation, said in words in the result

Counts are exact for what is known, for any length: runs of tiles, never a matrix of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...patterns import expr as ex
from ...patterns.expr import Expr
from ...patterns.masks.split import FULL, PARTIAL, Mask, TileRuns, block_spans, conjuncts, count_tiles, rows_with_key
from .schedule import SCHEDULED, launch_span, makespan, order

__all__ = [
    "NOTHING", "SCHEDULED", "Data", "Expectation", "Jobs", "Tally", "assumptions", "expected", "jobs", "launch_span",
    "makespan", "order", "tile_map",
]

Numbers = NDArray[np.float64]
# What a tensor holds at run time.
Table: TypeAlias = NDArray[np.generic]


@dataclass(frozen=True)
class Expectation:
    """What a condition that reads `tensor` is expected to keep: a share of the blocks, or so many of each row's blocks.

    Blocks are `block_p` queries × `block_m` keys (0: the kernel's tile). Rows with fewer blocks keep them all.
    """

    tensor: str
    share: float | None = None
    blocks: float | None = None
    block_p: int = 0
    block_m: int = 0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.blocks is None):
            raise ValueError(f"say of {self.tensor} either the share of blocks that it keeps or how many of each row")
        if not 0 <= (self.share if self.share is not None else 0) <= 1 or (self.blocks or 0) < 0:
            raise ValueError(f"{self.tensor} keeps a share between 0 and 1, or a number of blocks that is not negative")

    def __str__(self) -> str:
        kept = f"{self.blocks:g} key blocks of each row" if self.blocks is not None else f"{self.share:.3g} of the blocks"
        return f"expected: {self.tensor} keeps {kept}"


@dataclass(frozen=True)
class Data:
    """What is known of run-time data when planning. Compared by content."""

    expectations: tuple[Expectation, ...] = ()
    digest: str = ""
    tables: Mapping[str, Table] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(tables: Mapping[str, Table], *expectations: Expectation) -> Data:
        """Arrays by the name of the tensor that holds them at run time, and what to expect of the others."""
        digest = hashlib.sha256()
        for name in sorted(tables):
            array = np.ascontiguousarray(tables[name])
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.data)
        return Data(expectations, digest.hexdigest(), tables)


NOTHING = Data()


@dataclass(frozen=True)
class Tally:
    """Tiles over the batch ranks that a mask depends on."""

    batch: tuple[str, ...]
    total: int
    visited: int
    full: int
    partial: int


@dataclass(frozen=True)
class Jobs:
    """Tiles of every program, [batch entries that differ, query tiles]; `repeat` batch entries are alike.

    Where `assumed` says that data was assumed or expected, counts are expectations and need not be whole. `map`: the
    tiles that the known part of the mask visits, of `total`; None where it forbids nothing.
    """

    full: Numbers
    partial: Numbers
    repeat: int
    map: TileRuns | None
    total: int = 0
    assumed: tuple[str, ...] = ()

    @cached_property
    def visited(self) -> Numbers:
        return self.full + self.partial

    @cached_property
    def sums(self) -> tuple[float, float]:
        """Full and partial tiles of all programs, without repetitions."""
        return float(self.full.sum()), float(self.partial.sum())

    @cached_property
    def longest(self) -> int:
        """Tiles of the program that visits most."""
        return int(self.visited.max()) if self.full.size else 1

    def repeated(self, times: int) -> Jobs:
        """The same programs for so many batch entries that are alike."""
        if times == self.repeat:
            return self
        made = replace(self, repeat=times)
        # what is derived holds whatever is repeated
        made.__dict__.update({name: getattr(self, name) for name in _DERIVED})
        return made

    def extremes(self, full: float, partial: float) -> tuple[float, float]:
        """The least and the most that a program takes, where its tiles take so long each."""
        least = min(f * full + p * partial for f, p in self.outer_least)
        return least, max(f * full + p * partial for f, p in self.outer_most)

    @cached_property
    def outer_most(self) -> tuple[tuple[float, float], ...]:
        """(full, partial) of programs that no other exceeds in both."""
        return _outer(self.full, self.partial)

    @cached_property
    def outer_least(self) -> tuple[tuple[float, float], ...]:
        """(full, partial) of programs that exceed no other in both."""
        return tuple((-f, -p) for f, p in _outer(-self.full, -self.partial))

    @property
    def tally(self) -> Tally | None:
        """The tiles over the mask's batch entries; None where all of them are full."""
        full, partial = map(round, self.sums)
        if self.map is None and full == self.total:
            return None
        return Tally(self.map.batch if self.map else (), self.total, full + partial, full, partial)

    def costs(self, partial_factor: float) -> Numbers:
        """The cost of every program in full tiles: full + ρ · partial."""
        return self.full + partial_factor * self.partial


_DERIVED = ("visited", "sums", "longest", "outer_most", "outer_least")


def _outer(a: Numbers, b: Numbers) -> tuple[tuple[float, float], ...]:
    """Pairs that no other pair exceeds in both."""
    if a.size == 1:
        return ((float(a.flat[0]), float(b.flat[0])),)
    order = np.lexsort((-b.reshape(-1), -a.reshape(-1)))
    x, y = a.reshape(-1)[order], b.reshape(-1)[order]
    best = np.maximum.accumulate(y)
    ahead = np.concatenate(([True], y[1:] > best[:-1])) if y.size else np.zeros(0, np.bool_)
    return tuple(zip(x[ahead].tolist(), y[ahead].tolist()))


def tile_map(
    mask: Mask, query: str, key: str, extents: Mapping[str, int], symbols: Mapping[str, int], tile_p: int, tile_m: int,
    data: Data = NOTHING,
) -> TileRuns | None:
    """The tiles that a kernel walks under a mask, or None where nothing is masked.

    Query tiles in which some row may keep no key, and fills that do not vanish, visit every tile.
    """
    keep = expected(mask.keep, frozenset(data.tables))
    if keep is ex.TRUE:
        return None
    ranks = tuple((r, n) for r, n in extents.items() if r in keep.ranks or r in (query, key))
    names = ex.symbols(keep)
    known = tuple(sorted((s, n) for s, n in symbols.items() if s in names))
    return _counted(keep, mask.vanishing, query, key, ranks, known, tile_p, tile_m, data if ex.loads(keep) else NOTHING)


@lru_cache(maxsize=256)
def _counted(
    keep: Expr, vanishing: bool, query: str, key: str, ranks: tuple[tuple[str, int], ...],
    known: tuple[tuple[str, int], ...], tile_p: int, tile_m: int, data: Data,
) -> TileRuns:
    of_load = block_spans(data.tables, (tile_p, tile_m)) if data.tables else None
    extents, symbols = dict(ranks), dict(known)
    tiles = count_tiles(
        keep, query=query, key=key, extents=extents, symbols=symbols, tile_p=tile_p, tile_m=tile_m, of_load=of_load
    )
    if not vanishing:
        return tiles.guarded(np.zeros(tiles.shape[:-1], np.bool_))
    certain = rows_with_key(keep, tiles, query=query, key=key, extents=extents, symbols=symbols, of_load=of_load)
    return tiles.guarded(certain)


@lru_cache(maxsize=512)
def expected(keep: Expr, tables: frozenset[str] = frozenset()) -> Expr:
    """The mask with every condition on run-time data taken as true, but for those that read known tables only."""
    out = ex.TRUE
    for part in conjuncts(keep):
        if {str(e.attr) for e in ex.loads(part)} <= tables:
            out = out & part
    return out


def assumptions(keep: Expr, data: Data = NOTHING) -> tuple[str, ...]:
    """What is taken for granted of run-time data, in words."""
    said = {e.tensor: str(e) for e in data.expectations}
    out: dict[str, None] = {}
    for part in conjuncts(keep):
        unknown = [n for n in dict.fromkeys(str(e.attr) for e in ex.loads(part)) if n not in data.tables]
        out.update(dict.fromkeys(said.get(n, f"predicted as if {n} kept every key") for n in unknown))
    return tuple(out)


def jobs(
    tiles: TileRuns | None, programs: int, query_tiles: int, key_tiles: int, mask: Mask | None = None,
    data: Data = NOTHING, tile: tuple[int, int] = (1, 1),
) -> Jobs:
    """The jobs of a launch with `programs` programs, `query_tiles` of them a batch entry.

    `mask` and `data` say what is assumed of run-time data; `tile` is that of the kernel where nothing known is masked.
    """
    if tiles is None:
        full = np.full((1, query_tiles), float(key_tiles))
        partial = np.zeros_like(full)
    else:
        tile = tiles.tile_p, tiles.tile_m
        full, partial = (tiles.counts(k).reshape(-1, query_tiles).astype(np.float64) for k in (FULL, PARTIAL))
    words = assumptions(mask.keep, data) if mask is not None else ()
    read = {str(e.attr) for e in ex.loads(mask.keep)} if mask is not None else set()
    for e in data.expectations:
        if e.tensor in read:
            full, partial = _thinned(full, partial, e, *tile)
    return Jobs(
        full, partial, max(1, programs // (full.shape[0] * query_tiles)), tiles, full.size * key_tiles, words
    )


def _thinned(full: Numbers, partial: Numbers, e: Expectation, tile_p: int, tile_m: int) -> tuple[Numbers, Numbers]:
    """What is left of the tiles when blocks are chosen among them, wherever they lie.

    A tile of several blocks is visited when one of them is kept, and full when all are.
    """
    wide = tile_m / (e.block_m or tile_m)
    several = max(1.0, tile_p / (e.block_p or tile_p)) * max(1.0, wide)
    visited = full + partial
    share = np.full_like(visited, e.share) if e.share is not None else np.ones_like(visited)
    if e.blocks is not None:
        share = np.minimum(1.0, e.blocks / np.maximum(visited * wide, 1e-9))
    kept = visited * (1 - (1 - share) ** several)
    whole = np.minimum(full * share**several, kept)
    return whole, kept - whole
