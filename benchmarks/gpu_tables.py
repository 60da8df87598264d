"""The time model of GPUs beside measured kernels: tables of the package `aiconfigurator-core`. Needs no GPU.

    python benchmarks/gpu_tables.py [--devices h200,b200] [--tables context,generation] [--part choose] [--rows 1500]
    python benchmarks/gpu_tables.py --part judge --json FILE --check
    python benchmarks/gpu_tables.py --part regret                   which backend is fastest, on the judged shapes
    python benchmarks/gpu_tables.py --part across                   no row of the device or of its family seen
    python benchmarks/gpu_tables.py --fit fa3 [--without h200]
    python benchmarks/gpu_tables.py --fit backends > benchmarks/gpu_backends.toml
    python benchmarks/gpu_tables.py --tables mla_generation,gdn_context        kernels over latents and states
    python benchmarks/gpu_tables.py --fit latent > cost_model/devices/latents.toml

Shapes are split in thirds by the hash of the shape: constants are fitted to one, forms are chosen on the second, and the
third is for the last table alone. Prints per table and by latency the error, its bias and rank, the share of rows within the
stated band and how wide that is, the worst rows, and what was left out. --fit prints constants for the data files; with
--without it also judges the family's constants on a device none of whose rows it has seen. --check ends with 1 where
thresholds of gpu_harness.toml are missed. The package is an extra for developers (`gpu-tables`); no row of it is kept here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_across
import gpu_latent
import gpu_regret
from gpu_across import FAMILIES
from gpu_fit import SCHEDULED, Cell, Constants, fit
from gpu_latent import LatentRow, latent_rows
from gpu_prices import FILE, Harness, Works, harnesses, priced
from gpu_rows import FOLDERS, PARTS, TABLES, Limits, NoTables, Row, drawn, package_version, rows

from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.devices.kernels import vendor_kernels
from reattend.cost_model.devices.latents import latent_kernels

LATENCIES = ((0.0, 2e-5, "< 20 us"), (2e-5, 1e-4, "20–100 us"), (1e-4, 1e-3, "0.1–1 ms"), (1e-3, math.inf, "> 1 ms"))
WORST = 10
FREE_DEVICE = (
    "launch_seconds", "further_seconds", "vendor_matrix_efficiency", "vendor_overlap", "ramp_seconds", "power_share",
)
FREE_KERNEL = ("program_clocks", "few_clocks", "draw_bytes_per_clock", "part_clocks", "exp_share")
FREE_HARNESS = ("prompt_seconds", "decode_seconds", "write_factor", "block_seconds", "sequence_seconds")
# Rows a cell that constants are fitted to.
FIT_ROWS = 120
# Shapes that a device's backends are fitted to, a table.
BACKEND_ROWS = 400


@dataclass(frozen=True)
class Judged:
    """One row with its prediction."""

    row: Row | LatentRow
    seconds: float
    band: float
    bound: str

    @property
    def error(self) -> float:
        return self.seconds / self.row.seconds - 1

    @property
    def within(self) -> bool:
        return 1 / (1 + self.band) <= self.row.seconds / self.seconds <= 1 + self.band


@dataclass(frozen=True)
class Metrics:
    """Of some rows: mean and median absolute relative error, 90th percentile, bias, rank correlation, share in the band, and
    the mean width of the band."""

    n: int
    mape: float
    median: float
    p90: float
    bias: float
    spearman: float
    within: float
    band: float

    @staticmethod
    def of(found: Sequence[Judged]) -> Metrics:
        off = sorted(abs(j.error) for j in found)
        return Metrics(
            len(off), statistics.fmean(off), statistics.median(off), off[min(len(off) - 1, int(0.9 * len(off)))],
            statistics.fmean(j.error for j in found), _spearman([j.seconds for j in found], [j.row.seconds for j in found]),
            statistics.fmean(j.within for j in found), statistics.fmean(j.band for j in found),
        )

    def __str__(self) -> str:
        return (
            f"{self.n:5d} {self.mape:7.1%} {self.median:7.1%} {self.p90:7.1%} {self.bias:+7.1%} {self.spearman:7.3f} "
            f"{self.within:6.0%} ±{self.band:.0%}"
        )


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    def ranks(values: Sequence[float]) -> list[int]:
        at = sorted(range(len(values)), key=lambda i: values[i])
        out = [0] * len(values)
        for rank, i in enumerate(at):
            out[i] = rank
        return out

    return statistics.correlation(ranks(a), ranks(b)) if len(a) > 2 else 1.0


def limits(d: Device) -> Limits:
    return Limits(d.matrix_rate("bf16"), d.dram_bytes_per_s, d.l2_bytes)


def read(device: str, table: str, part: str, most: int) -> tuple[list[Row], Counter[str]]:
    found, out = rows(device, table, limits(shipped(device)))
    return [r for r in drawn(found, most) if r.part == part], out


def judged(given: Iterable[Row], d: Device, h: Harness) -> list[Judged]:
    return [Judged(r, *priced(r, d, h)) for r in given]


def latent_judged(device: str, table: str, part: str, most: int) -> tuple[list[Judged], Counter[str]]:
    """Rows of kernels over latents and states, by the constants of latents.toml."""
    found, out = latent_rows(device, table, limits(shipped(device)))
    some = [r for r in drawn(found, most) if r.part == part]
    if not some:
        return [], out
    band = latent_kernels()[device, table]["band"]
    return [Judged(r, s, band, "") for r, s in zip(some, gpu_latent.priced_rows(some))], out


def show(name: str, found: Sequence[Judged]) -> None:
    print(f"{name:24s} {Metrics.of(found)}")
    for low, high, words in LATENCIES:
        some = [j for j in found if low <= j.row.seconds < high]
        if len(some) > 2:
            print(f"  {words:22s} {Metrics.of(some)}")


def worst(found: Iterable[Judged]) -> None:
    print(f"\nthe {WORST} worst rows")
    for j in sorted(found, key=lambda j: -abs(math.log1p(j.error)))[:WORST]:
        print(f"  {j.seconds * 1e6:9.1f} us said, {j.row.seconds * 1e6:9.1f} measured, bound by {j.bound}: {j.row}")


# --- fitting --------------------------------------------------------------------------------------------------------


def cells(devices: Iterable[str], most: int) -> list[Cell]:
    out = []
    for device in devices:
        for table in TABLES:
            some = drawn([r for r in rows(device, table, limits(shipped(device)))[0] if r.part == "fit"], most)
            if some:
                out.append(Cell.of(shipped(device), vendor_kernels()[some[0].kernel], some))
    return out


def start(given: Sequence[Cell]) -> Constants:
    """The constants of the data files."""
    out: Constants = {}
    for c in given:
        d, k = c.device.name, c.facts
        out |= {f"device.{d}.{n}": getattr(c.device.model, n) for n in FREE_DEVICE}
        out |= {f"kernel.{k.name}.{n}": getattr(k, n) for n in FREE_KERNEL}
        out |= {f"harness.{d}.{n}": getattr(harnesses()[d], n) for n in FREE_HARNESS}
    return out


def free(constants: Constants) -> list[str]:
    """What is searched: of Hopper and Blackwell the products run at the data sheet's rate, and only Blackwell's kernels
    compute exponentials on the lanes."""
    hard = {d for f in ("fa3", "trtllm") for d in FAMILIES[f]}
    out = []
    for name in constants:
        _, whose, short = name.split(".")
        if short == "vendor_matrix_efficiency" and whose in hard:
            continue
        if short == "exp_share" and whose not in ("trtllm", "fa4"):
            continue
        out.append(name)
    return out


def fitted(family: str, without: str, most: int) -> None:
    names = [d for d in FAMILIES[family] if d != without]
    given = cells(names, most)
    first = start(given)
    found = fit(given, first, free(first))
    for name, value in sorted(found.items()):
        print(f"{name} = {value:.4g}  # was {first[name]:.4g}")
    if without:
        unseen(without, found, names, most)


def unseen(device: str, found: Constants, names: Sequence[str], most: int) -> None:
    """The judged rows of a device, by its data sheet and its siblings' constants."""
    for table in TABLES:
        some = read(device, table, "judge", most * 3)[0]
        if not some:
            continue
        c = Cell.of(shipped(device), vendor_kernels()[some[0].kernel], some)
        own = {n: v for n, v in found.items() if n.startswith("kernel.")}
        for kind in ("device", "harness"):
            for short in FREE_DEVICE if kind == "device" else FREE_HARNESS:
                each = [max(found[f"{kind}.{d}.{short}"], 1e-12) for d in names]
                own[f"{kind}.{device}.{short}"] = math.exp(statistics.fmean(map(math.log, each)))
        seconds = c.works.seconds(*c.bound(own), 8192)
        rows_ = [Judged(r, s, 0.25, "") for r, s in zip(some, seconds)]
        print(f"{device + ' ' + table:24s} {Metrics.of(rows_)}  (constants of {', '.join(names)})")


# --- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--devices", default=",".join(FOLDERS))
    p.add_argument("--tables", default=",".join((*TABLES, *gpu_latent.TABLES)))
    p.add_argument("--part", default="choose", choices=(*PARTS, "regret", "across"))
    p.add_argument("--rows", type=int, default=1500)
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true")
    p.add_argument("--fit", choices=(*FAMILIES, "backends", "latent"))
    p.add_argument("--without", default="")
    return p.parse_args()


def main() -> int:
    given = arguments()
    every = (*TABLES, *gpu_latent.TABLES)
    for asked, known in ((given.devices, FOLDERS), (given.tables, every), (given.without or "a100", FOLDERS)):
        if strange := [x for x in asked.split(",") if x not in known]:
            print(f"no tables of {', '.join(strange)}; there are: {', '.join(known)}", file=sys.stderr)
            return 2
    try:
        if given.fit == "backends":
            fit_backends(given)
            return 0
        if given.fit == "latent":
            fit_latent(given)
            return 0
        if given.part in ("regret", "across"):
            return regrets(given) if given.part == "regret" else across(given)
        if given.fit:
            fitted(given.fit, given.without, FIT_ROWS)
            return 0
        return report(given)
    except NoTables as no:
        print(no, file=sys.stderr)
        return 2


def fit_latent(given: argparse.Namespace) -> None:
    """Prints latents.toml."""
    print("# Kernels over latents and states, fitted to the part `fit` of aiconfigurator-core")
    print(f"# {package_version()} by `python benchmarks/gpu_tables.py --fit latent`; gpu_latent.py explains them.")
    print("# band: what holds of the rows that were fitted to or chosen with.\n")
    for device in given.devices.split(","):
        d = shipped(device)
        for table in gpu_latent.TABLES:
            found = drawn(latent_rows(device, table, limits(d))[0], given.rows)
            seen = {part: [r for r in found if r.part == part] for part in PARTS}
            if not seen["fit"]:
                continue
            constants = gpu_latent.fitted(table, seen["fit"], d)
            band = gpu_latent.band_of(table, [*seen["fit"], *seen["choose"]], d, constants)
            print(gpu_latent.written(device, table, constants, band), flush=True)


def fit_backends(given: argparse.Namespace) -> None:
    """Prints gpu_backends.toml."""
    print("# Backends of other engines beside the device's own kernel, fitted to the part `fit` of aiconfigurator-core")
    print(f"# {package_version()} by `python benchmarks/gpu_tables.py --fit backends`; gpu_regret.py explains the terms.\n")
    for device in given.devices.split(","):
        d, h = shipped(device), harnesses()[device]
        for table in gpu_regret.TABLES:
            some = gpu_regret.drawn(gpu_regret.raced(device, table, limits(d)), "fit", BACKEND_ROWS)
            print(gpu_regret.written(device, table, gpu_regret.fitted(some, d, h)), flush=True)


def regrets(given: argparse.Namespace) -> int:
    """The table of regrets on judged shapes; 1 where --check finds the mean above its threshold."""
    print(f"aiconfigurator-core {package_version()}, judged shapes timed with several backends\n")
    print(f"{'':24s} {'shapes':>6s} {'mean':>7s} {'p95':>7s} {'best':>6s}   one backend for all shapes that have it")
    summary, means = {}, []
    for device in given.devices.split(","):
        d = shipped(device)
        for table in gpu_regret.TABLES:
            some = gpu_regret.drawn(gpu_regret.raced(device, table, limits(d)), "judge", given.rows // len(PARTS))
            rates = gpu_regret.known()[device, table]
            found = gpu_regret.Regret.of(gpu_regret.fields_of(some, d, harnesses()[device], rates))
            print(f"{device + ' ' + table:24s} {found}", flush=True)
            summary[f"{device} {table}"] = asdict(found)
            means.append(found.mean)
    mean = statistics.fmean(means)
    print(f"{'mean':24s} {'':6s} {mean:7.1%}")
    if given.json:
        given.json.write_text(json.dumps({"version": package_version(), "part": "regret", "tables": summary}, indent=1))
    return int(given.check and mean > tomllib.loads(FILE.read_text("utf-8"))["thresholds"]["regret"])


def across(given: argparse.Namespace) -> int:
    """The judged rows of each device by its data sheet and the constants of other families."""
    print(f"aiconfigurator-core {package_version()}: judged rows, each device without a row of its family\n")
    print(f"{'':24s} {'rows':>5s} {'mean':>7s} {'median':>7s} {'p90':>7s} {'bias':>7s} {'rank':>7s} {'within':>6s} band")
    phases: dict[str, list[float]] = {"prefill": [], "decode": []}
    summary: dict[str, Any] = {}
    for device in given.devices.split(","):
        for table in (t for t in given.tables.split(",") if t in TABLES):
            some = tuple(read(device, table, "judge", given.rows)[0])
            if not some:
                continue
            d, facts, h = gpu_across.unseen(device, table == "encoder")
            times = Works.of(some, d, facts).seconds(d, facts, h, SCHEDULED)
            found = Metrics.of([Judged(r, s, gpu_across.BAND, "") for r, s in zip(some, times)])
            print(f"{device + ' ' + table:24s} {found}", flush=True)
            summary[f"{device} {table}"] = asdict(found)
            phases["decode" if table == "generation" else "prefill"].append(found.mape)
    for phase, errors in phases.items():
        print(f"{phase:24s} {'':5s} {statistics.fmean(errors):7.1%}" if errors else "", end="\n" if errors else "")
    if given.json:
        given.json.write_text(json.dumps({"version": package_version(), "part": "across", "tables": summary}, indent=1))
    return 0


def report(given: argparse.Namespace) -> int:
    print(f"aiconfigurator-core {package_version()}, part {given.part!r}, at most {given.rows} rows a table and device\n")
    print(f"{'':24s} {'rows':>5s} {'mean':>7s} {'median':>7s} {'p90':>7s} {'bias':>7s} {'rank':>7s} {'within':>6s} band")
    every: list[Judged] = []
    out: Counter[str] = Counter()
    summary: dict[str, Any] = {}
    for device in given.devices.split(","):
        for table in given.tables.split(","):
            if table in gpu_latent.TABLES:
                found, left = latent_judged(device, table, given.part, given.rows)
            else:
                some, left = read(device, table, given.part, given.rows)
                found = judged(some, shipped(device), harnesses()[device])
            out += left
            if not found:
                continue
            show(f"{device} {table}", found)
            every += found
            summary[f"{device} {table}"] = asdict(Metrics.of(found))
    worst(every)
    print("\nleft out: " + "; ".join(f"{n} {why}" for why, n in out.most_common()))
    if given.json:
        given.json.write_text(json.dumps({"version": package_version(), "part": given.part, "tables": summary}, indent=1))
    return missed(summary) if given.check else 0


def missed(summary: Mapping[str, Mapping[str, float]]) -> int:
    """1 where a threshold is missed, each said on a line."""
    wanted = tomllib.loads(FILE.read_text("utf-8"))["thresholds"]
    bad = 0
    for name, m in summary.items():
        most = wanted.get(name.split()[1], math.inf)
        if m["mape"] > most or m["within"] < wanted["within"]:
            print(f"missed: {name}: {m['mape']:.1%} (at most {most:.0%}), {m['within']:.0%} within the band")
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main())
