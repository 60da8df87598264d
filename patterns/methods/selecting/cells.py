"""Cells of queries × keys under a model's mask: in which some pair is kept, and which are a row's own.

Intervals over a cell decide, which is exact for masks that are affine in positions and may count a cell too many for others:
the kernel that walks the table keeps to the mask itself (R1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ... import expr as ex
from ...expr import Expr
from ...terms.intervals import spans

Bools = NDArray[np.bool_]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """`queries` × `keys` pairs of which the term `keep` over the ranks `query` and `key` keeps some.

    `own`: the place of a row among the keys, a term over `query` (rows over a cache lie at its end, R2); None without one.
    """

    queries: int
    keys: int
    keep: Expr = ex.TRUE
    own: Expr | None = None
    query: str = "p"
    key: str = "m"

    def count(self, rows: int, keys: int, last: int) -> tuple[int, int]:
        """How many rows and columns of cells there are; `rows` 0: one for all."""
        total = min(last, self.queries) if last else self.queries
        return -(-total // rows) if rows else 1, -(-self.keys // keys)

    def some(self, rows: int, keys: int, last: int = 0) -> Bools:
        """Is a pair kept? [rows of cells, columns of cells]; read only."""
        return _some(self, rows, keys, last)

    def own_cells(self, rows: int, keys: int, last: int = 0) -> tuple[Places, Places] | None:
        """The first and the last column that is some row's own place, row by row of cells."""
        return _own(self, rows, keys, last)

    @property
    def sees_itself(self) -> bool:
        """Does the mask let every query see the key at its own place?"""
        return _sees_itself(self)

    def share(self, rows: int, keys: int, last: int = 0) -> float:
        """The share of cells in which a pair is kept."""
        return float(self.some(rows, keys, last).mean())

    def rows(self, rows: int, last: int) -> tuple[Places, Places]:
        """First and last query of each row of cells."""
        return _ends(self.queries, rows, self.queries - min(last, self.queries) if last else 0)


def causal(queries: int, keys: int) -> Cells:
    """Rows at the end of the keys, each of which sees itself and what lies before."""
    p, m = ex.index("p"), ex.index("m")
    own = p + (keys - queries)
    return Cells(queries, keys, m - own <= 0, own)


def every(queries: int, keys: int) -> Cells:
    """Nothing is masked; a row has a place among the keys where there are as many."""
    return Cells(queries, keys, ex.TRUE, ex.index("p") if queries == keys else None)


def _ends(n: int, size: int, start: int = 0) -> tuple[Places, Places]:
    size = size or max(1, n - start)
    low = np.arange(start, n, size)
    return low, np.minimum(low + size, n) - 1


@lru_cache(maxsize=64)
def _some(c: Cells, rows: int, keys: int, last: int) -> Bools:
    (p0, p1), (m0, m1) = c.rows(rows, last), _ends(c.keys, keys)
    if c.keep is ex.TRUE:
        return np.ones((len(p0), len(m0)), np.bool_)
    box = {c.query: (p0[:, None].astype(np.float64), p1[:, None].astype(np.float64)),
           c.key: (m0[None].astype(np.float64), m1[None].astype(np.float64))}
    _, possible = spans(c.keep, box)
    # torch takes only arrays that may be written
    return np.array(np.broadcast_to(np.asarray(possible, np.bool_), (len(p0), len(m0))))


@lru_cache(maxsize=64)
def _own(c: Cells, rows: int, keys: int, last: int) -> tuple[Places, Places] | None:
    if c.own is None:
        return None
    p0, p1 = c.rows(rows, last)
    ends = []
    for at in (p0, p1):
        found, _ = spans(c.own, {c.query: (at.astype(np.float64), at.astype(np.float64))})
        place = np.clip(np.broadcast_to(np.asarray(found, np.float64), at.shape), 0, c.keys - 1)
        ends.append(place.astype(np.int64) // keys)
    return np.minimum(*ends), np.maximum(*ends)


@lru_cache(maxsize=64)
def _sees_itself(c: Cells) -> bool:
    own = c.own_cells(1, 1)
    if own is None:
        return False
    p, at = np.arange(c.queries, dtype=np.float64), own[0].astype(np.float64)
    sure, _ = spans(c.keep, {c.query: (p, p), c.key: (at, at)})
    return bool(np.all(np.asarray(sure)))
