"""Rows that certainly keep a key: the proof that lets a kernel skip empty tiles.

A masked weight vanishes only beside a kept key. So empty tiles may be skipped in a query tile all of whose rows keep a
key; any other query tile visits every key tile with the score as written, and its rows yield what the model yields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from .. import expr as ex
from ..expr import Expr
from ..terms.affine import affine
from ..terms.arithmetic import Array, Span
from ..terms.block_spans import block_spans
from ..terms.conditions import conjunction, conjuncts
from ..terms.intervals import LoadSpan, align, native, spans
from .coordinates import places
from .tiles import TileMap, TileRuns, batch_ranks, bind, classify

# Rows proved at once, and rows few enough to test all witnesses together.
ROWS = 1 << 18
FEW = 1 << 12
# Scores few enough to look at each where no witness proves a row.
SCORES = 1 << 24


@lru_cache(maxsize=512)
def witnesses(keep: Expr, query: str, key: str, size: Expr) -> tuple[Expr, ...]:
    """Keys w(query) worth testing as proof that a row keeps one: the diagonal, the bounds in the predicate (of a plane's
    coordinates as well), the ends.

    `size` is the number of keys. A candidate proves nothing by itself: `keep` at `key := w` must hold, and w be a key.
    """
    m = ex.index(key)
    turned = any(e.op in ("not", "xor", "where") for e in ex.walk(keep))
    out: dict[Expr, None] = {ex.index(query): None}
    for e in ex.walk(keep):
        if e.op in ex.COMPARISONS and all(a.dtype in ex.INTEGERS for a in e.args):
            form = affine(e.args[0]) - affine(e.args[1])
            c = form.coefficient(m)
            rest = (form - affine(m).scaled(c)).scaled(-c)
            if abs(c) == 1 and not any(key in a.ranks or ex.loads(a) for a in rest.atoms):
                # c·m − c·rest ∘ 0 holds at m = rest, or at its neighbour when ∘ is strict
                near = {"lt": (-c,), "gt": (c,), "ne": (-1, 1)}.get(e.op, (0,))
                out.update(
                    dict.fromkeys((rest + affine(ex.const(s))).term() for s in ((0, -1, 1) if turned else near))
                )
    return (*tuple(out)[:8], *places(keep, query, key), ex.const(0), size - 1)


@lru_cache(maxsize=2048)
def _holds(keep: Expr, key: str, witness: Expr, size: int) -> Expr:
    """The witness is a key and is kept."""
    return (witness >= 0) & (witness < size) & ex.substitute(keep, {ex.index(key): witness})


@lru_cache(maxsize=512)
def _query_free(keep: Expr, query: str) -> Expr:
    """The conjunction of the conditions that do not depend on the query."""
    return conjunction(tuple(c for c in conjuncts(keep) if query not in c.ranks))


def rows_with_key(
    keep: Expr, tiles: TileMap | TileRuns, *, query: str, key: str, extents: Mapping[str, int],
    symbols: Mapping[str, int] | None = None, of_load: LoadSpan | None = None, xp: ModuleType = np,
) -> Array:
    """bool [*batch, n_p]: True only where every row of the query tile certainly keeps at least one key.

    Arguments as given to `classify`. A full tile proves its rows; else some witness must hold, in the whole tile or row
    by row (the latter only in numpy).
    """
    keep = bind(keep, symbols)
    certain = tiles.has_full()
    rows = _Rows(keep, query, key, batch_ranks(keep, query, key, extents), extents, tiles.tile_p, of_load, xp)
    if xp is not np or not native(certain):
        return rows.whole_tiles(certain)
    # a query tile without any visited tile has no key at all
    visited = tiles.has_visited()
    if (certain | ~visited).all():
        return certain
    certain = rows.whole_tiles(certain)
    opened = np.flatnonzero(visited & ~certain)
    if len(opened):
        certain.reshape(-1)[opened] = rows.single_rows(np.unravel_index(opened, certain.shape))
    return certain


@dataclass(frozen=True)
class _Rows:
    keep: Expr
    query: str
    key: str
    batch: tuple[str, ...]
    extents: Mapping[str, int]
    tile: int
    of_load: LoadSpan | None
    xp: ModuleType

    @property
    def candidates(self) -> tuple[Expr, ...]:
        return witnesses(self.keep, self.query, self.key, ex.const(self.extents[self.key]))

    def batch_box(self) -> dict[str, Span]:
        """Single coordinates of every batch rank, each along its own dimension; one more dimension follows."""
        out = {}
        for i, r in enumerate(self.batch):
            at = np.arange(self.extents[r]).reshape([-1] + [1] * (len(self.batch) - i))
            out[r] = (at, at)
        return out

    def whole_tiles(self, certain: Array) -> Array:
        """Proof by one witness for all rows of a tile."""
        lo = np.arange(certain.shape[-1]) * self.tile
        box = {**self.batch_box(), self.query: (lo, np.minimum(lo + self.tile, self.extents[self.query]) - 1)}
        # where rows are proved one by one as well, loads are not read off their blocks
        aligned = self.xp is np and bool(ex.loads(self.keep))
        for w in self.candidates:
            if self.xp is np and certain.all():
                break
            if aligned and w.op not in ("index", "const"):
                continue
            yes = spans(_holds(self.keep, self.key, w, self.extents[self.key]), box, of_load=self.of_load, xp=self.xp)[0]
            ((certain, yes),) = align([(certain, yes)], self.xp)
            certain = certain | yes
        return certain

    def single_rows(self, where: tuple[Array, ...]) -> Array:
        """Proof row by row, each by its own witness, for the query tiles at `where`."""
        nearest = self.nearest()
        first = where[-1] * self.tile
        last = np.minimum(first + self.tile, self.extents[self.query]) - 1
        # most tiles that fail do so in an end row
        proved = self.proved(where, np.stack([first, last], axis=-1), nearest)
        rest = np.flatnonzero(proved)
        for part in np.array_split(rest, max(1, -(-len(rest) * self.tile // ROWS))):
            some = tuple(w[part] for w in where)
            row = np.minimum(some[-1][:, None] * self.tile + np.arange(self.tile), self.extents[self.query] - 1)
            proved[part] = self.proved(some, row, nearest)
        left = np.flatnonzero(~proved)
        if len(left) * self.tile * self.extents[self.key] <= SCORES:
            for part in np.array_split(left, max(1, -(-len(left) * self.tile * self.extents[self.key] // ROWS))):
                proved[part] = self.looked_at(tuple(w[part] for w in where))
        return proved

    def looked_at(self, where: tuple[Array, ...]) -> Array:
        """Whether all rows of each query tile keep a key: every key is asked."""
        rows = np.minimum(where[-1][:, None] * self.tile + np.arange(self.tile), self.extents[self.query] - 1)[:, :, None]
        keys = np.arange(self.extents[self.key])[None, None, :]
        box: dict[str, Span] = {r: (w[:, None, None], w[:, None, None]) for r, w in zip(self.batch, where)}
        yes = spans(self.keep, {**box, self.query: (rows, rows), self.key: (keys, keys)}, of_load=self.of_load)[0]
        return np.asarray(np.broadcast_to(yes, (len(rows), self.tile, keys.size)).any(-1).all(-1))

    def proved(self, where: tuple[Array, ...], row: Array, nearest: tuple[Array, ...]) -> Array:
        """Whether each of the rows [tile, row] has a witness, for all rows of a tile."""
        size = self.extents[self.key]
        index = [np.broadcast_to(b[:, None], row.shape) for b in where[:-1]]
        box: dict[str, Span] = {r: (w[:, None], w[:, None]) for r, w in zip(self.batch, where)}
        box[self.query] = (row, row)
        found = np.zeros(row.shape, np.bool_)
        # one witness after another, or for few rows all at once
        groups = [self.candidates] if row.size <= FEW else [(w,) for w in self.candidates]
        for group in groups:
            if found.all():
                break
            at = np.stack([np.broadcast_to(spans(w, box)[0], row.shape) for w in group])
            at = np.clip(at, 0, size - 1).astype(np.int64)
            if nearest:
                # the nearest keys that loads allow stand for the witness itself
                at = np.concatenate([table[(*index, at)] for table in nearest])
            yes = spans(self.keep, {**box, self.key: (at, at)}, of_load=self.of_load)[0]
            found |= (yes & (at >= 0) & (at < size)).any(0)
        return found.all(-1)

    def nearest(self) -> tuple[Array, ...]:
        """[*batch, M]: the last key at or before m, and the first at or after, that query-free conditions keep.

        Empty when these conditions read no data.
        """
        free = _query_free(self.keep, self.query)
        if not ex.loads(free):
            return ()
        size = self.extents[self.key]
        keys = np.arange(size)
        yes = spans(free, {**self.batch_box(), self.key: (keys, keys)}, of_load=self.of_load)[0]
        yes = np.broadcast_to(yes, (*(self.extents[r] for r in self.batch), size))
        before = np.maximum.accumulate(np.where(yes, keys, -1), axis=-1)
        after = np.minimum.accumulate(np.where(yes, keys, size)[..., ::-1], axis=-1)[..., ::-1]
        return before, after


@dataclass(frozen=True, eq=False)
class Walk:
    """What a kernel needs at run time: the classes, and the rows that are proved to keep a key."""

    tiles: TileMap
    certain: Array

    @property
    def guarded(self) -> TileMap:
        """The map to walk when masked weights vanish beside a kept key (`Mask.vanishing`)."""
        return self.tiles.guarded(self.certain)


def runtime_classify(
    keep: Expr, *, query: str, key: str, extents: Mapping[str, int], symbols: Mapping[str, int] | None = None,
    tile_p: int, tile_m: int, arrays: Mapping[str, Array], xp: ModuleType = np,
) -> Walk:
    """`classify` and `rows_with_key` with the tensors that the mask loads, as given to the kernel."""
    of_load = block_spans(arrays, (tile_p, tile_m), xp)
    tiles = classify(
        keep, query=query, key=key, extents=extents, symbols=symbols, tile_p=tile_p, tile_m=tile_m, of_load=of_load, xp=xp
    )
    certain = rows_with_key(
        keep, tiles, query=query, key=key, extents=extents, symbols=symbols, of_load=of_load, xp=xp
    )
    return Walk(tiles, certain)
