"""Nothing but exponentials: each element goes through `steps` of them, so that the special-function units set the time.

    x ← exp2(−x), steps times
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

BLOCK = 1024
BLOCK_SIZE = tl.constexpr(BLOCK)


@triton.jit
def exps(out, steps):
    o = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    # every element starts elsewhere: the compiler cannot fold the chain
    x = (o % 1024).to(tl.float32) * (1.0 / 1024)
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(out + o, x)
