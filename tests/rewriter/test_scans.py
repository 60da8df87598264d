"""Unrolled loops: folded into one body, lifted into a recurrence that computes the same, run by our scan; others are named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reattend
from reattend.codegen.cpu.scan import ScanKernel, build
from reattend.patterns.evaluate import evaluate
from reattend.rewriter.choose.scans import scans
from reattend.rewriter.fold.loop import loops
from reattend.rewriter.fold.recurrences import FoundScan, lifted
from reattend.rewriter.graph.functional import functional
from reattend.rewriter.graph.liveness import erase_dead
from tests.tiers import pairs

from .helpers import graph_of, values_of

pytestmark = pytest.mark.thin(3)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def selective(a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A state a channel and entry, [b,d,t,n]; what a step gives contracts it."""
    out = []
    for t in range(a.shape[2]):
        s = a[:, :, t] * s + b[:, :, t]
        out.append((s @ c[:, t, :, None])[..., 0])
    return torch.stack(out, -1), s


def gated_unit(a: Tensor, x: Tensor) -> Tensor:
    """States written one by one into zeros."""
    h = torch.zeros_like(x[:, 0])
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        out[:, t] = h
    return out * 1


def log_sum(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """A weighted mean under a running maximum, whose own state decays."""
    m, n, d = torch.full_like(k[:, 0], -1e38), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
    out = torch.zeros_like(v)
    for t in range(k.shape[1]):
        q = torch.maximum(m, k[:, t] + u)
        e, f = torch.exp(m - q), torch.exp(k[:, t] + u - q)
        out[:, t] = (e * n + f * v[:, t]) / (e * d + f)
        q = torch.maximum(m + w, k[:, t])
        e, f = torch.exp(m + w - q), torch.exp(k[:, t] - q)
        m, n, d = q, e * n + f * v[:, t], e * d + f
    return out * 1


def outer(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A matrix state under a decay a head: S' = g S + k vᵀ, o = S'ᵀ q."""
    s = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    out = []
    for t in range(k.shape[2]):
        s = g[:, :, t, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((s * q[:, :, t, :, None]).sum(-2))
    return torch.stack(out, 2)


def delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A delta rule: what the state holds at a key is taken off before its value is written."""
    s = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    out = []
    for t in range(k.shape[2]):
        s = g[:, :, t, None, None] * s
        s = s + k[:, :, t, :, None] @ (v[:, :, t, None, :] - k[:, :, t, None, :] @ s)
        out.append(q[:, :, t, None, :] @ s)
    return torch.cat(out, 2)


def inputs(name: str, t: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(t)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if name == "selective":
        return draw(2, 5, t, 3).sigmoid(), draw(2, 5, t, 3), draw(2, t, 3), draw(2, 5, 3)
    if name == "gated_unit":
        return draw(2, t, 7).sigmoid(), draw(2, t, 7)
    if name == "log_sum":
        return 3 * draw(2, t, 7), draw(2, t, 7), -draw(7).exp(), draw(7)
    return draw(2, 3, t, 4), draw(2, 3, t, 4) / 4, draw(2, 3, t, 6), draw(2, 3, t).sigmoid()


CASES: dict[str, Function] = {
    "selective": selective, "gated_unit": gated_unit, "log_sum": log_sum, "outer": outer, "delta": delta,
}


def found(fn: Function, args: tuple[Tensor, ...]) -> tuple[FoundScan, dict[str, Tensor], dict[str, Tensor]]:
    """The one recurrence of a function, its inputs, and what the function computes for its results."""
    gm = graph_of(fn, args)
    gm = functional(gm) or gm
    erase_dead(gm)
    values = values_of(gm, list(args))
    (loop,), failed = loops(gm.graph)
    assert not failed
    out = lifted(loop)
    assert isinstance(out, FoundScan), out
    return out, {n: values[x] for n, x in out.tensors.items()}, {n: values[x] for n, x in out.results.items()}


def last(name: str, value: Tensor) -> Tensor:
    return value[..., -1] if name.startswith("S") else value


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("t", [3, 9])
def test_a_loop_is_the_recurrence_that_it_computes(name: str, t: int) -> None:
    scan, given, want = found(CASES[name], inputs(name, t))
    got = evaluate(scan.recurrence.cascade, given)
    assert scan.steps == t
    for n, x in want.items():
        assert (last(n, got[n]).reshape(x.shape) - x).abs().max() <= 1e-14 * x.abs().max()


@pytest.mark.parametrize(("name", "t"), [
    *((n, 9) for n in CASES),
    # more than one chunk of steps
    *(pytest.param(n, t, marks=pytest.mark.slow) for n in CASES for t in (37, 64, 130, 200)),
])
def test_our_scan_is_the_loop_in_float64(name: str, t: int) -> None:
    scan, given, want = found(CASES[name], inputs(name, t))
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel), kernel
    got = dict(zip(kernel.outputs, kernel.entry(*(given[n] for n in kernel.inputs))))
    for n, x in want.items():
        assert (got[n] - x).abs().max() <= 1e-14 * x.abs().max()


def test_what_a_step_does_to_a_state_is_read_off_its_term() -> None:
    laws = {n: [s.law for s in found(CASES[n], inputs(n, 5))[0].recurrence.states] for n in CASES}
    assert laws == {
        "selective": ["factor"], "gated_unit": ["factor"], "log_sum": ["maximum", "factor", "factor"],
        "outer": ["factor"], "delta": ["matrix"],
    }
    assert found(delta, inputs("delta", 5))[0].recurrence.traits == {"decay", "delta"}
    assert found(outer, inputs("outer", 5))[0].recurrence.traits == {"decay"}


# --- known answers ------------------------------------------------------------------------------------------------


def wave(a: float, *shape: int) -> Tensor:
    return torch.sin(a * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape)


def test_known_answer_of_a_selective_state() -> None:
    x, dt, b, c, d = wave(0.7, 1, 5, 33), wave(0.9, 1, 5, 33), wave(1.1, 1, 3, 33), wave(1.3, 1, 3, 33), wave(0.5, 5)
    dt = torch.nn.functional.softplus(dt)
    a = torch.exp(-torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * dt[..., None])
    added = dt[..., None] * b.transpose(1, 2)[:, None] * x[..., None]
    scan, given, _ = found(selective, (a, added, c.transpose(1, 2), torch.zeros(1, 5, 3, dtype=torch.float64)))
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel)
    y, s = kernel.entry(*(given[n] for n in kernel.inputs))
    y = y + x * d[:, None]
    assert [y.sum().item(), (y**2).sum().item()] == pytest.approx([21.6110350454, 148.9758465684], abs=1e-9)
    assert [s.sum().item(), (s**2).sum().item()] == pytest.approx([0.6141517314, 3.0218102181], abs=1e-9)


def test_known_answer_of_a_gated_unit_with_resets() -> None:
    a = 0.5 + 0.5 * wave(0.9, 1, 33, 5)
    a[:, [0, 20]] = 0.0
    scan, given, _ = found(gated_unit, (a, wave(0.7, 1, 33, 5)))
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel)
    h, end = kernel.entry(*(given[n] for n in kernel.inputs))
    assert [h.sum().item(), (h**2).sum().item()] == pytest.approx([5.2234291332, 47.6095020267], abs=1e-9)
    assert [end.sum().item(), (end**2).sum().item()] == pytest.approx([1.1288218863, 0.8559320673], abs=1e-9)


# --- what is no loop, or none that we run -------------------------------------------------------------------------


def reads_its_number(x: Tensor) -> Tensor:
    s, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        s = s * t + x[:, t]
        out.append(s)
    return torch.stack(out, 1)


def squares(x: Tensor) -> Tensor:
    s, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        s = s * s + x[:, t]
        out.append(s)
    return torch.stack(out, 1)


def chooses(x: Tensor) -> Tensor:
    s, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        s = torch.where(x[:, t] > 0, s, 0.0) + x[:, t]
        out.append(s)
    return torch.stack(out, 1)


@pytest.mark.parametrize(("fn", "why"), [
    (reads_its_number, "reads its own number"), (squares, "neither scaled and added to"), (chooses, "neither scaled"),
])
def test_another_kind_of_recurrence_is_named_once(fn: Function, why: str) -> None:
    gm = graph_of(fn, (torch.randn(2, 9, 4),))
    found_, misses = scans(gm.graph, Counter())
    assert not found_
    (miss,) = misses
    assert "a recurrence of another kind" in miss.reason
    assert why in miss.reason


def test_a_value_of_one_step_that_is_read_outside_is_no_result() -> None:
    def fn(a: Tensor, x: Tensor) -> Tensor:
        h, kept = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            kept.append(h)
        return torch.stack(kept, 1) + kept[3][:, None]

    _, (miss,) = scans(graph_of(fn, (torch.rand(2, 9, 4), torch.rand(2, 9, 4))).graph, Counter())
    assert "read by" in miss.reason


def test_layers_that_hand_on_a_value_are_no_recurrence() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(6):
            x = x + torch.relu(x @ w)
        return x

    found_, misses = scans(graph_of(fn, (torch.randn(4, 4), torch.randn(4, 4))).graph, Counter())
    assert not found_
    assert not misses


# --- where a step's number stands, and what is put together -------------------------------------------------------


def dimensions(x: Tensor, a: Tensor) -> Tensor:
    """The number of a step is the dimension that is read, not an index."""
    s, out = torch.zeros_like(a), []
    for t in range(4):
        s = a * s + x.select(t, 1)
        out.append(s)
    return torch.stack(out)


def written_across(x: Tensor, a: Tensor) -> Tensor:
    """The number of a step is the dimension that is written."""
    h, out = torch.zeros_like(x[0]), torch.zeros_like(x)
    for t in range(3):
        h = a[t] * h + x[t]
        out.select(t, 0).copy_(h)
    return out * 1


def ends_behind(x: Tensor, a: Tensor) -> Tensor:
    """Pieces that end behind their tensor are cut off there, each at the same place."""
    s, out = torch.zeros_like(a), []
    for t in range(5):
        s = a * s + x[:, 2 : 100 + t]
        out.append(s)
    return torch.stack(out)


def last_is_shorter(x: Tensor, a: Tensor) -> Tensor:
    """The last piece of a tensor is what is left of it."""
    s = torch.zeros_like(a)
    for t in range(0, x.shape[1], 4):
        s = a * s + x[:, t : t + 4].sum(1)
    return s * 2


def laid_twice(x: Tensor, a: Tensor) -> Tensor:
    """The same values side by side along two dimensions, and in memory that is written."""
    s, out, made = torch.zeros_like(x[:, 0]), [], torch.zeros_like(x)
    for t in range(x.shape[1]):
        s = a[:, t] * s + x[:, t]
        out.append(s)
        made[:, t] = s
    laid = [torch.stack(out, 1), torch.stack(out, -1), torch.stack(out), made]
    return torch.cat([y.flatten() for y in laid])


def plain(x: Tensor, a: Tensor) -> Tensor:
    s, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        s = a[:, t] * s + x[:, t]
        out.append(s)
    return torch.cat([torch.stack(out, 1), s[:, None]], 1)


@pytest.mark.parametrize(("fn", "x", "a", "ours"), [
    (dimensions, (4, 4, 4, 4), (4, 4, 4), False), (written_across, (3, 3, 3), (3, 3), False),
    (ends_behind, (2, 7), (2, 5), False), (last_is_shorter, (2, 10, 5), (2, 5), True), (laid_twice, (2, 9, 5), (2, 9, 5), True),
    (plain, (1, 9, 1), (1, 9, 1), True), (plain, (2, 9, 0), (2, 9, 0), True),
])
def test_a_loop_is_what_it_computes_without_the_net(
    fn: Function, x: tuple[int, ...], a: tuple[int, ...], ours: bool
) -> None:
    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            out = fn(*args)
            assert isinstance(out, Tensor)
            return out

    torch._dynamo.reset()
    torch.manual_seed(0)
    args = torch.randn(x), torch.rand(a)
    with torch.no_grad():
        want = Model()(*args)
        model = reattend.optimize(Model(), policy=reattend.Policy(deny=("original",), check="never", tune=False))
        torch.testing.assert_close(model(*args), want, rtol=1e-5, atol=1e-5)
    assert ("reattend" in reattend.report(model).kernels) == ours


# --- layers that attend -------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """Four layers whose weights lie in one tensor; or one layer four times, each time told which it is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.w = torch.nn.Parameter(torch.randn(4, 16, 48) / 4)
        self.e = torch.nn.Parameter(torch.randn(4, 16))

    def attend(self, x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x @ w).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        out: Tensor = x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for i in range(4):
            last = seen[-1]
            seen.append(self.attend(last + self.e[i], self.w[0]) if self.way == "shared" else self.attend(last, self.w[i]))
        return torch.stack(seen) if self.way == "all are read" else seen[-1]


@pytest.mark.parametrize("way", ["in one", "shared", "all are read"])
def test_attentions_of_layers_that_look_like_steps_are_found(way: str) -> None:
    plan = reattend.plan(Layers(way).eval(), (torch.randn(2, 9, 16),))
    assert [s.kind for s in plan.sites] == ["softmax"] * 4
    assert not plan.misses


# --- models -------------------------------------------------------------------------------------------------------


class Selective(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return selective(a, b, c, s)


def test_a_model_runs_our_scan_and_gets_both_results() -> None:
    args = tuple(x.float() for x in inputs("selective", 9))
    want = selective(*args)
    model = reattend.optimize(Selective().eval(), policy=reattend.Policy(tune=False, allow=("reattend",), deny=("original",)))
    with torch.no_grad():
        got = model(*args)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    report = reattend.report(model)
    assert [(s.kind, s.choice) for p in report.pieces if p.plan for s in p.plan.sites] == [("scan", "reattend")]
    assert [c.verdict for c in report.checks] == ["same"]
    reattend.restore(model)


@pytest.mark.slow
def test_a_long_loop_is_planned_without_recursion() -> None:
    plan = reattend.plan(Selective().eval(), tuple(x.float() for x in inputs("selective", 1000)))
    assert [s.kind for s in plan.sites] == ["scan"]
    assert not plan.misses


@pytest.mark.parametrize(
    ("name", "dtype"), pairs(3, ["selective", "gated_unit", "outer", "delta"], [torch.bfloat16, torch.float16, torch.float32])
)
def test_a_loop_that_is_optimised_is_no_farther_from_float64(name: str, dtype: torch.dtype) -> None:
    """In 16 bits as well: at most twice as far as the model's own steps, with no net to help."""

    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            out = CASES[name](*args)
            return torch.cat([x.flatten() for x in out]) if isinstance(out, tuple) else out

    args = tuple(x.to(dtype) for x in inputs(name, 9))
    torch._dynamo.reset()
    policy = reattend.Policy(deny=("original",), check="never")
    with torch.no_grad():
        own, exact = Model()(*args), Model()(*(x.double() for x in args))
        model = reattend.optimize(Model(), policy=policy)
        got = model(*args)
    assert "reattend" in reattend.report(model).kernels
    assert got.dtype == dtype
    errors = [float((x.double() - exact).abs().max()) for x in (got, own)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(exact.abs().max())
