"""One method with a level of its own for every head: heads that need little leave the budget to those that need much.

    levels    little … much, all                 head (l, h) at level i
    search    all heads at all, then down: the step that costs least divergence for the pairs it saves, until the budget

The steps are chosen on examples of other seeds than those that are measured (`fitted.FIT`). Down and not up: a head that
finds what another one looks for is worth nothing while that is blind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laboratory.laws import Law

Levels = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ByHead:
    """Laws by layer and head; None is the exact head. `budget` is the share of pairs that they were found for."""

    laws: Sequence[Sequence[Law | None]]
    budget: float
    label: str

    def __str__(self) -> str:
        return self.label

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, N, F] and kept pairs [B, H, N, N], as a law gives them."""
        n = q.shape[-2]
        outs, keeps = [], []
        for h, law in enumerate(self.laws[layer]):
            at = slice(h, h + 1)
            if law is None:
                allowed = torch.ones(n, n, dtype=torch.bool)
                keep: Tensor | None = (allowed.tril() if causal else allowed)[None, None]
                out = (q[:, at] @ k[:, at].mT * scale).masked_fill(~keep, float("-inf")).softmax(-1) @ v[:, at]
            else:
                out, keep = law(q[:, at], k[:, at], v[:, at], causal, scale, layer)
            outs.append(out)
            keeps.append(keep)
        kept = [x.expand(q.shape[0], 1, n, n) for x in keeps if x is not None]
        return torch.cat(outs, 1), torch.cat(kept, 1) if len(kept) == len(keeps) else None


@dataclass(frozen=True)
class Cost:
    """What a choice of levels does to examples: mean divergence of the answers in nats, and the share of the pairs."""

    nats: float
    pairs: float


def search(
    layers: int, heads: int, levels: int, cost: Callable[[Levels], Cost], budget: float, say: bool = False
) -> Levels:
    """The level of each head, 0 the least and `levels` exact, with at most this share of the pairs (or all at 0)."""
    now: Levels = [[levels] * heads for _ in range(layers)]
    at = cost(now)
    while at.pairs > budget:
        steps = [
            (step, cost(step)) for layer in range(layers) for h in range(heads) for i in reversed(range(now[layer][h]))
            if (step := with_level(now, layer, h, i))
        ]
        steps = [(step, then) for step, then in steps if then.pairs < at.pairs]
        if not steps:
            break
        before = at
        now, at = min(steps, key=lambda s: (s[1].nats - before.nats) / (before.pairs - s[1].pairs))
        if say:
            print(f"  {now}: {at.pairs:.2f} of the pairs, {at.nats:.4f} nats", flush=True)
    return now


def with_level(levels: Levels, layer: int, head: int, level: int) -> Levels:
    return [[level if (i, h) == (layer, head) else x for h, x in enumerate(row)] for i, row in enumerate(levels)]
