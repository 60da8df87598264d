"""Methods measured, chosen within an error and installed: a layer that looks near by, and one that looks everywhere alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.plan.plan import Plan
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.rewriter.approximate.data import CalibrationError

N, HEADS, WIDTH = 512, 2, 16
NARROW = SinkWindow(4, 32)


class Sloped(nn.Module):
    """Scores fall by `slope` a key of distance; 0: all keys up to the row weigh the same."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope, self.qkv = slope, nn.Linear(WIDTH, 3 * WIDTH)
        with torch.no_grad():
            self.qkv.weight[:WIDTH] = 0
            self.qkv.bias[:WIDTH] = 0

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(n, device=x.device)
        s = q @ k.mT + self.slope * (at[None] - at[:, None])
        s = s.masked_fill(at[None] > at[:, None], float("-inf"))
        out: Tensor = (s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width)
        return out


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = Sloped(1.0), Sloped(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.near(x)
        out: Tensor = x + self.far(x)
        return out


def data(n: int = N, count: int = 4) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, WIDTH, generator=rng) for _ in range(count)]


def policy(**more: Any) -> reattend.Policy:
    given: dict[str, Any] = {"approximate": True, "methods": (NARROW,), "max_error": 1e-3, "calibration": data(), **more}
    return reattend.Policy(**given)


@pytest.fixture(scope="module")
def model() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    made = Two().eval()
    yield reattend.optimize(made, policy=policy())
    reattend.restore(made)


@pytest.fixture(scope="module")
def report(model: nn.Module) -> reattend.Report:
    with torch.no_grad():
        model(data()[0])
    return reattend.report(model)


def test_the_layer_that_looks_near_by_runs_the_method_and_the_other_does_not(report: reattend.Report) -> None:
    kernels = {s.name: s.kernel for s in report.sites}
    assert kernels["near"] == str(NARROW)
    assert kernels["far"] in ("original", "sdpa", "flex", "reattend")
    assert "1 of 2 attentions run a method" in str(report)
    assert "2 examples held out of 4" in str(report)


def test_the_net_holds_it_against_the_methods_own_cascade(report: reattend.Report) -> None:
    (check,) = [c for c in report.checks if c.site == "near"]
    assert (check.verdict, check.kernel) == ("same", str(NARROW))
    assert check.how.startswith("the method's cascade")


def test_the_error_is_what_the_weights_say(report: reattend.Report) -> None:
    """Where all keys weigh the same, a row keeps the share of its keys that the method keeps."""
    sites = {s.name: s.site for s in report.sites}
    near, far = (sites[n].candidate(str(NARROW)).error for n in ("near", "far"))
    assert near is not None
    assert far is not None
    assert near.mass is not None
    assert far.mass is not None
    shares = [(min(p + 1, 32) + max(0, min(4, p + 1 - 32))) / (p + 1) for p in range(N)]
    assert far.mass.least == pytest.approx(min(shares), rel=1e-5)
    assert far.mass.mean == pytest.approx(sum(shares) / N, rel=0.05)
    assert near.mass.least > 1 - 1e-6
    assert near.worst < 1e-6 < 0.1 < far.mean
    assert near.low <= near.mean <= near.high
    assert (near.examples, near.queries, near.keys) == (2, (N, N), (N, N))


def test_the_plan_says_what_runs(report: reattend.Report) -> None:
    assert report.plan is not None
    site = next(s for s in report.plan.sites if s.name == "near")
    assert site.mask is not None
    assert "< 32" in site.mask.expr
    assert any("is approximate" in n for n in site.notes)
    chosen = site.chosen
    assert not chosen.exact
    assert chosen.density is not None
    assert chosen.density < 0.4
    again = Plan.from_json(report.plan.to_json())
    assert next(s for s in again.sites if s.name == "near").chosen.error == chosen.error


def test_verify_knows_the_budget(model: nn.Module) -> None:
    found = reattend.verify(model, (data()[1],))
    assert found.ok, found
    assert found.whole_limit == 1e-3
    assert {s.kernel for s in found.sites} >= {str(NARROW)}


def test_other_lengths_than_those_measured_run_exactly(model: nn.Module) -> None:
    torch.manual_seed(0)
    plain, x = Two().eval(), data(n=700)[0]
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), atol=1e-5)
    last = reattend.report(model).pieces[-1]
    ran = {s.name: s.choice for s in last.sites}
    assert ran["near"] != str(NARROW) or last.fallbacks["near"] > 0


def test_a_budget_that_nothing_meets_installs_nothing_and_names_the_closest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sloped(0.0)).eval()
    reattend.optimize(model, policy=policy(max_error=1e-6))
    with torch.no_grad():
        model(data()[0])
    report = reattend.report(model)
    assert all(s.site.chosen.exact for s in report.sites)
    assert "nothing is installed: no configuration is within max_error=1e-06; the closest, sink-window" in str(report)


def test_without_calibration_methods_are_listed_as_not_measured_and_never_chosen() -> None:
    asked = policy(calibration=None)
    plan = reattend.plan(Two().eval(), (data()[0],), policy=asked)
    for site in plan.sites:
        assert site.chosen.exact
        assert site.candidate(str(NARROW)).error is None
        assert site.candidate(str(NARROW)).cost is not None
    with pytest.raises(CalibrationError, match="never installed without its measured error"):
        reattend.optimize(Two().eval(), policy=asked)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"calibration": []}, "is empty"),
        ({"calibration": data(count=3)}, "has 3 examples: give at least 4"),
        ({"calibration": data()[0]}, "an iterable of examples"),
        ({"calibration": [*data(count=3), torch.full((1, 4, WIDTH), float("nan"))]}, "example 3 holds NaN"),
        ({"calibration": [torch.randn(1, 4, WIDTH + 1) for _ in range(4)]}, "example 0: Two itself fails on these inputs"),
        ({"calibration": [1, 2, 3, 4]}, "example 0 is a int"),
        ({"max_error": None}, "without max_error"),
    ],
)
def test_what_nothing_can_be_measured_with_is_one_sentence(more: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        reattend.optimize(Two().eval(), policy=policy(**more))


def test_a_model_in_training_mode_is_asked_to_leave_it() -> None:
    with pytest.raises(CalibrationError, match=r"model\.eval\(\)"):
        reattend.optimize(Two(), policy=policy())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"approximate": False, "calibration": None}, r"Policy\(methods\) needs approximate=True"),
        ({"approximate": False, "methods": ()}, r"Policy\(calibration\) needs approximate=True"),
        ({"max_error": 0}, "must be above 0"),
        ({"max_error": -1.0}, "must be above 0"),
        ({"max_error": float("nan")}, "must be above 0"),
        ({"max_error": "1%"}, "is a number above 0, such as 0.01, not '1%'"),
        ({"methods": ()}, r"Policy\(calibration\) without methods"),
        ({"deny": "sink-window"}, "both allowed and denied"),
        ({"allow": "flex", "deny": "flex"}, "both allowed and denied"),
        ({"methods": (SinkWindow,)}, "is a class"),
        ({"methods": ("sink-window",)}, "takes methods such as"),
        ({"allow": "no-such"}, "unknown candidate 'no-such'; one of original, sdpa, flex, reattend"),
    ],
)
def test_a_policy_that_contradicts_itself_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy(**given)


def test_a_method_is_allowed_by_name_with_its_defaults() -> None:
    named = reattend.Policy(approximate=True, allow=("sink-window",))
    assert named.methods == (SinkWindow(),)
    assert replace(named, check="never").methods == named.methods
