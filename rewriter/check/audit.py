"""The audit of a method as it runs: do rows still keep the weight that rows kept where it was measured?

    every so many calls   some rows at random:   r = Σ_kept w / Σ w   exactly, under the model's own mask
    broken                more rows are below the least r that was measured than one in a hundred would explain

One unlucky row decides nothing: of n rows looked at in all calls x are below, and P(X ≥ x) for X of n rows with one in a
hundred below must stay above 10⁻⁴. Rows that keep little where they did so in the calibration as well are not found by this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...patterns.attention.attention import Attention
from ...patterns.cascade import Cascade, bind
from ...patterns.evaluate import evaluate
from ...patterns.methods.rows import ALL, KEPT, ROWS, kept_share

# Rows of each head that one audit looks at, and calls from one to the next where the policy names no number.
ROWS_A_CALL, CALLS = 16, 100
# Rows that may be below what was measured, and how unlikely what is seen must be for that.
SHARE, UNLIKELY = 0.01, 1e-4
SEED = 0xA0D17


@dataclass
class Audit:
    """`model` and `method`: the attention as it is and as the method has it; `least`: what every row measured has kept."""

    model: Attention
    method: Attention
    least: float
    every: int = CALLS
    looked: int = 0
    below: int = 0

    @cached_property
    def share(self) -> Cascade:
        """What rows keep."""
        return kept_share(self.model, self.method)

    def due(self, call: int) -> bool:
        """Is this call one to look at? The first is looked at by the net."""
        return call > 1 and call % self.every == 0

    def look(self, call: int, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> str:
        """Why the method must not run any more, or nothing."""
        rows = int(bind(self.model.cascade.rank[self.model.query].size, sizes))
        generator = torch.Generator().manual_seed(SEED + call)
        at = torch.randint(rows, (ROWS_A_CALL,), generator=generator)
        out = evaluate(self.share, {**tensors, ROWS: at.to(next(iter(tensors.values())).device)}, sizes, widen=True)
        kept = torch.where(out[ALL] == 0, 1.0, out[KEPT] / out[ALL])
        self.looked += kept.numel()
        # the least was rounded to float32's digits on its way
        self.below += int((kept < self.least * (1 - 1e-5)).sum())
        if tail(self.below, self.looked, SHARE) >= UNLIKELY:
            return ""
        return (
            f"an audit of {self.looked} rows found {self.below} that keep less of their weight than the {self.least:.4f} "
            f"that every row of the calibration kept, the least {kept.min().item():.4f}"
        )


def tail(x: int, n: int, p: float) -> float:
    """P(X ≥ x) for X of n with probability p each."""
    if x <= 0:
        return 1.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(x, n + 1)
    )
    return math.fsum(map(math.exp, logs))
