"""One attention of a plan in full, for reading: cascades before and after, passes, tiles, bytes, proofs, every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...cost_model.devices.device import Device
from ...cost_model.json import Json
from ...cost_model.plan.plan import Plan
from ...cost_model.plan.table import candidates_table
from ...cost_model.sites.detail import Detail, PassCount, TensorBytes
from ...cost_model.sites.site import Candidate, Site
from ...cost_model.time.cost import TOTAL, Cost
from ...cost_model.words import bytes_text, group_name, seconds_text, table_of, table_text
from ...patterns.cascade import Cascade, show
from ...patterns.mapping import TileMapping
from ..shapes import UsageError

# Rows and columns of a mask drawn in text.
DRAWN = 32
SIGNS = {"e": "·", "p": "▒", "f": "█"}


def positions(sites: Sequence[Site], name: str) -> list[int]:
    """Where the sites of this name, place in the source, or number stand. Raises UsageError naming some that there are."""
    if name.isdigit() and int(name) < len(sites):
        return [int(name)]
    found = [i for i, s in enumerate(sites) if name in (s.name, s.where)]
    if not found:
        some = ", ".join(dict.fromkeys(s.name or s.where for s in sites[:4]))
        raise UsageError(f"no attention is named {name!r}: `reattend plan` lists them ({some}, …)")
    return found


def explanation(site: Site, plan: Plan) -> str:
    """Several paragraphs of text. Identical sites are named together."""
    alike = [s.name for s in plan.sites if s.alike == site.alike]
    title = group_name(alike) if len(alike) > 1 else site.name or site.where
    many = f" (×{len(alike)})" if len(alike) > 1 else ""
    details = site.details()
    parts = [
        [f"{title}{many}   {site.where}", f"{' '.join([site.kind, *sorted(site.traits)])}   {site.shape}"],
        ["as lifted", _indented(site.cascade), *_passes(details.passes_before if details else ())],
        _between(details),
        _chosen(site, details),
        _mask(site),
        _memory(site),
        _bytes(details),
        *([name, *(f"  {x}" for x in sentences)] for name, sentences in _sentences(site) if sentences),
        [f"candidates on {plan.device.name}, best first", _indented(candidates_table(site.candidates))],
        [*_parts(site.candidates)],
        [f"chosen: {site.chosen.name}" + (f", {site.chosen.why}" if site.chosen.why else "")],
    ]
    return "\n\n".join("\n".join(p) for p in parts if p)


def counted_text(c: Cascade, why: str, details: Detail, cost: Cost, device: Device) -> str:
    """Of a cascade that is no attention, for the reason `why`: what it counts, and how long its Einsums take one by one."""
    took = f"one Einsum after the other on {device.name}: {seconds_text(cost.seconds)}, bound by {cost.bound}"
    parts = ["as written", _indented(show(c)), *_passes(details.passes_before)]
    return "\n\n".join(["\n".join(parts), "\n".join(_bytes(details)), took, f"no attention: {why}"])


def _sentences(site: Site) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("proved", site.proofs), ("guarded at run time", site.guards), ("notes", site.notes))


def _chosen(site: Site, details: Detail | None) -> list[str]:
    """The one-pass form: of the choice where it is ours, else what our kernel would run."""
    after = details.passes_after if details is not None else ()
    if site.chosen_cascade:
        lines = [f"as chosen: {site.chosen.name}", _indented(site.chosen_cascade), *_passes(after)]
        mapping = details.mapping if details is not None else ""
        return [*lines, f"  tiled: {TileMapping.parse(mapping)}"] if mapping else lines
    what = "the model's own code" if site.chosen.is_original else "a vendor's kernel"
    lines = [f"as chosen: {site.chosen.name}, {what}"]
    return [*lines, "  our one-pass form would make:", *_passes(after)] if after else lines


def _between(details: Detail | None) -> list[str]:
    """What lives between the passes as lifted and how it may, and the forms with fewer passes."""
    if details is None or not (details.revisits or details.forms):
        return []
    table = table_of(("read by a later pass", "how", "held on chip", "moved", "computed again"))
    for r in details.revisits:
        held, moved = (bytes_text(n) if isinstance(n, int) else n for n in (r.held_bytes, r.moved_bytes))
        flops = f"{r.flops / 1e9:.3g} GFLOP" if isinstance(r.flops, int) else r.flops
        table.add_row(r.tensor, r.how, held, moved, flops if r.flops else "–")
    lines = [_indented(table_text(table))] if details.revisits else []
    for f in details.forms:
        many = "pass" if f.passes == 1 else "passes"
        lines.append(f"  {f.passes} {many}: {', then '.join(f.rewrites) or 'as lifted'}")
        lines += [f"    {c}" for c in f.conditions]
    return ["between passes, and forms with fewer", *lines]


def _passes(found: Sequence[PassCount]) -> list[str]:
    lines = []
    for p in found:
        inputs = ", ".join(f"{name} {n}×" for name, n in p.inputs.items())
        live = f"; a fiber of {p.footprint} lives between them" if p.count > 1 else ""
        many = "pass" if p.count == 1 else "passes"
        lines.append(f"  {p.count} {many} over {'·'.join(p.ranks)}" + (f" ({inputs})" if inputs else "") + live)
    return lines


def _mask(site: Site) -> list[str]:
    if site.mask is None:
        return ["mask: none, every key is kept"]
    lines = [f"mask: keep {site.mask.expr}", f"  density {site.mask.density:.3f}"]
    if site.mask.tiles is not None:
        lines.append(f"  {site.mask.tiles}")
    picture = site.mask.drawn()
    if picture is not None and picture.layers:
        lines += _drawn(picture.layers[0].rows)
    return lines


def _drawn(rows: Sequence[str]) -> list[str]:
    """The first layer, thinned out to fit a screen: · empty, ▒ partial, █ full."""
    cells = [[sign[0] for sign in row.split() for _ in range(int(sign[1:]))] for row in rows]
    down, across = (max(1, -(-n // DRAWN)) for n in (len(cells), len(cells[0])))
    picked = [[SIGNS[c] for c in row[::across]] for row in cells[::down]]
    step = f"; one cell in {down}×{across} is shown" if max(down, across) > 1 else ""
    return [*("  " + "".join(row) for row in picked), f"  · empty  ▒ partial  █ full{step}"]


def _memory(site: Site) -> list[str]:
    m = site.memory
    if m is None:
        return []
    kept = "states" if site.kind == "scan" else "keys and values"
    return [
        f"memory: {kept} {bytes_text(m.cache_bytes)}; while it runs: operator by operator "
        f"{bytes_text(m.eager_bytes)}, tiled {bytes_text(m.tiled_bytes)}"
    ]


def _bytes(details: Detail | None) -> list[str]:
    """Bytes by tensor, as lifted (every intermediate written and read) and under our mapping."""
    if details is None:
        return []
    table = table_of(("bytes of", "as lifted", "tiled", "once each"), right=("as lifted", "tiled", "once each"))
    before, after = _by_tensor(details.bytes_before), _by_tensor(details.bytes_after)
    for name in dict.fromkeys([*before, *after]):
        moved = [bytes_text(side[name].moved) if name in side else "–" for side in (before, after)]
        table.add_row(name, *moved, bytes_text(after[name].once) if name in after else "–")
    flops = ", ".join(f"{n / 1e9:.4g} GFLOP in {t}" for t, n in details.flops.items())
    work = ", ".join(f"{op} {n / 1e9:.3g} G" for op, n in sorted(details.operations.items(), key=lambda x: -x[1])[:8])
    return [table_text(table), f"  products: {flops or 'none'}", f"  element operations: {work or 'none'}"]


def _by_tensor(traffic: Sequence[TensorBytes]) -> Mapping[str, TensorBytes]:
    out: dict[str, TensorBytes] = {}
    for t in traffic:
        held = out.get(t.tensor)
        moved = t.moved + (held.moved if held else 0)
        out[t.tensor] = TensorBytes(t.tensor, moved, max(t.once, held.once if held else 0), t.written)
    return out


def _parts(candidates: Sequence[Candidate]) -> list[str]:
    """The predicted time of each candidate by resource; on a GPU they overlap."""
    able = [c for c in candidates if c.feasible and c.cost is not None and c.cost.parts]
    names = list(dict.fromkeys(k for c in able if c.cost is not None for k in c.cost.parts if k != TOTAL))
    if not able:
        return []
    table = table_of(("time by part", *names), right=names)
    for c in able:
        assert c.cost is not None
        table.add_row(c.name, *(seconds_text(c.cost.parts[n]) if c.cost.parts.get(n) else "–" for n in names))
    return [table_text(table)]


def explanation_data(site: Site) -> dict[str, Json]:
    """The same as plain data."""
    details = site.details()
    return {
        "name": site.name, "where": site.where, "kind": site.kind, "traits": sorted(site.traits),
        "sizes": dict(site.shape.sizes), "at": dict(site.shape.at), "dtype": site.shape.dtype, "cascade": site.cascade,
        "chosen_cascade": site.chosen_cascade, "mask": site.mask.expr if site.mask is not None else None,
        "density": site.mask.density if site.mask is not None else None, "proofs": list(site.proofs),
        "guards": list(site.guards), "notes": list(site.notes), "chosen": site.chosen.name,
        "detail": details.to_dict() if details is not None else None,
        "candidates": [
            {"name": c.name, "feasible": c.feasible, "exact": c.exact, "passes": c.passes, "mapping": c.mapping,
             "why": c.why, "cost": c.cost.to_dict() if c.cost is not None else None}
            for c in site.candidates
        ],
    }


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
