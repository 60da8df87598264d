"""The CPU's loop for any score and row rule: two products around the printed program, with carried row state.

    for every tile of queries:  acc, state = 0, start
        for each slice of its keys:  w, c, state = update(q·k, state);  acc = c·acc + w·v
        out = finish(acc, state)

No more than a slice of the scores of a few heads exists at a time, so that it stays in the cache. `selected` is the same
over the keys that each row names, gathered, instead of slices of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...cost_model.time import cpu_tiles
from .cpu import Block, Run

# The longest slice of keys, and scores in flight for each thread.
SLICE = cpu_tiles.SLICE
SCORES = cpu_tiles.SCORES
# Elements of keys that are gathered at once, and the most rows that share a turn.
GATHERED = cpu_tiles.GATHERED
GATHERED_ROWS = cpu_tiles.GATHERED_ROWS

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


def whole_rows(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, out: Tensor, batch: tuple[int, int], plan: list[Block],
    weigh: Callable[[list[Tensor], At], tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]],
    finish: Callable[[Tensor, tuple[Tensor, ...], At], Tensor], keep: Callable[[tuple[Tensor, ...], At], None],
) -> None:
    """Compute `out` [Z, H, P, F] as `stream` does, with all that a row sees at once, and let `keep` have its scores.

    `weigh(products, at)`: the weights, the row's reductions and what `keep` gets. A tile is so small that the scores of
    whole rows stay in the cache.
    """
    group, keys = out.shape[1] // v.shape[1], v.shape[2]
    if any(b.stop - b.start > 2 * b.rows for b in plan):
        # read more than twice: the elements of a key side by side, one key after the other
        pairs, v = [(q, k.contiguous()) for q, k in pairs], v.contiguous()
    for p0, p1, runs in row_tiles(plan):
        seen = slice(min(r[0] for r in runs), max(r[1] for r in runs)) if runs else slice(0, keys)
        for z, h in head_groups(batch, out.shape[1], group, (p1 - p0) * (seen.stop - seen.start)):
            at = At(z, h, slice(p0, p1), seen)
            shape = (z.stop - z.start, h.stop - h.start, p1 - p0)
            shared = slice(h.start // group, h.stop // group)
            near = (shape[0], shape[1] // group, group * shape[2])
            scores = [(q[z, h, at.p].reshape(*near, -1) @ k[z, shared, at.m].mT).view(*shape, -1) for q, k in pairs]
            w, rows, more = weigh(scores, at)
            part = (w.expand(*shape, seen.stop - seen.start).reshape(*near, -1) @ v[z, shared, at.m]).view(*shape, -1)
            out[z, h, at.p] = finish(part, rows, at)
            keep(more, at)


def summed(total: Tensor, part: Tensor, at: At, group: int) -> None:
    """Add the weights [z, h, p, m] of some heads to the sums [Z, H / group, P, M] over groups of heads."""
    for g in range(at.h.start // group, (at.h.stop - 1) // group + 1):
        into = total[at.z, g, at.p, at.m]
        for h in range(max(g * group, at.h.start), min((g + 1) * group, at.h.stop)):
            # what has one number a row has it at every key
            into += part[:, h - at.h.start]


def outside(hidden: Tensor, at: At, keys: int) -> Iterator[At]:
    """The keys beside those of a tile, where what rows have there is not 0."""
    if bool((hidden != 0).any()):
        yield from (at._replace(m=slice(*m)) for m in ((0, at.m.start), (at.m.stop, keys)) if m[0] < m[1])


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


def selected(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, out: Tensor, slots: Tensor, first: int, places: int, block: int,
    real: torch.dtype, start: Sequence[float], score: Callable[[list[Tensor], At, Tensor, Tensor], Tensor],
    take: Callable[[Tensor, State, At], tuple[Tensor, Tensor | None, State]],
    finish: Callable[[Tensor, State, At], Tensor], least: float,
    plain: Callable[[Sequence[tuple[Tensor, Tensor]], Tensor, Tensor, int, Block], None],
) -> None:
    """Compute `out` [Z, H, P, F] where each row reads the keys that its slots [Z, S, P, J] name, S dividing H.

    Operands as in `stream`; they are gathered as they are and computed with as `real`. An index stands for `block` keys, of
    `places` such blocks behind the `first` keys, which all rows read. `score(products, at, keys, there)` gets the keys
    [1, 1, rows, ·] and which of them count, `take(score, state, at)` takes the scores into the state. Where those of a row
    are all below `least`, other keys may count beside them: `plain(pairs, v, out, z, rows)` computes such rows as written.
    """
    queries, keys = out.shape[2], v.shape[2]
    # where values are keys, as latents are, they are gathered once
    twin = next((i for i, (_, k) in enumerate(pairs) if alike(k, v)), -1)
    width = max(first + slots.shape[3] * block, 1)
    wide = max([v.shape[3], *(k.shape[3] for _, k in pairs)])
    rows = max(1, min(GATHERED_ROWS, GATHERED * torch.get_num_threads() // (width * wide)))
    if queries * width >= keys:
        # read more than once: the elements of a key side by side
        pairs, v = [(q, k.contiguous()) for q, k in pairs], v.contiguous()
    pairs = [(q, v if i == twin else k) for i, (q, k) in enumerate(pairs)]
    together = out.shape[1] // slots.shape[1]
    for z in range(out.shape[0]):
        for p0 in range(0, queries, rows):
            at = At(slice(z, z + 1), slice(0, 0), slice(p0, min(p0 + rows, queries)), slice(0, 0))
            named = [named_keys(s, first, places, block, keys) for s in slots[z, :, at.p]]
            heads = [slice(h, h + together) for h in range(0, out.shape[1], together)]
            for h, (m, there) in zip(heads, named):
                if not group_selected(pairs, v, out, at._replace(h=h), m, there, real, start, score, take, finish, least):
                    plain(pairs, v, out, z, Block(p0, at.p.stop, at.p.stop - p0, [Run(0, keys, True)]))
                    break


def named_keys(slots: Tensor, first: int, places: int, block: int, keys: int) -> tuple[Tensor, Tensor]:
    """The keys [1, 1, rows, first + J·block] that rows read, and which count: each once, and none that is not there.

    In order, so that one named again lies beside itself, and neighbours are read together.
    """
    index = slots.sort(-1).values.long()
    there = (index >= 0) & (index < places)
    there[:, 1:] &= index[:, 1:] != index[:, :-1]
    m = index.clamp(0, max(places - 1, 0))
    if block > 1:
        m = (m.unsqueeze(-1) * block + torch.arange(block, device=m.device)).flatten(-2)
        there = there.unsqueeze(-1).expand(*there.shape, block).flatten(-2)
    if first:
        before = torch.arange(first, device=m.device).expand(len(m), first)
        m, there = torch.cat([before, m + first], -1), torch.cat([before >= 0, there], -1)
    there = there & (m < keys)
    return m.clamp(max=keys - 1)[None, None], there[None, None]


def group_selected(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, out: Tensor, at: At, m: Tensor, there: Tensor, real: torch.dtype,
    start: Sequence[float], score: Callable[[list[Tensor], At, Tensor, Tensor], Tensor],
    take: Callable[[Tensor, State, At], tuple[Tensor, Tensor | None, State]],
    finish: Callable[[Tensor, State, At], Tensor], least: float,
) -> bool:
    """The rows `at` of heads with the same keys, as many key heads at a time as the cache holds; or no, where a row's scores
    are all below `least`."""
    z, group, together = at.z.start, out.shape[1] // v.shape[1], at.h.stop - at.h.start
    count, width, index = m.shape[2], m.shape[3], m.reshape(-1)
    wide = max([v.shape[3], *(k.shape[3] for _, k in pairs)])
    few = max(1, GATHERED * torch.get_num_threads() // (count * width * wide))
    # whole groups of heads that share keys, or a part of one
    step = group * min(few, together // group) if together % group == 0 else math.gcd(group, together)
    for h in range(at.h.start, at.h.stop, step):
        here = at._replace(h=slice(h, min(h + step, at.h.stop)))
        heads = here.h.stop - h
        shared = slice(h // group, (here.h.stop - 1) // group + 1)
        many = shared.stop - shared.start
        # heads that share keys lie below one another: [key heads, rows, heads / key heads, ·]
        scores, values = [], None
        for q, k in pairs:
            far = gathered(k[z, shared], index, real).view(many, count, width, -1)
            values = far if k is v else values
            near = q[z, here.h, at.p].to(real).unflatten(0, (many, -1)).transpose(1, 2)
            scores.append((near @ far.mT).transpose(1, 2).reshape(1, heads, count, width))
        x = score(scores, here, m, there)
        if least > -torch.inf and not bool((x.amax(-1) >= least).all()):
            return False
        state: State = tuple(torch.full((1, heads, count, 1), y, dtype=real, device=v.device) for y in start)
        w, _, state = take(x, state, here)
        w = w.expand(1, heads, count, width).reshape(many, heads // many, count, width).transpose(1, 2)
        if values is None:
            values = gathered(v[z, shared], index, real).view(many, count, width, -1)
        acc = w @ values
        out[here.z, here.h, at.p] = finish(acc.transpose(1, 2).reshape(1, heads, count, -1), state, here)
    return True


def alike(a: Tensor, b: Tensor) -> bool:
    """Are two tensors the same elements of the same memory?"""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def gathered(t: Tensor, index: Tensor, real: torch.dtype) -> Tensor:
    """Keys of some heads [heads, M, E] at these indices, as `real`."""
    # torch copies rows whole where they are the first dimension
    found = t[0].index_select(0, index).unsqueeze(0) if len(t) == 1 else t.index_select(1, index)
    return found.to(real)
