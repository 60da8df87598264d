"""Sampling: which calls are timed, which times count, and what the report says of a prediction that does not hold."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

import reattend
from reattend.cost_model.devices.device import shipped
from reattend.cost_model.plan.plan import Plan
from reattend.cost_model.sites.site import Candidate, Site, SiteShape
from reattend.cost_model.time.cost import Cost
from reattend.rewriter.run.report import Entered, GraphPiece, Report, SiteRun
from reattend.rewriter.splice.guards import Guarded
from reattend.rewriter.splice.sampling import KEPT, Samples, due, timed
from reattend.rewriter.splice.splice import SITE


class Window(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        keep = (i[:, None] >= i) & (i[:, None] - i < 64)
        return (q @ k.mT * 0.125).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def test_calls_two_four_eight_are_timed() -> None:
    assert [n for n in range(1, 70) if due(n)] == [2, 4, 8, 16, 32, 64]


def test_a_running_model_is_timed_and_computes_the_same() -> None:
    model = reattend.optimize(Window().eval(), policy=reattend.Policy(tune=False))
    q, k, v = (torch.randn(1, 4, 512, 64) for _ in range(3))
    with torch.no_grad():
        first = model(q, k, v)
        assert [s.measured for s in reattend.report(model).sites] == [None]
        outputs = [model(q, k, v) for _ in range(4)]
    assert all(torch.equal(first, o) for o in outputs)
    (site,) = reattend.report(model).sites
    assert site.kernel == "reattend"
    assert site.measured is not None
    assert site.measured > 0
    assert "predicted times:" in str(reattend.report(model))


def graph(target: object = torch.relu) -> fx.GraphModule:
    """One spliced call on four numbers."""
    g = fx.Graph()
    x = g.placeholder("x")
    x.meta["val"] = torch.zeros(4)
    y = g.call_function(target, (x,))  # type: ignore[arg-type]
    y.meta = {"val": torch.zeros(4), SITE: "attention"}
    g.output(y)
    return fx.GraphModule(nn.Module(), g)


def test_only_the_sizes_of_the_plan_count() -> None:
    samples = Samples()
    assert timed(graph(), samples, torch.ones(5)).shape == (5,)
    assert samples.median("attention") is None
    timed(graph(), samples, torch.ones(4))
    assert samples.median("attention") is not None


def test_a_kernel_runs_once_before_its_first_time() -> None:
    calls = []

    def relu(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.relu(x)

    samples = Samples()
    for expected in (2, 3, 4):
        timed(graph(relu), samples, torch.ones(4))
        assert len(calls) == expected
    assert len(samples.seconds["attention"]) == 3


def test_a_guard_that_falls_back_is_not_timed() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    g = fx.Graph()
    x = g.placeholder("x")
    x.meta["val"] = torch.zeros(4)
    y = g.call_module("guarded", ((x,), (x,), {}, {}))
    y.meta = {"val": torch.zeros(4), SITE: "attention"}
    g.output(y)
    root = nn.Module()
    original = fx.symbolic_trace(nn.ReLU())
    root.guarded = Guarded("attention", fails, original, ())
    samples = Samples()
    with pytest.warns(UserWarning, match="keeps the original code"):
        out = timed(fx.GraphModule(root, g), samples, torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert out.tolist() == [0, 0, 1, 2]
    assert samples.median("attention") is None


def test_an_error_of_the_model_is_its_own() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("as written")

    with pytest.raises(ValueError, match=r"^as written$"):
        timed(graph(fails), Samples(), torch.ones(4))


def test_the_newest_times_count() -> None:
    samples = Samples()
    for t in (*[9.0] * KEPT, *[1.0] * KEPT):
        samples.add("a", t)
    assert samples.median("a") == 1.0
    assert samples.median("b") is None


# --- the report -----------------------------------------------------------------------------------------------------

COST = Cost(1e-3, "matrix", 1, 1, 1, basis="calibrated", band=0.25)
ATTENTION = Site(
    "layers.0.attn", "model.py:7", "softmax", frozenset(), SiteShape({"p": 8}), None, (), (),
    (Candidate("reattend", cost=COST),), "reattend",
)


def report(measured: float | None) -> Report:
    piece = GraphPiece(
        "", 0, plan=Plan((ATTENTION, replace(ATTENTION, name="layers.1.attn")), (), shipped("cpu")), calls=4
    )
    for s in piece.sites if measured is not None else ():
        assert measured is not None
        piece.samples.add(s.name, measured)
    return Report("", (Entered("", 4, 0),), (piece,))


@pytest.mark.parametrize(("measured", "off"), [(1.2e-3, False), (0.85e-3, False), (3e-3, True), (0.5e-3, True)])
def test_a_prediction_outside_its_band_shows(measured: float, off: bool) -> None:
    made = report(measured)
    assert [s.off for s in made.sites] == [off, off]
    text = str(made)
    assert ("prediction off: layers.[0-1].attn, reattend" in text) == off
    assert f"predicted times: {0 if off else 2} of 2 hold" in text
    assert ("1 ms ±25% predicted (calibrated)" in text) == off


def test_nothing_is_said_of_what_was_not_timed() -> None:
    assert "predict" not in str(report(None))
    assert not SiteRun(ATTENTION, 1, 0).off
