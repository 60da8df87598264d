"""Every attention of one captured graph on one device: what tables, pages and sweeps read of a plan.

They know this, not the plan, so that a plan may print itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from ..devices.device import Device
from ..layer.step import ModelStep, Types
from ..mesh.mesh import Mesh
from ..mesh.plan import MeshPlan
from ..words import group_name
from .course import Symbol
from .site import Miss, Site
from .sweep import Sweep

# A device, the values of open sizes, and the positions of the sites wanted: those sites costed there.
Retake: TypeAlias = Callable[[Device, Mapping[str, int], Sequence[int]], tuple[Site, ...]]
# The ways to spread a plan's attentions over its mesh, at sizes of its symbols, on a device.
Reshard: TypeAlias = Callable[[Device, Mapping[str, int]], MeshPlan | None]


class PointSteps(Protocol):
    """Steps of the whole model at sizes of its symbols, many points at once."""

    def on(
        self, d: Device, sites: Sequence[Sequence[Site]], /
    ) -> Callable[[MeshPlan | Mesh | None, Types], tuple[ModelStep | str, ...]]:
        """With these sites at each point, on a device: over a mesh, if there is one, a step a point or why there is none."""


# Steps at the values of open sizes at each point.
Restep: TypeAlias = Callable[[Sequence[Mapping[str, int]]], PointSteps]


@dataclass(frozen=True)
class Findings:
    """What was found, what was left alone, and on which device. `note` says what the times rest on.

    A graph with open sizes has them in `symbols`, and in `axes` which of them move together as `seq`, `past` or `batch`;
    `retake` costs its sites again at other sizes, until they are written to a file. `sweeps` are kept for reports.
    `weight_bytes` are those of the model's parameters. `sharding` has the ways to spread them over a mesh of such devices,
    where one was asked for, and `reshard` makes them at other sizes. `step` is the whole model's: what it takes and holds,
    the work outside of attention coarsely; `step_why` says why there is none. `restep` makes it at other sizes and types.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    device: Device
    model: str = ""
    note: str = ""
    weight_bytes: int = 0
    symbols: tuple[Symbol, ...] = ()
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    sweeps: tuple[Sweep, ...] = ()
    sharding: MeshPlan | None = None
    retake: Retake | None = field(default=None, compare=False, repr=False)
    reshard: Reshard | None = field(default=None, compare=False, repr=False)
    step: ModelStep | None = None
    step_why: str = ""
    restep: Restep | None = field(default=None, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Predicted seconds of all chosen candidates together."""
        return sum(s.chosen.cost.seconds for s in self.sites if s.chosen.cost is not None)

    @property
    def band(self) -> float:
        """How far their sum may be off: the bands of these times, each as much as its time counts."""
        costs = [s.chosen.cost for s in self.sites if s.chosen.cost is not None]
        whole = sum(c.seconds for c in costs)
        return sum((c.band or self.device.band) * c.seconds for c in costs) / whole if whole else self.device.band

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of sites that differ by their name only, in order of appearance."""
        found: dict[tuple[object, ...], list[int]] = {}
        for i, s in enumerate(self.sites):
            found.setdefault(s.alike, []).append(i)
        return tuple(map(tuple, found.values()))

    def group_name(self, members: Sequence[int]) -> str:
        """One name for a group of sites."""
        first = self.sites[members[0]]
        return group_name([self.sites[i].name for i in members]) or first.where
