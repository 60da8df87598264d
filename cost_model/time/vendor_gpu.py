"""Vendors' kernels on a GPU: how a family lays out an attention, and its time by the same model as our own kernels.

    rows      the heads of a group fill a tile's rows: at every length, or for one query alone
    split     keys of a launch that leaves units idle: into parts that make even waves, or fill the units once
    program   clocks before its first tile, which nothing covers

Sources: FlashAttention-2's and -3's public code (tiles, the rule of the split), kernels.toml (what was fitted).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ...patterns.mapping import TileMapping
from ..count.subject import Shape, Subject, tile_work
from ..count.tiles import Data
from ..count.work import Streamed
from ..devices.device import Device
from ..devices.kernels import VendorFacts
from ..operations import WIDTH, Traffic, Work, size_int
from . import gpu
from .fit import Footprint

# A launch with programs for so much of the units is not split; nor is a split taken that fills waves worse than the best.
FULL_ENOUGH, NEARLY_BEST = 0.8, 0.85
MOST_SPLITS = 128


@dataclass(frozen=True)
class RowTiles:
    """How queries and heads fill tiles: `queries` of each of `heads` heads in a tile of `rows` rows, which reads `keys` keys
    at a time; `blocks` tiles serve the heads of a group where one does not."""

    rows: int
    keys: int
    queries: int
    heads: int
    blocks: int


def rows_of(at: Shape, facts: VendorFacts) -> RowTiles:
    """The tile of a launch, and what lies in it."""
    most, keys = facts.tile(max(at.embed, at.value))
    heads = at.group if facts.packed or at.queries == 1 else 1
    rows = facts.few_rows if at.queries * heads <= facts.few_rows else most
    return RowTiles(rows, keys, max(1, rows // heads), heads, -(-heads // rows))


def laid_out(s: Subject, at: Shape, facts: VendorFacts, device: Device, skips: bool, data: Data) -> gpu.KernelWork:
    """The work of a vendor's kernel; `skips`: it leaves out tiles that the mask empties."""
    r = rows_of(at, facts)
    w, jobs = tile_work(s, at, (r.rows, r.keys), data, (r.queries, r.keys), skips)
    # what programs read follows from the tiles that they visit, one for all heads that fill it
    read = tile_work(s, at, (r.queries, r.keys), data, skips=skips)[0] if r.heads > 1 else w
    jobs = jobs.repeated(max(1, jobs.repeat // r.heads) * r.blocks)
    tile = TileMapping(r.rows, r.keys, heavy_first=facts.heavy_first, body="vendor")
    shared = _shared_bytes(r, at, WIDTH[s.dtype])
    few = r.rows == facts.few_rows and (facts.few_prompts or at.queries == 1)
    resident = max(1, min(facts.few_resident if few else facts.resident, device.shared_bytes_per_unit // max(shared, 1)))
    fit = Footprint(shared, 0, 0, resident)
    k = gpu.streaming(_padded(w, at, facts, read.traffic), tile, jobs, fit, at.value, at.queries, at.batch)
    moved = max(k.unique_bytes, k.moved_bytes * r.blocks // r.heads)
    # with few rows there is nothing else to do while a tile comes
    waits = WIDTH[s.dtype] * min(r.keys, at.keys) * (at.embed + at.value) if few else 0
    k = replace(k, moved_bytes=moved, tile_bytes=waits, again_bytes=_again(s, at, facts, r, device))
    heads = at.extent[s.attention.batch[-1]] if s.attention.batch else 1
    # a group that is alone, of one sequence or of one key head, lies as it should
    if at.queries == 1 and 1 < at.group < heads < at.batch:
        k = replace(k, further=facts.swaps)
    least = {"all": True, "decode": at.queries == 1, "groups": at.queries == 1 and at.group > 1}
    return _split(k, facts, device, at) if least[facts.splits] else k


def _again(s: Subject, at: Shape, facts: VendorFacts, r: RowTiles, device: Device) -> int:
    """Bytes of keys and values that come again for each head of a group, where a pass over the batch fills the cache."""
    if not facts.heads_apart or r.heads == at.group:
        return 0
    width, heads = WIDTH[s.dtype], at.extent[s.attention.batch[-1]] if s.attention.batch else 1
    keys = width * (at.batch // at.group) * at.keys * (at.embed + at.value)
    a_pass = keys * at.group // heads + width * (at.batch // heads) * at.queries * (at.embed + at.value)
    return keys * (at.group - 1) if a_pass > device.l2_bytes else 0


def _padded(w: Streamed, at: Shape, facts: VendorFacts, traffic: tuple[Traffic, ...]) -> Streamed:
    """Products of heads as wide as the kernel has them."""
    ratio = (facts.width(at.embed) + facts.width(at.value)) / (at.embed + at.value)
    full, partial, program = (_wider(x, ratio) for x in (w.full, w.partial, w.program))
    return replace(w, full=full, partial=partial, program=program, traffic=traffic)


@lru_cache(maxsize=1024)
def _wider(w: Work, ratio: float) -> Work:
    return replace(w, matrix={t: round(size_int(n) * ratio) for t, n in w.matrix.items()})


def _shared_bytes(r: RowTiles, at: Shape, width: int) -> int:
    return width * (r.rows * at.embed + r.keys * (at.embed + at.value))


def _split(k: gpu.KernelWork, facts: VendorFacts, device: Device, at: Shape) -> gpu.KernelWork:
    """The keys of a launch that leaves units idle are split."""
    longest = k.jobs.longest
    slots = device.units * facts.split_slots
    if longest <= facts.whole_tiles:
        return k
    n = splits(k.programs, slots, longest) if facts.split_rule == "waves" else min(slots // k.programs, longest)
    return k if n <= 1 else replace(k, split=n, merge_bytes=8 * n * at.batch * at.queries * (at.value + 1))


def splits(programs: int, slots: int, tiles: int) -> int:
    """Into how many parts the keys of a launch go: 1 where its programs nearly fill the slots."""
    if programs >= FULL_ENOUGH * slots or tiles <= 1:
        return 1
    able = [n for n in range(1, min(MOST_SPLITS, slots, tiles) + 1) if n == 1 or -(-tiles // n) != -(-tiles // (n - 1))]
    even = {n: _even(programs * n / slots) for n in able}
    best = max(even.values())
    return next(n for n in able if even[n] >= NEARLY_BEST * best)


def _even(waves: float) -> float:
    """How full the waves are."""
    return waves / -(-waves // 1)


def pace(facts: VendorFacts, device: Device, k: gpu.KernelWork) -> gpu.Pace:
    """A family's pace on a device."""
    m = device.model
    clock = m.vendor_program_factor / device.clock_hz
    program = facts.few_clocks if k.tile_bytes else facts.program_clocks
    return gpu.Pace(
        m.vendor_matrix_efficiency, m.vendor_overlap, m.vendor_partial_factor, program * clock, facts.exp_share,
        k.tile_bytes / facts.draw_bytes_per_clock * clock, facts.part_clocks * clock,
    )
