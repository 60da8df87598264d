"""The suite's own tools: CPU seconds are added up by what spent them, and a grid's fast points are those that were named."""

from __future__ import annotations

import json

import pytest

from .cpu_times import ranked
from .tiers import few, one_in, pairs, thin_out


def fast(params: list[object]) -> list[tuple[object, ...]]:
    return [tuple(p.values) for p in params if not p.marks]  # type: ignore[attr-defined]


def test_a_grid_keeps_what_is_named_and_refuses_what_it_has_not() -> None:
    grid = [(a, b) for a in "xy" for b in (1, 2)]
    assert fast(few(grid, ("x", 2))) == [("x", 2)]
    assert len(few(grid, ("x", 2))) == len(grid)
    assert fast(one_in(3, range(7))) == [(0,), (3,), (6,)]
    with pytest.raises(AssertionError, match="not in the grid"):
        few(grid, ("z", 1))


def test_every_value_of_both_is_among_the_fast_pairs() -> None:
    kept = fast(pairs(3, range(7), "abcde"))
    assert {a for a, _ in kept} == set(range(7))
    assert {b for _, b in kept} == set("abcde")
    assert len(kept) < 7 * 5 / 2


class Point:
    """What thinning asks of a test."""

    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator) -> None:
        self.nodeid, self.marks = nodeid, list(marks)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((m.mark for m in self.marks if m.name == name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark)


def test_of_a_thinned_grid_every_third_point_and_the_last_stay_fast() -> None:
    thin = pytest.mark.thin(3)
    grid = [Point(f"a.py::f[{i}]", thin) for i in range(8)]
    other = [Point("a.py::g", thin), Point("a.py::h[0]", thin, pytest.mark.slow), Point("b.py::f[0]"), Point("b.py::f[1]")]
    thin_out([*grid, *other])  # type: ignore[list-item]
    assert [i for i, p in enumerate(grid) if p.get_closest_marker("slow") is None] == [0, 3, 6, 7]
    assert [p.get_closest_marker("slow") is None for p in other] == [True, False, True, True]


def test_seconds_are_added_up_by_test_and_file() -> None:
    noted = [("setup", "a.py::f", 1.0), ("call", "a.py::f", 2.0), ("call", "b.py::g[1]", 0.5), ("import", "b.py", 4.0), ("fixture", "::x", 1.0)]
    text = ranked([json.dumps({"kind": k, "name": n, "cpu_s": s}) for k, n, s in noted], 5)
    lines = [tuple(line.split()) for line in text.splitlines()]
    assert ("3.00", "a.py::f") in lines
    assert ("4.50", "b.py") in lines
    assert ("1.00", "::x") in lines
