"""Strided shards: each head sees its own share of the tiles far away, and all see the last few.

    i = p // tile, j = m // tile;   keep = (j + h·step + offset) mod stride = 0  ∨  i − j < local      under the model's mask
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...expr import Expr
from ...verdict import Refusal
from ..method import StaticMethod, TokenPositions, heads, key_group


@dataclass(frozen=True)
class StridedShards(StaticMethod):
    """Tiles of `tile` tokens, one of `stride` to each head, and the last `local`, a row's own among them.

    `step` turns the shard from head to head, by ⌊stride / heads⌋ and at least 1 where it is 0; heads are key heads, so that
    those which share keys share a shard. Refused where the heads together leave a tile out, which the published default
    does for strides above heads · step. Heads must have learned their shards: others lose what they leave out.
    """

    name: ClassVar[str] = "strided-shards"
    source: ClassVar[str] = "Lin et al., S2-Attention: Context Sharding Among Attention Heads (2407.17678), section 3"
    needs: ClassVar[tuple[str, ...]] = ("a causal attention", "several heads", "heads that were trained so")

    tile: int = 64
    local: int = 4
    stride: int = 4
    step: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        if min(self.tile, self.local, self.stride) < 1 or self.step < 0 or self.offset < 0:
            raise ValueError("StridedShards needs tile, local and stride from 1, step and offset from 0")

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        count = heads(a)
        if not at.causal:
            return self.refuse("it needs a causal attention: nothing says which tiles are a row's last")
        if at.head is None or not isinstance(count, int):
            return self.refuse("it needs a known number of heads")
        group = key_group(a)
        shared = count // group
        step = self.step or max(1, self.stride // shared)
        if len({h * step % self.stride for h in range(shared)}) < self.stride:
            return self.refuse(f"{shared} heads that are {step} apart leave some of {self.stride} shards to nobody")
        head = at.head // group if group > 1 else at.head
        row, key = at.row // self.tile, at.key // self.tile
        return ex.equal((key + head * step + self.offset) % self.stride, 0) | (row - key < self.local)
