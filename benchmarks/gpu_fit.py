"""Constants of GPUs and of vendors' kernels, fitted to measured rows: coordinate by coordinate, on the part `fit` alone.

    kernel.fa3.program_clocks       of a family, shared by the devices that run it
    device.h200.launch_seconds      of a device
    harness.h200.prompt_seconds     of the harness of its tables

The loss is the mean of |log(predicted / measured)| over the cells (device, table), so each cell weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpu_prices import Harness, Works
from gpu_rows import Row

from reattend.cost_model.devices.device import Device
from reattend.cost_model.devices.kernels import VendorFacts

# Steps of a search: shares that may be 0 move by themselves, all else by a factor.
SHARES = ("vendor_overlap", "power_share")
FIRST_STEP, SMALLEST = 0.25, 0.01
# What is physically allowed.
LIMITS: Mapping[str, tuple[float, float]] = {
    "vendor_overlap": (0.0, 1.0), "power_share": (0.0, 0.5), "vendor_matrix_efficiency": (0.4, 1.0),
    "bandwidth_efficiency": (0.6, 1.0), "exp_share": (0.5, 1.0), "ramp_seconds": (1e-8, 2e-5),
    "launch_seconds": (1e-6, 2e-5), "further_seconds": (1e-7, 2e-5), "block_seconds": (1e-7, 2e-5),
    "write_factor": (1.0, 8.0), "sequence_seconds": (1e-10, 1e-7),
}
SCHEDULED = 600
Constants = dict[str, float]


@dataclass
class Cell:
    """The rows of one table of one device."""

    device: Device
    facts: VendorFacts
    rows: tuple[Row, ...]
    works: Works

    @staticmethod
    def of(device: Device, facts: VendorFacts, rows: Sequence[Row]) -> Cell:
        return Cell(device, facts, tuple(rows), Works.of(tuple(rows), device, facts))

    def reads(self, name: str) -> bool:
        kind, whose, _ = name.split(".")
        return whose == (self.facts.name if kind == "kernel" else self.device.name)

    def bound(self, c: Constants) -> tuple[Device, VendorFacts, Harness]:
        """The device, the kernel and the harness with these constants."""
        d, k = self.device.name, self.facts.name
        return (
            replace(self.device, model=replace(self.device.model, **_of(c, f"device.{d}."))),
            replace(self.facts, **_of(c, f"kernel.{k}.")), Harness(**_of(c, f"harness.{d}.")),
        )

    def loss(self, c: Constants, scheduled: int = SCHEDULED) -> float:
        found = self.works.seconds(*self.bound(c), scheduled)
        return sum(abs(math.log(s / r.seconds)) for s, r in zip(found, self.rows)) / len(self.rows)


def _of(c: Constants, prefix: str) -> Constants:
    return {name.removeprefix(prefix): value for name, value in c.items() if name.startswith(prefix)}


def fit(cells: Sequence[Cell], start: Constants, free: Iterable[str], rounds: int = 4) -> Constants:
    """Constants with the least loss that a search along each coordinate finds."""
    now, steps = dict(start), dict.fromkeys(free, FIRST_STEP)
    losses = [c.loss(now) for c in cells]
    for _ in range(rounds):
        for name in steps:
            moved = False
            for sign in (1, -1):
                while True:
                    tried = {**now, name: _stepped(name, now[name], sign * steps[name])}
                    if tried[name] == now[name]:
                        break
                    new = [c.loss(tried) if c.reads(name) else old for c, old in zip(cells, losses)]
                    if sum(new) >= sum(losses) - 1e-6:
                        break
                    now, losses, moved = tried, new, True
                if moved:
                    break
            if not moved:
                steps[name] = max(steps[name] / 2.5, SMALLEST)
    return now


def _stepped(name: str, value: float, by: float) -> float:
    short = name.rsplit(".", 1)[1]
    low, high = LIMITS.get(short, (0.0, math.inf))
    return min(high, max(low, value + by if short in SHARES else value * math.exp(by)))
