"""Selections over blocks of a plane or a volume: tokens are laid block by block for the program, its rows laid back.

    order    the token at each place, blocks one after another       table[p, block]   over the tokens as they lie
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..method import SelectionWork
from .program import TILE, TableProgram, joined


@dataclass(frozen=True)
class BlockOrder:
    """A table of rows and blocks, made of tokens that were laid block by block; its rows are those of the tokens."""

    program: TableProgram
    plane: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.program.reads

    @property
    def keyed(self) -> bool:
        return self.program.keyed

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        order = torch.from_numpy(self.order()).to(tensors[self.program.q.tensor].device)
        moved = {x.tensor: tensors[x.tensor].index_select(x.token, order) for x in (self.program.q, self.program.k)}
        made = self.program.run(torch, moved, sizes)
        return made.index_select(-2, order.argsort())

    def order(self) -> NDArray[np.int64]:
        """The token at each place of the order by blocks."""
        at = np.arange(math.prod(self.plane)).reshape([x for n, b in zip(self.plane, self.block) for x in (n // b, b)])
        axes = range(2 * len(self.plane))
        return at.transpose(*axes[::2], *axes[1::2]).reshape(-1)

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        w, (batch, heads, queries, keys, depth) = self.program.work(sizes), self.program.extents(sizes)
        moved = 8.0 * batch * depth * (heads * queries + heads // self.program.k.group * keys)
        return replace(w, bytes=w.bytes + moved, kernels=w.kernels + 4)

    def share(self, table: Any, sizes: Mapping[str, int]) -> float:
        """The share of tiles of tokens, as they lie, that one of its rows asks for."""
        place = np.argsort(self.order()) // math.prod(self.block)
        there = np.zeros((table.shape[-1], -(-len(place) // TILE)), np.float32)
        there[place, np.arange(len(place)) // TILE] = 1.0
        return float(((joined(table, TILE, 1).astype(np.float32) @ there) > 0).mean())
