"""What is predicted: a lifted cascade with what the counting needs of it, derived once and kept.

    lifted cascade → attention view, row state, one-pass cascade, mask        extents and work bound per call
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.attention.rowstate import derive, stream
from ...patterns.cascade import Cascade, Einsum, Size
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.masks.split import Mask, split
from ...patterns.verdict import Obstacle
from ..operations import WIDTH, Sizes, Work, factors, size_int, term_operations
from .tiles import NOTHING, Data, Jobs, jobs, tile_map
from .work import Streamed, count, streamed

# With fewer query rows the heads of a group share a row block in our kernels, of so many rows at most, and no list of tiles
# is worth its launches.
FEW_ROWS = 16
SHARED_ROWS = 128


@dataclass(frozen=True, eq=False)
class Subject:
    """A lifted cascade, its view as attention and its one-pass form."""

    cascade: Cascade
    attention: Attention
    flow: Cascade
    mask: Mask

    @cached_property
    def dtype(self) -> str:
        """The type in which the values reach the matrix unit."""
        return operand_dtype(self.attention.values)


@dataclass(frozen=True, eq=False)
class Shape:
    """All sizes as integers. `batch` is the product of the batch ranks, `group` the heads that share a key head."""

    extent: Mapping[str, int]
    symbols: Mapping[str, int]
    batch: int
    queries: int
    keys: int
    embed: int
    value: int
    group: int

    @cached_property
    def known(self) -> tuple[tuple[str, int], ...]:
        """The symbols, to be kept by."""
        return tuple(sorted(self.symbols.items()))


def operand_dtype(e: Expr) -> str:
    """The stored type of an operand: widening casts happen on chip."""
    while e.op == "cast" and e.args[0].is_float:
        e = e.args[0]
    kinds = [x.dtype for x in ex.loads(e) if x.is_float]
    return max(kinds, key=lambda d: WIDTH[d]) if kinds else e.dtype


@lru_cache(maxsize=256)
def subject(c: Cascade) -> Subject | Obstacle:
    """The subject of a lifted cascade, or why it has no one-pass form."""
    a = attention(c)
    if isinstance(a, Obstacle):
        return a
    state = derive(a)
    if isinstance(state, Obstacle):
        return state
    return Subject(a.cascade, a, stream(a, state), split(a.score, a.key))


def shape(c: Cascade, a: Attention, sizes: Mapping[str, int]) -> Shape:
    """Bind every size. Raises ValueError naming the symbols that have no value."""
    bound = Sizes(c, sizes)
    missing = sorted(n for n in c.free_symbols if n not in sizes)
    if missing:
        raise ValueError(f"no value for size {', '.join(missing)}: give sizes to predict seconds")
    extent = {r: size_int(n) for r, n in bound.rank.items()}
    batch = 1
    for r in a.batch:
        batch *= extent[r]
    embed = sum(_product(extent[r] for r in e.over) for e in a.products)
    known = {**sizes}
    return Shape(
        extent, known, batch, extent[a.query], extent[a.key], embed, extent[a.value], _group(a, extent, bound.known)
    )


def bound(s: Subject, sizes: Mapping[str, int]) -> Shape:
    """The shape of a subject, kept. Raises ValueError as `shape` does."""
    return _bound(s, tuple(sorted(sizes.items())))


@lru_cache(maxsize=1024)
def _bound(s: Subject, sizes: tuple[tuple[str, int], ...]) -> Shape:
    return shape(s.cascade, s.attention, dict(sizes))


def _product(sizes: object) -> int:
    out = 1
    for s in sizes:  # type: ignore[attr-defined]
        out *= s
    return out


def _group(a: Attention, extent: Mapping[str, int], symbols: Mapping[str, int]) -> int:
    """How many query heads read one key head: of the innermost batch rank that keys and values see divided."""
    keyed = [f for e in a.products for f in factors(e.body) if a.key in f.ranks]
    for r in reversed(a.batch):
        found = {_divisor(side, r, extent, symbols) for side in (*keyed, a.values)}
        if len(found) == 1 and (g := found.pop()) > 1:
            return g
    return 1


def _divisor(side: Expr, rank: str, extent: Mapping[str, int], symbols: Mapping[str, int]) -> int:
    """n when a term sees a rank only as `rank // n`, the whole extent when not at all, else 1."""
    if rank not in side.ranks:
        return extent[rank]
    at = ex.index(rank)
    found = set()
    for t in ex.walk(side):
        if t.op == "floordiv" and t.args[0] is at:
            n = t.args[1]
            found.add(int(n.value) if n.is_const else symbols.get(str(n.attr), 1) if n.op == "symbol" else 1)
        elif at in t.args:
            return 1
    return found.pop() if len(found) == 1 else 1


def plan_tiles(s: Subject, at: Shape, mapping: TileMapping, data: Data = NOTHING) -> Jobs:
    """The programs of a mapping and the key tiles that each of them visits, given what is known of run-time data."""
    a = s.attention
    tiles = tile_map(s.mask, a.query, a.key, at.extent, at.symbols, mapping.tile_p, mapping.tile_m, data)
    rows = -(-at.queries // mapping.tile_p)
    tile = mapping.tile_p, mapping.tile_m
    return jobs(tiles, at.batch * rows, rows, -(-at.keys // mapping.tile_m), s.mask, data, tile)


def work(s: Subject, at: Shape, mapping: TileMapping, sizes: Mapping[str, int], tiles: Jobs) -> Work:
    """The work of the one-pass form under a mapping: the kernel's own, which reads what the prelude has made."""
    saved = mask_operations(s, mapping.tile_p, mapping.tile_m)
    return count(_flow(s), mapping, sizes, tiles.tally, query=s.attention.query, mask_ops=saved)


def tile_work(
    s: Subject, at: Shape, tile: tuple[int, int], data: Data, walked: tuple[int, int] | None = None, skips: bool = True
) -> tuple[Streamed, Jobs]:
    """What one tile of queries and keys takes, and the programs; whatever the device.

    `walked`: the tile that a mask is walked with, where heads fill the rows of another. Without `skips` all are visited.
    """
    return _tile_work(s, at.known, tile, walked or tile, skips, data)


@lru_cache(maxsize=4096)
def _tile_work(
    s: Subject, sizes: tuple[tuple[str, int], ...], tile: tuple[int, int], walked: tuple[int, int], skips: bool, data: Data
) -> tuple[Streamed, Jobs]:
    at = _bound(s, sizes)
    tiles = plan_tiles(s, at, TileMapping(*walked), data)
    if not skips:
        tiles = replace(tiles, full=tiles.full * 0 + -(-at.keys // walked[1]), partial=tiles.partial * 0, map=None)
    mask = mask_operations(s, *tile)
    return streamed(_flow(s), TileMapping(*tile), at.symbols, tiles.tally, s.attention.query, mask), tiles


@lru_cache(maxsize=256)
def _flow(s: Subject) -> Cascade:
    """The one-pass form without what the prelude has made."""
    before = {e.out.tensor for e in s.attention.prelude}
    return replace(s.flow, einsums=tuple(e for e in s.flow.einsums if e.out.tensor not in before)) if before else s.flow


@lru_cache(maxsize=1024)
def mask_operations(s: Subject, tile_p: int, tile_m: int) -> Mapping[str, Size]:
    """Element operations that a full tile saves: those of the score less those of the score where the mask keeps."""
    if s.mask.keep is ex.TRUE:
        return {}
    a = s.attention
    one: dict[str, Size] = dict.fromkeys((r.name for r in s.cascade.ranks), 1)
    one[a.query], one[a.key] = tile_p, tile_m
    whole, rest = term_operations(a.score, one), term_operations(s.mask.full, one)
    saved = {op: n - rest.get(op, 0) for op, n in whole.items()}
    return {op: n for op, n in saved.items() if size_int(n) > 0}


def products(c: Cascade) -> tuple[Einsum, ...]:
    """Einsums over the matrix unit, in order."""
    return tuple(e for e in c.einsums if e.op == "add" and len(factors(e.body)) > 1)
