"""MoA, mixture of attention: every head has a window of its own, which grows with the text as far as it is worth it.

    W(N) = min(base + N·share, N)                     a span, N the number of keys
    keep = m < sink ∨ p − m < W_h(N)                  under the model's mask
    min  Σ_h loss(h, span_h)    so that  mean_h density(span_h, N) ≤ density  at every length that was seen
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from ... import expr as ex
from ...attention.attention import Attention
from ...expr import Expr
from ...verdict import Refusal
from ..fitted import FittedMethod, HeadsSeen, is_one_of, of_key_head
from ..method import StaticMethod, TokenPositions
from .knapsack import Item, choose

SHARES = (0.0, 0.125, 0.25, 0.5)


@dataclass(frozen=True)
class Span:
    """A window of `base` keys and `share` of all keys."""

    base: int
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.base < 1 - (self.share == 1):
            raise ValueError(f"a span needs a share from 0 to 1, and base ≥ 1 unless the share is 1, not {self}")

    def __str__(self) -> str:
        return f"{self.base}+{self.share:g}N" if self.share else str(self.base)

    @property
    def part(self) -> Fraction:
        return Fraction(self.share).limit_denominator(1024)

    def window(self, keys: int) -> int:
        """Keys up to a row, its own among them, where there are so many."""
        return min(self.base + keys * self.part.numerator // self.part.denominator, keys)


@dataclass(frozen=True)
class MoA(FittedMethod, StaticMethod):
    """Spans of all heads within a mean `density` of the pairs that causal rows have, chosen from `choices` and the whole.

    `spans` has those of one attention, one a head of keys or one for all. What a span loses is measured at the attention;
    the paper takes a gradient of its first order (section 4.1), and a solver of integer programs.
    """

    name: ClassVar[str] = "moa"
    source: ClassVar[str] = "Fu et al., MoA: Mixture of Sparse Attention (2406.14909), section 4"
    needs: ClassVar[tuple[str, ...]] = ("a causal attention", "several heads", "a calibration, or the spans")

    density: float = 0.5
    sink: int = 64
    choices: tuple[Span, ...] = tuple(Span(64, x) for x in SHARES)
    spans: tuple[Span, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.sink < 0 or not self.choices:
            raise ValueError("MoA needs a density above 0 and up to 1, sink ≥ 0, and spans to choose from")

    @property
    def is_fitted(self) -> bool:
        return self.spans is not None

    @property
    def options(self) -> tuple[MoA, ...]:
        return tuple(replace(self, spans=(s,)) for s in self.choices)

    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, MoA]:
        whole = Span(0, 1.0)
        spans = (*self.choices, whole)
        items, places = [], []
        for n, x in seen.items():
            costs = [max(self.share_of(s, q, k) for q, k in x.lengths) for s in spans]
            for h in range(len(x.losses[0])):
                items.append(Item(tuple(costs), (*(row[h] for row in x.losses), 0.0)))
                places.append(n)
        chosen = choose(items, self.density * len(items))
        if chosen is None:
            return {}
        return {n: replace(self, spans=tuple(spans[i] for i, p in zip(chosen, places) if p == n)) for n in seen}

    def share_of(self, s: Span, queries: int, keys: int) -> float:
        """The share of the pairs of causal rows at the end of the keys that a span keeps."""
        seen = np.arange(keys - queries, keys) + 1
        w = s.window(keys)
        return float((np.minimum(seen, w) + np.clip(seen - w, 0, self.sink)).sum() / seen.sum())

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        if self.spans is None:
            return self.refuse("its spans are found by a calibration: give one, or give them as spans=(…)")
        if not at.causal:
            return self.refuse("it needs a causal attention: nothing says where the window of a row ends")
        found = of_key_head(a, at)
        if isinstance(found, Refusal):
            return self.refuse(found.reason)
        head, count = found
        if len(self.spans) not in (1, count):
            return self.refuse(f"it has {len(self.spans)} spans, and this attention {count} heads of keys")
        keep = at.key < self.sink
        for s in dict.fromkeys(self.spans):
            wide = at.keys * s.part.numerator // s.part.denominator + s.base
            near = ex.TRUE if s.part == 1 else at.row - at.key < wide
            of_these = [h for h, x in enumerate(self.spans) if x == s]
            keep = keep | (near if len(of_these) == len(self.spans) else is_one_of(head, of_these) & near)
        return keep
