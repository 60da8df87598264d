"""The time of products outside of attention beside measured kernels: rows of the package `aiconfigurator-core`. No GPU.

    python benchmarks/gpu_layers.py [--devices h200,b200] [--kinds bf16,experts_bf16] [--part choose] [--check]
    python benchmarks/gpu_layers.py --fit > cost_model/devices/layers.toml

As gpu_tables.py does: shapes lie in thirds by the hash of the shape; rates are fitted to one, forms and bands are chosen on
the second, and the third is for the last table. One engine's rows (vllm) are read. bf16, fp8: a linear layer, of fp8 with
the conversion of its input; experts_bf16, experts_fp8: a fused call of all experts on one device, with the dealing, evenly
or by power laws. No row is kept here.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_rows import FOLDERS, PACKAGE, PARTS, VERSIONS, NoTables, folder, package_version, part_of
from numpy.typing import NDArray

from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.devices.layers import KINDS, RATES, ProductRates, layer_rates
from reattend.cost_model.layer.products import ProductShapes, expert_seconds, matrix_rate, product_seconds

ENGINE = "vllm"
# What their types are called there.
TYPES: Mapping[str, tuple[str, str]] = {
    "bf16": ("gemm", "bfloat16"), "fp8": ("gemm", "fp8"), "experts_bf16": ("moe", "bfloat16"),
    "experts_fp8": ("moe", "fp8_block"),
}
# Rows that rates are fitted to, and that are judged; share of rows that a band holds, and what it may not exceed.
FIT_ROWS, ROWS, HOLDS, WIDEST = 1200, 1500, 0.9, 1.0
# What the judged rows' mean error may be.
MOST: Mapping[str, float] = {"bf16": 0.20, "fp8": 0.25, "experts_bf16": 0.25, "experts_fp8": 0.25}
# Start and bounds of each rate.
STARTS: Mapping[str, tuple[float, float, float]] = {
    "call_seconds": (4e-6, 1e-7, 8e-5), "program_seconds": (1e-6, 1e-8, 1e-5), "matrix_share": (0.85, 0.3, 1.05),
    "draw_bytes_per_s": (6e10, 5e9, 1e12), "memory_share": (0.9, 0.3, 1.05), "merge_seconds": (1e-6, 1e-9, 1e-5),
    "power_share": (0.1, 1e-4, 0.4), "row_seconds": (5e-10, 1e-13, 5e-8), "cast_share": (1.0, 0.01, 20.0),
}
# Of plain products in 16 bits nothing is converted.
FREE: Mapping[str, tuple[str, ...]] = {k: RATES if k != "bf16" else RATES[:-2] for k in KINDS}
LATENCIES = ((0.0, 2e-5, "< 20 us"), (2e-5, 1e-4, "20–100 us"), (1e-4, 1e-3, "0.1–1 ms"), (1e-3, math.inf, "> 1 ms"))


@dataclass(frozen=True)
class Measured:
    """One call: rows, inner, columns; of experts, choices of all tokens, hidden and inner size, experts."""

    kind: str
    shape: tuple[int, ...]
    seconds: float
    name: str

    @property
    def moved(self) -> float:
        """Bytes that have to come from memory: a call that is faster had its weights in a cache, where no model has them."""
        if "experts" in self.kind:
            return 0.0
        rows, inner, columns = self.shape
        width = 1 if self.kind.endswith("fp8") else 2
        return width * (rows * inner + inner * columns) + 2 * rows * columns

    @property
    def part(self) -> str:
        return part_of((self.kind.split("_")[0] if "experts" in self.kind else "gemm", *self.shape))


def measured(device: str, kind: str) -> list[Measured]:
    """The rows of a device. Raises NoTables."""
    import pyarrow.parquet as parquet

    place, wanted = TYPES[kind]
    where = folder() / FOLDERS[device] / place / ENGINE
    file = next((f for v in VERSIONS[ENGINE] if (f := where / v / f"{place}_perf.parquet").is_file()), None)
    if file is None:
        return []
    same: dict[tuple[tuple[int, ...], str], list[float]] = defaultdict(list)
    held = set(parquet.read_schema(file).names)
    type_, sizes = f"{place}_dtype", ("m", "n", "k") if place == "gemm" else (
        "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    more = () if place == "gemm" else ("distribution",)
    if missing := sorted({type_, *sizes, *more, "latency", "kernel_source"} - held):
        raise NoTables(f"{PACKAGE} {package_version()}: {file.name} of {device} has no column {', '.join(missing)}")
    for r in parquet.read_table(file, columns=[type_, *sizes, *more, "latency", "kernel_source"]).to_pylist():
        if r[type_] != wanted or (place == "moe" and (r["moe_ep_size"] != 1 or "nongated" in r["kernel_source"])):
            continue
        same[_shape(place, r), str(r.get("distribution", ""))].append(float(r["latency"]) / 1e3)
    found = [Measured(kind, s, statistics.median(times), d) for (s, d), times in same.items()]
    d = shipped(device)
    return [m for m in found if m.moved / m.seconds <= d.dram_bytes_per_s]


def _shape(place: str, r: Mapping[str, Any]) -> tuple[int, ...]:
    if place == "gemm":
        return int(r["m"]), int(r["k"]), int(r["n"])
    tokens, hidden, inter, top, experts, parts, _ = (int(r[c]) for c in (
        "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"))
    return tokens * top, hidden, inter // parts, experts


def drawn(given: Sequence[Measured], part: str, most: int) -> list[Measured]:
    """At most so many of a part, evenly over latencies."""
    some = sorted((r for r in given if r.part == part), key=lambda r: (r.seconds, r.shape, r.name))
    n = min(len(some), most)
    return [some[i * len(some) // n] for i in range(n)]


def priced(rows: Sequence[Measured], d: Device, r: ProductRates) -> NDArray[np.float64]:
    kind = rows[0].kind
    x = np.array([m.shape for m in rows], np.float64).T
    width = 1.0 if kind.endswith("fp8") else 2.0
    rate = matrix_rate(d, kind.removeprefix("experts_"))
    if "experts" not in kind:
        return product_seconds(ProductShapes(x[0], x[1], x[2], np.ones_like(x[0]), width, width), d, r, rate)
    both = [ProductShapes(x[0], x[1], 2 * x[2], x[3], width, width), ProductShapes(x[0], x[2], x[1], x[3], width, width)]
    return expert_seconds(both, d, r, rate)


def fitted(rows: Sequence[Measured], d: Device) -> dict[str, float]:
    """Rates with the least mean |log(predicted / measured)| that a search along each coordinate finds."""
    seconds = np.array([r.seconds for r in rows])
    free = FREE[rows[0].kind]
    now = {n: STARTS[n][0] if n in free else 0.0 for n in RATES}

    def loss(c: Mapping[str, float]) -> float:
        return float(np.abs(np.log(priced(rows, d, ProductRates(**c, band=0.0)) / seconds)).mean())

    least, steps = loss(now), dict.fromkeys(free, 0.5)
    for _ in range(50):
        for name, step in steps.items():
            for sign in (1, -1):
                tried = {**now, name: min(STARTS[name][2], max(STARTS[name][1], now[name] * math.exp(sign * step)))}
                if (found := loss(tried)) < least - 1e-7:
                    now, least = tried, found
                    break
            else:
                steps[name] = max(step / 2, 0.005)
    return now


def band_of(rows: Sequence[Measured], d: Device, r: ProductRates) -> float:
    """The band that holds most of these rows."""
    ratio = priced(rows, d, r) / np.array([m.seconds for m in rows])
    return min(WIDEST, math.ceil(100 * float(np.quantile(np.maximum(ratio, 1 / ratio) - 1, HOLDS))) / 100)


def report(devices: Sequence[str], kinds: Sequence[str], part: str, check: bool) -> int:
    print(f"aiconfigurator-core {package_version()}, part {part!r}, at most {ROWS} rows a device and kind\n")
    print(f"{'':24s} {'rows':>5s} {'mean':>7s} {'median':>7s} {'p90':>7s} {'bias':>7s} {'within':>6s} band")
    bad = 0
    for device in devices:
        for kind in kinds:
            r = layer_rates().get(device, {}).get(kind)
            rows = drawn(measured(device, kind), part, ROWS) if r is not None else []
            if r is None or not rows:
                continue
            error = priced(rows, shipped(device), r) / np.array([m.seconds for m in rows]) - 1
            print(f"{device + ' ' + kind:24s} {_line(error, r.band)}", flush=True)
            for low, high, words in LATENCIES:
                some = np.array([low <= m.seconds < high for m in rows])
                if some.sum() > 2:
                    print(f"  {words:22s} {_line(error[some], r.band)}")
            if np.abs(error).mean() > MOST[kind]:
                print(f"missed: {device} {kind}: at most {MOST[kind]:.0%}")
                bad = 1
    return bad if check else 0


def _line(error: NDArray[np.float64], band: float) -> str:
    off = np.abs(error)
    within = np.mean(np.maximum(1 + error, 1 / (1 + error)) <= 1 + band)
    return (
        f"{len(off):5d} {off.mean():7.1%} {np.median(off):7.1%} {np.quantile(off, 0.9):7.1%} {error.mean():+7.1%} "
        f"{within:6.0%} ±{band:.0%}"
    )


def write(devices: Sequence[str]) -> None:
    """Prints layers.toml."""
    print("# Products outside of attention, by `python benchmarks/gpu_layers.py --fit`; layers.py explains the rates.")
    print("# band: what holds 90 % of the rows that were fitted to or chosen with.")
    print(f'source = "fitted to rows of aiconfigurator-core {package_version()} ({ENGINE}), by benchmarks/gpu_layers.py"\n')
    for device in devices:
        d = shipped(device)
        for kind in KINDS:
            rows = measured(device, kind)
            seen = drawn(rows, "fit", FIT_ROWS)
            if len(seen) < 100:
                continue
            found = fitted(seen, d)
            band = band_of([*seen, *drawn(rows, "choose", ROWS)], d, ProductRates(**found, band=0.0))
            lines = [f"{n} = {float(f'{v:.4g}')!r}" for n, v in found.items()]
            print("\n".join([f"[{device}.{kind}]", *lines, f"band = {band:.2f}", ""]), flush=True)
    print("# Devices without rows.")
    for name, (like, why, band, kinds) in LIKE.items():
        print(f'[{name}]\nlike = ["{like}", "{why}"]\nband = [{band}, "stated"]')
        print(f"kinds = {list(kinds)!r}\n".replace("'", '"'))


_ADA, _OLD = KINDS, ("bf16", "experts_bf16")
LIKE: Mapping[str, tuple[str, str, float, tuple[str, ...]]] = {
    "l4": ("l40s", "Ada, shares of its own data sheet", 0.5, _ADA),
    "rtx4090": ("l40s", "Ada, shares of its own data sheet", 0.5, _ADA),
    "rtx5090": ("rtxpro6000", "Blackwell on workstations, shares of its own data sheet", 0.5, _ADA),
    "a10": ("a100", "Ampere, shares of its own data sheet", 0.5, _OLD),
    "rtx3090": ("a100", "Ampere, shares of its own data sheet", 0.5, _OLD),
    "mi300x": ("h100", "assumed: no kernel of this maker is in the tables", 0.8, _OLD),
}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--devices", default=",".join(FOLDERS))
    p.add_argument("--kinds", default=",".join(KINDS))
    p.add_argument("--part", default="choose", choices=PARTS)
    p.add_argument("--fit", action="store_true")
    p.add_argument("--check", action="store_true")
    given = p.parse_args()
    devices, kinds = given.devices.split(","), given.kinds.split(",")
    if strange := sorted({*devices} - {*FOLDERS} | {*kinds} - {*KINDS}):
        print(f"nothing is known of {', '.join(strange)}; there are: {', '.join((*FOLDERS, *KINDS))}", file=sys.stderr)
        return 2
    try:
        if given.fit:
            write(devices)
            return 0
        return report(devices, kinds, given.part, given.check)
    except NoTables as no:
        print(no, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
