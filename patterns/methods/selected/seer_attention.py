"""SeerAttention: tiles by a small gate that was trained for it, with weights of one's own.

    Q̂ = RoPE_i(mean Q · W_q)     K̂ = RoPE_j([max, min, mean] K · W_k)     kept: softmax_j(Q̂ K̂ᵀ / √d_g) ≥ t, or its largest
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...attention.attention import Attention
from ...cascade import bind
from ...verdict import Refusal
from ..fitted import HeadsSeen
from ..linear.learned import LearnedMethod
from ..selecting import steps as st
from ..selecting.program import SelectedMethod, batch_ranks


@dataclass(frozen=True)
class SeerAttention(LearnedMethod, SelectedMethod):
    """`queries` [heads, E, g] and `keys` [heads of keys, len(pooled) · E, g]: the gate, of this attention. `gates` names a
    file (safetensors) with those of all, "attention.queries" and "attention.keys", which a calibration reads.

    Kept are tiles of at least `threshold`, or with `count` the `count` largest of a row. A threshold asks of a distribution
    over i + 1 tiles, so that later rows keep fewer: where none reaches it, the row keeps its own tile and the first.
    `rotary` is the base of the tiles' positions (0: none).
    """

    name: ClassVar[str] = "seerattention"
    source: ClassVar[str] = "Gao et al., SeerAttention (2410.13276)"
    needs: ClassVar[tuple[str, ...]] = ("a trained gate",)

    queries: st.Learned | None = None
    keys: st.Learned | None = None
    threshold: float = 2e-3
    count: int = 0
    block: int = 64
    pooled: tuple[str, ...] = ("max", "min", "mean")
    rotary: float = 10000.0
    gates: str = ""

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.count < 0 or self.block < 1 or not set(self.pooled) <= {"max", "min", "mean"}:
            raise ValueError("SeerAttention needs threshold ≥ 0, count ≥ 0, block ≥ 1 and pools of max, min, mean")
        if self.queries is not None and self.keys is not None and self.queries.values.shape[2] != self.keys.values.shape[2]:
            raise ValueError("SeerAttention's maps of queries and keys give rows of different lengths")

    @property
    def is_fitted(self) -> bool:
        return self.queries is not None and self.keys is not None

    @property
    def file(self) -> str:
        return self.gates

    @property
    def parts(self) -> tuple[str, ...]:
        return ("queries", "keys")

    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, SeerAttention]:
        """Nothing: its gate was trained elsewhere, and comes by `with_parts`."""
        return {}

    def with_parts(self, parts: Mapping[str, Any]) -> SeerAttention:
        return replace(self, queries=st.Learned.of(parts["queries"]), keys=st.Learned.of(parts["keys"]))

    def selection(self, a: Attention) -> st.CellTable | Refusal:
        if self.queries is None or self.keys is None:
            return self.refuse("it needs a gate that was trained for it: give queries and keys, or their file as gates")
        if wrong := self._unlike(a, self.queries):
            return self.refuse(wrong)
        q: st.TokenRows = st.Mapped(st.Pooled(st.Queries(), self.block), self.queries)
        k: st.TokenRows = st.Mapped(st.Pooled(st.Keys(), self.block, self.pooled), self.keys)
        if self.rotary:
            q, k = st.Rotated(q, self.rotary), st.Rotated(k, self.rotary)
        gate = st.RowSoftmax(st.Products(q, k, scale=self.queries.values.shape[2] ** -0.5))
        kept = st.Largest(gate, self.count) if self.count else st.Above(gate, self.threshold)
        return st.Forced(kept, first=1, own=1)

    def _unlike(self, a: Attention, queries: st.Learned) -> str:
        _, head = batch_ranks(a)
        heads, width = (bind(a.cascade.rank[r].size, {}) if r else 1 for r in (head, a.products[0].over[0]))
        shape = queries.values.shape[:2]
        if isinstance(heads, int) and isinstance(width, int) and shape != (heads, width):
            return f"its gate is for {shape[0]} heads of {shape[1]}, and this attention has {heads} of {width}"
        return ""
