"""Tiles of a mask that repeats along the diagonal: one row and one column of tiles tell all.

    keep(p + d, m + d) = keep(p, m)    ⟹    class(i + a, j + b) = class(i, j)        d = a·tile_p = b·tile_m

Dilated windows, strides, blocks and residues of p − m repeat; that they do is read off the normal form of the term, not
tried out. Rows and columns that the end of the sequence cuts are looked at on their own.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .. import expr as ex
from ..expr import Expr
from ..terms.affine import affine
from ..terms.arithmetic import Array
from .descent import Grid, KnownMask, settled
from .runs import FULL, PARTIAL, Intervals, Ints

# Tiles of one period along a side, and tiles of a map below which looking at all of them is as good.
LONGEST = 16
FEW = 4096


def repeated(work: KnownMask, grid: Grid) -> tuple[Intervals, Intervals] | None:
    """(full, partial) tiles of a mask as intervals that do not overlap, or None where it does not repeat."""
    if ex.loads(work.keep) or math.prod(grid.shape(1)) <= FEW:
        return None
    unit = math.lcm(grid.tile_p, grid.tile_m)
    # what repeats at some of these distances does so at their common multiple
    every = math.lcm(*range(1, LONGEST + 1)) * unit
    if not _repeats(work.keep, grid.query, grid.key, every):
        return None
    times = next((k for k in range(1, LONGEST + 1) if _repeats(work.keep, grid.query, grid.key, k * unit)), 0)
    a, b = times * unit // grid.tile_p, times * unit // grid.tile_m
    if not 0 < max(a, b) <= LONGEST:
        return None
    return _laid_out(_Pattern(work, grid, a, b))


@lru_cache(maxsize=1024)
def _repeats(keep: Expr, query: str, key: str, distance: int) -> bool:
    shifted = ex.substitute(keep, {ex.index(r): ex.index(r) + distance for r in (query, key)})
    return canonical(shifted) is canonical(keep)


@lru_cache(maxsize=1024)
def canonical(keep: Expr) -> Expr:
    """An equal term in which integers are sums in normal form, and comparisons of them are with 0."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op in ex.COMPARISONS and all(x.dtype in ex.INTEGERS for x in args):
            return ex.binary(e.op, (affine(args[0]) - affine(args[1])).term(), 0)
        if e.dtype == "i64" and e.op not in ("const", "index", "symbol", "load"):
            return affine(ex.make(e.op, args, e.attr, e.dtype)).term()
        return None

    return ex.rebuild(keep, rule)


class _Pattern:
    """Classes of a mask that repeats every `a` rows and `b` columns of tiles.

    `strip` [entries, a, width]: row r of the first period over the key tiles −`left` … n_m, those before 0 as in the
    rows below. Row r + a·k is that strip, b·k tiles further on.
    """

    def __init__(self, work: KnownMask, grid: Grid, a: int, b: int) -> None:
        self.work, self.grid, self.a, self.b = work, grid, a, b
        n_p, n_m = grid.shape(1)[-2:]
        self.left = -(-n_p // a) * b
        self.strip = self.classes(np.arange(a)[:, None], np.arange(-self.left, n_m)[None])

    def classes(self, i: Array, j: Array, *, virtual: bool = True) -> Array:
        """Classes of tiles [entries, *i × j]; tiles left of the first are looked up a period below."""
        entries = [self.grid.extents[r] for r in self.grid.batch]
        down = np.maximum(0, -(j // self.b)) if virtual else 0
        i, j = np.broadcast_arrays(i + down * self.a, j + down * self.b)
        at = np.unravel_index(np.arange(self.grid.entries), entries or [1])[: len(entries)]
        where = (*(np.repeat(w, i.size) for w in at), *(np.tile(x.reshape(-1), self.grid.entries) for x in (i, j)))
        box = self.grid.box(where, 1, virtual=virtual)
        yes, maybe = self.work.boxes(box, len(where[-1]))
        kinds = np.add(yes, maybe, dtype=np.uint8)
        open_ = np.flatnonzero(kinds == PARTIAL)
        if len(open_):
            some = {r: (lo[open_], hi[open_]) for r, (lo, hi) in box.items()}
            kinds[open_] = settled(self.work, self.grid.query, self.grid.key, some)
        return kinds.reshape(self.grid.entries, *i.shape)


def _laid_out(t: _Pattern) -> tuple[Intervals, Intervals]:
    grid, (n_p, n_m) = t.grid, t.grid.shape(1)[-2:]
    rows, columns = grid.extents[grid.query] // grid.tile_p, grid.extents[grid.key] // grid.tile_m
    out = []
    for kind in (FULL, PARTIAL):
        parts = [_repeated_runs(t, kind, rows, columns)]
        if columns < n_m:
            edge = t.classes(np.arange(rows)[:, None], np.array([[columns]]), virtual=False)
            parts.append(_runs(edge, kind, n_p, first_tile=columns))
        if rows < n_p:
            edge = t.classes(np.array([[rows]]), np.arange(n_m)[None], virtual=False)
            parts.append(_runs(edge, kind, n_p, first_row=rows))
        out.append(Intervals.join(parts))
    return out[0], out[1]


def _repeated_runs(t: _Pattern, kind: int, rows: int, columns: int) -> Intervals:
    """The strip's runs of one class in every whole row, cut to the whole key tiles."""
    n_p = t.grid.shape(1)[-2]
    runs = _runs(t.strip, kind, t.a)
    entry, r = np.divmod(runs.row, t.a)
    periods = -(-rows // t.a)
    k = np.tile(np.arange(periods), len(r))
    entry, r, start, stop = (np.repeat(x, periods) for x in (entry, r, runs.start, runs.stop))
    row, shift = r + t.a * k, t.b * k - t.left
    start, stop = np.maximum(start + shift, 0), np.minimum(stop + shift, columns)
    seen = (row < rows) & (start < stop)
    return Intervals((entry * n_p + row)[seen], start[seen], stop[seen])


def _runs(kinds: Array, kind: int, rows: int, first_row: int = 0, first_tile: int = 0) -> Intervals:
    """Runs of one class in [entries, some rows, tiles]; `rows` are those of an entry."""
    entries, height, width = kinds.shape
    hit = np.zeros((entries * height, width + 2), np.int8)
    hit[:, 1:-1] = kinds.reshape(-1, width) == kind
    edge = np.diff(hit)
    row, start = np.nonzero(edge == 1)
    stop: Ints = np.nonzero(edge == -1)[1]
    entry, r = np.divmod(row, height)
    return Intervals(entry * rows + r + first_row, start + first_tile, stop + first_tile)
