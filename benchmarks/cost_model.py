"""The cost model beside the clock: every candidate measured over a grid of shapes and masks on this device.

    python benchmarks/cost_model.py [--grid unseen] [--calibrate] [--quick] [--report] [--budget SECONDS] [--again]
                                    [--threads 1,2] [--masks …] [--dtypes …] [--lengths …] [--no-flex]
                                    [--calibrations FILE …]

Prints a row a cell, then per device: MAPE, 95th percentile, Spearman's rank correlation, the regret of the model's choice,
the test-retest noise of the timings, and the ablation from a plain roofline to the calibrated model. Timings are kept in
benchmarks/results/cost_model_DEVICE.json (`fresh` and what is drawn by themselves); cells that are there are not
measured again (unless --again, or where the mapping that the model likes best has not been timed), so that a grid may be
measured piece by piece, and --report judges what is there. Works on a CPU and on a CUDA device as it stands. Compilation
is not timed; it is printed apart. A shared machine's clock drifts by a tenth and more from minute to minute: one and the
same call is timed beside every cell, and the error is printed once more with that taken off.

Grids: `unseen` judges the model: shapes drawn from wide ranges, and nothing was changed after a look at its cells.
Mechanisms were mended after a look at `fresh`, `heldout`, `drawn` and `again` (products of one row, heads that share keys in
the product body, how FlexAttention lays out keys, biases, keys that fill no register, calls in company), and one constant
was chosen on them: the share that is believed of what a kind is off. `regret` (8 heads of 64, window, causal and no mask,
512 to 8192 tokens) and `development` were looked at throughout. The calibration sees none of them: see benchmarks/cells.py.
--calibrations judges the same timings with each of several files
that `reattend targets --calibrate` wrote (REATTEND_CALIBRATION=FILE), and prints the median and the range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cells
import timing
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from reattend.codegen.measure.calibrate import calibrate
from reattend.cost_model.calibration.accuracy import Outcome, accuracy, percentile, within
from reattend.cost_model.calibration.ladder import ladder
from reattend.cost_model.devices.device import (
    Device,
    alone,
    device,
    device_from_dict,
    device_to_dict,
    shipped,
    with_threads,
)
from reattend.patterns.mapping import TileMapping
from reattend.rewriter.choose.choose import running_device

# Grids that are kept in files of their own.
APART = ("fresh", "drawn", "again", "unseen")
PROBES = 25
Row = dict[str, Any]
console = Console(width=150)


def here() -> Device:
    """The device of this machine, calibrated where a calibration file of it is there."""
    return running_device("cuda") if torch.cuda.is_available() else device("cpu")


def present(threads: int) -> Device:
    """The same with this many threads, of which torch is told as well."""
    if torch.cuda.is_available():
        return here()
    torch.set_num_threads(threads)
    return with_threads(here(), threads)


def plain(d: Device) -> Device:
    return with_threads(shipped(d.name), d.units) if d.kind == "cpu" else shipped(d.name)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(cell: cells.Cell, d: Device, flex: bool, seconds: float) -> Row:
    """Timings of a cell's candidates."""
    torch.compiler.reset()
    calls, mappings = cells.calls(cell, d, flex)
    before = probe(d)
    found = timing.adaptive(calls, seconds=seconds)
    texts = {name: m.to_text() for name, m in mappings.items()}
    more = {"probe_milliseconds": statistics.mean((before, probe(d)))} if d.kind == "cpu" else {}
    return timing.as_row(found, **cells.as_data(cell), mappings=texts, date=time.strftime("%Y-%m-%d"), **more)


def probe(d: Device) -> float:
    """Milliseconds of one call on a CPU, the same for every cell: how fast the machine is just now."""
    if d.kind != "cpu":
        return 0.0
    x = cells.tensors(cells.PROBE, "cpu")
    took = []
    for _ in range(PROBES):
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(x["Q"], x["K"], x["V"])
        took.append(time.perf_counter() - start)
    return statistics.median(took) * 1e3


def cell_of(row: Mapping[str, Any]) -> cells.Cell:
    return cells.Cell(**{f: row[f] for f in cells.Cell.__dataclass_fields__ if f in row})


def stale(row: Row, d: Device) -> bool:
    """Is the mapping that the model likes best by now among those that were timed?"""
    return not set(dict(cells.best(cell_of(row), d))) <= set(row["mappings"])


def gather(found: dict[cells.Cell, Row], wanted: list[cells.Cell], given: argparse.Namespace) -> None:
    """Measure what is wanted and not there, until the budget is spent; everything found is written at once."""
    due = [c for c in wanted if given.again or c not in found or stale(found[c], present(c.threads))]
    begin = time.perf_counter()
    for cell in track(due, description="measuring", console=console):
        if time.perf_counter() - begin > given.budget:
            console.print(f"the budget of {given.budget:.0f} s is spent: call again to go on")
            return
        d = present(cell.threads)
        found[cell] = measure(cell, d, given.flex, given.seconds)
        show(found[cell], d)
        write(found, given.grid)


def name_of(d: Device, grid: str) -> str:
    return f"cost_model_{d.name}_{grid}" if grid in APART else f"cost_model_{d.name}"


def results(d: Device, grid: str) -> Path:
    return timing.RESULTS / f"{name_of(d, grid)}.json"


def read(d: Device, grid: str) -> dict[cells.Cell, Row]:
    if not results(d, grid).is_file():
        return {}
    return {cell_of(r): r for r in json.loads(results(d, grid).read_text())["rows"]}


def write(found: Mapping[cells.Cell, Row], grid: str, summary: Mapping[str, object] | None = None) -> None:
    """Keep the timings, the device that predicts, and the figures of each grid as they were last judged."""
    d = here()
    kept = results(d, grid)
    old = json.loads(kept.read_text()).get("summary", {}) if kept.is_file() else {}
    timing.write(name_of(d, grid), list(found.values()), device=device_to_dict(d), summary={**old, **(summary or {})})


# --- judging ----------------------------------------------------------------------------------------------------------


def drifted(row: Row, d: Device) -> float:
    """How much slower the machine was while a cell was measured than the model takes it to be; 1 where nobody looked."""
    if "probe_milliseconds" not in row:
        return 1.0
    # called over and over, it is not in company
    (cost,) = cells.costs(cells.PROBE, ["sdpa"], {}, alone(d)).values()
    return float(row["probe_milliseconds"]) / 1e3 / cost.seconds


def steadied(row: Row, d: Device) -> Outcome:
    """The outcome as if the machine had been as fast as the model takes it to be."""
    o, slower = outcome(row, d), drifted(row, d)
    return Outcome({n: t / slower for n, t in o.measured.items()}, o.predicted)


def outcome(row: Row, d: Device, masked: bool = True) -> Outcome:
    names = list(row["milliseconds"])
    mappings = {n: TileMapping.parse(t) for n, t in row["mappings"].items()}
    found = cells.costs(cell_of(row), names, mappings, d, masked)
    return Outcome({n: ms / 1e3 for n, ms in row["milliseconds"].items()}, {n: c.seconds for n, c in found.items()})


def show(row: Row, d: Device) -> None:
    o = outcome(row, d)
    shown = sorted(o.measured, key=lambda n: o.measured[n])
    pairs = "  ".join(f"{n} {o.measured[n] * 1e3:.3g}/{o.predicted[n] * 1e3:.3g}" for n in shown)
    compiled = max(row["first_call_seconds"].values())
    console.print(
        f"{cell_of(row)}  chose {o.chosen}, best {o.best}, regret {o.regret:.1%} (A/A {row['aa']:.3f}; first call "
        f"{compiled:.1f} s)\n    measured/predicted ms: {pairs}",
        highlight=False, soft_wrap=True,
    )


def noise(rows: Iterable[Row]) -> tuple[float, float]:
    """Test-retest: how far the medians of odd and of even rounds are apart, mean and 95th percentile."""
    apart = [abs(x - 1) for r in rows for x in r["retest"].values()]
    return statistics.mean(apart), percentile(apart, 0.95)


def report(rows: list[Row]) -> dict[str, object]:
    """Print the figures of some rows; the same as plain data."""
    outcomes = [outcome(r, present(r["threads"])) for r in rows]
    mean, p95 = noise(rows)
    figures = accuracy(outcomes)
    console.print(f"\n{here()}\n{figures}", highlight=False)
    console.print(f"test-retest noise {mean:.1%} mean, {p95:.1%} p95", highlight=False)
    apart = [drifted(r, present(r["threads"])) for r in rows]
    steady = accuracy([steadied(r, present(r["threads"])) for r in rows])
    console.print(
        f"the machine beside its calibration, by a probe at every cell: {min(apart):.2f} to {max(apart):.2f} times as slow, "
        f"median {statistics.median(apart):.2f}; with that taken off, MAPE {steady.mape:.1%}, p95 {steady.p95:.1%}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for title in ("", "MAPE", "p95", "Spearman", "regret", "regret p95"):
        table.add_column(title, justify="right" if title else "left")
    steps: dict[str, object] = {}
    ladders = {r["threads"]: ladder(plain(present(r["threads"])), present(r["threads"])) for r in rows}
    for k, rung in enumerate(next(iter(ladders.values()))):
        a = accuracy([outcome(r, ladders[r["threads"]][k].device, rung.masked) for r in rows])
        table.add_row(
            rung.name, f"{a.mape:.1%}", f"{a.p95:.1%}", f"{a.spearman:.3f}", f"{a.regret:.1%}", f"{a.regret_p95:.1%}"
        )
        steps[rung.name] = vars(a)
    console.print(table)
    _by_candidate(rows, outcomes)
    return {"accuracy": vars(figures), "steadied": vars(steady), "retest": {"mean": mean, "p95": p95}, "ablation": steps}


FIGURES = ("mape", "p95", "spearman", "regret", "regret_p95", "regret_geometric")


def several(rows: list[Row], files: list[Path]) -> dict[str, object]:
    """Print the figures of some rows with each of several calibrations, their medians and ranges; the same as plain data."""
    table = Table(box=None, pad_edge=False)
    for title in ("calibration", "band", *FIGURES, "within the band", "slower", "mape, steadied"):
        table.add_column(title, justify="left" if title == "calibration" else "right")
    out: dict[str, dict[str, float]] = {}
    for file in files:
        d = device_from_dict(json.loads(file.read_text())["device"])
        outcomes = [outcome(r, with_threads(d, r["threads"])) for r in rows]
        pairs = [(o.predicted[n], o.measured[n]) for o in outcomes for n in o.measured]
        held = statistics.mean(within(p, m, d.band) for p, m in pairs)
        slower = statistics.median(drifted(r, with_threads(d, r["threads"])) for r in rows)
        steady = accuracy([steadied(r, with_threads(d, r["threads"])) for r in rows]).mape
        figures = {f: vars(accuracy(outcomes))[f] for f in FIGURES}
        out[file.stem] = {"band": d.band, **figures, "held": held, "slower": slower - 1, "steadied": steady}
    for name, of in (("median", statistics.median), ("least", min), ("most", max)):
        out[name] = {f: of([out[file.stem][f] for file in files]) for f in out[files[0].stem]}
    for name, figures in out.items():
        table.add_row(name, *(f"{x:.3f}" if f == "spearman" else f"{x:.1%}" for f, x in figures.items()))
    console.print(table)
    return {"calibrations": out}


def _by_candidate(rows: list[Row], outcomes: list[Outcome]) -> None:
    """Mean error and bias of each kind of candidate."""
    kinds: dict[str, list[float]] = {}
    for o in outcomes:
        for n, m in o.measured.items():
            kinds.setdefault(" ".join(n.split()[:2]), []).append(o.predicted[n] / m)
    for kind, ratios in sorted(kinds.items()):
        console.print(
            f"{kind:18} {len(ratios):4}  error {statistics.mean(abs(r - 1) for r in ratios):6.1%}  "
            f"predicted/measured {statistics.median(ratios):.2f} (median)",
            highlight=False,
        )


def wanted(given: argparse.Namespace) -> list[cells.Cell]:
    out = [c for t in map(int, given.threads.split(",")) for c in cells.GRIDS[given.grid](t)]
    if torch.cuda.is_available():
        # threads are the GPU's own affair, and products in fp32 nobody's aim
        out = [c for c in out if c.threads == 1 and c.dtype != "f32"]
    for field, text in (("mask", given.masks), ("dtype", given.dtypes), ("queries", given.lengths)):
        out = [c for c in out if not text or str(getattr(c, field)) in text.split(",")]
    return out[:: max(1, len(out) // 6)] if given.quick else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=list(cells.GRIDS), default="unseen")
    parser.add_argument("--calibrate", action="store_true", help="measure the device first and keep the file")
    parser.add_argument("--report", action="store_true", help="measure nothing: judge the timings that are kept")
    parser.add_argument("--quick", action="store_true", help="about six cells of the grid, timed briefly")
    parser.add_argument("--again", action="store_true", help="measure cells that are there as well")
    parser.add_argument("--threads", default="1,2")
    for name in ("masks", "dtypes", "lengths"):
        parser.add_argument(f"--{name}", default="", help="only these")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of a cell, at least")
    parser.add_argument("--budget", type=float, default=1e9, help="stop after so many seconds; what is found is kept")
    parser.add_argument("--no-flex", dest="flex", action="store_false")
    parser.add_argument("--calibrations", type=Path, nargs="*", default=[], help="judge with each of these files as well")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.quick:
        given.seconds = min(given.seconds, 0.3)
    if given.calibrate:
        found_now, _ = calibrate(shipped(here().name), watch=lambda steps, what: track(steps, what, console=console))
        console.print(str(found_now))
        running_device.cache_clear()
    chosen = wanted(given)
    found = read(here(), given.grid)
    with torch.no_grad():
        if not given.report:
            gather(found, chosen, given)
        rows = [found[c] for c in chosen if c in found]
        if given.report:
            for r in rows:
                show(r, present(r["threads"]))
        summary = report(rows)
        if given.calibrations:
            summary |= several(rows, given.calibrations)
    write(found, given.grid, {f"{given.grid}, threads {given.threads}": summary})


if __name__ == "__main__":
    main()
