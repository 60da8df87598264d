"""What was planned and what really ran: one record a captured graph, and a report over all of a model's graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...cost_model.calibration.accuracy import within
from ...cost_model.plan.plan import Plan
from ...cost_model.report.trade_off import TradeOff, svg
from ...cost_model.sites.site import ORIGINAL, Miss, Site, grouped
from ...cost_model.time.cost import Cost
from ...cost_model.words import group_name, seconds_text, short_path, table_of, table_text
from ..check.verdicts import Check
from ..choose.policy import StrictError
from ..splice.sampling import Samples


@dataclass
class GraphPiece:
    """One graph that Dynamo handed over. `calls` counts its runs; `fallbacks` the guards that failed, by site; `samples`
    are times of the chosen kernels in some of the runs; `checks` what was found where they were held against the original;
    `slower` says of sites whose kernel took longer than the model's own code how long either took.

    `close`: its sizes are fixed, and its attentions may be as fast as written, which then holds little memory.
    `broke` says where and why Dynamo ended the graph early; `error` why nothing was rewritten in it.
    """

    entry: str
    number: int
    recompiled: bool = False
    broke: str = ""
    error: str = ""
    plan: Plan | None = None
    capture_seconds: float = 0.0
    plan_seconds: float = 0.0
    calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    samples: Samples = field(default_factory=Samples)
    close: bool = False
    checks: list[Check] = field(default_factory=list)
    slower: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The attentions of its plan."""
        return tuple(self.plan.sites) if self.plan is not None else ()

    def check(self) -> None:
        """Raise StrictError where something was left alone."""
        if self.error:
            raise StrictError(self.error)
        if self.broke:
            raise StrictError(f"the model was captured in pieces: {self.broke}")
        if self.plan is not None:
            check_plan(self.plan)


def check_plan(plan: Plan) -> None:
    """Raise StrictError for the first attention that keeps the original code although nothing was faster by choice."""
    for miss in plan.misses:
        raise StrictError(f"{miss.where or miss.what}: left alone: {miss.reason}")
    for site in plan.sites:
        if site.chosen.is_original and not any(c.feasible for c in site.candidates if not c.is_original):
            raise StrictError(f"{site.name or site.where}: keeps the original code: {site.chosen.why}")


@dataclass(frozen=True)
class SiteRun:
    """One attention of one graph: how often its graph ran, and how often its guards fell back to the original.

    `measured`: the median seconds of its kernel in calls that were timed, None before the first of them.
    """

    site: Site
    ran: int
    fell_back: int
    measured: float | None = None

    @property
    def name(self) -> str:
        """The path of the attention's module."""
        return self.site.name

    @property
    def kernel(self) -> str:
        """The candidate that was chosen."""
        return self.site.choice

    @property
    def predicted(self) -> Cost | None:
        """What the plan says that the kernel costs."""
        return self.site.chosen.cost

    @property
    def off(self) -> bool:
        """Was the kernel timed, and is the prediction further off than the plan's band allows?"""
        p = self.predicted
        return p is not None and self.measured is not None and not within(p.forward, self.measured, p.band)


@dataclass(frozen=True)
class Entered:
    """One module whose calls are caught: `missed` calls ran none of our graphs; `failures` are captures that failed.

    `bypassed`: calls that went round us and were noticed, by the reason.
    `as_written` calls ran the model's own code, to time it or because that is faster.
    """

    path: str
    calls: int
    missed: int
    failures: tuple[str, ...] = ()
    bypassed: Counter[str] = field(default_factory=Counter)
    as_written: int = 0


@dataclass(frozen=True)
class Report:
    """What `optimize` did to a model, and what a door did in it, up to now. `str()` is for reading.

    `doors` are the attentions that went through a door: `missed` of their calls were left to the library's own function.
    `notes` are sentences about them. `approximate`: what a calibration of methods found, and what it installed; `trade_off`
    has every configuration that it tried, under the budget `max_error`.
    """

    policy: str
    entries: tuple[Entered, ...]
    pieces: tuple[GraphPiece, ...]
    frames_given_up: tuple[str, ...] = ()
    copied: bool = False
    installed: bool = True
    doors: tuple[Entered, ...] = ()
    notes: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    trade_off: tuple[TradeOff, ...] = ()
    max_error: float = 0.0

    @property
    def calls(self) -> int:
        """Calls of the model that went through us."""
        return sum(e.calls - e.missed for e in self.entries)

    @property
    def as_written(self) -> int:
        """Calls that ran the model's own code, to time it or because it was faster so."""
        return sum(e.as_written for e in self.entries)

    @property
    def captures(self) -> int:
        """Graphs that were captured."""
        return len(self.pieces)

    @property
    def recompiles(self) -> int:
        """Captures of code that was captured before, for other sizes, types or modes."""
        return sum(p.recompiled for p in self.pieces)

    @property
    def given_up(self) -> int:
        """Calls that ran none of our graphs: a frame that Dynamo gave up, or a capture that failed."""
        return sum(e.missed for e in self.entries)

    @property
    def bypassed(self) -> Counter[str]:
        """Calls that went round us, by the reason; those of an outer `torch.compile` once for each of its graphs."""
        return sum((e.bypassed for e in self.entries), Counter[str]())

    @property
    def breaks(self) -> tuple[str, ...]:
        """Where and why Dynamo ended graphs early."""
        return tuple(dict.fromkeys(p.broke for p in self.pieces if p.broke))

    @property
    def fallbacks(self) -> int:
        """How often the model's own code ran in the place of a kernel, over all sites."""
        return sum(sum(p.fallbacks.values()) for p in self.pieces)

    @property
    def sites(self) -> tuple[SiteRun, ...]:
        """Every attention of every graph, with what ran of it."""
        return tuple(
            SiteRun(s, p.calls, p.fallbacks.get(s.name, 0), p.samples.median(s.name)) for p in self.pieces for s in p.sites
        )

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was found where rewritten sites were held against the model's own code."""
        return tuple(c for p in self.pieces for c in p.checks)

    @property
    def slower(self) -> Mapping[str, str]:
        """Sites that went back to the model's own code because the clock said so, with both times."""
        return {name: said for p in self.pieces for name, said in p.slower.items()}

    @property
    def kernels(self) -> Counter[str]:
        """How often each kernel ran."""
        out: Counter[str] = Counter()
        for s in self.sites:
            out[s.kernel] += s.ran - s.fell_back
            out[ORIGINAL] += s.fell_back
        return +out

    @property
    def misses(self) -> tuple[Miss, ...]:
        """What was left alone, as often as in the graph that has it most often: a graph may be captured again and again."""
        most: Counter[Miss] = Counter()
        for p in self.pieces:
            most |= Counter(p.plan.misses if p.plan is not None else ())
        return tuple(most.elements())

    def trade_off_svg(self) -> str:
        """The error of each configuration that was tried against what it saves, as a picture (SVG text).

        Raises ValueError where none was tried.
        """
        return svg(self.trade_off, self.max_error)

    @property
    def plan(self) -> Plan | None:
        """The plans of all captured graphs as one, in the order of capture; None before the first."""
        plans = [p.plan for p in self.pieces if p.plan is not None]
        if not plans:
            return None
        sites = tuple(s for p in plans for s in p.sites)
        return replace(plans[0], sites=sites, misses=self.misses)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        if not self.installed:
            return [_NOT_OPTIMISED_COPY if self.copied else _NOT_OPTIMISED]
        lines = self._through()
        if not self.pieces and not self.given_up and not self.bypassed and not self.doors:
            lines.append(
                "nothing is captured before the first call (or give optimize an example); "
                "calls of .forward, and calls inside another torch.compile, do not come here"
            )
        if self.given_up:
            lines.append(f"{_count(self.given_up, 'call')} ran as written, because the capture was given up:")
            lines += [f"  {f}" for e in self.entries for f in e.failures[-1:]]
        lines += [f"went round reattend {n}×: {why}" for why, n in self.bypassed.items()]
        if self.as_written:
            lines.append(f"{_count(self.as_written, 'call')} ran as written: timed beside rewritten ones, or faster so")
        lines += [f"graph break at {b}" for b in self.breaks]
        lines += [f"runs as written: {f}" for f in self.frames_given_up]
        lines += [f"graph {p.number}: {p.error}" for p in self.pieces if p.error]
        if self.sites:
            lines.append(_table(self.sites))
            ran = ", ".join(f"{k} {n}×" for k, n in self.kernels.most_common())
            lines.append(f"ran: {ran or 'nothing yet'}; guards that fell back: {self.fallbacks}")
            lines += _checked(self.checks)
            lines += [f"slower on this machine: {name}: {said}" for name, said in self.slower.items()]
            lines += _predictions(self.sites)
        elif self.pieces and not any(p.error for p in self.pieces):
            lines.append("no attention was found in what was captured")
        return [*lines, *(_left(m, n) for m, n in grouped(self.misses)), *self.approximate, *self.notes]

    def _through(self) -> list[str]:
        """How many calls came to us, and which way."""
        lines = [f"reattend: {_count(self.calls, 'call')} went through; {self._captures()}"]
        if not self.doors:
            return lines
        calls, left = sum(d.calls for d in self.doors), sum(d.missed for d in self.doors)
        said = f"through a door: {_count(calls, 'call')} of {_count(len(self.doors), 'attention')}"
        doors = f"{said}, {left} of them left to the library's own function"
        return [*lines, doors] if self.entries else [f"reattend: {doors}; {self._captures()}"]

    def _captures(self) -> str:
        seconds = sum(p.capture_seconds + p.plan_seconds for p in self.pieces)
        taken = f" in {seconds:.1f} s" if self.pieces else ""
        return f"{_count(self.captures, 'graph')} captured{taken}, {_count(self.recompiles, 'recompilation')}"


def _left(m: Miss, many: int) -> str:
    """One line for the same miss of all layers."""
    hint = f" ({m.hint})" if m.hint else ""
    return f"left alone: {m.where} {m.what}{f' ×{many}' if many > 1 else ''}: {m.reason}{hint}"


def _checked(checks: tuple[Check, ...]) -> list[str]:
    """One line for all that agree, one for each site that does not or was not looked at."""
    made = [c for c in checks if c.verdict in ("same", "differs")]
    agree, seconds = sum(c.ok for c in made), sum(c.seconds for c in checks)
    said = f"checked against the model's own code: {agree} of {len(made)} agree ({seconds_text(seconds)})"
    aside = [c for c in checks if c.verdict in ("differs", "raised")]
    lines = [said] * bool(made) + [f"{c.verdict}: {c.site}, {c.kernel}, keeps the original: {c.why}" for c in aside]
    unchecked: dict[str, list[str]] = {}
    for c in checks:
        if c.verdict == "unchecked":
            unchecked.setdefault(f"{c.kernel}: {c.why}", []).append(c.site)
    return lines + [f"unchecked: {group_name(names)}, {why}" for why, names in unchecked.items()]


def _predictions(runs: tuple[SiteRun, ...]) -> list[str]:
    """How the plan's times held: one line for all of them, and one for each group of sites where they did not."""
    timed = [r for r in runs if r.measured is not None and r.predicted is not None]
    groups: dict[tuple[object, ...], list[SiteRun]] = {}
    for r in timed:
        if r.off:
            groups.setdefault(r.site.alike, []).append(r)
    lines = [f"predicted times: {len(timed) - sum(map(len, groups.values()))} of {len(timed)} hold"] if timed else []
    for members in groups.values():
        r = members[0]
        assert r.predicted is not None
        assert r.measured is not None
        lines.append(
            f"prediction off: {group_name([m.name for m in members])}, {r.kernel}: {seconds_text(r.measured)} on the clock, "
            f"{seconds_text(r.predicted.forward)} ±{r.predicted.band:.0%} predicted ({r.predicted.basis}): "
            "`reattend targets --calibrate` measures this machine"
        )
    return lines


_NOT_OPTIMISED = "reattend: this model is not optimised: call reattend.optimize(model)"
_NOT_OPTIMISED_COPY = (
    "reattend: 0 calls went through: this model is a copy of an optimised one, and copies are not optimised: "
    "call reattend.optimize on the copy"
)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _table(runs: tuple[SiteRun, ...]) -> str:
    """One row a group of sites that differ by their name only."""
    groups: dict[tuple[object, ...], list[SiteRun]] = {}
    for r in runs:
        groups.setdefault((*r.site.alike, r.ran, r.fell_back), []).append(r)
    table = table_of(("site", "where", "what", "shape", "kernel", "ran", "fell back"), right=("ran", "fell back"), whole=())
    for members in groups.values():
        s = members[0].site
        many = f" ×{len(members)}" if len(members) > 1 else ""
        kernel = f"original: {s.chosen.why}" if s.chosen.is_original else s.choice
        table.add_row(
            group_name([m.name for m in members]) + many, short_path(s.where), " ".join([s.kind, *sorted(s.traits)]),
            str(s.shape), kernel, str(sum(m.ran for m in members)), str(sum(m.fell_back for m in members)),
        )
    return table_text(table)
