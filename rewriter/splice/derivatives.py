"""The second derivative of a kernel that has only the first: that of the code which it replaces.

    forward     leaves → kernel → out
    backward    the kernel's own; while a graph of the backward is wanted (`create_graph`), the original's on the same leaves

Nothing more is kept for it than the kernel keeps itself: the leaves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.autocast import no_autocast
from ..graph.torch_private import (
    graph_task,
    stands_for_flows,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    will_run,
)


def twice(
    kernel: Callable[..., Any], arguments: Any, original: Callable[..., Any], inputs: Any, one_flow: bool = False
) -> Any:
    """`kernel(*arguments)`, whose gradient can be differentiated as that of `original(*inputs)`, which is the same.

    Either answers a tensor, or a tuple of several. With `one_flow` gradients of several flows at once (`is_grads_batched`)
    are the original's, too.
    """
    flat = tree_leaves((arguments, inputs))
    leaves = list({id(x): x for x in flat if isinstance(x, Tensor) and x.requires_grad}.values())
    if not leaves:
        return kernel(*arguments)
    way = _Way(original, inputs, leaves, one_flow)
    entered = {id(x): _Enter.apply(x, way, i) for i, x in enumerate(leaves)}  # type: ignore[no-untyped-call]
    way.nodes = [weakref.ref(x.grad_fn) for x in entered.values()]
    given = tree_map(lambda x: entered.get(id(x), x), arguments)
    made = kernel(*given)
    if isinstance(made, Tensor):
        out: Tensor = _Leave.apply(way, 1, made, *leaves, *way.frozen(inputs))  # type: ignore[no-untyped-call]
        return out
    return _Leave.apply(way, len(made), *made, *leaves, *way.frozen(inputs))  # type: ignore[no-untyped-call]


class _Way:
    """How the gradients of one call are found a second time. Tensors are given by those who keep them for a backward.

    Gradients are of one backward pass each: several may go through the graph at once.
    """

    def __init__(
        self, original: Callable[..., Any], inputs: Any, leaves: Sequence[Tensor], one_flow: bool = False
    ) -> None:
        place = {id(x): i for i, x in enumerate(leaves)}
        flat, self.form = tree_flatten(inputs)
        self.tensors = [isinstance(x, Tensor) for x in flat]
        self.places = [place.get(id(x)) for x in flat]
        self.others = [None if isinstance(x, Tensor) else x for x in flat]
        self.count = len(leaves)
        self.original, self.one_flow = original, one_flow
        self.nodes: list[weakref.ref[Any]] = []
        self.gradients: dict[int, dict[int, Tensor | None]] = {}

    def frozen(self, inputs: Any) -> list[Tensor]:
        """The tensors among the inputs that need no gradient."""
        return [x for x, i in zip(tree_leaves(inputs), self.places) if i is None and isinstance(x, Tensor)]

    def follow(self, saved: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        # one leaf may be made of another: what is asked for is the derivative by each alone
        with torch.enable_grad():
            leaves, frozen = [x.view_as(x) for x in saved[: self.count]], iter(saved[self.count :])
        asked = [i for i, node in enumerate(self.nodes) if will_run(node())]
        given = [
            leaves[i] if i is not None else next(frozen) if is_tensor else x
            for x, i, is_tensor in zip(self.others, self.places, self.tensors)
        ]
        # every cast that autocast made is written in the original
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), no_autocast():
            made = self.original(*tree_unflatten(given, self.form))
        outs = (made,) if isinstance(made, Tensor) else made
        # the kernel's result stands for the original's up to a reshape and a cast
        flows = [(x, g.reshape(x.shape).to(x.dtype)) for x, g in zip(outs, gradients, strict=True) if g is not None]
        found = torch.autograd.grad(
            [x for x, _ in flows], [leaves[i] for i in asked], [g for _, g in flows], create_graph=twice, allow_unused=True
        )
        self.gradients[graph_task()] = dict(zip(asked, found))

    def taken(self, i: int, other: Tensor | None) -> Tensor | None:
        """The gradient of a leaf, which is kept no longer: its graph leads back here. `other` where none was followed."""
        task = graph_task()
        if task not in self.gradients:
            return other
        found = self.gradients[task].pop(i)
        if not self.gradients[task]:
            del self.gradients[task]
        return found


class _Enter(torch.autograd.Function):
    """A leaf on its way into the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Way, i: int) -> Tensor:
        ctx.way, ctx.i = way, i
        # what nothing reaches has no gradient
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return ctx.way.taken(ctx.i, gradient), None, None


class _Leave(torch.autograd.Function):
    """The kernel's results, of which there are `count`."""

    @staticmethod
    def forward(ctx: Any, way: _Way, count: int, *tensors: Tensor) -> Any:
        ctx.way, ctx.rest = way, len(tensors) - count
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        outs = tuple(x.view_as(x) for x in tensors[:count])
        return outs[0] if count == 1 else outs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        several = ctx.way.one_flow and any(g is not None and stands_for_flows(g) for g in gradients)
        if (torch.is_grad_enabled() or several) and any(g is not None for g in gradients):
            ctx.way.follow(saved, gradients)
        if several:
            # nobody reads what the kernel makes of it
            gradients = tuple(None if g is None else torch.zeros(g.shape, dtype=g.dtype, device=g.device) for g in gradients)
        return None, None, *gradients, *(None for _ in range(ctx.rest))
