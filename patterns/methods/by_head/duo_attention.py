"""DuoAttention: retrieval heads read everything, streaming heads the first keys and those just behind a row.

    keep = head ∈ full  ∨  m < sink  ∨  p − m < window          heads of keys, under the model's mask
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ...attention.attention import Attention
from ...expr import Expr
from ...verdict import Refusal
from ..fitted import FittedMethod, HeadsSeen, full_heads, largest
from ..method import StaticMethod, TokenPositions
from ..static.sink_window import SinkWindow


@dataclass(frozen=True)
class DuoAttention(FittedMethod, StaticMethod):
    """The share `share` of all heads of keys, over all attentions together, stays full; `full` names those of one attention.

    The paper learns a gate for each head, by what its streaming costs the model's last states, and keeps the largest gates.
    Here the same quantile is taken of what streaming a head changes in its attention's output, measured: nothing is learned.
    """

    name: ClassVar[str] = "duo-attention"
    source: ClassVar[str] = "Xiao et al., DuoAttention (2410.10819), section 2"
    needs: ClassVar[tuple[str, ...]] = ("a causal attention", "several heads", "a calibration, or the full heads")

    share: float = 0.5
    sink: int = 64
    window: int = 256
    full: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.sink < 0 or self.window < 1:
            raise ValueError(f"{self}: it needs a share from 0 to 1, sink ≥ 0 and window ≥ 1")

    @property
    def is_fitted(self) -> bool:
        return self.full is not None

    @property
    def options(self) -> tuple[SinkWindow]:
        return (SinkWindow(self.sink, self.window),)

    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, DuoAttention]:
        losses = {n: x.losses[0] for n, x in seen.items()}
        count = math.ceil(self.share * sum(map(len, losses.values())) - 1e-9)
        return {n: replace(self, full=full) for n, full in largest(losses, count).items()}

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        full = full_heads(self, self.full, "full", at, a)
        if isinstance(full, Refusal):
            return full
        near = self.options[0].keep(at, a)
        return near if isinstance(near, Refusal) else full | near
