"""A mask by positions: the callable that a library makes masks from, carried in the mask's place and made only where read.

    keep(b, h, q, k)        q counts from where the queries begin, k from where the keys begin

By shape and type it is what eager attention adds to its scores, and who computes with it (slices it, adds it, moves it) gets
that: 0 where a key is kept, and the type's least number where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from typing import cast as typed

import torch
from torch import Tensor, fx

from ..graph import torch_private
from ..graph.node import op_name
from .callables import Leaf, Opaque, Structure, standing_for, structure


@dataclass(frozen=True, eq=False)
class Positions:
    """What a mask is made from. `fill` is the type whose least number stands where a key is not kept.

    `pointwise`: is the callable known to see each position alone when it is given whole ranges? `make` gives the dense mask,
    as it is added to scores.
    """

    batch: int
    queries: int
    keys: int
    query_offset: int
    key_offset: int
    function: Callable[..., Tensor]
    fill: torch.dtype
    device: torch.device
    pointwise: bool
    make: Callable[[], Tensor]

    @cached_property
    def lifted(self) -> Structure | str:
        """The callable taken apart, or why it cannot be."""
        try:
            found = structure(self.function)
        except Opaque as no:
            return str(no)
        if not self.pointwise and (why := not_pointwise(found, self.device)):
            return why
        return found

    @cached_property
    def dense(self) -> Tensor:
        """The mask as a tensor, made once."""
        return self.make()

    @cached_property
    def ends_together(self) -> bool:
        """Is the last query at the last key, as in a cache that grows?"""
        return self.query_offset + self.queries == self.key_offset + self.keys

    @cached_property
    def key(self) -> Hashable:
        """Stands for all that the mask's code depends on, beside the leaves."""
        assert isinstance(self.lifted, Structure)
        return standing_for((self.lifted.key, self.ends_together, self.fill))

    @cached_property
    def leaves(self) -> list[Leaf]:
        """The tensors and numbers that the mask's code reads; `reading` takes them."""
        assert isinstance(self.lifted, Structure)
        offsets = [self.key_offset] if self.ends_together else [self.key_offset, self.query_offset]
        return [*offsets, *self.lifted.leaves]

    @cached_property
    def reading(self) -> Callable[[Tensor, Tensor, Sequence[Any]], Tensor]:
        """The additive mask of queries and keys and of leaves, as code that may be kept: it holds no dense mask."""
        assert isinstance(self.lifted, Structure)
        return partial(of_leaves, self.lifted.make, self.ends_together, self.fill)


def of_leaves(
    make: Callable[[Sequence[Any]], Callable[..., Tensor]], ends_together: bool, fill: torch.dtype, query: Tensor,
    key: Tensor, leaves: Sequence[Any],
) -> Tensor:
    """The additive mask of these queries and keys (their last dimension but one), to be traced."""
    queries, keys, first, *rest = query.shape[-2], key.shape[-2], *leaves
    begin = first + keys - queries if ends_together else rest.pop(0)
    there = query.device
    b = torch.arange(query.shape[0], device=there).view(-1, 1, 1, 1)
    h = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=there)
    q = (torch.arange(queries, device=there) + begin).view(1, 1, -1, 1)
    k = torch.arange(keys, device=there) + first
    keep = make(rest)(b, h, q, k)
    return added(keep.expand(query.shape[0], -1, queries, keys), fill)


def added(keep: Tensor, fill: torch.dtype) -> Tensor:
    """What eager attention adds to its scores."""
    return torch.where(keep, torch.zeros((), device=keep.device, dtype=fill), torch.finfo(fill).min)


def not_pointwise(s: Structure, device: torch.device) -> str:
    """Why a callable of single positions may not be given whole ranges; empty where it provably may.

    Operators that act on each element alone act on ranges alike, and so does a read of one element of a tensor.
    """
    shapes = (2, 1, 1, 1), (1, 1, 1, 1), (1, 1, 3, 1), (1, 1, 1, 5)
    ranges = [torch.zeros(n, dtype=torch.long, device=device) for n in shapes]
    try:
        graph = torch_private.pre_dispatch_graph(lambda *x: s.make(s.leaves)(*x), ranges)
    except Exception as error:
        return f"it cannot be given ranges of positions: {type(error).__name__}"
    calls = (n for n in graph.graph.nodes if n.op == "call_function")
    return next((f"{n.target} need not see each position alone" for n in calls if not _sees_each_alone(n)), "")


# Operators on each element that carry no such tag, and those that make one number.
_EACH = frozenset((
    "__and__", "__or__", "__xor__", "floor_divide", "rsub", "masked_fill", "where", "clone", "to", "lift_fresh",
    "lift_fresh_copy",
))
_NUMBERS = frozenset(("new_ones", "new_zeros", "new_full"))


def _sees_each_alone(n: fx.Node) -> bool:
    name = op_name(n)
    if name == "index":
        return _reads_elements(n)
    if name in _NUMBERS:
        return n.args[1] == []
    return name in _EACH or torch.Tag.pointwise in getattr(n.target, "tags", ())


def _reads_elements(n: fx.Node) -> bool:
    """`x[i, j]` with an index in every dimension, none of them a condition."""
    read, indices = typed("tuple[Any, list[Any]]", n.args)
    held = [i.meta["val"] for i in indices if i is not None]
    whole = len(held) == len(indices) == _value(read).dim()
    return whole and all(not i.dtype.is_floating_point and i.dtype not in (torch.bool, torch.uint8) for i in held)


def _value(n: Any) -> Tensor:
    if n.op == "get_attr":
        held: Tensor = getattr(n.graph.owning_module, str(n.target))
        return held
    value: Tensor = n.meta["val"]
    return value


class PositionMask(Tensor):
    """A mask that is made where somebody reads it."""

    positions: Positions

    @staticmethod
    def of(positions: Positions) -> PositionMask:
        shape = (positions.batch, 1, positions.queries, positions.keys)
        made: PositionMask = torch_private.wrapper_tensor(PositionMask, shape, positions.fill, positions.device)
        made.positions = positions
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PositionMask({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*torch_private.tree_map(_dense, args), **torch_private.tree_map(_dense, kwargs or {}))


def _dense(x: Any) -> Any:
    return x.positions.dense if isinstance(x, PositionMask) else x
