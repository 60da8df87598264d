"""Honest timing: everything in one process, candidates interleaved, medians and ratios, an A/A ratio as the noise."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds by candidate; `aa` is the ratio of the first candidate's two interleaved halves."""

    milliseconds: Mapping[str, float]
    aa: float
    rounds: int
    first_call_seconds: Mapping[str, float] = field(default_factory=dict)


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 4.0, rounds: int = 0, noise: float = 0.03
) -> Timing:
    """Call the candidates in turn until `seconds` are spent (at least 5 rounds), and once more if the A/A ratio is off.

    The first candidate is called twice a round, under the name "A/A" as well, which gives the noise of the cell.
    """
    first: dict[str, float] = {}
    for name, call in candidates.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
        call()
    best: Timing | None = None
    for _ in range(3):
        measured = _once(candidates, seconds, rounds, first)
        if best is None or abs(measured.aa - 1) < abs(best.aa - 1):
            best = measured
        if abs(best.aa - 1) <= noise:
            break
    assert best is not None
    return best


def _once(candidates: Mapping[str, Callable[[], object]], seconds: float, rounds: int, first: dict[str, float]) -> Timing:
    names = list(candidates)
    order = [*names, names[0]]
    times: list[list[float]] = [[] for _ in order]
    begin, count = time.perf_counter(), 0
    while count < 5 or (time.perf_counter() - begin < seconds if not rounds else count < rounds):
        # every second round runs backwards, so that a drift hits all alike
        for k in range(len(order)) if count % 2 == 0 else reversed(range(len(order))):
            call = candidates[order[k]]
            start = time.perf_counter()
            call()
            times[k].append(time.perf_counter() - start)
        count += 1
    medians = [statistics.median(t) * 1e3 for t in times]
    return Timing(dict(zip(names, medians)), medians[-1] / medians[0], count, first)


def write(name: str, rows: list[dict[str, object]], **more: object) -> Path:
    """Write rows as JSON under benchmarks/results, with versions and the processor's name."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    header = {
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **more,
    }  # fmt: skip
    path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    return path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def as_row(timing: Timing, **cell: object) -> dict[str, object]:
    return {**cell, **asdict(timing)}
