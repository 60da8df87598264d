"""Tables of a plan: one row a group of identical attentions, then what was left alone. Printed through rich."""

from __future__ import annotations

from collections.abc import Sequence

from ..layer.table import step_lines
from ..sites.findings import Findings
from ..sites.site import Candidate, Miss, Site, grouped
from ..words import bytes_text, group_name, seconds_text, short_path, table_of, table_text


def plan_table(plan: Findings, width: int | None = None) -> str:
    """The plan as text: what, where, chosen, predicted time and speed-up, bound, why; then the misses."""
    lines = [_heading(plan)]
    if plan.sites:
        lines.append(_sites(plan, width))
    if plan.misses:
        lines += ["", f"left alone ({len(plan.misses)})", _misses(plan.misses, width)]
    if not plan.sites and not plan.misses:
        lines += ["", "no two products with a row rule between them were met: the model runs as written"]
    lines += _notes([plan])
    lines += _step(plan)
    if plan.note:
        lines += ["", plan.note]
    return "\n".join(lines)


def _step(plan: Findings) -> list[str]:
    if plan.step is not None:
        return ["", *step_lines(plan.step, plan.device.name)]
    return ["", f"no step of the whole model: {plan.step_why}"] if plan.step_why and plan.device.is_gpu else []


def _notes(plans: Sequence[Findings]) -> list[str]:
    """What was assumed or is worth knowing, once each."""
    found = list(dict.fromkeys(n for p in plans for s in p.sites for n in s.notes))
    return ["", *found] if found else []


def _heading(plan: Findings) -> str:
    n = len(plan.sites)
    what = f"{n} attention{'' if n == 1 else 's'}" if n else "no attention"
    model = f"{plan.model}: " if plan.model else ""
    total = f", {seconds_text(plan.seconds)} in all" if n else ""
    d = plan.device
    return f"{model}{what} on {d.name} ({d.title}; {d.basis} times, ±{plan.band:.0%}){total}{_too_large(plan)}"


def _too_large(plan: Findings) -> str:
    """Whether weights and caches fit the device, where they do not."""
    decoding = [s.memory.cache_bytes for s in plan.sites if s.memory is not None and "decode" in s.traits]
    needed = plan.weight_bytes + sum(decoding)
    if not 0 < plan.device.dram_bytes < needed:
        return ""
    parts = [f"weights {bytes_text(plan.weight_bytes)}", *([f"cache {bytes_text(sum(decoding))}"] if decoding else [])]
    return f"; DOES NOT FIT: {' and '.join(parts)}, {plan.device.name} has {bytes_text(plan.device.dram_bytes)}: give --mesh"


def _sites(plan: Findings, width: int | None) -> str:
    groups: dict[tuple[object, ...], list[Site]] = {}
    for s in plan.sites:
        groups.setdefault(s.alike, []).append(s)
    titles = ("what", "is", "where", "shape", "chosen", "time", "speed-up", "bound", "why")
    table = table_of(titles, right=("time", "speed-up"))
    for members in groups.values():
        table.add_row(*_row(members))
    return table_text(table, width)


def _row(members: Sequence[Site]) -> tuple[str, ...]:
    s = members[0]
    many = f" ×{len(members)}" if len(members) > 1 else ""
    name = group_name([m.name for m in members]) or "(no name)"
    cost = s.chosen.cost
    speed = f"{s.speedup:.2f}×" if s.speedup is not None else ""
    return (
        name + many, " ".join([s.kind, *sorted(s.traits)]), short_path(s.where), str(s.shape), s.chosen.name,
        seconds_text(cost.seconds) if cost else "", "" if s.chosen.is_original else speed,
        cost.bound if cost else "", s.chosen.why,
    )


def plans_table(plans: Sequence[Findings], width: int | None = None) -> str:
    """The same model planned for several devices, side by side: choice, predicted time and its speed-up on each."""
    first = plans[0]
    n = len(first.sites)
    what = f"{n} attention{'' if n == 1 else 's'} on {', '.join(p.device.name for p in plans)}"
    table = table_of(("what", "shape", *(p.device.name for p in plans)))
    for members in common_groups(plans):
        name = first.group_name(members) + (f" ×{len(members)}" if len(members) > 1 else "")
        table.add_row(name, str(first.sites[members[0]].shape), *(_choice(p.sites[members[0]]) for p in plans))
    table.add_row("all", "", *(seconds_text(p.seconds) for p in plans))
    lines = [f"{first.model}: {what}" if first.model else what, table_text(table, width)]
    if first.misses:
        lines += ["", f"left alone ({len(first.misses)})", _misses(first.misses, width)]
    lines += _notes(plans)
    for p in plans:
        lines += _step(p)
    return "\n".join([*lines, "", first.note] if first.note else lines)


def common_groups(plans: Sequence[Findings]) -> list[tuple[int, ...]]:
    """Positions of sites that are alike on every device."""
    found: dict[tuple[object, ...], list[int]] = {}
    for i in range(len(plans[0].sites)):
        found.setdefault(tuple(p.sites[i].alike for p in plans), []).append(i)
    return [tuple(members) for members in found.values()]


def _choice(s: Site) -> str:
    cost = s.chosen.cost
    speed = f", {s.speedup:.2f}×" if s.speedup is not None and not s.chosen.is_original else ""
    return f"{s.choice} {seconds_text(cost.seconds)}{speed} ({cost.bound})" if cost is not None else s.choice


def _misses(misses: Sequence[Miss], width: int | None) -> str:
    table = table_of(("where", "what", "reason", "hint"))
    for m, many in grouped(misses):
        table.add_row(short_path(m.where) + (f" ×{many}" if many > 1 else ""), m.what, m.reason, m.hint)
    return table_text(table, width)


def _told(c: Candidate) -> str:
    if c.exact:
        return c.why
    seen = f"{c.density:.1%} of the tiles; " if c.density is not None else ""
    return f"{seen}error {c.error if c.error is not None else 'not measured'}; {c.why}"


def candidates_table(candidates: Sequence[Candidate], width: int | None = None) -> str:
    """Every candidate of a site with its predicted cost, or why it cannot run; what is known of errors, where not exact."""
    table = table_of(
        ("candidate", "time", "bound", "TFLOP", "GB", "G exp", "passes", "why"),
        right=("time", "TFLOP", "GB", "G exp", "passes"),
    )
    for c in candidates:
        if c.cost is None or not c.feasible:
            table.add_row(c.name, "–", "", "", "", "", "", c.why)
            continue
        table.add_row(
            c.name, seconds_text(c.cost.seconds), c.cost.bound, f"{c.cost.flops / 1e12:.3g}", f"{c.cost.bytes / 1e9:.3g}",
            f"{c.cost.exps / 1e9:.3g}", str(c.passes) if c.passes is not None else "", _told(c),
        )
    return table_text(table, width)
