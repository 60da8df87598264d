"""What a page shows of a mesh, as plain data: a device's part under every way, its memory over context, its messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..json import Json
from ..mesh.capacity import RESERVE
from ..mesh.course import MeshCourse
from ..mesh.plan import MeshPlan
from ..mesh.scheme import Scheme
from ..sites.findings import Findings
from ..sites.sweep import Sweep
from ..words import between, bytes_text, seconds_text, tokens_text

# What an axis of a sweep counts, and what one of a mesh carries.
TITLES = {"seq": "query tokens (seq)", "past": "tokens in the cache (past)", "batch": "sequences in the batch"}
CARRIES = {"tp": "heads and latents", "cp": "the sequence", "dp": "the batch"}


def mesh_data(plan: Findings, sweeps: Sequence[Sweep]) -> dict[str, Json] | None:
    """The sharding of a plan; None for one without a mesh."""
    made = plan.sharding
    if made is None:
        return None
    d = plan.device
    room = (1 - RESERVE) * d.dram_bytes
    courses = [(x.axis, m) for x in sweeps for m in x.meshes if m.device == d.name]
    return {
        "mesh": made.mesh, "devices": made.devices, "step": made.step, "note": made.note, "room": room,
        "best": made.best.name if made.best is not None else "", "text": _text(made, room, d.band),
        "axes": [(a, CARRIES.get(a.partition("=")[0], "")) for a in made.mesh.split(",")],
        "lengths": _lengths(made),
        "ways": [_way(s, d.band) for s in made.schemes],
        "courses": [_course(axis, m) for axis, m in courses],
    }


def _text(made: MeshPlan, room: float, band: float) -> str:
    """The choice in a sentence."""
    s = made.best
    if s is None:
        return "No way fits: " + next((x.why for x in made.schemes), "there is none")
    return (
        f"{s.name}: a step of all attentions takes {seconds_text(s.seconds)} ({between(s.seconds, band)}), {s.why}. "
        f"A device holds {bytes_text(s.held_bytes)} of the {bytes_text(room)} that it has for it, and sends "
        f"{bytes_text(s.sent_bytes)} a step."
    )


def _lengths(made: MeshPlan) -> list[int]:
    """The lengths at which batches are known, without one that is all but equal to a power of two among them."""
    found = sorted({n for s in made.schemes for n in s.batches})
    return [n for n in found if n & (n - 1) == 0 or not any(0.95 < n / m < 1.05 for m in found if m != n)]


def _way(s: Scheme, band: float) -> dict[str, Json]:
    known = bool(s.parts)
    return {
        "name": s.name, "assignment": s.assignment, "exact": s.exact, "fits": s.feasible, "known": known, "why": s.why,
        "weights": s.weight_bytes, "cache": s.cache_bytes, "activations": s.activation_bytes, "held": s.held_bytes,
        "flops": s.flops, "traffic": s.traffic_bytes, "sent": s.sent_bytes, "bound": s.bound,
        "seconds": s.seconds if known else None, "range": between(s.seconds, band) if known else "",
        "parts": dict(s.parts), "even": s.even, "copies": s.copies, "batches": {str(n): b for n, b in s.batches.items()},
        "exchanges": [asdict(x) for x in s.exchanges],
    }


def _course(axis: str, m: MeshCourse) -> dict[str, Json]:
    """Lines over the axis: ways that hold the same at every value share one."""
    held: dict[tuple[int, ...], list[str]] = {}
    for name in m.names:
        found = [p.way(name) for p in m.points]
        held.setdefault(tuple(w.held_bytes if w is not None else 0 for w in found), []).append(name)
    return {
        "axis": axis, "title": TITLES.get(axis, axis), "values": [p.value for p in m.points],
        "room": m.room_bytes, "best": [p.best for p in m.points],
        "names": list(m.names), "why": [p.why for p in m.points],
        "seconds": {n: [w.seconds if (w := p.way(n)) is not None else None for p in m.points] for n in m.names},
        "fits": {n: [w.fits if (w := p.way(n)) is not None else False for p in m.points] for n in m.names},
        "held": [{"names": names, "values": list(values)} for values, names in held.items()],
        "text": _turns(m), "changes": [{"low": a, "high": b, "before": x, "after": y} for a, b, x, y in m.changes],
    }


def _turns(m: MeshCourse) -> str:
    if not m.changes:
        return f"{m.points[0].best or 'no way fits'} at every size"
    return "; ".join(
        f"{before or 'nothing fits'} → {after or 'nothing fits'} between {tokens_text(low)} and {tokens_text(high)}"
        for low, high, before, after in m.changes
    )
