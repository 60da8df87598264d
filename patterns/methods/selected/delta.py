"""DELTA: some layers of a decode look at all keys and name the pages, the layers behind them read these alone.

    P_h = softmax(q_h Kᵀ)     score of a page = Σ_{t in page} max_h P_h(t)     kept: the `count` pages that score most,
    the last `recent` among them, the same for all heads
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...attention.attention import Attention
from ...cascade import bind
from ...verdict import Refusal
from ..selecting import steps as st
from ..selecting.program import SelectedMethod


@dataclass(frozen=True)
class DELTA(SelectedMethod):
    """`count` pages of `page` keys, of which the last `recent` are always kept.

    `roles` says what each layer does: "full" reads everything, "select" reads everything and names pages, "reuse" reads the
    pages of the last layer that named some. This law is the selection alone, for one row: a layer that runs it chooses for
    itself, which costs a product with all keys. The first page (the sink) is kept only where it scores.
    """

    name: ClassVar[str] = "delta"
    source: ClassVar[str] = "DELTA, layer-aware token attention, as its released code chooses (c354073)"
    needs: ClassVar[tuple[str, ...]] = ("decoding a token at a time",)

    count: int = 64
    page: int = 16
    recent: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.recent <= self.count or self.page < 1:
            raise ValueError(f"{self}: it needs 0 < recent ≤ count and page ≥ 1")

    def selection(self, a: Attention) -> st.CellTable | Refusal:
        if bind(a.cascade.rank[a.query].size, {}) != 1:
            return self.refuse("it chooses for one row, and this attention has more")
        rows = st.OverHeads(st.RowSoftmax(st.Products(st.Queries(), st.Keys())), "max", every=True)
        pages = st.Summed(rows, 1, self.page)
        return st.Largest(st.Raised(pages, first=0, own=self.recent), self.count)


def roles(layers: int, full: int = 2, every: int = 8) -> tuple[str, ...]:
    """What each layer does: the first `full` read everything, then one of each `every` selects and the others reuse."""
    behind = [("select" if i % every == 0 else "reuse") for i in range(max(0, layers - full))]
    return ("full",) * min(full, layers) + tuple(behind)
