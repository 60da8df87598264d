"""A walk through real architectures: which attentions are found, and is what runs instead of them right, in 32 and 16 bits?

    python benchmarks/coverage.py [--library transformers timm …] [--name bert …] [--dtype bfloat16] [--resume] [--box 150]
    python benchmarks/coverage.py --matcher [--resume]        what PyTorch's own matcher finds, beside rows that are there
    python benchmarks/coverage.py --table docs/coverage.md    the rows as a page; nothing is run

Each model is a process of its own with a time box, forked from one that has imported everything. Rows are written to the
JSON file as they come, and --resume leaves those that are there. A library that is not installed is skipped.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from coverage_page import Row, page, table

OUT = Path(__file__).parent / "results" / "coverage_cpu.json"
LIBRARIES = ("transformers", "timm", "diffusers", "vit_pytorch", "x_transformers")
# What is asked of a model: it says parts of its row.
Task = Callable[[Any, Callable[[Row], None]], None]


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


def walked(case: Any, box: float, task: Task, cache: Path) -> Row:
    """One model in a forked process; what it said until its time box ended."""
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
                task(case, say)
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
    parser.add_argument("--matcher", action="store_true", help="PyTorch's own matcher, on models that have rows")
    parser.add_argument("--table", type=Path, help="write the rows as a page, and run nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.table:
        options.table.write_text(page(json.loads(options.out.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"versions": {},
        "models": []}
    rows = {(r["library"], r["name"]): r for r in kept["models"]}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        walk(options, rows, kept["versions"], Path(cache))
    print("\n" + table([r for r in rows.values() if r["library"] in options.library]))


def walk(
    options: argparse.Namespace, rows: dict[tuple[str, str], Row], known: dict[str, dict[str, str]], cache: Path
) -> None:
    """Ask every chosen model, and save after each."""
    import torch
    from coverage_matcher import matched
    from coverage_one import one

    torch.set_num_threads(1)

    def there(row: Row | None) -> bool:
        return "matcher" in (row or {}) if options.matcher else walked_already(row, options.dtype)

    chosen = [
        (number, c) for library in options.library for number, c in enumerate(cases(library))
        if (not options.name or c.name in options.name)
        and not (options.matcher and not rows.get((library, c.name), {}).get("attentions"))
        and not (options.resume and there(rows.get((library, c.name))))
    ]
    # Names that are near are often one family: in this order a part of the walk is a fair part.
    chosen.sort(key=lambda nc: hashlib.md5(nc[1].name.encode()).digest())
    warm_up()
    start = time.monotonic()
    for done, (number, case) in enumerate(chosen):
        bar(done, len(chosen), f"{case.library} {case.name}", start)
        thorough = options.thorough > 0 and number % options.thorough == 0
        before = rows.get((case.library, case.name), {})
        if options.matcher:
            said = walked(case, options.box, matched, cache)
            row = before | {"matcher": said.get("matcher", {"raised": said.get("stopped") or said.get("eager", "")})}
        else:
            row = walked(case, options.box, partial(one, dtypes=options.dtype, thorough=thorough), cache)
            # Runs in another type stay, and what the matcher found.
            row["runs"] = {**before.get("runs", {}), **row.get("runs", {})}
            row |= {k: before[k] for k in ("matcher",) if k in before}
        rows[case.library, case.name] = row
        known[case.library] = versions(case.library)
        save(options.out, known, list(rows.values()))


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
