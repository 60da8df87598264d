"""Start-up: what a model costs before its first results, beside Dynamo alone, on the CPU.

    python benchmarks/startup.py [--layers 24] [--attn sdpa eager] [--kinds dynamo first …] [--rounds 3]

A small Llama is called at one length, at a second length, and for one more token with the cache of that call; every
measurement is a process of its own, and kinds take turns. The kinds: `dynamo` is torch.compile(model, backend="eager")
with the same dynamic settings, `first` is reattend.optimize with an empty cache folder, `second` with the folder that an
earlier process left, `unchecked` the same without the net's check. Medians of CPU time (compilers that are started
included) and of wall time, in seconds, from before the first import of reattend or of Dynamo; torch and transformers are
imported before. A ratio is a kind's median over that of `dynamo`. Writes JSON as rows end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("dynamo", "first", "second", "unchecked")
STEPS = ("import", "first call", "second length", "one token")
LENGTHS = (24, 40)
OUT = Path(__file__).parent / "results" / "startup_cpu.json"
# A result: for each step, CPU seconds and wall seconds.
Times = dict[str, tuple[float, float]]


def model_of(layers: int, attn: str, dtype: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=512,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval().to(getattr(torch, dtype))


def measure(kind: str, layers: int, attn: str, dtype: str) -> dict[str, object]:
    """One process: the steps in order, and what of ours was planned and ran."""
    import torch

    model = model_of(layers, attn, dtype)
    clock = Clock()
    run, report = _made(kind, model)
    clock.step("import")
    with torch.no_grad():
        for n, step in zip(LENGTHS, STEPS[1:]):
            out = run(input_ids=torch.randint(3, 256, (1, n)), use_cache=True)
            clock.step(step)
        run(input_ids=torch.randint(3, 256, (1, 1)), past_key_values=out.past_key_values, use_cache=True)
        clock.step(STEPS[-1])
    return {"times": clock.times, "ours": report()}


def _made(kind: str, model: Any) -> tuple[Any, Any]:
    import torch

    if kind == "dynamo":
        import torch._dynamo

        return torch.compile(model, backend="eager"), dict
    import torch._dynamo

    import reattend

    reattend.optimize(model, policy=reattend.Policy(check="never" if kind == "unchecked" else "first"))

    def report() -> dict[str, object]:
        said = reattend.report(model)
        chosen = [s.choice for p in said.pieces if p.plan is not None for s in p.plan.sites]
        return {
            "graphs": len(said.pieces), "sites": len(chosen), "rewritten": sum(c != "original" for c in chosen),
            "checks": len(said.checks), "agree": sum(c.ok for c in said.checks),
            "errors": [p.error for p in said.pieces if p.error],
        }

    return model, report


class Clock:
    """Seconds since the last step, of this process with its children, and of the wall."""

    def __init__(self) -> None:
        self.times: Times = {}
        self.last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        t = os.times()
        return t.user + t.system + t.children_user + t.children_system, time.perf_counter()

    def step(self, name: str) -> None:
        now = self._now()
        self.times[name] = (now[0] - self.last[0], now[1] - self.last[1])
        self.last = now


def fresh(kind: str, cache: str, options: argparse.Namespace, attn: str) -> dict[str, Any]:
    """The same in a process of its own, with its cache folder."""
    command = [sys.executable, __file__, "--one", kind, "--attn", attn, "--layers", str(options.layers)]
    command += ["--dtype", options.dtype]
    env = {**os.environ, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}
    # an installed package has its bytecode, which the first process writes where it has not
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-2000:]}")
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def cell(attn: str, options: argparse.Namespace) -> dict[str, object]:
    """All kinds in turn, several times over."""
    runs: dict[str, list[dict[str, Any]]] = {k: [] for k in options.kinds}
    with tempfile.TemporaryDirectory() as warm:
        fresh("first", warm, options, attn)
        for _ in range(options.rounds):
            for kind in options.kinds:
                with tempfile.TemporaryDirectory() as cold:
                    runs[kind].append(fresh(kind, cold if kind == "first" else warm, options, attn))
    row: dict[str, object] = {"attn": attn, "layers": options.layers, "dtype": options.dtype, "rounds": options.rounds}
    row["ours"] = runs[options.kinds[-1]][0]["ours"]
    row["seconds"] = {k: _medians([r["times"] for r in rs]) for k, rs in runs.items()}
    return row


def _medians(times: list[Times]) -> dict[str, dict[str, float]]:
    """By step, and of all steps together, of the calls alone and of everything."""
    together = {"calls": STEPS[1:], "all": STEPS}
    out: dict[str, dict[str, float]] = {}
    for name, steps in {**{s: (s,) for s in STEPS}, **together}.items():
        sums = [[sum(t[s][i] for s in steps) for t in times] for i in (0, 1)]
        out[name] = {"cpu": statistics.median(sums[0]), "wall": statistics.median(sums[1]), "least_cpu": min(sums[0])}
    return out


def table(row: dict[str, Any]) -> str:
    """Seconds of each step by kind, and ratios to Dynamo alone, of CPU and wall time."""
    seconds = row["seconds"]
    head = f"{row['layers']} layers, {row['attn']}, {row['dtype']}: seconds of CPU (ratio to dynamo: CPU, wall)"
    lines = [head, f"{'':14}" + "".join(f"{k:>26}" for k in seconds)]
    for step in (*STEPS, "calls", "all"):
        cells = []
        for k in seconds:
            own, base = seconds[k][step], seconds["dynamo"][step]
            ratios = "" if k == "dynamo" else f" ({own['cpu'] / base['cpu']:.2f}, {own['wall'] / base['wall']:.2f})"
            cells.append(f"{own['cpu']:.2f}{ratios}")
        lines.append(f"{step:14}" + "".join(f"{c:>26}" for c in cells))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import timing
    import torch
    import transformers

    return {
        "processor": timing.processor(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="layers of the model (24)")
    ways = ["sdpa", "eager"]
    parser.add_argument("--attn", nargs="+", choices=ways, default=ways, help="how it writes attention (both)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="which kinds; dynamo is the measure")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (3)")
    parser.add_argument("--dtype", default="float32", help="type of the weights (float32)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers, options.attn[0], options.dtype)))
        return
    rows, head = [], versions()
    print(", ".join(f"{k} {v}" for k, v in head.items()), flush=True)
    for attn in options.attn:
        rows.append(cell(attn, options))
        print(table(rows[-1]), f"ours: {rows[-1]['ours']}", "", sep="\n", flush=True)
        options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
