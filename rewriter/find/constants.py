"""Tensors that a graph makes of nothing but its constants: what a mask holds at every call, known when planning.

    self.window (a buffer)      zeros(N, N) with slices written      →      their elements, while nothing writes them

Counts of tiles read them, and no rewrite rests on them: what runs reads the tensor that is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from ...cost_model.count.tiles import NOTHING, Data
from ..graph.aliases import Aliases
from ..graph.liveness import is_pure
from ..graph.torch_private import has_no_value, tree_map

# Elements of one tensor from which on reading it would take longer than a plan should.
LARGEST = 1 << 24


def constants(tensors: Mapping[str, fx.Node]) -> Data:
    """What is known when planning of these tensors, by name."""
    if not tensors:
        return NOTHING
    aliases = Aliases(next(iter(tensors.values())).graph)
    found = {name: constant(n, aliases) for name, n in tensors.items()}
    held = {name: x for name, x in found.items() if x is not None}
    return Data.of(held) if held else NOTHING


def constant(node: fx.Node, aliases: Aliases) -> NDArray[np.generic] | None:
    """The elements of a node's tensor; None where an input, a parameter, a write or a random number stands behind it."""
    order = _behind(node)
    if order is None or any(not _kept(n, aliases) for n in order):
        return None
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in order:
            known[n] = _attribute(n) if n.op == "get_attr" else _computed(n, known)
    found = known[node]
    return _array(found) if isinstance(found, Tensor) else None


def _behind(node: fx.Node) -> Sequence[fx.Node] | None:
    """The node and all that it is made of, in order; None where that is more than constants."""
    seen, stack = {node}, [node]
    while stack:
        n = stack.pop()
        if n.op not in ("get_attr", "call_function"):
            return None
        fresh = [x for x in n.all_input_nodes if x not in seen]
        seen.update(fresh)
        stack += fresh
    return [n for n in node.graph.nodes if n in seen]


def _kept(n: fx.Node, aliases: Aliases) -> bool:
    """Is it the same at every call, and small enough to be looked at?"""
    value = n.meta.get("val")
    if aliases.is_written(n) or (isinstance(value, Tensor) and not _small(value)):
        return False
    if n.op == "get_attr":
        held = _attribute(n)
        if not isinstance(held, Tensor) or isinstance(held, nn.Parameter):
            return False
        return not held.is_meta and not has_no_value(held)
    return is_pure(n)


def _small(value: Tensor) -> bool:
    return all(isinstance(s, int) for s in value.shape) and value.numel() <= LARGEST


def _attribute(n: fx.Node) -> object:
    value: object = n.graph.owning_module
    for part in str(n.target).split("."):
        value = getattr(value, part)
    return value


def _computed(n: fx.Node, known: dict[fx.Node, Any]) -> Any:
    assert callable(n.target)
    return n.target(*_given(n.args, known), **_given(n.kwargs, known))


def _given(arguments: Any, known: dict[fx.Node, Any]) -> Any:
    return tree_map(lambda x: known[x] if isinstance(x, fx.Node) else x, arguments)


def _array(x: Tensor) -> NDArray[np.generic]:
    x = x.detach().cpu()
    return np.asarray(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)
