"""A device none of whose rows, and none of whose family's, were seen: its data sheet, and other families' constants.

What a kernel is by its public code (tiles, order, the rule of the split) stays; what was fitted (clocks, rates, launches,
the harness) is replaced by the geometric mean over the other families, each with one voice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace

from gpu_prices import Harness, harnesses

from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.devices.kernels import VendorFacts, vendor_kernels

# Devices whose kernels are of one family, and the kernels that serve a cache and a bare call there.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "fa2": ("a100", "l40s", "rtxpro6000"), "fa3": ("h100", "h200"), "trtllm": ("b200", "b300", "gb200", "gb300"),
}
CACHED: Mapping[str, str] = {"fa2": "fa2_paged", "fa3": "fa3", "trtllm": "trtllm"}
BARE: Mapping[str, str] = {"fa2": "fa2", "fa3": "fa3", "trtllm": "fa4"}
DEVICE = (
    "launch_seconds", "further_seconds", "vendor_matrix_efficiency", "vendor_overlap", "ramp_seconds", "power_share",
    "bandwidth_efficiency",
)
KERNEL = ("program_clocks", "few_clocks", "draw_bytes_per_clock", "part_clocks", "exp_share")
# The band of a device that is known by its data sheet alone.
BAND = 0.4
# Shares are averaged as they are: they may be 0.
SHARES = ("power_share", "vendor_overlap")


def family(device: str) -> str:
    return next(f for f, names in FAMILIES.items() if device in names)


def unseen(device: str, bare: bool) -> tuple[Device, VendorFacts, Harness]:
    """The device, its kernel and its tables' harness as they would be believed without a row of its family."""
    others = [f for f in FAMILIES if f != family(device)]
    kernels = BARE if bare else CACHED
    d, facts = shipped(device), vendor_kernels()[kernels[family(device)]]
    by_device = {f: [shipped(x) for x in FAMILIES[f]] for f in others}

    def model(name: str) -> float:
        return _mean(name, [_mean(name, [getattr(x.model, name) for x in by_device[f]]) for f in others])

    def beside(name: str) -> float:
        return _mean(name, [_mean(name, [getattr(harnesses()[x], name) for x in FAMILIES[f]]) for f in others])

    seen = [vendor_kernels()[kernels[f]] for f in others]
    return (
        replace(d, model=replace(d.model, **_each(DEVICE, model))),
        replace(facts, **_each(KERNEL, lambda n: _mean(n, [getattr(k, n) for k in seen]))),
        Harness(**_each([f.name for f in fields(Harness)], beside)),
    )


def _each(names: Iterable[str], value: Callable[[str], float]) -> dict[str, float]:
    return {n: value(n) for n in names}


def _mean(name: str, values: Sequence[float]) -> float:
    if name in SHARES:
        return statistics.fmean(values)
    return math.exp(statistics.fmean(math.log(max(v, 1e-12)) for v in values))
