"""Scans that are trained: gradients of every family against those of its own steps in float64, and of whole models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reattend
from reattend.codegen.cpu.scan import ScanKernel
from reattend.codegen.cpu.trained_scan import build_trained
from reattend.codegen.skeletons.backward.carried_backward import carried_trained, side_by_side_trained
from reattend.codegen.skeletons.backward.scan_backward import largest_trained
from reattend.codegen.skeletons.carried import one_by_one, rows_of
from reattend.patterns.verdict import Refusal
from tests.tiers import few

from . import test_scans as elements
from .test_matrix_scans import CASES, found, inputs


def close(got: Tensor | None, want: Tensor | None, within: float) -> bool:
    assert got is not None
    assert want is not None
    return bool((got - want).abs().max() <= within * want.abs().max())


@pytest.mark.parametrize(
    ("name", "t"),
    few([(n, t) for n in CASES for t in (1, 37, 64, 130)], ("gated_delta", 130), ("channel_delta", 37), ("lightning", 37)),
)
def test_gradients_are_those_of_the_own_steps(name: str, t: int) -> None:
    """Of all inputs and the first state, from what the steps give and the last state."""
    r, where, results = found(name, t)
    kernel = build_trained(r)
    assert isinstance(kernel, ScanKernel), kernel
    args = [x.requires_grad_() for x in inputs(name, t)]
    want = CASES[name](*args)
    g = torch.Generator().manual_seed(0)
    flows = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in want]
    exact = torch.autograd.grad(want, args, flows)
    given = [args[w] if w >= 0 else torch.exp(-args[-1 - w]) for w in where]
    made = dict(zip(kernel.outputs, kernel.entry(*given)))
    got = [made[n].reshape(x.shape) for n, x in zip(results, want)]
    for x, y in zip(got, want):
        assert close(x, y, 1e-13)
    for x, y in zip(torch.autograd.grad(got, args, flows), exact):
        assert close(x, y, 1e-12)


def draws(n: int, channels: bool, taken: str) -> tuple[list[Tensor], list[bool]]:
    """State, factors, u, x, rows of two queries and, where something is taken off, of a read; and which read after a step."""
    g = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    f = draw(n, 2, 3, 5 if channels else 1).sigmoid()
    u = torch.nn.functional.normalize(draw(n, 2, 3, 5), dim=-1)
    args = [draw(2, 3, 5, 4), f, u, draw(n, 2, 3, 4), draw(n, 2, 3, 5), draw(n, 2, 3, 5)]
    args += [u * 0.7 + 0.1 * draw(n, 2, 3, 5)] if taken else []
    return args, [True, False, *([taken == "faded"] if taken else [])]


def both(args: list[Tensor], after: list[bool], logarithms: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What steps at once and steps one by one give: the last state, then the queries' reads."""
    s, f, u, x, *rows = args
    asked = list(zip(rows, after))
    read = asked[2] if len(asked) > 2 else None
    new, reads = carried_trained(s, f, u, x, read, asked[:2], logarithms)
    flat = [(rows_of(q), y) for q, y in asked[:2]]
    off = (rows_of(read[0]), read[1]) if read is not None else None
    last, out = one_by_one(s.flatten(0, 1), rows_of(f.exp() if logarithms else f), rows_of(u), rows_of(x), off, flat)
    return [new.flatten(0, 1), *map(rows_of, reads)], [last, *out]


@pytest.mark.thin(3)
@pytest.mark.parametrize("n", [1, 13, 64])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("taken", ["", "faded", "unfaded"])
@pytest.mark.parametrize("logarithms", [False, True])
def test_gradients_at_once_are_gradients_one_by_one(n: int, channels: bool, taken: str, logarithms: bool) -> None:
    args, after = draws(n, channels, taken)
    if logarithms:
        args[1] = args[1].log() * 3
        args[1][n // 2] = -900.0
    else:
        # factors below 0 and of 0 are factors as well
        args[1][n // 2] = -args[1][n // 2]
        args[1][n // 3] = 0.0
    args = [x.requires_grad_() for x in args]
    got, want = both(args, after, logarithms)
    flows = [torch.randn_like(x) for x in want]
    for x, y in zip(torch.autograd.grad(got, args, flows), torch.autograd.grad(want, args, flows)):
        assert (x - y).abs().max() <= 1e-12 * max(float(y.abs().max()), 1.0)


@pytest.mark.parametrize("channels", [False, True])
def test_a_gradient_that_is_not_finite_reaches_no_step_behind_it(channels: bool) -> None:
    args, after = draws(20, channels, "faded")
    args[1] = args[1].log()
    args = [x.requires_grad_() for x in args]
    got, want = both(args, after, True)
    flows = [torch.randn_like(x) for x in want]
    flows[1][0, 11, 2] = float("nan")
    flows[2][3, 5, 1] = float("inf")
    for x, y in zip(torch.autograd.grad(got, args, flows), torch.autograd.grad(want, args, flows)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("n", [1, 13, 64])
@pytest.mark.parametrize("logarithms", [False, True])
def test_gradients_of_matrices_side_by_side_are_those_of_each_apart(n: int, logarithms: bool) -> None:
    g = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    f = draw(n, 2, 3).sigmoid()
    f[n // 3] = 0.01 if logarithms else 0.0
    args = [draw(2, 5, 3, 4), f.log() if logarithms else f, draw(n, 2, 5), draw(n, 2, 3, 4), draw(n, 2, 5), draw(n, 2, 5)]
    args = [x.requires_grad_() for x in args]
    s, f, u, x, *rows = args
    after = [True, False]
    new, reads = side_by_side_trained(s, f, u, x, list(zip(rows, after)), logarithms)
    wide = [y[:, :, None].expand(n, 2, 3, 5) for y in (u, *rows)]
    factor = (f.exp() if logarithms else f)[..., None]
    last, want = carried_trained(s.transpose(1, 2), factor, wide[0], x, None, list(zip(wide[1:], after)))
    flows = [torch.randn_like(y) for y in (new, *reads)]
    got = torch.autograd.grad([new, *reads], args, flows)
    for y, z in zip(got, torch.autograd.grad([last.transpose(1, 2), *want], args, flows)):
        assert (y - z).abs().max() <= 1e-12 * max(float(z.abs().max()), 1.0)


@pytest.mark.parametrize(
    ("name", "t"),
    few(
        [(n, t) for n in ("selective", "gated_unit", "log_sum") for t in (9, 40, 130)], ("log_sum", 9), ("selective", 40)
    ),
)
def test_gradients_of_elements_are_those_of_the_own_steps(name: str, t: int) -> None:
    args = elements.inputs(name, t)
    scan, given, want = elements.found(elements.CASES[name], args)
    kernel = build_trained(scan.recurrence)
    assert isinstance(kernel, ScanKernel), kernel
    leaves = [x.requires_grad_() for x in args]
    own = elements.CASES[name](*leaves)
    own = own if isinstance(own, tuple) else (own,)
    flows = [torch.randn_like(x) for x in own]
    exact = torch.autograd.grad(own, leaves, flows)
    # what the loop reads is an argument, or is computed from none
    read = [next((x for x in leaves if x.shape == given[n].shape and bool((x == given[n]).all())), given[n]) for n in kernel.inputs]
    made = dict(zip(kernel.outputs, kernel.entry(*read)))
    got = [made[n].reshape(x.shape) for n, x in want.items()]
    for x, y in zip(torch.autograd.grad(got, leaves, flows), exact):
        assert close(x, y, 1e-12)


def test_what_reaches_a_running_maximum_is_what_reaches_torch_maximum() -> None:
    """Ties are halved, and what is not finite stays where it is not selected."""
    s, f, b = torch.zeros(3), torch.zeros(4, 3), torch.tensor([[0.0, 1, -1], [0, 2, -2], [1, 2, -1], [-1, 0, 3]])
    args = [x.requires_grad_() for x in (s, f, b)]
    got, want, state = largest_trained(*args), [], s
    for t in range(4):
        state = torch.maximum(state + f[t], b[t])
        want.append(state)
    flow = torch.randn(4, 3)
    flow[3, 2] = float("nan")
    for x, y in zip(torch.autograd.grad(got, args, flow), torch.autograd.grad(torch.stack(want), args, flow)):
        torch.testing.assert_close(x, y, equal_nan=True)


# --- models -------------------------------------------------------------------------------------------------------


class Trained(torch.nn.Module):
    """A layer of a gated delta rule with learned decays; `way` says what is done to it."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.maps, self.decay = way, torch.nn.Linear(12, 3 * 2 * 5 + 2 * 2), torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.maps(x)
        q, k, v = made[..., :30].view(*x.shape[:2], 3, 2, 5).permute(2, 0, 3, 1, 4)
        a, b = made[..., 30:].view(*x.shape[:2], 2, 2).permute(2, 0, 3, 1)
        g, beta = -self.decay.exp()[:, None] * torch.nn.functional.softplus(a), b.sigmoid()
        k = torch.nn.functional.normalize(k, dim=-1)
        s = torch.zeros(x.shape[0], 2, 5, 5)
        out = []
        for t in range(x.shape[1]):
            s = s * g[:, :, t].exp()[..., None, None]
            row = k[:, :, t].detach() if self.way == "cut" else k[:, :, t]
            taken = (s * row[..., None]).sum(-2)
            s = s + k[:, :, t, :, None] * ((v[:, :, t] - taken) * beta[:, :, t, None])[:, :, None]
            out.append((s * q[:, :, t, :, None]).sum(-2))
        return torch.stack(out, 2), s


def optimized(model: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return reattend.optimize(model, policy=reattend.Policy(tune=False, deny=("original",)))


def test_a_model_is_trained_through_our_scan() -> None:
    """The first call is held against the own code, gradients included; the second derivative is the own code's."""
    x = torch.randn(2, 9, 12, requires_grad=True)
    own, model = Trained(), optimized(Trained())
    for step in range(2):
        found = []
        for m in (own, model):
            y, s = m(x)
            leaves = [x, *m.parameters()]
            first = torch.autograd.grad(y.square().sum() + s.sin().sum(), leaves, create_graph=step == 1)
            found.append([*first, *(torch.autograd.grad(first[0].square().sum(), leaves) if step else ())])
        for a, b in zip(*found):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    report = reattend.report(model)
    assert [(s.kind, s.choice) for p in report.pieces if p.plan for s in p.plan.sites] == [("scan", "reattend")]
    assert report.checks[0].gradients
    assert {c.verdict for c in report.checks} == {"same"}


def test_gradients_of_several_flows_at_once_are_the_own_codes() -> None:
    x = torch.randn(2, 9, 12, requires_grad=True)
    flows = torch.randn(3, 2, 2, 9, 5)
    found = []
    for m in (Trained(), optimized(Trained())):
        y, _ = m(x)
        leaves = [x, *m.parameters()]
        found.append(torch.autograd.grad(y, leaves, flows, is_grads_batched=True, retain_graph=True))
        # and then one flow again
        found[-1] += torch.autograd.grad(y, leaves, flows[0])
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_where_a_gradient_is_cut_the_own_steps_stay() -> None:
    model = optimized(Trained("cut"))
    model(torch.randn(2, 9, 12, requires_grad=True))
    (site,) = [s for p in reattend.report(model).pieces if p.plan for s in p.plan.sites]
    assert site.choice == "original"
    assert "a gradient is cut" in next(c.why for c in site.candidates if c.name == "reattend")


def clamped(a: Tensor, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t].clamp(min=0.0)
        out.append(h)
    return torch.stack(out, 1)


def test_a_clamp_has_a_derivative_of_its_own() -> None:
    scan, _, _ = elements.found(clamped, elements.inputs("gated_unit", 9))
    no = build_trained(scan.recurrence)
    assert isinstance(no, Refusal)
    assert "clamp" in no.reason
