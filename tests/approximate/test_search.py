"""The search: what is taken, in which order, and what is taken back, on errors that are written down."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from reattend.rewriter.approximate.calibrate import interval
from reattend.rewriter.approximate.search import Choice, Move, choice_of, confirm, search

A = Move("a", "narrow", 4.0, 0.04)
A_WIDE = Move("a", "wide", 2.0, 0.001)
B = Move("b", "narrow", 3.0, 0.01)
C = Move("c", "narrow", 1.0, 0.2)
ERRORS = {("a", "narrow"): 0.04, ("a", "wide"): 0.001, ("b", "narrow"): 0.01, ("c", "narrow"): 0.2}


def adding(choice: Choice) -> float:
    return sum(ERRORS[x] for x in choice.items())


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1.0, {"a": "narrow", "b": "narrow", "c": "narrow"}),
        (0.06, {"a": "narrow", "b": "narrow"}),
        (0.02, {"a": "wide", "b": "narrow"}),
        (0.005, {"a": "wide"}),
        (0.0005, {}),
    ],
)
def test_what_saves_most_within_the_budget_is_taken(budget: float, expected: dict[str, str]) -> None:
    taken, tried = search([A, A_WIDE, B, C], adding, budget)
    assert choice_of(taken) == expected
    assert all(t.error == adding(t.choice) for t in tried)
    assert search([A, A_WIDE, B, C], adding, budget)[0] == taken


def test_what_saves_nothing_is_not_tried() -> None:
    assert search([Move("a", "slow", 0.0, 0.0), Move("b", "slow", -1.0, 0.0)], adding, 1.0) == ([], [])


def test_examples_held_out_take_back_what_they_do_not_confirm() -> None:
    harder: Callable[[Choice], float] = lambda choice: 2 * adding(choice)  # noqa: E731
    taken, _ = search([A, A_WIDE, B, C], adding, 0.06)
    left, tried = confirm(taken, harder, 0.06)
    assert choice_of(left) == {"a": "wide", "b": "narrow"}
    assert [t.error for t in tried] == [0.1, 0.022]
    assert confirm(taken, lambda choice: 1.0, 0.06)[0] == []


def test_the_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0])
    assert low == 0.0
    assert high == pytest.approx(2.0 + 4.303 / 3**0.5, abs=1e-3)
    assert interval([1.0])[1] == float("inf")
