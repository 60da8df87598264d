"""Measured beside predicted: every candidate of an attention that can run on this machine, on random inputs of its shapes.

    sample     tensors of the site's shapes, strides and types: normal floats, true masks, zero indices
    measure    candidates in turn, every second round backwards; medians; the first candidate twice a round (A/A: noise)

The calls are those that the rewriter would splice in; the original is the model's own subgraph. What would not fit in memory
or would take too long is left out with the reason.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from ...cost_model.sites.site import ORIGINAL, Candidate, Site
from ...cost_model.words import bytes_text, group_name, seconds_text, table_of, table_text
from ..capture import capture, export
from ..capture.models import ModelInput, load
from ..choose import choose
from ..choose.policy import Policy
from ..find.place import interior
from ..graph.functional import adopt
from ..shapes import Shapes, UsageError
from ..splice.guards import original_subgraph
from .explain import positions

# Rounds at least; the share of free memory that one candidate may take; calls longer than this many budgets are left out.
ROUNDS, MEMORY_SHARE, LONGEST = 5, 0.6, 5.0
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """One candidate: medians in seconds; None with the reason `why` where it was not measured.

    `first_seconds` is the first call, compilation included.
    """

    candidate: str
    predicted_seconds: float | None
    measured_seconds: float | None = None
    first_seconds: float | None = None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if not self.measured_seconds or not self.predicted_seconds:
            return None
        return self.measured_seconds / self.predicted_seconds


@dataclass(frozen=True)
class SiteBench:
    """A group of identical attentions. `noise` is the ratio of one candidate's two interleaved medians (A/A)."""

    names: tuple[str, ...]
    where: str
    shape: str
    choice: str
    rows: tuple[Measured, ...]
    noise: float
    rounds: int

    @property
    def fastest(self) -> str:
        """The candidate with the least measured time; "" where none was measured."""
        timed = [(r.measured_seconds, r.candidate) for r in self.rows if r.measured_seconds is not None]
        return min(timed)[1] if timed else ""

    @property
    def regret(self) -> float | None:
        """How much longer the chosen candidate takes than the fastest, as a share."""
        timed = {r.candidate: r.measured_seconds for r in self.rows if r.measured_seconds is not None}
        return timed[self.choice] / min(timed.values()) - 1 if self.choice in timed else None


@dataclass(frozen=True)
class Bench:
    """All measured sites of a model on one device."""

    model: str
    device: str
    basis: str
    threads: int
    sites: tuple[SiteBench, ...]

    def to_json(self) -> str:
        body = asdict(self)
        for site, made in zip(body["sites"], self.sites):
            site |= {"fastest": made.fastest, "regret": made.regret}
            for row, r in zip(site["rows"], made.rows):
                row["ratio"] = r.ratio
        return json.dumps(body, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'' if self.threads == 1 else 's'}" if self.device == "cpu" else ""
        lines = [f"{self.model} on {self.device}{threads} ({self.basis} predictions)"]
        for s in self.sites:
            lines += ["", _title(s), _table(s)]
        return "\n".join(lines)


def _title(s: SiteBench) -> str:
    many = f" ×{len(s.names)}" if len(s.names) > 1 else ""
    regret = f", {s.regret:.1%} behind {s.fastest}" if s.regret else ""
    noise = f"A/A {s.noise:.3f} over {s.rounds} rounds" if s.rounds else "nothing measured"
    return f"{group_name(list(s.names)) or s.where}{many}   {s.shape}   chosen: {s.choice}{regret}   {noise}"


def _table(s: SiteBench) -> str:
    numbers = ("predicted", "measured", "measured / predicted", "first call")
    table = table_of(("candidate", *numbers, "note"), right=numbers, whole=())
    for r in s.rows:
        ratio = f"{r.ratio:.2f}" if r.ratio is not None else ""
        times = (r.predicted_seconds, r.measured_seconds)
        predicted, measured = (seconds_text(t) if t is not None else "–" for t in times)
        first = seconds_text(r.first_seconds) if r.first_seconds is not None else ""
        mark = "chosen" if r.candidate == s.choice else ""
        fast = "fastest" if r.candidate == s.fastest else ""
        table.add_row(r.candidate, predicted, measured, ratio, first, r.why or ", ".join(x for x in (mark, fast) if x))
    return table_text(table)


# --- a model --------------------------------------------------------------------------------------------------------


def bench_spec(spec: str, shapes: Shapes, site: str | None, seconds: float, step: Step) -> Bench:
    """Measure what a command line names, on the device that this process computes on.

    `step(what, done, total)` is told of the progress. Raises UsageError and CaptureError.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return bench_input(load(spec, shapes, where=f"fake:{device}"), site, seconds, step)


def bench_input(given: ModelInput, site: str | None, seconds: float, step: Step) -> Bench:
    """Measure the attentions of a model, or only those named `site`, `seconds` each."""
    with torch.no_grad():
        if given.program is not None:
            captured = export.from_program(given.program)
        else:
            assert given.model is not None
            captured = export.from_export(given.model, given.args, given.kwargs)
        found: list[tuple[fx.GraphModule, choose.Decision]] = []
        taken: Counter[str] = Counter()
        for region in capture.regions(captured.graph):
            adopt(region)
            found += [(region, d) for d in choose.decide(region, choose.Request(Policy()), taken)[0]]
        groups = _groups([d.site for _, d in found], site)
        done: list[SiteBench] = []
        for i, members in enumerate(groups):
            names = tuple(found[m][1].site.name for m in members)
            step(group_name(list(names)) or found[members[0]][1].site.where, i, len(groups))
            done.append(bench_site(*found[members[0]], names, seconds))
    own = choose.running_device(found[groups[0][0]][1].found.output.meta["val"].device.type)
    name = Path(given.name).name if given.program is not None else given.name
    return Bench(name, own.name, own.basis, torch.get_num_threads(), tuple(done))


def _groups(sites: Sequence[Site], wanted: str | None) -> list[list[int]]:
    """Positions of identical sites together; only those of a name, where one is given."""
    kept = set(positions(sites, wanted)) if wanted is not None else set(range(len(sites)))
    if not kept:
        raise UsageError("the model has no attention that was found: `reattend plan` says what was left alone and why")
    out: dict[tuple[object, ...], list[int]] = {}
    for i, s in enumerate(sites):
        if i in kept:
            out.setdefault(s.alike, []).append(i)
    return list(out.values())


# --- one attention --------------------------------------------------------------------------------------------------


def bench_site(gm: fx.GraphModule, d: choose.Decision, names: tuple[str, ...], seconds: float) -> SiteBench:
    """Measure every candidate of an attention of a graph."""
    device = d.found.output.meta["val"].device
    inputs = sum(_bytes(n.meta["val"]) for n in d.found.tensors.values())
    refused = {c.name: why for c in d.site.candidates if (why := _no(c, d.site, inputs, free_bytes(device), seconds))}
    first: dict[str, float] = {}
    runs: dict[str, Callable[[], object]] = {}
    if any(c.name not in refused for c in d.site.candidates):
        for name, call in calls(gm, d).items():
            if name not in refused:
                try:
                    first[name] = _timed(call, device)
                    runs[name] = call
                except Exception as error:
                    # A vendor's kernel raises whatever its library does: a compiler that is missing, memory that is short.
                    refused[name] = f"it failed here ({type(error).__name__}: {str(error).strip().splitlines()[0][:120]})"
    medians, noise, rounds = interleaved(runs, device, seconds) if runs else ({}, 1.0, 0)
    rows = tuple(_row(c, medians.get(c.name), first.get(c.name), refused.get(c.name, "")) for c in d.site.candidates)
    return SiteBench(names, d.site.where, str(d.site.shape), d.site.choice, rows, noise, rounds)


def _row(c: Candidate, median: float | None, first: float | None, why: str) -> Measured:
    predicted = c.cost.seconds if c.cost is not None and c.feasible else None
    untaken = "its code cannot be taken out of the graph" if median is None else ""
    return Measured(c.name, predicted, median, first, why or untaken)


def _no(c: Candidate, site: Site, inputs: int, free: int, seconds: float) -> str:
    """Why a candidate is not measured, or nothing."""
    if not c.feasible:
        return c.why
    tiled, eager = (site.memory.tiled_bytes, site.memory.eager_bytes) if site.memory is not None else (0, 0)
    moved = c.cost.bytes if c.cost is not None else eager
    # The original's operators hold what the largest of them reads and writes, unless it is one fused call.
    needed = inputs + (2 * min(eager, moved) if c.is_original else 2 * tiled)
    if needed > MEMORY_SHARE * free:
        return f"it would need {bytes_text(needed)}, and {bytes_text(free)} are free"
    if c.seconds > LONGEST * seconds:
        return f"one call is predicted to take {seconds_text(c.seconds)}: give more --seconds"
    return ""


def calls(gm: fx.GraphModule, d: choose.Decision) -> Mapping[str, Callable[[], object]]:
    """Every candidate of a decision as a call on one set of random inputs."""
    tensors = {name: sample(n.meta["val"]) for name, n in d.found.tensors.items()}
    scalars = {name: _number(n.meta["val"]) for name, n in d.found.scalars.items()}
    sizes = choose.bind_sizes(d.found.cascade, tensors, scalars)
    out: dict[str, Callable[[], object]] = {}
    original = original_subgraph(gm, d.found.output, interior(d.found), d.found.further)
    if original is not None:
        module, nodes = original
        held = {n: tensors[name] for name, n in d.found.tensors.items()}
        values = [held[n] if n in held else _value(n.meta["val"]) for n in nodes]
        out[ORIGINAL] = lambda: module(*values)
    for name, call in d.calls.items():
        arguments = call.arguments(tensors, sizes.__getitem__)
        out[name] = lambda target=call.target, given=arguments: target(*given)  # type: ignore[misc]
    return out


def sample(like: Tensor) -> Tensor:
    """A random tensor of the shape, strides, type and device of a value that may have no data."""
    shape, stride = [int(s) for s in like.shape], [int(s) for s in like.stride()]
    real = [1 if step == 0 else n for n, step in zip(shape, stride)]
    out = torch.empty_strided(real, stride, dtype=like.dtype, device=like.device)
    if like.dtype == torch.bool:
        out.fill_(True)
    elif like.is_floating_point():
        out.normal_()
    else:
        out.zero_()
    return out.expand(shape)


def _value(value: object) -> object:
    return sample(value) if isinstance(value, Tensor) else _number(value)


def _number(value: object) -> object:
    return int(value) if isinstance(value, torch.SymInt) else value


def _bytes(value: Tensor) -> int:
    held = [int(n) for n, step in zip(value.shape, value.stride()) if int(step) != 0]
    return torch.Size(held).numel() * value.element_size()


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; without limit where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 1 << 62
    return 1 << 62


# --- timing ---------------------------------------------------------------------------------------------------------


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> tuple[dict[str, float], float, int]:
    """Median seconds of each call, the A/A ratio of the first, and the rounds that `seconds` allowed (at least five)."""
    names = list(runs)
    order = [*names, names[0]]
    times: list[list[float]] = [[] for _ in order]
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < seconds:
        # every second round runs backwards, so that a drift hits all alike
        for k in range(len(order)) if rounds % 2 == 0 else reversed(range(len(order))):
            times[k].append(_timed(runs[order[k]], device))
        rounds += 1
    medians = [statistics.median(t) for t in times]
    return dict(zip(names, medians)), medians[-1] / medians[0], rounds


def _timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
