"""Causal attention as others structure it, to count against ours: the tutorial's two loops, and FlexAttention's block lists.

    tutorial      full tiles, then the diagonal; keys and values by pointers that advance; one scale folded with log₂ e
    descriptors   the same loads through tensor descriptors: bulk copies on sm_90 and later
    listed        blocks of keys from two lists, full and partial; the offset of the next tile is read in the loop

Written for this comparison from what those kernels do, not from their text: lengths that tiles divide, heads a power of two,
G query heads to a key head. Layouts are [heads, tokens, head size] with a unit innermost stride.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Added to masked scores by the tutorial's kernel.
LOW = tl.constexpr(-1.0e6)


# --- ranges of keys ---------------------------------------------------------------------------------------------------


@triton.jit
def _weights(s, top, scale, r, m, DIAGONAL: tl.constexpr):
    """exp₂(scale·s − max), the new maximum; the scale goes into the subtraction where nothing is masked."""
    if DIAGONAL:
        s = s * scale + tl.where(m[None, :] <= r[:, None], 0.0, LOW)
        new = tl.maximum(top, tl.max(s, 1))
        return tl.exp2(s - new[:, None]), new
    new = tl.maximum(top, tl.max(s, 1) * scale)
    return tl.exp2(s * scale - new[:, None]), new


@triton.jit
def _accumulated(acc, total, top, s, v, scale, r, m, DIAGONAL: tl.constexpr):
    w, new = _weights(s, top, scale, r, m, DIAGONAL)
    old = tl.exp2(top - new)
    acc = tl.dot(w.to(v.dtype), v, acc * old[:, None])  # [BM, D]
    return acc, total * old + tl.sum(w, 1), new


@triton.jit
def _by_pointers(
    acc, total, top, q, k_head, v_head, k_row, v_row, scale, r, first, last,
    D: tl.constexpr, BN: tl.constexpr, DIAGONAL: tl.constexpr,
):
    m, d = tl.arange(0, BN), tl.arange(0, D)
    p_k = k_head + (first + m)[None, :] * k_row + d[:, None]  # [D, BN]
    p_v = v_head + (first + m)[:, None] * v_row + d[None, :]  # [BN, D]
    for i in tl.range(first, last, BN):
        i = tl.multiple_of(i, BN)
        s = tl.dot(q, tl.load(p_k))  # [BM, BN]
        acc, total, top = _accumulated(acc, total, top, s, tl.load(p_v), scale, r, i + m, DIAGONAL)
        p_k += BN * k_row
        p_v += BN * v_row
    return acc, total, top


@triton.jit
def tutorial(
    q, k, v, out, scale, q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    i_p, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, d = i_p * BM + tl.arange(0, BM), tl.arange(0, D)
    x = tl.load(q + h * q_head + r[:, None] * q_row + d[None, :])  # [BM, D]
    k += h // G * k_head
    v += h // G * v_head
    top = tl.full([BM], float("-inf"), tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    scale *= LOG2E
    acc, total, top = _by_pointers(acc, total, top, x, k, v, k_row, v_row, scale, r, 0, i_p * BM, D, BN, False)
    acc, total, top = _by_pointers(
        acc, total, top, x, k, v, k_row, v_row, scale, r, i_p * BM, (i_p + 1) * BM, D, BN, True
    )
    acc = acc / total[:, None]
    tl.store(out + h * out_head + r[:, None] * out_row + d[None, :], acc.to(out.dtype.element_ty))


@triton.jit
def _by_descriptors(
    acc, total, top, q, k, v, row, scale, r, first, last, BN: tl.constexpr, DIAGONAL: tl.constexpr
):
    for i in tl.range(first, last, BN):
        i = tl.multiple_of(i, BN)
        s = tl.dot(q, k.load([row + i, 0]).T)  # [BM, BN]
        acc, total, top = _accumulated(
            acc, total, top, s, v.load([row + i, 0]), scale, r, i + tl.arange(0, BN), DIAGONAL
        )
    return acc, total, top


@triton.jit
def descriptors(
    q, k, v, out, scale, tokens, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Tensors are [heads · tokens, head size]."""
    i_p, h = tl.program_id(0), tl.program_id(1)
    r = i_p * BM + tl.arange(0, BM)
    x = q.load([h * tokens + i_p * BM, 0])  # [BM, D]
    top = tl.full([BM], float("-inf"), tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    scale *= LOG2E
    row = h // G * tokens
    acc, total, top = _by_descriptors(acc, total, top, x, k, v, row, scale, r, 0, i_p * BM, BN, False)
    acc, total, top = _by_descriptors(acc, total, top, x, k, v, row, scale, r, i_p * BM, (i_p + 1) * BM, BN, True)
    acc = acc / total[:, None]
    out.store([h * tokens + i_p * BM, 0], acc.to(x.dtype))


# --- lists of blocks --------------------------------------------------------------------------------------------------


@triton.jit
def _step(i, p_blocks, count, BLOCK: tl.constexpr, BN: tl.constexpr):
    """From this tile's first key to the next one's: within the block, or to the next block of the list."""
    EACH: tl.constexpr = BLOCK // BN
    at = i // EACH
    here = tl.load(p_blocks + at)
    there = tl.load(p_blocks + at + 1, mask=at + 1 < count, other=0)
    leaves = (i + 1) % EACH == 0
    return tl.where(leaves, (there - here) * BLOCK - (EACH - 1) * BN, BN)


@triton.jit
def _by_list(
    acc, total, top, q, k, v, k_row, v_row, p_blocks, count, r,
    SCALE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, PARTIAL: tl.constexpr,
):
    d = tl.arange(0, D)
    first = tl.load(p_blocks) * BLOCK
    for i in range(count * (BLOCK // BN)):
        m = first + tl.arange(0, BN)
        s = tl.dot(q, tl.trans(tl.load(k + m[:, None] * k_row + d[None, :])))  # [BM, BN]
        # the score function is the user's, its scale is not known to be one; the basis is changed after it
        s *= SCALE
        if PARTIAL:
            s = tl.where(m[None, :] <= r[:, None], s, float("-inf"))
        s *= LOG2E
        new = tl.maximum(top, tl.max(s, 1))
        # a row without a key so far
        safe = tl.where(new == float("-inf"), 0.0, new)
        old, w = tl.exp2(top - safe), tl.exp2(s - safe[:, None])
        x = tl.load(v + m[:, None] * v_row + d[None, :])  # [BN, D]
        acc = tl.dot(w.to(x.dtype), x, acc * old[:, None])  # [BM, D]
        total, top = total * old + tl.sum(w, 1), new
        first += _step(i, p_blocks, count, BLOCK, BN)
    return acc, total, top


@triton.jit
def listed(
    q, k, v, out, part_counts, part_blocks, full_counts, full_blocks, q_head, q_row, k_head, k_row, v_head, v_row, out_head,
    out_row, width,
    SCALE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):
    """Lists are of blocks of BLOCK keys for BLOCK queries, [queries / BLOCK, width]."""
    i_p, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, d = i_p * BM + tl.arange(0, BM), tl.arange(0, D)
    x = tl.load(q + h * q_head + r[:, None] * q_row + d[None, :])  # [BM, D]
    k += h // G * k_head
    v += h // G * v_head
    top = tl.full([BM], float("-inf"), tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    row = i_p // (BLOCK // BM)
    acc, total, top = _by_list(
        acc, total, top, x, k, v, k_row, v_row, full_blocks + row * width, tl.load(full_counts + row), r,
        SCALE, D, BN, BLOCK, False,
    )
    acc, total, top = _by_list(
        acc, total, top, x, k, v, k_row, v_row, part_blocks + row * width, tl.load(part_counts + row), r,
        SCALE, D, BN, BLOCK, True,
    )
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    tl.store(out + h * out_head + r[:, None] * out_row + d[None, :], acc.to(out.dtype.element_ty))
