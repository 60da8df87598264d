"""Stretches of a sequence in which one piece stands several times in a row.

    a b c d b c d b c d e    →    from 1 on, a piece of 3, three times

Linear in the sequence but for a bounded number of periods that are tried: distances between equal groups of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Neighbours that are compared at once to propose a period, and how many proposals are looked at.
GROUP = 4
TRIED = 64


@dataclass(frozen=True)
class Stretch:
    """`length` positions from `start` on, each equal to that `period` further, as far as the stretch goes."""

    start: int
    period: int
    length: int

    @property
    def copies(self) -> int:
        return self.length // self.period

    @property
    def slack(self) -> int:
        """How many positions more than whole pieces there are."""
        return self.length % self.period


def stretches(labels: Sequence[int]) -> list[Stretch]:
    """Every stretch of at least two pieces, short periods first."""
    seen = np.asarray(labels, dtype=np.int64)
    out: list[Stretch] = []
    for period in _proposed(seen):
        same = np.concatenate(([False], seen[:-period] == seen[period:], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist()):
            if last - first >= period:
                out.append(Stretch(first, period, last - first + period))
    return out


def _proposed(seen: NDArray[np.int64]) -> list[int]:
    """Distances between a group of neighbours and the next one like it: the most frequent ones, ascending."""
    if len(seen) < 2 * GROUP:
        return []
    groups = np.lib.stride_tricks.sliding_window_view(seen, GROUP)
    _, number = np.unique(groups, axis=0, return_inverse=True)
    order = np.argsort(number.reshape(-1), kind="stable")
    ordered = number.reshape(-1)[order]
    apart = np.diff(order)[ordered[1:] == ordered[:-1]]
    periods, counts = np.unique(apart[apart <= len(seen) // 2], return_counts=True)
    best = np.argsort(-counts, kind="stable")[:TRIED]
    return sorted(periods[best].tolist())
