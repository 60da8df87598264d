"""Fit: which mappings a device can hold, from the shared memory and registers of our own kernels.

    shared     = queries + buffers · (keys + values) [+ weights, where their layout changes on the way]
    registers  = (scores + accumulator + weights) / threads + addresses, fitted to kernels compiled ahead of time

The shared memory is what Triton's compiler lays out, byte for byte. Registers and spills are read from the table of compiled
kernels; where it has none, a heuristic refuses tiles that spill more than a few bytes. Head sizes are cut and padded as the
kernel does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ...patterns.mapping import TileMapping
from ..count.subject import SHARED_ROWS
from ..devices.architecture import Architecture, architecture
from ..devices.compiled import Compiled, compiled
from ..devices.device import Device
from .cpu_tiles import GATHERED_ROWS

# Registers for addresses, bounds and the row state: with operands in shared memory, and with operands in registers.
FIXED_REGISTERS, FIXED_REGISTERS_OLDER = 72, 100
# Estimates in fp32 from which on what was compiled spilled.
MOST_REGISTERS_F32 = 190
SMALLEST_DOT = 16
# Sequences beyond this are cut into tiles of at least 64.
LONG = 2048
# Parts of split keys.
MOST_SPLITS = 64


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


def chunked(n: int) -> int:
    """A contracted head size, cut in two powers of two where they are smaller than one: 80 → 64 + 16, 112 → 128."""
    whole = padded(n)
    first = whole // 2
    if n < SMALLEST_DOT or n == whole:
        return whole
    return min(whole, first + padded(n - first))


def shared_bytes(mapping: TileMapping, e: int, f: int, width: int, device: Device) -> int:
    """Bytes of shared memory of one program; `e` and `f` are head sizes, `width` the bytes of an element."""
    rows, keys = width * mapping.tile_p, width * mapping.tile_m
    cut = chunked(e) != padded(e)
    tiles = SharedTiles(rows * chunked(e), keys * chunked(e), keys * padded(f), width, padded(f), width == 4, cut)
    return tiles.laid_out(mapping, device.architecture)


@dataclass(frozen=True)
class SharedTiles:
    """Bytes of one tile of queries, of keys and of values, and of a weight; `value_width` as it is padded.

    `plain`: some operand is fp32, which no tensor core reads; `cut`: a head's product is made in pieces.
    """

    query: int
    key: int
    value: int
    weight: int
    value_width: int
    plain: bool
    cut: bool

    def laid_out(self, mapping: TileMapping, arch: Architecture) -> int:
        """query tile + buffers · (key tile + value tile) [+ weights], as Triton's compiler lays them out.

        Where the tensor cores read shared memory, `stages` tiles are in flight (of keys one less where they accumulate in
        tensor memory and the head is cut: the second piece waits for the first); elsewhere they pass through registers, one
        buffer less is enough, and weights change their layout in shared memory when a tile has fewer rows than values have
        columns. AMD keeps the query tile in registers.
        """
        rows, stages, tile = mapping.tile_p, mapping.stages, self.key + self.value
        weights = self.weight * rows * mapping.tile_m
        if arch.kind == "hip":
            relaid = self.plain or rows < 32 * mapping.warps
            return max(1, stages - 1) * tile + relaid * weights
        if stages == 1:
            return self.query + max(self.key, self.value)
        if arch.instruction_rows and rows >= 64 and not self.plain:
            late = arch.tensor_memory and self.cut
            return self.query + stages * tile - late * self.key
        relaid = self.plain or rows < self.value_width
        return self.query + (stages - 1) * tile + relaid * weights


def registers(mapping: TileMapping, e: int, f: int, width: int, device: Device) -> int:
    """Registers of a thread, fitted to kernels compiled for sm_80, sm_90 and gfx942 with head sizes 64 and 128."""
    e, f = padded(e), padded(f)
    threads = mapping.warps * device.threads_per_warp
    rows, keys = mapping.tile_p, mapping.tile_m
    if device.kind == "hip":
        # each wave holds all keys of its rows
        return round(30 + 2.2 * keys * (1 + max(0, f - 64) / 256) + 0.6 * f + max(0, rows - 64) * f / 256)
    if width == 4:
        # products in fp32 run on the vector lanes, with their operands in registers: more of a large head at a time
        wide = min(max(e / 64, 1.0), 2.0) if rows > SMALLEST_DOT else 1.0
        return round(30 + 3 * wide * (2 * rows * keys + rows * f + keys * e / 2) / threads)
    words = (rows * keys * (1 + width / 4) + rows * f) / threads
    return round(words + (FIXED_REGISTERS if device.architecture.instruction_rows else FIXED_REGISTERS_OLDER))


def as_compiled(mapping: TileMapping, e: int, f: int, width: int, device: Device) -> Compiled | None:
    """What the kernel of these head sizes took when it was compiled; None where it was not."""
    return _row(device.arch, width, e, f, (mapping.tile_p, mapping.tile_m, mapping.warps))


@lru_cache(maxsize=4096)
def _row(arch: str, width: int, e: int, f: int, tile: tuple[int, int, int]) -> Compiled | None:
    if padded(e) != padded(f):
        return None
    return compiled(architecture(arch).compiled_as, width, padded(e), tile)


def register_limit(mapping: TileMapping, device: Device) -> int:
    """Registers that a thread may have: 255 on CUDA; on CDNA a SIMD's registers are shared by its waves."""
    if device.kind == "hip":
        return device.registers_per_thread // max(1, mapping.warps // 4)
    return device.registers_per_thread


def footprint(mapping: TileMapping, e: int, f: int, width: int, device: Device) -> Footprint:
    shared = shared_bytes(mapping, e, f, width, device)
    found = as_compiled(mapping, e, f, width, device)
    regs = found.registers if found else min(registers(mapping, e, f, width, device), register_limit(mapping, device))
    threads = mapping.warps * device.threads_per_warp
    resident = min(
        device.shared_bytes_per_unit // max(shared, 1),
        device.registers_per_unit // max(regs * threads, 1),
        device.threads_per_unit // threads,
    )
    return Footprint(shared, regs, threads, max(resident, 1))


def refuse(mapping: TileMapping, e: int, f: int, width: int, device: Device) -> str | None:
    """Why this mapping does not fit the device, or None."""
    if not device.is_gpu:
        return None
    need = shared_bytes(mapping, e, f, width, device)
    if need > device.shared_bytes_per_block:
        return f"needs {need} bytes of shared memory, a block of {device.name} has {device.shared_bytes_per_block}"
    found = as_compiled(mapping, e, f, width, device)
    if found is not None:
        return f"spills {found.spill_bytes} bytes of each thread" if found.spill_bytes else None
    regs, limit = registers(mapping, e, f, width, device), register_limit(mapping, device)
    if width == 4 and device.kind == "cuda":
        limit = min(limit, MOST_REGISTERS_F32)
    if regs > limit:
        spare = "" if limit == register_limit(mapping, device) else " to spare in fp32"
        return f"needs about {regs} registers a thread, {device.name} has {limit}{spare}"
    return None


def candidates(device: Device, *, e: int, f: int, width: int, queries: int, keys: int) -> tuple[TileMapping, ...]:
    """Mappings worth predicting on this device, feasible ones only.

    Few queries get one short query tile and their keys split over programs. On long sequences small tiles only move more
    bytes, so they come where nothing larger fits the head. On a CPU `body` and tile sizes vary.
    """
    if device.kind == "cpu":
        return tuple(_on_cpu(queries, keys))
    return _on_gpu(device, e, f, width, *limited(queries, keys))


def limited(queries: int, keys: int) -> tuple[int, int]:
    """Queries and keys as far as they decide which mappings are worth predicting on a GPU."""
    return min(queries, LONG + 1), min(keys, max(LONG + 1, 4 * MOST_SPLITS * 128))


@lru_cache(maxsize=1024)
def _on_gpu(device: Device, e: int, f: int, width: int, queries: int, keys: int) -> tuple[TileMapping, ...]:
    if queries <= SHARED_ROWS:
        short = (m for m in _short(device, padded(queries), keys) if refuse(m, e, f, width, device) is None)
        if found := tuple(short):
            return found
    for least in (64, 32, 16) if min(queries, keys) > LONG else (32, 16):
        found = tuple(m for m in _tall(device, queries, least) if refuse(m, e, f, width, device) is None)
        if found:
            return found
    return ()


# Tiles of a class map that is made in a fraction of the kernel's time.
CLASSES = 1 << 18


def _on_cpu(queries: int, keys: int) -> Iterator[TileMapping]:
    # a plan of more than a few hundred query tiles costs more than it saves
    tiles = [t for t in (32, 64, 128, 256, 512) if queries // 128 <= t < 2 * queries] or [32 if queries < 512 else 512]
    if queries >= SMALLEST_DOT:
        # small tiles keep a block's scores near the core, and follow the mask closely
        tile = next((t for t in (32, 64) if queries * keys <= CLASSES * t * t), 128)
        yield TileMapping(tile_p=tile, tile_m=tile, warps=1, stages=1, body="fused")
    if queries <= SHARED_ROWS:
        yield TileMapping(tile_p=SMALLEST_DOT, tile_m=64, warps=1, stages=1, body="decode")
    yield TileMapping(tile_p=min(GATHERED_ROWS, queries), tile_m=64, warps=1, stages=1, body="selected")
    for body in ("sdpa", "slices", "product"):
        for tile in tiles:
            # narrower key tiles cut a slice closer to its mask
            for tile_m in sorted({tile, tile // 2, min(tile, 128)}):
                if body != "product" or tile_m == min(tile, 128):
                    yield TileMapping(tile_p=tile, tile_m=tile_m, warps=1, stages=1, body=body)


def _stages(device: Device) -> tuple[int, ...]:
    return (1, 2) if device.kind == "hip" else (2, 3, 4)


def _short(device: Device, rows: int, keys: int) -> Iterator[TileMapping]:
    """All rows in one tile, or in two where one needs too much room."""
    for tile_p, tile_m in product(sorted({rows, max(SMALLEST_DOT, rows // 2)}), (16, 32, 64, 128)):
        if tile_m == 16 and rows < SHARED_ROWS:
            continue
        for split in (1, 2, 4, 8, 16, 32, MOST_SPLITS):
            # a program should keep some key tiles to stream
            if split == 1 or keys >= 4 * split * tile_m:
                for s in _stages(device):
                    yield TileMapping(tile_p, tile_m, warps=4, stages=s, split_m=split)


def _tall(device: Device, queries: int, least: int) -> Iterator[TileMapping]:
    stages = sorted({1, *_stages(device)}) if least < 32 else _stages(device)
    for tile_p in (16, 32, 64, 128):
        if tile_p < least or (tile_p >= 2 * queries and tile_p > 32):
            continue
        for tile_m in (16, 32, 64, 128):
            for warps in (4, 8):
                if tile_m >= least:
                    yield from (TileMapping(tile_p, tile_m, warps=warps, stages=s) for s in stages)
