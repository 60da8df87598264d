"""Calibration: examples through the original, every method at every attention beside it, then the choice within the budget.

    configure   every other example: errors at each attention, then whole-model errors of the configurations that are tried
    held out    the others: the errors that are stated, and the whole-model error that decides

What is tried is run closed loop: an attention that runs a method feeds the next. Nothing is installed here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ...cost_model.devices.device import Device
from ...cost_model.report.trade_off import TradeOff
from ...cost_model.sites.error import KeptMass, MeasuredError
from ...cost_model.words import seconds_text
from ..check.compare import relative
from ..choose.approximations import AHEAD, Installed
from ..choose.ground import Ground
from ..choose.policy import Policy
from ..run.session import session_of
from ..shapes import UsageError
from .data import CalibrationError, Example, Halves, call, output, read
from .heads import fit
from .logits import answers, logits_of
from .record import MethodSeen, Recorder
from .search import Choice, Move, Tried, choice_of, confirm, saved_by, search
from .statistics import Statistics, whole_key

# Two-sided 95 % of Student's t by degrees of freedom; beyond, the normal distribution's is near enough.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Tell = Callable[[str], None]


def required(policy: Policy) -> None:
    """Raise CalibrationError where a policy has methods and nothing to measure them by, or no budget."""
    if not policy.methods:
        return
    if policy.calibration is None:
        raise CalibrationError(
            "Policy(methods) without calibration=…: an approximation is never installed without its measured error; "
            "reattend.plan lists what it would save"
        )
    if policy.max_error is None:
        raise CalibrationError("Policy(methods) without max_error=…: say by how much the output may differ, such as 0.01")


def calibrate(model: nn.Module, policy: Policy, target: Device | None = None) -> Installed:
    """What to install of the policy's methods in a model, with the errors that were measured. The model is left as it was.

    Seconds are those of `target`, by default of the device that runs. Raises CalibrationError where nothing is measured.
    """
    required(policy)
    if model.training:
        raise CalibrationError("the model is in training mode, which has no fixed output to measure by: call model.eval()")
    halves = read(policy.calibration)
    assert policy.max_error is not None
    outer = session_of(model)
    if outer is not None:
        outer.detach()
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), _progress() as tell:
            own = {id(e): _output(model, e, i) for i, e in enumerate((*halves.configure, *halves.held_out))}
            tell("measuring heads")
            recorder = Recorder(policy, target, fit(model, policy, halves.configure))
            made = _Calibration(model, recorder, halves, own, policy, tell, Ground(model))
            if policy.keep:
                examples, fitted = (*halves.configure, *halves.held_out), sorted(recorder.found.fitted.items())
                made.kept = Statistics(policy.keep, model, examples, repr((policy.methods, fitted, target)))
            with recorder.at_work(model):
                return made.result()
    finally:
        torch.set_rng_state(state)
        if outer is not None:
            outer.attach()


class _Calibration:
    def __init__(
        self, model: nn.Module, recorder: Recorder, halves: Halves, own: Mapping[int, list[Tensor]], policy: Policy,
        tell: Tell, ground: Ground,
    ) -> None:
        self.model, self.recorder, self.halves, self.own, self.tell = model, recorder, halves, own, tell
        self.ground = ground
        assert policy.max_error is not None
        self.budget, self.policy = policy.max_error, policy
        self.kept: Statistics | None = None
        self.numbers = {id(e): i for i, e in enumerate((*halves.configure, *halves.held_out))}

    def result(self) -> Installed:
        self._record()
        self.recorder.reprice(len(self.halves.configure))
        moves = self._moves()
        configured, tried = search(moves, lambda c: max(self._whole(c, self.halves.configure)), self.budget)
        taken, confirmed = confirm(configured, lambda c: max(self._whole(c, self.halves.held_out)), self.budget)
        errors = {k: e for k, e in ((k, self._error(k)) for k in self.recorder.records) if e is not None}
        choice = choice_of(taken)
        whole = self._whole(choice, self.halves.held_out) if choice else [0.0]
        said = (*self._said(taken, whole, [*tried, *confirmed]), *self._answers(choice))
        curve = (*(self._point(t, choice, False) for t in tried), *(self._point(t, choice, True) for t in confirmed))
        self.ground.settle()
        kinds = {name: frozenset(seen) for name, seen in self.recorder.sites.items()}
        return Installed(
            choice, errors, self.budget, max(whole), said, kinds, self.ground, self.recorder.found.fitted, curve
        )

    def _point(self, t: Tried, chosen: Choice, held_out: bool) -> TradeOff:
        """A configuration with what the clock says that it saves: at each attention the shortest of some runs of either."""
        clocks: list[float] | None = []
        for at in t.choice.items():
            seen = self.recorder.records[at].seen
            exact = [s.exact for s in seen if s.exact is not None]
            # the first run compiles
            if len(seen) < 2 or len(exact) < 2 or clocks is None:
                clocks = None
                break
            clocks.append(min(exact) - min(s.seconds for s in seen))
        measured = None if clocks is None else sum(clocks)
        return TradeOff(len(t.choice), t.saved, measured, t.error, held_out and t.choice == chosen, held_out)

    def _answers(self, choice: Choice) -> tuple[str, ...]:
        """What becomes of a language model's answers, where something is installed and the model is one."""
        if not choice:
            return ()
        both: list[list[Tensor]] = []
        for taken in ({}, choice):
            self.recorder.choice = taken
            found = [logits_of(self.model, output(self.model, e)) for e in self.halves.held_out]
            both.append([x.detach().clone() for x in found if x is not None])
        self.recorder.choice = {}
        return (answers(*both),) if both[0] and len(both[0]) == len(both[1]) else ()

    def _record(self) -> None:
        """Run all examples once with every method beside every attention."""
        r = self.recorder
        r.recording, r.choice = True, {}
        n = len(self.own)
        for i, e in enumerate((*self.halves.configure, *self.halves.held_out)):
            self.tell(f"measuring methods on example {i + 1} of {n}")
            r.example, r.held_out = i, i >= len(self.halves.configure)
            r.recording = self.kept is None or not self.kept.has(i)
            call(self.model, e)
            if not r.recording and self.kept is not None and not self.kept.example(i, r.records):
                r.recording = True
                call(self.model, e)
            if r.recording and self.kept is not None:
                self.kept.keep_example(i, r.records)
        r.recording = False
        if not r.sites:
            raise CalibrationError("no attention was found in what the calibration's examples run: nothing can be replaced")

    def _moves(self) -> list[Move]:
        first = len(self.halves.configure)
        out = []
        for (site, method), r in self.recorder.records.items():
            seen = [s.error for s in r.seen if s.example < first]
            if not r.why and seen and math.isfinite(max(seen)):
                out.append(Move(site, method, r.saved, max(seen)))
        return out

    def _whole(self, choice: Choice, examples: Sequence[Example]) -> list[float]:
        """The relative error of the model's output under a choice, example by example: of the output that differs most."""
        self.tell(f"measuring {len(choice)} of {len(self.recorder.sites)} attentions with a method")
        self.recorder.choice = choice
        try:
            return [self._differs(choice, e) for e in examples]
        finally:
            self.recorder.choice = {}

    def _differs(self, choice: Choice, e: Example) -> float:
        number = self.numbers[id(e)]
        known = self.kept.whole.get(whole_key(choice, number)) if self.kept is not None else None
        if known is None:
            known = _differs(call(self.model, e), self.own[id(e)])
            if self.kept is not None:
                self.kept.keep_whole(choice, number, known)
        return known

    def _error(self, key: tuple[str, str]) -> MeasuredError | None:
        """What the examples held out say of a method at a site."""
        first, r = len(self.halves.configure), self.recorder.records[key]
        seen = [s for s in r.seen if s.example >= first]
        if r.why or not seen:
            return None
        errors = [s.error for s in seen]
        low, high = interval(errors)
        shares = [s.share for s in seen if s.share is not None]
        return MeasuredError(
            statistics.fmean(errors), low, high, max(errors), max(x for s in seen for x in s.heads), _kept(seen),
            len({s.example for s in seen}), _span([s.queries for s in r.seen]), _span([s.keys for s in r.seen]),
            f"{len(self.own)} examples of calibration, every other one held out",
            statistics.fmean(shares) if shares else None,
        )

    def _said(self, taken: Sequence[Move], whole: Sequence[float], tried: Sequence[Tried]) -> tuple[str, ...]:
        sites, n = len(self.recorder.sites), len(self.halves.held_out)
        held = f"on {n} examples held out of {len(self.own)}"
        excluded = {f"{method}: {r.why}": None for (_, method), r in self.recorder.records.items() if r.why}
        last = tuple(f"not installed: {x}" for x in excluded)
        chosen = choice_of(taken)
        ahead = {f"{m}: {w}, so that {AHEAD}": None for (s, m), w in self.recorder.ahead.items() if chosen.get(s) == m}
        last = (*ahead, *last)
        if taken:
            low, high = interval(whole)
            return (
                f"approximate: {len(choice_of(taken))} of {sites} attentions run a method, predicted to save "
                f"{seconds_text(saved_by(taken))}; the whole output differs by {statistics.fmean(whole):.2e} "
                f"({low:.1e} to {high:.1e}, largest {max(whole):.1e}; max_error {self.budget:g}) {held}",
                *last,
            )
        if not tried:
            able = any(not r.why for r in self.recorder.records.values())
            why = "no method is predicted to be faster where it can run" if able else "none can run"
            return (f"approximate: nothing is installed: {why}", *last)
        near = min(tried, key=lambda t: t.error)
        where = ", ".join(f"{m} at {s or 'the attention'}" for s, m in near.choice.items())
        return (
            f"approximate: nothing is installed: no configuration is within max_error={self.budget:g}; the closest, "
            f"{where}, differs by {near.error:.2e} and was predicted to save {seconds_text(near.saved)}",
            *last,
        )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean, by Student's t; without a bound above where one value is all there is."""
    if len(values) < 2:
        return 0.0, math.inf
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.inf
    return max(statistics.fmean(values) - half, 0.0), statistics.fmean(values) + half


def _kept(seen: Sequence[MethodSeen]) -> KeptMass | None:
    """Of each number the head that keeps least; None for a method that weighs keys anew."""
    found = [s.mass for s in seen if s.mass is not None]
    if not found:
        return None
    heads = torch.cat(found, dim=1)
    mean, p1, least = (x.min().item() for x in (heads.mean(1), _percentile(heads), heads.amin(1)))
    return KeptMass(mean, p1, least, sum(s.rows for s in seen), sum(s.of for s in seen))


def _percentile(rows: Tensor) -> Tensor:
    """The first percentile of each row of numbers: that of rank ⌈n / 100⌉ from below."""
    return rows.kthvalue(max(math.ceil(rows.shape[1] / 100), 1), dim=1).values


def _span(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _output(model: nn.Module, e: Example, number: int) -> list[Tensor]:
    try:
        out = call(model, e)
    except UsageError as no:
        raise CalibrationError(f"Policy(calibration): example {number}: {no}") from no
    if not out:
        raise CalibrationError(f"Policy(calibration): the model's output on example {number} holds no tensor of floats")
    if any(bool(x.isnan().any()) for x in out):
        raise CalibrationError(f"Policy(calibration): the model's own output on example {number} holds NaN")
    return out


def _differs(made: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    return max(relative(a.double(), b.double()) for a, b in zip(made, own, strict=True))


@contextmanager
def _progress() -> Any:
    """A bar where somebody looks on; what is being measured stands in it."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("reattend"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console,
        transient=True, disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what: bar.update(task, description=what)
