"""The CPU's loop for any score and row rule: two products around the printed program, with carried row state.

    for every tile of queries:  acc, state = 0, start
        for each slice of its keys:  w, c, state = update(q·k, state);  acc = c·acc + w·v
        out = finish(acc, state)

No more than a slice of the scores of a few heads exists at a time, so that it stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...cost_model.time import cpu_tiles
from .cpu import Block

# The longest slice of keys, and scores in flight for each thread.
SLICE = cpu_tiles.SLICE
SCORES = cpu_tiles.SCORES

State = tuple[Tensor, ...]


class At(NamedTuple):
    """Where a tile of scores lies: ranges of the batch, of heads, queries and keys."""

    z: slice
    h: slice
    p: slice
    m: slice


def stream(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, out: Tensor, batch: tuple[int, int], plan: list[Block],
    start: Sequence[float], update: Callable[[list[Tensor], State, At, bool], tuple[Tensor, Tensor | None, State]],
    finish: Callable[[Tensor, State, At], Tensor],
) -> None:
    """Compute `out` [Z, H, P, F] over a range of the batch along its plan.

    `pairs`: operands of the products, [Z, H, P, E] and [Z, H/G, M, E]. `start`: what each part of the state holds at
    first. `update(products, state, at, masked)`: weight, correction of what was summed before, new state.
    `finish(acc, state, at)`: the rows' output.
    """
    group = out.shape[1] // v.shape[1]
    for p0, p1, runs in row_tiles(plan):
        widest = min(SLICE, max((stop - begin for begin, stop, _ in runs), default=1))
        for z, h in head_groups(batch, out.shape[1], group, (p1 - p0) * widest):
            at = At(z, h, slice(p0, p1), slice(0, 0))
            shape = (z.stop - z.start, h.stop - h.start, p1 - p0)
            shared = slice(h.start // group, h.stop // group)
            # heads that share keys lie below one another: [z, heads / group, group · rows, E]
            queries = [q[z, h, at.p].reshape(shape[0], shape[1] // group, group * shape[2], -1) for q, _ in pairs]
            state: State = tuple(torch.full((*shape, 1), x, dtype=v.dtype, device=v.device) for x in start)
            acc: Tensor | None = None
            for m0, m1, masked in slices(runs):
                at = at._replace(m=slice(m0, m1))
                scores = [(q @ k[z, shared, at.m].mT).view(*shape, m1 - m0) for q, (_, k) in zip(queries, pairs)]
                w, c, state = update(scores, state, at, masked)
                w = w.expand(*shape, m1 - m0).reshape(*queries[0].shape[:3], m1 - m0)
                part = (w @ v[z, shared, at.m]).view(*shape, -1)
                acc = part if acc is None else acc + part if c is None else torch.addcmul(part, acc, c)
            if acc is None:
                acc = v.new_zeros((*shape, v.shape[3]))
            out[z, h, at.p] = finish(acc, state, at)


def row_tiles(plan: list[Block]) -> Iterator[tuple[int, int, list[tuple[int, int, bool]]]]:
    """Every query tile of a plan with its slices."""
    for b in plan:
        for p in range(b.start, b.stop, b.rows):
            yield p, min(p + b.rows, b.stop), [(r.start + p - b.start, r.stop + p - b.start, r.masked) for r in b.runs]


def slices(runs: list[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    """Runs cut into slices of at most SLICE keys."""
    for start, stop, masked in runs:
        for m in range(start, stop, SLICE):
            yield m, min(m + SLICE, stop), masked


def head_groups(batch: tuple[int, int], heads: int, group: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of batch and heads whose scores fit the cache together; heads that share keys stay together."""
    room = max(1, SCORES * torch.get_num_threads() // max(scores, 1))
    if room >= (batch[1] - batch[0]) * heads:
        yield slice(*batch), slice(0, heads)
        return
    step = max(group, min(heads, room) // group * group)
    for z in range(*batch):
        for h in range(0, heads, step):
            yield slice(z, z + 1), slice(h, min(h + step, heads))
