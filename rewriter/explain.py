"""One attention of a plan in full, for reading: cascades as lifted and as chosen, mask, proofs, guards, every candidate."""

from __future__ import annotations

from typing import Any

from ..cost_model.plan import ORIGINAL, Plan, Site
from ..cost_model.table import candidates_table, group_name


def explanation(site: Site, plan: Plan) -> str:
    """Several paragraphs of text. Identical sites are named together."""
    alike = [s.name for s in plan.sites if s.alike == site.alike]
    title = group_name(alike) if len(alike) > 1 else site.name or site.where
    many = f" (×{len(alike)})" if len(alike) > 1 else ""
    lines = [
        f"{title}{many}   {site.where}",
        f"{' '.join([site.kind, *sorted(site.traits)])}   {site.shape}",
        "",
        "as lifted",
        _indented(site.cascade),
    ]
    if site.chosen_cascade:
        lines += ["", f"as chosen: {site.chosen.name}", _indented(site.chosen_cascade)]
    else:
        what = "the model's own code" if site.chosen.name == ORIGINAL else "a vendor's kernel"
        lines += ["", f"as chosen: {site.chosen.name}, {what}"]
    if site.mask is not None:
        tiles = f"\n  {site.mask.tiles}" if site.mask.tiles is not None else ""
        lines += ["", f"mask: keep {site.mask.expr}\n  density {site.mask.density:.3f}{tiles}"]
    for name, sentences in (("proved", site.proofs), ("guarded at run time", site.guards), ("notes", site.notes)):
        if sentences:
            lines += ["", name, *(f"  {x}" for x in sentences)]
    lines += ["", f"candidates on {plan.device.name}, best first", _indented(candidates_table(site.candidates))]
    lines += ["", f"chosen: {site.chosen.name}" + (f", {site.chosen.why}" if site.chosen.why else "")]
    return "\n".join(lines)


def explanation_data(site: Site) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "name": site.name, "where": site.where, "kind": site.kind, "traits": sorted(site.traits),
        "sizes": dict(site.shape.sizes), "dtype": site.shape.dtype, "cascade": site.cascade,
        "chosen_cascade": site.chosen_cascade, "mask": site.mask.expr if site.mask is not None else None,
        "density": site.mask.density if site.mask is not None else None, "proofs": list(site.proofs),
        "guards": list(site.guards), "notes": list(site.notes), "chosen": site.chosen.name,
        "candidates": [
            {"name": c.name, "feasible": c.feasible, "exact": c.exact, "passes": c.passes, "mapping": c.mapping,
             "why": c.why, "cost": c.cost.to_dict() if c.cost is not None else None}
            for c in site.candidates
        ],
    }  # fmt: skip


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
