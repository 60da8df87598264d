"""The GPU's time model: cycles of published tiles, and the baselines that are known to be wrong."""

from collections.abc import Callable

import pytest

from reattend.cost_model.count.tiles import makespan, order
from reattend.cost_model.devices.architecture import architecture
from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.operations import Work
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.gpu import UNIT_PORT, operand_bytes, overlapped, resources
from reattend.cost_model.time.predict import predict, tiles_of
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle

INF = float("inf")
P, M = ex.index("p"), ex.index("m")
CAUSAL = papers.attention("causal", papers.softmax, lambda b, s: ex.where(M <= P, s * 0.125, -3e38))
FULL = papers.attention("full", papers.softmax)


def peak(name: str) -> Device:
    """The device without losses, and with the round number of operations a clock that its data sheet rests on."""
    from dataclasses import replace

    d = shipped(name)
    per_clock = {"b200": 8192, "h100": 4096}[name]
    rate = per_clock * d.units * d.clock_hz
    return replace(d, matrix_flops_per_s={"bf16": rate}, model=replace(d.model, matrix_efficiency=1.0))


@pytest.mark.parametrize(("rows", "cycles"), [(128, (1024, 768, 1024)), (256, (2048, 1536, 2048))])
def test_d1_cycles_of_flashattention_4(rows: int, cycles: tuple[int, int, int]) -> None:
    """D1: a tile of M × 128 with head size 128 on B200: products, shared memory, exponentials (FlashAttention-4 paper)."""
    d, keys, head = peak("b200"), 128, 128
    found = resources(Work({"bf16": 4 * rows * keys * head}, {"exp2": rows * keys}), d)
    reading = operand_bytes(rows, keys, head, head, 2, d.architecture.instruction_rows) / d.shared_bytes_per_unit_clock
    assert (found["matrix"] * d.clock_hz, reading, found["exp"] * d.clock_hz) == pytest.approx(cycles)


def test_d1_worked_example_on_hopper() -> None:
    """128 × 128, head size 128 on H100: 2048 cycles of products and 1024 of exponentials; overlapped 2048, else their sum."""
    d = peak("h100")
    found = resources(Work({"bf16": 4 * 128**3}, {"exp2": 128 * 128, "max": 4 * 128 * 128}), d)
    in_cycles = {r: s * d.clock_hz for r, s in found.items()}
    assert in_cycles == pytest.approx({"matrix": 2048, "exp": 1024, "vector": 512})
    assert overlapped(in_cycles, 1.0) == pytest.approx(2048)
    assert overlapped(in_cycles, 0.0) == pytest.approx(3584)


@pytest.mark.parametrize(("name", "head", "share"), [("a100", 64, 0.5), ("h100", 64, 1.0), ("h100", 128, 0.5), ("b200", 128, 1.0), ("l4", 64, 0.25)])
def test_d1_exponentials_beside_products(name: str, head: int, share: float) -> None:
    """t_exp / t_mma = rate / (64·d), from 16 exponentials a clock and unit."""
    from dataclasses import replace

    d = shipped(name)
    d = replace(d, model=replace(d.model, matrix_efficiency=1.0))
    found = resources(Work({"bf16": 4 * 128 * 128 * head}, {"exp2": 128 * 128}), d)
    assert found["exp"] / found["matrix"] == pytest.approx(share, rel=0.05)


def test_reading_operands_bounds_no_published_tile() -> None:
    """Products of these tiles are bound by the tensor cores, not by shared memory, on both architectures."""
    for name, arch, rows in (("h100", "sm_90", 128), ("b200", "sm_100", 256)):
        d = peak(name)
        read = operand_bytes(rows, 128, 128, 128, 2, architecture(arch).instruction_rows)
        work = Work({"bf16": 4 * rows * 128 * 128}, {})
        assert resources(work, d, read) == resources(work, d)
    assert operand_bytes(128, 128, 128, 128, 2, architecture("sm_80").instruction_rows) == 0


def known(cost: Cost | Obstacle) -> Cost:
    assert isinstance(cost, Cost), cost
    return cost


def test_the_longest_tile_row_is_no_estimate_of_many_waves() -> None:
    """Known wrong: every program priced as the longest one. Causal rows are half as long on average, and many waves share."""
    d, mapping = shipped("h100"), TileMapping(128, 128, 8, 2)
    at = {"B": 4, "H": 16, "P": 8192, "M": 8192, "E": 128, "F": 128}
    causal, full = (known(predict(c, mapping, d, at)).seconds for c in (narrow(CAUSAL), narrow(FULL)))
    # the longest row of tiles is as long as a row without a mask: that estimate says 1.0
    assert 0.5 < causal / full < 0.62


def test_one_wave_takes_as_long_as_its_longest_program() -> None:
    d, mapping = shipped("h100"), TileMapping(128, 128, 8, 2)
    at = {"B": 1, "H": 1, "P": 8192, "M": 8192, "E": 128, "F": 128}
    causal, full = (known(predict(c, mapping, d, at)).seconds for c in (narrow(CAUSAL), narrow(FULL)))
    assert causal / full > 0.95


def test_makespan_of_causal_rows() -> None:
    """N = 8192, tiles of 128, 16 heads on 132 slots: 252.1 tiles a slot, 292 in ascending order, 253 longest first."""
    jobs = tiles_of(CAUSAL, TileMapping(128, 128), {"B": 1, "H": 16, "P": 8192, "M": 8192, "E": 64, "F": 64})
    assert not isinstance(jobs, Obstacle)
    costs = jobs.visited.astype(float)
    assert costs.sum() * jobs.repeat / 132 == pytest.approx(252.12, abs=0.01)
    assert makespan(order(costs, jobs.repeat, False), 132) == 292


def narrow(c: Cascade) -> Cascade:
    from .test_predict import narrow as to_bf16

    return to_bf16(c)


def test_few_programs_draw_through_few_ports() -> None:
    """One program cannot draw what the memory gives, however long it is let: keys are split until enough units draw."""
    d = shipped("h200")
    at = {"B": 1, "H": 1, "P": 1, "M": 32768, "E": 128, "F": 128}
    seconds = {}
    for split in (1, 8, 64):
        cost = predict(FULL, TileMapping(16, 32, 4, 2, split_m=split), d, at)
        assert isinstance(cost, Cost)
        seconds[split] = cost.parts["l2"]
    port = UNIT_PORT * d.clock_hz * d.model.bandwidth_efficiency
    moved = seconds[1] * port
    assert moved >= 2 * 32768 * 128 * 4
    assert seconds[8] == pytest.approx(seconds[1] / 8, rel=0.01)
    assert seconds[64] >= moved / d.l2_bytes_per_s


def test_lists_that_data_decides_are_two_launches_more() -> None:
    d, at = shipped("h200"), {"B": 2, "H": 8, "P": 512, "M": 512, "E": 64, "F": 64}

    def launched(mask: str) -> float:
        c = papers.attention(mask, papers.softmax, MASKED[mask])
        cost = predict(c, TileMapping(32, 32, 8, 2), d, at)
        assert isinstance(cost, Cost)
        return round(cost.parts["launch"] / d.model.launch_seconds)

    assert {mask: launched(mask) for mask in MASKED} == {"causal": 1, "parity": 1, "lengths": 1, "padding": 3}


MASKED: dict[str, Callable[[papers.Builder, ex.Expr], ex.Expr]] = {
    "causal": lambda b, s: ex.where(M <= P, s, -INF),
    "parity": lambda b, s: ex.where(ex.equal((M + P) % 2, 0), s, -INF),
    "lengths": lambda b, s: ex.where(M < b.input("length", "b", "i64"), s, -INF),
    "padding": lambda b, s: ex.where((M <= P) & b.input("pad", "bm", "b1"), s, -INF),
}
