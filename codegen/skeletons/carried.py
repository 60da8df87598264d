"""Steps of a carried matrix at once: what each step adds follows from one triangular system, and no decay is divided by.

    S_t = f_t · S_{t−1} + u_t (x_t − w_tᵀ S_{t−1})ᵀ,    R_t = q_tᵀ S_t or q_tᵀ S_{t−1}            for n steps

    n_i = x_i − w_iᵀ S_{i−1}:  (I + A) N = X − (W ∘ F) S,  A_ij = Σ_k w_ik u_jk Π_{j<s<i} f_s    for j < i
    R   = (Q ∘ F) S + P N,     S' = F_n ∘ S + (U ∘ F_n/F_j)ᵀ N        every product of decays is of those between two steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Steps of a block within which decays of each channel are multiplied pair by pair.
BLOCK = 8
# Rows of a triangular system that are solved for at once: of more a solver does not get faster, and products do the rest.
SOLVED = 32
# The least logarithm of a decay whose differences are still told apart; its exponential is 0 in any type.
LEAST = -1e4
# A row for each step [n, *batch, key] or [batch, n, key], and whether its own step's decay is under what it reads.
Asked = tuple[Tensor, bool]


def carried(
    state: Tensor, factor: Tensor, write: Tensor, added: Tensor, read: Asked | None, queries: Sequence[Asked],
    logarithms: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The state [*batch, key, value] after n steps, and what each query reads, [n, *batch, value].

    factor [n, *batch, key or 1], or its `logarithms`, one a matrix; write [n, *batch, key], added [n, *batch, value]; read
    and queries are rows [n, *batch, key], each with whether its own step's decay is under what it reads: a query then reads
    after its step.
    """
    batch = state.shape[:-2]
    flat = state.flatten(0, -3) if batch else state[None]
    f, u, x = rows_of(factor), rows_of(write), rows_of(added)
    asked = [(rows_of(q), after) for q, after in (*queries, *([read] if read is not None else []))]
    if f.shape[-1] == 1:
        pairs, old, ends, left = by_matrix(decays(f, u.dtype, logarithms), u, asked, flat)
    else:
        pairs, old, ends, left = by_channel(f, u, asked, flat)
    if read is not None:
        x = solved(pairs[-1], x - old[-1])
    out = [o.baddbmm_(p, x) for p, o in zip(pairs, old[: len(queries)])]
    new = (left * flat).baddbmm_(ends.mT, x)
    if not finite(new, *out):
        # in the products above what is not finite reaches the steps before it
        rows = asked[: len(queries)]
        taken = asked[-1] if read is not None else None
        new, out = one_by_one(flat, f.exp() if logarithms else f, u, rows_of(added), taken, rows)
    return new.view(state.shape), [o.view(*batch, *o.shape[1:]).movedim(-2, 0) for o in out]


def side_by_side(
    state: Tensor, factor: Tensor, write: Tensor, added: Tensor, queries: Sequence[Asked], logarithms: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The same of matrices that share what they are written and read by, their values side by side; nothing is taken off.

    state [*batch, key, *group, value], factor [n, *batch, *group], write and queries [n, *batch, key],
    added [n, *batch, *group, value]; what is read is as `added`.
    """
    n, (*batch, k), v, f = len(write), write.shape[1:], added.shape[-1], factor.movedim(0, -1).unsqueeze(-1)
    u = rows_of(write)
    x = added.movedim(0, len(batch)).reshape(len(u), n, -1, v)
    between = decays(f.reshape(-1, n, 1), u.dtype, logarithms).view(len(u), -1, n + 1, n + 1)
    flat = state.reshape(len(u), k, -1)
    new = (flat.view(len(u), k, -1, v) * between[:, None, :, -1, 0, None]).flatten(2)
    new.baddbmm_(u.mT, (x * between[:, :, -1, 1:, None].transpose(1, 2)).flatten(2))
    out = []
    for query, after in queries:
        q, low = rows_of(query), between[:, :, 1:] if after else between[:, :, :-1]
        given = (q @ flat).view(x.shape).mul_(low[..., :1].transpose(1, 2))
        pairs = (q @ u.mT)[:, None] * low[..., 1:]
        for o, p, y in zip(given, pairs, x):
            o.transpose(0, 1).baddbmm_(p, y.transpose(0, 1))
        out.append(given)
    if not finite(new, *out):
        rows = [(rows_of(q).repeat_interleave(x.shape[2], 0), after) for q, after in queries]
        apart = flat.view(len(u), k, -1, v).transpose(1, 2).flatten(0, 1)
        f, u = f.reshape(-1, n, 1), u.repeat_interleave(x.shape[2], 0)
        last, read = one_by_one(apart, f.exp() if logarithms else f, u, x.transpose(1, 2).flatten(0, 1), None, rows)
        u = rows_of(write)
        new, out = last.view(len(u), -1, k, v).transpose(1, 2), [r.view(len(u), -1, n, v).transpose(1, 2) for r in read]
    shape = added.shape[1:]
    return new.reshape(state.shape), [o.reshape(*batch, n, *shape[len(batch) :]).movedim(len(batch), 0) for o in out]


def solved(a: Tensor, x: Tensor) -> Tensor:
    """(I + A)⁻¹ X in the memory of X, of A [b, n, n] its strictly lower triangle alone; rows a block at a time."""
    for first in range(0, a.shape[1], SOLVED):
        rows = x[:, first : first + SOLVED]
        behind = first + rows.shape[1]
        if first:
            rows.baddbmm_(a[:, first:behind, :first], x[:, :first], alpha=-1)
        # from the right, which reads and writes rows as they lie
        own = a[:, first:behind, first:behind].mT
        rows.copy_(torch.linalg.solve_triangular(own, rows.mT, upper=True, left=False, unitriangular=True).mT)
    return x


def rows_of(x: Tensor) -> Tensor:
    """[n, *batch, width] as [batch, n, width]."""
    moved = x.movedim(0, -2)
    return moved.flatten(0, -3) if moved.dim() > 2 else moved[None]


def finite(*values: Tensor) -> bool:
    """Whether all are; a sum may overflow where they are, which costs time alone."""
    return math.isfinite(sum(float(v.sum()) for v in values))


def by_matrix(
    between: Tensor, u: Tensor, asked: Sequence[Asked], state: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """One decay a matrix: pairs of rows, what each reads of the state, what each step leaves at the end, all decays.

    `between`: the products of decays, as `decays` gives them.
    """
    n = u.shape[1]
    after = [x for _, x in asked]
    if all(after) or not any(after):
        low = (between[:, 1:] if after[0] else between[:, :-1])[:, None]
    else:
        low = torch.stack([between[:, 1:] if x else between[:, :-1] for x in after], 1)
    rows = torch.cat([q for q, _ in asked], 1) if len(asked) > 1 else asked[0][0]
    pairs = (rows @ u.mT).unflatten(1, (len(asked), n)).mul_(low[..., 1:])
    old = (rows @ state).unflatten(1, (len(asked), n)).mul_(low[..., :1])
    return list(pairs.unbind(1)), list(old.unbind(1)), u * between[:, -1, 1:, None], between[:, -1:, :1]


def decays(f: Tensor, dtype: torch.dtype, logarithms: bool) -> Tensor:
    """[b, n + 1, n + 1]: the product of f_s over j < s ≤ i, for i and j from 0 to n; of f [b, n, 1] or its logarithms."""
    b, n, _ = f.shape
    if logarithms:
        total = torch.zeros(b, n + 1, dtype=torch.float64)
        total[:, 1:] = (f[..., 0].double() * (1 / math.log(2))).clamp_(min=LEAST)
        total.cumsum_(1)
        # where no product is asked for it may be infinite
        return (total[:, :, None] - total[:, None]).to(dtype).exp2_().tril_()
    between = torch.ones(b, n + 1, n + 1, dtype=torch.float64)
    between[:, 1:] = f.double()
    return torch.where(torch.ones(n + 1, n + 1, dtype=torch.bool).tril(-1), between, 1.0).cumprod(1).tril().to(dtype)


def by_channel(
    f: Tensor, u: Tensor, asked: Sequence[Asked], state: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The same where every channel has a decay of its own: pair by pair in a block, as products of rows between blocks."""
    b, n, k = u.shape
    blocks = -(-n // BLOCK)
    f, f_rest = f.to(u.dtype), blocks * BLOCK - n
    f, u = (torch.nn.functional.pad(x, (0, 0, 0, f_rest), value=v) for x, v in ((f, 1.0), (u, 0.0)))
    own = [(q * u[:, :n]).sum(-1) for q, _ in asked]
    rows = torch.stack([q * f[:, :n] if after else q for q, after in asked])
    rows = torch.nn.functional.pad(rows, (0, 0, 0, f_rest)).view(len(asked), b, blocks, BLOCK, k)
    f, u = f.view(b, blocks, BLOCK, k), u.view(b, blocks, BLOCK, k)
    pairs = u.new_zeros(len(asked), b, blocks * BLOCK, blocks * BLOCK)
    within = pairs.view(len(asked), b, blocks, BLOCK, blocks, BLOCK).diagonal(dim1=2, dim2=4).movedim(-1, 2)
    in_block(f, u, rows, within)
    before, behind, whole = block_products(f)
    rows = rows * before
    tails = u * behind
    ends = tails[:, 0]
    for a in range(1, blocks):
        first = a * BLOCK
        pairs[:, :, first : first + BLOCK, :first] = rows[:, :, a] @ ends.mT
        ends = torch.cat((ends * whole[:, a, None], tails[:, a]), 1)
    start = torch.ones_like(whole)
    for a in range(1, blocks):
        start[:, a] = start[:, a - 1] * whole[:, a - 1]
    scaled_rows = (rows * start[:, :, None]).flatten(2, 3)[:, :, :n]
    out = [p[:, :n, :n] for p in pairs]
    for (_, after), p, d in zip(asked, out, own):
        if after:
            p.diagonal(dim1=1, dim2=2).copy_(d)
    return out, [r @ state for r in scaled_rows], ends[:, :n], (start[:, -1] * whole[:, -1])[..., None]


def in_block(f: Tensor, u: Tensor, rows: Tensor, pairs: Tensor) -> None:
    """Σ_k rows_ik u_jk Π_{j<s<i} f_s for i > j of each block, diagonal by diagonal."""
    between = torch.ones_like(f[:, :, 1:])
    for d in range(BLOCK - 1):
        if d:
            between = between[:, :, 1:] * f[:, :, 1 : BLOCK - d]
        there = u[:, :, : BLOCK - 1 - d] * between
        pairs.diagonal(-(d + 1), -2, -1).copy_((rows[:, :, :, d + 1 :] * there).sum(-1))


def block_products(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block's decays: the products before a step, those behind it, and the product of all."""
    before, behind = torch.ones_like(f), torch.ones_like(f)
    for i in range(1, BLOCK):
        torch.mul(before[:, :, i - 1], f[:, :, i - 1], out=before[:, :, i])
        torch.mul(behind[:, :, -i], f[:, :, -i], out=behind[:, :, -i - 1])
    return before, behind, before[:, :, -1] * f[:, :, -1]


def one_by_one(
    state: Tensor, f: Tensor, u: Tensor, x: Tensor, read: Asked | None, rows: Sequence[Asked]
) -> tuple[Tensor, list[Tensor]]:
    """The steps one after the other."""
    out: list[list[Tensor]] = [[] for _ in rows]
    f = f.to(u.dtype)
    for t in range(u.shape[1]):
        faded = f[:, t, :, None] * state
        taken = x[:, t, None]
        if read is not None:
            w, after = read
            taken = taken - w[:, t, None] @ (faded if after else state)
        new = faded + u[:, t, :, None] * taken
        for (q, after), o in zip(rows, out):
            o.append(q[:, t, None] @ (new if after else state))
        state = new
    return state, [torch.cat(o, 1) for o in out]
