"""Schedules: how long a device's units take to work off the programs of a launch, in which order.

    makespan  of the jobs on `slots` units, in the order in which they are handed out      ≥ max(Σ/slots, longest)
    LPT       longest first over all of them: at most 4/3 of the best                      (Graham 1969)
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]

# Programs above this are not scheduled one by one.
SCHEDULED = 1 << 13


@dataclass(frozen=True, eq=False)
class Schedule:
    """The makespans of one launch in three orders, in the unit of its costs, over the `bound` that none beats.

    `as_written`: batch entry by batch entry, rows in order. `rows_first`: the same with each entry's dearest rows first,
    as our kernels launch. `longest_first`: all programs by falling cost. `order` is the latter, [programs, 2] of
    (batch entry, query tile) without repetitions.
    """

    slots: int
    bound: float
    as_written: float
    rows_first: float
    longest_first: float
    order: NDArray[np.int64]

    @property
    def best(self) -> str:
        """The name of the shortest order; the simplest of those that tie."""
        return min(("as_written", "rows_first", "longest_first"), key=lambda n: float(getattr(self, n)))

    @property
    def efficiency(self) -> float:
        """The bound over the shortest makespan: 1 where no unit waits."""
        return self.bound / float(getattr(self, self.best)) if self.bound else 1.0


def schedule(costs: Costs, repeat: int, slots: int) -> Schedule:
    """The schedules of jobs [batch, query tiles], each `repeat` times, run job by job. Raises ValueError without a slot."""
    if slots < 1:
        raise ValueError(f"a launch needs at least one unit, not {slots}")
    falling = np.argsort(-costs.reshape(-1), kind="stable")
    every = np.repeat(costs.reshape(-1)[falling], repeat)
    longest = float(every[0]) if len(every) else 0.0
    return Schedule(
        slots, max(float(every.sum()) / slots, longest),
        makespan(order(costs, repeat, False), slots), makespan(order(costs, repeat, True), slots),
        makespan(every, slots), np.stack(np.unravel_index(falling, costs.shape), -1),
    )


def needs_split(costs: Costs, repeat: int, slots: int) -> bool:
    """Does one program outlast an even load, so that only splitting its keys shortens the launch?"""
    return bool(costs.size) and float(costs.max()) > float(costs.sum()) * repeat / slots


def launch_span(costs: Costs, repeat: int, slots: int, heavy_first: bool, scheduled: int = SCHEDULED) -> float:
    """The makespan of jobs [batch, query tiles], each `repeat` times, in launch order on `slots` units.

    Queues longer than `scheduled` are not run job by job: they end within half of their last jobs' length of an even
    load.
    """
    n = costs.size * repeat
    if n > max(scheduled, slots) and costs.min() < costs.max():
        last = costs.min() if heavy_first else costs.max()
        return longest_queue(float(costs.sum()) * repeat / slots, float(last), float(costs.max()))
    return makespan(order(costs, repeat, heavy_first), slots)


def longest_queue(even: float, last: float, longest: float) -> float:
    """When a queue that is not run job by job ends: within half of its last jobs' length of an even load."""
    return max(even + last / 2, longest)


def makespan(costs: Costs, slots: int) -> float:
    """Time until the last of these jobs ends, handed out in order to whichever of `slots` units is free."""
    n = len(costs)
    if n == 0:
        return 0.0
    longest = float(costs.max())
    if n <= slots:
        return longest
    if longest == float(costs.min()):
        return -(-n // slots) * longest
    ends, at = np.sort(costs[:slots]), slots
    while at < n:
        ends, at = _turn(ends, costs, at)
    return float(ends[-1])


# Jobs of a turn from which on it pays, and how many are handed out one by one where it does not.
TURN, SINGLE = 24, 512


def _turn(ends: Costs, costs: Costs, at: int) -> tuple[Costs, int]:
    """Hand out jobs from `at` on, to as many units as are free before the first of these jobs ends; when they end then.

    `ends` are in order, so that the next job's unit is the next of them, until a job of this turn ends before.
    """
    some = costs[at : at + len(ends)]
    made = ends[: len(some)] + some
    early = np.minimum.accumulate(made)[:-1] < ends[1 : len(some)]
    many = int(early.argmax()) + 1 if early.any() else len(some)
    if many < min(TURN, len(some)):
        return _one_by_one(ends, costs[at : at + SINGLE]), at + SINGLE
    ends[:many] = made[:many]
    ends.sort()
    return ends, at + many


def _one_by_one(ends: Costs, costs: Costs) -> Costs:
    queue: list[float] = ends.tolist()
    for c in costs.tolist():
        heapq.heapreplace(queue, queue[0] + c)
    return np.sort(queue)


def order(costs: Costs, repeat: int, heavy_first: bool) -> Costs:
    """The launch order of jobs [batch, query tiles]: one batch entry after the other, its dearest rows first or last."""
    if heavy_first:
        costs = costs[:, np.argsort(-costs.sum(0), kind="stable")]
    return np.tile(costs.reshape(-1), repeat)
