"""What a page shows of a plan, as plain data: one entry a group of identical attentions, names as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from ..json import Json
from ..layer.table import step_lines
from ..sites.course import Course
from ..sites.findings import Findings
from ..sites.site import Candidate, Site, grouped
from ..sites.sweep import Sweep
from ..time.cost import TOTAL
from ..words import between, bytes_text, tokens_text
from .basis import basis_rows, basis_text
from .mesh_data import TITLES, mesh_data
from .roofline import roof

# Short names of types in device files, by the names that torch has for them.
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


def plan_data(plan: Findings, sweeps: Sequence[Sweep]) -> dict[str, Json]:
    """Everything that tables and drawings of one plan need."""
    d = plan.device
    before = [s.before for s in plan.sites]
    known = all(c is not None for c in before) and plan.seconds > 0
    return {
        "model": plan.model, "note": plan.note, "seconds": plan.seconds, "sites": len(plan.sites),
        "speedup": sum(c.seconds for c in before if c is not None) / plan.seconds if known else None,
        "weight_bytes": plan.weight_bytes, "step": step_lines(plan.step, d.name) if plan.step is not None else [],
        "step_why": plan.step_why if d.is_gpu else "",
        "device": {
            "name": d.name, "title": d.title, "basis": d.basis, "band": d.band, "gpu": d.is_gpu, "dram_bytes": d.dram_bytes,
            "rests": basis_rows(d), "text": basis_text(d),
        },
        "range": between(plan.seconds, d.band), "mesh": mesh_data(plan, sweeps),
        "groups": [_group(plan, members, sweeps) for members in plan.groups],
        "memory": _memory(sweeps, d.name),
        "misses": [{**asdict(m), "what": m.what + (f" ×{n}" if n > 1 else "")} for m, n in grouped(plan.misses)],
    }


def _group(plan: Findings, members: Sequence[int], sweeps: Sequence[Sweep]) -> dict[str, Json]:
    s = plan.sites[members[0]]
    cost = s.chosen.cost
    details = s.details()
    dtype = _SHORT.get(s.shape.dtype, s.shape.dtype)
    limit = roof(plan.device, dtype)
    courses = [
        (x.axis, c) for x in sweeps for c in x.courses if c.index == members[0] and c.device == plan.device.name
    ]
    return {
        "name": plan.group_name(members), "count": len(members), "where": s.where, "kind": s.kind,
        "traits": sorted(s.traits), "shape": str(s.shape), "choice": s.choice, "why": s.chosen.why,
        "seconds": cost.seconds if cost is not None else None, "bound": cost.bound if cost is not None else "",
        "speedup": s.speedup, "mask": _mask(s), "roof": asdict(limit), "dtype": dtype,
        "range": between(cost.seconds, cost.band) if cost is not None else "",
        "memory": asdict(s.memory) if s.memory is not None else None,
        "candidates": [_candidate(c) for c in s.candidates],
        "detail": details.to_dict() if details is not None else None,
        "cascade": s.cascade, "chosen_cascade": s.chosen_cascade, "proofs": s.proofs, "guards": s.guards, "notes": s.notes,
        "sweeps": [_course(axis, c) for axis, c in courses],
    }


def _candidate(c: Candidate) -> dict[str, Json]:
    able = c.feasible and c.cost is not None
    parts = {k: v for k, v in c.cost.parts.items() if k != TOTAL and v > 0} if able and c.cost is not None else {}
    return {
        "name": c.name, "feasible": able, "why": c.why, "passes": c.passes, "mapping": c.mapping, "parts": parts,
        "range": between(c.cost.seconds, c.cost.band) if able and c.cost is not None else "",
        "cost": {k: v for k, v in c.cost.to_dict().items() if k != "parts"} if able and c.cost is not None else None,
        "exact": c.exact, "density": c.density, "error": c.error.to_dict() if c.error is not None else None,
    }


def _mask(s: Site) -> dict[str, Json]:
    m = s.mask
    if m is None:
        return {"expr": "", "density": 1.0, "text": "No mask: every key is kept.", "picture": None}
    picture = m.drawn()
    return {
        "expr": m.expr, "density": m.density, "text": mask_text(s),
        "picture": asdict(picture) if picture is not None else None,
    }


def mask_text(s: Site) -> str:
    """The mask in a sentence, for those who do not see its picture."""
    if s.mask is None:
        return "No mask: every key is kept."
    t = s.mask.tiles
    if t is None:
        return f"Keeps {s.mask.expr}. Which tiles that leaves is known at run time."
    return (
        f"Keeps {s.mask.expr}. Tiles of {t.tile_p}×{t.tile_m}: {t.visited:,} of {t.total:,} visited "
        f"({t.visited / max(t.total, 1):.1%}), {t.full:,} full and {t.partial:,} partial; {t.total - t.visited:,} empty."
    )


def _course(axis: str, c: Course) -> dict[str, Json]:
    steps: list[dict[str, Json]] = [
        {"low": x.low, "high": x.high, "before": x.before, "after": x.after,
         "text": f"{x.before} → {x.after} between {tokens_text(x.low)} and {tokens_text(x.high)}"}
        for x in c.changes
    ]
    points: list[Json] = [
        {"value": p.value, "choice": p.choice, "times": {e.candidate: e.seconds for e in p.estimates},
         "bounds": {e.candidate: e.bound for e in p.estimates}}
        for p in c.points
    ]
    names = list(dict.fromkeys(e.candidate for p in c.points for e in p.estimates))
    always = f"{c.points[0].choice} at every {axis}" if c.points else ""
    return {
        "axis": axis, "title": TITLES.get(axis, axis), "points": points, "changes": steps, "names": names,
        "text": "; ".join(str(x["text"]) for x in steps) or always,
    }


def _memory(sweeps: Sequence[Sweep], device: str) -> dict[str, Json] | None:
    """Over the first sweep of a context length: the caches of all attentions, and the largest attention while it runs."""
    found = next((x for x in sweeps if x.axis != "batch"), None)
    courses = [c for c in found.courses if c.device == device] if found is not None else []
    if found is None or not courses:
        return None
    rows = []
    for i, value in enumerate(found.values):
        memories = [(c.count, m) for c in courses if (m := c.points[i].memory) is not None]
        if memories:
            rows.append({
                "value": value, "cache": sum(n * m.cache_bytes for n, m in memories),
                "eager": max(m.eager_bytes for _, m in memories), "tiled": max(m.tiled_bytes for _, m in memories),
            })
    if not rows:
        return None
    return {"axis": found.axis, "title": TITLES.get(found.axis, found.axis), "rows": rows, "text": _memory_text(rows)}


def _memory_text(rows: Sequence[Mapping[str, int]]) -> str:
    first, last = rows[0], rows[-1]
    return (
        f"From {tokens_text(first['value'])} to {tokens_text(last['value'])} tokens, keys and values of all attentions grow "
        f"from {bytes_text(first['cache'])} to {bytes_text(last['cache'])}; one attention operator by operator from "
        f"{bytes_text(first['eager'])} to {bytes_text(last['eager'])}, tiled from {bytes_text(first['tiled'])} to "
        f"{bytes_text(last['tiled'])}."
    )
