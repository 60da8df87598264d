"""What is slower on the clock is not run: kernels beside their own code, whole calls beside the model as written. Clocks are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reattend
from reattend.cost_model.time.cost import Cost
from reattend.rewriter.run import contest
from reattend.rewriter.splice import race
from tests.tiers import few

pytestmark = pytest.mark.thin(2)

N = 512
OURS = reattend.Policy(allow="reattend", deny=("sdpa", "flex"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * self.scale).softmax(-1) @ v


def qkv(n: int = N) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, n, 16, generator=g) for _ in range(3)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def kernels(monkeypatch: pytest.MonkeyPatch, own: float, kernel: float) -> None:
    """In a race own code takes so many seconds, and the kernel so many."""
    times = itertools.cycle((own, kernel))

    def took(run: Callable[[], object]) -> float:
        run()
        return next(times)

    monkeypatch.setattr(race, "seconds", took)


def calls(monkeypatch: pytest.MonkeyPatch, written: float, rewritten: float) -> None:
    """In a contest calls take so many seconds, the first of them as written."""
    steps = itertools.cycle((0.0, written, 0.0, rewritten))
    clock = itertools.accumulate(steps)
    monkeypatch.setattr(contest, "now", lambda: next(clock))
    monkeypatch.setattr("reattend.rewriter.run.session.now", lambda: next(clock))


def ran(model: nn.Module, times: int, n: int = N) -> None:
    args = qkv(n)
    want = Attention()(*args)
    for _ in range(times):
        assert torch.allclose(model(*args), want, atol=1e-5)


def test_a_kernel_that_is_slower_is_not_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, own=1e-3, kernel=2e-3)
    calls(monkeypatch, 1.0, 1.0)
    model = reattend.optimize(Attention(), policy=OURS)
    ran(model, 4)
    (before,) = reattend.report(model).sites
    assert (before.kernel, before.fell_back) == ("reattend", 0)
    # calls 5 and on: every second one is the model as written, for the contest; the others run the graph as it came
    ran(model, 6)
    report = reattend.report(model)
    assert report.sites[0].fell_back == 3
    assert list(report.slower.values()) == ["2 ms against 1 ms of the model's own code, which runs instead"]
    assert "slower on this machine" in str(report)


class Steps(nn.Module):
    """A linear attention token by token, with a decay."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, out = torch.zeros(1, 4, 16, 16), []
        for t in range(q.shape[2]):
            s = 0.9 * s + k[:, :, t : t + 1].mT @ v[:, :, t : t + 1]
            out.append(q[:, :, t : t + 1] @ s)
        return torch.cat(out, 2)


def test_a_scan_that_is_slower_is_not_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, own=1e-3, kernel=2e-3)
    calls(monkeypatch, 1.0, 1.0)
    # which is predicted to be faster is not the question here
    monkeypatch.setattr("reattend.rewriter.choose.scans.scan_cost", lambda *_: Cost(1e-5, "matrix", 0, 0, 0, band=1.0))
    monkeypatch.setattr("reattend.rewriter.choose.scans.steps_cost", lambda *_: Cost(2e-5, "matrix", 0, 0, 0, band=1.0))
    model = reattend.optimize(Steps(), policy=OURS)
    args = qkv(12)
    want = Steps()(*args)
    for _ in range(10):
        assert torch.allclose(model(*args), want, atol=1e-5)
    report = reattend.report(model)
    (site,) = [s for p in report.pieces if p.plan for s in p.plan.sites]
    assert (site.kind, site.choice) == ("scan", "reattend")
    # the states are what is kept between calls, and what the own code holds at once was small enough to be timed
    assert site.memory is not None
    assert site.memory.cache_bytes == 4 * 16 * 16 * 4
    assert list(report.slower.values()) == ["2 ms against 1 ms of the model's own code, which runs instead"]
    assert report.sites[0].fell_back == 3


def test_a_kernel_that_is_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, own=2e-3, kernel=1e-3)
    calls(monkeypatch, 2.0, 1.0)
    model = reattend.optimize(Attention(), policy=OURS)
    ran(model, 24)
    report = reattend.report(model)
    assert report.sites[0].fell_back == 0
    assert not report.slower
    assert report.as_written == contest.FEW


def test_a_model_that_is_faster_as_written_runs_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, own=2e-3, kernel=1e-3)
    calls(monkeypatch, 1.0, 2.0)
    model = reattend.optimize(Attention(), policy=OURS)
    ran(model, 30)
    report = reattend.report(model)
    assert report.calls == 30
    assert report.as_written == 30 - contest.WARM - contest.FEW
    assert "ran as written" in str(report)
    # another length is another contest
    ran(model, 4, 2 * N)
    assert reattend.report(model).as_written == report.as_written


@pytest.mark.parametrize("policy", [replace(OURS, tune=False), replace(OURS, deny=("sdpa", "flex", "original"))])
def test_nothing_is_timed_where_the_policy_leaves_no_choice(policy: reattend.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, own=1e-3, kernel=2e-3)
    calls(monkeypatch, 1.0, 2.0)
    model = reattend.optimize(Attention(), policy=policy)
    ran(model, 24)
    report = reattend.report(model)
    assert (report.as_written, report.fallbacks) == (0, 0)


@pytest.mark.parametrize("why", few(["memory", "decided", "open sizes"], "memory", "decided"))
def test_the_model_is_not_run_as_written_to_be_timed(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its own code may not fit, is known to be slower, or may be called at any size."""
    kernels(monkeypatch, own=1e-3, kernel=2e-3)
    calls(monkeypatch, 1.0, 2.0)
    if why == "memory":
        monkeypatch.setattr("reattend.rewriter.run.session.TIMED_BYTES", 1 << 16)
    elif why == "decided":
        monkeypatch.setattr("reattend.rewriter.run.session.undecided", lambda kernel, own: False)
    model = reattend.optimize(Attention(), policy=OURS)
    if why == "open sizes":
        ran(model, 1, N // 2)
        ran(model, 1, N + 1)
    ran(model, 24)
    report = reattend.report(model)
    assert (report.as_written, report.fallbacks) == (0, 0)


def trained(model: nn.Module, times: int, run: Callable[..., Tensor] | None = None) -> None:
    args, want = qkv(), Attention()
    want(*args).square().sum().backward()
    assert want.scale.grad is not None
    for _ in range(times):
        model.zero_grad()
        (run or model)(*args).square().sum().backward()
        (scale,) = model.parameters()
        assert scale.grad is not None
        assert torch.allclose(scale.grad, want.scale.grad, rtol=1e-4)


def test_a_step_of_training_is_timed_with_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[bool] = []

    def took(run: Callable[[], object]) -> float:
        found = run()
        steps.append(isinstance(found, tuple) and all(isinstance(g, Tensor) for g in found))
        return 1e-3 * (1 + (len(steps) - 1) % 2)

    monkeypatch.setattr(race, "seconds", took)
    model = reattend.optimize(Attention(), policy=reattend.Policy(allow="sdpa"))
    with torch.enable_grad():
        trained(model, 4)
        assert reattend.report(model).sites[0].fell_back == 0
        trained(model, 4)
    report = reattend.report(model)
    assert steps == [True] * 2 * race.ROUNDS
    assert report.sites[0].fell_back == 4
    assert list(report.slower.values()) == ["2 ms against 1 ms of the model's own code, which runs instead"]


def test_what_no_gradient_reaches_is_timed_forwards() -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.enable_grad():
        assert torch.equal(race.trained(lambda given: (given > 0.5).float(), x)(), torch.ones(3))  # type: ignore[arg-type]


def test_no_call_goes_back_to_its_own_code_inside_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second run would save something else than the first."""
    kernels(monkeypatch, own=1e-3, kernel=2e-3)
    model = reattend.optimize(Attention(), policy=reattend.Policy(allow="sdpa"))

    def run(*args: Tensor) -> Tensor:
        halves: list[Tensor] = [checkpoint(model, *args, use_reentrant=False) for _ in range(2)]
        return torch.stack([*halves, model(*args)]).mean(0)

    with torch.enable_grad():
        trained(model, 4, run)
    report = reattend.report(model)
    assert report.sites[0].fell_back == 0
    assert not report.slower


def test_a_cache_has_lengths_of_its_own() -> None:
    """What a call is given does not tell all: such calls are no kind."""
    module, (q, _, _) = nn.Identity(), qkv(8)
    assert contest.kind_of(module, (q,), {"mask": None}) == contest.kind_of(module, (q + 1,), {"mask": None})
    assert contest.kind_of(module, (q,), {}) != contest.kind_of(module, (q.bfloat16(),), {})
    assert contest.kind_of(module, (q,), {"past": [q]}) is None
    with torch.enable_grad():
        assert contest.kind_of(module, (q,), {}) is None


@pytest.mark.parametrize(("kernel", "own", "open_"), [(1.0, 1.5, True), (1.0, 5.0, False), (1.0, 0.5, True)])
def test_a_race_is_run_where_bands_overlap(kernel: float, own: float, open_: bool) -> None:
    a, b = (Cost(s, "matrix", 0, 0, 0, band=1.0) for s in (kernel, own))
    assert race.undecided(a, b) is open_
