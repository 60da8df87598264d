"""Constants of the GPU's time model from timings of our own kernels: the ones under which the model's seconds fit best.

    overlap           from attentions without a mask, of several head sizes: matrix and exponentials in other proportions
    partial_factor    from the same with a mask that leaves every tile partial

Pure arithmetic: who times (codegen/measure/calibrate_gpu.py) and who fits do not know each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...patterns.cascade import Cascade
from ...patterns.mapping import TileMapping
from ..devices.device import Device
from ..time.cost import Cost
from ..time.predict import predict

OVERLAPS = tuple(i / 100 for i in range(101))
PARTIAL_FACTORS = tuple(1 + i / 100 for i in range(301))


@dataclass(frozen=True)
class Timed:
    """Our kernel for a cascade under a mapping, and what it took."""

    cascade: Cascade
    mapping: TileMapping
    sizes: Mapping[str, int]
    seconds: float


def fitted(d: Device, plain: Sequence[Timed], masked: Sequence[Timed]) -> Device:
    """The device with the overlap that fits unmasked kernels best, then the partial factor that fits masked ones.

    Raises ValueError where a kernel cannot run on the device.
    """
    d = _with(d, "overlap", OVERLAPS, plain)
    return _with(d, "partial_factor", PARTIAL_FACTORS, masked)


def _with(d: Device, name: str, values: Iterable[float], timed: Sequence[Timed]) -> Device:
    def at(value: float) -> Device:
        return replace(d, model=replace(d.model, **{name: value}))

    return at(least(lambda value: misfit(at(value), timed), values))


def least(f: Callable[[float], float], values: Iterable[float]) -> float:
    """The value with the smallest f; of equal ones the first."""
    return min(values, key=f)


def misfit(d: Device, timed: Sequence[Timed]) -> float:
    """Σ log²(predicted / measured): twice too high is as bad as twice too low."""
    return sum(math.log(_predicted(t, d) / t.seconds) ** 2 for t in timed)


def _predicted(t: Timed, d: Device) -> float:
    cost = predict(t.cascade, t.mapping, d, t.sizes)
    if not isinstance(cost, Cost):
        raise ValueError(f"{t.mapping} cannot run on {d.name}: {cost.reason}")
    return cost.seconds
