"""The ablation: what each mechanism of the time model brings, as devices on which it is free.

    roofline → + tiles → + partial-tile cost → + exponentials → + makespan → + calibration

A rung is a device, and whether the mask is known. Nothing of the model is switched off in code: where exponentials are not
counted yet they take no time, where the makespan is not counted yet one unit has the rates of all.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..devices.device import Device, HostRates, TimeModel, alone

K = TypeVar("K", bound=Hashable)

# As good as free, and a rate that divides.
FREE = 1e-30


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: predict on `device`, with the mask or as if nothing were masked."""

    name: str
    device: Device
    masked: bool = True


def ladder(plain: Device, calibrated: Device) -> tuple[Rung, ...]:
    """The rungs for a device: `plain` as its data file has it, `calibrated` as it was measured (or the same).

    What calls take between other calls comes with the calibration.
    """
    step = _host_ladder if plain.host is not None else _gpu_ladder
    roof, partial, exps = step(plain)
    return (
        Rung("roofline", roof, masked=False),
        Rung("+ tiles", roof),
        Rung("+ partial-tile cost", partial),
        Rung("+ exponentials", exps),
        Rung("+ makespan", plain if plain.host is None else alone(plain)),
        Rung("+ calibration", calibrated),
    )


# --- GPUs -----------------------------------------------------------------------------------------------------------


def _gpu_ladder(d: Device) -> tuple[Device, Device, Device]:
    ideal = TimeModel(
        matrix_efficiency=1.0, vendor_matrix_efficiency=1.0, bandwidth_efficiency=1.0, overlap=1.0, vendor_overlap=1.0,
        partial_factor=1.0, launch_seconds=0.0, further_seconds=0.0, prologue_seconds=0.0, vendor_program_factor=0.0,
        load_latency_seconds=0.0,
    )
    roof = replace(_pooled(d), exps_per_unit_clock=1 / FREE, lanes_per_unit=round(1 / FREE), l2_bytes_per_s=0.0, model=ideal)
    partial = replace(roof, model=replace(ideal, partial_factor=d.model.partial_factor))
    exps = replace(
        partial, exps_per_unit_clock=_pooled(d).exps_per_unit_clock, lanes_per_unit=_pooled(d).lanes_per_unit,
        model=replace(partial.model, overlap=d.model.overlap, vendor_overlap=d.model.vendor_overlap),
    )
    return roof, partial, exps


def _pooled(d: Device) -> Device:
    """One unit with the rates of all, so that every launch is evenly loaded; shared memory bounds no product yet."""
    return replace(
        d, units=1, exps_per_unit_clock=d.exps_per_unit_clock * d.units, lanes_per_unit=d.lanes_per_unit * d.units,
        shared_bytes_per_unit_clock=0,
    )


# --- CPUs -----------------------------------------------------------------------------------------------------------


def _host_ladder(d: Device) -> tuple[Device, Device, Device]:
    d = alone(d)
    h = d.host
    assert h is not None
    gain = max(d.units, 1)
    flops = {t: r * gain for t, r in d.matrix_flops_per_s.items()}
    pooled = replace(d, units=1, matrix_flops_per_s=flops, dram_bytes_per_s=d.dram_bytes_per_s * gain)
    pair = {t: 2 / flops.get(t, flops["f32"]) for t in h.attention_pair_seconds}
    free: dict[str, Any] = {n: dict.fromkeys(getattr(h, n), 0.0) for n in (*MASKING, *EXPONENTIAL, "gemm_half_rows")}
    roof = replace(
        _calls_for_free(h), fault_bytes=math.inf, cache_bytes=math.inf, cache_bytes_per_s=math.inf,
        attention_pair_seconds={t: dict.fromkeys(by, (0.0, pair[t])) for t, by in h.attention_pair_seconds.items()},
        flex_pair_seconds={t: (0.0, pair.get(t, pair["f32"])) for t in h.flex_pair_seconds}, **free,
    )
    masking: dict[str, Any] = {n: _shared(getattr(h, n), gain) for n in MASKING}
    partial = replace(roof, **masking)
    exponential: dict[str, Any] = {n: _shared(getattr(h, n), gain) for n in EXPONENTIAL}
    exps = replace(
        partial, attention_pair_seconds={t: _pairs(by, gain) for t, by in h.attention_pair_seconds.items()},
        flex_pair_seconds=_pairs(h.flex_pair_seconds, gain), **exponential,
    )
    return replace(pooled, host=roof), replace(pooled, host=partial), replace(pooled, host=exps)


# Tables of seconds by type: what a mask costs, and what a softmax costs besides its products.
MASKING = ("element_seconds", "where_seconds", "attention_mask_seconds", "attention_far_mask_seconds", "flex_mask_seconds")
EXPONENTIAL = (
    "exp_seconds", "softmax_seconds", "attention_row_seconds", "attention_key_seconds", "attention_left_seconds",
    "flex_key_seconds", "flex_left_seconds", "flex_far_seconds",
)


def _calls_for_free(h: HostRates) -> HostRates:
    return replace(
        h, threads=1, operator_seconds=0.0, product_seconds=0.0, attention_seconds=0.0, mask_seconds=0.0,
        operator_call_seconds=0.0, flex_call_seconds=0.0, flex_blocks_seconds=0.0, flex_score_seconds=0.0,
        curve_seconds={}, gather_seconds=0.0, division_seconds=0.0, transpose_seconds=0.0, fused_gather_seconds=0.0,
        fused_division_seconds=0.0,
    )


def _shared(table: Mapping[str, float], gain: float) -> dict[str, float]:
    return {t: x / gain for t, x in table.items()}


def _pairs(table: Mapping[K, tuple[float, float]], gain: float) -> dict[K, tuple[float, float]]:
    return {k: (a / gain, b / gain) for k, (a, b) in table.items()}
