"""Operators that hold several products, spelled one product at a time, in the order in which torch computes them.

    before   o = einsum("bhij,bhjd,hdo->bio", p, v, w)       s = linear(q, k)         where k holds tokens
    after    a = einsum("bhij,bhjd->bhid", p, v)             t = transpose(k, 0, 1)
             o = einsum("bhid,hdo->bio", a, w)               s = matmul(q, t)

What runs is what ran: torch's own einsum contracts a pair at a time, and its `linear` without a bias is this product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from ..capture.weights import is_weight
from ..graph.functional import call
from ..graph.node import CannotLift, arguments, op_name, tensor_of
from ..graph.where import source_line
from ..lift.operators_contract import einsum_spec
from . import defect

_ATEN = torch.ops.aten


def spell(graph: fx.Graph) -> None:
    """Spell every such operator of a graph, in place."""
    for n in list(graph.nodes):
        way = {"einsum": _pairs, "linear": _of_tokens}.get(op_name(n))
        before = n.prev
        try:
            if way is not None:
                way(graph, n)
        except Exception as error:
            defect.reason(source_line(n) or n.name, error)
            while n.prev is not before:
                graph.erase_node(n.prev)


def _pairs(graph: fx.Graph, n: fx.Node) -> None:
    """An einsum of three operands and more as einsums of two; a letter that nothing later has is summed at once."""
    a = arguments(n)
    try:
        specs, out, nodes = einsum_spec(n, a)
    except CannotLift:
        return
    path = cast("Sequence[int] | None", a.get("path"))
    if len(nodes) < 3:
        return
    # without a path from the first operand to the last
    order = list(zip(path[::2], path[1::2])) if path else [(0, 1)] * (len(nodes) - 1)
    held = list(zip(specs, nodes))
    made: list[fx.Node] = []
    with graph.inserting_before(n):
        for i, j in order:
            (right, y), (left, x) = held.pop(max(i, j)), held.pop(min(i, j))
            later = set(out).union(*(s for s, _ in held))
            kept = out if not held else "".join(c for c in dict.fromkeys(left + right) if c in later)
            new = call(graph, n, _ATEN.einsum.default, f"{left},{right}->{kept}", [x, y])
            if new is None:
                _drop(graph, made)
                return
            made.append(new)
            held.insert(len(held) if path else 0, (kept, new))
    _instead(graph, n, made[-1])


def _of_tokens(graph: fx.Graph, n: fx.Node) -> None:
    """`linear` whose rows are computed from the graph's inputs, and are no layer's weights."""
    a = arguments(n)
    x, w = cast("fx.Node", a["input"]), cast("fx.Node", a["weight"])
    if a["bias"] is not None or w.op in ("get_attr", "placeholder") or tensor_of(w).dim() != 2 or is_weight(w):
        return
    with graph.inserting_before(n):
        turned = call(graph, n, _ATEN.transpose.int, w, 0, 1)
        new = call(graph, n, _ATEN.matmul.default, x, turned) if turned is not None else None
    if new is not None:
        _instead(graph, n, new)


def _instead(graph: fx.Graph, n: fx.Node, new: fx.Node) -> None:
    n.replace_all_uses_with(new)
    graph.erase_node(n)


def _drop(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    for n in reversed(nodes):
        graph.erase_node(n)
