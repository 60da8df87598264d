"""The CPU's body for few queries against the oracle in float64: every attention, segments and rows of every number, empty tiles.

Each kernel is a compile of a second or more: a few run in the fast tier, the breadth is marked slow.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.files import cache
from reattend.cost_model.devices.device import Device, alone, shipped, with_threads
from reattend.cost_model.time.predict import ranked_mappings
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle
from tests import strategies
from tests.codegen import test_cpu
from tests.codegen.attentions import CAUSAL, VARIANTS, Case, build, long_sum, masked, relative_rms
from tests.tiers import few

DECODE = TileMapping(16, 32, body="decode")
TYPES = test_cpu.TYPES
FAST = {("causal_padding", "bf16"), ("gqa", "f32")}
EVERY = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in FAST else pytest.mark.slow)
    for i, name in enumerate(sorted(VARIANTS)) for dtype in TYPES
    # terms are printed alike in every type, operands are read alike in every attention
    if {"f32": True, "bf16": i % 2 == 0 or (name, dtype) in FAST, "f16": name in ("gqa", "bias")}[dtype]
]


def kernel(c: Cascade) -> cpu.CpuKernel:
    made = cpu.build(c, DECODE)
    assert isinstance(made, cpu.CpuKernel), str(made)
    return made


def close(c: Cascade, x: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    made = kernel(c)
    out = made.run(x, {n: sizes[n] for n in made.sizes})
    exact = evaluate(c, x, sizes, widen=True)[c.outputs[0]]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-6, equal_nan=True)
    return out


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_attentions(name: str, dtype: str) -> None:
    test_cpu.check(VARIANTS[name](dtype=dtype), DECODE, TYPES[dtype])


@pytest.mark.slow
@settings(max_examples=20)
@given(strategies.programs())
def test_drawn_programs(program: strategies.Program) -> None:
    made, x = kernel(program.cascade), program.inputs()
    out = made.run(x, {n: program.sizes[n] for n in made.sizes})
    exact, eager = (evaluate(program.cascade, x, program.sizes, widen=w)["O"] for w in (True, False))
    assert torch.equal(out.isnan(), exact.isnan())
    worst = [float((t - exact).nan_to_num(0.0, 0.0, 0.0).abs().max()) for t in (out, eager)]
    digits = 4 * torch.finfo(torch.float32).eps * float(exact.nan_to_num(0.0, 0.0, 0.0).abs().max())
    assert worst[0] <= max(test_cpu.MOST * worst[1], 1e-6, digits), program.label


def test_many_small_weights_add_up() -> None:
    """Beside a large sum small numbers are lost one by one, not together: keys are summed up by tiles."""
    case, x = long_sum(4)
    made = kernel(case.cascade)
    out = made.run(x, {n: case.sizes[n] for n in made.sizes})
    assert relative_rms(out, evaluate(case.cascade, x, case.sizes, widen=True)["O"]) < 6e-7


def test_rows_of_every_number_and_odd_keys() -> None:
    """Blocks of 8, 4, 2 and 1 rows, more queries than a tile has, keys fewer than a vector."""
    for p, m in ((1, 1), (1, 2), (1, 33), (2, 100), (3, 15), (5, 17), (8, 700), (20, 40)):
        case = VARIANTS["cross"](p=p, m=m, b=1)
        close(case.cascade, case.inputs(seed=p), case.sizes)


@pytest.mark.parametrize("threads", few([1, 2, 3], 3))
def test_keys_are_split_over_threads(threads: int) -> None:
    """Their parts are added up in their order: the same bits every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, sizes in (("cross", {"p": 1, "m": 999, "b": 1}), ("gqa", {"p": 70})):
            case: Case = VARIANTS[name](**sizes)
            x = case.inputs()
            first = close(case.cascade, x, case.sizes)
            assert all(torch.equal(first, close(case.cascade, x, case.sizes)) for _ in range(3))
    finally:
        torch.set_num_threads(before)


def test_tiles_without_a_key_are_left_out() -> None:
    """A window: what lies before it is not read. Of queries in several tiles each has its own; so have heads."""
    case = build(masked(CAUSAL & (ex.index("p") - ex.index("m") < 40)), square=True, group=2, p=333, m=333)
    close(case.cascade, case.inputs(), case.sizes)
    far = build(masked(ex.index("m") - ex.index("h") * 64 >= 100), p=1, m=500)
    close(far.cascade, far.inputs(), far.sizes)


def cpu_module(c: Cascade) -> Any:
    return cache.load(kernel(c).source)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another processor")
@pytest.mark.parametrize("flags", ["-march=haswell", "-march=x86-64"])
def test_on_narrower_vectors(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = VARIANTS["gqa"](p=70, m=70)
    module = cpu_module(case.cascade)
    monkeypatch.setattr(module, "target_flags", lambda: (flags,))
    module.compiled.cache_clear()
    try:
        close(case.cascade, case.inputs(), case.sizes)
    finally:
        module.compiled.cache_clear()


def machine(threads: int = 1) -> Device:
    return with_threads(alone(shipped("cpu")), threads)


def test_it_is_a_mapping_of_few_queries_alone() -> None:
    c = VARIANTS["gqa"]().cascade
    free = dict.fromkeys(c.free_symbols, 1)
    for p, there in ((1, True), (8, True), (16, False), (512, False)):
        sizes = {**free, **VARIANTS["gqa"](p=p).sizes, **dict.fromkeys(c.free_symbols, p)}
        found = ranked_mappings(c, machine(), sizes)
        assert not isinstance(found, Obstacle)
        assert any(m.body == "decode" for m, _ in found) == there


def test_the_time_of_few_queries_is_that_of_reading_their_keys_once() -> None:
    c = VARIANTS["decode"]().cascade

    def seconds(keys: int, threads: int = 1) -> float:
        sizes = {**dict.fromkeys(c.free_symbols, 1), "t": keys, "past": keys - 1}
        found = ranked_mappings(c, machine(threads), sizes)
        assert not isinstance(found, Obstacle)
        return next(x.seconds for m, x in found if m.body == "decode")

    assert seconds(1 << 20) == pytest.approx(2 * seconds(1 << 19), rel=0.05)
    assert seconds(1 << 20, threads=2) < seconds(1 << 20)
