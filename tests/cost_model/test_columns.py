"""Many points at once are what each of them is alone: sizes, mappings, queues of programs, steps of whole models."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import sympy

from reattend.cost_model.columns import SizeColumns
from reattend.cost_model.count.schedule import makespan
from reattend.cost_model.count.subject import Subject, bound, subject
from reattend.cost_model.count.tiles import NOTHING
from reattend.cost_model.devices.device import shipped
from reattend.cost_model.layer.step import Attended, Extent, StepSpread, Types
from reattend.cost_model.layer.steps import Attentions, StepColumns, step
from reattend.cost_model.layer.work import COLUMNS, INNER, LayerProduct, LayerWork, Pass, Weights
from reattend.cost_model.mesh.mesh import parse
from reattend.cost_model.operations import WIDTH, bound_size, size_int
from reattend.cost_model.time import gpu
from reattend.cost_model.time.fit import limited
from reattend.cost_model.time.predict import _kernel, _launches, _programs, _rows
from reattend.cost_model.time.ranking import fitting, rough_seconds
from tests.plans import CAUSAL, WINDOW

S, B = sympy.symbols("s b", integer=True, positive=True)


@pytest.mark.parametrize("size", [7, S, S * B * 4096, 2 * S + 1, S**2 + B, sympy.floor((S + 63) / 64), sympy.Mod(S, 7), S / 2])
def test_a_size_is_the_same_in_a_column(size: sympy.Expr | int) -> None:
    lengths, batches = [1, 8, 1000, 131072], [1, 3, 64, 10**14]
    made = SizeColumns({"s": lengths, "b": batches}, 4).integers(size)
    alone = [size_int(bound_size(size, {"s": s, "b": b})) for s, b in zip(lengths, batches)]
    assert made.tolist() == alone
    with pytest.raises(ValueError, match="no value for size t"):
        SizeColumns({"s": lengths}, 4).of(S + sympy.Symbol("t"))


def test_further_symbols_are_sizes_of_others_or_their_traced_values() -> None:
    at = SizeColumns({"s": [3, 5]}, 2).with_values({"t": S + 1, "u": sympy.Symbol("w") + 1, "v": None}, {"u": 9})
    assert at.integers(sympy.Symbol("t") * 2).tolist() == [8, 12]
    assert at.integers(sympy.Symbol("u")).tolist() == [9, 9]


@pytest.mark.parametrize(("jobs", "slots"), [(40, 7), (700, 132), (5000, 108), (3000, 24)])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_queue_ends_as_if_its_jobs_were_handed_out_one_by_one(jobs: int, slots: int, spread: float) -> None:
    costs = np.exp(np.random.default_rng(jobs).normal(0, spread, jobs))
    for order in (costs, np.sort(costs), np.sort(costs)[::-1], np.tile(np.sort(costs[: jobs // 10]), 10)):
        ends = order[:slots].tolist()
        heapq.heapify(ends)
        for c in order[slots:].tolist():
            heapq.heapreplace(ends, ends[0] + c)
        assert makespan(order, slots) == max(ends)


@pytest.mark.parametrize("device", ["h200", "b200", "a100", "l40s", "mi300x"])
def test_mappings_are_compared_by_the_time_of_each(device: str) -> None:
    d = shipped(device)
    for c, queries, keys, batch in ((CAUSAL, 1000, 1000, 2), (CAUSAL, 4096, 4096, 1), (WINDOW, 300, 3000, 5), (WINDOW, 8, 9000, 3)):
        s = subject(c)
        assert isinstance(s, Subject)
        at = bound(s, {"B": batch, "H": 8, "P": queries, "M": keys, "E": 64, "F": 64})
        fits = fitting(d, 64, 64, WIDTH[s.dtype], *limited(_rows(at), at.keys))
        assert fits is not None
        work = [_programs(s, at, tile, NOTHING) for tile in fits.tiles]
        rough = rough_seconds(fits, work, at, _launches(s, at), gpu.own_pace(d))
        alone = [gpu.seconds(_kernel(s, at, m, d, NOTHING), d, gpu.own_pace(d), 0).seconds for m in fits.mappings]
        assert rough.tolist() == alone


WORK = LayerWork(
    (
        (LayerProduct(S * B, 4096, 6144, cut=COLUMNS), 8), (LayerProduct(S * B, 4096, 4096, cut=INNER), 8),
        (LayerProduct(2 * S * B, 2048, 768, 64, experts=True), 8), (LayerProduct(S * B, 4096, 128256, cut=COLUMNS, last=True), 1),
    ),
    ((Pass(S * B * 8192, S * B * 8192), 16), (Pass(S * B * 57344, S * B * 28672, True), 8)), ((S * B * 8192, 16),),
    (Weights(6_979_321_856, 2, True, True), Weights(266_240, 2)),
)


@pytest.mark.parametrize("mesh", ["", "tp=4", "tp=2,dp=2", "tp=16"])
@pytest.mark.parametrize("decodes", [False, True])
def test_a_step_among_others_is_that_of_its_point(mesh: str, decodes: bool) -> None:
    d, types = shipped("h200"), Types("fp8", "int8")
    spread = StepSpread(parse(mesh)) if mesh else None
    lengths = [1, 1, 1, 1] if decodes else [128, 1000, 4096, 16384]
    batches = [1, 3, 64, 2]
    extents = [Extent(b, s, max(s, 4096), True) for s, b in zip(lengths, batches)]
    near = [Attended(1e-5 * (i + 1), 6e-6, 0.2, 10**6 * b, True, 7 * b, 32, 8) for i, b in enumerate(batches)]
    far = [Attended(3e-6, 2e-6, 0.3, 10**5 * b, False, 3 * b, 32, 8) for b in batches]
    at = SizeColumns({"s": lengths, "b": batches}, 4)
    many = StepColumns(WORK, at, extents).on(Attentions.of([near, far], [0, 1, 0, 0]), d, types, spread)
    for i, (s, b) in enumerate(zip(lengths, batches)):
        assert many[i] == step(WORK.at({"s": s, "b": b}), [near[i], far[i], near[i], near[i]], extents[i], d, types, spread)
