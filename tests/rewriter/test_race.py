"""What is slower on the clock is not run: kernels beside their own code, whole calls beside the model as written. Clocks are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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


def test_gradients_are_never_left_to_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(monkeypatch, own=1e-3, kernel=2e-3)
    calls(monkeypatch, 1.0, 2.0)
    model = reattend.optimize(Attention(), policy=reattend.Policy(allow="sdpa"))
    with torch.enable_grad():
        for _ in range(12):
            model(*qkv()).sum().backward()
    report = reattend.report(model)
    assert report.as_written == 0
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
