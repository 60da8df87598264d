"""Grids: points that equal plans made there, columns, files, what is refused; counts that are shared stay what they are."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reattend.cost_model.count.subject import Subject, shape, subject, tile_work, work
from reattend.cost_model.count.tiles import NOTHING, Jobs
from reattend.cost_model.sites.course import SweepError
from reattend.cost_model.sites.site import PlanError
from reattend.patterns.mapping import TileMapping
from tests.plans import SIZES, WINDOW, plan

PLAN = plan()


def test_rows_equal_plans_made_at_their_sizes() -> None:
    found = PLAN.grid(["h200", "a100"], seq=(300, 512), batch=(1, 3))
    assert found.points == 8
    assert len(found) == 2 * found.points
    rows: list[dict[str, Any]] = [dict(zip(found.columns, r)) for r in found.rows()]
    for row in rows:
        there = PLAN.at(row["device"], seq=row["seq"], batch=row["batch"])
        site = there.sites[0 if row["layers"] == 2 else 2]
        assert (row["choice"], row["seconds"]) == (site.choice, site.chosen.seconds)
        assert site.before is not None
        assert row["original_seconds"] == site.before.seconds
        assert site.memory is not None
        assert row["cache_bytes"] == site.memory.cache_bytes


def test_a_grid_is_written_as_csv_or_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = PLAN.grid(seq=(300,))
    with found.write(tmp_path / "grid.csv").open(encoding="utf-8", newline="") as text:
        lines = list(csv.DictReader(text))
    assert [float(x["seconds"]) for x in lines] == list(found.columns["seconds"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PlanError, match="needs pyarrow"):
        found.write(tmp_path / "grid.parquet")
    with pytest.raises(PlanError, match="cannot be written"):
        found.write(tmp_path / "nowhere" / "grid.csv")


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(SweepError, match="needs an axis"):
        PLAN.grid()
    with pytest.raises(SweepError, match="'width' is fixed or unknown"):
        PLAN.grid(width=(4,))
    with pytest.raises(SweepError, match="at least 1"):
        PLAN.grid(seq=(0,))
    narrow = plan(P=400).grid(seq=(300, 512))
    assert narrow.points == 1
    assert "seq=512" in str(narrow)


@pytest.mark.parametrize("at", [SIZES, {**SIZES, "P": 333, "M": 900, "B": 5}])
def test_a_tile_is_counted_as_the_whole_is(at: dict[str, int]) -> None:
    s = subject(WINDOW)
    assert isinstance(s, Subject)
    sizes = shape(s.cascade, s.attention, at)
    for tile in ((64, 64), (128, 32)):
        made, jobs = tile_work(s, sizes, tile, NOTHING)
        whole = work(s, sizes, TileMapping(*tile), at, jobs)
        assert (made.full, made.partial, made.program) == (whole.full_tile, whole.partial_tile, whole.program)
        assert made.traffic == whole.traffic
        assert made.bytes == tuple(
            sum(getattr(t, field) for t in whole.traffic if t.written == written)
            for field, written in (("moved", False), ("once", False), ("once", True))
        )


def test_the_extremes_of_programs_are_those_of_all_of_them() -> None:
    draws = np.random.default_rng(3)
    for shape_ in ((1, 1), (3, 17), (1, 64)):
        full, partial = (draws.integers(0, 9, shape_).astype(np.float64) for _ in range(2))
        jobs = Jobs(full, partial, 2, None)
        for a, b in ((1.0, 1.4), (2.0, 0.1), (0.0, 1.0)):
            costs = jobs.full * a + jobs.partial * b
            assert jobs.extremes(a, b) == pytest.approx((costs.min(), costs.max()))
        assert jobs.repeated(5).repeat == 5
        assert jobs.repeated(5).extremes(1.0, 1.4) == jobs.extremes(1.0, 1.4)
