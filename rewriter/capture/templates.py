"""One call of a graph as it was traced, and what of a value decides its trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ..graph import torch_private

# Nested tuples and lists of cells and of plain values.
Tree: TypeAlias = Any
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))
OPEN = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Unfit(Exception):
    """A graph whose trace may depend on more than the key of each call; the sentence says on what."""


@dataclass(eq=False)
class Cell:
    """One tensor or size of a graph. `node` holds it now, while the new graph is written: a write in place changes that."""

    said: object
    value: Any
    node: fx.Node | None = None


@dataclass(frozen=True)
class Back:
    """In the result of a call: its input of this number, given back."""

    number: int


@dataclass(frozen=True)
class Leaf:
    """In the result of a call: what the trace gives at this place of its outputs."""

    number: int
    said: object
    value: Any


@dataclass(frozen=True)
class CallTemplate:
    """One call as it was traced: behind which mark it stands, and behind which its inputs are made, where they are tensors.

    `after` says at which of the trace's outputs an input is shown that the call wrote to or gave back; `result` is a tree of
    leaves, of inputs that are given back, and of plain values, and `said` its metadata.
    """

    mark: int
    given: tuple[int | None, ...]
    after: tuple[int | None, ...]
    result: Tree
    said: Tree


@dataclass(frozen=True)
class CallStep:
    """A call of the graph: what it is written down from (nothing for a switch of modes), its inputs, and its result."""

    node: fx.Node
    template: CallTemplate | None
    given: tuple[Cell, ...]
    result: Tree


def metadata(x: Tensor) -> object:
    if x.layout is not torch.strided or torch_private.has_hooks(x):
        raise Unfit("a tensor is sparse, or has hooks")
    flags = (x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())
    return (tuple(map(term, (*x.shape, *x.stride()))), x.dtype, x.device, *flags)


def term(x: Any) -> Any:
    """An open size as a term, or as the number that it is."""
    known = torch_private.known_size(x) if isinstance(x, torch.SymInt) else None
    return known if known is not None else torch_private.expression(x) if isinstance(x, OPEN) else x  # type: ignore[arg-type]


def plain(x: Any) -> Any:
    """Results with names as tuples."""
    if isinstance(x, (tuple, list)):
        return (list if isinstance(x, list) else tuple)(plain(y) for y in x)
    return x


def fresh_result(tree: Tree, given: Sequence[Cell]) -> Tree:
    """A result with a cell of its own for each leaf."""
    if isinstance(tree, Back):
        return given[tree.number]
    if isinstance(tree, Leaf):
        return Cell(tree.said, tree.value)
    return type(tree)(fresh_result(x, given) for x in tree) if isinstance(tree, (tuple, list)) else tree
