"""Verification: each attention of a model on its own inputs against float64, and the whole output against the original.

    reference   the lifted cascade, evaluated with every float widened to float64
    baseline    the error of the model's own code against it, in the model's types
    actual      the error of what was chosen: at most 2.5 times the baseline's largest, 1.2 times its RMS

of a method its own cascade is the reference, and the whole output may differ by the policy's `max_error` (relative, L2);
with a floor of one unit in the last place of the output. A baseline that is itself far off means that the cascade does not
say what the model computes, and fails as well.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from ...cost_model.plan.plan import Plan
from ...cost_model.sites.site import ORIGINAL
from ...cost_model.words import table_of, table_text
from ...patterns.evaluate import evaluate
from ..capture import capture
from ..capture.models import run
from ..check.compare import relative
from ..choose import choose
from ..choose.approximations import Installed
from ..choose.policy import Policy
from ..graph.functional import adopt
from ..graph.torch_private import tree_leaves
from .session import Session, session_of

T = TypeVar("T")
MAX_RATIO = 2.5
RMS_RATIO = 1.2
# A baseline beyond this many units of the type's precision is no rounding error.
BASELINE_LIMIT = 256.0
# Whole outputs, relative to the largest: rounding differs and adds up over layers.
WHOLE_LIMIT: Mapping[torch.dtype, float] = {
    torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class SiteCheck:
    """One attention: errors relative to the largest output, of the chosen kernel and of the original code."""

    name: str
    where: str
    kernel: str
    dtype: str
    max_error: float
    rms_error: float
    original_max_error: float
    original_rms_error: float
    ok: bool
    why: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one call. `whole_error` compares the rewritten model's output with the original's."""

    sites: tuple[SiteCheck, ...]
    whole_error: float
    whole_limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Is every error, of each attention and of the whole, within its limit?"""
        return all(s.ok for s in self.sites) and self.whole_error <= self.whole_limit

    @property
    def worst(self) -> SiteCheck | None:
        """The failed site with the largest error, or the site with the largest error of all."""
        return max(self.sites, key=lambda s: (not s.ok, s.max_error), default=None)

    def to_json(self) -> str:
        """All checks as JSON."""
        body = {"ok": self.ok, "whole_error": self.whole_error, "whole_limit": self.whole_limit, "note": self.note,
                "sites": [asdict(s) for s in self.sites]}
        return json.dumps(body, indent=1)

    def __str__(self) -> str:
        n = sum(s.kernel != ORIGINAL for s in self.sites)
        verdict = "verified" if self.ok else "FAILED"
        whole = f"the whole output differs by {self.whole_error:.1e} of its largest (limit {self.whole_limit:.0e})"
        lines = [f"{verdict}: {n} attention{'' if n == 1 else 's'} against float64; {whole}"]
        if self.sites:
            lines.append(_table(self.sites))
        if self.worst is not None:
            lines.append(
                f"worst: {self.worst.name or self.worst.where}: {self.worst.why or f'{self.worst.max_error:.1e}'}"
            )
        return "\n".join([*lines, self.note] if self.note else lines)


def verify(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], policy: Policy, plan: Plan | None = None,
    installed: Installed | None = None,
) -> Verification:
    """Run the model twice without gradients, as written and rewritten, and compare. The model is left as it was found."""
    held = session_of(model)
    # What was chosen is looked at as it is: nothing steps aside.
    policy = replace(policy, check="never", tune=False)
    if held is not None:
        held.detach()
    try:
        with torch.no_grad():
            whole = _whole(model, args, kwargs, policy, plan, installed)
            checker = _Checker(policy, plan, installed)
            checked = Session(policy, None, backend=checker)
            checked.install(model)
            try:
                model(*_again(args), **_again(dict(kwargs)))
            finally:
                checked.detach()
    finally:
        if held is not None:
            held.attach()
    same = bool(checker.checks) and all(s.kernel == ORIGINAL for s in checker.checks)
    note = "" if checker.checks else "nothing was verified: no attention was found in what was captured"
    note = "nothing was verified: every attention keeps the model's own code (reattend plan says why)" if same else note
    return Verification(tuple(checker.checks), *whole, note=note)


def _whole(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], policy: Policy, plan: Plan | None,
    installed: Installed | None,
) -> tuple[float, float]:
    """Largest difference of the outputs, relative to the largest output, and the limit for their type.

    With methods it is their difference in L2 relative to the output, and the limit is the policy's.
    """
    state = torch.get_rng_state()
    expected = _floats(run(model, _again(args), _again(dict(kwargs))))
    session = Session(policy, None, choices=_choices(plan), installed=installed)
    session.install(model)
    try:
        torch.set_rng_state(state)
        actual = _floats(model(*_again(args), **_again(dict(kwargs))))
    finally:
        session.detach()
    planned = [s.chosen for s in plan.sites] if plan is not None else []
    if policy.max_error is not None and ((installed and installed.chosen) or any(not c.exact for c in planned)):
        pairs = zip(actual, expected, strict=True)
        return max((relative(a.double(), b.double()) for a, b in pairs), default=0.0), policy.max_error
    limit = max((WHOLE_LIMIT.get(t.dtype, 1e-5) for t in expected), default=1e-5)
    return max((_difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0), limit


def _choices(plan: Plan | None) -> Mapping[str, str]:
    return {s.name: s.choice for s in plan.sites} if plan is not None else {}


def _again(values: T) -> T:
    """Inputs of one more call: a model may write into what it is given (a cache, a buffer)."""
    import copy

    return copy.deepcopy(values)


def _floats(out: object) -> list[Tensor]:
    leaves = tree_leaves(out)
    return [x.detach().clone() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    kept = b.isfinite()
    largest = b[kept].abs().max().item() if kept.any() else 0.0
    return (a[kept] - b[kept]).abs().max().item() / (largest or 1.0) if kept.any() else 0.0


class _Checker:
    """A backend that runs graphs as captured and, at every attention, compares candidates on the values at hand."""

    def __init__(self, policy: Policy, plan: Plan | None, installed: Installed | None) -> None:
        self.policy, self.choices, self.installed = policy, _choices(plan), installed
        self.checks: list[SiteCheck] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str]) -> Callable[..., Any]:
        try:
            captured = capture.from_dynamo(gm, inputs, names)
        except capture.CaptureError:
            return gm.forward
        decisions, taken = {}, Counter[str]()
        for region in capture.regions(captured.graph):
            adopt(region)
            made, _ = choose.decide(region, self._request(), taken)
            decisions.update({d.found.output: d for d in made})
        return lambda *values: _Checking(captured.graph, decisions, self.checks).run(*values)


    def _request(self) -> choose.Request:
        return choose.Request(self.policy, choices=self.choices, installed=self.installed)


class _Checking(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, decisions: Mapping[fx.Node, choose.Decision], checks: list[SiteCheck]
    ) -> None:
        # Inputs of an attention are read when its output is there: nothing is dropped before.
        super().__init__(gm, garbage_collect_values=False)
        self.decisions, self.checks = decisions, checks

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        decision = self.decisions.get(n)
        if decision is not None:
            tensors = {name: self.env[x] for name, x in decision.found.tensors.items()}
            scalars = {name: self.env[x] for name, x in decision.found.scalars.items()}
            self.checks.append(_check(decision, tensors, scalars, value))
        return value


def _check(
    d: choose.Decision, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], original: Tensor
) -> SiteCheck:
    c = d.found.cascade
    sizes = choose.bind_sizes(c, tensors, scalars)
    reference = evaluate(c, tensors, sizes, widen=True)[c.outputs[0]].reshape(original.shape)
    if d.call is None:
        actual, kernel = original, "original"
    else:
        made = d.call.target(*d.call.arguments(tensors, lambda name: sizes[name]))
        actual, kernel = made.reshape(original.shape), d.site.choice
    m = d.approximation
    if m is not None:
        given = m.tensors(tensors, sizes)
        out = m.view.cascade.outputs[0]
        reference, own = (evaluate(m.view.cascade, given, sizes, widen=w)[out] for w in (True, False))
        reference, original = reference.reshape(original.shape), own.reshape(original.shape).to(original.dtype)
    unit = torch.finfo(original.dtype).eps
    base = _errors(original, reference)
    ours = _errors(actual, reference)
    why = ""
    if base[0] > BASELINE_LIMIT * unit:
        why = f"the cascade and the original code differ by {base[0]:.1e}: it was lifted wrongly"
    elif ours[0] > max(MAX_RATIO * base[0], unit) or ours[1] > max(RMS_RATIO * base[1], unit):
        why = f"{kernel} is off by {ours[0]:.1e}, the original code by {base[0]:.1e}"
    return SiteCheck(
        d.site.name, d.site.where, kernel, str(original.dtype).removeprefix("torch."), *ours, *base, not why, why
    )


def _errors(actual: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest and RMS error relative to the largest value; infinite where one is finite and the other is not."""
    a, b = actual.double(), reference
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf, math.inf
    kept = b.isfinite()
    if not kept.any():
        return 0.0, 0.0
    largest = b[kept].abs().max().item() or 1.0
    error = (a[kept] - b[kept]).abs()
    return error.max().item() / largest, error.square().mean().sqrt().item() / largest


def _table(sites: Sequence[SiteCheck]) -> str:
    table = table_of(
        ("site", "where", "type", "kernel", "largest error", "of the original", "RMS", "of the original", "ok"), whole=()
    )
    for s in sites:
        table.add_row(
            s.name, "/".join(s.where.split("/")[-2:]), s.dtype, s.kernel, f"{s.max_error:.1e}",
            f"{s.original_max_error:.1e}", f"{s.rms_error:.1e}", f"{s.original_rms_error:.1e}", "yes" if s.ok else "NO",
        )
    return table_text(table)
