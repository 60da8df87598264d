"""Streaming backward: weights made again from scores and a row's scalars, the gradients of both sides of each product.

    rows_backward   for each row block:  g, scalars = flow(out, dout);  dq = 0
                        for each of its key tiles:  w, dx = adjoint(q·k, g·vᵀ);  dq = dq + dx·k
    keys_backward   for each key block:  dk, dv = 0
                        for each row block that sees it, of every head that shares it:  dv = dv + wᵀ·g;  dk = dk + dxᵀ·q

What reaches leaves, floats that are no operands, gathers beside: of rows in registers of the first kernel, of pairs in
memory, of keys in registers of the second, for one head after the other. Nothing of it is added across programs.

Row blocks of one program come first in the numbers of rows, so that a row's scalars have one place for both kernels.
The functions in capitals are holes that a generator fills; tile shapes stand beside what they describe.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from ..stream import around, ranged, visits


@triton.jit
def pair(
    q, k, v, g, scalars, at, inside, m, base, lane, inputs, sizes, PARTIAL: tl.constexpr, DOTS: tl.constexpr,
    ADJOINT: tl.constexpr, LEAVES: tl.constexpr,
):
    x = DOTS(q, k)  # each [BM, BN]
    dw = tl.dot(g, tl.trans(v), input_precision="ieee")  # [BM, BN]
    # [BM, BN], each [BM, BN], each [BM, BN]
    return ADJOINT(x, dw, scalars, at, inside, m, base, lane, inputs, sizes, PARTIAL, LEAVES)


@triton.jit
def of_keys(
    i_m, dq, dl, q, g, scalars, at, o, inside, inputs, sizes, leaves,
    BN: tl.constexpr, BF: tl.constexpr, INDEX: tl.constexpr, PARTIAL: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, DOTS: tl.constexpr, ADJOINT: tl.constexpr, ADD_Q: tl.constexpr, ADD_L: tl.constexpr,
    LEAVES: tl.constexpr,
):
    base, lane = i_m.to(INDEX) * BN, tl.arange(0, BN)
    m = base + lane  # [BN]
    k = KEYS(at, m[None, :], base, lane[None, :], inputs, sizes, PARTIAL)  # each [E, BN]
    v = VALUES(at, m[:, None], base, lane[:, None], tl.arange(0, BF)[None, :], inputs, sizes, PARTIAL)  # [BN, BF]
    _, dx, parts = pair(
        q, k, v, g, scalars, at, inside, m[None, :], base, lane[None, :], inputs, sizes, PARTIAL, DOTS, ADJOINT, LEAVES
    )
    if LEAVES:
        dl = ADD_L(leaves, dl, parts, o, inside, m[None, :], sizes, LEAVES)
    return ADD_Q(dq, dx, k), dl


@triton.jit(do_not_specialize=["n_rows", "n_p", "n_full", "n_all"])
def rows_backward(
    grads, leaves, out, dout, p_saved, p_sums, inputs, sizes, tiles, n_rows, n_p, n_full, n_all,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, INDEX: tl.constexpr, LISTED: tl.constexpr, RANGED: tl.constexpr,
    LATE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, FLOW: tl.constexpr, DOTS: tl.constexpr, ADJOINT: tl.constexpr,
    START_Q: tl.constexpr, ADD_Q: tl.constexpr, STORE_Q: tl.constexpr, START_L: tl.constexpr, ADD_L: tl.constexpr,
    STORE_L: tl.constexpr, LEAVES: tl.constexpr,
):
    i_batch = tl.program_id(0) // n_rows
    batch, i_mask = BATCH(i_batch, sizes)
    i_p, i_low, i_full, n_full, n_all, p_keys, width = visits(
        tl.program_id(0) % n_rows, i_mask, batch, inputs, sizes, tiles, n_rows, n_full, n_all, BM, BN, LISTED, RANGED, LATE,
        SPAN,
    )
    r = i_p.to(INDEX) * BM + tl.arange(0, BM)  # [BM]
    at, inside = ROWS(r[:, None], batch, sizes)  # [BM, 1]
    o = i_batch.to(tl.int64) * n_p + tl.minimum(r, n_p - 1)[:, None]  # [BM, 1]
    q = QUERIES(at, inputs, sizes)  # each [BM, E]
    g, scalars = FLOW(at, tl.arange(0, BF)[None, :], o, inside, out, dout, p_saved, p_sums, inputs, sizes, True)
    dq, dl = START_Q(BM), 0  # each [BM, E]
    if LEAVES:
        dl = START_L(BM)  # each [BM, 1]
    i_next = 0
    if LISTED:
        i_next = tl.load(p_keys)
    for i in range(n_full):
        i_m = i_full + i
        if LISTED:
            i_m = i_next
            i_next = tl.load(p_keys + i + 1)
        dq, dl = of_keys(
            i_m, dq, dl, q, g, scalars, at, o, inside, inputs, sizes, leaves, BN, BF, INDEX, False, KEYS, VALUES, DOTS,
            ADJOINT, ADD_Q, ADD_L, LEAVES,
        )
    p_keys += width - 1 + n_full
    if LISTED:
        i_next = tl.load(p_keys - tl.minimum(n_full, n_all))
    for i in range(n_full, n_all):
        i_m = i
        if RANGED:
            i_m = around(i - n_full, i_low, i_full, n_full)
        if LISTED:
            i_m = i_next
            i_next = tl.load(p_keys - i - 1)
        dq, dl = of_keys(
            i_m, dq, dl, q, g, scalars, at, o, inside, inputs, sizes, leaves, BN, BF, INDEX, True, KEYS, VALUES, DOTS,
            ADJOINT, ADD_Q, ADD_L, LEAVES,
        )
    STORE_Q(grads, dq, at, inside, sizes)
    if LEAVES:
        STORE_L(leaves, dl, scalars, at, o, inside, inputs, sizes, LEAVES)


@triton.jit
def of_rows(
    i_p, dk, dv, dl, k, v, i_batch, batch, base, lane, out, dout, p_saved, p_sums, inputs, sizes, n_p,
    BM: tl.constexpr, BF: tl.constexpr, INDEX: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, FLOW: tl.constexpr, DOTS: tl.constexpr, ADJOINT: tl.constexpr, ADD_K: tl.constexpr,
    ADD_KEYED: tl.constexpr, LEAVES: tl.constexpr,
):
    r = i_p.to(INDEX) * BM + tl.arange(0, BM)  # [BM]
    at, inside = ROWS(r[:, None], batch, sizes)  # [BM, 1]
    o = i_batch.to(tl.int64) * n_p + tl.minimum(r, n_p - 1)[:, None]  # [BM, 1]
    q = QUERIES(at, inputs, sizes)  # each [BM, E]
    g, scalars = FLOW(at, tl.arange(0, BF)[None, :], o, inside, out, dout, p_saved, p_sums, inputs, sizes, False)
    w, dx, parts = pair(
        q, k, v, g, scalars, at, inside, (base + lane)[None, :], base, lane[None, :], inputs, sizes, PARTIAL, DOTS, ADJOINT,
        LEAVES,
    )
    if LEAVES:
        dl = ADD_KEYED(dl, parts, LEAVES)
    dv = tl.dot(tl.trans(w).to(g.dtype), g, dv, input_precision="ieee")  # [BN, BF]
    return ADD_K(dk, dx, q), dv, dl


@triton.jit(do_not_specialize=["n_blocks", "n_p", "n_m", "n_sharing"])
def keys_backward(
    grads, leaves, out, dout, p_saved, p_sums, inputs, sizes, n_blocks, n_p, n_m, n_sharing,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, INDEX: tl.constexpr, RANGED: tl.constexpr, WHOLE: tl.constexpr,
    KEYED: tl.constexpr, ROWS: tl.constexpr, SEEN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, FLOW: tl.constexpr, DOTS: tl.constexpr, ADJOINT: tl.constexpr, START_K: tl.constexpr,
    ADD_K: tl.constexpr, STORE_K: tl.constexpr, START_KEYED: tl.constexpr, ADD_KEYED: tl.constexpr,
    STORE_KEYED: tl.constexpr, LEAVES: tl.constexpr,
):
    i_keyed = tl.program_id(0) // n_blocks
    base, lane = (tl.program_id(0) % n_blocks).to(INDEX) * BN, tl.arange(0, BN)
    m = base + lane  # [BN]
    own, _ = KEYED(i_keyed, 0, sizes)
    k = KEYS(own, m[None, :], base, lane[None, :], inputs, sizes, True)  # each [E, BN]
    v = VALUES(own, m[:, None], base, lane[:, None], tl.arange(0, BF)[None, :], inputs, sizes, True)  # [BN, BF]
    dk = START_K(BN)  # each [BN, E]
    dv = tl.zeros([BN, BF], dtype=tl.float32)
    exists = base + BN <= n_m
    for i_own in range(n_sharing):
        batch, i_batch = KEYED(i_keyed, i_own, sizes)
        dl = 0
        if LEAVES:
            dl = START_KEYED(BN)  # each [1, BN]
        i_low, i_full, n_full, n_all = 0, 0, 0, tl.cdiv(n_p, BM)
        if WHOLE:
            n_full = n_p // BM
        if RANGED:
            low, high, full_low, full_high = SEEN(base, batch, inputs, sizes, BN)
            i_low, i_full, n_full, n_all = ranged(low, high, full_low, full_high, BM)
        # A block that reaches past the last key has no tile that is full.
        n_full = tl.where(exists, n_full, 0)
        for i in range(n_full):
            i_p = i_full + i
            dk, dv, dl = of_rows(
                i_p, dk, dv, dl, k, v, i_batch, batch, base, lane, out, dout, p_saved, p_sums, inputs, sizes, n_p,
                BM, BF, INDEX, False, ROWS, QUERIES, FLOW, DOTS, ADJOINT, ADD_K, ADD_KEYED, LEAVES,
            )
        for i in range(n_full, n_all):
            i_p = around(i - n_full, i_low, i_full, n_full)
            dk, dv, dl = of_rows(
                i_p, dk, dv, dl, k, v, i_batch, batch, base, lane, out, dout, p_saved, p_sums, inputs, sizes, n_p,
                BM, BF, INDEX, True, ROWS, QUERIES, FLOW, DOTS, ADJOINT, ADD_K, ADD_KEYED, LEAVES,
            )
        if LEAVES:
            STORE_KEYED(leaves, dl, i_batch, m[None, :], sizes, LEAVES)
    STORE_K(grads, dk, dv, own, m[:, None], tl.arange(0, BF)[None, :], sizes)
