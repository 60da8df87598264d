"""Identical layers: an attention whose subgraph equals one already lifted takes its cascade without being lifted again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import fx

from ..graph.aliases import Aliases
from ..graph.node import op_name
from ..graph.torch_private import expression
from ..lift.operators_contract import LOOKED_THROUGH


def match(
    pattern: fx.Node, leaves: Collection[fx.Node], interior: Collection[fx.Node], candidate: fx.Node, aliases: Aliases
) -> Mapping[fx.Node, fx.Node] | None:
    """Walk both subgraphs in step from their outputs; answer candidate's node for each leaf, or None where they differ.

    Interior nodes must agree in operator, constant arguments, shapes and types; leaves in shape, type and operator. A leaf
    that the walk does not reach, because it lies behind another one only, has no counterpart: then nothing matches.
    A subgraph whose storage is written in place while it is read never matches.
    """
    bound: dict[fx.Node, fx.Node] = {}
    stack: list[tuple[fx.Node, fx.Node]] = [(pattern, candidate)]
    stop, inside = set(leaves), set(interior) | {pattern}
    while stack:
        a, b = stack.pop()
        if a in bound:
            if bound[a] is not b:
                return None
            continue
        if not (_exchangeable(a, b) if a in stop else _alike(a, b)):
            return None
        if a not in stop and not _is_empty(a) and aliases.written_between(b, b, candidate):
            return None
        bound[a] = b
        if a in stop or _is_empty(a):
            continue
        if a is b:
            # what both share, they share with all that is behind it
            stack.extend((x, x) for x in a.all_input_nodes if x in stop or x in inside)
            continue
        if a not in inside:
            return None
        pairs = _paired(a, b)
        if pairs is None:
            return None
        stack.extend(pairs)
    if not stop <= bound.keys():
        return None
    out = {leaf: bound[leaf] for leaf in stop}
    walked = set(bound.values())
    for leaf in out.values():
        first = min((aliases.position[u] for u in leaf.users if u in walked), default=aliases.position[candidate])
        if aliases.written_between(leaf, first - 1, candidate):
            return None
    return out


def _is_empty(n: fx.Node) -> bool:
    """Whether a value has no element: nothing is read of what it is made of."""
    value = n.meta.get("val")
    return isinstance(value, torch.Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)


def _exchangeable(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are read as inputs: equal shapes, and nothing at either that reading would look through."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or _signature(x) != _signature(y):
        return False
    return (a.op == b.op and a.target == b.target) or not (op_name(a) in LOOKED_THROUGH or op_name(b) in LOOKED_THROUGH)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    if a.op != b.op or (a.op == "call_function" and a.target is not b.target):
        return False
    x, y = a.meta.get("val"), b.meta.get("val")
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return _signature(x) == _signature(y)
    if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt):
        return bool(expression(x) == expression(y))
    return type(x) is type(y) and (isinstance(x, (list, tuple)) or x is y or x == y)


def _signature(t: torch.Tensor) -> tuple[object, ...]:
    sizes = tuple(expression(s) if isinstance(s, torch.SymInt) else s for s in t.shape)
    return (sizes, t.dtype, t.device, t.requires_grad)


def _paired(a: fx.Node, b: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The argument nodes of both in step; None when constants differ or an input of the graph would have to be equal."""
    if a.op in ("placeholder", "get_attr"):
        return None
    pairs: list[tuple[fx.Node, fx.Node]] = []
    if not _walk(a.args, b.args, pairs) or not _walk(a.kwargs, b.kwargs, pairs):
        return None
    return pairs


def _walk(x: object, y: object, pairs: list[tuple[fx.Node, fx.Node]]) -> bool:
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)):
            return False
        pairs.append((x, y))
        return True
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(_walk(p, q, pairs) for p, q in zip(x, y))
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(_walk(v, y[k], pairs) for k, v in x.items())
    return type(x) is type(y) and bool(x == y)
