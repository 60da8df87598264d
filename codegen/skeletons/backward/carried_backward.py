"""The gradients of steps of a carried matrix: one more triangular system, solved from its other end.

    forward    (I + A) N = X − W̃ S,    R = Q̃ S + P N,    S' = F S + Ũᵀ N              (codegen/skeletons/carried.py)
    backward   (I + A)ᵀ dX = Ũ dS' + Pᵀ dR,    dP = dR Nᵀ,    dA = −dX Nᵀ,    dS = F dS' + Q̃ᵀ dR − W̃ᵀ dX

No product of decays is divided by. The gradient of a logarithm is the sum of all pairs of steps that its step lies between.
What is not finite, forward or backward, is computed by steps, so that it reaches what it reaches there and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..carried import (
    BLOCK,
    SOLVED,
    Asked,
    block_products,
    by_channel,
    by_matrix,
    decays,
    finite,
    one_by_one,
    rows_of,
    solved,
)

Gradients = tuple[Tensor | None, ...]


def carried_trained(
    state: Tensor, factor: Tensor, write: Tensor, added: Tensor, read: Asked | None, queries: Sequence[Asked],
    logarithms: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """`carried`, with gradients of all tensors; `logarithms` may be of channels as well."""
    batch = state.shape[:-2]
    asked = [*queries, *([read] if read is not None else [])]
    after = tuple(x for _, x in asked)
    new, *out = CarriedSteps.apply(
        state.flatten(0, -3) if batch else state[None], rows_of(factor), rows_of(write), rows_of(added), logarithms,
        read is not None, after, *(rows_of(q) for q, _ in asked),
    )
    return new.view(state.shape), [o.view(*batch, *o.shape[1:]).movedim(-2, 0) for o in out]


class CarriedSteps(torch.autograd.Function):
    """Matrices [b, key, value] over n steps of rows [b, n, ·]: the matrices after them, and what each query reads."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, f: Tensor, u: Tensor, x: Tensor, logarithms: bool, takes: bool, after: tuple[bool, ...],
        *rows: Tensor,
    ) -> tuple[Tensor, ...]:
        asked = list(zip(rows, after))
        ctx.kinds = logarithms, takes, after
        shared = f.shape[-1] == 1
        if shared:
            between = decays(f, u.dtype, logarithms)
            pairs, old, ends, left = by_matrix(between, u, asked, state)
        else:
            between = f.exp() if logarithms else f
            pairs, old, ends, left = by_channel(between, u, asked, state)
        n = solved(pairs[-1], x - old[-1]) if takes else x
        out = [o.baddbmm_(p, n) for p, o in zip(pairs, old[: len(rows) - takes])]
        new = (left * state).baddbmm_(ends.mT, n)
        ctx.by_steps = not finite(new, *out)
        if ctx.by_steps:
            new, out = _by_steps(state, f, u, x, rows, *ctx.kinds)
            ctx.save_for_backward(state, f, u, x, *rows)
        else:
            ctx.save_for_backward(state, f, u, x, *rows, n, between, ends, left, *pairs)
        return new, *out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *flows: Tensor) -> tuple[Any, ...]:
        logarithms, takes, after = ctx.kinds
        saved = ctx.saved_tensors
        state, f, u, x = saved[:4]
        rows = saved[4 : 4 + len(after)]
        fades = ctx.needs_input_grad[1]
        if not ctx.by_steps and (f.shape[-1] == 1 or logarithms or not fades):
            made = saved[4 + len(after) :]
            way = matrix_gradients if f.shape[-1] == 1 else channel_gradients
            found = way(state, f, u, rows, takes, after, logarithms, fades, made, flows)
            if finite(*(g for g in found if g is not None)):
                d_state, d_f, d_u, d_x, *d_rows = found
                return d_state, d_f, d_u, d_x, None, None, None, *d_rows
        found = _gradients_by_steps(state, f, u, x, rows, ctx.kinds, flows)
        return *found[:4], None, None, None, *found[4:]


def _by_steps(
    state: Tensor, f: Tensor, u: Tensor, x: Tensor, rows: Sequence[Tensor], logarithms: bool, takes: bool,
    after: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    asked = list(zip(rows, after))
    factor = f.exp() if logarithms else f
    return one_by_one(state, factor, u, x, asked[-1] if takes else None, asked[: len(asked) - takes])


def _gradients_by_steps(
    state: Tensor, f: Tensor, u: Tensor, x: Tensor, rows: Sequence[Tensor], kinds: tuple[bool, bool, tuple[bool, ...]],
    flows: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients by steps one after the other, on a tape."""
    leaves = [y.detach().requires_grad_() for y in (state, f, u, x, *rows)]
    with torch.enable_grad():
        new, out = _by_steps(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4:], *kinds)
    return torch.autograd.grad((new, *out), leaves, flows, allow_unused=True)


def matrix_gradients(
    state: Tensor, f: Tensor, u: Tensor, rows: Sequence[Tensor], takes: bool, after: Sequence[bool], logarithms: bool,
    fades: bool, made: Sequence[Tensor], flows: Sequence[Tensor],
) -> Gradients:
    """One decay a matrix. `made` by the forward, `flows` into its results; gradients of state, f, u, x and rows."""
    n, between, ends, left, *pairs = made
    d_new, *d_out = flows
    d_n = ends @ d_new
    for p, d in zip(pairs, d_out):
        d_n.baddbmm_(p.mT, d)
    if takes:
        solved_from_behind(pairs[-1], d_n)
    reads = [*d_out, -d_n] if takes else d_out
    d_reads = torch.cat(reads, 1) if len(reads) > 1 else reads[0]
    steps = u.shape[1]
    low = [between[:, 1:] if x else between[:, :-1] for x in after]
    lows = torch.cat(low, 1) if len(low) > 1 else low[0]
    all_rows = torch.cat(tuple(rows), 1) if len(rows) > 1 else rows[0]
    d_pairs = d_reads @ n.mT
    if takes and after[-1]:
        # a step takes off what others before it wrote
        d_pairs[:, -steps:].tril_(-1)
    d_ends = n @ d_new.mT
    d_old = d_reads @ state.mT
    d_f: Tensor | None = None
    if fades:
        pairwise = torch.zeros_like(between)
        by_old = (d_old * all_rows).sum(-1)
        by_pairs = d_pairs * (torch.cat(pairs, 1) if logarithms else all_rows @ u.mT)
        for i, x in enumerate(after):
            own = slice(i * steps, (i + 1) * steps)
            place = pairwise[:, 1:] if x else pairwise[:, :-1]
            place[..., 0] += by_old[:, own] * (low[i][..., 0] if logarithms else 1.0)
            place[..., 1:] += by_pairs[:, own]
        pairwise[:, -1, 1:] += (d_ends * (ends if logarithms else u)).sum(-1)
        pairwise[:, -1, 0] += (d_new * state).sum((1, 2)) * (left[:, 0, 0] if logarithms else 1.0)
        d_f = of_logarithms(pairwise) if logarithms else of_factors(f, pairwise)
    # what was made of one decay each is not needed any more
    d_pairs *= lows[..., 1:]
    d_old *= lows[..., :1]
    d_reads = d_reads * lows[..., :1]
    d_u = (d_ends * between[:, -1, 1:, None]).baddbmm_(d_pairs.mT, all_rows)
    d_rows = d_old.baddbmm_(d_pairs, u)
    d_state = (left * d_new).baddbmm_(all_rows.mT, d_reads)
    return d_state, d_f, d_u, d_n, *d_rows.split(steps, 1)


def of_logarithms(pairwise: Tensor) -> Tensor:
    """The gradient of each step's logarithm [b, n, 1], of those of the logarithms of products over j < s ≤ i."""
    steps = pairwise.shape[1]
    ones = torch.ones(steps, steps, dtype=pairwise.dtype)
    # sums over i ≥ s, of which those with j < s are taken: nothing cancels
    return ((ones.triu() @ pairwise) * ones.tril(-1)).sum(-1)[:, 1:, None]


def of_factors(f: Tensor, pairwise: Tensor) -> Tensor:
    """The gradient of each step's factor, of those of the products over j < s ≤ i; a factor may be 0."""
    own = f.detach().requires_grad_()
    with torch.enable_grad():
        between = decays(own, pairwise.dtype, False)
    (found,) = torch.autograd.grad(between, own, pairwise)
    return found


def solved_from_behind(a: Tensor, x: Tensor) -> Tensor:
    """(I + A)⁻ᵀ X in the memory of X, of A [b, n, n] its strictly lower triangle alone; rows a block at a time."""
    n = a.shape[1]
    for first in reversed(range(0, n, SOLVED)):
        behind = min(first + SOLVED, n)
        rows = x[:, first:behind]
        if behind < n:
            rows.baddbmm_(a[:, behind:, first:behind].mT, x[:, behind:], alpha=-1)
        own = a[:, first:behind, first:behind]
        rows.copy_(torch.linalg.solve_triangular(own, rows.mT, upper=False, left=False, unitriangular=True).mT)
    return x


def channel_gradients(
    state: Tensor, f: Tensor, u: Tensor, rows: Sequence[Tensor], takes: bool, after: Sequence[bool], logarithms: bool,
    fades: bool, made: Sequence[Tensor], flows: Sequence[Tensor],
) -> Gradients:
    """The same where every channel has a decay of its own; f are logarithms where they have gradients."""
    n, decay, ends, left, *pairs = made
    d_new, *d_out = flows
    d_n = ends @ d_new
    for p, d in zip(pairs, d_out):
        d_n.baddbmm_(p.mT, d)
    if takes:
        solved_from_behind(pairs[-1], d_n)
    d_reads = torch.stack([*d_out, -d_n] if takes else d_out)
    d_pairs = d_reads @ n.mT
    if takes:
        # a step takes off what others before it wrote
        d_pairs[-1].tril_(-1)
    d_ends = n @ d_new.mT
    all_rows = torch.stack(tuple(rows))
    d_u, d_rows, d_state = of_channels(decay, u, all_rows, after, state, d_pairs, d_ends, d_reads)
    d_state += left * d_new
    d_f: Tensor | None = None
    if fades:
        # a product of decays times its own gradient is what it is multiplied with times that one's
        by_step = torch.zeros(u.shape[0], u.shape[1] + 1, u.shape[2], dtype=u.dtype)
        for x, y in zip(all_rows * d_rows, after):
            (by_step[:, 1:] if y else by_step[:, :-1]).add_(x)
        by_step[:, 1:] -= d_u * u
        by_step[:, -1] += (d_ends * ends).sum(1) + left[..., 0] * (d_new * state).sum(-1)
        d_f = by_step[:, 1:].flip(1).cumsum(1).flip(1)
    return d_state, d_f, d_u, d_n, *d_rows.unbind(0)


def of_channels(
    f: Tensor, u: Tensor, rows: Tensor, after: Sequence[bool], state: Tensor, d_pairs: Tensor, d_ends: Tensor,
    d_old: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u [b, n, k], rows [asked, b, n, k] and the state that is read, as `by_channel` computes with them."""
    (b, n, k), asked = u.shape, len(rows)
    blocks = -(-n // BLOCK)
    more = blocks * BLOCK - n
    whole_n = blocks * BLOCK

    def padded(x: Tensor, value: float = 0.0) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, more), value=value)

    faded = torch.stack([q * f if x else q for q, x in zip(rows, after)])
    fs, us = padded(f, 1.0).view(b, blocks, BLOCK, k), padded(u).view(b, blocks, BLOCK, k)
    own_rows = padded(faded).view(asked, b, blocks, BLOCK, k)
    before, behind, whole = block_products(fs)
    scaled, tails = own_rows * before, us * behind
    start = torch.ones_like(whole)
    for a in range(1, blocks):
        start[:, a] = start[:, a - 1] * whole[:, a - 1]
    ends = [tails[:, 0]]
    for a in range(1, blocks - 1):
        ends.append(torch.cat((ends[-1] * whole[:, a, None], tails[:, a]), 1))
    from_start = (scaled * start[:, :, None]).view(asked, b, whole_n, k)[:, :, :n]
    d_state = (from_start.mT @ d_old).sum(0)
    d_scaled = padded(d_old @ state.mT).view(asked, b, blocks, BLOCK, k) * start[:, :, None]
    pairs = torch.nn.functional.pad(d_pairs, (0, more, 0, more))
    d_tails, rest = torch.empty_like(tails), padded(d_ends)
    for a in reversed(range(1, blocks)):
        first = a * BLOCK
        d_tails[:, a] = rest[:, first:]
        here = pairs[:, :, first : first + BLOCK, :first]
        d_scaled[:, :, a] += here @ ends[a - 1]
        rest = rest[:, :first] * whole[:, a, None] + (here.mT @ scaled[:, :, a]).sum(0)
    d_tails[:, 0] = rest
    d_own, d_us = d_scaled * before, d_tails * behind
    within = pairs.view(asked, b, blocks, BLOCK, blocks, BLOCK).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    between = torch.ones_like(fs[:, :, 1:])
    for d in range(BLOCK - 1):
        if d:
            between = between[:, :, 1:] * fs[:, :, 1 : BLOCK - d]
        flow = within.diagonal(-(d + 1), -2, -1)[..., None]
        d_own[:, :, :, d + 1 :] += flow * (us[:, :, : BLOCK - 1 - d] * between)
        d_us[:, :, : BLOCK - 1 - d] += (flow * own_rows[:, :, :, d + 1 :]).sum(0) * between
    d_u, d_rows = d_us.view(b, whole_n, k)[:, :n], d_own.view(asked, b, whole_n, k)[:, :, :n]
    for i, x in enumerate(after):
        if x:
            # a step's own product has no decay
            own = d_pairs[i].diagonal(dim1=1, dim2=2)[..., None]
            d_rows[i].mul_(f).add_(own * u)
            d_u += own * rows[i]
    return d_u, d_rows, d_state


def side_by_side_trained(
    state: Tensor, factor: Tensor, write: Tensor, added: Tensor, queries: Sequence[Asked], logarithms: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """`side_by_side`, with gradients of all tensors."""
    n, (*batch, k), v = len(write), write.shape[1:], added.shape[-1]
    u = rows_of(write)
    f = factor.movedim(0, -1).reshape(len(u), -1, n)
    x = added.movedim(0, len(batch)).reshape(len(u), n, -1, v)
    new, *out = SideBySideSteps.apply(
        state.reshape(len(u), k, -1, v), f, u, x, logarithms, tuple(a for _, a in queries), *(rows_of(q) for q, _ in queries)
    )
    shape = added.shape[1:]
    back = [o.reshape(*batch, n, *shape[len(batch) :]).movedim(len(batch), 0) for o in out]
    return new.reshape(state.shape), back


class SideBySideSteps(torch.autograd.Function):
    """Matrices [b, key, group, value] over n steps under factors [b, group, n] and rows [b, n, ·] that a group shares."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, f: Tensor, u: Tensor, x: Tensor, logarithms: bool, after: tuple[bool, ...], *rows: Tensor
    ) -> tuple[Tensor, ...]:
        b, k, groups = state.shape[:3]
        n = u.shape[1]
        between = decays(f.reshape(-1, n, 1), u.dtype, logarithms).view(b, groups, n + 1, n + 1)
        flat = state.reshape(b, k, -1)
        new = (state * between[:, None, :, -1, 0, None]).flatten(2)
        new.baddbmm_(u.mT, (x * between[:, :, -1, 1:, None].transpose(1, 2)).flatten(2))
        out = []
        for q, y in zip(rows, after):
            low = between[:, :, 1:] if y else between[:, :, :-1]
            given = (q @ flat).view(x.shape).mul_(low[..., :1].transpose(1, 2))
            pairs = (q @ u.mT)[:, None] * low[..., 1:]
            for o, p, z in zip(given, pairs, x):
                o.transpose(0, 1).baddbmm_(p, z.transpose(0, 1))
            out.append(given)
        ctx.kinds, ctx.by_steps = (logarithms, after), not finite(new, *out)
        if ctx.by_steps:
            new, out = _apart(state, f, u, x, rows, logarithms, after)
        ctx.save_for_backward(state, f, u, x, *rows, *([] if ctx.by_steps else [between]))
        return new.reshape(state.shape), *out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *flows: Tensor) -> tuple[Any, ...]:
        logarithms, after = ctx.kinds
        saved = ctx.saved_tensors
        state, f, u, x = saved[:4]
        rows = saved[4 : 4 + len(after)]
        if not ctx.by_steps:
            found = group_gradients(state, f, u, x, rows, after, logarithms, ctx.needs_input_grad[1], saved[-1], flows)
            if finite(*(g for g in found if g is not None)):
                return *found[:4], None, None, *found[4:]
        leaves = [y.detach().requires_grad_() for y in (state, f, u, x, *rows)]
        with torch.enable_grad():
            new, out = _apart(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4:], logarithms, after)
        found = torch.autograd.grad((new, *out), leaves, flows, allow_unused=True)
        return *found[:4], None, None, *found[4:]


def _apart(
    state: Tensor, f: Tensor, u: Tensor, x: Tensor, rows: Sequence[Tensor], logarithms: bool, after: Sequence[bool]
) -> tuple[Tensor, list[Tensor]]:
    """Step by step, each matrix of a group by itself."""
    b, k, groups, v = state.shape
    n = u.shape[1]
    asked = [(q.repeat_interleave(groups, 0), y) for q, y in zip(rows, after)]
    factor = f.reshape(-1, n, 1)
    last, read = one_by_one(
        state.transpose(1, 2).flatten(0, 1), factor.exp() if logarithms else factor, u.repeat_interleave(groups, 0),
        x.transpose(1, 2).flatten(0, 1), None, asked,
    )
    return last.view(b, groups, k, v).transpose(1, 2), [r.view(b, groups, n, v).transpose(1, 2) for r in read]


def group_gradients(
    state: Tensor, f: Tensor, u: Tensor, x: Tensor, rows: Sequence[Tensor], after: Sequence[bool], logarithms: bool,
    fades: bool, between: Tensor, flows: Sequence[Tensor],
) -> Gradients:
    """The gradients of state, f, u, x and rows where matrices of a group share u and rows."""
    b, k = state.shape[:2]
    d_new, *d_out = flows
    flat, d_flat = state.reshape(b, k, -1), d_new.reshape(b, k, -1)
    last = between[:, :, -1, 1:].transpose(1, 2)[..., None]
    d_written = (u @ d_flat).view(x.shape)
    d_x = d_written * last
    d_u = (x * last).flatten(2) @ d_flat.mT
    d_state = d_new * between[:, None, :, -1, 0, None]
    pairwise = torch.zeros_like(between) if fades else None
    d_rows = []
    for q, y, d in zip(rows, after, d_out):
        low = between[:, :, 1:] if y else between[:, :, :-1]
        old, raw = low[..., :1].transpose(1, 2), q @ u.mT
        d_pairs = torch.stack([o.transpose(0, 1) @ z.permute(1, 2, 0) for o, z in zip(d, x)])
        pairs = raw[:, None] * low[..., 1:]
        for g, p, o in zip(d_x, pairs, d):
            g.transpose(0, 1).baddbmm_(p.mT, o.transpose(0, 1))
        if pairwise is not None:
            place = pairwise[:, :, 1:] if y else pairwise[:, :, :-1]
            place[..., 1:] += d_pairs * (pairs if logarithms else raw[:, None])
            by_old = ((q @ flat).view(x.shape) * d).sum(-1).transpose(1, 2)
            place[..., 0] += by_old * (low[..., 0] if logarithms else 1.0)
        faded = (d * old).flatten(2)
        d_raw = (d_pairs * low[..., 1:]).sum(1)
        d_rows.append((faded @ flat.mT).baddbmm_(d_raw, u))
        d_u.baddbmm_(d_raw.mT, q)
        d_state += (q.mT @ faded).view(d_state.shape)
    d_f: Tensor | None = None
    if pairwise is not None:
        by_last = (d_written * x).sum(-1).transpose(1, 2)
        pairwise[:, :, -1, 1:] += by_last * (between[:, :, -1, 1:] if logarithms else 1.0)
        pairwise[:, :, -1, 0] += (d_new * state).sum((1, 3)) * (between[:, :, -1, 0] if logarithms else 1.0)
        each = pairwise.flatten(0, 1)
        d_f = of_logarithms(each) if logarithms else of_factors(f.reshape(-1, u.shape[1], 1), each)
        d_f = d_f.view(f.shape)
    return d_state, d_f, d_u, d_x, *d_rows
