"""Tables of sweeps and of differences between plans."""

from __future__ import annotations

from collections.abc import Sequence

from .diff import CHANGED, GONE, NEW, Diff
from .mesh_sweep import MeshCourse
from .sweep import Course, Point, Sweep
from .table import WIDTH, bytes_text, group_name, seconds_text, table_of, table_text, tokens_text


def sweep_table(sweep: Sweep, width: int = WIDTH) -> str:
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


def _spread(sweep: Sweep, name: str, width: int) -> list[str]:
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


def diff_table(d: Diff, width: int = WIDTH) -> str:
    """Changed, new and gone sites first; those whose choice and time stayed are counted."""
    lines = [f"{d.before} → {d.after}: {seconds_text(d.before_seconds)} → {seconds_text(d.after_seconds)} in all"]
    same = [r for r in d.rows if r.status not in (CHANGED, NEW, GONE) and r.ratio in (None, 1.0)]
    shown = [r for r in d.rows if r not in same]
    table = table_of(("what", "status", "choice", "time", "ratio", "note"), right=("ratio",))
    for r in shown:
        name = (group_name(list(r.names)) or "(no name)") + (f" ×{len(r.names)}" if len(r.names) > 1 else "")
        choice = r.before if r.before == r.after else f"{r.before or '–'} → {r.after or '–'}"
        before, after = (seconds_text(x) if x is not None else "–" for x in (r.before_seconds, r.after_seconds))
        ratio = f"{r.ratio:.2f}×" if r.ratio is not None else ""
        note = f"slower by more than {d.tolerance:.0%}" if r.slower(d.tolerance) else ""
        table.add_row(name, r.status, choice, f"{before} → {after}", ratio, note)
    if shown:
        lines.append(table_text(table, width))
    n = sum(len(r.names) for r in same)
    if n:
        lines.append(f"{n} {'site is' if n == 1 else 'sites are'} as before")
    return "\n".join(lines)
