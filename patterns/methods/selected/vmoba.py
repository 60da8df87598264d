"""VMoBA: MoBA for the tokens of a video, whose blocks are segments of time, patches of a frame and cubes, layer by layer.

    block(m)   from the token's coordinates (t, y, x) on `plane`, one shape of blocks for each layer in turn
    g[p, j]  = q_p · mean(K[block j]), laid between 0 and 1      over a head's rows together ("head"), or row by row ("row")
    kept       the largest g up to `share` of their sum in that scope; a row's own block besides
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Tensor
from ...expr import Expr
from ...masks.split import split
from ...verdict import Refusal
from ..fitted import FittedMethod, HeadsSeen
from ..masked import masked
from ..method import Replacement, positions
from ..plane import Axes, checked_plane
from ..selecting import steps as st
from ..selecting.block_order import BlockOrder
from ..selecting.program import bound

SCOPES = ("row", "head")


@dataclass(frozen=True)
class VMoBA(FittedMethod):
    """`blocks`: shapes of blocks on `plane`, 0 for a whole axis; layer l takes the one of number l mod their count.

    `layer` is that of one attention, and found by the order of the attentions. With `count` a row keeps so many blocks, its
    own among them, and no share is asked for. Blocks must divide the plane. Released code differs, and is not followed:
    where no row chooses a block it attends to everything, and where a row's own block holds the share it takes one more. A
    tile of rows visits what one of its rows asks for, and a block whose tokens lie apart is visited wherever they lie: only
    segments of time lie together as tokens usually do.
    """

    name: ClassVar[str] = "vmoba"
    source: ClassVar[str] = "Wu et al., VMoBA: Mixture-of-Block Attention for Video Diffusion Models (2506.23858), section 3"
    needs: ClassVar[tuple[str, ...]] = ("an attention without a mask", "the plane of its tokens")

    plane: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    share: float = 0.25
    scope: str = "head"
    count: int = 0
    layer: int | None = None

    def __post_init__(self) -> None:
        if not self.blocks or any(len(b) != len(self.plane) for b in self.blocks):
            raise ValueError(f"VMoBA needs shapes of blocks with {len(self.plane)} numbers, one an axis of its plane")
        for n, b in ((n, b) for shape in self.blocks for n, b in zip(self.plane, shape)):
            if b < 0 or (b and n % b):
                raise ValueError(f"VMoBA's blocks of {b} do not divide an axis of {n}")
        if not 0 < self.share <= 1 or self.scope not in SCOPES or self.count < 0:
            raise ValueError('VMoBA needs a share above 0 and up to 1, the scope "row" or "head", count ≥ 0')

    @property
    def is_fitted(self) -> bool:
        return self.layer is not None

    @property
    def options(self) -> tuple[()]:
        return ()

    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, VMoBA]:
        return {n: replace(self, layer=i % len(self.blocks)) for i, n in enumerate(seen)}

    @property
    def block(self) -> tuple[int, ...]:
        """The shape of this layer's blocks."""
        shape = self.blocks[(self.layer or 0) % len(self.blocks)]
        return tuple(b or n for n, b in zip(self.plane, shape))

    def replace(self, a: Attention) -> Replacement | Refusal:
        if self.layer is None:
            return self.refuse("its blocks go by the number of the layer, found by a calibration: give one, or give layer=…")
        at = positions(a)
        if isinstance(at, Refusal):
            return self.refuse(at.reason)
        if split(a.score, a.key).keep is not ex.TRUE:
            return self.refuse("its blocks hold tokens from everywhere, which a mask would hide in part")
        found = checked_plane(self.plane, at, a)
        if isinstance(found, Refusal):
            return self.refuse(found.reason)
        program = bound(a, self._selection())
        if isinstance(program, str):
            return self.refuse(program)
        c = a.cascade
        blocks = math.prod(n // b for n, b in zip(self.plane, self.block))
        table = Tensor("KEEP", (*(c.rank[r].size for r in a.batch), math.prod(self.plane), blocks), "b1")
        where = (*(ex.index(r) for r in (*a.batch, a.query)), _block_of(found[1], self.plane, self.block))
        made = masked(a, ex.load(table.name, where, "b1"), str(self), (table,))
        if isinstance(made, Refusal):
            return made
        return Replacement(made, table.name, BlockOrder(program, self.plane, self.block))

    def _selection(self) -> st.CellTable:
        gate = st.Products(st.Queries(), st.Pooled(st.Keys(), math.prod(self.block)))
        if self.count:
            return st.Largest(st.Raised(gate, first=0, own=1), self.count)
        return st.Forced(st.Mass(st.Unit(gate, self.scope), self.share, self.scope), first=0, own=1)


def _block_of(key: Axes, plane: tuple[int, ...], block: tuple[int, ...]) -> Expr:
    out: Expr = ex.const(0)
    for at, n, b in zip(key, plane, block):
        out = out * (n // b) + (at // b if b > 1 else at)
    return out
