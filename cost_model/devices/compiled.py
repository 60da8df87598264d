"""Our kernels as they were compiled: registers and spills by architecture, element type, head size and tile.

    compiled.csv    written by `python benchmarks/compiled.py` from causal attention, ahead of time: nothing estimated
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("compiled.csv")
COLUMNS = (
    "arch", "type", "head", "tile_p", "tile_m", "warps", "registers", "spill_bytes", "shared_bytes", "instructions",
    "products", "exponentials", "barriers",
)
# Bytes of an element → the type that was compiled.
TYPES = {2: "bf16", 4: "f32"}


@dataclass(frozen=True)
class Compiled:
    """`registers` of a thread, `spill_bytes` of its stack; what a turn over a full tile issues, of one warp."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    products: int
    exponentials: int
    barriers: int

    @property
    def others(self) -> int:
        """Instructions of a turn that are neither products of matrices nor exponentials: what a warp issues to lanes."""
        return self.instructions - self.products - self.exponentials


@cache
def table() -> Mapping[tuple[str, str, int, int, int, int], Compiled]:
    """Every row, by architecture, type, head size, rows and keys of a tile, warps."""
    with FILE.open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return {
        (r["arch"], r["type"], *(int(r[c]) for c in COLUMNS[2:6])): Compiled(*(int(r[c]) for c in COLUMNS[6:]))  # type: ignore[misc]
        for r in rows
    }


def compiled(arch: str, width: int, head: int, tile: tuple[int, int, int]) -> Compiled | None:
    """The row of a kernel with elements of `width` bytes and a tile of (rows, keys, warps); None where none was compiled."""
    return table().get((arch, TYPES.get(width, ""), head, *tile))
