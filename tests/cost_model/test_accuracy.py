"""Accuracy: errors, ranks and regret by hand-made cells, and what holds for any."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.calibration.accuracy import Outcome, accuracy, error, percentile, ranks, spearman, within

TIMES = st.floats(1e-6, 10.0)


def test_figures_of_two_cells() -> None:
    good = Outcome({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 1.8})
    bad = Outcome({"a": 3.0, "b": 1.5}, {"a": 1.5, "b": 3.0})
    found = accuracy([good, bad])
    assert (good.chosen, good.best, bad.chosen, bad.best) == ("a", "a", "a", "b")
    assert (found.timings, found.cells) == (4, 2)
    assert found.mape == pytest.approx((0.1 + 0.1 + 0.5 + 1.0) / 4)
    assert found.p95 == pytest.approx(1.0)
    assert (good.regret, bad.regret) == (0.0, 1.0)
    assert found.regret == 0.5
    assert found.regret_worst == found.regret_p95 == 1.0
    assert found.regret_geometric == pytest.approx(math.sqrt(2) - 1)
    assert "MAPE 42.5%" in str(found)


def test_nothing_measured_is_said() -> None:
    with pytest.raises(ValueError, match="no cell was measured"):
        accuracy([])


def test_equal_values_share_a_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1], [1, 2]))


@given(st.lists(st.tuples(TIMES, TIMES), min_size=2, max_size=8))
def test_regret_is_never_negative_and_a_perfect_model_has_none(pairs: list[tuple[float, float]]) -> None:
    measured = {str(i): m for i, (m, _) in enumerate(pairs)}
    assert Outcome(measured, {str(i): p for i, (_, p) in enumerate(pairs)}).regret >= 0
    perfect = accuracy([Outcome(measured, measured)])
    assert (perfect.mape, perfect.regret) == (0, 0)


@given(st.lists(TIMES, min_size=3, max_size=20, unique=True))
def test_ranks_do_not_know_the_scale(values: list[float]) -> None:
    assert spearman(values, [8 * v for v in values]) == pytest.approx(1)


def test_percentiles_are_values() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile(list(map(float, range(1, 101))), 0.95) == 95.0
    assert percentile([7.0], 0.95) == 7.0


@given(TIMES, TIMES, st.floats(0.01, 3.0))
def test_a_band_is_the_same_in_both_directions(a: float, b: float, band: float) -> None:
    assert within(a, a, band)
    if abs(abs(math.log(a / b)) - math.log1p(band)) > 1e-9:
        assert within(a, b, band) == within(b, a, band) == (abs(math.log(a / b)) < math.log1p(band))
    assert error(2.0, 1.0) == 1.0
