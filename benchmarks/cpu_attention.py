"""One attention on the CPU, 8 heads × 64: eager, SDPA with the mask as a tensor, compiled FlexAttention, and reattend.

    python benchmarks/cpu_attention.py [--lengths 4096 8192] [--window 256] [--dtype fp32 bf16] [--threads 1 2]
                                       [--flex] [--pairs]

One process, interleaved, medians, A/A ratio of each cell; the first calls (compilation) are printed apart. reattend runs
what its plan chooses for the model's own code, through `optimize`. Prints a table and writes JSON. With --pairs each of
the others is interleaved with reattend alone: the eager code does not sweep the caches before the calls of the rest.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from timing import Timing, as_row, interleaved, write
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import reattend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, WIDTH = 8, 64


class Attention(nn.Module):
    """Causal attention with a window, as models write it: the mask from positions, added to the scores."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        keep = (i[:, None] >= i) & (i[:, None] - i < self.window)
        mask = torch.where(keep, 0.0, float("-inf")).to(q.dtype)
        return (q @ k.transpose(-2, -1) * WIDTH**-0.5 + mask).softmax(-1) @ v


def candidates(length: int, window: int, dtype: torch.dtype, flex: bool) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """Calls by name, and the largest difference of ours from eager, of its maximum."""
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, dtype=dtype) for _ in range(3))
    i = torch.arange(length)
    keep = (i[:, None] >= i) & (i[:, None] - i < window)
    added = torch.where(keep, 0.0, float("-inf")).to(dtype)
    ours = reattend.optimize(Attention(window).eval())
    calls: dict[str, Callable[[], Tensor]] = {
        "reattend": lambda: ours(q, k, v),
        "eager": lambda: (q @ k.transpose(-2, -1) * WIDTH**-0.5 + added).softmax(-1) @ v,
        "sdpa + mask": lambda: scaled_dot_product_attention(q, k, v, keep),
    }
    if flex:
        blocks = create_block_mask(
            lambda b, h, p, m: (p >= m) & (p - m < window), None, None, length, length, device="cpu", BLOCK_SIZE=128
        )
        compiled = torch.compile(flex_attention)
        calls["flex"] = lambda: compiled(q, k, v, block_mask=blocks)
    got, want = calls["reattend"](), calls["eager"]()
    return calls, float((got - want).abs().max() / want.abs().max())


def timed(calls: Mapping[str, Callable[[], Tensor]], seconds: float, pairs: bool) -> dict[str, Timing]:
    """The timing in which each candidate stands: all of them together, or each with reattend alone."""
    if not pairs:
        return dict.fromkeys(calls, interleaved(calls, seconds=seconds))
    ours = {"reattend": calls["reattend"]}
    others = {n: interleaved({**ours, n: call}, seconds=seconds) for n, call in calls.items() if n not in ours}
    return {"reattend": others["sdpa + mask"], **others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--flex", action="store_true", help="compiled FlexAttention too (needs a C++ compiler)")
    parser.add_argument("--pairs", action="store_true", help="each candidate interleaved with reattend alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each cell")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = Table(title=f"8 heads × 64, causal window {options.window}: median ms, and times as slow as reattend")
    columns = ["type", "threads", "tokens", "reattend", "eager", "sdpa + mask", *(["flex"] if options.flex else [])]
    for name in [*columns, "A/A", "error"]:
        table.add_column(name, justify="right")
    rows: list[dict[str, object]] = []
    with torch.no_grad():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for dtype in options.dtype:
                for length in options.lengths:
                    torch.compiler.reset()
                    calls, error = candidates(length, options.window, DTYPES[dtype], options.flex)
                    found = timed(calls, options.seconds, options.pairs)
                    ms = {n: (t.milliseconds[n], t.milliseconds["reattend"]) for n, t in found.items()}
                    cells = [f"{its:.1f}  {its / ours:.1f}×" for its, ours in ms.values()]
                    worst = max((t.aa for t in found.values()), key=lambda aa: abs(aa - 1))
                    table.add_row(dtype, str(threads), str(length), *cells, f"{worst:.3f}", f"{error:.0e}")
                    cell = {"dtype": dtype, "threads": threads, "tokens": length, "window": options.window, "error": error}
                    rows += [as_row(t, **cell) for t in {id(t): t for t in found.values()}.values()]
    console = Console(width=140)
    console.print(table)
    console.print(f"written to {write('cpu_attention_pairs' if options.pairs else 'cpu_attention', rows)}")


if __name__ == "__main__":
    main()
