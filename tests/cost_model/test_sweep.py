"""Sweeps: axes read off cascades, values that a capture admits, points that equal plans made there, where choices change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.plan.plan import Plan
from reattend.cost_model.sites.axes import axes, bound_sizes, powers_of_two
from reattend.cost_model.sites.course import Change, Course, Estimate, Point, SweepError, Symbol
from reattend.cost_model.sites.site import PlanError, Site
from reattend.cost_model.sites.sweep import Sweep
from reattend.cost_model.sites.sweeping import sweep
from tests.plans import CAUSAL, SIZES, WINDOW, plan

PLAN = plan()


def test_axes_are_read_off_the_ranks() -> None:
    assert axes([CAUSAL, WINDOW]) == {"seq": ("P",), "past": ("M",), "batch": ("B",)}


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_powers_of_two_start_and_end_where_asked(a: int, b: int) -> None:
    low, high = min(a, b), max(a, b)
    values = powers_of_two(low, high)
    assert (values[0], values[-1]) == (low, high)
    assert all(y == 2 * x for x, y in pairwise(values[:-1]))
    assert list(values) == sorted(set(values))


@pytest.mark.parametrize(("low", "high"), [(0, 4), (-1, 1), (8, 4)])
def test_ranges_that_are_none_are_refused(low: int, high: int) -> None:
    with pytest.raises(SweepError, match=r"starts at 1 or above|goes up"):
        powers_of_two(low, high)


def test_points_equal_plans_made_at_their_sizes() -> None:
    found = sweep(PLAN, "seq", [512, 2048, 512], [shipped("h200"), shipped("a100")])
    assert found.values == (512, 2048)
    assert [(c.device, c.count, c.index) for c in found.courses] == [("h200", 2, 0), ("h200", 1, 2), ("a100", 2, 0), ("a100", 1, 2)]
    for c in found.courses:
        for p in c.points:
            there = PLAN.at(c.device, seq=p.value)
            assert there.sites[c.index].choice == p.choice
            assert there.sites[c.index].chosen.seconds == p.seconds
            assert there.sites[c.index].memory == p.memory


def test_a_plan_at_its_own_sizes_is_itself() -> None:
    assert PLAN.at() == PLAN
    assert PLAN.at("h200", seq=SIZES["P"], M=SIZES["M"]) == PLAN
    moved = PLAN.at(batch=4)
    assert {s.name: s.value for s in moved.symbols}["B"] == 4
    assert moved.sites[0].shape.size("b") == 4


def test_times_grow_along_a_course() -> None:
    for c in PLAN.over("seq", powers_of_two(256, 8192)).courses:
        times = [p.seconds for p in c.points]
        assert times == sorted(times, key=lambda t: t or 0)


def test_memory_of_keys_and_values_is_known() -> None:
    (course, _) = PLAN.over("past", [4096]).courses
    memory = course.points[0].memory
    assert memory is not None
    # keys and values: B·H·M·(E + F) elements of four bytes; the result B·H·P·F
    assert memory.cache_bytes == 2 * 4 * 4096 * (64 + 64) * 4
    assert memory.tiled_bytes == 2 * 4 * 1024 * 64 * 4
    # softmax reads and writes every score
    assert memory.eager_bytes >= 2 * 2 * 4 * 1024 * 4096 * 4


def test_values_outside_of_the_capture_are_named() -> None:
    narrow = plan(P=4096)
    with pytest.raises(SweepError, match="seq=8192: the graph was captured for seq from 1 to 4096"):
        bound_sizes(narrow, {"seq": 8192})
    found = narrow.over("seq", [1, 4096, 8192])
    assert found.values == (1, 4096)
    assert "seq=8192" in found.skipped
    assert "seq=8192" in str(found)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq": 0}, "sizes must be at least 1"),
        ({"width": 4}, "the size 'width' is fixed or unknown: one of seq, past, batch, B, H, P, M, E, F may be varied"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        PLAN.at(None, **sizes)


def test_a_plan_from_a_file_keeps_its_sweep_and_cannot_be_costed_again() -> None:
    made = replace(PLAN, sweeps=(PLAN.over("seq", [512, 1024]),))
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.sites[0].mask is not None
    assert again.sites[0].mask.picture == PLAN.sites[0].mask.drawn()  # type: ignore[union-attr]
    assert again.sites[0].detail == PLAN.sites[0].details()
    with pytest.raises(PlanError, match="read from a file"):
        again.at("a100")
    with pytest.raises(SweepError):
        again.over("seq", [512])


def test_zero_and_one_are_special_to_capture_alone() -> None:
    assert Symbol("s", 4, 2, None).admits(1)
    assert not Symbol("s", 4, 3, None).admits(1)
    assert not Symbol("s", 4, 2, 8).admits(9)


def course(*choices: str, changes: tuple[Change, ...] = ()) -> Course:
    points = (Point(1 << i, c, (Estimate(c, 1e-3, "matrix"), Estimate("flex", 2e-3, "exp"))) for i, c in enumerate(choices))
    return Course("a", 0, 2, "h200", tuple(points), changes)


@given(st.integers(17, 8000))
def test_changes_are_narrowed_to_an_eighth(threshold: int) -> None:
    """A choice that turns at a known length, whatever the cost model says."""

    def retake(d: Device, at: Mapping[str, int], which: Sequence[int]) -> tuple[Site, ...]:
        slow = at["P"] >= threshold
        return tuple(replace(PLAN.sites[i], choice="reattend" if slow else "original") for i in which)

    (found, _) = replace(PLAN, retake=retake).over("seq", [16, 256, 8192]).courses
    (change,) = found.changes
    assert (change.before, change.after) == ("original", "reattend")
    assert change.low < threshold <= change.high
    assert change.high - change.low <= max(1, change.low // 8)


def test_a_third_choice_in_between_is_seen() -> None:
    def retake(d: Device, at: Mapping[str, int], which: Sequence[int]) -> tuple[Site, ...]:
        p = at["P"]
        choice = "original" if p < 300 else "sdpa" if p < 700 else "reattend"
        return tuple(replace(PLAN.sites[i], choice=choice) for i in which)

    (found, _) = replace(PLAN, retake=retake).over("seq", [256, 1024]).courses
    assert [(c.before, c.after) for c in found.changes] == [("original", "sdpa"), ("sdpa", "reattend")]
    assert [c.low < turn <= c.high for c, turn in zip(found.changes, (300, 700))] == [True, True]


def test_the_table_marks_changes() -> None:
    text = str(Sweep("seq", (1, 2), (course("sdpa", "reattend", changes=(Change(1, 2, "sdpa", "reattend"),)),)))
    assert "a ×2" in text
    assert "→ reattend 1 ms (by 2.00×)" in text
    assert "h200: sdpa → reattend between 1 and 2" in text
    assert "h200: sdpa at every seq" in str(Sweep("seq", (1, 2), (course("sdpa", "sdpa"),)))


def test_one_device_can_be_picked() -> None:
    found = PLAN.over("seq", [512], ["h200", "a100"])
    assert {c.device for c in found.on("a100").courses} == {"a100"}
