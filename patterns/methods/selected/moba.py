"""MoBA: a query attends to the blocks of keys whose mean it likes best, its own block among them.

    g[p, j] = q_p · mean(K[block j])      kept: the `count` largest of the blocks that p may see; its own counts first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...attention.attention import Attention
from ...verdict import Refusal
from ..selecting import steps as st
from ..selecting.program import TILE, SelectedMethod


@dataclass(frozen=True)
class MoBA(SelectedMethod):
    """`count` blocks of `block` keys a query. `rows`: queries that share a choice, every block that one of them chose.

    With `rows=1` it is the published gate, and a tile is visited where one of its queries asks for it. A query's table
    depends on no later one, but for `rows` > 1. A last block that is not full is meant over the keys that are there.
    """

    name: ClassVar[str] = "moba"
    source: ClassVar[str] = "Lu et al., MoBA: Mixture of Block Attention (2502.13189)"

    count: int = 3
    block: int = 512
    rows: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.block < 1 or self.rows < 1:
            raise ValueError(f"{self}: it needs count, block and rows of 1 or more")

    def selection(self, a: Attention) -> st.CellTable | Refusal:
        gate = st.Products(st.Queries(), st.Pooled(st.Keys(), self.block))
        kept = st.Largest(st.Raised(gate, first=0, own=1), self.count)
        return st.Spread(kept, self.rows, self.block) if self.rows > 1 else kept

    def expected(self, a: Attention) -> float | None:
        size = a.cascade.rank[a.key].size
        # what single rows ask for together is seen in a calibration alone
        if not isinstance(size, int) or self.rows < TILE:
            return None
        blocks = -(-size // self.block)
        pairs = blocks * (blocks + 1) / 2
        return sum(min(i + 1, self.count) for i in range(blocks)) / pairs
