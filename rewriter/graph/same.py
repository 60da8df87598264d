"""When two graphs, or two values of graphs, are the same whatever their nodes are called."""

from __future__ import annotations

import torch
from torch import fx

from .torch_private import expression


def said(graph: fx.Graph) -> object:
    """What a graph says: operators, and arguments with places for nodes. Attributes of its module stand by their names."""
    place = {n: i for i, n in enumerate(graph.nodes)}

    def plain(x: object) -> object:
        if isinstance(x, fx.Node):
            return ("node", place[x])
        if isinstance(x, (list, tuple)):
            return tuple(map(plain, x))
        if isinstance(x, slice):
            return ("slice", plain(x.start), plain(x.stop), plain(x.step))
        return (type(x), repr(x))

    def target(n: fx.Node) -> object:
        return "" if n.op in ("placeholder", "output") else n.target

    return tuple((n.op, target(n), plain(n.args), plain(tuple(n.kwargs.items()))) for n in graph.nodes)


def signature(n: fx.Node) -> object:
    """The metadata of a node's value: sizes, strides, type, device, and whether a gradient is wanted."""
    value = n.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return (type(value), str(value))
    sizes = (*value.shape, *value.stride())
    terms = tuple(expression(s) if isinstance(s, torch.SymInt) else s for s in sizes)
    return (terms, value.dtype, value.device, value.requires_grad)
