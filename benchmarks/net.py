"""What the net costs: the first call with and without the check, later calls, and the peak of memory, on the CPU.

    python benchmarks/net.py [--model mistral gpt2] [--rounds 5] [--threads 1]

Every measurement is a process of its own, on kernels that are compiled already and without verdicts on disk; a process that
only warms the cache comes first, then both kinds in turn. Prints medians of the process's CPU time, which other work on the
machine disturbs least, beside those of the clock, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOKENS = {"mistral": 4096, "gpt2": 512}
CHECKS = ("first", "never")
FIGURES = ("first_cpu_seconds", "later_cpu_seconds", "first_seconds", "later_seconds", "peak_mib")


def measure(name: str, check: str, threads: int) -> dict[str, Any]:
    """One process: the first call, the median of later ones, the peak of resident memory, what was checked."""
    import torch
    import transformers

    import reattend

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name == "mistral":
        config = transformers.MistralConfig(
            hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=1024, sliding_window=256, max_position_embeddings=16384,
        )
    else:
        config = transformers.GPT2Config()
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 1024, (1, TOKENS[name]), generator=torch.Generator().manual_seed(1))
    reattend.optimize(model, policy=reattend.Policy(check=check))
    times, cpu = [], []
    with torch.no_grad():
        for _ in range(8):
            start, spent = time.perf_counter(), time.process_time()
            model(input_ids=ids, use_cache=False)
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - spent)
    checks = reattend.report(model).checks
    return {
        "first_seconds": times[0], "later_seconds": statistics.median(times[1:]),
        "first_cpu_seconds": cpu[0], "later_cpu_seconds": statistics.median(cpu[1:]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "checks": len(checks), "agree": sum(c.ok for c in checks), "check_seconds": sum(c.seconds for c in checks),
        "how": sorted({c.how for c in checks}),
    }


def fresh(name: str, check: str, threads: int, cache: str) -> dict[str, Any]:
    """The same in a process of its own, without verdicts."""
    shutil.rmtree(Path(cache) / "reattend" / "verdicts", ignore_errors=True)
    command = [sys.executable, __file__, "--one", name, check, "--threads", str(threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "XDG_CACHE_HOME": cache}
    )
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def shown(rows: list[dict[str, Any]]) -> Table:
    """A line a model and figure: with the check, without it, and the ratio."""
    table = Table(title="what the net costs")
    for column in ("model", "tokens", "figure", "with the check", "without", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "figure") else "right")
    for row in rows:
        for figure in FIGURES:
            a, b = (row[f"{figure}_{c}"] for c in CHECKS)
            table.add_row(row["model"], str(row["tokens"]), figure.replace("_", " "), f"{a:.2f}", f"{b:.2f}", f"{a / b:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.threads)))
        return
    from timing import write

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for name in options.model:
            fresh(name, "first", options.threads, cache)
            runs = [(c, fresh(name, c, options.threads, cache)) for _ in range(options.rounds) for c in CHECKS]
            row: dict[str, Any] = {"model": name, "tokens": TOKENS[name], "threads": options.threads}
            for c in CHECKS:
                for figure in FIGURES:
                    row[f"{figure}_{c}"] = statistics.median(r[figure] for kind, r in runs if kind == c)
            row |= {k: runs[0][1][k] for k in ("checks", "agree", "check_seconds", "how")}
            rows.append(row)
    console = Console()
    console.print(shown(rows))
    console.print(f"written to {write('net_cpu', rows, rounds=options.rounds)}")


if __name__ == "__main__":
    main()
