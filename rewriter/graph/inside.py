"""What an attention computes: the nodes between its inputs and its output."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import fx

from .node import op_name
from .torch_private import tree_leaves


def between(inputs: Collection[fx.Node], output: fx.Node) -> frozenset[fx.Node]:
    """The nodes that `output` is computed by, behind `inputs`; neither is one of them."""
    seen: set[fx.Node] = set()
    stack = [output]
    while stack:
        n = stack.pop()
        if n in seen or n in inputs or n.op != "call_function":
            continue
        seen.add(n)
        stack.extend(read_by(n))
    return frozenset(seen - {output})


# Operators that read no element of an argument: its shape, type and device alone.
_LENT: Mapping[str, int] = {
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 0),
    **dict.fromkeys(("expand_as", "type_as", "view_as", "reshape_as"), 1),
}


def read_by(n: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose elements a node reads: no sizes, no empty part of a concatenation, nothing that lends its shape."""
    at = _LENT.get(op_name(n), len(n.args))
    read = tree_leaves((n.args[:at], n.args[at + 1 :], dict(n.kwargs)))
    for i in n.all_input_nodes:
        if i not in read:
            continue
        value = i.meta.get("val")
        plain = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))
        empty = isinstance(value, torch.Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)
        if not plain and not empty:
            yield i
