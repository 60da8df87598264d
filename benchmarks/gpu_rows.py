"""Measured rows of kernels on GPUs, from the tables of the package `aiconfigurator-core`, and their split in three.

    context     prompts under a causal mask, through a paged cache         window    the same with a sliding window
    generation  one new token a sequence, keys from a paged cache          encoder   no mask, no cache: a bare call

A shape lies in one part on every device: `fit` gives constants, `choose` decides among forms, `judge` is for the last table.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

PACKAGE = "aiconfigurator-core"
PARTS = ("fit", "choose", "judge")
TABLES = ("context", "window", "generation", "encoder")
# Folders of the package by our names of devices.
FOLDERS: Mapping[str, str] = {
    "a100": "a100_sxm", "h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "b300": "b300_sxm", "gb200": "gb200",
    "gb300": "gb300", "l40s": "l40s", "rtxpro6000": "rtx_pro_6000_server",
}
# The engine whose rows are read, so that a table is of one kernel; versions of each, newest first.
ENGINE = "vllm"
VERSIONS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("0.24.0", "0.14.0"), "sglang": ("0.5.14", "0.5.10"), "trtllm": ("1.3.0rc20", "1.0.0"),
}
# What a kernel's source is called there, and our name of its family.
SOURCES: Mapping[str, str] = {
    "vllm_flash_attn": "fa2_paged", "vllm_flash_attn_fa2": "fa2_paged", "vllm_vit_flash_attn_fa2": "fa2",
    "vllm_flash_attn_fa3": "fa3", "vllm_vit_flash_attn_fa3": "fa3", "vllm_vit_flash_attn_fa4": "fa4",
    "vllm_flashinfer_trtllmprefill": "trtllm", "vllm_flashinfer_trtllmdecode": "trtllm",
}
COLUMNS = ("kernel_source", "batch_size", "isl", "num_heads", "latency")
GROUPED = ("head_dim", "step", "num_key_value_heads", "attn_dtype", "kv_cache_dtype")
FILES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "context": ("attention", "context_attention", GROUPED),
    "generation": ("attention", "generation_attention", GROUPED),
    "encoder": ("encoder_attention", "encoder_attention", ("head_dim", "attn_dtype")),
}
# Rows a table and device, drawn evenly over the latencies of each head size, group and window.
ROWS = 1500


class NoTables(RuntimeError):
    """The package is not there, or not as this file knows it; the sentence says what is missing."""


class Timed(Protocol):
    """A measured row that is drawn, and held beside its neighbours in batch."""

    @property
    def batch(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...
    @property
    def along(self) -> tuple[int | str, ...]: ...


R = TypeVar("R", bound=Timed)


def part_of(shape: tuple[int | str, ...]) -> str:
    """The part that a shape lies in, on every device."""
    digest = hashlib.sha256(",".join(map(str, shape)).encode()).digest()
    return PARTS[int.from_bytes(digest[:8], "big") % len(PARTS)]


@dataclass(frozen=True)
class Row:
    """One measured call. `kernel` is our name of its family; `head` of queries and keys, `value` of values."""

    table: str
    device: str
    kernel: str
    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    head: int
    value: int
    window: int
    seconds: float

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def causal(self) -> bool:
        return self.table in ("context", "window")

    @property
    def shape(self) -> tuple[int | str, ...]:
        """What it is split by: no device, no engine."""
        phase = "context" if self.causal else self.table
        return phase, self.batch, self.queries, self.keys, self.heads, self.key_heads, self.head, self.window

    @property
    def part(self) -> str:
        return part_of(self.shape)

    @property
    def along(self) -> tuple[int | str, ...]:
        """What rows have in common that differ by their batch."""
        return self.kernel, self.queries, self.keys, self.heads, self.key_heads, self.head, self.window

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the mask keeps, over batch and heads."""
        n, w = self.queries, self.window or self.keys
        if not self.causal:
            return self.batch * self.heads * self.queries * self.keys
        full = max(0, n - w)
        return self.batch * self.heads * (full * w + (n - full) * (n - full + 1) // 2)

    @property
    def flops(self) -> int:
        return 2 * self.pairs * (self.head + self.value)

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys and values that are read at least once, in 16 bits."""
        seen = min(self.keys, self.window or self.keys) if self.queries == 1 else self.keys
        return 2 * self.batch * self.key_heads * seen * (self.head + self.value)

    def __str__(self) -> str:
        window = f" window {self.window}" if self.window else ""
        return (
            f"{self.device} {self.table} {self.batch}×{self.heads}/{self.key_heads} heads of {self.head}, "
            f"{self.queries}×{self.keys}{window}"
        )


@dataclass(frozen=True)
class Limits:
    """What a data sheet allows: FLOP and bytes a second, and the bytes of the last cache."""

    flops_per_s: float
    bytes_per_s: float
    cache_bytes: float


def folder() -> Path:
    """Where the package lies. Raises NoTables."""
    found = find_spec("aiconfigurator_core")
    if found is None or not found.submodule_search_locations:
        raise NoTables(f"no tables: pip install --no-deps {PACKAGE} pyarrow (80 MB; this project's extra `gpu-tables`)")
    if find_spec("pyarrow") is None:
        raise NoTables("no reader of the tables: pip install pyarrow (this project's extra `gpu-tables`)")
    return Path(next(iter(found.submodule_search_locations))) / "systems" / "data"


def package_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "of unknown version"


def rows(
    device: str, table: str, limits: Limits, engine: str = ENGINE, sources: Mapping[str, str] = SOURCES
) -> tuple[list[Row], Counter[str]]:
    """The rows of a table that can be held against a clock, and how many were left out, by reason. Raises NoTables.

    `sources`: kernels of the engine by what their rows call them.
    """
    kind = "context" if table == "window" else table
    out: Counter[str] = Counter()
    found: dict[tuple[int | str, ...], list[Row]] = defaultdict(list)
    for row in _read(device, kind, out, engine, sources):
        if (row.table == "window") != (table == "window"):
            continue
        found[row.kernel, *row.shape].append(row)
    kept = []
    for same in found.values():
        out["the same shape again (the median is taken)"] += len(same) - 1
        row = sorted(same, key=lambda r: r.seconds)[len(same) // 2]
        if (why := _impossible(row, limits)) is not None:
            out[why] += 1
        else:
            kept.append(row)
    return smooth(kept, out), +out


def drawn(given: Iterable[R], most: int = ROWS) -> list[R]:
    """At most so many, evenly over the latencies of each head size, group and window."""
    strata: dict[tuple[int, int, int], list[R]] = defaultdict(list)
    for r in given:
        strata[r.head, r.group, r.window].append(r)
    total = sum(map(len, strata.values()))
    out = []
    for same in strata.values():
        same.sort(key=lambda r: (r.seconds, r.shape))
        n = len(same) if total <= most else max(1, round(most * len(same) / total))
        out += [same[i * len(same) // n] for i in range(n)]
    return out


def _read(device: str, kind: str, out: Counter[str], engine: str, sources: Mapping[str, str]) -> Iterator[Row]:
    place, name, more = FILES[kind]
    where = folder() / FOLDERS[device] / place / engine
    import pyarrow.parquet as parquet

    file = next((f for v in VERSIONS[engine] if (f := where / v / f"{name}_perf.parquet").is_file()), None)
    if file is None:
        return
    held = set(parquet.read_schema(file).names)
    if missing := sorted({*COLUMNS, *more} - held):
        raise NoTables(f"{PACKAGE} {package_version()}: {file.name} of {device} has no column {', '.join(missing)}")
    columns = [*COLUMNS, *more, *({"window_size"} & held)]
    for r in parquet.read_table(file, columns=columns).to_pylist():
        row = _row(device, kind, r, out, sources)
        if row is not None:
            yield row


def _row(
    device: str, kind: str, r: Mapping[str, Any], out: Counter[str], sources: Mapping[str, str] = SOURCES
) -> Row | None:
    types = [r[c] for c in ("attn_dtype", "kv_cache_dtype") if c in r]
    if set(types) != {"bfloat16"}:
        out["not bf16 throughout"] += 1
        return None
    kernel = sources.get(r["kernel_source"])
    if kernel is None or r["head_dim"] > 256:
        out[f"another kernel ({r['kernel_source']}, head size {r['head_dim']})"] += 1
        return None
    decode = kind == "generation"
    queries, heads = (1 if decode else int(r["isl"])), int(r["num_heads"])
    if not decode and queries < 2:
        out["prompts of one token (another kernel)"] += 1
        return None
    keys = int(r["step"]) + 1 if decode else queries
    key_heads = int(r.get("num_key_value_heads") or heads)
    head = int(r["head_dim"])
    window = int(r.get("window_size") or 0)
    if window and (decode or window >= keys):
        out["decoding in a window" if decode else "a window that covers the prompt"] += 1
        return None
    table = "window" if window else kind
    return Row(
        table, device, kernel, int(r["batch_size"]), queries, keys, heads, key_heads, head, head, window,
        float(r["latency"]) / 1e3,
    )


def _impossible(r: Row, limits: Limits) -> str | None:
    if r.flops / r.seconds > limits.flops_per_s:
        return "more FLOP a second than the data sheet says"
    if r.key_bytes > 2 * limits.cache_bytes and r.key_bytes / r.seconds > limits.bytes_per_s:
        return "more bytes a second than the data sheet says"
    return None


def smooth(given: list[R], out: Counter[str]) -> list[R]:
    """Without rows that take 1.5 times as long as both neighbours in batch should."""
    along: dict[tuple[int | str, ...], list[R]] = defaultdict(list)
    for r in given:
        along[r.along].append(r)
    kept = []
    for same in along.values():
        same.sort(key=lambda r: r.batch)
        for i, r in enumerate(same):
            if 0 < i < len(same) - 1 and r.seconds > 1.5 * max(same[i - 1].seconds, same[i + 1].seconds):
                out["1.5 times as long as both neighbours in batch"] += 1
            else:
                kept.append(r)
    return kept

