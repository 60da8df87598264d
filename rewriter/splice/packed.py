"""Several results of one call as one tensor: rows side by side, those of a narrower one filled up with zeros.

    before   y [b,t,e], s [b,e,n]        after   p = cat([pad(y as rows), pad(s as rows)]); y and s are views of p
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import reduce

import torch
from torch import Tensor, fx

from .order import same_strides
from .splice import in_order, node

_ATEN = torch.ops.aten


def common(results: Sequence[Tensor]) -> torch.dtype:
    """The type that holds the values of all."""
    return reduce(torch.promote_types, (x.dtype for x in results))


def packed(results: Sequence[Tensor]) -> Tensor:
    """One tensor as it is; several as the rows of one, in a type that holds them all."""
    if len(results) == 1:
        return results[0]
    width, wide = max(x.shape[-1] for x in results), common(results)
    rows = [x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(wide) for x in results]
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in rows])


def unpacked(gm: fx.GraphModule, results: Sequence[fx.Node], inside: Collection[fx.Node]) -> fx.Node:
    """Put the packed results of some nodes behind the last of them, and let whoever reads one read it from there.

    What makes them (`inside`) goes on reading them as they are.
    """
    graph = gm.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(results, key=order.__getitem__)
    readers = {r: [u for u in r.users if u not in inside] for r in results}
    shapes = [tuple(r.meta["val"].shape) for r in results]
    width, wide = max(s[-1] for s in shapes), common([r.meta["val"] for r in results])
    with graph.inserting_after(last):
        anchor = graph.call_function(_ATEN.alias.default, (last,))
    with graph.inserting_before(anchor):
        rows = []
        for r, shape in zip(results, shapes):
            flat = node(graph, r, _ATEN.reshape.default, (r, [math.prod(shape[:-1]), shape[-1]]))
            flat = node(graph, r, _ATEN.to.dtype, (flat, wide)) if r.meta["val"].dtype != wide else flat
            rows.append(node(graph, r, _ATEN.constant_pad_nd.default, (flat, [0, width - shape[-1]], 0.0)))
        whole = node(graph, last, _ATEN.cat.default, (rows,))
        first = 0
        for r, shape in zip(results, shapes):
            many = math.prod(shape[:-1])
            cut = node(graph, r, _ATEN.slice.Tensor, (whole, 0, first, first + many))
            cut = node(graph, r, _ATEN.slice.Tensor, (cut, 1, 0, shape[-1]))
            back = node(graph, r, _ATEN.reshape.default, (cut, list(shape)))
            back = node(graph, r, _ATEN.to.dtype, (back, r.meta["val"].dtype)) if r.meta["val"].dtype != wide else back
            if not same_strides(back.meta["val"], r.meta["val"]):
                back = in_order(graph, r, back)
            first += many
            for u in readers[r]:
                u.replace_input_with(r, back)
    graph.erase_node(anchor)
    return whole
