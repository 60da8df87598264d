"""Our tiled bodies on a CPU: what one block of query rows takes, as the emitted code runs it.

    sdpa      one call of the fused kernel on the keys from the first to the last tile visited, mask where it is partial
    product   product, printed score and row rule, product, on the same keys
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..patterns import expr as ex
from ..patterns.mapping import Mapping as Tiling
from .cost import Cost
from .device import Device
from .host import Bill, Host, query_block
from .subject import Shape, Subject
from .tiles import Jobs
from .work import EXPONENTIALS, INDEX, WIDTH, term_operations

# Python and views around one block's call: slices of Q, K, V and the result's place.
BLOCK_OPERATORS = 8


def tiled(s: Subject, at: Shape, mapping: Tiling, jobs: Jobs, device: Device) -> Cost:
    """Seconds of the tiled body over all blocks."""
    host, bill = Host(device), Bill()
    bill.add("launch", host.h.operator_call_seconds)
    lengths, masked = spans(jobs, mapping, at)
    pairs = 0.0
    for n, partial, count in _alike(lengths, masked):
        rows = min(mapping.tile_p, at.queries)
        block = float(at.batch * rows * n) * count
        pairs += block
        if mapping.body == "sdpa":
            _sdpa(host, bill, s, at, rows, n, partial, count)
        else:
            _product(host, bill, s, at, rows, n, partial, count)
    share = at.queries / (min(mapping.tile_p, at.queries) * len(lengths) or 1)
    bill.flops, bill.exps = int(2 * pairs * share * (at.embed + at.value)), int(pairs * share)
    bill.bytes = WIDTH[s.dtype] * (at.batch * at.queries + at.batch // at.group * at.keys) * (at.embed + at.value)
    return bill.cost(device.basis)


def spans(jobs: Jobs, mapping: Tiling, at: Shape) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Keys from the first to the last visited tile of every query block, and whether any tile there needs the mask."""
    blocks = -(-at.queries // mapping.tile_p)
    if jobs.map is None:
        return np.full(blocks, at.keys, np.int64), np.zeros(blocks, np.bool_)
    table = np.asarray(jobs.map.classes).reshape(-1, *jobs.map.classes.shape[-2:])
    # batch entries run together, so a block covers what any of them visits
    seen = (table != 0).any(0)
    whole = (table == 2).all(0)
    n = seen.shape[1]
    first = np.where(seen.any(1), seen.argmax(1), 0)
    last = np.where(seen.any(1), n - seen[:, ::-1].argmax(1), 0)
    keys = np.minimum(last * mapping.tile_m, at.keys) - first * mapping.tile_m
    at_key = np.arange(n)
    inside = (at_key >= first[:, None]) & (at_key < last[:, None])
    return np.maximum(keys, 0), (inside & ~whole).any(1)


def _alike(lengths: NDArray[np.int64], masked: NDArray[np.bool_]) -> list[tuple[int, bool, int]]:
    """Blocks grouped by length and mask, with their number."""
    table: dict[tuple[int, bool], int] = {}
    for n, m in zip(lengths.tolist(), masked.tolist()):
        table[n, m] = table.get((n, m), 0) + 1
    return [(n, m, k) for (n, m), k in table.items() if n > 0]


def _sdpa(host: Host, bill: Bill, s: Subject, at: Shape, rows: int, n: int, masked: bool, count: int) -> None:
    units = at.batch * -(-rows // query_block(rows))
    matrix, exp = host.attention(at.batch * rows * n, rows, at.embed, at.value, s.dtype, units, masked)
    bill.add("matrix", matrix * count)
    bill.add("exp", exp * count)
    call = host.h.attention_seconds + (host.h.mask_seconds if masked else 0.0)
    bill.add("launch", (call + BLOCK_OPERATORS * host.h.operator_seconds) * count)


def _product(host: Host, bill: Bill, s: Subject, at: Shape, rows: int, n: int, masked: bool, count: int) -> None:
    points = at.batch * rows * n
    both = host.product(at.batch, rows, n, at.embed, s.dtype) + host.product(at.batch, rows, at.value, n, s.dtype)
    one = Bill()
    for op in _pointwise(s, masked):
        host.point(op, "f32", points, 0, one)
        one.add("launch", host.h.operator_seconds)
    for name, seconds in one.parts.items():
        bill.add(name, seconds * count)
    bill.add("matrix", both * count)
    bill.add("launch", (2 * host.h.product_seconds + BLOCK_OPERATORS * host.h.operator_seconds) * count)


def _pointwise(s: Subject, masked: bool) -> list[str]:
    """Operators over all elements of a block: the score, the row rule's reductions, the weight and its cast."""
    a = s.attention
    score = a.score if masked else s.mask.full
    grid: Mapping[str, int] = {r: 2 if r in (a.query, a.key) else 1 for r in s.cascade.rank}
    out = [op for op, n in term_operations(score, grid).items() if n == 4 and op not in (INDEX, "cast")]
    names = {ex.load(e.out.tensor, e.out.index, s.cascade.tensor[e.out.tensor].dtype) for e in a.row}
    del names
    for e in a.row:
        out.append(str(e.op))
    out += [op for op in ("sub", "exp") if any(t.op in EXPONENTIALS for t in ex.walk(a.weight))]
    return [*out, "cast"]
