"""Rooflines: no candidate computes faster than its device could at the FLOP that it does with a byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reattend.cost_model.devices.device import Device, shipped, targets, with_threads
from reattend.cost_model.report.roofline import roof
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import VendorUse, best_mapping, predict_original, predict_vendor
from reattend.patterns.cascade import Cascade

from .test_predict import CAPPED, CAUSAL, FULL, GROUPED, WINDOW, narrow

DEVICES = [d for d in targets() if d.kind != "array"]
USES = [VendorUse(b, skips=s) for b in ("flash", "cudnn", "efficient", "math", "flex") for s in (False, True)]
# (queries, keys): prefill, a chunk over a cache, decode
SHAPES = [(128, 128), (1000, 1000), (4096, 4096), (512, 8192), (1, 512), (1, 8192), (4, 4096), (17, 4096), (1, 131072)]


def costs(c: Cascade, d: Device, at: dict[str, int]) -> Iterator[tuple[str, Cost]]:
    yield "original", predict_original(c, d, at)
    best = best_mapping(c, d, at)
    if isinstance(best, tuple):
        yield str(best[0]), best[1]
    for use in USES:
        cost = predict_vendor(c, use, d, at)
        if isinstance(cost, Cost):
            yield str(use), cost


def below(c: Cascade, d: Device, at: dict[str, int], dtype: str) -> None:
    # SDPA's fall-back on a CPU computes in f32 whatever its inputs
    for name, cost in costs(c, d, at):
        there = roof(d, "f32" if "math" in name and d.kind == "cpu" else dtype)
        assert cost.flops / cost.seconds <= there.at(cost.flops / cost.bytes) * (1 + 1e-9), (d.name, name, at, cost)


@pytest.mark.parametrize(
    "d",
    [
        pytest.param(d, marks=[] if d.name in ("h200", "cpu") else pytest.mark.slow, id=f"{d.name}-{d.units}")
        for d in (*DEVICES, with_threads(shipped("cpu"), 1))
    ],
)
@given(st.sampled_from(SHAPES), st.sampled_from(["f32", "bf16"]), st.sampled_from([(1, 8), (16, 32)]),
       st.sampled_from([64, 128]))
@example((1, 131072), "bf16", (16, 32), 128)
@example((4096, 4096), "bf16", (1, 8), 128)
def test_no_candidate_lies_above_its_roof(
    d: Device, shape: tuple[int, int], dtype: str, many: tuple[int, int], head: int
) -> None:
    queries, keys = shape
    at = {"B": many[0], "H": many[1], "P": queries, "M": keys, "E": head, "F": head, "past": keys - queries}
    for c in (GROUPED, FULL, CAPPED, *((CAUSAL, WINDOW) if queries == keys else ())):
        below(narrow(c) if dtype == "bf16" else c, d, at, dtype)


def test_heads_that_share_a_tile_do_its_products_once() -> None:
    """Decode with four query heads a key head: one tile of 64 rows serves them all, so a quarter of the FLOP is done."""
    d, at = shipped("h200"), {"B": 4, "H": 32, "P": 1, "M": 8192, "E": 128, "F": 128, "past": 8191}
    flash = VendorUse("flash")
    packed, alone = (predict_vendor(narrow(c), flash, d, at) for c in (GROUPED, FULL))
    assert isinstance(packed, Cost)
    assert isinstance(alone, Cost)
    assert packed.flops == alone.flops / 4 == 2 * 4 * 8 * 64 * 8192 * (128 + 128)


def test_what_a_kernel_does_not_skip_is_work() -> None:
    """A kernel that is given a mask tensor walks every tile of a causal mask."""
    d, at = shipped("h200"), {"B": 1, "H": 8, "P": 4096, "M": 4096, "E": 64, "F": 64}
    whole, half = (predict_vendor(narrow(CAUSAL), VendorUse("efficient", skips=s), d, at) for s in (False, True))
    assert isinstance(whole, Cost)
    assert isinstance(half, Cost)
    assert whole.flops == 2 * 8 * 4096 * 4096 * 128
    tiles = 4096 // 128
    assert half.flops / whole.flops == pytest.approx((tiles + 1) / (2 * tiles))


def test_a_cpu_has_the_roof_of_its_caches_and_threads() -> None:
    one, two = (roof(with_threads(shipped("cpu"), n), "f32") for n in (1, 2))
    assert two.flops_per_s == pytest.approx(1.85 * one.flops_per_s)
    assert two.bytes_per_s > two.dram_bytes_per_s > one.dram_bytes_per_s
    gpu = roof(shipped("h200"), "bf16")
    assert gpu.at(gpu.ridge) == pytest.approx(gpu.flops_per_s) == pytest.approx(989.4e12)
    assert gpu.at(1.0) == gpu.bytes_per_s == 4.8e12
