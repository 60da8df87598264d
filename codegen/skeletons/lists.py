"""The key tiles that each row block visits, listed by the device itself: one program a row block looks at its whole mask.

    for each key tile:  every row keeps every key → to the front;  some row keeps some key → to the back;  else left out
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "n_keys"])
def list_tiles(
    p_full, p_all, p_keys, inputs, sizes, n_rows, n_keys,
    BM: tl.constexpr, BN: tl.constexpr, INDEX: tl.constexpr, SKIP: tl.constexpr, LISTS: tl.constexpr, ROWS: tl.constexpr,
    KEPT: tl.constexpr,
):
    i_list = tl.program_id(0).to(tl.int64)
    batch = LISTS(tl.program_id(0) // n_rows, sizes)
    r = (tl.program_id(0) % n_rows).to(INDEX) * BM + tl.arange(0, BM)  # [BM]
    at, _ = ROWS(r[:, None], batch, sizes)  # [BM, 1]
    n_tiles = tl.cdiv(n_keys, BN)
    # One number more than there are tiles: the next one is read ahead.
    p_first = p_keys + i_list * (n_tiles + 1)
    n_full, n_part = 0, 0
    alive = tl.zeros([BM], tl.int32)
    for i in range(n_tiles):
        m = i * BN + tl.arange(0, BN)[None, :]  # [1, BN]
        kept = (KEPT(at, m, inputs, sizes) & (m < n_keys) & (r[:, None] >= 0)).to(tl.int32)  # [BM, BN]
        alive = tl.maximum(alive, tl.max(kept, 1))
        every = tl.min(tl.min(kept, 1), 0)
        some = 1
        if SKIP != "never":
            some = tl.max(tl.max(kept, 1), 0)
        tl.store(p_first + n_full, i, mask=every == 1)
        tl.store(p_first + n_tiles - n_part, i, mask=some > every)
        n_full += every
        n_part += some - every
    if SKIP == "guarded":
        # A row without a key sees every key; where there is one, no tile is full.
        blank = tl.where(tl.min(alive, 0) == 0, n_tiles, 0)
        for i in range(blank):
            tl.store(p_first + n_tiles - i, i)
        n_part = tl.maximum(n_part, blank)
    tl.store(p_full + i_list, n_full)
    tl.store(p_all + i_list, n_full + n_part)
