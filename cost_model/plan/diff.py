"""Two plans side by side, by site: changed choices, ratios of predicted time, sites that came and went."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..sites.findings import Findings
from ..sites.site import Site
from ..words import group_name, seconds_text, table_of, table_text

SAME, CHANGED, NEW, GONE = "same", "changed", "new", "gone"


@dataclass(frozen=True)
class Row:
    """Sites that differ by their name only, in both plans. Seconds are of the choice; None where there is no prediction.

    `status`: same or changed (the choice), new or gone (the site).
    """

    names: tuple[str, ...]
    status: str
    before: str = ""
    after: str = ""
    before_seconds: float | None = None
    after_seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """Time after over time before."""
        if self.before_seconds is None or self.after_seconds is None:
            return None
        return self.after_seconds / self.before_seconds if self.before_seconds else math.inf

    def slower(self, tolerance: float) -> bool:
        """Whether the choice takes longer than before by more than this share."""
        return self.ratio is not None and self.ratio > 1 + tolerance


@dataclass(frozen=True)
class Diff:
    """What changed from plan `before` to plan `after`; both are named as a reader would name them."""

    before: str
    after: str
    rows: tuple[Row, ...]
    before_seconds: float
    after_seconds: float
    tolerance: float = 0.05

    @property
    def regressions(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.slower(self.tolerance))

    def __str__(self) -> str:
        return diff_table(self)

    def to_json(self) -> str:
        rows = [asdict(r) | {"ratio": r.ratio, "slower": r.slower(self.tolerance)} for r in self.rows]
        body = {"before": self.before, "after": self.after, "before_seconds": self.before_seconds,
                "after_seconds": self.after_seconds, "tolerance": self.tolerance, "rows": rows}
        return json.dumps(body, indent=1, ensure_ascii=False)


def diff(before: Findings, after: Findings, tolerance: float = 0.05, names: Sequence[str] = ()) -> Diff:
    """Compare two plans site by site: by name, then by place in the source, in the order in which they come.

    Raises ValueError for a negative tolerance.
    """
    if tolerance < 0:
        raise ValueError(f"the tolerance is a share of at least 0, not {tolerance}")
    olds, news = _keyed(before), _keyed(after)
    grouped: dict[tuple[object, ...], list[str]] = {}
    rows: dict[tuple[object, ...], Row] = {}
    for key in dict.fromkeys([*olds, *news]):
        row = _row(olds.get(key), news.get(key))
        grouped.setdefault(_alike(row), []).extend(row.names)
        rows[_alike(row)] = row
    merged = tuple(Row(tuple(grouped[k]), *_alike(r)) for k, r in rows.items())  # type: ignore[arg-type]
    titles = tuple(names) or (_title(before), _title(after))
    return Diff(titles[0], titles[1], merged, before.seconds, after.seconds, tolerance)


def _keyed(plan: Findings) -> dict[tuple[str, int], Site]:
    """Sites by name, and by how often the name came before: a module may hold several attentions."""
    seen: dict[str, int] = {}
    out: dict[tuple[str, int], Site] = {}
    for s in plan.sites:
        name = s.name or s.where
        out[(name, seen.get(name, 0))] = s
        seen[name] = seen.get(name, 0) + 1
    return out


def _row(old: Site | None, new: Site | None) -> Row:
    site = old or new
    assert site is not None
    name = (site.name or site.where,)
    if old is None or new is None:
        one = Row(name, GONE if new is None else NEW)
        choice, seconds = site.choice, _seconds(site)
        if new is None:
            return Row(name, one.status, before=choice, before_seconds=seconds)
        return Row(name, one.status, after=choice, after_seconds=seconds)
    status = SAME if old.choice == new.choice else CHANGED
    return Row(name, status, old.choice, new.choice, _seconds(old), _seconds(new))


def _alike(r: Row) -> tuple[object, ...]:
    return (r.status, r.before, r.after, r.before_seconds, r.after_seconds)


def _seconds(s: Site) -> float | None:
    cost = s.chosen.cost
    return cost.seconds if cost is not None else None


def _title(plan: Findings) -> str:
    return f"{plan.model or 'plan'} on {plan.device.name}"


def diff_table(d: Diff, width: int | None = None) -> str:
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
