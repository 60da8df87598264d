"""A walk through real architectures: which attentions are found, and is what runs instead of them right, in 32 and 16 bits?

    python benchmarks/coverage.py [--library transformers timm …] [--name bert …] [--dtype bfloat16] [--resume] [--box 150]

Each model is a process of its own with a time box,
forked from one that has imported everything. Rows are written to the JSON
file as they come, and --resume leaves those that are there. A library that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "coverage_cpu.json"
LIBRARIES = ("transformers", "timm", "diffusers", "vit_pytorch", "x_transformers")
Row = dict[str, Any]


def cases(library: str) -> list[Any]:
    """The architectures of a library; none, and a sentence, where it cannot be imported."""
    import model_tables
    import models

    try:
        found: list[Any] = (
            models.transformers_cases() if library == "transformers" else getattr(model_tables, f"{library}_cases")()
        )
    except ImportError as e:
        print(f"{library} is skipped: {e}", file=sys.stderr)
        return []
    return found


def walked(case: Any, box: float, dtypes: list[str], thorough: bool, cache: Path) -> Row:
    """One model in a forked process; what it said until its time box ended."""
    from coverage_one import one

    row: Row = {"library": case.library, "name": case.name}
    shutil.rmtree(cache / "reattend" / "verdicts", ignore_errors=True)
    read, write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        with os.fdopen(write, "w", encoding="utf-8") as pipe, open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)

            def say(part: Row) -> None:
                pipe.write(json.dumps(part, ensure_ascii=False) + "\n")
                pipe.flush()

            try:
                one(case, say, dtypes=dtypes, thorough=thorough)
            except BaseException as e:
                say({"eager": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"})
        os._exit(0)
    os.close(write)
    text = b""
    while (left := box - (time.monotonic() - start)) > 0:
        if select.select([read], [], [], left)[0]:
            if not (part := os.read(read, 1 << 16)):
                break
            text += part
    else:
        os.kill(child, signal.SIGKILL)
        row["stopped"] = f"not done within {box:.0f} s"
    os.close(read)
    _, status = os.waitpid(child, 0)
    if status and "stopped" not in row:
        row["stopped"] = f"died of signal {status & 127}"
    for line in text.decode().splitlines():
        try:
            part = json.loads(line)
        except json.JSONDecodeError:
            break
        runs = part.pop("runs", {})
        row |= part
        if runs:
            row.setdefault("runs", {}).update(runs)
    row.setdefault("seconds", round(time.monotonic() - start, 1))
    return row


def walked_already(row: Row | None, dtypes: list[str]) -> bool:
    """Is there a row with runs in all these types, or one that says why there are none?"""
    if row is None:
        return False
    return "eager" in row or all(any(name.startswith(d) for name in row.get("runs", {})) for d in dtypes)


def warm_up() -> None:
    """What one small model makes torch and us import is there for all processes that are forked after it."""
    import coverage_one
    import torch
    from models import Case, drawn, numbers

    case = Case(
        "", "", (lambda: drawn(torch.nn.MultiheadAttention(16, 2, batch_first=True)),),
        lambda model, call: iter([((numbers(2, 5, 16),) * 3, {})]),
    )
    coverage_one.one(case, lambda part: None, dtypes=["float32"], thorough=False)
    with torch.device("meta"):
        torch.nn.Linear(2, 2)
    torch._dynamo.reset()
    # What is there stays: no process collects it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def versions(library: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", library.replace("_", "-"))}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def verdicts(row: Row) -> Counter[str]:
    """How many runs of a model ended how; checks that differ are counted beside."""
    out: Counter[str] = Counter()
    for run in row.get("runs", {}).values():
        out[run.get("verdict", "eager fails")] += 1
        out["check differs"] += run.get("checks", {}).get("differs", 0) > 0
        out["check raised"] += run.get("checks", {}).get("raised", 0) > 0
    return +out


def table(rows: list[Row]) -> str:
    """One line a library, then every finding."""
    titles = ("library", "tried", "eager runs", "attentions", "found", "rewritten", "runs", "right", "moved",
        "wrong", "raised",
              "check differs", "stopped", "seconds")
    lines = []
    for library in dict.fromkeys(r["library"] for r in rows):
        own = [r for r in rows if r["library"] == library]
        ran = [r for r in own if any("verdict" in run for run in r.get("runs", {}).values())]
        forced = [next((v for k, v in r["runs"].items() if k.endswith("forced")), {}) for r in ran]
        total = sum((verdicts(r) for r in ran), Counter[str]())
        rewritten = sum(n for run in forced for k, n in run.get("kernels", {}).items() if k != "original")
        lines.append((
            library, len(own), len(ran), sum(r["attentions"] for r in ran), sum(f.get("found",
                0) for f in forced),
            rewritten, sum("verdict" in run for r in ran for run in r["runs"].values()), *(total[k] for k in titles[7:12]),
            sum("stopped" in r for r in own), round(sum(r["seconds"] for r in own)),
        ))
    widths = [max(len(str(x)) for x in column) for column in zip(titles, *lines)]
    out = ["  ".join(str(x).rjust(w) for x, w in zip(line, widths)) for line in (titles, *lines)]
    reasons: Counter[str] = Counter()
    for r in rows:
        for name, run in r.get("runs", {}).items():
            if name.endswith("forced"):
                reasons.update({**run.get("left", {}), **run.get("kept", {})})
            said = [v for k in ("why", "raised") if (v := run.get(k)) and run["verdict"] != "right"]
            said += [x for x in run.get("aside", ()) if not x.startswith("unchecked")] + run.get("errors", [])
            said += [x for x in run.get("left", ()) if x.startswith("a bug in reattend")]
            out += [f"{r['library']} {r['name']} {name}: {run.get('verdict')}: {x}" for x in said]
        if str(r.get("backward", "right")).split(":")[0] not in ("right", "eager"):
            out.append(f"{r['library']} {r['name']} backward: {r['backward']}")
        if "stopped" in r:
            out.append(f"{r['library']} {r['name']}: {r['stopped']}")
    out += [f"left {n}×: {why}" for why, n in reasons.most_common()]
    return "\n".join(out)


def bar(done: int, many: int, name: str, start: float) -> None:
    if sys.stderr.isatty():
        filled = 30 * done // max(many, 1)
        print(f"\r{'█' * filled}{'·' * (30 - filled)} {done}/{many} {name[:30]:30}", end="", file=sys.stderr,
            flush=True)
    else:
        print(f"{done}/{many} {time.monotonic() - start:.0f} s {name}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--name", nargs="+", default=[])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--resume", action="store_true", help="leave models that have a row already")
    parser.add_argument("--box", type=float, default=150, help="seconds that a model may take")
    parser.add_argument("--thorough", type=int, default=4, help="every n-th model: a second length, gradients")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"versions": {},
        "models": []}
    rows = {(r["library"], r["name"]): r for r in kept["models"]}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        import torch

        torch.set_num_threads(1)
        chosen = [
            (number, c) for library in options.library for number, c in enumerate(cases(library))
            if (not options.name or c.name in options.name)
            and not (options.resume and walked_already(rows.get((library, c.name)), options.dtype))
        ]
        # Names that are near are often one family: in this order a part of the walk is a fair part.
        chosen.sort(key=lambda nc: hashlib.md5(nc[1].name.encode()).digest())
        warm_up()
        start = time.monotonic()
        for done, (number, case) in enumerate(chosen):
            bar(done, len(chosen), f"{case.library} {case.name}", start)
            thorough = options.thorough > 0 and number % options.thorough == 0
            row = walked(case, options.box, options.dtype, thorough, Path(cache))
            # Runs in another type stay.
            row["runs"] = {**rows.get((case.library, case.name), {}).get("runs", {}), **row.get("runs", {})}
            rows[case.library, case.name] = row
            save(options.out, kept["versions"] | {case.library: versions(case.library)}, list(rows.values()))
            kept["versions"][case.library] = versions(case.library)
    print("\n" + table([r for r in rows.values() if r["library"] in options.library]))


def save(path: Path, known: dict[str, dict[str, str]], rows: list[Row]) -> None:
    """One line a model, so that a change of one shows as one."""
    head = {"device": processor(), "python": platform.python_version(), "threads": 1,
            "date": datetime.date.today().isoformat(), "versions": known}
    body = ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    text = f'{json.dumps(head, ensure_ascii=False)[:-1]}, "models": [\n{body}\n]}}\n'
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    main()
