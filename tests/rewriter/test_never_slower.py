"""The benchmark that holds whole models beside themselves as written: what of its rounds counts as slower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.loading import benchmark


@pytest.fixture(scope="module")
def never_slower() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        # benchmarks find one another beside themselves
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield benchmark("never_slower")


def rounds(module: ModuleType, patch: pytest.MonkeyPatch, written: list[float], rewritten: list[float]) -> dict[str, float]:
    """The row of rounds whose seconds are these, one after the other."""
    left = {"written": iter(written), "rewritten": iter(rewritten)}

    def taken(call: Callable[[], str]) -> float:
        return next(left[call()])

    patch.setattr(module, "seconds", taken)
    row: dict[str, float] = module.measured(lambda: "written", lambda: "rewritten", len(rewritten))
    return row


def test_a_tenth_more_in_every_round_is_slower(never_slower: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rounds(never_slower, monkeypatch, [1.0, 1.0] * 5, [1.1] * 5)
    assert row["ratio"] == pytest.approx(1.1)
    assert row["least_ratio"] == pytest.approx(1.1)
    assert row["aa"] == 1.0
    assert never_slower.is_slower(row)


def test_rounds_that_something_else_disturbed_are_not(never_slower: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rounds(never_slower, monkeypatch, [1.0, 1.0] * 5, [1.0, 1.5, 1.5, 1.5, 1.0])
    assert row["ratio"] > never_slower.LIMIT >= row["least_ratio"]
    assert not never_slower.is_slower(row)


def test_a_drift_through_all_rounds_is_no_noise(never_slower: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second round counts the other way round."""
    row = rounds(never_slower, monkeypatch, [1.0, 1.2] * 4, [1.1] * 4)
    assert row["ratio"] == pytest.approx(1.0)
    assert row["aa_spread"] == pytest.approx(1.44)


def test_its_own_modules_attend(never_slower: ModuleType) -> None:
    """Each answers in the shape of what it is given, so that its call is one of the model that it is named for."""
    x = torch.randn(1, 8, 8, 128)
    assert never_slower.CrossShaped()(x).shape == x.shape
    assert never_slower.Agents(128, 4)(x).shape == x.shape
    y = torch.randn(2, 1, 6, 64)
    assert never_slower.Recurrence(64, 4)(*y).shape == (1, 6, 64)
