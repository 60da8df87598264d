"""All courses of a plan along one axis as plain data, and their table: which candidate wins where, and where it changes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from ..json import Json, Read
from ..mesh.course import MeshCourse
from ..words import bytes_text, seconds_text, table_of, table_text, tokens_text
from .course import Course, Point, course


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
        )

    def __str__(self) -> str:
        return sweep_table(self)

    def to_dict(self) -> dict[str, Json]:
        """Nested plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(d: Read) -> Sweep:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        courses = tuple(map(course, d["courses"]))
        meshes = tuple(map(MeshCourse.from_dict, d.get("meshes", ())))
        return Sweep(d["axis"], tuple(d["values"]), courses, d["skipped"], d["seconds"], meshes)


def sweeps_csv(sweeps: Sequence[Sweep]) -> str:
    """A line a value, attention, device and candidate: its predicted seconds, and 1 where it is the choice."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("axis", "value", "attention", "layers", "device", "candidate", "seconds", "chosen"))
    for s in sweeps:
        for c in s.courses:
            for p in c.points:
                own = (s.axis, p.value, c.site, c.count, c.device)
                lines.writerows((*own, e.candidate, e.seconds, int(e.candidate == p.choice)) for e in p.estimates)
    return out.getvalue()


def sweep_table(sweep: Sweep, width: int | None = None) -> str:
    """A row a value: the winner on every device with its time and its lead; an arrow where the choice changes."""
    lines: list[str] = []
    for name in dict.fromkeys(c.site for c in sweep.courses):
        courses = [c for c in sweep.courses if c.site == name]
        many = f" ×{courses[0].count}" if courses[0].count > 1 else ""
        table = table_of((sweep.axis, *(c.device for c in courses)), right=(sweep.axis,))
        for i, value in enumerate(sweep.values):
            table.add_row(tokens_text(value), *(_cell(c, i) for c in courses))
        lines += [f"{name}{many}", table_text(table, width), *_changes(sweep.axis, courses), ""]
    lines += [line for name in dict.fromkeys(m.mesh for m in sweep.meshes) for line in _spread(sweep, name, width)]
    devices = len({c.device for c in sweep.courses})
    where = f" on {devices} devices" if devices > 1 else ""
    last = f"{len(sweep.values)} sizes{where} costed in {sweep.seconds:.2f} s from one capture"
    return "\n".join([*lines, sweep.skipped, last] if sweep.skipped else [*lines, last])


def _spread(sweep: Sweep, name: str, width: int | None) -> list[str]:
    """A row a value: on every device the fastest way that fits, its step and what a device holds."""
    courses = [m for m in sweep.meshes if m.mesh == name]
    table = table_of((sweep.axis, *(m.device for m in courses)), right=(sweep.axis,))
    for i, value in enumerate(sweep.values):
        table.add_row(tokens_text(value), *(_way(m, i) for m in courses))
    return [f"all attentions, spread over {name}", table_text(table, width), ""]


def _way(m: MeshCourse, i: int) -> str:
    p = m.points[i]
    best = p.way(p.best)
    if best is None:
        return p.why
    mark = "→ " if i and m.points[i - 1].best != p.best else ""
    return f"{mark}{p.best} {seconds_text(best.seconds)}, holds {bytes_text(best.held_bytes)}"


def _cell(c: Course, i: int) -> str:
    p = c.points[i]
    mark = "→ " if i and c.points[i - 1].choice != p.choice else ""
    return mark + p.choice + (f" {seconds_text(p.seconds)}{_lead(p)}" if p.seconds is not None else "")


def _lead(p: Point) -> str:
    """How many times longer the next best takes."""
    others = [e.seconds for e in p.estimates if e.candidate != p.choice]
    return f" (by {min(others) / p.seconds:.2f}×)" if others and p.seconds else ""


def _changes(axis: str, courses: Sequence[Course]) -> list[str]:
    out = []
    for c in courses:
        steps = [f"{x.before} → {x.after} between {tokens_text(x.low)} and {tokens_text(x.high)}" for x in c.changes]
        out.append(f"{c.device}: " + ("; ".join(steps) if steps else f"{c.points[0].choice} at every {axis}"))
    return out
