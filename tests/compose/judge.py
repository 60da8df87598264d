"""One draw judged: every way's results and gradients against float64, by the rule of rewriter/check/compare.py.

    own      the module's own code in its own types, without reattend      exact      the same with every float widened
    a way    as right as `own` (or than one unit more or less in every input would change), NaN and ∞ where `own` has them
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from reattend.rewriter.check.compare import (
    CANCELLED,
    DRAWS,
    MAX_RATIO,
    Errors,
    beside,
    change,
    drawn,
    errors,
    moved,
    redrawn,
)
from reattend.rewriter.check.gradient import FLAT, LONGER, drowned, vanishing

from .draws import Draw, as_data
from .module import Composed
from .operands import TYPES, inputs
from .ways import ByDynamo, Rewritten, Traced, Ways


@dataclass(frozen=True)
class Finding:
    """A way that is not what the module computes. `kind`: wrong, shape, raised, alarm (of the net) or defect."""

    kind: str
    way: str
    what: str
    said: str
    draw: dict[str, object] = field(default_factory=dict)

    def same(self, other: Finding) -> bool:
        """Is it the same finding in another draw?"""
        mine, theirs = (f.what.partition(" ")[0] for f in (self, other))
        return (self.kind, self.way, mine) == (other.kind, other.way, theirs)

    def data(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Judged:
    """What was found, and what ran: by way, the kernels of its captures. `invalid`: the module's own code raises."""

    findings: list[Finding] = field(default_factory=list)
    kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    invalid: str = ""
    captured: bool = True


@dataclass
class Reference:
    """One call of the module as written: its inputs, its results, and these in float64."""

    given: list[Tensor]
    own: dict[str, Tensor]
    exact: dict[str, Tensor]
    other: dict[str, Tensor] | None = None
    off: dict[str, list[Errors]] = field(default_factory=dict)


def judge(d: Draw, ways: Sequence[str], *, dynamo: bool = True) -> Judged:
    """Hold the ways of a draw against float64. Without `dynamo` the function is traced, where sizes and types allow it."""
    out = Judged()
    try:
        model = Composed(d)
        calls = [_reference(d, model, p) for p in (d.queries, *([d.again] if d.again else []))]
    except RuntimeError as error:
        out.invalid = str(error).splitlines()[0]
        return out
    held: Ways
    if dynamo or d.again or d.autocast:
        torch._dynamo.reset()
        held = ByDynamo(model, ways)
    else:
        with torch.set_grad_enabled(d.grad != "none"):
            held = Traced(model, ways, _leaves(d, model, calls[0].given))
    try:
        for way in ("original", *ways):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _held(d, model, calls, held, way, out)
        out.captured = bool(held.captures)
    finally:
        held.close()
    out.findings = [replace(f, draw=as_data(d)) for f in out.findings]
    return out


def _held(d: Draw, model: Composed, calls: Sequence[Reference], held: Ways, way: str, out: Judged) -> None:
    held.way = way
    for number, call in enumerate(calls):
        try:
            got = _outputs(d, model, call.given, held.run)
        except Exception as error:
            out.findings.append(Finding("raised", way, f"call {number}", f"{type(error).__name__}: {str(error)[:400]}"))
            break
        again = f" of call {number}" if number else ""
        for name, value in got.items():
            wrong = _wrong(d, model, call, name, value)
            if wrong:
                out.findings.append(Finding(wrong[0], way, name + again, wrong[1]))
    for made in held.made(way):
        _noted(made, way, out)


def _noted(made: Rewritten, way: str, out: Judged) -> None:
    out.kernels[way] = out.kernels.get(way, ()) + made.kernels
    out.fallbacks[way] = out.fallbacks.get(way, 0) + sum(made.fallbacks.values())
    if made.error:
        out.findings.append(Finding("defect", way, "rewrite", made.error[:400]))
    for check in made.checks:
        if check.verdict == "unchecked":
            out.unchecked.append(check.why)
        elif not check.ok:
            kind = "alarm" if check.verdict == "differs" else "raised"
            out.findings.append(Finding(kind, way, "net", check.why))


# --- the module as written ------------------------------------------------------------------------------------------


def _reference(d: Draw, model: Composed, queries: int) -> Reference:
    keys = queries if not d.keys else d.keys if queries == d.queries else d.keys + 4
    given = list(inputs(d, queries, keys).values())
    return Reference(given, *_both(d, model, given))


def _moved(d: Draw, model: Composed, call: Reference) -> dict[str, Tensor]:
    """The exact results where every input and parameter is one unit more or less."""
    if call.other is None:
        noted = Composed(d)
        noted.mode = "noted"
        noted.begin()
        _outputs(d, noted, call.given)
        wide = noted.widened()
        names = list(wide.w)
        values = moved([*call.given, *(model.w[n].detach() for n in names)])
        with torch.no_grad():
            for n, v in zip(names, values[len(call.given) :]):
                wide.w[n].copy_(v)
        wide.begin()
        call.other = _outputs(d, wide, [_double(x) for x in values[: len(call.given)]])
    return call.other


def _drawn(d: Draw, model: Composed, call: Reference) -> dict[str, list[Errors]]:
    """The own errors, by name, where every input and parameter is moved within its type."""
    if not call.off:
        for seed in range(DRAWS):
            noted = Composed(d)
            values = redrawn([*call.given, *(p.detach() for p in noted.w.values())], seed)
            with torch.no_grad():
                for p, v in zip(noted.w.values(), values[len(call.given) :]):
                    p.copy_(v)
            given = values[: len(call.given)]
            own, exact = _both(d, noted, given)
            for name in own:
                call.off.setdefault(name, []).append(errors(own[name], own[name], exact[name], CANCELLED))
    return call.off


def _flat(d: Draw, model: Composed, call: Reference, name: str, share: float) -> list[Tensor]:
    """A gradient where this share of its input or parameter, and of any other one beside it, is so small that no softmax is
    saturated and nothing cancels: a bias may be small beside scores that are large."""
    kind, _, at = name.removeprefix("gradient of ").partition(" ")
    mine, seen = at if kind == "parameter" else kind, []
    for other in (mine, *model.weights, *(n for n, x in zip(model.names, call.given) if x.is_floating_point())):
        noted, small = Composed(d), {mine, other}
        with torch.no_grad():
            for n in small.intersection(noted.w):
                noted.w[n].mul_(share)
        given = [x * share if n in small and x.is_floating_point() else x for n, x in zip(model.names, call.given)]
        seen.append(_both(d, noted, given)[1][name])
    return seen


def _both(d: Draw, model: Composed, given: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of the module as written, and these in float64."""
    model.mode = "noted"
    model.begin()
    own = _outputs(d, model, given)
    model.mode = "own"
    wide = model.widened()
    wide.begin()
    return own, _outputs(d, wide, [_double(x) for x in given])


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _leaves(d: Draw, model: Composed, given: Sequence[Tensor]) -> list[Tensor]:
    """Inputs of a call of their own; those that get a gradient are marked, and the module's parameters too."""
    model.requires_grad_(d.grad == "all")
    leaves = [x.detach().clone() for x in given]
    for n, x in zip(model.names, leaves):
        if d.grad != "none" and x.is_floating_point() and not n.startswith(("padding", "additive")):
            x.requires_grad_()
    return leaves


def _outputs(
    d: Draw, model: Composed, given: Sequence[Tensor], run: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    """The result of `run`, or of the module itself, and the gradients that the draw wants, by name."""
    leaves = _leaves(d, model, given)
    with _autocast(d, model), torch.set_grad_enabled(d.grad != "none"):
        out = (run or model)(*leaves)
    if d.grad == "none":
        return {"result": out.clone()}
    wanted = {n: x for n, x in zip(model.names, leaves) if x.requires_grad}
    wanted |= {f"parameter {n}": p for n, p in model.w.items() if p.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), _flow(d, out), allow_unused=True)
    return {"result": out.detach()} | {
        f"gradient of {n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), found)
    }


def _flow(d: Draw, out: Tensor) -> Tensor:
    """What flows back into the result."""
    generator = torch.Generator().manual_seed(d.seed)
    return torch.randn(out.shape, generator=generator).to(TYPES[d.dtype]).to(out.dtype)


@contextlib.contextmanager
def _autocast(d: Draw, model: Composed) -> Iterator[None]:
    if not d.autocast or model.mode == "wide":
        yield
        return
    with torch.autocast("cpu", dtype=TYPES[d.autocast]):
        yield


# --- the rule ---------------------------------------------------------------------------------------------------------


def _wrong(d: Draw, model: Composed, call: Reference, name: str, got: Tensor) -> tuple[str, str] | None:
    own, exact = call.own[name], call.exact[name]
    if got.dtype != own.dtype or got.shape != own.shape:
        return "shape", f"{got.dtype} {list(got.shape)} for {own.dtype} {list(own.shape)}"
    if d.autocast:
        # What is computed in 16 bits is as right as 16 bits are, whatever type holds it.
        got, own = (x.to(TYPES[d.autocast]) for x in (got, own))
    e = errors(got, own, exact)
    gradient = name != "result"
    unseen = beside(float(d.fill), own.dtype) if d.mask != "none" and d.fill.startswith("-1e") else 0.0
    if _right(e, (unseen, unseen), gradient):
        return None
    if e.odd or not (
        _right(e, change(exact, _moved(d, model, call)[name]), gradient)
        or _right(e, drawn(_drawn(d, model, call)[name], LONGER if gradient else 1.0), gradient)
        or (gradient and drowned(got, exact, list(zip(*(_flat(d, model, call, name, x) for x in (FLAT, FLAT / 2))))))
        or (gradient and vanishing(got, exact, float((_flow(d, call.own["result"]) * call.own["result"]).double().norm())))
    ):
        return "wrong", str(e)
    return None


def _right(e: Errors, yardstick: tuple[float, float], gradient: bool) -> bool:
    if not gradient:
        return e.within(yardstick)
    rms, largest = max(e.own_rms, e.floor), max(e.own_largest, e.floor)
    return e.within((max(LONGER * rms, yardstick[0]), max(LONGER * MAX_RATIO * largest, yardstick[1])))


def judged_alone(d: Draw, finding: Finding, *, dynamo: bool) -> bool:
    """Is the finding there in this draw as well?"""
    ways = (finding.way,) if finding.way != "original" else ()
    return any(f.same(finding) for f in judge(d, ways, dynamo=dynamo).findings)
