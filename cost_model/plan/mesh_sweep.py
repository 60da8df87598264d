"""A mesh over a sweep: which way to spread the attentions wins at each size, what a device then holds, and where it is full.

    course    the ways on one device along an axis, a point for each value        held ≤ room: it fits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..devices.device import Device
from ..mesh.capacity import RESERVE
from ..mesh.mesh import MeshError
from ..mesh.plan import MeshPlan, Scheme

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class WayPoint:
    """A way at one size: seconds of a step and bytes that a device holds; `fits` where it has that room."""

    name: str
    seconds: float
    held_bytes: int
    fits: bool


@dataclass(frozen=True)
class MeshPoint:
    """One value of the axis: the fastest way that fits ("" where none does), every way that can be had, and why none can."""

    value: int
    best: str
    ways: tuple[WayPoint, ...]
    why: str = ""

    def way(self, name: str) -> WayPoint | None:
        return next((w for w in self.ways if w.name == name), None)


@dataclass(frozen=True)
class MeshCourse:
    """The ways over a mesh of one device along an axis. `room_bytes`: what a device has for them, the reserve kept."""

    mesh: str
    device: str
    room_bytes: float
    points: tuple[MeshPoint, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every way that some point has, in order of appearance."""
        return tuple(dict.fromkeys(w.name for p in self.points for w in p.ways))

    @property
    def changes(self) -> tuple[tuple[int, int, str, str], ...]:
        """Neighbouring values between which the best way changes: (low, high, before, after); "" where none fits."""
        return tuple((a.value, b.value, a.best, b.best) for a, b in pairwise(self.points) if a.best != b.best)

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> MeshCourse:
        """Read what `asdict` wrote. Raises KeyError or TypeError on other data."""
        points = (MeshPoint(**{**p, "ways": tuple(WayPoint(**w) for w in p["ways"])}) for p in d["points"])
        return MeshCourse(**{**d, "points": tuple(points)})


def spread(plan: Plan, axis: str, values: Sequence[int], devices: Sequence[Device]) -> tuple[MeshCourse, ...]:
    """The mesh of a plan at every value of an axis, on each device; nothing for a plan without a mesh.

    A value that the mesh does not divide (a batch over dp) is a point with the reason.
    """
    if plan.sharding is None or plan.reshard is None:
        return ()
    return tuple(
        MeshCourse(
            plan.sharding.mesh, d.name, (1 - RESERVE) * d.dram_bytes, tuple(_point(plan, axis, v, d) for v in values)
        )
        for d in devices
    )  # fmt: skip


def _point(plan: Plan, axis: str, value: int, device: Device) -> MeshPoint:
    from .sweep import bound_sizes

    assert plan.reshard is not None
    try:
        made = plan.reshard(device, bound_sizes(plan, {axis: value}))
    except MeshError as no:
        return MeshPoint(value, "", (), str(no))
    return mesh_point(made, value) if made is not None else MeshPoint(value, "", (), "there is no attention")


def mesh_point(made: MeshPlan, value: int) -> MeshPoint:
    """A sharding plan as a point of a sweep."""
    best = made.best
    ways = tuple(WayPoint(s.name, s.seconds, s.held_bytes, s.feasible) for s in made.schemes if s.parts)
    return MeshPoint(value, best.name if best is not None else "", ways, "" if best is not None else _why(made.schemes))


def _why(schemes: Sequence[Scheme]) -> str:
    """Why no way can be had: the reason of the one that comes nearest."""
    held = sorted((s for s in schemes if s.parts), key=lambda s: s.held_bytes)
    return next((s.why for s in (*held, *schemes)), "")
