"""The time model of a GPU: tiles on units, then memory, then the launch.

    tile      = (1 − ω)·Σ_r c_r + ω·max_r c_r        r ∈ matrix, exp, vector          partial tiles × partial_factor
    matrix    = max(FLOP / rate, operands / shared memory's rate): a product reads shared memory while it runs
    program   = seconds of its own + Σ tiles;   kernel = makespan(programs, units · resident), slower on long calls
    memory    = bytes / (η·bandwidth) + ramp; bytes that the last cache holds come at its rate
    seconds   = max(kernel, memory, L2 bytes / L2 bandwidth, L2 bytes / (busy units · port)) + launch + further kernels

One model for our kernels and for vendors': a Pace says how a kernel keeps the device busy.
Source: the FlashAttention-3 and -4 papers (resources per tile), NATTEN's profiles (partial tiles).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ...patterns.mapping import TileMapping
from ...patterns.operators import OPERATORS
from ..count.schedule import longest_queue
from ..count.tiles import SCHEDULED, Jobs, makespan, order
from ..count.work import Streamed
from ..devices.device import Device
from ..operations import DIVISIONS, EXPONENTIALS, ROOTS, Work, size_int
from .cost import Cost, bound_of
from .fit import Footprint

# What one unit can draw from the second-level cache, bytes a clock: its port, on NVIDIA since Volta and on CDNA. Sources:
# Jia et al., "Dissecting the NVIDIA Volta GPU" (1804.06826), section 3; AMD's CDNA 3 white paper.
UNIT_PORT = 64
# Issue slots of a lane: the table's, and conversions, which run at half a slot beside others.
SLOTS: Mapping[str, float] = {**{o.name: o.effort.slots for o in OPERATORS.values()}, "cast": 0.5}


@dataclass(frozen=True)
class KernelWork:
    """What a kernel's time follows from, whoever wrote it."""

    full_tile: Work
    partial_tile: Work
    program: Work
    jobs: Jobs
    moved_bytes: int
    unique_bytes: int
    written_bytes: int
    resident: int
    split: int = 1
    stages: int = 2
    heavy_first: bool = True
    launches: int = 1
    # kernels of the same call beside the first, but for the merge of split keys
    further: int = 0
    merge_bytes: int = 0
    operand_bytes: int = 0
    # of keys and values: what leaves the last cache between the heads of a group
    again_bytes: int = 0
    # of keys and values: what a tile of few rows waits for
    tile_bytes: int = 0
    # of a full tile, by all warps: what was compiled to go to the lanes (0: not known)
    issued: int = 0

    @property
    def programs(self) -> int:
        """Programs of the launch, before their keys are split."""
        return self.jobs.full.size * self.jobs.repeat

    @property
    def flops(self) -> int:
        """FLOP that the programs do, whole tiles each: what the units are timed with."""
        return self._done(lambda w: size_int(w.flops))

    @property
    def exps(self) -> int:
        """Exponential-class calls of the programs."""
        return self._done(lambda w: size_int(w.exps))

    def _done(self, of: Callable[[Work], int]) -> int:
        full, partial = self.jobs.sums
        tiles = full * of(self.full_tile) + partial * of(self.partial_tile)
        return round(tiles * self.jobs.repeat) + of(self.program) * self.programs


@dataclass(frozen=True)
class Pace:
    """How a kernel keeps a device busy: shares of its rates, and seconds that a program takes before its first tile.

    `exp_share` of its exponentials go to the special-function units, the others to the lanes; a tile takes `tile_seconds`
    at least, however little there is to compute. To merge split keys takes `part_seconds` for each part.
    """

    matrix_efficiency: float
    overlap: float
    partial_factor: float
    program_seconds: float
    exp_share: float = 1.0
    tile_seconds: float = 0.0
    part_seconds: float = 0.0


def own_pace(d: Device) -> Pace:
    """The pace of our own kernels."""
    m = d.model
    return Pace(m.matrix_efficiency, m.overlap, m.partial_factor, m.prologue_seconds)


def operand_bytes(rows: int, keys: int, e: int, f: int, width: int, instruction: int) -> int:
    """Bytes that the products of one tile read from shared memory, where they read it themselves; else 0.

    An `instruction` has so many rows (0: its operands pass through registers) and reads all keys and values again; the
    weights stay in registers or tensor memory. Source: the FlashAttention-4 paper, 3·M·N·d / 8192 cycles for its tiles.
    """
    if instruction == 0 or rows < 64 or width == 4:
        return 0
    return width * (rows * e + -(-rows // instruction) * keys * (e + f))


def resources(w: Work, d: Device, operands: int = 0, efficiency: float | None = None) -> dict[str, float]:
    """Seconds of one unit by resource; `operands` are bytes that products read from shared memory.

    Products reach `efficiency` of the peak; the device's own where none is given.
    """
    reached = d.model.matrix_efficiency if efficiency is None else efficiency
    matrix = sum(size_int(n) / (d.matrix_rate(t) * reached / d.units) for t, n in w.matrix.items())
    special = size_int(w.exps) + size_int(w.divisions) + sum(size_int(w.ops.get(r, 0)) for r in ROOTS)
    lanes = sum(SLOTS.get(op, 1.0) * size_int(n) for op, n in w.ops.items() if op not in (*EXPONENTIALS, *DIVISIONS))
    reading = operands / (d.shared_bytes_per_unit_clock * d.clock_hz) if d.shared_bytes_per_unit_clock else 0.0
    return {
        "matrix": max(matrix, reading),
        "exp": special / (d.exps_per_unit_clock * d.clock_hz),
        "vector": lanes / (d.lanes_per_unit * d.clock_hz),
    }


def overlapped(parts: Mapping[str, float], overlap: float) -> float:
    return (1 - overlap) * sum(parts.values()) + overlap * max(parts.values(), default=0.0)


@dataclass(frozen=True, eq=False)
class TileSeconds:
    """Seconds of one unit: by resource and in all, of a full tile, of a partial one and of a program beside its tiles."""

    full: Mapping[str, float]
    partial: Mapping[str, float]
    rest: Mapping[str, float]
    full_seconds: float
    partial_seconds: float
    rest_seconds: float


@lru_cache(maxsize=8192)
def tile_seconds(
    full: Work, partial: Work, program: Work, operands: int, issued: int, depth: int, d: Device, pace: Pace
) -> TileSeconds:
    """What tiles take whatever the sizes around them; `depth`: tiles ahead and programs beside, that cover a load."""
    parts = [resources(w, d, operands, pace.matrix_efficiency) for w in (full, partial)]
    whole, some = (_spread(_issued(x, issued, d), pace) for x in parts)
    rest = resources(program, d, 0, pace.matrix_efficiency)
    exposed = _exposed(depth, d, whole)
    return TileSeconds(
        whole, some, rest, overlapped(whole, pace.overlap) + exposed, overlapped(some, pace.overlap),
        overlapped(rest, pace.overlap),
    )


@dataclass(frozen=True, eq=False)
class _Times:
    """Seconds of a call: of the units until the last program ends, of the memory, of the second-level cache, beside them."""

    tiles: TileSeconds
    kernel: float
    memory: float
    l2: float
    launch: float
    merge: float

    @property
    def busy(self) -> float:
        return max(self.kernel, self.memory, self.l2)

    @property
    def seconds(self) -> float:
        return self.busy + self.merge + self.launch


def _times(k: KernelWork, d: Device, pace: Pace, scheduled: int, beside: float | None) -> _Times:
    depth = k.stages - 1 + k.resident - 1
    t = tile_seconds(k.full_tile, k.partial_tile, k.program, k.operand_bytes, k.issued, depth, d, pace)
    repeat = k.jobs.repeat * k.split
    programs = k.jobs.full.size * repeat
    # programs that share a unit share its rates, and wait side by side
    sharing = max(1, min(k.resident, -(-programs // d.units)))
    waits = pace.tile_seconds / sharing
    full = max(t.full_seconds, waits)
    partial = max(t.partial_seconds, full * pace.partial_factor, waits)
    beneath = pace.program_seconds + t.rest_seconds * sharing
    each = sharing / k.split
    kernel = _under_power(_span(k, full * each, partial * each, beneath, repeat, d.units * k.resident, scheduled), d)
    moved = _dram_bytes(k, d, programs)
    cached = 0.0 if beside is None else moved * held(moved + beside, d)
    m = d.model
    rate = m.bandwidth_efficiency
    memory = (moved - cached) / (rate * d.dram_bytes_per_s) + (cached / (rate * d.l2_bytes_per_s) if cached else 0.0)
    memory += m.ramp_seconds * min(1.0, (moved - cached) / d.l2_bytes) if d.l2_bytes else 0.0
    l2 = max(k.moved_bytes / d.l2_bytes_per_s, _drawn(k, d, programs)) if d.l2_bytes_per_s else 0.0
    launch = k.launches * m.launch_seconds
    launch += (k.further + (k.split > 1)) * m.further_seconds + pace.part_seconds * (k.split - 1)
    return _Times(t, kernel, memory, l2, launch, k.merge_bytes / (rate * d.dram_bytes_per_s))


def _span(k: KernelWork, full: float, partial: float, beneath: float, repeat: int, slots: int, scheduled: int) -> float:
    """The makespan of programs that take `beneath`, and so long a full and a partial tile."""
    jobs = k.jobs
    n = jobs.full.size * repeat
    least, most = (beneath + x for x in jobs.extremes(full, partial)) if n else (0.0, 0.0)
    if n <= slots:
        return most
    if least == most:
        return -(-n // slots) * most
    if n > max(scheduled, slots):
        even = (jobs.full.size * beneath + jobs.sums[0] * full + jobs.sums[1] * partial) * repeat / slots
        return longest_queue(even, least if k.heavy_first else most, most)
    return makespan(order(beneath + jobs.full * full + jobs.partial * partial, repeat, k.heavy_first), slots)


def seconds(k: KernelWork, d: Device, pace: Pace, scheduled: int = SCHEDULED, beside: float | None = None) -> Cost:
    """The time of one kernel on a GPU.

    The last cache holds nothing of its operands, unless the same call came just before: then `beside` are the bytes that
    others moved in between.
    """
    t = _times(k, d, pace, scheduled, beside)
    inside = _shares(k, d, (t.tiles.full, t.tiles.partial, t.tiles.rest), t.kernel)
    outside = {"memory": t.memory + t.merge, "l2": t.l2, "launch": t.launch}
    slow = inside if t.kernel >= max(t.memory, t.l2) else outside | {"launch": 0.0}
    bound = bound_of({"launch": t.launch} if t.launch > t.busy else slow)
    moved = k.unique_bytes + k.written_bytes
    return Cost(t.seconds, bound, k.flops, moved, k.exps, inside | outside, d.basis, d.band)


def held(moved: float, d: Device) -> float:
    """The share of bytes that the last cache holds from one call to the next like it: all that fit, soon none of more."""
    return min(1.0, max(0.0, 5 - 4 * moved / d.l2_bytes)) if d.l2_bytes else 0.0


def _under_power(kernel: float, d: Device) -> float:
    """Long calls run at the clock that the power allows: `power_share` slower, half of that after `power_seconds`."""
    return kernel * (1 + d.model.power_share * kernel / (kernel + d.model.power_seconds))


def _issued(parts: Mapping[str, float], issued: int, d: Device) -> dict[str, float]:
    """The resources of a tile whose lanes are busy for as long as it takes to issue what was compiled, if that is longer."""
    issuing = 32 * issued / (d.lanes_per_unit * d.clock_hz)
    return {**parts, "vector": max(parts["vector"], issuing)}


def _spread(parts: Mapping[str, float], pace: Pace) -> dict[str, float]:
    """The resources of a tile whose exponentials are shared out between special-function units and lanes."""
    return {**parts, "exp": parts["exp"] * pace.exp_share}


def _exposed(depth: int, d: Device, tile: Mapping[str, float]) -> float:
    """Latency of a tile's loads that neither earlier stages nor other programs of the unit cover."""
    covered = depth * sum(tile.values())
    return max(0.0, d.model.load_latency_seconds - covered)


def _drawn(k: KernelWork, d: Device, programs: int) -> float:
    """Seconds in which the units that have a program draw what the programs read, each through its own port."""
    rate = UNIT_PORT * d.clock_hz * d.model.bandwidth_efficiency
    return k.moved_bytes / (min(programs, d.units) * rate)


def _dram_bytes(k: KernelWork, d: Device, programs: int) -> float:
    """Operands come once while the second-level cache holds those of the programs in flight, else again for each wave.

    Programs of one batch entry follow one another and walk the same keys side by side: a wave reads the operands of the
    few entries in flight, once.
    """
    slots = d.units * k.resident
    entries = max(1, k.jobs.full.shape[0] * k.jobs.repeat)
    flying = min(entries, slots * entries / programs + 1) / entries
    if k.unique_bytes * flying <= d.l2_bytes:
        return k.unique_bytes + k.again_bytes + k.written_bytes
    waves = -(-programs // slots)
    again = max(k.unique_bytes + k.again_bytes, k.unique_bytes * flying * waves)
    return float(min(k.moved_bytes, again) + k.written_bytes)


def _shares(k: KernelWork, d: Device, per: tuple[Mapping[str, float], ...], kernel: float) -> dict[str, float]:
    """The kernel's time by resource, were each alone and the units evenly loaded."""
    full, partial, rest = per
    n_full, n_partial = (int(n) * k.jobs.repeat for n in k.jobs.sums)
    out = {r: (full[r] * n_full + partial[r] * n_partial + rest[r] * k.programs) / d.units for r in full}
    return out | {"makespan": kernel}


def streaming(
    w: Streamed, mapping: TileMapping, jobs: Jobs, fit: Footprint, value: int, queries: int, batch: int, *,
    moved: int | None = None, launches: int = 1, operand_bytes: int = 0, stages: int = 0, issued: int = 0,
) -> KernelWork:
    """Our kernel: the one-pass cascade under a mapping. `moved`: bytes that programs read, `stages`: tiles in flight, where
    they are not those of the mapping."""
    # split keys: every part writes its accumulator, maximum and sum in fp32, and the merge reads them
    merge = 8 * mapping.split_m * batch * queries * (value + 2) if mapping.split_m > 1 else 0
    every, unique, written = w.bytes
    return KernelWork(
        w.full, w.partial, w.program, jobs, every if moved is None else moved, unique, written,
        resident=fit.resident, split=mapping.split_m,
        stages=stages or mapping.stages, heavy_first=mapping.heavy_first, launches=launches, merge_bytes=merge,
        operand_bytes=operand_bytes, issued=issued,
    )
