"""The CPU's loop for the gradients of any score and row rule: five products around the printed derivatives.

    for every tile of queries:  acc, rows = begin(tile);  rows = end(rows)
        for each slice of its keys:  w, dx = update(q·k, acc·v, rows)
            dv += wᵀ·acc;   dk += dxᵀ·q;   dq += dx·k

One walk serves all three: the gradients of keys and values gather in memory of their own, in the order of the walk, so that
sums are the same every time. Heads that share keys lie below one another, so that their sums are part of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cpu import Block
from ..cpu_product import SLICE, At, head_groups, row_tiles, slices


def walk(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, rows: int, batch: tuple[int, int], plan: list[Block],
    flow: tuple[Sequence[Tensor], Sequence[Tensor], Tensor], begin: Callable[[At], tuple[Tensor, tuple[Tensor, ...]]],
    exchanged: Callable[[list[Tensor], Tensor, tuple[Tensor, ...], At, bool], Tensor] | None,
    end: Callable[[At, tuple[Tensor, ...]], None] | None,
    update: Callable[[list[Tensor], Tensor, tuple[Tensor, ...], At, bool], tuple[Tensor, tuple[Tensor, ...]]],
) -> None:
    """Add the gradients of queries, keys and values to `flow`, over a range of the batch along its plan.

    `pairs`: operands of the products, [Z, H, P, E] and [Z, H/G, M, E]; `rows`: the heads H. `begin(at)`: what reaches the
    product with the values, and scalars of the rows, δ the last. `exchanged(products, dW, scalars, at, masked)`: weight·dW,
    where the sum of these is more exact a δ than the output, which was rounded, tells. `end(at, scalars)`: is told of rows.
    `update(products, dW, scalars, at, masked)`: the weight, and each product's gradient.
    """
    group = rows // v.shape[1]
    dq, dk, dv = flow
    for p0, p1, runs in row_tiles(plan):
        widest = min(SLICE, max((stop - start for start, stop, _ in runs), default=1))
        for z, h in head_groups(batch, rows, group, (p1 - p0) * widest):
            at = At(z, h, slice(p0, p1), slice(0, 0))
            shape = (z.stop - z.start, h.stop - h.start, p1 - p0)
            below = (shape[0], shape[1] // group, group * shape[2])
            shared = slice(h.start // group, h.stop // group)
            acc, scalars = begin(at)
            acc = acc.expand(*shape, v.shape[3]).reshape(*below, -1)
            queries = [q[z, h, at.p].reshape(*below, -1) for q, _ in pairs]
            sides = [*((q, k[z, shared]) for q, (_, k) in zip(queries, pairs)), (acc, v[z, shared])]
            if exchanged is not None:
                total = torch.zeros((*shape, 1), dtype=v.dtype, device=v.device)
                for m0, m1, masked in slices(runs):
                    at = at._replace(m=slice(m0, m1))
                    *scores, back = products(sides, at.m, shape)
                    total += exchanged(scores, back, scalars, at, masked).sum(-1, keepdim=True)
                scalars = (*scalars[:-1], total)
            if end is not None:
                end(at, scalars)
            for m0, m1, masked in slices(runs):
                at = at._replace(m=slice(m0, m1))
                *scores, back = products(sides, at.m, shape)
                w, parts = update(scores, back, scalars, at, masked)
                dv[z, shared, at.m] += spread(w, back).reshape(*below, -1).mT @ acc
                for i, (part, query, (_, k)) in enumerate(zip(parts, queries, pairs)):
                    dx = spread(part, back).reshape(*below, -1)
                    dq[i][z, h, at.p] += (dx @ k[z, shared, at.m]).view(*shape, -1)
                    dk[i][z, shared, at.m] += dx.mT @ query


def products(sides: Sequence[tuple[Tensor, Tensor]], m: slice, shape: tuple[int, int, int]) -> list[Tensor]:
    """The products of rows with a slice of keys, or of values."""
    return [(x @ y[:, :, m].mT).view(*shape, m.stop - m.start) for x, y in sides]


def spread(part: Tensor | float, like: Tensor) -> Tensor:
    """What is the same for some rows or keys of a tile, for each of them; a number is so for all."""
    return part.expand(like.shape) if isinstance(part, Tensor) else like.new_full(like.shape, part)


def reduced(part: Tensor, dims: Sequence[int], order: Sequence[int]) -> Tensor:
    """A tile of a gradient as the part of a tensor: summed over dimensions that it lacks, the others in its order."""
    # torch copies where it sums over one
    over = tuple(d for d in dims if part.shape[d] != 1)
    part = part.sum(over, keepdim=True) if over else part
    return part.permute(*order, *dims).reshape([part.shape[d] for d in order])


def gather(total: Tensor, part: Tensor, at: Sequence[Tensor | int]) -> None:
    """total[at] += part, summed over all of a tile that reads one element, in the same order every time."""
    place = torch.zeros((1,) * part.dim(), dtype=torch.int64, device=part.device)
    for i, step in zip(at, total.stride()):
        place = place + i * step
    part = part.sum_to_size(place.shape)
    total.view(-1).index_add_(0, place.reshape(-1), part.reshape(-1))
