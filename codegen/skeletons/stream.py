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
    m = i_m.to(INDEX) * BN + tl.arange(0, BN)  # [BN]
    x = PRODUCTS(q, at, m[None, :], inputs, sizes, PARTIAL)  # each [BM, BN]
    state, w, c = STEP(state, x, at, m[None, :], inputs, sizes, PARTIAL)  # [BM, 1], [BM, BN], [BM, 1]
    v = VALUES(at, m[:, None], tl.arange(0, BF)[None, :], inputs, sizes, PARTIAL)  # [BN, BF]
    acc = tl.dot(w.to(v.dtype), v, acc * c, input_precision="ieee")  # [BM, BF]
    return acc, state


@triton.jit(do_not_specialize=["n_rows", "n_full", "n_all"])
def stream(
    out, inputs, sizes, tiles, parts, n_rows, n_full, n_all,
    BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, SPLIT: tl.constexpr, INDEX: tl.constexpr, LISTED: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, START: tl.constexpr, PRODUCTS: tl.constexpr,
    STEP: tl.constexpr, VALUES: tl.constexpr, FINISH: tl.constexpr, SAVE: tl.constexpr,
):
    i_block = tl.program_id(0) // SPLIT
    i_p = i_block % n_rows
    batch, i_mask = BATCH(i_block // n_rows, sizes)
    p_keys = 0
    if LISTED:
        p_rows, p_full, p_all, p_keys, width = tiles
        i_list = (i_mask * n_rows + i_p).to(tl.int64)
        i_p = tl.load(p_rows + i_list)
        n_full = tl.load(p_full + i_list)
        n_all = tl.load(p_all + i_list)
        p_keys += i_list * width
    r = i_p.to(INDEX) * BM + tl.arange(0, BM)  # [BM]
    at, inside = ROWS(r[:, None], batch, sizes)  # [BM, 1]
    q = QUERIES(at, inputs, sizes)  # each [BM, E]
    state = START(BM)  # each [BM, 1]
    acc = tl.zeros([BM, BF], dtype=tl.float32)
    # SPLIT programs share a block's tiles: this one has those from `first` to `last`.
    count = tl.cdiv(n_all, SPLIT)
    first = tl.program_id(0) % SPLIT * count
    last = tl.minimum(first + count, n_all)
    for i in range(first, tl.minimum(last, n_full)):
        i_m = tl.load(p_keys + i) if LISTED else i
        acc, state = tile(
            i_m, q, acc, state, at, inputs, sizes, BN, BF, INDEX, False, PRODUCTS, STEP, VALUES
        )
    for i in range(tl.maximum(first, n_full), last):
        i_m = tl.load(p_keys + i) if LISTED else i
        acc, state = tile(
            i_m, q, acc, state, at, inputs, sizes, BN, BF, INDEX, True, PRODUCTS, STEP, VALUES
        )
    if SPLIT > 1:
        p_acc, p_state = parts
        o = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
        tl.store(p_acc + o * BF + tl.arange(0, BF)[None, :], acc)
        SAVE(p_state, state, o)
    else:
        FINISH(out, acc, state, at, tl.arange(0, BF)[None, :], inside, inputs, sizes)
