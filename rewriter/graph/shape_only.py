"""Tensors that are read for their shape alone: `expand_as(x, y)` is `expand(x, y.shape)`, and y is read no more.

So is `zeros_like(y)`, which is `zeros(y.shape)`.
"""

from __future__ import annotations

import torch
from torch import fx

from .node import arguments, op_name, tensor_of
from .torch_private import OpOverload

_GIVEN_SIZES = {
    "expand_as": torch.ops.aten.expand.default,
    "view_as": torch.ops.aten.view.default,
    "reshape_as": torch.ops.aten.reshape.default,
}
_FILLED = {
    **dict.fromkeys(("zeros_like", "new_zeros"), torch.ops.aten.zeros.default),
    **dict.fromkeys(("ones_like", "new_ones"), torch.ops.aten.ones.default),
}


def with_sizes(gm: fx.GraphModule) -> None:
    """Write the sizes down in place of the tensor that has them, where they are numbers. The graph is changed in place."""
    for n in gm.graph.nodes:
        form = _GIVEN_SIZES.get(op_name(n)) if isinstance(n.target, OpOverload) else None
        if op_name(n) in _FILLED:
            _fill(n)
        if form is None:
            continue
        x, other = (arguments(n)[a] for a in ("self", "other"))
        assert isinstance(other, fx.Node)
        sizes = tuple(tensor_of(other).shape)
        if all(isinstance(s, int) for s in sizes):
            n.target, n.args, n.kwargs = form, (x, sizes), {}


def _fill(n: fx.Node) -> None:
    made = tensor_of(n)
    # memory in the order of a tensor that lies otherwise is asked for by that tensor alone
    if all(isinstance(s, int) for s in made.shape) and made.is_contiguous() and made.layout is torch.strided:
        n.target, n.args = _FILLED[op_name(n)], (tuple(made.shape),)
        n.kwargs = {"dtype": made.dtype, "device": made.device}
