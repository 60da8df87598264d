"""Calibration of this machine's CPU: PyTorch operators, timed one by one, and the file in which the rates are kept.

    rates of one thread  → every entry of `HostRates`;   the same with all threads → `scaling`

The only file of the cost model that runs torch, and only when asked to. What needs the code generator (our own kernels and
FlexAttention) and the held-out check are in codegen/measure/calibrate.py, which calls this. The file lies in the user's
cache folder, one a device, and `device(name)` reads it; without it the numbers of the data file stand, and plans say
"uncalibrated".
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from ...patterns.operators import OPERATORS, named
from ..devices.device import (
    CALIBRATION_SCHEMA,
    Device,
    HostRates,
    calibration_path,
    device_from_dict,
    device_to_dict,
    processor,
    shipped,
)
from ..time.host import VECTOR

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# One measurement: it ends when CONFIRMED runs came within NEAR of the least time, but not before SECONDS or RUNS are spent;
# on a machine that stays noisy, after PATIENCE seconds.
CONFIRMED, NEAR = 3, 0.02
SECONDS, PATIENCE, RUNS = 0.03, 0.3, 2000
# How often each gain of threads is measured, far apart: a neighbour that takes a core for a second spoils one of them.
ROUNDS = 5
DTYPES = ("f32", "bf16", "f16")
HEADS = 4
KEYS = 1024
# Queries whose mask over KEYS keys is out of the core's own cache.
FAR = 1024
# Query rows of a call whose inner blocks have 1, 8, 32, 64 and 256 rows.
CALLS: Mapping[int, int] = {1: 1, 8: 8, 32: 128, 64: 256, 256: 768}


class Watch(Protocol):
    """Watches the steps go by, for a progress bar: (steps, what they are) → the same steps."""

    def __call__(self, steps: list[T], what: str, /) -> Iterable[T]: ...


def unwatched(steps: list[T], what: str) -> Iterable[T]:
    del what
    return steps


def cpu_rates(threads: int | None = None, watch: Watch = unwatched) -> Device:
    """The CPU with this machine's rates of PyTorch's operators, measured now; nothing is written.

    `threads` is how many the scaling is measured with (default: torch's own number).
    """
    import torch

    base = shipped("cpu")
    assert base.host is not None
    threads = threads or torch.get_num_threads()
    steps: list[Callable[[], Mapping[str, object]]] = [_calls, _memory, _integers, *(_typed(t) for t in DTYPES)]
    found: dict[str, Any] = {}
    with torch_threads(1), torch.no_grad():
        for step in watch(steps, "operators, one thread"):
            merge(found, step())
    if threads > 1:
        with torch.no_grad():
            found["scaling"] = _scaling(threads, watch)
    flops = {**base.matrix_flops_per_s, **found.pop("matrix_flops_per_s")}
    dram = found.pop("dram_bytes_per_s")
    host = with_rates(base.host, {**found, "threads": threads})
    return replace(
        base, title=processor(), units=threads, dram_bytes_per_s=dram, matrix_flops_per_s=flops, host=host,
        basis="calibrated",
    )


def merge(into: dict[str, Any], found: Mapping[str, object]) -> None:
    """Add rates; tables by type, and tables of them, are joined."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            into[name] = {**into.get(name, {})}
            merge(into[name], value)
        else:
            into[name] = value


def with_rates(h: HostRates, found: Mapping[str, object]) -> HostRates:
    """Rates with some of them replaced; a table keeps the types that were not measured."""
    joined: dict[str, Any] = {n: {**getattr(h, n), **v} if isinstance(v, Mapping) else v for n, v in found.items()}
    return replace(h, **joined)


def between(a: Device, b: Device) -> Device:
    """Every number half-way between two measurements of a device: clocks drift from one minute to the next."""
    return device_from_dict(_between(device_to_dict(a), device_to_dict(b)))


def _between(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {k: _between(a[k], b[k]) for k in a}
    if isinstance(a, list):
        return [_between(x, y) for x, y in zip(a, b)]
    return a if a == b else (a + b) / 2


def keep(d: Device, path: Path | None = None) -> Path | None:
    """Write a calibrated device where `device(name)` finds it; None where the environment wants no file.

    Raises OSError when the file cannot be written.
    """
    import torch

    where = path or calibration_path(d.name)
    if where is None:
        return None
    where.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "schema": CALIBRATION_SCHEMA, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "device": device_to_dict(d),
    }
    where.write_text(json.dumps(body, indent=1), encoding="utf-8")
    return where


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Tell torch of so many threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """What a call takes when nobody disturbs it: the median of the faster half of its runs, once the least time came again.

    One thread is timed by what it ran, not by the wall: other programs then disturb little.
    """
    run()
    run()
    times: list[float] = []
    spent = 0.0
    while spent < PATIENCE and not ((spent >= SECONDS or len(times) >= RUNS) and confirmed(times)):
        start = clock()
        run()
        times.append(clock() - start)
        spent += times[-1]
    return undisturbed(times)


def undisturbed(times: list[float]) -> float:
    """The median of the faster half."""
    return statistics.median(sorted(times)[: (len(times) + 1) // 2])


def confirmed(times: list[float]) -> bool:
    """Did the least time come several times?"""
    least = min(times, default=0.0)
    return sum(t <= least * (1 + NEAR) for t in times) >= CONFIRMED


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]


def _typed(t: str) -> Callable[[], Mapping[str, object]]:
    """The rates of one type: products, element-wise operators, and SDPA's fused kernel."""

    def step() -> Mapping[str, object]:
        flops, half = _product(t)
        products = {"matrix_flops_per_s": flops, "gemm_half_rows": half, "row_flops_per_s": _row(t)}
        rates: dict[str, object] = {**products, **_points(t), **_attention(t)}
        return {**{name: {t: rate} for name, rate in rates.items()}, "curve_seconds": _curves(t)}

    return step


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

    large = torch.randn(1 << 24)
    place = torch.empty_like(large)
    dram = 12 * large.numel() / seconds(lambda: torch.add(large, place, out=place))
    # a page that was just touched is in the cache: only the operand is read from memory
    fresh = seconds(lambda: large + 1.0) - 4 * large.numel() / dram
    return {
        **_cache(), "dram_bytes_per_s": dram,
        "fault_seconds_per_byte": max(0.0, fresh) / (4 * large.numel()),
    }


# Bytes that a product with a number reads and writes, to find how many of them a cache holds.
WORKING = tuple(1 << n for n in range(23, 29))


def _cache() -> dict[str, float]:
    """Bytes up to which a byte takes about as long as in the smallest working set, and the rate there."""
    import torch

    took = {}
    for size in WORKING:
        x = torch.ones(size // 8)
        out = torch.ones_like(x)
        took[size] = seconds(lambda x=x, out=out: torch.mul(x, 2.0, out=out)) / size  # type: ignore[misc]
    # half is read, and half written after its lines were fetched
    return {"cache_bytes": held(took), "cache_bytes_per_s": 1.5 / took[WORKING[0]]}


def held(took: Mapping[int, float]) -> float:
    """Of seconds a byte by the size of the working set: the size between the last cheap and the first dear one."""
    sizes = sorted(took)
    dear = next((s for s in sizes if took[s] > SLOWER * took[sizes[0]]), 2 * sizes[-1])
    cheap = max((s for s in sizes if s < dear), default=sizes[0])
    return math.sqrt(cheap * dear)


# A working set that is out of the cache takes so much longer for a byte.
SLOWER = 1.4


def _integers() -> dict[str, object]:
    """Coordinates, as masks compute with them: a difference over queries and keys, a comparison of it, a division."""
    import torch

    p, m = torch.arange(512).unsqueeze(1), torch.arange(512)
    apart, kept = p - m, torch.empty(512, 512, dtype=torch.bool)
    n = apart.numel()
    return {
        "element_seconds": {
            "i64": seconds(lambda: torch.sub(p, m, out=apart)) / n, "b1": seconds(lambda: torch.lt(apart, 64, out=kept)) / n,
        },
        "division_seconds": seconds(lambda: apart % 7) / n, **_apart(),
    }


def _apart() -> dict[str, object]:
    """Elements that are read singly, at coordinates that broadcast, and those copied to another innermost dimension."""
    import torch

    h, p, m = torch.arange(4).view(-1, 1, 1), torch.arange(256).view(-1, 1), torch.arange(256)
    plane, at = torch.randn(4, 256, 511), m - p + 255
    keys = torch.randn(1024, 4, 48).permute(1, 2, 0)
    return {
        "gather_seconds": seconds(lambda: plane[h, p, at]) / (4 * 256 * 256),
        "transpose_seconds": seconds(keys.contiguous) / keys.numel(),
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
    # seconds a row = (1 + half / rows) / (peak / flops); no machine takes eight times as long for an eighth of the rows
    ratio = min(max(took[32] / took[256], 1.0), 7.0)
    half = (ratio - 1) / (1 / 32 - ratio / 256)
    peak = flops * (1 + half / 256) / took[256]
    return peak, half


def _row(t: str) -> float:
    """FLOP/s of products of one row: as a query with its keys, and as weights with values."""
    import torch

    q, w = (torch.randn(HEADS, 1, n, dtype=_dtype(t)) for n in (64, 2 * KEYS))
    k = torch.randn(HEADS, 2 * KEYS, 64, dtype=_dtype(t))
    took = seconds(lambda: torch.bmm(q, k.mT)) + seconds(lambda: torch.bmm(w, k))
    return 2 * 2.0 * HEADS * 2 * KEYS * 64 / took


def _points(t: str) -> dict[str, float]:
    import torch

    x = torch.randn(1 << 18, dtype=_dtype(t))
    out, rows = torch.empty_like(x), x.view(-1, 512)
    # masks change seldom along a row, so that the branch is foreseen
    kept = torch.ones(rows.shape, dtype=torch.bool).tril()
    runs: dict[str, Callable[[], object]] = {
        "element_seconds": lambda: torch.add(x, 1.0, out=out),
        "exp_seconds": lambda: torch.exp(x, out=out),
        "softmax_seconds": lambda: rows.softmax(-1),
        "where_seconds": lambda: torch.where(kept, rows, -1.0),
    }
    return {name: seconds(run) / x.numel() for name, run in runs.items()}


# What is priced in exponentials where nobody timed it; powers have two operands, of which the second decides the price.
CURVES = named(lambda o: o.effort.unit == "special" and o.arity == 1 and o.name != "exp")


def _curves(t: str) -> dict[str, dict[str, float]]:
    import torch

    # logarithms want positive numbers
    x = torch.randn(1 << 16, dtype=_dtype(t)).abs()
    out = torch.empty_like(x)
    runs = {op: getattr(torch.ops.aten, OPERATORS[op].aten).out for op in CURVES}
    return {op: {t: seconds(lambda run=run: run(x, out=out)) / x.numel()} for op, run in runs.items()}  # type: ignore[misc]


# Keys of which the last fill no vector register: some such numbers suit the kernel less than others.
ASKEW = (355, 363, 373, 426, 470)


class AttentionRates(TypedDict):
    """The rates of SDPA's fused kernel for one type, by their names in `HostRates`."""

    attention_left_seconds: float
    attention_pair_seconds: dict[int, tuple[float, float]]
    attention_key_seconds: float
    attention_row_seconds: float
    attention_mask_seconds: float
    attention_far_mask_seconds: float


def _attention(t: str) -> AttentionRates:
    """Of SDPA's fused kernel: a pair by the rows of its blocks, from two head sizes; a key, a row, a row's odd end, a mask.

    seconds = call + heads · (keys · (e + f)·κ + rows · ⌈keys / 512⌉·ρ + rows · keys · (fixed + (e + f)·each))
    """
    call = _sdpa(t, 1, 1, 8)

    def pair(queries: int, keys: int, d: int = 64) -> float:
        return (_sdpa(t, queries, keys, d) - call) / (HEADS * queries * keys)

    # κ: the rows of a call share what is laid out for a key; both have blocks of 32 rows
    key = max(0.0, pair(32, 512) - pair(128, 512)) / (128 * (1 / 32 - 1 / 128))
    # ρ: short blocks of keys share what is done for a row
    row = max(0.0, pair(128, 64) - pair(128, 512)) / (1 / 64 - 1 / 512)
    pairs: dict[int, tuple[float, float]] = {}
    for block, queries in CALLS.items():
        keys = KEYS if block < 256 else KEYS // 2
        # fewer than a block's rows are priced whole
        laid = key / queries if block >= 32 else 0.0
        took = [max(0.0, pair(queries, keys, d) - 2 * d * laid - row / 512) for d in (64, 128)]
        each = max(0.0, min(took[1] - took[0], took[0])) / 128
        pairs[block] = (max(0.0, took[0] - 128 * each), each)
    # as many keys as fill registers, and a few more
    left = [max(0.0, pair(256, n) - pair(256, n // VECTOR * VECTOR)) * n for n in ASKEW]
    return {
        "attention_left_seconds": statistics.median(left),
        "attention_pair_seconds": pairs, "attention_key_seconds": key, "attention_row_seconds": row,
        "attention_mask_seconds": _mask(t, 128), "attention_far_mask_seconds": _mask(t, FAR),
    }


def _mask(t: str, queries: int) -> float:
    """What a mask of numbers takes, a pair."""
    took = _sdpa(t, queries, KEYS, 64, masked=True) - _sdpa(t, queries, KEYS, 64)
    return max(0.0, took) / (HEADS * queries * KEYS)


def _sdpa(t: str, queries: int, keys: int, d: int, masked: bool = False) -> float:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (torch.randn(1, HEADS, n, d, dtype=_dtype(t)) for n in (queries, keys, keys))
    mask = torch.zeros(queries, keys, dtype=_dtype(t)) if masked else None
    return seconds(lambda: sdpa(q, k, v, attn_mask=mask))


def _scaling(threads: int, watch: Watch) -> dict[str, float]:
    """What all threads bring over one, by class of work; FlexAttention shares its work as SDPA does."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    heads = max(HEADS, 2 * threads)
    q, k = torch.randn(1, heads, 768, 64), torch.randn(1, heads, 512, 64)
    out = torch.empty(heads, 768, 512)
    x = torch.randn(1 << 20)
    x_out = torch.empty_like(x)
    large = torch.randn(1 << 24)
    place = torch.empty_like(large)
    runs: dict[str, Callable[[], object]] = {
        "product": lambda: torch.bmm(q[0], k[0].mT, out=out),
        "attention": lambda: sdpa(q, k, k),
        "element": lambda: torch.exp(x, out=x_out),
        "memory": lambda: torch.add(large, place, out=place),
        "fault": lambda: large + 1.0,
    }
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in watch(list(range(ROUNDS)), f"operators, {threads} threads"):
        for name, run in runs.items():
            took = {}
            for n in (1, threads):
                with torch_threads(n):
                    took[n] = seconds(run, time.perf_counter)
            ratios[name].append(took[1] / took[threads])
    gain = {name: max(1.0, statistics.median(r)) for name, r in ratios.items()}
    return gain | {"flex": gain["attention"]}
