"""Calibration of a CUDA or ROCm device: products, bandwidth, exponentials, launches, then our own streaming kernel.

    rates        dense products, a large copy, a kernel that does nothing but exponentials      → the device's rates
    constants    our kernel without a mask and with one that leaves every tile partial          → overlap, partial_factor

Rates are what a device sustains: they replace the data sheet's through efficiencies, so that peaks stay comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...cost_model.calibration.calibrate import Watch, confirmed, unwatched
from ...cost_model.calibration.constants import Timed, fitted
from ...cost_model.devices.device import Device
from ...cost_model.time.predict import best_mapping
from ...patterns import expr as ex
from ...patterns.cascade import Cascade
from ...patterns.evaluate import DTYPE
from ...patterns.library.papers import Builder, softmax
from ...patterns.verdict import Obstacle
from .company import ready

# Seconds of one measurement, and runs between two events: a single launch is shorter than the clock is exact.
SECONDS, PATIENCE, BATCH = 0.05, 1.0, 10
PRODUCT = 8192
COPIED_BYTES = 1 << 30
LAUNCHES = 1000
# Exponentials of each element of the kernel that does nothing else.
EXPS = 256
HEADS, TOKENS = 16, 4096


def gpu_rates(base: Device, watch: Watch = unwatched) -> Device:
    """The device with this machine's rates and constants, measured now; nothing is written.

    Raises ValueError where our kernel has no mapping that fits the device.
    """
    d = _driver_says(base)
    steps: list[Callable[[Device], Device]] = [_products, _bandwidth, _launches, _exponentials]
    with torch.no_grad():
        for step in watch(steps, "rates"):
            d = step(d)
        plain = [_timed(d, head, False) for head in watch([64, 128], "our kernel")]
        masked = [_timed(d, head, True) for head in watch([64, 128], "our kernel, masked tiles")]
    return replace(fitted(d, plain, masked), basis="calibrated")


def seconds(run: Callable[[], object]) -> float:
    """The least time of a call, launches back to back, that comes again."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    spent = 0.0
    while spent < PATIENCE and not (spent >= SECONDS and confirmed(times)):
        start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(BATCH):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / BATCH)
        spent += times[-1] * BATCH
    return min(times)


def _driver_says(d: Device) -> Device:
    """Units and memory of the very board; peaks follow the number of units."""
    p = torch.cuda.get_device_properties()
    share = p.multi_processor_count / d.units
    flops = {t: r * share for t, r in d.matrix_flops_per_s.items()}
    return replace(
        d, title=p.name, units=p.multi_processor_count, dram_bytes=float(p.total_memory),
        l2_bytes=float(p.L2_cache_size) or d.l2_bytes, matrix_flops_per_s=flops,
    )


def _products(d: Device) -> Device:
    """The share of the peak that large products in bf16 reach; other types' peaks are set so that it fits them too."""
    rate = {t: _product(t, PRODUCT if t != "f32" else PRODUCT // 2) for t in ("bf16", "f16", "f32")}
    efficiency = rate["bf16"] / d.matrix_flops_per_s["bf16"]
    flops = {**d.matrix_flops_per_s, "f16": rate["f16"] / efficiency, "f32": rate["f32"] / efficiency}
    return replace(d, matrix_flops_per_s=flops, model=replace(d.model, matrix_efficiency=efficiency))


def _product(dtype: str, n: int) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=DTYPE[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    return float(2 * n**3 / seconds(lambda: torch.mm(a, b, out=out)))


def _bandwidth(d: Device) -> Device:
    x = torch.empty(COPIED_BYTES // 4, device="cuda")
    y = torch.empty_like(x)
    rate = 2 * COPIED_BYTES / seconds(lambda: y.copy_(x))
    return replace(d, model=replace(d.model, bandwidth_efficiency=rate / d.dram_bytes_per_s))


def _launches(d: Device) -> Device:
    """An operator on one element, one after the other: what the host and the launch take together."""
    x = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(LAUNCHES // BATCH):
            x.add_(1.0)

    return replace(d, model=replace(d.model, launch_seconds=seconds(many) * BATCH / LAUNCHES))


def _exponentials(d: Device) -> Device:
    from .exps import BLOCK, exps

    programs = 32 * d.units
    out = torch.empty(programs * BLOCK, device="cuda")
    took = seconds(lambda: exps[(programs,)](out, EXPS))
    return replace(d, exps_per_unit_clock=out.numel() * EXPS / took / (d.units * d.clock_hz))


def _timed(d: Device, head: int, masked: bool) -> Timed:
    """Our kernel on one attention in bf16, under the mapping that the model likes best."""
    c, sizes = attention(masked), {"B": 1, "H": HEADS, "P": TOKENS, "M": TOKENS, "E": head, "F": head}
    best = best_mapping(c, d, sizes)
    if isinstance(best, Obstacle):
        raise ValueError(f"our kernel cannot be calibrated on {d.name}: {best.reason}")
    mapping = best[0]
    x = {n: torch.randn(1, HEADS, TOKENS, head, device="cuda", dtype=torch.bfloat16) for n in "QKV"}
    return Timed(c, mapping, sizes, seconds(ready(c, mapping, x, sizes)))


def attention(masked: bool) -> Cascade:
    """Softmax attention in bf16; masked: every second key of a row, so that no tile is full or empty."""
    b = Builder()
    q, k, v = (b.input(n, r, "bf16") for n, r in (("Q", "bhpe"), ("K", "bhme"), ("V", "bhmf")))
    s = ex.cast(b.put("QK", "bhpm", q * k, "add", "e"), "f32") * 0.125
    if masked:
        s = ex.where(ex.equal((ex.index("p") + ex.index("m")) % 2, 0), s, -3e38)
    w = b.put("A", "bhpm", ex.cast(softmax(b, b.put("S", "bhpm", s)), "bf16"))
    b.put("O", "bhpf", w * v, "add", "m")
    return b.cascade("checkerboard" if masked else "plain", "O")


def checked(d: Device) -> list[tuple[str, float, float]]:
    """Shapes that nothing was fitted to: (name, measured, predicted seconds) of our kernel there."""
    out = []
    for batch, heads, n, head, masked in ((2, 8, 3000, 128, False), (1, 24, 6144, 64, False), (4, 16, 1536, 128, True)):
        c, sizes = attention(masked), {"B": batch, "H": heads, "P": n, "M": n, "E": head, "F": head}
        best = best_mapping(c, d, sizes)
        assert not isinstance(best, Obstacle), best
        x = {t: torch.randn(batch, heads, n, head, device="cuda", dtype=torch.bfloat16) for t in "QKV"}
        took = seconds(ready(c, best[0], x, sizes))
        out.append((f"{c.name} {batch}×{heads}×{n}×{head}", took, best[1].seconds))
    return out
