"""What one turn of an attention kernel's loop issues: ours beside others that compute the same. Needs Triton, no GPU.

    python benchmarks/kernel_counts.py                                   the table below for sm_80, sm_90 and sm_100
    python benchmarks/kernel_counts.py --archs sm_90 --heads 64 --tiles 128x64x4x3 --loops all
    python benchmarks/kernel_counts.py --archs sm_90 --kernels ours,tutorial --order

Compiles causal bf16 attention (4 query heads to a key head) ahead of time and counts its assembler, loop by loop. A tile
is queries × keys × warps × stages. Kernels: `ours` (as emitted for SDPA), `tutorial` and `descriptors` (a range of keys, by
pointers or by tensor descriptors, these from sm_90 on), `listed` (lists of blocks of keys, as FlexAttention has them). All
visit full tiles in one loop and the diagonal's in another; a diagonal of one or two tiles may have none.

How to read a row. MMA (matrix instructions) is the work; every other column is paid for it. FMUL above the scores of a
thread says that a scale was not folded. `flying`: groups of asynchronous copies (`cp`) that go on while a turn waits for
one; 0 hides no latency, whatever the stages; bulk copies (`tma`) are not counted so. `int`, `sel`, `ldg`, `lds`, `bar` and
`nop` are integer arithmetic, selections, loads from global and from shared memory, barriers, idle slots between products.
`reg`, `spill` (bytes) and `KiB` (of shared memory) are of the whole kernel. --order prints what a turn issues, in order: do
products overlap with exponentials?

Nothing is timed and nothing is run. Writes benchmarks/results/kernel_counts.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import timing
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from reattend.codegen.triton import aot
from reattend.codegen.triton.assembler import Loop
from reattend.codegen.triton.kernel import MISSING, build
from reattend.patterns.cascade import Cascade
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from reattend.rewriter.capture import capture, export
from reattend.rewriter.choose import choose

TOKENS, HEADS, GROUP, BLOCK = 4096, 32, 4, 128
# A column of the table, and the kind of instruction that it counts.
COLUMNS = {
    "FMUL": "multiply", "FFMA": "fused", "FADD": "add", "FMNMX": "maximum", "EX2": "exp2", "MMA": "matrix",
    "int": "integer", "sel": "select", "ldg": "global load", "cp": "copy", "tma": "bulk copy", "lds": "shared load",
    "bar": "barrier", "nop": "idle",
}
LOOPS = ("full", "partial")
Row = dict[str, Any]
console = Console(width=140)


@dataclass(frozen=True)
class Subject:
    """One kernel at one tile for one architecture."""

    arch: str
    head: int
    tile: TileMapping
    kernel: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch} D{self.head} {tile_text(self.tile)}"


# --- what Triton is asked for -----------------------------------------------------------------------------------------


class Causal(torch.nn.Module):
    """Attention as models call it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@lru_cache
def lifted(head: int) -> Cascade:
    """The cascade that a model's graph gives."""
    q, k, v = (torch.empty(1, h, TOKENS, head, dtype=torch.bfloat16) for h in (HEADS, HEADS // GROUP, HEADS // GROUP))
    with torch.no_grad():
        graph = export.from_export(Causal().eval(), (q, k, v), {}, dynamic=False).graph
    (found,) = [p for region in capture.regions(graph) for p in choose.places(region, Counter()).attentions]
    return found.cascade


def ours(s: Subject) -> aot.CompileRequest | str:
    made = build(lifted(s.head), s.tile, s.arch)
    return made.reason if isinstance(made, Refusal) else aot.request(made)


def tutorial(s: Subject) -> aot.CompileRequest | str:
    return stock(s, "tutorial", {"scale": "fp32"}, {})


def listed(s: Subject) -> aot.CompileRequest | str:
    if BLOCK % s.tile.tile_p or BLOCK % s.tile.tile_m:
        return f"its blocks are of {BLOCK}"
    lists = dict.fromkeys(("part_counts", "part_blocks", "full_counts", "full_blocks"), "*i32")
    return stock(s, "listed", lists, {"SCALE": s.head**-0.5, "BLOCK": BLOCK})


def descriptors(s: Subject) -> aot.CompileRequest | str:
    if s.arch == "sm_80":
        return "tensor descriptors are copied in bulk from sm_90 on"
    queries, keys = (f"tensordesc<bf16[{n}, {s.head}]>" for n in (s.tile.tile_p, s.tile.tile_m))
    return stock(s, "descriptors", {"q": queries, "k": keys, "v": keys, "out": queries, "scale": "fp32"}, {})


KERNELS: dict[str, Callable[[Subject], aot.CompileRequest | str]] = {
    "ours": ours, "tutorial": tutorial, "descriptors": descriptors, "listed": listed,
}


def stock(s: Subject, name: str, types: dict[str, str], constants: dict[str, float]) -> aot.CompileRequest:
    """A kernel of stock_kernels.py: bf16 tensors, sizes and strides as 32-bit integers that 16 divides."""
    import stock_kernels

    function = getattr(stock_kernels, name)
    literals = {"G": GROUP, "D": s.head, "BM": s.tile.tile_p, "BN": s.tile.tile_m, **constants}
    known = dict.fromkeys("qkv", "*bf16") | {"out": "*bf16"} | types | dict.fromkeys(literals, "constexpr")
    names: list[str] = function.arg_names
    signature = {n: known.get(n, "i32") for n in names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or kind == "i32"]
    return aot.CompileRequest(
        function, signature, {(names.index(n),): v for n, v in literals.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        {"num_warps": s.tile.warps, "num_stages": s.tile.stages}, s.tile.stages,
    )


# --- counting ---------------------------------------------------------------------------------------------------------


def counted(s: Subject) -> list[Row] | str:
    """A row for each loop, or why there is none."""
    asked = KERNELS[s.kernel](s)
    if isinstance(asked, str):
        return asked
    report = aot.compile_request(asked, s.arch)
    if not 1 <= len(report.loops) <= len(LOOPS):
        return f"{len(report.loops)} loops"
    return [row(s, report, name, loop) for name, loop in zip(LOOPS, report.loops)]


def row(s: Subject, report: aot.AotReport, name: str, loop: Loop) -> Row:
    return {
        "arch": s.arch, "head": s.head, "tile": tile_text(s.tile), "kernel": s.kernel, "loop": name,
        "instructions": len(loop.instructions), "counts": dict(sorted(loop.counts.items())),
        "in_flight": loop.in_flight, "registers": report.registers, "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes, "order": loop.order,
    }


def subjects(given: argparse.Namespace) -> Iterator[Subject]:
    tiles = [tile_of(t) for t in given.tiles.split(",")]
    for arch, head, tile, kernel in product(given.archs.split(","), given.heads, tiles, given.kernels.split(",")):
        yield Subject(arch, head, tile, kernel)


def tile_of(text: str) -> TileMapping:
    try:
        tile_p, tile_m, warps, stages = map(int, text.split("x"))
    except ValueError:
        raise SystemExit(f"--tiles {text!r}: write queries×keys×warps×stages, as in 128x64x8x3") from None
    return TileMapping(tile_p, tile_m, warps, stages)


def tile_text(t: TileMapping) -> str:
    return f"{t.tile_p}x{t.tile_m}x{t.warps}x{t.stages}"


def versions() -> dict[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell", "cuobjdump"):
        if (tools / tool).is_file():
            said = subprocess.run([str(tools / tool), "--version"], capture_output=True, text=True, check=True).stdout
            found[tool] = re.findall(r"V([\d.]+)", said)[0]
    return found


# --- showing ----------------------------------------------------------------------------------------------------------


def table(arch: str, loop: str, rows: list[Row]) -> Table:
    out = Table(title=f"{arch}: one turn of the loop over {loop} tiles", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("kernel", "head", "tile"):
        out.add_column(name, no_wrap=True)
    for name in ("all", *COLUMNS, "flying", "reg", "spill", "KiB"):
        out.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        flying = "-" if r["in_flight"] is None else str(r["in_flight"])
        counts = [str(r["counts"].get(kind, 0)) for kind in COLUMNS.values()]
        out.add_row(
            r["kernel"], str(r["head"]), r["tile"], str(r["instructions"]), *counts, flying,
            str(r["registers"]), str(r["spill_bytes"]), f"{r['shared_bytes'] / 1024:.0f}",
        )
    return out


def show(rows: list[Row], given: argparse.Namespace) -> None:
    shown = [r for r in rows if given.loops in (r["loop"], "all")]
    for arch, loop in dict.fromkeys((r["arch"], r["loop"]) for r in shown):
        console.print(table(arch, loop, [r for r in shown if (r["arch"], r["loop"]) == (arch, loop)]))
    for r in shown if given.order else ():
        console.print(f"{r['kernel']} {r['arch']} {r['tile']} {r['loop']}: {r['order']}", highlight=False)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="sm_80,sm_90,sm_100", help="architectures of NVIDIA's (%(default)s)")
    parser.add_argument("--heads", type=int, nargs="+", default=[128], help="head sizes, powers of two (128)")
    parser.add_argument("--tiles", default="128x64x8x3,128x128x8x2", help="queries x keys x warps x stages (%(default)s)")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="which, of %(default)s")
    parser.add_argument("--loops", choices=(*LOOPS, "all"), default="full", help="which loop is shown (%(default)s)")
    parser.add_argument("--order", action="store_true", help="print what a turn issues, in order")
    given = parser.parse_args()
    if unknown := set(given.kernels.split(",")) - set(KERNELS):
        parser.error(f"no kernel {', '.join(sorted(unknown))}: one of {', '.join(KERNELS)}")
    return given


def main() -> None:
    given = parsed()
    if importlib.util.find_spec("triton") is None:
        sys.exit(MISSING)
    rows: list[Row] = []
    for s in track(list(subjects(given)), description="compiling", console=console):
        found = counted(s)
        if isinstance(found, str):
            console.print(f"{s}: left out, {found}")
        else:
            rows += found
    show(rows, given)
    known = versions()
    console.print("  ".join(f"{name} {version}" for name, version in known.items()))
    kept = [{k: v for k, v in r.items() if k != "order"} for r in rows]
    console.print(f"written to {timing.write('kernel_counts', kept, versions=known)}")


if __name__ == "__main__":
    main()
