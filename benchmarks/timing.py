"""Honest timing: everything in one process, candidates interleaved, medians and ratios, an A/A ratio as the noise."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from reattend.codegen.measure.company import settle

RESULTS = Path(__file__).parent / "results"
# A candidate so many times slower than the fastest one is called in every second round, twice that in every third, …
SLOW = 3.0
SELDOM = 5
# Rounds of a cell, whatever they take; every candidate is called in at least two of them.
ROUNDS = 6


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds by candidate; `aa` is the ratio of the first candidate's two interleaved halves.

    `retest` is the same ratio of medians for every candidate: calls of odd rounds over those of even ones.
    """

    milliseconds: Mapping[str, float]
    aa: float
    rounds: int
    first_call_seconds: Mapping[str, float] = field(default_factory=dict)
    retest: Mapping[str, float] = field(default_factory=dict)


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


# --- candidates that differ much ------------------------------------------------------------------------------------


def wait() -> None:
    """Until the accelerator, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clock(call: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def adaptive(candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, noise: float = 0.03) -> Timing:
    """As `interleaved`, for candidates up to a thousand times apart: slow ones are called in fewer rounds.

    The A/A ratio is the fastest candidate's, which is called twice a round; if it is off by more than `noise`, the cell is
    measured again, up to three times, and the steadiest measurement stands. First calls (compilation) are apart.
    """
    if not torch.cuda.is_available():
        settle()
    first = {name: _clock(call) for name, call in candidates.items()}
    warm = {name: _clock(call) for name, call in candidates.items()}
    fast = min(warm, key=lambda n: warm[n])
    every = {n: min(SELDOM, max(1, round(t / (SLOW * warm[fast])))) for n, t in warm.items()}
    best = _rounds(candidates, fast, every, seconds, first)
    for _ in range(2):
        if abs(best.aa - 1) <= noise:
            break
        best = min(best, _rounds(candidates, fast, every, seconds, first), key=lambda t: abs(t.aa - 1))
    return best


def _rounds(
    candidates: Mapping[str, Callable[[], object]], fast: str, every: Mapping[str, int], seconds: float,
    first: Mapping[str, float],
) -> Timing:
    times: dict[str, list[float]] = {n: [] for n in candidates}
    again: list[float] = []
    order = random.Random(0)
    begin, count = time.perf_counter(), 0
    while count < ROUNDS or time.perf_counter() - begin < seconds:
        # in another order every round: what ran before leaves its mark on the caches
        due = [n for n in (*candidates, "") if not n or count % every[n] == 0]
        order.shuffle(due)
        for n in due:
            (times[n] if n else again).append(_clock(candidates[n or fast]))
        count += 1
    medians = {n: statistics.median(t) * 1e3 for n, t in times.items()}
    retest = {n: statistics.median(t[::2]) / statistics.median(t[1::2] or t) for n, t in times.items()}
    aa = statistics.median(again) * 1e3 / medians[fast]
    return Timing(medians, aa, count, dict(first), retest)


# --- results --------------------------------------------------------------------------------------------------------


def write(name: str, rows: list[dict[str, object]], **more: object) -> Path:
    """Write rows as JSON under benchmarks/results, with versions and the processor's name."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    header = {
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), **more,
    }
    path.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    return path


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def as_row(timing: Timing, **cell: object) -> dict[str, object]:
    return {**cell, **asdict(timing)}
