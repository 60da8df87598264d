"""One model of the walk: as written, in float64, and rewritten under each policy; what was found, is it right?

    own      the model as written in its type      exact    the same with every float widened to float64
    ours     held against both by rewriter/check/compare.py, output by output

Where ours is off by more, the yardstick is measured once more: the model as written,
with the outputs of its own modules
moved by a unit in the last place. That tells a wrong result from a choice (an expert,
    a bucket) which rounding alone turns.
"""

from __future__ import annotations

import copy
import itertools
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from models import Call, Case, wide
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import reattend
from reattend.rewriter.check.compare import MAX_RATIO, RMS_RATIO, Errors, errors
from reattend.rewriter.check.gradient import vanishing
from reattend.rewriter.run.report import Entered
from reattend.rewriter.run.session import Session

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.models.count import CountAttention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
POLICIES = {
    "default": reattend.Policy(check="first"),
    "forced": reattend.Policy(allow="reattend", deny="original", check="first"),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = 3
Say = Callable[[dict[str, Any]], None]


class Widened(TorchDispatchMode):
    """Every float type that the code names is float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wide = tree_map(lambda x: torch.float64 if isinstance(x, torch.dtype) and x in FLOATS else x, (args,
            kwargs or {}))
        return func(*wide[0], **wide[1])


def cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose parameters and saved buffers have this type, as a loaded checkpoint has them; tables that are computed
    stay as they are, and are widened for float64."""
    model = copy.deepcopy(model)
    if dtype == torch.float64:
        return wide(model)
    saved = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def outputs(model: nn.Module, call: Call) -> list[Tensor]:
    torch.manual_seed(3)
    args, kwargs = copy.deepcopy(call)
    leaves = tree_leaves(model(*args, **kwargs))
    return [x.detach().clone() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def moved(model: nn.Module, call: Call, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The outputs where what each innermost module gives is off by up to a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        noise = 2 * torch.rand(x.shape, generator=generator) - 1
        return (x.double() * (1 + torch.finfo(dtype).eps * noise)).to(x.dtype)

    hooks = [
        m.register_forward_hook(lambda _m, _a, out: tree_map(noisy, out))
        for m in model.modules()
        if next(m.children(), None) is None
    ]
    try:
        return outputs(model, call)
    finally:
        for h in hooks:
            h.remove()


def worst(ours: list[Tensor], own: list[Tensor], exact: list[Tensor]) -> list[Errors]:
    return [errors(a, b, c) for a, b, c in zip(ours, own, exact, strict=True)]


def one(case: Case, say: Say, *, dtypes: Sequence[str], thorough: bool) -> None:
    """Walk through one model; `say` gets a part of its row as soon as it is known."""
    start = time.perf_counter()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        model, calls, seen = first_call(case)
        say({"parameters": sum(p.numel() for p in model.parameters()), "attentions": seen.count, "calls": len(calls)})
        exact = []
        try:
            torch.set_default_dtype(torch.float64)
            largest = in_type(model, torch.float64)
            with Widened():
                exact = [outputs(largest, cast(c, torch.float64)) for c in calls]
        except Exception as e:
            say({"float64": said(e)})
        finally:
            torch.set_default_dtype(torch.float32)
        single = [outputs(model, c) for c in calls]
        for name in dtypes:
            dtype = DTYPES[name]
            own_model, own_calls = in_type(model, dtype), cast(calls, dtype)
            try:
                try:
                    own = [outputs(own_model, c) for c in own_calls]
                except RuntimeError:
                    # Its tables must have the type too.
                    own_model = own_model.to(dtype)
                    own = [outputs(own_model, c) for c in own_calls]
            except Exception as e:
                say({"runs": {name: {"eager": said(e)}}})
                continue
            truth = exact or single
            if any(_shapes(a) != _shapes(b) for a, b in zip(own, truth)):
                say({"runs": {name: {"eager": "its outputs have other shapes than in float64"}}})
                continue
            # A second length costs a second capture.
            many = len(own_calls) if thorough and dtype != torch.float32 else 1
            rows = rewritten(own_model, own_calls[:many], own, truth, dtype)
            say({"runs": {f"{name} {policy}": row for policy, row in rows.items()}})
    if thorough:
        say({"backward": gradients(model, calls[0])})
    say({"seconds": round(time.perf_counter() - start, 1)})


def _shapes(xs: list[Tensor]) -> list[torch.Size]:
    return [x.shape for x in xs]


def first_call(case: Case) -> tuple[nn.Module, list[Call], CountAttention]:
    """The first model of the architecture that can be built and called, its two calls, the attentions of the first."""
    failures = []
    for build in case.builds:
        try:
            model = build()
        except Exception as e:
            failures.append(said(e))
            continue
        for way, call in enumerate(case.calls(model, 0)):
            try:
                with CountAttention() as seen:
                    once = outputs(model, call)
                if not once:
                    raise ValueError("it gives no float tensor")
            except Exception as e:
                failures.append(said(e))
                continue
            second = next(itertools.islice(case.calls(model, 1), way, None))
            try:
                outputs(model, second)
            except Exception:
                # A model of one size alone.
                return model, [call], seen
            return model, [call, second], seen
    raise RuntimeError(failures[0] if failures else "unknown inputs")


class Both:
    """Dynamo's backend: each graph is planned and rewritten under every policy, and runs under that of `now`. So a
    model is traced once; what a policy makes of a graph is what `optimize` makes of it."""

    def __init__(self, model: nn.Module) -> None:
        self.now = next(iter(POLICIES))
        self.sessions = {name: Session(policy, None) for name, policy in POLICIES.items()}
        self.caught = Session(POLICIES[self.now], None, backend=self)
        self.caught.install(model)
        for session in self.sessions.values():
            session.entries = self.caught.entries

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object], names: object) -> Callable[..., Any]:
        made = {name: session.compile(None, gm, inputs) for name, session in self.sessions.items()}
        return lambda *values: made[self.now](*values)

    def report(self, name: str) -> reattend.Report:
        entries = tuple(Entered(e.path, e.calls, e.missed, tuple(e.failures)) for e in self.caught.entries)
        session = self.sessions[name]
        return reattend.Report(str(session.policy), entries, tuple(session.pieces), tuple(self.caught.frames_given_up))


def rewritten(
    model: nn.Module, calls: list[Call], own: list[list[Tensor]], exact: list[list[Tensor]], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """One run in one type under each policy."""
    torch._dynamo.reset()
    start = time.perf_counter()
    run = copy.deepcopy(model)
    both = Both(run)
    rows: dict[str, dict[str, Any]] = {name: {"verdict": "right"} for name in POLICIES}
    for number, call in enumerate(calls):
        for name, row in rows.items():
            both.now = name
            try:
                ours = outputs(run, call)
            except Exception as e:
                row |= {"verdict": "raised", "raised": f"call {number}: {said(e)}"}
                continue
            if number == 0:
                row |= found(both.report(name))
            verdict = compared(model, call, ours, own[number], exact[number], dtype)
            if verdict and row["verdict"] != "wrong":
                row |= {"verdict": verdict.split(":")[0], "why": f"call {number}: {verdict}"}
    for name, row in rows.items():
        row |= aside(both.report(name))
        row["seconds"] = round(time.perf_counter() - start, 1)
    return rows


def compared(
    model: nn.Module, call: Call, ours: list[Tensor], own: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> str:
    """Nothing where all outputs are right; else one sentence, that starts with "wrong" or "moved"."""
    if _shapes(ours) != _shapes(own) or [x.dtype for x in ours] != [x.dtype for x in own]:
        return f"wrong: {len(ours)} outputs of other shapes or types"
    bad = [i for i, e in enumerate(worst(ours, own, exact)) if not e.within()]
    if not bad:
        return ""
    limits = [(0.0, 0.0)] * len(own)
    for seed in range(DRAWS):
        for i, e in enumerate(worst(moved(model, call, dtype, seed), own, exact)):
            rms, largest = limits[i]
            limits[i] = max(rms, RMS_RATIO * e.rms), max(largest, MAX_RATIO * e.largest)
    final = worst(ours, own, exact)
    wrong = [i for i in bad if not final[i].within(limits[i])]
    i = (wrong or bad)[0]
    limit = f"{limits[i][1] / MAX_RATIO:.1e} (RMS {limits[i][0] / RMS_RATIO:.1e})"
    moves = f"moved by a unit, the model as written by {limit}"
    return f"{'wrong' if wrong else 'moved'}: output {i} of {len(own)}: {final[i]}; {moves}"


def found(report: reattend.Report) -> dict[str, Any]:
    """The attentions that ran in the first call, which kernels, and why others were left."""
    sites = [s for s in report.sites if s.ran]
    left = Counter(s.site.chosen.why for s in sites if s.kernel == "original" and s.site.chosen.why)
    misses = Counter(m.reason for m in report.misses)
    return {
        "found": sum(s.ran for s in sites), "kernels": dict(report.kernels),
        "traits": sorted({" ".join([s.site.kind, *sorted(s.site.traits)]) for s in sites}),
        **({"kept": dict(left)} if left else {}), **({"left": dict(misses)} if misses else {}),
    }


def aside(report: reattend.Report) -> dict[str, Any]:
    """What went wrong on the way, where anything did."""
    parts: dict[str, Any] = {
        "checks": dict(Counter(c.verdict for c in report.checks)),
        "aside": sorted({f"{c.verdict}: {c.kernel}: {c.why}" for c in report.checks if c.verdict != "same"}),
        "given_up": [f for e in report.entries for f in e.failures][:2] or report.given_up,
        "errors": sorted({p.error for p in report.pieces if p.error}), "breaks": len(report.breaks),
        "fallbacks": report.fallbacks, "graphs": report.captures,
    }
    return {k: v for k, v in parts.items() if v}


def gradients(model: nn.Module, call: Call) -> str:
    """Gradients of all parameters in float32, ours and the model's own, against float64: "right", or what is wrong."""

    def of(m: nn.Module, given: Call) -> tuple[list[Tensor], float]:
        """The gradients, and the size of what flows back."""
        m.requires_grad_(True)
        torch.manual_seed(3)
        args, kwargs = copy.deepcopy(given)
        outs = [x for x in tree_leaves(m(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        generator = torch.Generator().manual_seed(4)
        parts = torch.cat([(x * torch.randn(x.shape, generator=generator).to(x.dtype)).flatten() for x in outs])
        parts.sum().backward()  # type: ignore[no-untyped-call]
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in m.parameters()]
        return found, float(parts.detach().norm())

    try:
        own, _ = of(copy.deepcopy(model), call)
        torch.set_default_dtype(torch.float64)
        with Widened():
            exact, whole = of(in_type(model, torch.float64), cast(call, torch.float64))
    except Exception as e:
        return f"eager: {said(e)}"
    finally:
        torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()
    run = reattend.optimize(copy.deepcopy(model), policy=POLICIES["forced"])
    try:
        ours, _ = of(run, call)
    except Exception as e:
        return f"raised: {said(e)}"
    differ = [c for c in reattend.report(run).checks if c.verdict == "differs"]
    if differ:
        return f"differs: {differ[0].kernel}: {differ[0].why}"
    # Derivatives pass through twice as many operators as results.
    for (name, _), e, a, c in zip(model.named_parameters(), worst(ours, own, exact), ours, exact, strict=True):
        if vanishing(a, c, whole):
            continue
        if not e.within((2 * max(RMS_RATIO * e.own_rms, e.floor), 2 * MAX_RATIO * max(e.own_largest, e.floor))):
            return f"wrong: {name}: {e}"
    return "right"


def said(e: BaseException) -> str:
    """One line: what was raised, and the innermost line of ours that it passed."""
    ours = [f for f in traceback.extract_tb(e.__traceback__) if "/reattend/" in f.filename or "/rewriter/" in f.filename]
    where = f" [{'/'.join(ours[-1].filename.split('/')[-2:])}:{ours[-1].lineno}]" if ours else ""
    # rows are kept: where packages lie on a machine is nobody's business
    text = re.sub(r"/\S*/site-packages/", "", " ".join(str(e).split()))
    return f"{type(e).__name__}: {text[:200]}{where}"
