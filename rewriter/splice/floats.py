"""Floats that change from call to call, as Inductor knows them: read from their tensor by `item`, and computed with.

    before   y = call(q, k, v, s)                              s a tensor of one number that Dynamo made of a float
    after    x = item(s); t = 1 · x; y = call(q, k, v, t)      Inductor sees x used, and does not take it for a constant
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..capture.capture import FLOAT


def computed_with(gm: fx.GraphModule) -> None:
    """Let each such tensor that is read as it is be read through its number; the graph is changed in place."""
    graph = gm.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    direct = [n for n in inputs if n.meta.get(FLOAT) and n.users and not any(map(_reads_number, n.users))]
    if not direct:
        return
    last = inputs[-1]
    for n in direct:
        value = n.meta["val"]
        number = last = _after(last, torch.ops.aten.item.default, n)
        one = _after(last, torch.ops.aten.scalar_tensor.default, 1.0, dtype=value.dtype, device=value.device)
        last = _after(one, torch.ops.aten.mul.Tensor, one, number)
        last.meta["val"] = value
        n.replace_all_uses_with(last, delete_user_cb=lambda u, number=number: u is not number)
    graph.lint()
    gm.recompile()


def _after(place: fx.Node, target: Callable[..., Any], *args: Any, **options: Any) -> fx.Node:
    with place.graph.inserting_after(place):
        return place.graph.call_function(target, args, options)


def _reads_number(n: fx.Node) -> bool:
    return n.target is torch.ops.aten.item.default
