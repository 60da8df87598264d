"""The ablation: every rung adds cost to the one before, from the plainest roofline to the whole model."""

from itertools import pairwise

import pytest

from reattend.cost_model.calibration.ladder import Rung, ladder
from reattend.cost_model.devices.device import Device, alone, shipped, targets, with_threads
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import VendorUse, predict, predict_original, predict_vendor
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping

P, M = ex.index("p"), ex.index("m")
FULL = papers.attention("full", papers.softmax)
CAUSAL = papers.attention("causal", papers.softmax, lambda b, s: ex.where(M <= P, s * 0.125, -3e38))
DEVICES = [*(d for d in targets() if d.is_gpu), with_threads(shipped("cpu"), 1), with_threads(shipped("cpu"), 2)]
SIZES = {"B": 1, "H": 8, "P": 2048, "M": 2048, "E": 64, "F": 64}


def ours(d: Device) -> TileMapping:
    return TileMapping(64, 64, body="sdpa") if d.kind == "cpu" else TileMapping(64, 32, 8, 2)


def seconds(rung: Rung, candidate: str, c: Cascade) -> float:
    d = rung.device
    if candidate == "original":
        return predict_original(c, d, SIZES).seconds
    cost = predict_vendor(c, VendorUse("flash", skips=c is CAUSAL), d, SIZES) if candidate == "sdpa" else predict(c, ours(d), d, SIZES)
    assert isinstance(cost, Cost), cost
    return cost.seconds


@pytest.mark.parametrize("d", DEVICES, ids=lambda d: f"{d.name}-{d.units}")
def test_six_rungs_end_with_the_devices_themselves(d: Device) -> None:
    other = shipped("h200")
    rungs = ladder(d, other)
    assert [r.name for r in rungs] == [
        "roofline", "+ tiles", "+ partial-tile cost", "+ exponentials", "+ makespan", "+ calibration",
    ]
    assert [r.masked for r in rungs] == [False, True, True, True, True, True]
    assert rungs[-2].device == (alone(d) if d.host is not None else d)
    assert rungs[-1].device is other


@pytest.mark.parametrize("d", DEVICES, ids=lambda d: f"{d.name}-{d.units}")
@pytest.mark.parametrize("candidate", ["ours", "sdpa", "original"])
def test_each_mechanism_costs_time(d: Device, candidate: str) -> None:
    rungs = ladder(d, d)
    roofline = seconds(rungs[0], candidate, FULL)
    # what was measured may lie below what was assumed
    times = [seconds(r, candidate, CAUSAL) for r in rungs[1:-1]]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times)), times
    assert times[0] < times[-1]
    if candidate == "ours":
        # knowing the tiles, half of them are not computed
        assert times[0] < 0.65 * roofline


@pytest.mark.parametrize("d", DEVICES[:-2], ids=lambda d: d.name)
def test_the_first_rung_is_the_roofline(d: Device) -> None:
    flops, moved = 4 * 8 * 2048 * 2048 * 64, 4 * 4 * 8 * 2048 * 64
    bound = max(flops / d.matrix_rate("f32"), moved / d.dram_bytes_per_s)
    assert seconds(ladder(d, d)[0], "ours", FULL) == pytest.approx(bound, rel=0.02)
