"""Fit: which mappings a device can hold, from the shared memory and registers of our own kernels.

    shared     = width · (tile_p·E + stages·(tile_m·E + tile_m·F))      Q stays, K and V are buffered `stages` times
    registers  = (scores + accumulator + weights) / threads + addresses

The code generator uses the same formulas, so that a mapping that does not fit is never emitted. E and F are the head
sizes as the kernel pads them, to the next power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..patterns.mapping import Mapping
from .device import Device

# Registers for addresses, bounds and the row state, read back from kernels compiled for sm_90.
FIXED_REGISTERS = 72
# Matrix fragments of gfx942 need about this much more, read back from kernels compiled for it.
HIP_REGISTERS = 1.75
SMALLEST_DOT = 16
# Sequences beyond this are cut into tiles of at least 64.
LONG = 2048


@dataclass(frozen=True)
class Footprint:
    """What one program takes: bytes of shared memory, registers of a thread, threads; programs that fit on a unit."""

    shared_bytes: int
    registers: int
    threads: int
    resident: int


def padded(n: int) -> int:
    """A head size as kernels see it: the next power of two, at least 16."""
    return max(SMALLEST_DOT, 1 << (max(n, 1) - 1).bit_length())


def shared_bytes(mapping: Mapping, e: int, f: int, width: int, device: Device | None = None) -> int:
    """Bytes of shared memory of one program; `e` and `f` are head sizes, `width` the bytes of an element."""
    e, f = padded(e), padded(f)
    # Triton on AMD keeps one stage in registers
    stages = max(1, mapping.stages - 1) if device is not None and device.kind == "hip" else max(1, mapping.stages)
    return width * (mapping.tile_p * e + stages * (mapping.tile_m * e + mapping.tile_m * f))


def registers(mapping: Mapping, e: int, f: int, width: int, device: Device) -> int:
    """Registers of a thread, a heuristic: scores and accumulator in fp32, weights in the type of V."""
    e, f = padded(e), padded(f)
    threads = mapping.warps * device.threads_per_warp
    tile = mapping.tile_p * mapping.tile_m
    words = tile + mapping.tile_p * f + tile * width // 4
    count = words / threads + FIXED_REGISTERS
    return round(count * HIP_REGISTERS if device.kind == "hip" else count)


def register_limit(mapping: Mapping, device: Device) -> int:
    """Registers that a thread may have: 255 on CUDA; on CDNA a SIMD's registers are shared by its waves."""
    if device.kind == "hip":
        return device.registers_per_thread // max(1, mapping.warps // 4)
    return device.registers_per_thread


def footprint(mapping: Mapping, e: int, f: int, width: int, device: Device) -> Footprint:
    shared = shared_bytes(mapping, e, f, width, device)
    regs = min(registers(mapping, e, f, width, device), register_limit(mapping, device))
    threads = mapping.warps * device.threads_per_warp
    resident = min(
        device.shared_bytes_per_unit // max(shared, 1),
        device.registers_per_unit // max(regs * threads, 1),
        device.threads_per_unit // threads,
    )
    return Footprint(shared, regs, threads, max(resident, 1))


def refuse(mapping: Mapping, e: int, f: int, width: int, device: Device) -> str | None:
    """Why this mapping does not fit the device, or None."""
    if not device.is_gpu:
        return None
    need = shared_bytes(mapping, e, f, width, device)
    if need > device.shared_bytes_per_block:
        return f"needs {need} bytes of shared memory, a block of {device.name} has {device.shared_bytes_per_block}"
    regs, limit = registers(mapping, e, f, width, device), register_limit(mapping, device)
    if regs > limit:
        return f"needs about {regs} registers a thread, {device.name} has {limit}"
    return None


def candidates(device: Device, *, e: int, f: int, width: int, queries: int, keys: int) -> tuple[Mapping, ...]:
    """Mappings worth predicting on this device, feasible ones only.

    Few queries get one short query tile and their keys split over programs. On long sequences small tiles only move more
    bytes, so they come where nothing larger fits the head. On a CPU `body` and tile sizes vary.
    """
    if device.kind == "cpu":
        return tuple(_on_cpu(queries))
    if queries <= SMALLEST_DOT:
        return tuple(m for m in _short(device, keys) if refuse(m, e, f, width, device) is None)
    for least in (64, 32, 16) if min(queries, keys) > LONG else (32, 16):
        found = tuple(m for m in _tall(device, queries, least) if refuse(m, e, f, width, device) is None)
        if found:
            return found
    return ()


def _on_cpu(queries: int) -> Iterator[Mapping]:
    # a plan of more than a few hundred query tiles costs more than it saves
    tiles = [t for t in (32, 64, 128, 256, 512) if queries // 128 <= t < 2 * queries] or [32 if queries < 512 else 512]
    for body in ("sdpa", "product"):
        for tile in tiles:
            # square tiles let the fused kernel's causal mode take over along the diagonal
            for tile_m in sorted({tile, tile // 2, min(tile, 128)}):
                if body == "sdpa" or tile_m == min(tile, 128):
                    yield Mapping(tile_p=tile, tile_m=tile_m, warps=1, stages=1, body=body)


def _stages(device: Device) -> tuple[int, ...]:
    return (1, 2) if device.kind == "hip" else (2, 3, 4)


def _short(device: Device, keys: int) -> Iterator[Mapping]:
    for tile_m in (32, 64, 128):
        for split in (1, 2, 4, 8, 16, 32):
            # a program should keep some key tiles to stream
            if split == 1 or keys >= 4 * split * tile_m:
                for s in _stages(device):
                    yield Mapping(SMALLEST_DOT, tile_m, warps=4, stages=s, split_m=split)


def _tall(device: Device, queries: int, least: int) -> Iterator[Mapping]:
    stages = sorted({1, *_stages(device)}) if least < 32 else _stages(device)
    for tile_p in (16, 32, 64, 128):
        if tile_p < least or (tile_p >= 2 * queries and tile_p > 32):
            continue
        for tile_m in (16, 32, 64, 128):
            for warps in (4, 8):
                if tile_m >= least:
                    yield from (Mapping(tile_p, tile_m, warps=warps, stages=s) for s in stages)
