"""Constants of the time model come back from timings that the model itself made, and nearly so from noisy ones."""

import random
from dataclasses import replace

import pytest

from reattend.cost_model.calibration.constants import Timed, fitted, least, misfit
from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import predict
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from tests.tiers import few, one_in

from .test_predict import narrow

P, M = ex.index("p"), ex.index("m")
PLAIN = narrow(papers.attention("plain", papers.softmax))
EVERY_SECOND = narrow(
    papers.attention("checkerboard", papers.softmax, lambda b, s: ex.where(ex.equal((P + M) % 2, 0), s * 0.125, -3e38))
)
MAPPING = TileMapping(128, 64, 8, 2)


def constants(d: Device, overlap: float, partial: float) -> Device:
    return replace(d, model=replace(d.model, overlap=overlap, partial_factor=partial))


def timed(c: Cascade, d: Device, noise: float = 0.0) -> list[Timed]:
    """What the device would take, by the model, with noise from a fixed draw."""
    draw = random.Random(0)
    out = []
    for head in (64, 128):
        sizes = {"B": 1, "H": 16, "P": 4096, "M": 4096, "E": head, "F": head}
        cost = predict(c, MAPPING, d, sizes)
        assert isinstance(cost, Cost), cost
        out.append(Timed(c, MAPPING, sizes, cost.seconds * (1 + draw.uniform(-noise, noise))))
    return out


@pytest.mark.parametrize("name", few(["a100", "h100", "h200", "b200"], "a100", "b200"))
@pytest.mark.parametrize(("overlap", "partial"), one_in(2, [(0.3, 1.5), (0.75, 2.2), (0.0, 1.8)]))
def test_constants_come_back(name: str, overlap: float, partial: float) -> None:
    truth = constants(shipped(name), overlap, partial)
    found = fitted(shipped(name), timed(PLAIN, truth), timed(EVERY_SECOND, truth))
    assert found.model.overlap == pytest.approx(overlap, abs=0.011)
    assert found.model.partial_factor == pytest.approx(partial, abs=0.011)
    assert misfit(found, timed(EVERY_SECOND, truth)) == pytest.approx(0, abs=1e-6)


def test_noise_of_two_per_cent_moves_them_little() -> None:
    truth = constants(shipped("h100"), 0.4, 1.6)
    found = fitted(shipped("h100"), timed(PLAIN, truth, 0.02), timed(EVERY_SECOND, truth, 0.02))
    assert found.model.overlap == pytest.approx(0.4, abs=0.12)
    assert found.model.partial_factor == pytest.approx(1.6, abs=0.12)


def test_a_mapping_that_does_not_fit_is_named() -> None:
    at = {"B": 1, "H": 1, "P": 4096, "M": 4096, "E": 128, "F": 128}
    with pytest.raises(ValueError, match=r"cannot run on l4: .*shared memory"):
        misfit(shipped("l4"), [Timed(PLAIN, TileMapping(128, 128, 8, 4), at, 1.0)])


def test_the_least_of_equals_is_the_first() -> None:
    assert least(lambda x: abs(x - 2), (1.0, 3.0)) == 1.0
