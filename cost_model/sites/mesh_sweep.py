"""A mesh over a sweep: which way to spread the attentions wins at each size, what a device then holds, and where it is full.

    course    the ways on one device along an axis, a point for each value        held ≤ room: it fits
"""

from __future__ import annotations

from collections.abc import Sequence

from ..devices.device import Device
from ..mesh.capacity import RESERVE
from ..mesh.course import MeshCourse, MeshPoint, WayPoint
from ..mesh.mesh import MeshError
from ..mesh.plan import MeshPlan
from ..mesh.scheme import Scheme
from .axes import bound_sizes
from .findings import Findings


def spread(plan: Findings, axis: str, values: Sequence[int], devices: Sequence[Device]) -> tuple[MeshCourse, ...]:
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
    )


def _point(plan: Findings, axis: str, value: int, device: Device) -> MeshPoint:
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
