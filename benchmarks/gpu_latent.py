"""Kernels over latents and states beside measured rows: absorbed and expanded MLA, chunks and steps of gated delta rules.

    mla_generation  one query of H heads over N latents of 576 numbers, of which 512 are the values     (trtllm)
    mla_context     prompts with keys of 192 and values of 128 numbers under a causal mask              (trtllm)
    gdn_context     prompts through a carried state of 128 × 128, in chunks of 64 tokens                (vllm)
    gdn_generation  one token: every state is read and written once                                     (vllm)

Each form says how programs fill the units and what crosses the memory's edge; its few constants are fitted to the part
`fit` and stand in the cost model's latents.toml, by device. Plans use that of mla_generation. Sources of the forms: the
FlashMLA and FlashAttention-3 public code (a tile of 64 heads; row blocks of 128), Yang et al., "Gated Delta Networks"
(2412.06464), section 3.3.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from gpu_rows import COLUMNS, FOLDERS, PACKAGE, VERSIONS, Limits, NoTables, folder, package_version, part_of, smooth
from numpy.typing import NDArray

from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.devices.latents import latent_kernels
from reattend.cost_model.layer.latents import decode_seconds, longer, near

TABLES = ("mla_generation", "mla_context", "gdn_context", "gdn_generation")
# Numbers of a latent with its rotary part, of its values; heads of the expanded form; a state's sides; a chunk.
LATENT, LATENT_VALUE, HEAD, VALUE, STATE, CHUNK = 576, 512, 192, 128, 128, 64
# Rows and keys of a tile of the expanded form.
TILE = 128
# Share of rows that a stated band holds of those that were fitted to or chosen with, and what it may not exceed.
HOLDS, WIDEST = 0.95, 0.4
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class LatentRow:
    """One measured call: `heads` are those of queries (MLA) or of values, `key_heads` those of keys."""

    table: str
    device: str
    kernel: str
    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    seconds: float
    head: int = LATENT
    window: int = 0

    @property
    def group(self) -> int:
        return self.heads

    @property
    def shape(self) -> tuple[int | str, ...]:
        return self.table, self.batch, self.queries, self.keys, self.heads, self.key_heads

    @property
    def along(self) -> tuple[int | str, ...]:
        """What rows have in common that differ by their batch."""
        return self.kernel, self.queries, self.keys, self.heads, self.key_heads

    @property
    def part(self) -> str:
        return part_of(self.shape)

    @property
    def flops(self) -> float:
        if self.table == "mla_generation":
            return 2.0 * self.batch * self.heads * self.keys * (LATENT + LATENT_VALUE)
        if self.table == "mla_context":
            return self.batch * self.heads * self.keys * (self.keys + 1.0) * (HEAD + VALUE)
        return 0.0

    @property
    def key_bytes(self) -> float:
        """Bytes that are moved at least once."""
        if self.table == "mla_generation":
            return 2.0 * self.batch * self.keys * LATENT
        return 8.0 * self.batch * self.heads * STATE * STATE if self.table == "gdn_generation" else 0.0

    def __str__(self) -> str:
        return f"{self.device} {self.table} {self.batch}×{self.heads} heads, {self.queries}×{self.keys}"


def latent_rows(device: str, table: str, limits: Limits) -> tuple[list[LatentRow], Counter[str]]:
    """The rows of a table that can be held against a clock, and how many were left out, by reason. Raises NoTables."""
    mla = table.startswith("mla")
    engine, place, name = ("trtllm", "mla", f"{table.split('_')[1]}_mla") if mla else ("vllm", "linear_attention", "gdn")
    where = folder() / FOLDERS[device] / place / engine
    import pyarrow.parquet as parquet

    file = next((f for v in VERSIONS[engine] if (f := where / v / f"{name}_perf.parquet").is_file()), None)
    out: Counter[str] = Counter()
    if file is None:
        return [], out
    wanted = ["mla_dtype", "kv_cache_dtype", "isl", "step", "num_heads"] if mla else [
        "phase", "seq_len", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"]
    held = set(parquet.read_schema(file).names)
    columns = [*(c for c in COLUMNS if c not in ("isl", "num_heads")), *wanted]
    if missing := sorted(set(columns) - held):
        raise NoTables(f"{PACKAGE} {package_version()}: {file.name} of {device} has no column {', '.join(missing)}")
    same: dict[tuple[int | str, ...], list[LatentRow]] = defaultdict(list)
    for r in parquet.read_table(file, columns=columns).to_pylist():
        row = _latent_row(device, table, r, out)
        if row is not None:
            same[row.kernel, *row.shape].append(row)
    kept = []
    for rows in same.values():
        out["the same shape again (the median is taken)"] += len(rows) - 1
        row = sorted(rows, key=lambda r: r.seconds)[len(rows) // 2]
        if row.flops / row.seconds > limits.flops_per_s:
            out["more FLOP a second than the data sheet says"] += 1
        elif row.key_bytes > 2 * limits.cache_bytes and row.key_bytes / row.seconds > limits.bytes_per_s:
            out["more bytes a second than the data sheet says"] += 1
        else:
            kept.append(row)
    return smooth(kept, out), +out


def _latent_row(device: str, table: str, r: Mapping[str, Any], out: Counter[str]) -> LatentRow | None:
    batch, seconds = int(r["batch_size"]), float(r["latency"]) / 1e3
    if table.startswith("mla"):
        if {r["mla_dtype"], r["kv_cache_dtype"]} != {"bfloat16"}:
            out["not bf16 throughout"] += 1
            return None
        decode, heads = table == "mla_generation", int(r["num_heads"])
        queries = 1 if decode else int(r["isl"])
        if not decode and (queries < 2 or r["step"]):
            out["prompts of one token (another kernel)"] += 1
            return None
        keys = int(r["step"]) + 1 if decode else queries
        return LatentRow(table, device, "mla", batch, queries, keys, heads, 1 if decode else heads, seconds)
    if "delta_rule" not in r["kernel_source"]:
        out[f"another kernel ({r['kernel_source']})"] += 1
        return None
    if (r["phase"] == "context") != (table == "gdn_context"):
        return None
    if (r["head_k_dim"], r["head_v_dim"]) != (STATE, STATE):
        out["other sides of the state"] += 1
        return None
    n = 1 if table == "gdn_generation" else int(r["seq_len"])
    return LatentRow(
        table, device, str(r["kernel_source"]), batch, n, n, int(r["num_v_heads"]), int(r["num_k_heads"]), seconds, STATE
    )


# --- forms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Columns:
    """Rows as columns."""

    batch: Numbers
    keys: Numbers
    heads: Numbers
    key_heads: Numbers

    @staticmethod
    def of(rows: Sequence[LatentRow]) -> Columns:
        names = ("batch", "keys", "heads", "key_heads")
        return Columns(*(np.array([getattr(r, n) for r in rows], np.float64) for n in names))


Constants = Mapping[str, float]
# What each form's constants start from, and their bounds: call seconds, seconds of a program beside its tiles, shares.
STARTS: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "mla_generation": {
        "call": (8e-6, 1e-6, 4e-5), "program": (3e-6, 1e-7, 3e-5), "matrix": (0.7, 0.05, 1.0), "memory": (0.9, 0.2, 1.0),
        "draw": (60e9, 5e9, 400e9), "merge": (2e-6, 1e-8, 3e-5), "part": (5e-8, 1e-10, 2e-6), "again": (0.3, 1e-4, 1.0),
        "ends": (1.0, 0.1, 8.0), "rows": (64.0, 16.0, 128.0), "splits": (1.0, 0.0, 2.0),
    },
    "mla_context": {
        "call": (8e-6, 1e-6, 4e-5), "program": (2e-6, 1e-7, 3e-5), "matrix": (0.8, 0.05, 1.0), "exp": (0.5, 0.01, 1.5),
        "memory": (0.8, 0.1, 1.0), "token": (1e-10, 1e-13, 1e-7),
        "alone": (1.0, 1.0, 2.0),
    },
    "gdn_context": {
        "call": (6e-6, 1e-6, 8e-5), "program": (8e-6, 1e-7, 8e-5), "chunk": (2.5e-6, 2e-7, 4e-5), "beside": (1.0, 1.0, 8.0),
        "memory": (0.7, 0.1, 1.0), "sequence": (1e-9, 1e-12, 1e-5), "between": (1.0, 1e-3, 30.0),
        "token": (1e-9, 1e-12, 1e-6),
    },
    "gdn_generation": {
        "call": (4e-6, 1e-6, 4e-5), "program": (1e-6, 1e-8, 2e-5), "memory": (0.85, 0.1, 1.0), "cache": (0.6, 0.05, 2.0),
        "sequence": (1e-9, 1e-12, 1e-6),
    },
}


# What is a number of things: every combination is tried.
WHOLE: Mapping[str, tuple[float, ...]] = {
    "beside": tuple(map(float, range(1, 9))), "rows": (16.0, 32.0, 64.0, 128.0), "splits": (0.0, 1.0, 2.0),
    "alone": (1.0, 2.0),
}


def mla_generation(x: Columns, d: Device, c: Constants) -> Numbers:
    """As plans price it: blocks of heads walk the latents."""
    return decode_seconds(x.batch, x.keys, x.heads, d, c, latent=LATENT, value=LATENT_VALUE)


def mla_context(x: Columns, d: Device, c: Constants) -> Numbers:
    """Row blocks of 128 queries walk the keys up to their own."""
    rows = np.ceil(x.keys / TILE)
    rate = d.matrix_rate("bf16") / d.units
    tile = 2 * TILE * TILE * (HEAD + VALUE) / (c["matrix"] * rate)
    tile += c["exp"] * TILE * TILE / (d.exps_per_unit_clock * d.clock_hz)
    programs = x.batch * x.heads * rows
    # programs that share a unit share its rates
    longest = c["program"] + rows * tile / c["alone"]
    even = x.batch * x.heads * (rows * c["program"] + rows * (rows + 1) / 2 * tile) / d.units
    kernel = np.where(programs <= d.units, longest, np.maximum(even + (c["program"] + tile * (rows + 1) / 2) / 2, longest))
    moved = 2 * x.batch * x.heads * x.keys * 2 * (HEAD + VALUE)
    held = near(moved, d)
    memory = moved * ((1 - held) / d.dram_bytes_per_s + held / d.l2_bytes_per_s) / c["memory"]
    return np.asarray(c["call"] + kernel + memory + c["token"] * x.batch * x.keys)


def gdn_context(x: Columns, d: Device, c: Constants) -> Numbers:
    """A program a sequence and value head goes through its chunks one after the other; `beside` share a unit."""
    waves = np.ceil(x.batch * x.heads / (d.units * c["beside"]))
    kernel = waves * (c["program"] + np.ceil(x.keys / CHUNK) * c["chunk"])
    # what steps of a chunk hand to one another comes beside queries, keys, values and results
    moved = 4 * x.batch * x.keys * (x.key_heads + (1 + c["between"]) * x.heads) * STATE / c["memory"]
    held = near(moved * c["memory"], d)
    memory = moved * ((1 - held) / d.dram_bytes_per_s + held / d.l2_bytes_per_s)
    # what chunks need of their own tokens is made side by side
    beside = c["token"] * x.batch * x.keys * x.heads / d.units
    return np.asarray(c["call"] + longer(kernel, memory) + beside + c["sequence"] * x.batch)


def gdn_generation(x: Columns, d: Device, c: Constants) -> Numbers:
    """Every state is read and written; what the last cache holds comes at its rate."""
    moved = 8 * x.batch * x.heads * STATE * STATE
    # it is written where it was read
    held = near(moved / 2, d)
    memory = moved * ((1 - held) / (c["memory"] * d.dram_bytes_per_s) + held / (c["cache"] * d.l2_bytes_per_s))
    return np.asarray(c["call"] + longer(np.full_like(moved, c["program"]), memory) + c["sequence"] * x.batch)


FORMS: Mapping[str, Callable[[Columns, Device, Constants], Numbers]] = {
    "mla_generation": mla_generation, "mla_context": mla_context, "gdn_context": gdn_context,
    "gdn_generation": gdn_generation,
}


# --- constants --------------------------------------------------------------------------------------------------------


def fitted(table: str, rows: Sequence[LatentRow], d: Device) -> dict[str, float]:
    """Constants with the least mean |log(predicted / measured)| that a search along each coordinate finds."""
    x, seconds = Columns.of(rows), np.array([r.seconds for r in rows])
    bounds = STARTS[table]
    whole = {n: values for n, values in WHOLE.items() if n in bounds}
    best: tuple[float, dict[str, float]] = math.inf, {}
    for chosen in product(*whole.values()):
        now = {n: start for n, (start, _, _) in bounds.items()} | dict(zip(whole, chosen))

        def loss(c: Constants) -> float:
            return float(np.abs(np.log(FORMS[table](x, d, c) / seconds)).mean())

        least, steps = loss(now), {n: 0.6 for n in now if n not in whole}
        for _ in range(60):
            for name, step in steps.items():
                for sign in (1, -1):
                    low, high = bounds[name][1:]
                    tried = {**now, name: min(high, max(low, now[name] * math.exp(sign * step)))}
                    if (found := loss(tried)) < least - 1e-7:
                        now, least = tried, found
                        break
                else:
                    steps[name] = max(step / 2, 0.004)
        if least < best[0]:
            best = least, now
    return best[1]


def band_of(table: str, rows: Sequence[LatentRow], d: Device, c: Constants) -> float:
    """The band that holds most of these rows."""
    ratio = FORMS[table](Columns.of(rows), d, c) / np.array([r.seconds for r in rows])
    return min(WIDEST, math.ceil(100 * float(np.quantile(np.maximum(ratio, 1 / ratio) - 1, HOLDS))) / 100)


def priced_rows(rows: Sequence[LatentRow]) -> list[float]:
    """Seconds of rows of one table and device by the constants of the file."""
    r = rows[0]
    return [float(s) for s in FORMS[r.table](Columns.of(rows), shipped(r.device), latent_kernels()[r.device, r.table])]


def written(device: str, table: str, c: Constants, band: float) -> str:
    """The constants as a table of the file."""
    lines = [f"{n} = {float(f'{v:.4g}')!r}" for n, v in c.items()]
    return "\n".join([f"[{device}.{table}]", *lines, f"band = {band:.2f}", ""])
