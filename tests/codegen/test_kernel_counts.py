"""The table of inner loops: every kernel of benchmarks/kernel_counts.py has its rows, and what it cannot compile says why."""

from __future__ import annotations

from types import ModuleType

import pytest

from ..tiers import few


@pytest.mark.aot
@pytest.mark.parametrize("kernel", few(["ours", "tutorial", "descriptors", "listed"], "ours", "descriptors"))
def test_rows_of_a_kernel(counts: ModuleType, kernel: str) -> None:
    rows = counts.counted(counts.Subject("sm_90", 64, counts.tile_of("64x32x4x3"), kernel))
    assert [r["loop"] for r in rows] == ["full", "partial"][: len(rows)]
    assert len(rows) >= 1
    full = rows[0]
    assert full["counts"]["matrix"] > 0
    assert full["instructions"] == sum(full["counts"].values())
    assert full["spill_bytes"] == 0
    # descriptors are copied in bulk, everything else in groups
    assert (full["in_flight"] is None) == (kernel == "descriptors")
    assert ("bulk copy" in full["counts"]) == (kernel == "descriptors")


@pytest.mark.aot
def test_what_is_left_out_says_why(counts: ModuleType) -> None:
    tile = counts.tile_of("256x64x8x2")
    assert counts.counted(counts.Subject("sm_90", 64, tile, "listed")) == "its blocks are of 128"
    assert "from sm_90 on" in counts.counted(counts.Subject("sm_80", 64, tile, "descriptors"))
    with pytest.raises(SystemExit, match="queries×keys×warps×stages"):
        counts.tile_of("128x64")
