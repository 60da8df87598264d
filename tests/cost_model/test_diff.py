"""Differences between plans: each status, ratios, tolerance, sites of one name told apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reattend.cost_model.devices.device import shipped
from reattend.cost_model.plan.diff import CHANGED, GONE, NEW, SAME, diff
from reattend.cost_model.plan.plan import Plan
from reattend.cost_model.sites.site import Candidate, Site, SiteShape
from tests.plans import cost


def site(name: str, choice: str = "sdpa", seconds: float = 1e-3) -> Site:
    candidates = (Candidate("sdpa", cost=cost(seconds)), Candidate("reattend", cost=cost(seconds)))
    return Site(name, "m.py:1", "softmax", frozenset(), SiteShape({}), None, (), (), candidates, choice)


def plan(*sites: Site) -> Plan:
    return Plan(sites, (), shipped("h200"), model="m")


def test_each_status() -> None:
    found = diff(plan(site("a"), site("b"), site("c")), plan(site("a"), site("b", "reattend", 2e-3), site("d")))
    assert [(r.names, r.status) for r in found.rows] == [(("a",), SAME), (("b",), CHANGED), (("c",), GONE), (("d",), NEW)]
    assert found.rows[1].ratio == pytest.approx(2)
    assert found.rows[2].ratio is None
    assert [r.names for r in found.regressions] == [("b",)]
    text = str(found)
    assert "sdpa → reattend" in text
    assert "slower by more than 5%" in text
    assert "1 site is as before" in text


def test_alike_sites_share_a_row() -> None:
    many = [site(f"layers.{i}") for i in range(4)]
    found = diff(plan(*many), plan(*(replace(s, choice="reattend") for s in many)))
    (row,) = found.rows
    assert len(row.names) == 4
    assert "layers.[0-3] ×4" in str(found)
    assert json.loads(found.to_json())["rows"][0]["ratio"] == 1


def test_the_tolerance_decides_what_is_slower() -> None:
    before, after = plan(site("a")), plan(site("a", seconds=1.2e-3))
    assert diff(before, after, 0.1).regressions
    assert not diff(before, after, 0.3).regressions
    assert not diff(after, before, 0.0).regressions
    with pytest.raises(ValueError, match="a share of at least 0, not -1"):
        diff(before, after, -1)


def test_sites_of_one_name_are_told_apart() -> None:
    found = diff(plan(site("a"), site("a", "reattend")), plan(site("a"), site("a", "sdpa")))
    assert [(r.before, r.after) for r in found.rows] == [("sdpa", "sdpa"), ("reattend", "sdpa")]


def test_a_plan_equals_itself() -> None:
    p = plan(site("a"), site("b"))
    found = diff(p, p)
    assert {r.status for r in found.rows} == {SAME}
    assert found.regressions == ()
    assert "2 sites are as before" in str(found)


def test_the_public_name_is_the_same_function() -> None:
    from reattend.cost_model.diff import diff as public

    assert public is diff
