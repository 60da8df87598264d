"""The cells of benchmarks/cost_model.py: the split is what the file says, and all candidates of a cell compute the same."""

from types import ModuleType

import pytest
import torch

from reattend.codegen.measure import calibrate, company
from reattend.cost_model.calibration.calibrate import CALLS, HEADS
from reattend.cost_model.calibration.ladder import ladder
from reattend.cost_model.devices.device import shipped, with_threads
from tests.loading import benchmark


@pytest.fixture(scope="module")
def cells() -> ModuleType:
    return benchmark("cells")


def test_held_out_cells_are_in_no_other_grid_and_no_calibration(cells: ModuleType) -> None:
    grids = {name: {c for t in (1, 2) for c in make(t)} for name, make in cells.GRIDS.items()}
    assert not grids["heldout"] & (grids["regret"] | grids["development"])
    assert not grids["fresh"] & (grids["heldout"] | grids["regret"] | grids["development"])
    assert not grids["unseen"] & set().union(*(g for name, g in grids.items() if name != "unseen"))
    assert len(grids["regret"]) == len(grids["unseen"]) == 60
    shapes = (*calibrate.CHECKED, *company.SHAPES)
    assert not {(s.mask, s.heads, s.queries, s.keys) for s in calibrate.CHECKED} & {
        (s.mask, s.heads, s.queries, s.keys) for s in company.SHAPES
    }
    timed = {(q, HEADS, q) for q in CALLS.values()} | {(s.queries, s.heads, s.keys) for s in shapes}
    for name in ("heldout", "fresh", "unseen"):
        assert not {(c.queries, c.heads, c.keys) for c in grids[name]} & timed


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "score"), [("causal", "softcap"), ("none", "bias"), ("window", "bias")])
def test_the_candidates_of_a_cell_with_a_score_agree(cells: ModuleType, mask: str, score: str) -> None:
    cell = cells.Cell(mask, "f32", 300, 300, 1, heads=3, head=40, window=70, score=score)
    with torch.no_grad():
        made, _ = cells.calls(cell, with_threads(shipped("cpu"), 1), False)
        outputs = {name: call() for name, call in made.items()}
    assert {"original"} < set(outputs)
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["original"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mask", ["causal", "padding", *(pytest.param(m, marks=pytest.mark.slow) for m in ("none", "window", "prefix"))]
)
def test_the_candidates_of_a_cell_agree(cells: ModuleType, mask: str) -> None:
    cell = cells.square(mask, "f32", 400, 1, batch=2, heads=4, group=2, head=16)
    d = with_threads(shipped("cpu"), 1)
    with torch.no_grad():
        made, mappings = cells.calls(cell, d, False)
        outputs = {name: call() for name, call in made.items()}
    assert {"original", "sdpa"} < set(outputs)
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["original"], rtol=0, atol=1e-5)
    for rung in ladder(d, d):
        costs = cells.costs(cell, [*outputs, "flex"], mappings, rung.device, rung.masked)
        assert all(c.seconds > 0 for c in costs.values())


def test_decode_rows_see_all_keys(cells: ModuleType) -> None:
    cell = cells.Cell("causal", "f32", 3, 300, heads=4, group=2, head=16)
    with torch.no_grad():
        made, _ = cells.calls(cell, with_threads(shipped("cpu"), 1), False)
        outputs = {name: call() for name, call in made.items()}
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["original"], rtol=0, atol=1e-5)
    assert "3×300" in str(cell)
