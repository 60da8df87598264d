"""The CPU's loops in torch: which tiles to visit, SDPA on slices of the keys. Printed into every CPU kernel's file.

    q [Z, H, P, E]   k [Z, H/G, M, E]   v [Z, H/G, M, F]   out [Z, H, P, F]      heads in groups of G share their keys

What varies comes in as functions: what the scores get added, which tiles keep a key, how a row ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# A slice of the keys: start, stop, and whether something is added to its scores.
Run = tuple[int, int, bool]
# Consecutive query tiles whose slices lie alike: first row, last row + 1, rows a tile, slices of the first tile.
Block = tuple[int, int, int, list[Run]]

# Rows of one SDPA call when query tiles are folded into its batch: many enough to feed the cores.
FOLD_ROWS = 1024


@lru_cache(maxsize=64)
def axis(n: int, after: int) -> Tensor:
    """0, 1, …, n - 1 along a dimension that has `after` dimensions behind it."""
    return torch.arange(n, device="cpu").view(-1, *[1] * after)


def choose(keep: Tensor, yes: float, no: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`yes` where `keep` holds, else `no`."""
    return torch.full(keep.shape, no, dtype=dtype, device=keep.device).masked_fill_(keep, yes)


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


def extremes(t: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest element of every `size` elements along a dimension."""
    whole = t.shape[dim] // size * size
    out = []
    for pick in (torch.amin, torch.amax):
        parts = [pick(t.narrow(dim, 0, whole).unfold(dim, size, size), -1)] if whole else []
        if whole < t.shape[dim]:
            parts.append(pick(t.narrow(dim, whole, t.shape[dim] - whole), dim, keepdim=True))
        out.append(torch.cat(parts, dim) if len(parts) > 1 else parts[0])
    return out[0], out[1]


def corners(n: int, size: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every tile of `size`: its number, its first and its last coordinate."""
    number = axis(-(-n // size), after)
    return number, number * size, (number * size + (size - 1)).clamp(max=n - 1)


def batches(some: Tensor, size: int) -> list[tuple[int, int]]:
    """Ranges of the batch that share one plan: all of it, or each alone where their tiles differ too much."""
    if some.dim() < 4 or some.shape[0] == 1:
        return [(0, size)]
    one = some.any(1)
    if int(one.any(0).sum()) * size <= 1.25 * int(one.sum()):
        return [(0, size)]
    return [(z, z + 1) for z in range(size)]


def visits(
    some: Tensor, every: Tensor, alive: Tensor | None, queries: int, keys: int, tile_p: int, tile_m: int
) -> list[Block]:
    """The key slices of every query tile; consecutive tiles with equal slices are one block.

    `some`, `every`: bool, broadcast to [..., tiles of queries, tiles of keys]: is some point of the tile kept, are all?
    `alive`: bool [..., tiles of queries]: do all rows certainly keep a key? The others visit every tile (None: all do).
    """
    shape = (-(-queries // tile_p), -(-keys // tile_m))
    some = some.expand(*some.shape[:-2], *shape).reshape(-1, *shape).any(0)
    every = every.expand(*every.shape[:-2], *shape).reshape(-1, *shape).all(0)
    if alive is not None:
        some = some | ~alive.reshape(-1, shape[0]).all(0).unsqueeze(1)
    partial = (some & ~every).any(1).tolist()
    count = some.sum(1).tolist()
    order = torch.arange(shape[1], device="cpu")
    first = torch.where(some, order, shape[1]).amin(1).tolist()
    last = torch.where(some, order, -1).amax(1).tolist()
    plan: list[Block] = []
    for i, n in enumerate(count):
        p0, p1 = i * tile_p, min((i + 1) * tile_p, queries)
        width = last[i] - first[i] + 1
        if n == 0:
            runs: list[Run] = []
        elif 5 * n >= 4 * width:
            # a few empty tiles in between cost less than a second slice
            runs = [(first[i] * tile_m, min((last[i] + 1) * tile_m, keys), partial[i] or n < width)]
        else:
            runs = pieces(some[i].tolist(), every[i].tolist(), tile_m, keys)
        append(plan, p0, p1, tile_p, runs)
    return plan


def pieces(some: list[bool], every: list[bool], size: int, keys: int) -> list[Run]:
    """Consecutive visited tiles of one row of the map, as slices."""
    out: list[Run] = []
    for j, visited in enumerate(some):
        start, stop = j * size, min((j + 1) * size, keys)
        if visited and out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop, out[-1][2] or not every[j])
        elif visited:
            out.append((start, stop, not every[j]))
    return out


def append(plan: list[Block], p0: int, p1: int, size: int, runs: list[Run]) -> None:
    """Add a query tile to a plan; it joins the block before when its only slice lies as there."""
    if plan and len(runs) == 1 and p1 - p0 == size:
        q0, _, rows, before = plan[-1]
        if rows == size and len(before) == 1:
            (m0, m1, masked), (n0, n1, also) = before[0], runs[0]
            if (n0 - p0, n1 - p0, also) == (m0 - q0, m1 - q0, masked):
                plan[-1] = (q0, p1, size, before)
                return
    plan.append((p0, p1, p1 - p0, runs))


def whole(queries: int, keys: int, masked: bool) -> list[Block]:
    """The plan of a call too small for tiles: every query sees every key."""
    return [(0, queries, queries, [(0, keys, masked)])]


def single(plan: list[Block]) -> list[Block]:
    """The plan with one query tile a block."""
    return [
        (p, p + rows, rows, [(m0 + p - p0, m1 + p - p0, masked) for m0, m1, masked in runs])
        for p0, p1, rows, runs in plan
        for p in range(p0, p1, rows)
    ]


class Near:
    """What depends on key minus query alone: computed once for all tiles, and cut out for each as a view."""

    def __init__(self, plan: list[Block], make: Callable[[Tensor, Tensor], Tensor]) -> None:
        rows = max((size for _, _, size, _ in plan), default=1)
        places = [(m0 - p0, m1 - p0) for p0, _, _, runs in plan for m0, m1, _ in runs]
        self.least = min((a for a, _ in places), default=0)
        most = max((b for _, b in places), default=1)
        self.values = make(
            torch.arange(rows, device="cpu").unsqueeze(1), torch.arange(self.least, most, device="cpu")
        )  # fmt: skip

    def cut(self, p0: int, p1: int, m0: int, m1: int) -> Tensor:
        start = m0 - p0 - self.least
        return self.values[..., : p1 - p0, start : start + m1 - m0]


def four(t: Tensor, keys: int) -> Tensor:
    """What is added to the scores, with SDPA's four dimensions and one element a key."""
    t = t[(None,) * (4 - t.dim())]
    return t if t.shape[3] == keys else t.expand(-1, -1, -1, keys).contiguous()


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, plan: list[Block],
    added: Callable[[int, int, int, int], Tensor], empty: float = 0.0,
    finish: Callable[[Tensor, Tensor, int, int, int, int], Tensor] | None = None,
) -> None:  # fmt: skip
    """SDPA of every block of queries on its slices of the keys.

    `added(p0, p1, m0, m1)`: what the scores get; for a block of several tiles it is the same for each of them.
    `empty`: what a row without a key yields. `finish(o, lse, z0, z1, p0, p1)`: the end of those rows, if there is one.
    """
    for p0, p1, rows, runs in plan:
        if p1 - p0 > rows:
            folded(q, k, v, out, scale, (p0, p1, rows, runs[0]), added, empty, finish)
            continue
        if not runs:
            out[:, :, p0:p1] = empty
            continue
        if len(runs) == 1:
            keys, values = (t[:, :, runs[0][0] : runs[0][1]] for t in (k, v))
        else:
            keys, values = (torch.cat([t[:, :, m0:m1] for m0, m1, _ in runs], 2) for t in (k, v))
        mask = None
        if any(masked for _, _, masked in runs):
            parts = [four(added(p0, p1, m0, m1), m1 - m0) for m0, m1, _ in runs]
            mask = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
        o, lse = attend(q[:, :, p0:p1], keys, values, mask, scale, empty)
        out[:, :, p0:p1] = o if finish is None else finish(o, lse, 0, q.shape[0], p0, p1)


def folded(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, block: tuple[int, int, int, Run],
    added: Callable[[int, int, int, int], Tensor], empty: float,
    finish: Callable[[Tensor, Tensor, int, int, int, int], Tensor] | None,
) -> None:  # fmt: skip
    """Query tiles whose slices lie alike: the tiles become the batch, and overlapping slices of the keys are views."""
    p0, p1, rows, (m0, m1, masked) = block
    mask = four(added(p0, p0 + rows, m0, m1), m1 - m0) if masked else None
    count = max(1, FOLD_ROWS // rows)
    for z in range(q.shape[0]):
        for a in range(p0, p1, count * rows):
            n = min(count, (p1 - a) // rows)
            stop = a + n * rows
            queries = q[z, :, a:stop].unfold(1, rows, rows).permute(1, 0, 3, 2)
            # [n, H/G, m1 - m0, E]
            keys, values = (
                t[z, :, m0 + a - p0 : m1 + stop - rows - p0].unfold(1, m1 - m0, rows).permute(1, 0, 3, 2) for t in (k, v)
            )
            o, lse = attend(queries, keys, values, mask, scale, empty)
            if finish is None:
                out[z, :, a:stop].unfold(1, rows, rows).copy_(o.permute(1, 0, 3, 2))
            else:
                rejoined = o.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
                out[z, :, a:stop] = finish(rejoined[0][None], rejoined[1][None], z, z + 1, a, stop)[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, empty: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's CPU flash kernel: the output and the log-sum-exp of every row. It yields 0 for rows without a key."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None and empty != 0:
        o.masked_fill_((mask == -torch.inf).all(3, keepdim=True), empty)
    return o, lse
