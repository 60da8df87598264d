"""Compose attentions at random and hold every way to run them against float64, for hours.

    python -m tests.compose --seed 7 --draws 10000 --hours 2 --out findings.jsonl      again with --out: goes on
    python -m tests.compose --draw '{"mask": "window", "row": "sink"}' --ways product,sdpa

Draws run in processes of some hundred each, so that one that dies is a finding as well and nothing piles up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

CHUNK = 200
# One draw of so many is captured by Dynamo; so is what needs it.
DYNAMO = 8
# One draw may take so long; a process that is silent for longer is ended.
SILENT_SECONDS = 900


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=None, help="of the draws; another one every run")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--hours", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--fused", type=int, default=20, help="every n-th draw runs the body that is compiled; 0: none")
    parser.add_argument("--flex", type=int, default=0, help="every n-th draw runs FlexAttention, which is compiled; 0: none")
    parser.add_argument("--out", type=Path, default=None, help="JSON lines, one a draw; what is there already is kept")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--draw", default="", help="judge this one draw, as a finding prints it")
    parser.add_argument("--ways", default="", help="with --draw: the ways, separated by commas")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    o = options()
    if o.draw:
        return one(o)
    return worker(o) if o.worker else lead(o)


def one(o: argparse.Namespace) -> int:
    import torch

    from . import draws, judge, ways

    torch.set_num_threads(1)
    d = draws.read(o.draw)
    chosen = o.ways.split(",") if o.ways else [*ways.POLICIES, *ways.BODIES]
    found = judge.judge(d, [w for w in chosen if w != "flex" or o.ways])
    print(found.invalid or json.dumps({w: list(k) for w, k in found.kernels.items()}))
    for f in found.findings:
        print(f"{f.kind:7} {f.way:16} {f.what}: {f.said}")
    return int(bool(found.findings))


# --- a process of some draws ------------------------------------------------------------------------------------------


def worker(o: argparse.Namespace) -> int:
    """Judges draws and prints a line of JSON for each."""
    import torch

    from . import draws, judge, ways

    torch.set_num_threads(1)
    for number in range(o.first, o.first + o.draws):
        start, d = time.perf_counter(), draws.draw(o.seed, number)
        print(json.dumps({"begun": number}), flush=True)
        every = {"fused": bool(o.fused) and number % o.fused == 0, "flex": bool(o.flex) and number % o.flex == 0}
        dynamo = number % DYNAMO == 0
        judged = judge.judge(d, ways.of(number, d.grad != "none", **every), dynamo=dynamo)
        findings = []
        for f in judged.findings[:3]:
            small = d
            if not o.no_shrink and not any(f.same(g) for g in judged.findings[: judged.findings.index(f)]):
                small = draws.shrunk(d, partial(judge.judged_alone, finding=f, dynamo=dynamo))
            findings.append({"kind": f.kind, "way": f.way, "what": f.what, "said": f.said, "draw": str(small)})
        line: dict[str, Any] = {
            "number": number, "drawn": str(d), "invalid": judged.invalid, "captured": judged.captured,
            "kernels": {w: list(k) for w, k in judged.kernels.items()},
            "fallbacks": sum(judged.fallbacks.values()), "unchecked": judged.unchecked, "findings": findings,
            "seconds": round(time.perf_counter() - start, 3),
        }
        print(json.dumps(line), flush=True)
    return 0


# --- the process that leads them --------------------------------------------------------------------------------------


def lead(o: argparse.Namespace) -> int:
    seed = o.seed if o.seed is not None else int(time.time())
    out = o.out or Path(tempfile.mkstemp(prefix=f"compose-{seed}-", suffix=".jsonl")[1])
    lines = [json.loads(x) for x in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    tally = Tally()
    for line in lines:
        tally.add(line)
    at = max((x["number"] + 1 for x in lines), default=o.first)
    end, start = o.first + o.draws, time.monotonic()
    print(f"seed {seed}, draws {at} to {end - 1}, lines in {out}", flush=True)
    with tempfile.TemporaryDirectory() as cache, out.open("a", encoding="utf-8") as file:
        while at < end and time.monotonic() - start < o.hours * 3600:
            count = min(CHUNK, end - at)
            for line in chunk(o, seed, at, count, cache):
                file.write(json.dumps(line) + "\n")
                file.flush()
                tally.add(line)
                at = line["number"] + 1
                bar(at - o.first, o.draws, time.monotonic() - start, tally)
                if time.monotonic() - start > o.hours * 3600:
                    break
    print(f"\n{tally}\nseed {seed}, {at - o.first} draws, {(time.monotonic() - start) / 3600:.2f} hours, lines in {out}")
    return int(bool(tally.findings))


def chunk(o: argparse.Namespace, seed: int, first: int, count: int, cache: str) -> Any:
    """The lines of a process of some draws; where it dies, the draw that it was at is a finding."""
    command = [sys.executable, "-m", "tests.compose", "--worker", "--seed", str(seed), "--first", str(first)]
    command += ["--draws", str(count), "--fused", str(o.fused), "--flex", str(o.flex), *(["--no-shrink"] if o.no_shrink else [])]
    # verdicts of other runs are not read, and what is printed here is thrown away
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1", "REATTEND_CALIBRATION": ""}
    begun, done = first, first - 1
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if not text.startswith("{"):
                    continue
                line = json.loads(text)
                begun = line.get("begun", begun)
                if "number" in line:
                    done = line["number"]
                    yield line
        finally:
            process.terminate()
    if begun != done:
        why = f"the process ended with {process.returncode}"
        died = {"kind": "died", "way": "", "what": "process", "said": why, "draw": f"number {begun}"}
        yield {"number": begun, "findings": [died], "kernels": {}, "invalid": "", "seconds": 0.0, "unchecked": []}


class Tally:
    """What a run found: kinds of findings, ways that ran a kernel, and draws that were left alone."""

    def __init__(self) -> None:
        self.findings, self.ran, self.draws = Counter[str](), Counter[str](), Counter[str]()
        self.unchecked, self.alone = Counter[str](), Counter[str]()

    def add(self, line: dict[str, Any]) -> None:
        self.draws["all"] += 1
        if line["invalid"]:
            self.draws["invalid"] += 1
            return
        kernels = [k for ks in line["kernels"].values() for k in ks]
        done = any(k != "original" for k in kernels)
        self.draws["ran" if done else "found, not run" if kernels else "not found"] += 1
        drawn = json.loads(line.get("drawn", "{}"))
        if not done:
            self.alone[f"row {drawn.get('row', 'softmax')}, {'gradients' if 'grad' in drawn else 'no gradients'}"] += 1
        for way, ks in line["kernels"].items():
            for k in ks:
                self.ran[f"{way}: {'original' if k == 'original' else 'a kernel'}"] += 1
        for why in line["unchecked"]:
            self.unchecked[why[:60]] += 1
        for f in line["findings"]:
            self.findings[f"{f['kind']} {f['way']} {f['what'].partition(' ')[0]}"] += 1

    def __str__(self) -> str:
        valid = self.draws["all"] - self.draws["invalid"]
        rows = [f"{self.draws['ran']} of {valid} valid draws ran a kernel ({self.draws['ran'] / max(valid, 1):.0%})"]
        for title, counts in (
            ("draws", self.draws), ("findings", self.findings), ("ways", self.ran), ("left alone", self.alone),
            ("unchecked", self.unchecked),
        ):
            rows += [title, *(f"  {n:6} {what}" for what, n in counts.most_common(40))]
        return "\n".join(rows)


def bar(done: int, total: int, seconds: float, tally: Tally) -> None:
    full = round(30 * done / max(total, 1))
    found = sum(tally.findings.values())
    text = f"\r[{'#' * full}{'.' * (30 - full)}] {done}/{total}  {done / max(seconds, 1e-9):.1f} a second  {found} findings "
    if sys.stderr.isatty() or done % 50 == 0:
        print(text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
