"""Streaming forward: one pass over the key tiles of each row block, with the row's normaliser carried as scalars.

    for each row block:  state, acc = start, 0
        for each of its key tiles:  x = products;  state, w, c = step(state, x);  acc = c·acc + w·V
        out = finish(acc, state)

A row block visits its full tiles first and then its partial ones, where the score is computed as the model wrote it.
The functions in capitals are holes that a generator fills; tile shapes stand beside what they describe.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def tile(
    i_m, q, acc, state, at, inputs, sizes,
    BN: tl.constexpr, BF: tl.constexpr, INDEX: tl.constexpr, PARTIAL: tl.constexpr,
    PRODUCTS: tl.constexpr, STEP: tl.constexpr, VALUES: tl.constexpr,
):
    base, lane = i_m.to(INDEX) * BN, tl.arange(0, BN)
    m = base + lane  # [BN]
    x = PRODUCTS(q, at, m[None, :], base, lane[None, :], inputs, sizes, PARTIAL)  # each [BM, BN]
    state, w, c = STEP(state, x, at, m[None, :], base, lane[None, :], inputs, sizes, PARTIAL)  # [BM, 1], [BM, BN], [BM, 1]
    v = VALUES(at, m[:, None], base, lane[:, None], tl.arange(0, BF)[None, :], inputs, sizes, PARTIAL)  # [BN, BF]
    acc = tl.dot(w.to(v.dtype), v, acc * c, input_precision="ieee")  # [BM, BF]
    return acc, state


@triton.jit
def ranged(low, high, full_low, full_high, BN: tl.constexpr):
    """Keys from `low` to below `high`, of which a run is kept by all rows, as tiles: first, first full one, full, all."""
    i_low, i_full = low // BN, tl.cdiv(full_low, BN)
    n_all = tl.maximum(tl.cdiv(high, BN) - i_low, 0)
    i_full = tl.maximum(i_full, i_low)
    n_full = tl.maximum(tl.minimum(full_high // BN, i_low + n_all) - i_full, 0)
    return i_low, i_full, n_full, n_all


@triton.jit
def around(i, i_low, i_full, n_full):
    """Tile number i of those before and behind a run of full ones."""
    return i_low + i + tl.where(i_low + i >= i_full, n_full, 0)


@triton.jit
def visits(
    i_p, i_mask, batch, inputs, sizes, tiles, n_rows, n_full, n_all, BM: tl.constexpr, BN: tl.constexpr,
    LISTED: tl.constexpr, RANGED: tl.constexpr, LATE: tl.constexpr, SPAN: tl.constexpr,
):
    """The row block of a program, and its key tiles: the first, the first full one, full, all; its list, as wide."""
    i_low, i_full, p_keys, width = 0, 0, 0, 0
    if LATE:
        i_p = n_rows - 1 - i_p
    if LISTED:
        p_rows, p_full, p_all, p_keys, width = tiles
        i_p = tl.load(p_rows + (i_mask * n_rows + i_p).to(tl.int64)).to(tl.int32)
        i_list = (i_mask * n_rows + i_p).to(tl.int64)
        n_full = tl.load(p_full + i_list)
        n_all = tl.load(p_all + i_list)
        p_keys += i_list * width
    if RANGED:
        low, high, full_low, full_high = SPAN(i_p * BM, batch, inputs, sizes, BM)
        i_low, i_full, n_full, n_all = ranged(low, high, full_low, full_high, BN)
    return i_p, i_low, i_full, n_full, n_all, p_keys, width


@triton.jit(do_not_specialize=["n_rows", "n_full", "n_all", "n_split"])
def stream(
    out, inputs, sizes, tiles, parts, n_rows, n_full, n_all, n_split,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, SPLIT: tl.constexpr, INDEX: tl.constexpr, LISTED: tl.constexpr,
    RANGED: tl.constexpr, LATE: tl.constexpr, EIGHTS: tl.constexpr, STRIDES: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, QUERIES: tl.constexpr, START: tl.constexpr, PRODUCTS: tl.constexpr,
    STEP: tl.constexpr, VALUES: tl.constexpr, FINISH: tl.constexpr, SAVE: tl.constexpr,
):
    if EIGHTS:
        out, inputs = STRIDES(out, inputs)
    i_block, i_part = tl.program_id(0), 0
    if SPLIT:
        i_block, i_part = i_block // n_split, i_block % n_split
    batch, i_mask = BATCH(i_block // n_rows, sizes)
    i_p, i_low, i_full, n_full, n_all, p_keys, width = visits(
        i_block % n_rows, i_mask, batch, inputs, sizes, tiles, n_rows, n_full, n_all, BM, BN, LISTED, RANGED, LATE, SPAN
    )
    r = i_p.to(INDEX) * BM + tl.arange(0, BM)  # [BM]
    at, inside = ROWS(r[:, None], batch, sizes)  # [BM, 1]
    q = QUERIES(at, inputs, sizes)  # each [BM, E]
    state = START(BM)  # each [BM, 1]
    acc = tl.zeros([BM, BF], dtype=tl.float32)
    first, last = 0, n_all
    if SPLIT:
        # Several programs share a block's tiles: this one has those from `first` to `last`.
        count = tl.cdiv(n_all, n_split)
        first = i_part * count
        last = tl.minimum(first + count, n_all)
    # Of a list, the next number is read a turn ahead: a load that a turn waits for would stop its copies as well.
    i_next = 0
    if LISTED:
        i_next = tl.load(p_keys + tl.minimum(first, n_full))
    for i in range(first, tl.minimum(last, n_full)):
        i_m = i_full + i
        if LISTED:
            i_m = i_next
            i_next = tl.load(p_keys + i + 1)
        acc, state = tile(
            i_m, q, acc, state, at, inputs, sizes, BN, BF, INDEX, False, PRODUCTS, STEP, VALUES
        )
    # Partial tiles stand at the end of a list, the first of them last.
    first = tl.maximum(first, n_full)
    p_keys += width - 1 + n_full
    if LISTED:
        i_next = tl.load(p_keys - tl.minimum(first, n_all))
    for i in range(first, last):
        i_m = i
        if RANGED:
            i_m = around(i - n_full, i_low, i_full, n_full)
        if LISTED:
            i_m = i_next
            i_next = tl.load(p_keys - i - 1)
        acc, state = tile(
            i_m, q, acc, state, at, inputs, sizes, BN, BF, INDEX, True, PRODUCTS, STEP, VALUES
        )
    if SPLIT:
        p_acc, p_state = parts
        o = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
        tl.store(p_acc + o * BF + tl.arange(0, BF)[None, :], acc)
        SAVE(p_state, state, o)
    else:
        FINISH(out, acc, state, at, tl.arange(0, BF)[None, :], inside, inputs, sizes)
