"""FlexPrefill: heads whose pooled scores predict their last rows take tiles by these, others columns and slashes.

    A = softmax(Q[last block] Kᵀ)    ā[j] = mean of A over rows, summed over a block    â = softmax(mean Q[last block] · K̄ᵀ)
    √JS(ā, â) < τ    →  tiles of softmax(Q̄ K̄ᵀ), the largest of a head together until they hold γ of it
    otherwise        →  the keys that hold γ of A's columns, and the offsets p − m that hold γ of its slashes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...attention.attention import Attention
from ...verdict import Refusal
from ..selecting import steps as st
from ..selecting.program import SelectedMethod


@dataclass(frozen=True)
class FlexPrefill(SelectedMethod):
    """`mass` γ of each part, `distance` τ, `block` queries and keys of a tile and rows of the probe, `least` columns.

    Unlike the released code (a24b27b): 0 · log 0 is 0 in the divergence, where underflow made it NaN and every head took
    columns and slashes; a share is reached, and columns are found as tokens before they become tiles, where the code took
    blocks by a count of tokens and fell short of γ; rows may lie at the end of a cache. A query in the middle that asks for
    a key which the last block does not look at may lose it: the probe cannot see it, as published.
    """

    name: ClassVar[str] = "flexprefill"
    source: ClassVar[str] = "Lai et al., FlexPrefill (2502.20766)"
    needs: ClassVar[tuple[str, ...]] = (
        "rows with a place among the keys", "prompts without a cached prefix: what a row keeps depends on later tokens",
    )

    mass: float = 0.95
    distance: float = 0.1
    block: int = 128
    least: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or self.distance < 0 or self.block < 1 or self.least < 0:
            raise ValueError(f"{self}: it needs 0 < mass ≤ 1, distance ≥ 0, block ≥ 1 and least ≥ 0")

    def selection(self, a: Attention) -> st.CellTable | Refusal:
        n, q, k = self.block, st.Queries(), st.Keys()
        probe = st.RowSoftmax(st.Products(st.Last(q, n), k))
        estimate = st.RowSoftmax(st.Products(st.Pooled(st.Last(q, n), n), st.Pooled(k, n)))
        near = st.Alike(st.Summed(probe, 0, n, mean=True), estimate, self.distance)
        pooled = st.Mass(st.RowSoftmax(st.Products(st.Pooled(q, n), st.Pooled(k, n))), self.mass, "head")
        columns = st.Spread(st.Mass(st.Summed(probe, 0, 1, mean=True), self.mass, least=self.least), 0, n)
        slashes = st.Slashes(st.Mass(st.Offsets(probe), self.mass, least=self.least), n)
        chosen = st.Chosen(near, pooled, st.Either(st.Columns(columns, n), slashes))
        return st.Forced(chosen, first=1, own=1)
