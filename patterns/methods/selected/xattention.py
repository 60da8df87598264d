"""XAttention: tiles by the sums of scores along antidiagonals of small cells.

    A[i, j] = softmax_j(Σ_s q[S·i + S−1−s] · k[S·j + s] / (S√d))      mass of a tile: Σ of its (B/S)² cells
    kept: of each row of tiles the largest until they hold τ of it, the first tile and the diagonal
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...attention.attention import Attention
from ...verdict import Refusal
from ..selecting import steps as st
from ..selecting.program import SelectedMethod


@dataclass(frozen=True)
class XAttention(SelectedMethod):
    """`mass` τ, `stride` S of a cell, `block` B of a tile. `share`: heads that share keys take the mean of their masses.

    An antidiagonal of an even S meets p − m of one parity alone, so that a slash at an even offset weighs nothing (seen:
    a lost slash at 48 keys, a found one at 49). Here cells of odd rows meet keys moved by one, which costs nothing:
    `alternate=False` is the published sum. Unlike the released code (e379887), nothing is lost where the length is a
    multiple of a chunk, and the sink is the first column of tiles. One hot pair off its antidiagonal is not seen, as
    published.
    """

    name: ClassVar[str] = "xattention"
    source: ClassVar[str] = "Xu et al., XAttention (2503.16428)"
    needs: ClassVar[tuple[str, ...]] = ()

    mass: float = 0.9
    stride: int = 8
    block: int = 128
    alternate: bool = True
    share: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or self.stride < 1 or self.block < 1 or self.block % self.stride:
            raise ValueError(f"{self}: it needs 0 < mass ≤ 1 and a block that is a multiple of the stride")

    def selection(self, a: Attention) -> st.CellTable | Refusal:
        keys = st.Folded(st.Keys(), self.stride)
        moved = st.Folded(st.Keys(), self.stride, shift=1) if self.alternate else None
        sums = st.Products(st.Folded(st.Queries(), self.stride, backwards=True), keys, times=1 / self.stride, odd=moved)
        mass: st.Scores = st.Summed(st.RowSoftmax(sums), self.block, self.block)
        if self.share:
            mass = st.OverHeads(mass, "mean")
        return st.Forced(st.Mass(mass, self.mass), first=1, own=1)
