"""Sweeps: one capture costed at many sizes and on many devices; which candidate wins where, and where the choice changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from ..devices.device import Device
from .axes import bound_sizes, no_axis
from .course import Change, Course, Estimate, Point, SweepError
from .findings import Findings, Retake
from .mesh_sweep import spread
from .site import Site
from .sweep import Sweep


def sweep(plan: Findings, axis: str, values: Sequence[int], devices: Sequence[Device] = ()) -> Sweep:
    """Cost the distinct sites of a plan at every value of an axis, on its own device or on these.

    Values that the graph was not captured for are left out and named in `skipped`. Raises SweepError where the axis is
    not open, a value is below 1, or no value is left.
    """
    if plan.retake is None or axis not in (*plan.axes, *(s.name for s in plan.symbols)):
        raise SweepError(no_axis(plan, axis))
    if not values or min(values) < 1:
        raise SweepError(f"a sweep over {axis} needs values of at least 1")
    start = time.perf_counter()
    kept, skipped = _admitted(plan, axis, sorted(set(values)))
    groups = plan.groups
    courses: list[Course] = []
    for device in devices or (plan.device,):
        for members in groups:
            at = _costed(plan.retake, plan, axis, device, members[0])
            points = tuple(map(at, kept))
            changes = tuple(c for a, b in pairwise(points) for c in _between(at, a, b))
            courses.append(Course(plan.group_name(members), members[0], len(members), device.name, points, changes))
    meshes = spread(plan, axis, kept, devices or (plan.device,))
    return Sweep(axis, tuple(kept), tuple(courses), skipped, time.perf_counter() - start, meshes)


def _costed(retake: Retake, plan: Findings, axis: str, device: Device, index: int) -> Callable[[int], Point]:
    """The point of one site on one device at a value of the axis."""

    def at(value: int) -> Point:
        (site,) = retake(device, bound_sizes(plan, {axis: value}), (index,))
        return point(site, value)

    return at


def _between(at: Callable[[int], Point], low: Point, end: Point) -> Iterator[Change]:
    """Where between two points the choice changes, each to within an eighth: there may be a third choice in between."""
    while low.choice != end.choice:
        high = end
        while high.value - low.value > max(1, low.value // 8):
            middle = at((low.value + high.value) // 2)
            low, high = (middle, high) if middle.choice == low.choice else (low, middle)
        yield Change(low.value, high.value, low.choice, high.choice)
        low = high


def _admitted(plan: Findings, axis: str, values: Sequence[int]) -> tuple[list[int], str]:
    kept: list[int] = []
    why = ""
    for v in values:
        try:
            bound_sizes(plan, {axis: v})
        except SweepError as no:
            why = str(no)
        else:
            kept.append(v)
    if not kept:
        raise SweepError(why)
    return kept, why


def point(site: Site, value: int) -> Point:
    """A costed site as a point of a sweep."""
    able = [c for c in site.candidates if c.feasible and c.cost is not None]
    estimates = tuple(Estimate(c.name, c.cost.seconds, c.cost.bound) for c in able if c.cost is not None)
    return Point(value, site.choice, estimates, site.memory)
