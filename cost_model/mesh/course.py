"""The ways over a mesh of one device along an axis, as plain data: which wins where, and what a device then holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..json import Read


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
    def from_dict(d: Read) -> MeshCourse:
        """Read what `asdict` wrote. Raises KeyError or TypeError on other data."""
        points = (MeshPoint(**{**p, "ways": tuple(WayPoint(**w) for w in p["ways"])}) for p in d["points"])
        return MeshCourse(**{**d, "points": tuple(points)})
