"""A mesh of devices: named axes with sizes, and the links between the devices of each axis.

    tp=8,cp=2     sixteen devices; the first axis is innermost: the 8 of `tp` are neighbours, `cp` joins two such groups
    tp, cp, dp    heads and latents, the sequence, the batch: which ranks of a cascade an axis may carry

Devices fill nodes in order. An axis lies inside a node, across nodes, or both: `Route` says how many devices it has on
the fast link and how many nodes on the network.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..devices.device import Device, targets

AXES = ("tp", "cp", "dp")
MEANING = "tp (heads and latents), cp (the sequence), dp (the batch)"
_PART = re.compile(r"([A-Za-z_]\w*)\s*=\s*(\d+)")


class MeshError(ValueError):
    """A mesh that cannot be: the message is one sentence that says what to change."""


@dataclass(frozen=True)
class Link:
    """One direction of a link: bytes a second, and seconds for each message."""

    bytes_per_s: float
    latency_seconds: float = 0.0

    def seconds(self, n: float) -> float:
        return self.latency_seconds + n / self.bytes_per_s


@dataclass(frozen=True)
class Route:
    """The devices of one axis: `inner` on a node's fast link, in each of `outer` nodes joined by the network."""

    inner: int
    outer: int
    fast: Link
    slow: Link

    @property
    def parts(self) -> int:
        return self.inner * self.outer

    @property
    def slowest(self) -> Link:
        """The link that a ring around all devices must cross."""
        return self.fast if self.outer == 1 else self.slow


@dataclass(frozen=True)
class Axis:
    name: str
    size: int


@dataclass(frozen=True)
class Mesh:
    """Axes, innermost first."""

    axes: tuple[Axis, ...]

    @property
    def devices(self) -> int:
        return math.prod(a.size for a in self.axes)

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 for one that the mesh lacks."""
        return next((a.size for a in self.axes if a.name == axis), 1)

    def route(self, axis: str, device: Device) -> Route:
        """How the devices of an axis are joined. Raises MeshError for a device without links."""
        linked(device)
        fast = Link(device.link_bytes_per_s, device.link_latency_seconds)
        slow = Link(device.network_bytes_per_s or device.link_bytes_per_s, device.network_latency_seconds)
        stride = 1
        for a in self.axes:
            if a.name == axis:
                break
            stride *= a.size
        size, node = self.size(axis), device.link_devices or self.devices
        inner = max(math.gcd(size, max(1, node // stride)), 1) if stride < node else 1
        return Route(inner, size // inner, fast, slow)

    def split(self, axis: str, inner: str, size: int) -> Mesh:
        """The mesh with an axis cut in two: `inner` of this size, and the rest under the old name.

        Raises MeshError where the size does not divide the axis.
        """
        if self.size(axis) % size:
            raise MeshError(f"{axis}={self.size(axis)} has no part of {size} devices: take a divisor")
        halves = {axis: (Axis(inner, size), Axis(axis, self.size(axis) // size))}
        return Mesh(tuple(x for a in self.axes for x in halves.get(a.name, (a,))))

    def __str__(self) -> str:
        return ",".join(f"{a.name}={a.size}" for a in self.axes)


def linked(device: Device) -> Device:
    """The device itself. Raises MeshError where it has no link to others, naming those that have."""
    if not device.link_bytes_per_s:
        others = ", ".join(d.name for d in targets() if d.link_bytes_per_s)
        raise MeshError(
            f"{device.name} has no link to other devices: drop the mesh, or plan for a target with one ({others})"
        )
    return device


def parse(text: str) -> Mesh:
    """A mesh from `tp=8` or `tp=8,cp=2`. Raises MeshError with one sentence."""
    found: list[Axis] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise MeshError(f"mesh {text!r} is malformed at {part.strip()!r}: write axis=size, as tp=8 or tp=8,cp=2")
        found.append(Axis(match[1], int(match[2])))
    return checked(Mesh(tuple(found)))


def checked(mesh: Mesh) -> Mesh:
    """The mesh itself. Raises MeshError on an unknown or repeated axis, or a size below 1."""
    names = [a.name for a in mesh.axes]
    for a in mesh.axes:
        if a.name not in AXES:
            raise MeshError(f"mesh axis {a.name!r} is not known: use {MEANING}")
        if names.count(a.name) > 1:
            raise MeshError(f"mesh axis {a.name} stands twice: give it one size")
        if a.size < 1:
            raise MeshError(f"mesh axis {a.name}={a.size} has no device: sizes start at 1")
    return mesh


def mesh(wish: object) -> Mesh:
    """A mesh from its text or itself. Raises MeshError on anything else."""
    if isinstance(wish, Mesh):
        return checked(wish)
    if isinstance(wish, str):
        return parse(wish)
    raise MeshError(f"a mesh is a text such as 'tp=8' or 'tp=8,cp=2', not {type(wish).__name__}")
