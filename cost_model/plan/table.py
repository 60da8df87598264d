"""Tables of a plan: one row a group of identical attentions, then what was left alone. Printed through rich."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from .plan import Candidate, Miss, Plan, Site

WIDTH = 160
_NUMBER = re.compile(r"\d+")


def plan_table(plan: Plan, width: int = WIDTH) -> str:
    """The plan as text: what, where, chosen, predicted time and speed-up, bound, why; then the misses."""
    lines = [_heading(plan)]
    if plan.sites:
        lines.append(_sites(plan, width))
    if plan.misses:
        lines += ["", f"left alone ({len(plan.misses)})", _misses(plan.misses, width)]
    if not plan.sites and not plan.misses:
        lines += ["", "no two products with a row rule between them were met: the model runs as written"]
    lines += _notes([plan])
    if plan.note:
        lines += ["", plan.note]
    return "\n".join(lines)


def _notes(plans: Sequence[Plan]) -> list[str]:
    """What was assumed or is worth knowing, once each."""
    found = list(dict.fromkeys(n for p in plans for s in p.sites for n in s.notes))
    return ["", *found] if found else []


def _heading(plan: Plan) -> str:
    n = len(plan.sites)
    what = f"{n} attention{'' if n == 1 else 's'}" if n else "no attention"
    model = f"{plan.model}: " if plan.model else ""
    total = f", {seconds_text(plan.seconds)} in all" if n else ""
    d = plan.device
    return f"{model}{what} on {d.name} ({d.title}; {d.basis} times, ±{d.band:.0%}){total}"


def _sites(plan: Plan, width: int) -> str:
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
    )  # fmt: skip


def plans_table(plans: Sequence[Plan], width: int = WIDTH) -> str:
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
    return "\n".join([*lines, "", first.note] if first.note else lines)


def common_groups(plans: Sequence[Plan]) -> list[tuple[int, ...]]:
    """Positions of sites that are alike on every device."""
    found: dict[tuple[object, ...], list[int]] = {}
    for i in range(len(plans[0].sites)):
        found.setdefault(tuple(p.sites[i].alike for p in plans), []).append(i)
    return [tuple(members) for members in found.values()]


def _choice(s: Site) -> str:
    cost = s.chosen.cost
    speed = f", {s.speedup:.2f}×" if s.speedup is not None and not s.chosen.is_original else ""
    return f"{s.choice} {seconds_text(cost.seconds)}{speed} ({cost.bound})" if cost is not None else s.choice


def _misses(misses: Sequence[Miss], width: int) -> str:
    table = table_of(("where", "what", "reason", "hint"))
    for m in dict.fromkeys(misses):
        many = f" ×{misses.count(m)}" if misses.count(m) > 1 else ""
        table.add_row(short_path(m.where) + many, m.what, m.reason, m.hint)
    return table_text(table, width)


def candidates_table(candidates: Sequence[Candidate], width: int = WIDTH) -> str:
    """Every candidate of a site with its predicted cost, or why it cannot run."""
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
            f"{c.cost.exps / 1e9:.3g}", str(c.passes) if c.passes is not None else "", c.why,
        )  # fmt: skip
    return table_text(table, width)


# What is copied from a table stays on one line.
_WHOLE = ("what", "where", "chosen", "candidate", "time")


def table_of(titles: Sequence[str], right: Sequence[str] = ()) -> Table:
    """A table without lines; the columns `right` are flush right."""
    table = Table(box=None, pad_edge=False)
    for t in titles:
        table.add_column(t, justify="right" if t in right else "left", overflow="fold", no_wrap=t in _WHOLE)
    return table


def table_text(table: Table, width: int = WIDTH) -> str:
    """The table as text, without blanks at the ends of lines."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def seconds_text(seconds: float) -> str:
    """1.23 s, 45.6 ms, 7.89 µs: three digits that count."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 1000 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def between(seconds: float, band: float) -> str:
    """The band of a time: `6.53 to 11.9 µs`; the unit stands once where both ends share it."""
    low, high = seconds_text(seconds / (1 + band)), seconds_text(seconds * (1 + band))
    number, _, unit = low.partition(" ")
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def tokens_text(n: int) -> str:
    """4096 as 4k, 1048576 as 1M; other numbers as they are."""
    for unit, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if n >= scale and n % scale == 0:
            return f"{n // scale}{unit}"
    return str(n)


def bytes_text(n: float) -> str:
    """1.23 GB, 45.6 MB: three digits that count, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}" if n / scale < 1000 else f"{n / scale:.0f} {unit}"
    return f"{n:.0f} B"


def short_path(where: str) -> str:
    """The last two parts of a path are enough to recognise it."""
    return "/".join(where.split("/")[-2:])


def group_name(names: Sequence[str]) -> str:
    """`model.layers.[0-31].self_attn` for names that differ by one number; else the first name."""
    first = names[0]
    if len(set(names)) == 1:
        return first
    numbers = [_NUMBER.findall(n) for n in names]
    if len({_NUMBER.sub("#", n) for n in names}) > 1:
        return first
    varying = [i for i in range(len(numbers[0])) if len({row[i] for row in numbers}) > 1]
    if len(varying) != 1:
        return first
    (at,) = varying
    spread = _spread(sorted({int(row[at]) for row in numbers}))
    parts = iter(range(len(numbers[0])))
    return _NUMBER.sub(lambda m: f"[{spread}]" if next(parts) == at else m.group(), first)


def _spread(values: Sequence[int]) -> str:
    """0-31; 0-30:2 for every second; else the numbers, the first few."""
    steps = {b - a for a, b in pairwise(values)}
    if len(steps) == 1:
        (step,) = steps
        return f"{values[0]}-{values[-1]}" + (f":{step}" if step > 1 else "")
    return ",".join(map(str, values[:6])) + (",…" if len(values) > 6 else "")
