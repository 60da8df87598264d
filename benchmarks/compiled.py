"""What our kernel takes, compiled: registers, spills, shared memory, one turn's instructions. Needs Triton, no GPU.

    python benchmarks/compiled.py                        rows that cost_model/devices/compiled.csv lacks
    python benchmarks/compiled.py --anew                 all of them: after a change of the kernel or of Triton
    python benchmarks/compiled.py --archs sm_90 --heads 128 --types f32

Compiles causal attention ahead of time, kernel by mapping by architecture, and writes a row as soon as it has it; the cost
model reads the table in place of its estimates. Two stages stand for all: stages move shared memory alone, which is laid out
exactly by rule. A turn is one over full tiles.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from kernel_counts import GROUP, HEADS, TOKENS, Causal
from rich.progress import track

from reattend.codegen.files import cache
from reattend.codegen.triton import aot, assembler
from reattend.codegen.triton.kernel import MISSING, TritonKernel, build
from reattend.cost_model.devices.compiled import COLUMNS, FILE
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import DTYPE
from reattend.patterns.mapping import TileMapping
from reattend.rewriter.capture import capture, export
from reattend.rewriter.choose import choose

# Rows, keys, warps by the bytes of an element: what is worth predicting on long sequences, and for fp32 on short ones.
TILES = {2: ((64, 128), (64, 128), (4, 8)), 4: ((32, 64), (32, 64), (4, 8))}
Key = tuple[str, ...]


@lru_cache
def lifted(head: int, kind: str) -> Cascade:
    """The cascade of causal attention as models call it, 4 query heads to a key head."""
    from collections import Counter

    sizes = (HEADS, HEADS // GROUP, HEADS // GROUP)
    q, k, v = (torch.empty(1, h, TOKENS, head, dtype=DTYPE[kind]) for h in sizes)
    with torch.no_grad():
        graph = export.from_export(Causal().eval(), (q, k, v), {}, dynamic=False).graph
    (found,) = [p for region in capture.regions(graph) for p in choose.places(region, Counter()).attentions]
    return found.cascade


def wanted(given: argparse.Namespace) -> Iterator[Key]:
    for arch, kind, head in product(given.archs.split(","), given.types.split(","), given.heads):
        if kind == "f32" and head > 128:
            continue
        for tile in product(*TILES[4 if kind == "f32" else 2]):
            yield (arch, kind, str(head), *map(str, tile))


def compiled(key: Key) -> dict[str, Any] | None:
    """A row, or None where the tile does not fit the architecture."""
    arch, kind, head, *tile = key
    tile_p, tile_m, warps = map(int, tile)
    made = build(lifted(int(head), kind), TileMapping(tile_p, tile_m, warps, 2), arch)
    if not isinstance(made, TritonKernel):
        return None
    report = aot.compile(made, arch)
    # products in fp32 are multiplications of lanes
    turn = (report.loops or assembler.loops(report.assembly, "fused"))[0]
    counted = (turn.busy, *(turn.counts[kind] for kind in ("matrix", "exp2", "barrier")))
    return dict(zip(COLUMNS, (*key, report.registers, report.spill_bytes, report.shared_bytes, *counted)))


def known() -> dict[Key, dict[str, Any]]:
    if not FILE.is_file():
        return {}
    with FILE.open(encoding="utf-8") as f:
        return {tuple(row[c] for c in COLUMNS[:6]): row for row in csv.DictReader(f)}


def write(rows: dict[Key, dict[str, Any]]) -> None:
    ordered = sorted(rows.items(), key=lambda x: (*x[0][:2], *map(int, x[0][2:])))
    with FILE.open("w", encoding="utf-8", newline="") as f:
        out = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(row for _, row in ordered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="sm_80,sm_90,sm_100", help="architectures (%(default)s)")
    parser.add_argument("--types", default="bf16,f32", help="element types (%(default)s)")
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128, 256], help="head sizes (64 128 256)")
    parser.add_argument("--anew", action="store_true", help="compile what the table has as well")
    given = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit(MISSING)
    rows = known()
    todo = [k for k in wanted(given) if given.anew or k not in rows]
    with tempfile.TemporaryDirectory() as folder:
        cache.directory = lambda: Path(folder)  # type: ignore[assignment]
        for key in track(todo, description="compiling"):
            row = compiled(key)
            if row is not None:
                rows[key] = row
                write(rows)
    print(f"{len(rows)} rows in {FILE}")


if __name__ == "__main__":
    main()
