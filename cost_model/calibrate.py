"""Calibration of this machine's CPU: a few seconds of PyTorch operators, timed once and kept in a file.

    rates of one thread  → every entry of `HostRates`;   the same with all threads → `scaling`

The only file of the cost model that runs torch, and only when asked to. The file lies in the user's cache folder, one a
processor, and `device("cpu")` reads it; without it the numbers of devices/cpu.toml stand, and plans say "uncalibrated".
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import CALIBRATION_SCHEMA, Device, HostRates, calibration_path, device_to_dict, processor, shipped

if TYPE_CHECKING:
    import torch

# Timed runs of one measurement: at least so many, and at least so long.
RUNS = 5
SECONDS = 0.03
DTYPES = ("f32", "bf16", "f16")
HEADS = 4
KEYS = 1024
# Query rows of a call whose inner blocks have 1, 8, 32, 64 and 256 rows.
CALLS: Mapping[int, int] = {1: 1, 8: 8, 32: 128, 64: 256, 256: 768}


def calibrate(threads: int | None = None, path: Path | None = None, say: Callable[[str], None] | None = None) -> Device:
    """Measure this machine and write the calibration file. Returns the calibrated CPU.

    `threads` is how many the scaling is measured with (default: torch's own number); it takes about ten seconds, and a busy
    machine gives wrong numbers. Raises OSError when the file cannot be written.
    """
    import torch

    threads = threads or torch.get_num_threads()
    tell = say or (lambda text: None)
    with _threads(1), torch.no_grad():
        rates = _rates(shipped("cpu"), tell)
    if threads > 1:
        tell(f"the same with {threads} threads")
        rates["scaling"] = _scaling(rates, threads)
    base = shipped("cpu")
    flops = {**base.matrix_flops_per_s, **rates.pop("matrix_flops_per_s")}
    dram = rates.pop("dram_bytes_per_s")
    assert base.host is not None
    host = HostRates(**{**{f: getattr(base.host, f) for f in base.host.__dataclass_fields__}, **rates, "threads": threads})
    found = replace(
        base, title=processor(), units=threads, dram_bytes_per_s=dram, matrix_flops_per_s=flops, host=host,
        basis="calibrated",
    )  # fmt: skip
    where = path or calibration_path()
    if where is None:
        return found
    where.parent.mkdir(parents=True, exist_ok=True)
    body = {"schema": CALIBRATION_SCHEMA, "torch": torch.__version__, "device": device_to_dict(found)}
    where.write_text(json.dumps(body, indent=1), encoding="utf-8")
    tell(f"wrote {where}")
    return found


@contextmanager
def _threads(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """The least time of several runs: what the machine can do when nobody disturbs it.

    One thread is timed by what it ran, not by the wall: other programs then disturb little.
    """
    run()
    run()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < RUNS or spent < SECONDS:
        start = clock()
        run()
        took = clock() - start
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]


def _rates(base: Device, tell: Callable[[str], None]) -> dict[str, Any]:
    """Rates of one thread."""
    tell("calls and memory")
    out = _calls() | _memory()
    assert base.host is not None
    tables: dict[str, dict[str, Any]] = {
        n: dict(getattr(base.host, n))
        for n in ("gemm_half_rows", "element_seconds", "exp_seconds", "softmax_seconds", "attention_mask_seconds",
                  "attention_row_seconds", "attention_pair_seconds", "flex_pair_seconds")
    }  # fmt: skip
    flops: dict[str, float] = {}
    for t in DTYPES:
        tell(f"products, exponentials and SDPA in {t}")
        flops[t], tables["gemm_half_rows"][t] = _product(t)
        tables["element_seconds"][t], tables["exp_seconds"][t], tables["softmax_seconds"][t] = _points(t)
        pairs, mask, row = _attention(t)
        tables["attention_pair_seconds"][t], tables["attention_mask_seconds"][t] = pairs, mask
        tables["attention_row_seconds"][t] = row
    return {**out, **tables, "matrix_flops_per_s": flops}


def _calls() -> dict[str, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    x = torch.randn(1, 1, 8, 8)
    mask = torch.ones(8, 8, dtype=torch.bool)
    plain = seconds(lambda: sdpa(x, x, x))
    return {
        "operator_seconds": seconds(lambda: x + x),
        "product_seconds": seconds(lambda: torch.bmm(x[0], x[0])),
        "attention_seconds": plain,
        "mask_seconds": max(0.0, seconds(lambda: sdpa(x, x, x, attn_mask=mask)) - plain),
    }


def _memory() -> dict[str, float]:
    import torch

    small = torch.randn(1 << 19)
    large = torch.randn(1 << 24)
    place = torch.empty_like(large)
    small_place = torch.empty_like(small)
    in_place = seconds(lambda: torch.add(large, place, out=place))
    fresh = seconds(lambda: large + 1.0)
    kept = seconds(lambda: torch.add(large, 1.0, out=place))
    return {
        "cache_bytes_per_s": 12 * small.numel() / seconds(lambda: torch.add(small, small_place, out=small_place)),
        "dram_bytes_per_s": 12 * large.numel() / in_place,
        "fault_seconds_per_byte": max(0.0, fresh - kept) / (4 * large.numel()),
    }


def _product(t: str) -> tuple[float, float]:
    """Peak FLOP/s and the rows of half of it, from products of few and of many rows."""
    import torch

    took = {}
    for rows in (32, 256):
        q, k = (torch.randn(HEADS, n, 64, dtype=_dtype(t)) for n in (rows, 512))
        out = torch.empty(HEADS, rows, 512, dtype=_dtype(t))
        took[rows] = seconds(lambda q=q, k=k, out=out: torch.bmm(q, k.mT, out=out)) / rows  # type: ignore[misc]
    flops = 2.0 * HEADS * 512 * 64
    # seconds a row = (1 + half / rows) / (peak / flops)
    half = max(0.0, (took[32] - took[256]) / (took[256] / 32 - took[32] / 256))
    peak = flops * (1 + half / 256) / took[256]
    return peak, half


def _points(t: str) -> tuple[float, float, float]:
    import torch

    x = torch.randn(1 << 18, dtype=_dtype(t))
    out = torch.empty_like(x)
    rows = x.view(-1, 512)
    n = x.numel()
    return (
        seconds(lambda: torch.add(x, 1.0, out=out)) / n,
        seconds(lambda: torch.exp(x, out=out)) / n,
        seconds(lambda: rows.softmax(-1)) / n,
    )


def _attention(t: str) -> tuple[dict[int, tuple[float, float]], float, float]:
    """Of SDPA's fused kernel: seconds a pair by the rows of its blocks, from two head sizes; of a mask; of a row."""
    call = _sdpa(t, 1, 1, 8) * HEADS
    # a row of a key block, from short and whole blocks of keys
    short, whole = ((_sdpa(t, 128, keys, 64) - call / HEADS) / (HEADS * 128 * keys) for keys in (64, 512))
    row = max(0.0, (short - whole) / (1 / 64 - 1 / 512))
    out: dict[int, tuple[float, float]] = {}
    for block, queries in CALLS.items():
        keys = KEYS if block < 256 else KEYS // 2
        pairs = HEADS * queries * keys
        took = [max(_sdpa(t, queries, keys, d) - call / HEADS, 0.0) / pairs - row / 512 for d in (64, 128)]
        each = max(0.0, min(took[1] - took[0], took[0])) / 128
        out[block] = (max(0.0, took[0] - 128 * each), each)
    masked = _sdpa(t, 128, KEYS, 64, masked=True) - _sdpa(t, 128, KEYS, 64)
    return out, max(0.0, masked) / (HEADS * 128 * KEYS), row


def _sdpa(t: str, queries: int, keys: int, d: int, masked: bool = False) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (torch.randn(1, HEADS, n, d, dtype=_dtype(t)) for n in (queries, keys, keys))
    mask = torch.zeros(queries, keys, dtype=_dtype(t)) if masked else None
    return seconds(lambda: sdpa(q, k, v, attn_mask=mask))


def _scaling(rates: Mapping[str, Any], threads: int) -> dict[str, float]:
    """What all threads bring over one, by class of work; FlexAttention shares its work as SDPA does."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    heads = max(HEADS, 2 * threads)
    q, k = torch.randn(1, heads, 256, 64), torch.randn(1, heads, 512, 64)
    out = torch.empty(heads, 256, 512)
    x = torch.randn(1 << 20)
    x_out = torch.empty_like(x)
    large = torch.randn(1 << 24)
    place = torch.empty_like(large)
    runs: dict[str, Callable[[], object]] = {
        "product": lambda: torch.bmm(q[0], k[0].mT, out=out),
        "attention": lambda: sdpa(q, k, k),
        "element": lambda: torch.exp(x, out=x_out),
        "memory": lambda: torch.add(large, place, out=place),
        "fresh": lambda: large + 1.0,
    }
    took: dict[int, dict[str, float]] = {}
    for n in (1, threads):
        with _threads(n), torch.no_grad():
            took[n] = {name: seconds(run, time.perf_counter) for name, run in runs.items()}
    gain = {name: max(1.0, took[1][name] / took[threads][name]) for name in runs}
    gain["fault"] = gain.pop("fresh")
    gain["flex"] = gain["attention"]
    return gain
