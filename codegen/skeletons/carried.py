"""Steps of a carried matrix at once: what each step adds follows from one triangular system, and no decay is divided by.

    S_t = f_t · S_{t−1} + u_t (x_t − w_tᵀ S_{t−1})ᵀ,    R_t = q_tᵀ S_t or q_tᵀ S_{t−1}            for n steps

    n_i = x_i − w_iᵀ S_{i−1}:  (I + A) N = X − (W ∘ F) S,  A_ij = Σ_k w_ik u_jk Π_{j<s<i} f_s    for j < i
    R   = (Q ∘ F) S + P N,     S' = F_n ∘ S + (U ∘ F_n/F_j)ᵀ N        every product of decays is of those between two steps
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Steps of a block within which decays of each channel are multiplied pair by pair.
BLOCK = 8


def carried(
    state: Tensor, factor: Tensor, write: Tensor, added: Tensor, read: Tensor | None, queries: Sequence[tuple[Tensor, bool]]
) -> tuple[Tensor, list[Tensor]]:
    """The state [*batch, key, value] after n steps, and what each query reads, [n, *batch, value].

    factor [n, *batch, key or 1], write [n, *batch, key], added [n, *batch, value], read [n, *batch, key] or None; queries
    [n, *batch, key], each with whether it reads after the step.
    """
    batch = state.shape[:-2]
    flat = state.flatten(0, -3) if batch else state[None]
    f, u, x = rows_of(factor), rows_of(write), rows_of(added)
    w = None if read is None else rows_of(read)
    rows = [(rows_of(q), after) for q, after in queries]
    asked = [*rows, (w, False)] if w is not None else rows
    together = by_matrix if f.shape[-1] == 1 else by_channel
    pairs, scaled_rows, ends, left = together(f, u, asked)
    if w is not None:
        known = torch.baddbmm(x, scaled_rows[-1], flat, alpha=-1)
        x = torch.linalg.solve_triangular(pairs[-1], known, upper=False, unitriangular=True)
    out = [torch.baddbmm(p @ x, r, flat) for p, r in zip(pairs, scaled_rows[: len(rows)])]
    new = torch.baddbmm(left * flat, ends.mT, x)
    if not finite(new, *out):
        # in the products above what is not finite reaches the steps before it
        new, out = one_by_one(flat, f, u, rows_of(added), w, rows)
    return new.view(state.shape), [o.view(*batch, *o.shape[1:]).movedim(-2, 0) for o in out]


def rows_of(x: Tensor) -> Tensor:
    """[n, *batch, width] as [batch, n, width]."""
    moved = x.movedim(0, -2)
    return moved.flatten(0, -3) if moved.dim() > 2 else moved[None]


def finite(*values: Tensor) -> bool:
    """Whether all are; a sum may overflow where they are, which costs time alone."""
    total = sum(v.sum() for v in values)
    return bool(torch.isfinite(torch.as_tensor(total)))


def by_matrix(
    f: Tensor, u: Tensor, asked: Sequence[tuple[Tensor, bool]]
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Pairs and rows of each query, what each step leaves at the end, and the decay of all: one decay a matrix."""
    b, n, _ = f.shape
    # the product of f_s over j < s ≤ i, for i and j from 0 to n
    between = torch.ones(b, n + 1, n + 1, dtype=torch.float64)
    between[:, 1:] = f.double()
    between = torch.where(torch.ones(n + 1, n + 1, dtype=torch.bool).tril(-1), between, 1.0).cumprod(1).tril().to(u.dtype)
    pairs, rows = [], []
    for q, after in asked:
        low = between[:, 1:] if after else between[:, :-1]
        pairs.append((q @ u.mT).mul_(low[:, :, 1:]))
        rows.append(q * low[:, :, :1])
    return pairs, rows, u * between[:, -1, 1:, None], between[:, -1:, :1]


def by_channel(
    f: Tensor, u: Tensor, asked: Sequence[tuple[Tensor, bool]]
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
    return out, list(scaled_rows), ends[:, :n], (start[:, -1] * whole[:, -1])[..., None]


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
    state: Tensor, f: Tensor, u: Tensor, x: Tensor, w: Tensor | None, rows: Sequence[tuple[Tensor, bool]]
) -> tuple[Tensor, list[Tensor]]:
    """The steps one after the other."""
    out: list[list[Tensor]] = [[] for _ in rows]
    f = f.to(u.dtype)
    for t in range(u.shape[1]):
        taken = x[:, t, None] if w is None else x[:, t, None] - w[:, t, None] @ state
        new = f[:, t, :, None] * state + u[:, t, :, None] * taken
        for (q, after), o in zip(rows, out):
            o.append(q[:, t, None] @ (new if after else state))
        state = new
    return state, [torch.cat(o, 1) for o in out]
