"""Mappings of our kernels compared on a GPU: the time of every one of them at once, a column over mappings.

The same law as gpu.py's, term by term, where no queue of programs is run job by job. What follows of mappings and head sizes
alone is derived once, what follows of a tile's size once for all mappings that have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...patterns.mapping import TileMapping
from ..columns import Numbers
from ..count.subject import Shape
from ..count.tiles import Jobs
from ..count.work import Streamed
from ..devices.device import Device
from ..operations import Work
from . import gpu
from .fit import Footprint, as_compiled, candidates, footprint

# A full tile, a partial one, and the rest of a program.
Works = tuple[Work, Work, Work]


@dataclass(frozen=True)
class LaidOut:
    """What a mapping's program takes, bytes that a tile's products read from shared memory, tiles in flight, what was
    compiled for the lanes."""

    fit: Footprint
    operand_bytes: int
    stages: int
    issued: int


@lru_cache(maxsize=8192)
def laid_out(mapping: TileMapping, e: int, f: int, width: int, device: Device) -> LaidOut:
    """A program of our kernel on a GPU, with these head sizes and bytes of an element."""
    instruction = device.architecture.instruction_rows
    read = gpu.operand_bytes(mapping.tile_p, mapping.tile_m, e, f, width, instruction)
    known = as_compiled(mapping, e, f, width, device)
    # where operands pass through registers, copies start where a turn ends: the first tile ahead covers nothing
    late = device.kind == "cuda" and not instruction
    issued = known.others * mapping.warps if known else 0
    return LaidOut(footprint(mapping, e, f, width, device), read, max(1, mapping.stages - late), issued)


@dataclass(frozen=True, eq=False)
class Fitting:
    """The mappings that fit, as columns; `tiles` are their distinct tiles, `which` says which each has."""

    mappings: tuple[TileMapping, ...]
    device: Device
    programs: tuple[LaidOut, ...]
    tiles: tuple[tuple[int, int], ...]
    which: tuple[int, ...]
    resident: Numbers
    split: Numbers
    heavy_first: np.ndarray[tuple[int], np.dtype[np.bool_]]


@lru_cache(maxsize=1024)
def fitting(device: Device, e: int, f: int, width: int, queries: int, keys: int) -> Fitting | None:
    """The mappings worth predicting; None where none fits. Sizes as fit.py's `candidates` has them."""
    found = candidates(device, e=e, f=f, width=width, queries=queries, keys=keys)
    if not found:
        return None
    each = tuple(laid_out(m, e, f, width, device) for m in found)
    tiles = tuple(dict.fromkeys((m.tile_p, m.tile_m) for m in found))
    return Fitting(
        found, device, each, tiles, tuple(tiles.index((m.tile_p, m.tile_m)) for m in found),
        np.array([float(x.fit.resident) for x in each]), np.array([float(m.split_m) for m in found]),
        np.array([m.heavy_first for m in found]),
    )


@lru_cache(maxsize=1024)
def _tiles(x: Fitting, works: tuple[Works, ...], pace: gpu.Pace) -> tuple[Numbers, Numbers, Numbers]:
    """Seconds of one unit for a full tile, a partial one and a program beside its tiles, of every mapping."""
    made = [
        gpu.tile_seconds(*works[t], p.operand_bytes, p.issued, p.stages - 1 + p.fit.resident - 1, x.device, pace)
        for p, t in zip(x.programs, x.which)
    ]
    full, partial, rest = zip(*((t.full_seconds, t.partial_seconds, t.rest_seconds) for t in made))
    return np.array(full), np.array(partial), np.array(rest)


def rough_seconds(
    x: Fitting, work: Sequence[tuple[Streamed, Jobs, int]], at: Shape, launches: int, pace: gpu.Pace
) -> Numbers:
    """Seconds of every mapping; `work` of each distinct tile: what it takes, the programs, bytes that they read."""
    d, m, which = x.device, x.device.model, np.array(x.which)
    whole, some, rest = _tiles(x, tuple((w.full, w.partial, w.program) for w, _, _ in work), pace)
    rows = [
        (j.full.size, j.full.shape[0], j.repeat, *j.sums, moved, w.bytes[1], w.bytes[2]) for w, j, moved in work
    ]
    size, entries, repeat, n_full, n_partial, read, unique, written = np.array(rows, np.float64).T[:, which]
    programs, slots = size * (repeat * x.split), d.units * x.resident
    sharing = np.maximum(1, np.minimum(x.resident, np.ceil(programs / d.units)))
    waits = pace.tile_seconds / sharing
    full = np.maximum(whole, waits)
    partial = np.maximum(np.maximum(some, full * pace.partial_factor), waits)
    beneath, each = pace.program_seconds + rest * sharing, sharing / x.split
    full, partial = full * each, partial * each
    least, most = (beneath + n for n in _extremes([j for _, j, _ in work], which, full, partial))
    even = (size * beneath + n_full * full + n_partial * partial) * (repeat * x.split) / slots
    queue = np.maximum(even + np.where(x.heavy_first, least, most) / 2, most)
    span = np.where(programs <= slots, most, np.where(least == most, np.ceil(programs / slots) * most, queue))
    kernel = span * (1 + m.power_share * span / (span + m.power_seconds))
    moved = _dram_bytes(d, slots, np.maximum(1, entries * repeat), programs, read, unique, written)
    rate = m.bandwidth_efficiency
    memory = moved / (rate * d.dram_bytes_per_s)
    if d.l2_bytes:
        memory = memory + m.ramp_seconds * np.minimum(1.0, moved / d.l2_bytes)
    l2 = np.zeros_like(memory)
    if d.l2_bytes_per_s:
        port = gpu.UNIT_PORT * d.clock_hz * d.model.bandwidth_efficiency
        l2 = np.maximum(read / d.l2_bytes_per_s, read / (np.minimum(programs, d.units) * port))
    launch = launches * m.launch_seconds + (x.split > 1) * m.further_seconds + pace.part_seconds * (x.split - 1)
    merge = np.where(x.split > 1, 8 * x.split * at.batch * at.queries * (at.value + 2), 0.0) / (rate * d.dram_bytes_per_s)
    return np.asarray(np.maximum(np.maximum(kernel, memory), l2) + merge + launch)


def _extremes(
    jobs: Sequence[Jobs], which: np.ndarray[tuple[int], np.dtype[np.int64]], full: Numbers, partial: Numbers
) -> tuple[Numbers, Numbers]:
    """The least and the most that a program takes under every mapping."""
    least, most = (_padded([getattr(j, name) for j in jobs]) for name in ("outer_least", "outer_most"))
    return (
        (least[0][:, which] * full + least[1][:, which] * partial).min(0),
        (most[0][:, which] * full + most[1][:, which] * partial).max(0),
    )


def _padded(pairs: Sequence[Sequence[tuple[float, float]]]) -> tuple[Numbers, Numbers]:
    """Pairs of every tile as [pairs, tiles], the last one again where there are fewer."""
    n = max(map(len, pairs))
    made = np.array([[*some, *[some[-1]] * (n - len(some))] for some in pairs], np.float64)
    return made[:, :, 0].T, made[:, :, 1].T


def _dram_bytes(
    d: Device, slots: Numbers, entries: Numbers, programs: Numbers, read: Numbers, unique: Numbers, written: Numbers
) -> Numbers:
    """As gpu.py has it: operands come once while the last cache holds those of the programs in flight."""
    flying = np.minimum(entries, slots * entries / programs + 1) / entries
    again = np.maximum(unique, unique * flying * np.ceil(programs / slots))
    return np.where(unique * flying <= d.l2_bytes, unique + written, np.minimum(read, again) + written)
