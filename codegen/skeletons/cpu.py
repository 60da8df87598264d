"""The CPU's loops in torch: which tiles to visit, SDPA on slices of the keys. Printed into every CPU kernel's file.

    q [Z, H, P, E]   k [Z, H/G, M, E]   v [Z, H/G, M, F]   out [Z, H, P, F]      heads in groups of G share their keys

What varies comes in as functions: what the scores get added, which tiles keep a key, how a row ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...cost_model.time import cpu_tiles


class Run(NamedTuple):
    """A slice of the keys; `masked`: something is added to its scores."""

    start: int
    stop: int
    masked: bool


class Block(NamedTuple):
    """Query tiles of `rows` rows whose slices lie alike; `runs` are those of the first tile.

    `triangle`: one tile that sees exactly the keys from its own first row on up to the query.
    """

    start: int
    stop: int
    rows: int
    runs: list[Run]
    triangle: bool = False


# Query tiles are folded into the batch of one SDPA call: enough of them to feed the cores, few enough to stay in the cache.
CALL_SCORES = cpu_tiles.CALL_SCORES
PIECES_PER_THREAD = cpu_tiles.PIECES_PER_THREAD
PIECE_ROWS = cpu_tiles.PIECE_ROWS


@lru_cache(maxsize=64)
def axis(n: int, after: int) -> Tensor:
    """0, 1, …, n - 1 along a dimension that has `after` dimensions behind it."""
    return torch.arange(n, device="cpu").view(-1, *[1] * after)


def draw(a: Tensor, b: Tensor) -> Tensor:
    """From 0 to 2³¹ − 1: a counter under a key (`draw` in patterns/operators.py)."""
    x = ((b & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF) ^ (a & 0xFFFFFFFF)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >> 1


def choose(keep: Tensor, yes: float, no: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`yes` where `keep` holds, else `no`."""
    if yes != 0 or keep.numel() < 4096:
        return torch.full(keep.shape, no, dtype=dtype, device=keep.device).masked_fill_(keep, yes)
    # (keep - 1) · -no: arithmetic is several times faster than a choice; -inf is what -1 · largest · 2 overflows to
    out = keep.to(dtype).sub_(1)
    return out.mul_(torch.finfo(dtype).max).mul_(2) if no == -torch.inf else out.mul_(-no)


def tile(t: Tensor, *at: int | Tensor) -> Tensor:
    """`t[at]` as a view: every coordinate is a constant, or a range along a dimension of its own."""
    place: dict[int, int] = {}
    for d in reversed(range(len(at))):
        i = at[d]
        if isinstance(i, int) or i.numel() == 1:
            t = t.select(d, int(i))
            continue
        if i.numel() != t.shape[d]:
            t = t.narrow(d, int(i.view(-1)[0]), i.numel())
        # dimensions behind the range's own, and where it is among those that stay
        behind = next(k for k in range(i.dim()) if i.shape[-1 - k] != 1)
        place = {b: n + 1 for b, n in place.items()} | {behind: 0}
    order = sorted(place, reverse=True)
    t = t.permute([place[b] for b in order])
    return t[tuple(slice(None) if b in place else None for b in reversed(range(max(order, default=-1) + 1)))]


def extremes(low: Tensor, high: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """The least of `low` and the greatest of `high` in every `size` elements along a dimension."""
    whole = low.shape[dim] // size * size
    out = []
    for t, pick in ((low, torch.amin), (high, torch.amax)):
        parts = [pick(t.narrow(dim, 0, whole).unfold(dim, size, size), -1)] if whole else []
        if whole < t.shape[dim]:
            parts.append(pick(t.narrow(dim, whole, t.shape[dim] - whole), dim, keepdim=True))
        out.append(torch.cat(parts, dim) if len(parts) > 1 else parts[0])
    return out[0], out[1]


def corners(n: int, size: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every tile of `size`: its number, its first and its last coordinate."""
    number = axis(-(-n // size), after)
    return number, number * size, (number * size + (size - 1)).clamp(max=n - 1)


def plans(
    some: Tensor, every: Tensor, alive: Tensor | None, free: Tensor | None, size: tuple[int, int, int],
    tiles: tuple[int, int], always: bool,
) -> list[tuple[int, int, list[Block]]]:
    """Ranges of the batch with the slices that they visit: all of it, or each alone where their tiles differ much.

    Bool, broadcast to [Z, H, tiles of queries, tiles of keys]: `some`, is some point of the tile kept? `every`, are all?
    `free`: are all but for keys after the query? (None: not known.) `alive` [Z, H, tiles of queries]: do all rows
    certainly keep a key? The others visit every tile (None: all do). `size`: batch, queries, keys. `tiles`: queries
    and keys of a tile. `always`: full tiles get something added, too.
    """
    if alive is not None:
        some = some | ~(alive | every.any(-1)).unsqueeze(-1)
    shape = [-(-n // t) for n, t in zip(size[1:], tiles)]
    if free is None or always:
        free = torch.zeros((1, 1), dtype=torch.bool, device="cpu")
    # [Z, tiles of queries, tiles of keys], over all heads
    some, every, free = (x.expand(*x.shape[:-2], *shape) for x in (some, every, free))
    some, every, free = (x[(None,) * (4 - x.dim())] for x in (some, every, free))
    some, every, free = some.any(1), every.all(1), free.all(1)
    if int(some.any(0).sum()) * some.shape[0] <= 1.25 * int(some.sum()):
        return [(0, size[0], visits(some.any(0), every.all(0), free.all(0), size[1:], tiles, always))]
    return [
        (z, z + 1, visits(some[z], every[z % len(every)], free[z % len(free)], size[1:], tiles, always))
        for z in range(size[0])
    ]


def visits(
    some: Tensor, every: Tensor, free: Tensor, size: tuple[int, int], tiles: tuple[int, int], always: bool
) -> list[Block]:
    """The key slices of every query tile; consecutive tiles with equal slices are one block."""
    (queries, keys), (tile_p, tile_m) = size, tiles
    partial = (some & ~every).any(1).tolist()
    bound = (some & ~free).any(1).tolist()
    count = some.sum(1).tolist()
    order = torch.arange(some.shape[1], device="cpu")
    first = torch.where(some, order, some.shape[1]).amin(1).tolist() if keys else []
    last = torch.where(some, order, -1).amax(1).tolist() if keys else []
    plan: list[Block] = []
    for i, n in enumerate(count):
        p0, p1 = i * tile_p, min((i + 1) * tile_p, queries)
        width = last[i] - first[i] + 1 if n else 0
        # nothing but the order of key and query masks here, up to the diagonal
        ordered = n and n == width and not bound[i] and last[i] * tile_m < p1 <= (last[i] + 1) * tile_m
        if ordered and in_triangle(plan, first[i] * tile_m, p0, p1):
            continue
        if n == 0:
            runs: list[Run] = []
        elif 5 * n >= 4 * width:
            # a few empty tiles in between cost less than a second slice
            stop = min((last[i] + 1) * tile_m, keys)
            runs = [Run(first[i] * tile_m, stop, always or partial[i] or n < width)]
        else:
            runs = pieces(some[i].tolist(), every[i].tolist(), tile_m, keys, always)
        append(plan, p0, p1, tile_p, runs)
    return plan


def in_triangle(plan: list[Block], first: int, p0: int, p1: int) -> bool:
    """Begin a triangle with a query tile, or enlarge the one before by it."""
    if first == p0:
        plan.append(Block(p0, p1, p1 - p0, [Run(p0, p1, True)], True))
        return True
    if plan and plan[-1].triangle and plan[-1].start == first and plan[-1].stop == p0:
        plan[-1] = Block(first, p1, p1 - first, [Run(first, p1, True)], True)
        return True
    return False


def pieces(some: list[bool], every: list[bool], size: int, keys: int, always: bool) -> list[Run]:
    """Consecutive visited tiles of one row of the map, as slices."""
    out: list[Run] = []
    for j, visited in enumerate(some):
        start, stop = j * size, min((j + 1) * size, keys)
        if visited and out and out[-1].stop == start:
            out[-1] = Run(out[-1].start, stop, out[-1].masked or not every[j])
        elif visited:
            out.append(Run(start, stop, always or not every[j]))
    return out


def append(plan: list[Block], p0: int, p1: int, size: int, runs: list[Run]) -> None:
    """Add a query tile to a plan; it joins the block before when its only slice lies as there."""
    if plan and len(runs) == 1 and p1 - p0 == size:
        before = plan[-1]
        if before.rows == size and len(before.runs) == 1 and not before.triangle:
            (m0, m1, masked), (n0, n1, also) = before.runs[0], runs[0]
            if (n0 - p0, n1 - p0, also) == (m0 - before.start, m1 - before.start, masked):
                plan[-1] = before._replace(stop=p1)
                return
    plan.append(Block(p0, p1, p1 - p0, runs))


def strips(queries: int, keys: int, size: int, masked: bool) -> list[Block]:
    """The plan in which every query sees every key, `size` queries at a time."""
    runs = [Run(0, keys, masked)] if keys else []
    return [Block(p, min(p + size, queries), size, runs) for p in range(0, queries, max(size, 1))]


def single(plan: list[Block]) -> list[Block]:
    """The plan with one query tile in a block where something is added to its scores."""
    out: list[Block] = []
    for b in plan:
        if not any(r.masked for r in b.runs):
            out.append(b)
            continue
        for p in range(b.start, b.stop, b.rows):
            moved = [Run(r.start + p - b.start, r.stop + p - b.start, r.masked) for r in b.runs]
            out.append(Block(p, min(p + b.rows, b.stop), b.rows, moved, b.triangle))
    return out


class Near:
    """What depends on key minus query alone: computed once for all tiles, and cut out for each as a view."""

    def __init__(self, plan: list[Block], make: Callable[[Tensor, Tensor], Tensor]) -> None:
        cut = [b for b in plan if not b.triangle]
        rows = max((b.rows for b in cut), default=1)
        self.least = min((r.start - b.start for b in cut for r in b.runs), default=0)
        most = max((r.stop - b.start for b in cut for r in b.runs), default=1)
        queries = torch.arange(rows, device="cpu").unsqueeze(1)
        self.values = make(queries, torch.arange(self.least, most, device="cpu"))

    def cut(self, p0: int, p1: int, m0: int, m1: int) -> Tensor:
        start = m0 - p0 - self.least
        return self.values[..., : p1 - p0, start : start + m1 - m0]


def four(t: Tensor, rows: int, keys: int) -> Tensor:
    """What is added to the scores as SDPA takes it: an element for every row and key, in two or four dimensions."""
    if t.dim() == 2 and t.shape[0] == rows and t.shape[1] == keys:
        return t
    t = t[(None,) * (4 - t.dim())]
    return t if t.shape[3] == keys else t.expand(-1, -1, rows, keys).contiguous()


def level(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands as torch's kernel takes them: rows without gaps, keys and values equally wide, queries that lie apart."""
    if q.shape[3] == v.shape[3] and q.stride(3) == k.stride(3) == v.stride(3) == 1 and 1 not in q.stride()[:3]:
        return q, k, v
    wide = max(q.shape[3], v.shape[3])
    q, k, v = (t if t.shape[3] == wide else torch.nn.functional.pad(t, (0, wide - t.shape[3])) for t in (q, k, v))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    # the result is laid out by the strides of the queries, and written as if its rows had no gaps: two that are 1 mix it up
    return q.contiguous() if 1 in q.stride()[:3] else q, k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, empty: float | None, width: int
) -> tuple[Tensor, Tensor]:
    """torch's CPU flash kernel: output and log-sum-exp of every row. For rows without a key it gives 0 and 0."""
    if k.shape[2] == 0:
        shape = q.shape[:3]
        return q.new_full((*shape, width), empty or 0.0), q.new_full(shape, -torch.inf, dtype=torch.float32)
    o, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=mask, scale=scale)
    # of a row without a key the sum is 0: only where some row looks like one is the mask searched
    if mask is not None and empty is not None and bool(((lse == 0) | ~lse.isfinite()).any()):
        dead = (mask == -torch.inf).all(-1, keepdim=True)
        o.masked_fill_(dead, empty)
        lse.masked_fill_(dead.squeeze(-1), -torch.inf)
    return o if width == o.shape[3] else o[..., :width], lse


def once(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, added: Tensor | None = None, empty: float | None = None,
    finish: Callable[[Tensor, Tensor, int, int, int, int], Tensor] | None = None,
) -> None:
    """One SDPA in which every query sees every key: `sdpa` for calls too small for tiles."""
    q, k, v = level(q, k, v)
    mask = four(added, q.shape[2], k.shape[2]) if added is not None else None
    o, lse = attend(q, k, v, mask, False, scale, empty, out.shape[3])
    out.copy_(o if finish is None else finish(o, lse, 0, q.shape[0], 0, q.shape[2]))


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, plan: list[Block],
    added: Callable[[int, int, int, int], Tensor] | None = None, empty: float | None = None,
    finish: Callable[[Tensor, Tensor, int, int, int, int], Tensor] | None = None,
) -> None:
    """SDPA of every block of queries on its slices of the keys.

    `added(p0, p1, m0, m1)`: what the scores get; for a block of several tiles it is the same for each of them.
    `empty`: what a row without a key yields (None: there is none, or torch's 0 is right).
    `finish(o, lse, z0, z1, p0, p1)`: the end of those rows, if there is one.
    """
    q, k, v = level(q, k, v)
    for block in plan:
        p0, p1, rows, runs, triangle = block
        if p1 - p0 > rows:
            folded(q, k, v, out, scale, block, added, empty, finish)
            continue
        mask = None
        if not runs:
            keys, values = k[:, :, :0], v[:, :, :0]
        elif len(runs) == 1:
            keys, values = (t[:, :, runs[0].start : runs[0].stop] for t in (k, v))
        else:
            keys, values = (torch.cat([t[:, :, r.start : r.stop] for r in runs], 2) for t in (k, v))
        if added is not None and not triangle and any(r.masked for r in runs):
            parts = [four(added(p0, p1, m0, m1), p1 - p0, m1 - m0) for m0, m1, _ in runs]
            mask = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        o, lse = attend(q[:, :, p0:p1], keys, values, mask, triangle, scale, empty, out.shape[3])
        out[:, :, p0:p1] = o if finish is None else finish(o, lse, 0, q.shape[0], p0, p1)


def folds(heads: int, rows: int, keys: int) -> int:
    """How many query tiles go into one call."""
    pieces = PIECES_PER_THREAD * torch.get_num_threads()
    return max(1, -(-CALL_SCORES // (heads * rows * keys)), -(-pieces // (heads * -(-rows // PIECE_ROWS))))


def folded(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, block: Block,
    added: Callable[[int, int, int, int], Tensor] | None, empty: float | None,
    finish: Callable[[Tensor, Tensor, int, int, int, int], Tensor] | None,
) -> None:
    """Query tiles whose slices lie alike: the tiles become the batch, and overlapping slices of the keys are views."""
    p0, p1, rows, ((m0, m1, masked),), _ = block
    mask = four(added(p0, p0 + rows, m0, m1), rows, m1 - m0) if masked and added is not None else None
    count = folds(q.shape[1], rows, m1 - m0)
    for z in range(q.shape[0]):
        # [tiles, H, rows, E], [tiles, H/G, m1 - m0, E], [tiles, H, rows, F]: cut once, a call takes some of the tiles
        queries, ends = (t[z, :, p0:p1].unfold(1, rows, rows).permute(1, 0, 3, 2) for t in (q, out))
        stop = m1 + queries.shape[0] * rows - rows
        keys, values = (t[z, :, m0:stop].unfold(1, m1 - m0, rows).permute(1, 0, 3, 2) for t in (k, v))
        for a in range(0, queries.shape[0], count):
            at = slice(a, a + count)
            o, lse = attend(queries[at], keys[at], values[at], mask, False, scale, empty, out.shape[3])
            if finish is None:
                ends[at] = o
            else:
                o, lse = o.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
                p = p0 + a * rows
                out[z, :, p : p + o.shape[1]] = finish(o[None], lse[None], z, z + 1, p, p + o.shape[1])[0]


def reach(q: Tensor, k: Tensor, scale: float) -> float:
    """A bound on |scale · q·k| over all queries and keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    longest = [float(torch.linalg.vector_norm(t, dim=-1, dtype=wide).amax()) if t.numel() else 0.0 for t in (q, k)]
    return 1.001 * abs(scale) * longest[0] * longest[1]


def plainly(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, size: int, score: Callable[[Tensor, slice, slice, slice], Tensor]
) -> None:
    """The attention as it is written, `size` queries of the heads that share keys at a time.

    `score(products, z, h, p)`: the score of those queries and all keys.
    """
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    for z in range(q.shape[0]):
        for h in range(k.shape[1]):
            keys, values, heads = k[z, h].to(wide), v[z, h].to(wide), slice(h * group, (h + 1) * group)
            for a in range(0, q.shape[2], size):
                p = slice(a, min(a + size, q.shape[2]))
                x = score((q[z, heads, p].to(wide) @ keys.mT)[None], slice(z, z + 1), heads, p)
                out[z, heads, p] = (x.softmax(-1) @ values)[0]
