"""A 4-layer Mistral-shaped model end to end on the CPU: eager, SDPA, Inductor on both, and reattend.

    python benchmarks/end_to_end.py [--tokens 4096] [--window 256] [--dtype fp32] [--threads 1 2]

Prints a table of medians and ratios and the largest difference of the outputs, and writes JSON.
"""

from __future__ import annotations

import argparse
import copy

import torch
import transformers
from rich.console import Console
from rich.table import Table
from timing import as_row, interleaved, write

import reattend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(attn: str, window: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1024, sliding_window=window, max_position_embeddings=16384,
    )
    return transformers.AutoModel.from_config(config, attn_implementation=attn).eval().to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each cell")
    options = parser.parse_args()
    ids = torch.randint(3, 1024, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    console = Console()
    rows: list[dict[str, object]] = []
    for dtype in options.dtype:
        eager = build("eager", options.window, DTYPES[dtype])
        sdpa = build("sdpa", options.window, DTYPES[dtype])
        sdpa.load_state_dict(eager.state_dict())
        ours = reattend.optimize(copy.deepcopy(eager))
        inductor = torch.compile(copy.deepcopy(eager))
        sdpa_inductor = torch.compile(copy.deepcopy(sdpa))
        models = {
            "reattend": ours, "eager": eager, "sdpa": sdpa, "eager + Inductor": inductor, "sdpa + Inductor": sdpa_inductor,
        }
        for threads in options.threads:
            torch.set_num_threads(threads)
            with torch.no_grad():
                want = eager(input_ids=ids, use_cache=False).last_hidden_state
                got = ours(input_ids=ids, use_cache=False).last_hidden_state
                error = float((got - want).abs().max() / want.abs().max())
                calls = {n: (lambda m=m: m(input_ids=ids, use_cache=False)) for n, m in models.items()}
                timing = interleaved(calls, seconds=options.seconds)
            rows.append(as_row(timing, dtype=dtype, threads=threads, tokens=options.tokens, error=error))
            table = Table(title=f"{dtype}, {threads} thread(s), {options.tokens} tokens, window {options.window}")
            for column in ("candidate", "median ms", "times as fast as it: reattend", "first call s"):
                table.add_column(column, justify="right" if column != "candidate" else "left")
            for n, ms in timing.milliseconds.items():
                ratio = ms / timing.milliseconds["reattend"]
                table.add_row(n, f"{ms:.0f}", f"{ratio:.2f}×", f"{timing.first_call_seconds[n]:.1f}")
            console.print(table)
            console.print(f"A/A ratio {timing.aa:.3f}; largest difference from eager {error:.1e} of its maximum")
    console.print(f"written to {write('end_to_end_cpu', rows, window=options.window)}")


if __name__ == "__main__":
    main()
