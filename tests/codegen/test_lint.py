"""What the assembler of our kernels may not take beside the stock kernel's: full tiles of causal bf16, three stages."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from reattend.codegen.triton import aot
from reattend.codegen.triton.assembler import Loop, instructions
from reattend.codegen.triton.kernel import TritonKernel, build
from reattend.patterns.mapping import TileMapping

from .. import strategies
from ..strategies import attention

pytestmark = pytest.mark.aot
# At the tile of the stock kernel, three stages.
CASES = [
    pytest.param("sm_90", 64, "128x64x4x3", marks=pytest.mark.slow),
    pytest.param("sm_90", 128, "128x64x8x3", marks=pytest.mark.slow),
    pytest.param("sm_80", 64, "128x64x8x3", marks=pytest.mark.slow),
    pytest.param("sm_80", 128, "128x64x8x3", marks=pytest.mark.slow),
    pytest.param("sm_100", 128, "128x64x8x3", marks=pytest.mark.slow),
]


def full_tiles(counts: ModuleType, arch: str, head: int, tile: str, kernel: str) -> tuple[Loop, aot.AotReport]:
    asked = counts.KERNELS[kernel](counts.Subject(arch, head, counts.tile_of(tile), kernel))
    report = aot.compile_request(asked, arch)
    return report.loops[0], report


@pytest.mark.parametrize(("arch", "head", "tile"), CASES)
def test_full_tiles_beside_the_stock_kernel(counts: ModuleType, arch: str, head: int, tile: str) -> None:
    (ours, report), (stock, _) = (full_tiles(counts, arch, head, tile, k) for k in ("ours", "tutorial"))
    mapping = counts.tile_of(tile)
    assert report.spill_bytes == 0
    assert ours.in_flight is not None
    assert stock.in_flight is not None
    assert ours.in_flight >= stock.in_flight
    assert ours.busy <= 1.05 * stock.busy
    assert ours.counts["barrier"] <= stock.counts["barrier"] + 1
    # of one thread: a multiplication for each element of the accumulator, and one for the sum of each of its rows
    threads = mapping.warps * 32
    correction, scores = mapping.tile_p * head // threads, mapping.tile_p * mapping.tile_m // threads
    assert ours.counts["multiply"] - correction <= 0.1 * scores
    assert ours.counts["matrix"] == stock.counts["matrix"]


@pytest.mark.parametrize("head", [72, pytest.param(40, marks=pytest.mark.slow), pytest.param(88, marks=pytest.mark.slow)])
def test_heads_of_8_modulo_16_are_not_read_two_bytes_at_a_time(counts: ModuleType, head: int) -> None:
    c = attention(lambda s: s, strategies.ROWS["softmax"], h=8, e=head, f=head, dtype="bf16").cascade
    made = build(c, TileMapping(128, 64, 8, 3), "sm_90")
    assert isinstance(made, TritonKernel), made
    report = aot.compile(made, "sm_90")
    assert report.spill_bytes == 0
    full = report.loops[0]
    assert full.counts["global load"] == 0
    narrow = [i.text for i in instructions(report.assembly) if re.match(r"(LDG|STG|LDGSTS)\S*\.U16", i.text)]
    assert narrow == []
