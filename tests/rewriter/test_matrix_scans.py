"""Carried matrices: token loops of linear attention and delta rules, read as products of rows, run by matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.codegen.cpu.scan import ScanKernel, build
from reattend.codegen.skeletons.carried import carried, one_by_one, rows_of, solved
from reattend.patterns.cascade import Cascade
from reattend.patterns.recurrence.low_rank import LowRank, low_rank
from reattend.patterns.recurrence.recurrence import Recurrence, recurrence
from reattend.rewriter.fold.loop import loops
from reattend.rewriter.fold.recurrences import FoundScan, lifted
from reattend.rewriter.graph.functional import functional
from reattend.rewriter.graph.liveness import erase_dead
from tests.tiers import few, pairs

from .helpers import graph_of

pytestmark = pytest.mark.thin(3)

Results = tuple[Tensor, Tensor]
# Steps of the loop that is folded; no other size.
FOLDED = 11


def plain(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Results:
    """S' = S + k vᵀ, o = S'ᵀ q, written with matrix products."""
    out = []
    for t in range(q.shape[2]):
        s = s + k[:, :, t : t + 1].transpose(-1, -2) @ v[:, :, t : t + 1]
        out.append(q[:, :, t : t + 1] @ s)
    return torch.cat(out, 2), s


def lightning(q: Tensor, k: Tensor, v: Tensor, s: Tensor, slope: Tensor) -> Results:
    """One decay a head for all steps."""
    ratio, out = torch.exp(-slope), []
    for t in range(q.shape[2]):
        s = ratio * s + k[:, :, t : t + 1].transpose(-1, -2) @ v[:, :, t : t + 1]
        out.append(q[:, :, t : t + 1] @ s)
    return torch.cat(out, 2), s


def states(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> Results:
    """Mamba-2's steps: a state [value, key], a decay a head and step, a rest that reads no state."""
    out = []
    for t in range(x.shape[2]):
        s = s * torch.exp(dt[:, :, t] * a)[..., None, None] + (dt[:, :, t, None] * x[:, :, t])[..., None] * b[:, :, t, None]
        out.append((s * c[:, :, t, None]).sum(-1) + 2.0 * x[:, :, t])
    return torch.stack(out, 2), s


def receptance(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, s: Tensor) -> Results:
    """RWKV-6's steps: a decay a channel, the state read before it changes, a bonus for the step's own value."""
    out = []
    for t in range(q.shape[2]):
        kv = k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, :, None] * s).sum(-2) + (q[:, :, t] * u * k[:, :, t]).sum(-1)[..., None] * v[:, :, t])
        s = torch.exp(g[:, :, t])[..., None] * s + kv
    return torch.stack(out, 2), s


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> Results:
    """Gated delta rule."""
    out = []
    for t in range(q.shape[2]):
        s = s * g[:, :, t].exp()[..., None, None]
        taken = (s * k[:, :, t, :, None]).sum(-2)
        s = s + k[:, :, t, :, None] * ((v[:, :, t] - taken) * beta[:, :, t, None])[:, :, None]
        out.append((s * q[:, :, t, :, None]).sum(-2))
    return torch.stack(out, 2), s


def channel_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> Results:
    """Delta rule under a decay a channel."""
    out = []
    for t in range(q.shape[2]):
        s = s * g[:, :, t].exp()[..., None]
        taken = (s * k[:, :, t, :, None]).sum(-2)
        s = s + k[:, :, t, :, None] * ((v[:, :, t] - taken) * beta[:, :, t, None])[:, :, None]
        out.append((s * q[:, :, t, :, None]).sum(-2))
    return torch.stack(out, 2), s


CASES: dict[str, Callable[..., Results]] = {
    "plain": plain, "lightning": lightning, "states": states, "receptance": receptance, "gated_delta": gated_delta,
    "channel_delta": channel_delta,
}


def inputs(name: str, t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(t)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, v = draw(2, 3, t, 4), draw(2, 3, t, 6)
    k = torch.nn.functional.normalize(draw(2, 3, t, 4), dim=-1)
    s, one, many = draw(2, 3, 4, 6), -draw(2, 3, t).exp(), -draw(2, 3, t, 4).exp()
    given = {
        "plain": (q, k, v, s), "lightning": (q, k, v, s, draw(3, 1, 1).sigmoid()),
        "states": (v, draw(2, 3, t).exp(), -draw(3).exp(), k, q, s.mT.contiguous()),
        "receptance": (q, k, v, many, draw(3, 4), s),
        "gated_delta": (q, k, v, one, draw(2, 3, t).sigmoid(), s),
        "channel_delta": (q, k, v, many, draw(2, 3, t).sigmoid(), s),
    }
    return tuple(x.to(dtype) for x in given[name])


@cache
def folded(name: str, dtype: torch.dtype) -> tuple[Cascade, tuple[int, ...], tuple[str, ...]]:
    """The recurrence of a case's loop, which arguments its inputs are, and which outputs the two results are."""
    args = inputs(name, FOLDED, dtype)
    gm = graph_of(CASES[name], args)
    gm = functional(gm) or gm
    erase_dead(gm)
    (loop,), failed = loops(gm.graph)
    assert not failed
    scan = lifted(loop)
    assert isinstance(scan, FoundScan), scan
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    c = scan.recurrence.cascade
    return c, tuple(_same(scan.tensors[x.name], given) for x in c.inputs), tuple(scan.results)


def found(name: str, t: int, dtype: torch.dtype = torch.float64) -> tuple[Recurrence, tuple[int, ...], tuple[str, ...]]:
    """The same over t steps."""
    c, where, results = folded(name, dtype)
    longer = {FOLDED: t, FOLDED + 1: t + 1}
    tensors = tuple(replace(x, shape=tuple(longer.get(int(str(n)), n) for n in x.shape)) for x in c.tensors)
    ranks = tuple(replace(x, size=t) if x.iterative else x for x in c.ranks)
    made = recurrence(replace(c, tensors=tensors, ranks=ranks))
    assert isinstance(made, Recurrence)
    return made, where, results


def _same(node: torch.fx.Node, given: list[torch.fx.Node]) -> int:
    """Which argument a node is; −1 − i for exp(−argument i)."""
    if node in given:
        return given.index(node)
    return -1 - next(i for i, n in enumerate(given) if n in node.args[0].all_input_nodes)  # type: ignore[union-attr]


def run(name: str, args: tuple[Tensor, ...]) -> Results:
    """What our scan computes for the arguments of a case."""
    t = args[0].shape[2]
    r, where, results = found(name, t, args[0].dtype)
    kernel = build(r)
    assert isinstance(kernel, ScanKernel), kernel
    assert list(kernel.forms) == ["S"]
    given = [args[i] if i >= 0 else torch.exp(-args[-1 - i]) for i in where]
    got = dict(zip(kernel.outputs, kernel.entry(*given)))
    return got[results[0]], got[results[1]]


@pytest.mark.parametrize(("name", "t"), pairs(4, CASES, [130, 1, 37, 64, 200]))
def test_matrix_products_are_the_steps_in_float64(name: str, t: int) -> None:
    args = inputs(name, t)
    for x, want in zip(run(name, args), CASES[name](*args)):
        assert x.shape == want.shape
        assert (x - want).abs().max() <= 1e-14 * want.abs().max()


def test_what_a_step_does_is_read_off_its_term() -> None:
    forms = {}
    for name in CASES:
        r, _, _ = found(name, 5)
        form = low_rank(r, r.states[0])
        assert isinstance(form, LowRank), form
        forms[name] = (form.read is not None, form.key in form.factor.ranks, [x.after for x in form.reads])
    assert forms == {
        "plain": (False, False, [True]), "lightning": (False, False, [True]), "states": (False, False, [True]),
        "receptance": (False, True, [False]), "gated_delta": (True, False, [True]), "channel_delta": (True, True, [True]),
    }


@pytest.mark.parametrize(
    ("name", "decay"), pairs(4, ["gated_delta", "channel_delta", "receptance"], [-float("inf"), 0.0, -1e-6, -1000.0, -100.0])
)
def test_decays_may_be_as_strong_as_they_like(name: str, decay: float) -> None:
    """A decay of −∞ forgets all that was before; every second channel keeps all where channels decay apart."""
    args = list(inputs(name, 150))
    args[3] = torch.full_like(args[3], decay)
    if name != "gated_delta":
        args[3][..., 1::2] = 0.0
    for x, want in zip(run(name, tuple(args)), CASES[name](*args)):
        assert want.isfinite().all()
        assert (x - want).abs().max() <= 1e-14 * want.abs().max()
    low = tuple(x.float() for x in args)
    for x, want in zip(run(name, low), CASES[name](*args)):
        assert (x - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_reaches_no_step_before_it(name: str) -> None:
    args = inputs(name, 40)
    value = args[0] if name == "states" else args[2]
    value[0, 1, 17, 2] = float("nan")
    for x, want in zip(run(name, args), CASES[name](*args)):
        torch.testing.assert_close(x, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("n", [1, 5, 8, 13, 64])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("taken", [False, True])
def test_steps_at_once_are_steps_one_by_one(n: int, channels: bool, taken: bool) -> None:
    g = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    s, x, f = draw(2, 3, 5, 4), draw(n, 2, 3, 4), draw(n, 2, 3, 5 if channels else 1).sigmoid()
    # decays below 0 and of 0 are decays as well
    f[n // 2] = -f[n // 2]
    f[n // 3] = 0.0
    u = torch.nn.functional.normalize(draw(n, 2, 3, 5), dim=-1)
    # with and without its own step's decay, as it is written and as it is known
    w = (u * 0.7, True) if taken and n % 2 else (f * u * 0.7, False) if taken else None
    queries = [(draw(n, 2, 3, 5), True), (draw(n, 2, 3, 5), False)]
    got, reads = carried(s, f, u, x, w, queries)
    flat = [(rows_of(q), after) for q, after in queries]
    off = None if w is None else (rows_of(w[0]), w[1])
    want, wanted = one_by_one(s.flatten(0, 1), rows_of(f), rows_of(u), rows_of(x), off, flat)
    torch.testing.assert_close(got.flatten(0, 1), want, rtol=1e-13, atol=1e-13)
    for a, b in zip(reads, wanted):
        torch.testing.assert_close(rows_of(a), b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [1, 31, 64])
def test_logarithms_of_decays_are_the_decays(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    log = -torch.rand(n, 2, 1, generator=g, dtype=torch.float64).mul(4).exp()
    log[n // 2] = -1e6
    log[n // 3] = -torch.inf
    s, u, x, q = (torch.randn(*shape, generator=g) for shape in ((2, 5, 4), (n, 2, 5), (n, 2, 4), (n, 2, 5)))
    for after in (True, False):
        got = carried(s, log, u, x, None, [(q, after)], True)
        want = carried(s, log.exp(), u, x, None, [(q, after)])
        for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 32, 33, 64, 70])
def test_a_system_is_solved_in_blocks(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    a, x = (torch.randn(2, n, w, generator=g, dtype=torch.float64) for w in (n, 3))
    a, made = a / n, x.clone()
    # what is read of A is its strictly lower triangle
    want = torch.linalg.solve(torch.eye(n, dtype=torch.float64) + a.tril(-1), x)
    torch.testing.assert_close(solved(a, made), want, rtol=1e-13, atol=1e-13)


# --- what is none -------------------------------------------------------------------------------------------------


def turned(a: Tensor, s: Tensor) -> Tensor:
    """A step that multiplies by a whole matrix."""
    for t in range(a.shape[0]):
        s = a[t] @ s + 1.0
    return s * 1


def two_rows(k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Two outer products a step, after one of which the state is read."""
    for t in range(k.shape[0]):
        s = s + k[t, :, None] * (v[t] - (s * k[t, :, None]).sum(0)) + v[t, :, None] * k[t]
    return s * 1


@pytest.mark.parametrize(("fn", "args", "why"), [
    (turned, (torch.randn(FOLDED, 4, 4), torch.randn(4, 4)), "adds more than one outer product|no outer product|no single rank"),
    (two_rows, (torch.randn(FOLDED, 4), torch.randn(FOLDED, 4), torch.randn(4, 4)), "more than one outer product"),
])
def test_a_state_that_is_contracted_in_another_way_has_no_kernel(
    fn: Callable[..., Tensor], args: tuple[Tensor, ...], why: str
) -> None:
    (loop,), _ = loops(graph_of(fn, args).graph)
    scan = lifted(loop)
    assert isinstance(scan, FoundScan), scan
    kernel = build(scan.recurrence)
    assert "contracts its state" in str(kernel)
    assert any(w in str(kernel) for w in why.split("|")), kernel


# --- models -------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Tensor) -> Results:
        return CASES[self.name](*args)


@pytest.mark.parametrize(
    ("name", "dtype"),
    few(
        [(n, t) for n in ("lightning", "receptance", "gated_delta") for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
        ("receptance", torch.float32), ("gated_delta", torch.bfloat16),
    ),
)
def test_a_model_runs_our_scan_and_is_no_farther_from_float64(name: str, dtype: torch.dtype) -> None:
    args = inputs(name, 9, dtype)
    torch._dynamo.reset()
    own, exact = CASES[name](*args), CASES[name](*(x.double() for x in args))
    model = reattend.optimize(Model(name).eval(), policy=reattend.Policy(tune=False, deny=("original",)))
    with torch.no_grad():
        got = model(*args)
    report = reattend.report(model)
    assert [(s.kind, s.choice) for p in report.pieces if p.plan for s in p.plan.sites] == [("scan", "reattend")]
    assert [c.verdict for c in report.checks] == ["same"]
    for x, y, z in zip(got, own, exact):
        assert x.dtype == dtype
        errors = [float((a.double() - z).abs().max()) for a in (x, y)]
        assert errors[0] <= 2 * errors[1] + max(torch.finfo(dtype).eps, 1e-14) * float(z.abs().max())


def test_where_gradients_are_wanted_our_scan_is_trained() -> None:
    args = tuple(x.requires_grad_() for x in inputs("gated_delta", 9, torch.float32))
    model = reattend.optimize(Model("gated_delta"), policy=reattend.Policy(tune=False))
    o, s = model(*args)
    (o.sum() + s.sum()).backward()
    (site,) = [s for p in reattend.report(model).pieces if p.plan for s in p.plan.sites]
    assert site.choice == "reattend"
    assert site.traits == {"decay", "delta"}
    assert args[0].grad is not None


class Later(nn.Module):
    """Only the queries' length is walked: the others' stays open behind a second length."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        s, out = q.new_zeros(q.shape[0], 2, 8, 8), []
        for t in range(q.shape[2]):
            s = s * g[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((s * q[:, :, t, :, None]).sum(-2))
        return torch.stack(out, 2)


def test_a_second_length_runs_our_scan_as_well() -> None:
    torch._dynamo.reset()
    ours, own = reattend.optimize(Later(), policy=reattend.Policy(deny="original", tune=False)), Later()
    with torch.no_grad():
        for n in (24, 17):
            given = (*(torch.randn(2, 2, n, 8) for _ in range(3)), torch.rand(2, 2, n))
            torch.testing.assert_close(ours(*given), own(*given))
    report = reattend.report(ours)
    assert report.kernels == {"reattend": 2}
    assert {c.verdict for c in report.checks} == {"same"}
