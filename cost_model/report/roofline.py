"""Rooflines: what a device could do at most, by the FLOP that a byte takes.

    roof(x) = min(peak, x · bandwidth)          x: FLOP a byte over the memory's edge
On a CPU the last cache may bring operands faster than the memory does: its line is the roof, the memory's lies below.
Source: Williams, Waterman, Patterson, "Roofline" (CACM 2009); Ilic, Pratas, Sousa, "Cache-aware Roofline" (CAL 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..devices.device import Device, HostRates


@dataclass(frozen=True)
class Roof:
    """`flops_per_s` of the products' type; `bytes_per_s` of the fastest level that counts bytes, `dram_bytes_per_s`."""

    flops_per_s: float
    bytes_per_s: float
    dram_bytes_per_s: float

    def at(self, intensity: float) -> float:
        """FLOP a second at so many FLOP a byte."""
        return min(self.flops_per_s, intensity * self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """FLOP a byte from which the products bound."""
        return self.flops_per_s / self.bytes_per_s if self.bytes_per_s else float("inf")


def roof(d: Device, dtype: str) -> Roof:
    """The roof for products of a type, in the names of device files ("bf16")."""
    if d.host is None:
        return Roof(d.matrix_rate(dtype), d.dram_bytes_per_s, d.dram_bytes_per_s)
    dram = d.dram_bytes_per_s * _gain(d, d.host, "memory")
    cache = d.host.cache_bytes_per_s * _gain(d, d.host, "element")
    # the fused kernels have products of their own, at rates of their own
    fused = d.host.attention_pair_seconds.get(dtype) or d.host.attention_pair_seconds["f32"]
    flex = d.host.flex_pair_seconds.get(dtype) or d.host.flex_pair_seconds["f32"]
    peak = max(
        d.matrix_rate(dtype) * _gain(d, d.host, "product"),
        2 / min(each for _, each in fused.values()) * _gain(d, d.host, "attention"),
        2 / flex[1] * _gain(d, d.host, "flex"),
    )
    return Roof(peak, max(dram, cache), dram)


def _gain(d: Device, h: HostRates, kind: str) -> float:
    return h.scaling.get(kind, 1.0) if d.units > 1 else 1.0
