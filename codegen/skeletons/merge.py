"""Split keys: the partial sums and row states of the programs that shared a row block, merged into the output.

    state, acc = start, 0;  for each part:  state, a, b = join(state, part's);  acc = a·acc + b·part's
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "n_split"])
def merge(
    out, inputs, sizes, tiles, parts, n_rows, n_split,
    BM: tl.constexpr, BF: tl.constexpr, INDEX: tl.constexpr, LISTED: tl.constexpr,
    LATE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, START: tl.constexpr, RESTORE: tl.constexpr,
    JOIN: tl.constexpr, FINISH: tl.constexpr,
):
    i_p = tl.program_id(0) % n_rows
    batch, i_mask = BATCH(tl.program_id(0) // n_rows, sizes)
    if LATE:
        i_p = n_rows - 1 - i_p
    if LISTED:
        p_rows, _, _, _, _ = tiles
        i_p = tl.load(p_rows + (i_mask * n_rows + i_p).to(tl.int64)).to(tl.int32)
    r = i_p.to(INDEX) * BM + tl.arange(0, BM)  # [BM]
    at, inside = ROWS(r[:, None], batch, sizes)  # [BM, 1]
    p_acc, p_state = parts
    f = tl.arange(0, BF)[None, :]  # [1, BF]
    state = START(BM)  # each [BM, 1]
    acc = tl.zeros([BM, BF], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * n_split * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    for i in range(n_split):
        o = first + i * BM
        state, a, b = JOIN(state, RESTORE(p_state, o), at, inputs, sizes)
        acc = acc * a + tl.load(p_acc + o * BF + f) * b
    FINISH(out, acc, state, at, f, inside, inputs, sizes)
