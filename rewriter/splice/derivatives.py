"""The second derivative of a kernel that has only the first: that of the code which it replaces.

    forward     leaves → kernel → out
    backward    the kernel's own; while a graph of the backward is wanted (`create_graph`), the original's on the same leaves

Nothing more is kept for it than the kernel keeps itself: the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.autocast import no_autocast
from ..graph.torch_private import tree_flatten, tree_leaves, tree_map, tree_unflatten


def twice(kernel: Callable[..., Tensor], arguments: Any, original: Callable[..., Tensor], inputs: Any) -> Tensor:
    """`kernel(*arguments)`, whose gradient can be differentiated as that of `original(*inputs)`, which is the same."""
    flat = tree_leaves((arguments, inputs))
    leaves = list({id(x): x for x in flat if isinstance(x, Tensor) and x.requires_grad}.values())
    if not leaves:
        return kernel(*arguments)
    way = _Way(original, inputs, leaves)
    entered = {id(x): _Enter.apply(x, way, i) for i, x in enumerate(leaves)}  # type: ignore[no-untyped-call]
    given = tree_map(lambda x: entered.get(id(x), x), arguments)
    out: Tensor = _Leave.apply(kernel(*given), way, *leaves)  # type: ignore[no-untyped-call]
    return out


class _Way:
    """How the gradients of one call are found a second time. Leaves are given by those who keep them for a backward."""

    def __init__(self, original: Callable[..., Tensor], inputs: Any, leaves: Sequence[Tensor]) -> None:
        place = {id(x): i for i, x in enumerate(leaves)}
        flat, self.form = tree_flatten(inputs)
        self.places = [place.get(id(x)) for x in flat]
        self.others = [x if i is None else None for x, i in zip(flat, self.places)]
        self.original = original
        self.gradients: list[Tensor | None] = []

    def follow(self, leaves: Sequence[Tensor], gradient: Tensor) -> None:
        # one leaf may be made of another: what is asked for is the derivative by each alone
        leaves = [x.view_as(x) for x in leaves]
        given = [x if i is None else leaves[i] for x, i in zip(self.others, self.places)]
        # every cast that autocast made is written in the original
        with no_autocast():
            out = self.original(*tree_unflatten(given, self.form))
        # the kernel's result stands for the original's up to a reshape and a cast
        gradient = gradient.reshape(out.shape).to(out.dtype)
        self.gradients = list(torch.autograd.grad(out, leaves, gradient, create_graph=True, allow_unused=True))

    def taken(self, i: int) -> Tensor | None:
        """The gradient of a leaf, which is kept no longer: its graph leads back here."""
        found, self.gradients[i] = self.gradients[i], None
        return found


class _Enter(torch.autograd.Function):
    """A leaf on its way into the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way, i: int) -> Tensor:
        ctx.way, ctx.i = way, i
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.way.taken(ctx.i) if torch.is_grad_enabled() else gradient, None, None


class _Leave(torch.autograd.Function):
    """The kernel's result."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, way: _Way, *leaves: Tensor) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(*leaves)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        leaves = ctx.saved_tensors
        if torch.is_grad_enabled():
            ctx.way.follow(leaves, gradient)
        return gradient, None, *(None for _ in leaves)
