"""How fast a method's attention is: our tiled CPU kernel of its cascade beside the same kernel of the model's own.

At a length where tiles matter, not at the tasks' own: the method at the same share of that length's pairs. One thread,
processor time, the least of a few rounds in turn, the selection included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from laboratory.laws import Law, site
from reattend.codegen.cpu import kernel
from reattend.patterns.cascade import Cascade
from reattend.patterns.verdict import Refusal

TOKENS, HEADS, WIDTH, ROUNDS = 4096, 2, 32, 3


def seconds(law: Law) -> tuple[float, float] | Refusal:
    """Processor seconds of the method's attention and of the exact one, causal, at TOKENS; or why no kernel is printed."""
    g = torch.Generator().manual_seed(0)
    given = {n: torch.randn(1, HEADS, TOKENS, WIDTH, generator=g) for n in "QKV"}
    made = law.replacement(TOKENS, HEADS, WIDTH, True, WIDTH**-0.5)
    own = site(TOKENS, HEADS, WIDTH, True, WIDTH**-0.5).cascade
    kernels = [_built(c) for c in (made.cascade, own)]
    for k in kernels:
        if isinstance(k, Refusal):
            return k
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS + 1):
        for i, k in enumerate(kernels):
            assert not isinstance(k, Refusal)
            start = time.process_time()
            tables = _tables(law, given) if i == 0 else {}
            k.run({**given, **tables}, {"B": 1})
            best[i] = min(best[i], time.process_time() - start)
    return best[0], best[1]


def _tables(law: Law, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = law.replacement(TOKENS, HEADS, WIDTH, True, WIDTH**-0.5)
    if made.program is None:
        return {}
    sizes = {"B": 1, "H": HEADS, "P": TOKENS, "M": TOKENS, "E": WIDTH, "F": WIDTH}
    return {made.table: made.program.run(torch, given, sizes)}


def _built(c: Cascade) -> kernel.CpuKernel | Refusal:
    return kernel.build(c, kernel.default_mapping(c, {"B": 1}))
