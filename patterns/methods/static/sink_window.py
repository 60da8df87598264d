"""Sink and window: the first keys and those just behind a row (also known as Λ, A-shape, streaming heads).

    keep = m ≤ p ∧ (m < sink ∨ p − m < window)        the window holds the row's own key
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...attention.attention import Attention
from ...expr import Expr
from ...verdict import Refusal
from ..method import StaticMethod, TokenPositions


@dataclass(frozen=True)
class SinkWindow(StaticMethod):
    """Keys before `sink`, and the last `window` keys up to a row, itself among them.

    At true positions: StreamingLLM's numbering by cache slot is another score, and another method. What lies outside of
    both is lost, whatever it says.
    """

    name: ClassVar[str] = "sink-window"
    source: ClassVar[str] = "Xiao et al., Efficient Streaming Language Models with Attention Sinks (2309.17453), section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("a causal attention",)

    sink: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        if self.sink < 0 or self.window < 1:
            raise ValueError(f"SinkWindow needs sink ≥ 0 and window ≥ 1, not {self.sink} and {self.window}")

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        if not at.causal:
            return self.refuse("it needs a causal attention: nothing says where the window of a row ends")
        near = at.row - at.key < self.window
        return (at.key < self.sink) | near if self.sink else near
