"""Sweeps: one capture costed at many sizes and on many devices; which candidate wins where, and where the choice changes.

    axis      open sizes of a graph, moved together: `seq` those of query ranks, `past` of key ranks alone, `batch` the
              outermost of the other ranks
    course    one group of identical attentions on one device, a point for each value of the axis
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sympy

from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, Size
from ..count.memory import AttentionMemory
from ..devices.device import Device
from .mesh_sweep import MeshCourse, spread

if TYPE_CHECKING:
    from .plan import Plan, Site

AXES = ("seq", "past", "batch")
# A device, the values of open sizes, and the positions of the sites wanted: those sites costed there.
Retake = Callable[[Device, Mapping[str, int], Sequence[int]], "tuple[Site, ...]"]


class SweepError(ValueError):
    """A plan cannot be made at these sizes; the message is one sentence that says what can."""


@dataclass(frozen=True)
class Symbol:
    """A size that the graph leaves open: its value in the example, and the values for which the graph was captured.

    `high` is None where nothing bounds it. Capture takes 0 and 1 for special, so `low` is 2 for what may be 1 as well.
    """

    name: str
    value: int
    low: int = 0
    high: int | None = None

    def admits(self, value: int) -> bool:
        low = 1 if self.low <= 2 else self.low
        return low <= value and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Estimate:
    """A candidate that can run at a point: predicted seconds and what bounds them."""

    candidate: str
    seconds: float
    bound: str


@dataclass(frozen=True)
class Point:
    """One value of the axis: the choice, every candidate that can run, best first, and the memory of one attention."""

    value: int
    choice: str
    estimates: tuple[Estimate, ...]
    memory: AttentionMemory | None = None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of the choice."""
        return next((e.seconds for e in self.estimates if e.candidate == self.choice), None)


@dataclass(frozen=True)
class Change:
    """The choice is `before` at `low` and `after` at `high`."""

    low: int
    high: int
    before: str
    after: str


@dataclass(frozen=True)
class Course:
    """A group of `count` identical attentions along the axis on one device. `site` names them, `index` is the first's.

    `changes` are where neighbouring points differ in their choice, narrowed to within an eighth of the value.
    """

    site: str
    index: int
    count: int
    device: str
    points: tuple[Point, ...]
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """All courses of a plan along one axis. `str()` is a table; `skipped` says which values the capture does not admit.

    `seconds` is how long it took to cost them. `meshes`: with a mesh, the ways to spread all attentions over it.
    """

    axis: str
    values: tuple[int, ...]
    courses: tuple[Course, ...]
    skipped: str = ""
    seconds: float = field(default=0.0, compare=False)
    meshes: tuple[MeshCourse, ...] = ()

    def on(self, device: str) -> Sweep:
        """The courses of one device."""
        return replace(
            self, courses=tuple(c for c in self.courses if c.device == device),
            meshes=tuple(m for m in self.meshes if m.device == device),
        )  # fmt: skip

    def __str__(self) -> str:
        from .table_sweep import sweep_table

        return sweep_table(self)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Sweep:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        courses = tuple(map(_course, d["courses"]))
        meshes = tuple(map(MeshCourse.from_dict, d.get("meshes", ())))
        return Sweep(d["axis"], tuple(d["values"]), courses, d["skipped"], d["seconds"], meshes)


def _course(d: Mapping[str, Any]) -> Course:
    points, changes = tuple(map(_point, d["points"])), tuple(Change(**c) for c in d["changes"])
    return Course(**{**d, "points": points, "changes": changes})


def _point(d: Mapping[str, Any]) -> Point:
    memory = AttentionMemory(**d["memory"]) if d["memory"] is not None else None
    return Point(d["value"], d["choice"], tuple(Estimate(**e) for e in d["estimates"]), memory)


# --- axes -----------------------------------------------------------------------------------------------------------


def axes(cascades: Iterable[Cascade]) -> dict[str, tuple[str, ...]]:
    """The open sizes behind `seq`, `past` and `batch`, read off the ranks of the attentions; only axes that there are."""
    found: dict[str, dict[str, None]] = {name: {} for name in AXES}
    for c in dict.fromkeys(cascades):
        view = attention(c)
        if not isinstance(view, Attention):
            continue
        size = {r.name: r.size for r in view.cascade.ranks}
        found["seq"].update(dict.fromkeys(_whole(size[view.query])))
        found["past"].update(dict.fromkeys(_shifted(size[view.key])))
        outermost = next((s for r in view.batch for s in _whole(size[r])), None)
        found["batch"].update({outermost: None} if outermost is not None else {})
    taken: set[str] = set()
    out = {}
    for name in AXES:
        mine = tuple(s for s in found[name] if s not in taken)
        taken |= set(mine)
        if mine:
            out[name] = mine
    return out


def _whole(size: Size) -> tuple[str, ...]:
    return (str(size),) if isinstance(size, sympy.Symbol) else ()


def _shifted(size: Size) -> tuple[str, ...]:
    """The symbol of s, or of s + constant: a cache and the tokens of this step."""
    if isinstance(size, int):
        return ()
    symbols = [s for s in size.free_symbols if (size - s).is_Integer]
    return tuple(str(s) for s in symbols)


def bound_sizes(plan: Plan, sizes: Mapping[str, int]) -> dict[str, int]:
    """Values of all open sizes of a plan, where `sizes` gives some by axis or by symbol. Raises SweepError."""
    at = {s.name: s.value for s in plan.symbols}
    known = {s.name: s for s in plan.symbols}
    for name, value in sizes.items():
        moved = plan.axes.get(name) or ((name,) if name in known else ())
        if not moved:
            raise SweepError(_no_axis(plan, name))
        if value < 1:
            raise SweepError(f"{name}={value}: sizes must be at least 1")
        for s in moved:
            if not known[s].admits(value):
                raise SweepError(f"{name}={value}: the graph was captured for {name} {_range(known[s])}")
            at[s] = value
    return at


def _range(s: Symbol) -> str:
    low = 1 if s.low <= 2 else s.low
    return f"from {low} to {s.high}" if s.high is not None else f"of at least {low}"


def _no_axis(plan: Plan, name: str) -> str:
    if plan.retake is None:
        return "this plan has fixed sizes, or was read from a file: make it with reattend.plan(..., dynamic=True)"
    there = ", ".join([*plan.axes, *(s.name for s in plan.symbols)])
    if not there:
        return f"all sizes of this plan are fixed, {name} among them: make it with dynamic=True (--dynamic)"
    return f"the size {name!r} is fixed or unknown: one of {there} may be varied"


# --- sweeping -------------------------------------------------------------------------------------------------------


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """`low`, doubled up to `high`; `high` itself is the last. Raises SweepError for what is no range of sizes."""
    if low < 1:
        raise SweepError(f"a sweep starts at 1 or above, not at {low}")
    if high < low:
        raise SweepError(f"a sweep goes up: {low} to {high} is empty")
    out = [low]
    while out[-1] * 2 < high:
        out.append(out[-1] * 2)
    return tuple(out if out[-1] == high else [*out, high])


def sweep(plan: Plan, axis: str, values: Sequence[int], devices: Sequence[Device] = ()) -> Sweep:
    """Cost the distinct sites of a plan at every value of an axis, on its own device or on these.

    Values that the graph was not captured for are left out and named in `skipped`. Raises SweepError where the axis is
    not open, a value is below 1, or no value is left.
    """
    if plan.retake is None or axis not in (*plan.axes, *(s.name for s in plan.symbols)):
        raise SweepError(_no_axis(plan, axis))
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


def _costed(retake: Retake, plan: Plan, axis: str, device: Device, index: int) -> Callable[[int], Point]:
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


def _admitted(plan: Plan, axis: str, values: Sequence[int]) -> tuple[list[int], str]:
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
