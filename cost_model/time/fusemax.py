"""FuseMax's accelerator: where its Einsums run, and the latency of its published bindings.

    cycles(Einsum) = points · slots / lanes      the 2D array takes what walks (m1, m0) or sums over it, the row of
                                                 vector lanes the rest; an exponential takes `exp_slots`
    seconds        = max(cycles of the binding / clock, bytes / bandwidth)

It is the one accelerator with published, reproducible figures for attention cascades, and holds `work.count` to them.
Source: Nayak et al., "FuseMax" (MICRO 2024), and its artifact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...patterns import expr as ex
from ...patterns.cascade import Cascade, Einsum
from ...patterns.mapping import TileMapping
from ..count.work import count, key_tile
from ..devices.device import Device
from ..operations import WIDTH, Sizes, Work, contraction, elements, is_view, product, size_int

# Rows of the query that one pass over the array holds.
ARRAY_ROWS = 256
# Each step waits for the slowest of its branches; a branch is a chain of Einsums, named by what they write.
BINDING: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("BQK", "LM"), ("RD", "RNV", "AV")),
    (("RM",),),
    (("SLN", "SLD"), ("PRM", "SPD")),
    (("SLNV",), ("SPNV",)),
)
UNFUSED = (("QK",), ("GM", "SN", "SD", "A"), ("AV",))
# FLAT's own chip has a larger buffer; it double-buffers one tile of scores beside the rows of scores it holds, and
# otherwise spills blocks of so many rows (FuseMax artifact, accel/flat.py and flat_validation.csv).
FLAT_BUFFER_BYTES = 32 << 20
FLAT_SPILLED_ROWS = 4 * ARRAY_ROWS
# The Einsum that takes its operand as it is made, so that it never reads it from the buffer.
FLAT_STREAMED = ("SD",)


def query_tile(queries: int, e: int, f: int, device: Device, *, scores_on_chip: bool, width: int = 2) -> int:
    """Query rows that the global buffer holds: Q, running maximum, sum and output, and (+Cascade) the score tiles."""
    row = e + f + 2 + (2 * ARRAY_ROWS if scores_on_chip else 0)
    room = (device.buffer_bytes - ARRAY_ROWS * width * (e + f)) // (ARRAY_ROWS * width * row)
    blocks = queries // ARRAY_ROWS
    best = max(d for d in range(1, max(1, min(blocks, room)) + 1) if blocks % d == 0)
    return ARRAY_ROWS * best


def cycles(c: Cascade, sizes: Mapping[str, int], device: Device) -> dict[str, float]:
    """Cycles of every Einsum of a streaming cascade on its unit, by the tensor that it writes."""
    bound = Sizes(c, dict(sizes))
    inner = key_tile(c)
    out: dict[str, float] = {}
    for e in c.einsums:
        if is_view(e) or not e.ranks or e.body.op == "const":
            continue
        points = size_int(elements(bound.rank, e.ranks))
        lanes = device.array_lanes if inner in e.ranks else device.vector_lanes
        out[e.out.tensor] = out.get(e.out.tensor, 0.0) + points * _slots(e, device) / lanes
    return out


def _slots(e: Einsum, device: Device) -> int:
    if contraction(e) is None and any(t.op == "exp" for t in ex.walk(e.body)):
        return device.exp_slots
    return 1


def latency_seconds(c: Cascade, mapping: TileMapping, sizes: Mapping[str, int], device: Device, heads: int = 1) -> float:
    """Seconds of the one-pass cascade of so many heads under the binding that overlaps both units (the paper's +Binding)."""
    cost = cycles(c, sizes, device)
    total = sum(max(sum(cost[t] for t in branch) for branch in step) for step in BINDING)
    return heads * max(total / device.clock_hz, moved_bytes(count(c, mapping, sizes), c) / device.dram_bytes_per_s)


def moved_bytes(w: Work, c: Cascade, width: int = 2) -> int:
    """Bytes moved when every element has `width` bytes, as on this accelerator."""
    return sum(size_int(t.moved) // WIDTH[c.tensor[t.tensor].dtype] * width for t in w.traffic)


def unfused_seconds(c: Cascade, sizes: Mapping[str, int], device: Device, heads: int = 1) -> float:
    """Seconds of the three-pass cascade as three kernels; the softmax takes four operations an element on the lanes."""
    bound = Sizes(c, dict(sizes))
    total = 0.0
    for group in UNFUSED:
        part = [e for e in c.einsums if e.out.tensor in group]
        points = size_int(elements(bound.rank, max(part, key=lambda e: len(e.ranks)).ranks))
        lanes = device.array_lanes if len(part) == 1 else device.vector_lanes / len(part)
        width = 2
        names = {str(a.attr) for e in part for a in e.reads if str(a.attr) not in group} | {part[-1].out.tensor}
        moved = sum(size_int(_bytes(bound, n)) * width for n in names)
        total += max(points / lanes / device.clock_hz, moved / device.dram_bytes_per_s)
    return heads * total


def flat_seconds(c: Cascade, sizes: Mapping[str, int], device: Device, heads: int = 1) -> float:
    """Seconds of the three-pass cascade as FLAT runs it: fused by rows, both units and memory overlapped.

    max(bytes / bandwidth, matrix products on the array, the softmax's Einsums on the lanes)
    """
    bound = Sizes(c, dict(sizes))
    points = {e.out.tensor: size_int(elements(bound.rank, e.ranks)) for e in c.einsums}
    array, lanes = (
        sum(points[t] for group in UNFUSED if (len(group) == 1) is products for t in group) for products in (True, False)
    )
    slowest = max(array / device.array_lanes, lanes / device.vector_lanes) / device.clock_hz
    return heads * max(slowest, flat_bytes(c, sizes) / device.dram_bytes_per_s)


def flat_bytes(c: Cascade, sizes: Mapping[str, int], width: int = 2) -> int:
    """Bytes of one head under FLAT: rows of scores are buffered (what does not fit is spilled), or all are spilled.

    buffered  both operands of QK once a tile of the array, V once a tile of rows; spilled scores once a buffer access
    spilled   K and V once a block of rows; scores and weights written and read
    """
    bound = Sizes(c, dict(sizes))
    size = {t.name: size_int(product(bound.shape[t.name])) for t in c.tensors}
    p, m, scores = sizes["P"], sizes["M"], size["QK"]
    kept = [e for e in c.einsums if e.out.tensor not in FLAT_STREAMED]
    held = ("QK", "SN", "A")
    accesses = len(held) + sum(1 for e in kept for a in e.reads if str(a.attr) in held)
    rows = max(ARRAY_ROWS, min(p, FLAT_BUFFER_BYTES // (width * m)))
    room = width * rows * m + 2 * width * ARRAY_ROWS * ARRAY_ROWS
    spilled = scores * max(0, room - FLAT_BUFFER_BYTES) / room
    tiles = (size["Q"] * (m // ARRAY_ROWS), (size["K"] + size["V"]) * (p // ARRAY_ROWS), size["AV"])
    buffered = sum(tiles) + accesses * spilled
    blocks = -(-p // FLAT_SPILLED_ROWS)
    streamed = size["Q"] + size["AV"] + blocks * (size["K"] + size["V"]) + 2 * sum(size[t] for t in ("QK", "A"))
    return math.ceil(width * min(buffered, streamed))


def _bytes(bound: Sizes, name: str) -> int:
    out = 1
    for s in bound.shape[name]:
        out *= size_int(s)
    return out
