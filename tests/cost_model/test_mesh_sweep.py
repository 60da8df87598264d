"""A mesh over a sweep: each point is the sharding plan made there; what is full, what does not divide, table and JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from reattend.cost_model.devices.device import shipped
from reattend.cost_model.mesh.capacity import RESERVE
from reattend.cost_model.mesh.course import MeshCourse, MeshPoint, WayPoint
from reattend.cost_model.plan.plan import Plan
from reattend.cost_model.sites.sweep import Sweep
from tests.plans import CAUSAL, plan

PLAN = plan([CAUSAL], mesh="tp=4")
VALUES = (256, 1024, 8192)


def test_each_point_is_the_plan_made_there() -> None:
    swept = PLAN.over("seq", VALUES, ["h200", "a100"])
    assert [m.device for m in swept.meshes] == ["h200", "a100"]
    for course in swept.meshes:
        assert course.room_bytes == pytest.approx((1 - RESERVE) * shipped(course.device).dram_bytes)
        for point in course.points:
            there = PLAN.at(course.device, seq=point.value).sharding
            assert there is not None
            assert there.best is not None
            assert point.best == there.best.name
            for way in point.ways:
                same = there.scheme(way.name)
                assert (way.seconds, way.held_bytes, way.fits) == (same.seconds, same.held_bytes, same.feasible)


def test_more_tokens_are_held_and_take_longer() -> None:
    (course,) = PLAN.over("seq", VALUES).meshes
    for name in course.names:
        ways = [p.way(name) for p in course.points]
        assert all(w is not None for w in ways)
        for a, b in pairwise(ways):
            assert a is not None
            assert b is not None
            assert a.held_bytes < b.held_bytes
            assert a.seconds < b.seconds


def test_without_a_mesh_there_is_no_course() -> None:
    assert plan([CAUSAL]).over("seq", VALUES).meshes == ()


def test_a_value_that_the_mesh_does_not_divide_says_so() -> None:
    made = plan([CAUSAL], mesh="dp=2")
    (course,) = made.over("batch", (1, 2, 4)).meshes
    assert [p.best for p in course.points] == ["", "batch", "batch"]
    assert "mesh dp=2 does not divide a batch of 1" in course.points[0].why
    assert "mesh dp=2 does not divide a batch of 1" in str(made.over("batch", (1, 2, 4)))


def test_where_nothing_fits_the_reason_stands() -> None:
    small = replace(shipped("h200"), dram_bytes=1e8)
    (course,) = replace(PLAN, device=small).over("past", (1024, 1 << 20)).meshes
    assert course.points[0].best
    last = course.points[-1]
    assert last.best == ""
    assert last.why.startswith("needs ")
    assert not any(w.fits for w in last.ways)
    assert course.changes[-1][3] == ""


def test_the_table_has_a_row_a_value_and_marks_changes() -> None:
    def at(value: int, best: str) -> MeshPoint:
        return MeshPoint(value, best, (WayPoint("heads", 1e-3, 10**9, True), WayPoint("ring", 2e-3, 10**9, True)))

    course = MeshCourse("tp=8", "h200", 1e11, (at(1024, "heads"), at(2048, "ring"), MeshPoint(4096, "", (), "full")))
    rows = str(Sweep("seq", (1024, 2048, 4096), (), meshes=(course,))).splitlines()
    assert "all attentions, spread over tp=8" in rows
    assert any(r.split() == ["1k", "heads", "1", "ms,", "holds", "1", "GB"] for r in rows)
    assert any(r.split() == ["2k", "→", "ring", "2", "ms,", "holds", "1", "GB"] for r in rows)
    assert any(r.split() == ["4k", "full"] for r in rows)
    assert course.changes == ((1024, 2048, "heads", "ring"), (2048, 4096, "ring", ""))


def test_a_plan_from_a_file_keeps_its_courses_and_an_older_one_has_none() -> None:
    kept = replace(PLAN, sweeps=(PLAN.over("seq", VALUES),))
    again = Plan.from_json(kept.to_json())
    assert again.sweeps == kept.sweeps
    older = json.loads(kept.to_json())
    older["schema"] = 2
    del older["sweeps"][0]["meshes"]
    assert Plan.from_json(json.dumps(older)).sweeps[0].meshes == ()
