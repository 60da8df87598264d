"""The fused body on a CPU, one pass in C++ over the tiles that a mask keeps; it models codegen/skeletons/fused.hpp.

    tile   = rows · keys · ((E + F)·multiply + pair + more operators)        partial: the mask's operators too
    unit   = its query tiles + rows · row + keys laid out once for all of them
    call   = our operator's call + units shared by the threads

Head sizes are padded to what the registers hold, rows to blocks of 16.
"""

from __future__ import annotations

import numpy as np

from ...patterns import expr as ex
from ...patterns.mapping import TileMapping
from ..count.subject import Shape, Subject
from ..count.tiles import Jobs
from ..devices.device import Device
from ..operations import EXPONENTIALS, WIDTH
from .beforehand import fused_fetch_seconds
from .body import AROUND_ALL, AROUND_DATA, bias_bytes, biases, loaded, pointwise
from .cost import Cost
from .host import IN_EXPS, Bill, Host, balanced, rate

TYPES = ("f32", "bf16", "f16")
# Rows of a register block, and what head sizes are padded to.
ROWS, DEEP = 16, {"f32": 16, "bf16": 32, "f16": 16}
# Bytes of what the query tiles of a unit keep, and units that a thread should get.
ITEMS_BYTES, UNITS_A_THREAD = 512 << 10, 4
# The operators of a plain softmax over scaled scores, which `fused_pair_seconds` are of.
PLAIN = ("mul", "max", "add", "exp", "sub")


def fits(s: Subject) -> bool:
    """Can it be printed: types that it reads, head sizes that are constants? The code generator has the last word."""
    a = s.attention
    ranks = [a.value, *(r for e in a.products for r in e.over)]
    constant = all(isinstance(s.cascade.rank[r].size, int) for r in ranks if r in s.cascade.rank)
    return s.dtype in TYPES and constant and not any(t.dtype == "f64" for t in s.cascade.tensors)


def fused(s: Subject, at: Shape, mapping: TileMapping, jobs: Jobs, device: Device, rates: str = "") -> Cost:
    """Seconds of the fused body; `rates`: where it computes at the rates of another type than its operands'."""
    host, bill = Host(device), Bill()
    h, t = host.h, rates or s.dtype
    tile, rows = mapping.tile_p * mapping.tile_m, -(-at.queries // mapping.tile_p) * mapping.tile_p
    # the last query tile is computed in whole blocks of rows
    filled = min(1.0, -(-at.queries // ROWS) * ROWS / rows)
    full, partial = (float(x.sum()) * jobs.repeat * filled for x in (jobs.full, jobs.partial))
    pairs = (full + partial) * tile
    deep, wide = (_padded(n, DEEP[t]) for n in (at.embed, at.value))
    units = at.batch // at.group * _ranges(at, mapping, t, host.threads)
    gain = balanced(host.gain("product"), host.threads, units)
    plain = rate(h.fused_pair_seconds, t) + more(host, pointwise(s, False), PLAIN)
    masked = more(host, pointwise(s, True), pointwise(s, False)) if s.mask.keep is not ex.TRUE else 0.0
    packed = _packed(jobs, at, mapping, units) * (deep + wide)
    bill.add("launch", h.operator_call_seconds + h.fused_call_seconds)
    if s.mask.keep is not ex.TRUE:
        bill.add("launch", (AROUND_DATA if loaded(s) else AROUND_ALL) * h.operator_seconds)
    bill.add("matrix", (pairs * (deep + wide) * rate(h.fused_multiply_seconds, t)) / gain)
    bill.add("exp", (pairs * plain + partial * tile * masked + at.batch * rows * filled * h.fused_row_seconds) / gain)
    bill.add("element", packed * rate(h.fused_key_seconds, t) / gain)
    bill.add("memory", host.stream(at.batch // at.group * at.keys * (at.embed + at.value) * WIDTH[t]))
    bill.add("memory", host.stream(bias_bytes(s, at, pairs / max(at.batch * at.queries * at.keys, 1))))
    bill.add("element", pairs * len(biases(s, at)) * rate(h.fused_bias_seconds, t) / gain)
    bill.add("element", fused_fetch_seconds(host, s, pairs) / gain)
    bill.add("fault", host.fresh(WIDTH[t] * at.batch * at.queries * at.value))
    bill.flops, bill.exps = int(2 * pairs * (at.embed + at.value)), int(pairs)
    bill.bytes = WIDTH[t] * (at.batch * at.queries + at.batch // at.group * at.keys) * (at.embed + at.value)
    return bill.cost(device, "our-fused", t)


# Rows of a block of the loop for few queries, and segments of keys that a thread should get.
FEW_BLOCK, SEGMENTS_A_THREAD = 8, 3
# A multiply-add there beside one of whole tiles: sums go across the lanes, and 8 rows fill the registers less. Keys in the
# cache, 8 rows of 128: 3.3e-11 s.
FEW_MULTIPLY = 2.4


def few(s: Subject, at: Shape, mapping: TileMapping, jobs: Jobs, device: Device) -> Cost:
    """Seconds of the body for few queries, which models codegen/skeletons/fused_decode.hpp: keys and values are read once.

    Products run while the next keys are on their way: what takes longer counts. They are of floats on vectors.
    """
    host, bill = Host(device), Bill()
    h, t, heads = host.h, s.dtype, at.batch // at.group
    share = float(jobs.visited.sum()) * jobs.repeat / max(at.batch * -(-at.keys // mapping.tile_m), 1)
    rows = at.group * at.queries
    filled = rows // FEW_BLOCK * FEW_BLOCK + (1 << max(rows % FEW_BLOCK - 1, 0).bit_length() if rows % FEW_BLOCK else 0)
    keys = heads * at.keys * min(share, 1.0)
    units = heads * (max(1, -(-SEGMENTS_A_THREAD * host.threads // heads)) if host.threads > 1 else 1)
    gain = balanced(host.gain("product"), host.threads, units)
    multiplied = keys * filled * (at.embed + at.value) * FEW_MULTIPLY * h.fused_multiply_seconds["f32"] / gain
    read = host.stream(keys * (at.embed + at.value) * WIDTH[t])
    pairs = keys * rows
    plain = rate(h.fused_pair_seconds, t) + more(host, pointwise(s, s.mask.keep is not ex.TRUE), PLAIN)
    bill.add("launch", h.operator_call_seconds + h.fused_call_seconds)
    if s.mask.keep is not ex.TRUE:
        bill.add("launch", (AROUND_DATA if loaded(s) else AROUND_ALL) * h.operator_seconds)
    bill.add("memory" if read > multiplied else "matrix", max(read, multiplied))
    bill.add("exp", pairs * plain / gain)
    bill.add("memory", host.stream(bias_bytes(s, at, min(share, 1.0))))
    bill.add("element", pairs * len(biases(s, at)) * rate(h.fused_bias_seconds, t) / gain)
    bill.add("element", fused_fetch_seconds(host, s, pairs) / gain)
    bill.flops, bill.exps = int(2 * pairs * (at.embed + at.value)), int(pairs)
    bill.bytes = WIDTH[t] * (at.batch * at.queries + heads * at.keys) * (at.embed + at.value)
    return bill.cost(device, "our-fused", t)


def _padded(n: int, to: int) -> int:
    return -(-n // to) * to


def more(host: Host, ops: tuple[str, ...], than: tuple[str, ...]) -> float:
    """Seconds a pair of a program's operators beside another's."""
    return max(0.0, _program(host, ops) - _program(host, than))


def _program(host: Host, ops: tuple[str, ...]) -> float:
    exps = sum(IN_EXPS.get(op, 1.0) for op in ops if op in EXPONENTIALS)
    return exps * host.h.fused_exp_seconds + sum(op not in EXPONENTIALS for op in ops) * host.h.fused_element_seconds


def _ranges(at: Shape, mapping: TileMapping, dtype: str, threads: int) -> int:
    """Units of each key head: ranges of query tiles, as `Task` in the loop cuts them."""
    items = -(-at.queries // mapping.tile_p) * at.group
    every = items * (at.batch // at.group)
    kept = mapping.tile_p * (_padded(at.embed, DEEP[dtype]) * WIDTH[dtype] + _padded(at.value, DEEP[dtype]) * WIDTH["f32"])
    each = max(1, min(items, -(-every // (UNITS_A_THREAD * threads)), ITEMS_BYTES // kept))
    return -(-items // each)


def _packed(jobs: Jobs, at: Shape, mapping: TileMapping, units: int) -> float:
    """Keys that are laid out, over all units: in each those that its query tiles visit."""
    if jobs.map is None:
        return float(units * at.keys)
    first, last = jobs.map.merged().ends
    ranges = max(1, units // (at.batch // at.group))
    # with fewer tiles than ranges the heads of a group are split
    each = max(1, len(first) // ranges)
    starts = np.arange(0, len(first), each)
    reach = np.maximum.reduceat(last, starts) - np.minimum.reduceat(first, starts)
    return float(reach.clip(0).sum() * mapping.tile_m) * ranges / len(starts) * (at.batch // at.group)
