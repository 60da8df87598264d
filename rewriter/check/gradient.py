"""The derivatives of a rewritten site held against those of the model's own code.

A derivative is linear in what flows back, so that a random cotangent on the compared positions, and zero elsewhere, shows it
whole: it is compared at the first call, before a wrong gradient has reached a parameter, and the user's tape is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from .compare import Errors, errors
from .cut import Program
from .demand import everything, pick


def gradient_errors(
    p: Program, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], generator: torch.Generator
) -> list[Errors]:
    """For every input that wants a gradient: how far ours is off, and the own code's."""
    wanting = [i for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad]
    with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        leaves = {i: given[i].detach().requires_grad_() for i in wanting}
        wide = {i: given[i].detach().double().requires_grad_() for i in wanting}
        own, exact = p.run(*([held.get(i, x) for i, x in enumerate(given)] for held in (leaves, wide)))
        flow = torch.randn(own.shape, generator=generator, dtype=torch.float32).to(own.device, own.dtype)
        mine = _gradients(own, leaves, flow)
        reference = _gradients(exact, wide, flow.double())
        swap = {id(given[i]): i for i in wanting}
        fresh = {i: given[i].detach().requires_grad_() for i in wanting}
        call = tree_map(lambda x: fresh[swap[id(x)]] if id(x) in swap else _detached(x), tuple(arguments))
        out = target(*call).reshape(p.own.shape).to(own.dtype)
        theirs = _gradients(pick(out, everything(p.own.shape), p.wanted), fresh, flow)
    return [errors(theirs[i], mine[i], reference[i]) for i in wanting]


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _gradients(out: Tensor, leaves: dict[int, Tensor], flow: Tensor) -> dict[int, Tensor]:
    """The gradient of each leaf; zero where none flows."""
    if not out.requires_grad:
        return {i: torch.zeros_like(x) for i, x in leaves.items()}
    found = torch.autograd.grad(out, list(leaves.values()), flow, allow_unused=True)
    return {i: torch.zeros_like(x) if g is None else g for (i, x), g in zip(leaves.items(), found)}
