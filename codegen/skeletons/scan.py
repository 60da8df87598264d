"""The loops of a scan: one step after the other inside a chunk, all else of a chunk at once.

    factor [n, …], added [n, …], state […]      →  the states after each of n steps, in the memory of `added`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def laid(x: Tensor | float, full: Sequence[int], dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A value over `full` (1 where it is the same along a dimension), in new memory, with only the dimensions `dims`."""
    seen = shown(x, full, dims, dtype)
    return torch.empty(seen.shape, dtype=dtype).copy_(seen)


def shown(x: Tensor | float, full: Sequence[int], dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same without memory of its own, where that can be had."""
    wide = torch.as_tensor(x, dtype=dtype).expand(full)
    moved = wide.permute(*dims, *(d for d in range(len(full)) if d not in dims))
    return moved.reshape(moved.shape[: len(dims)])


def scaled(state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """S ← factor · S + added, step by step."""
    for a, b in zip(factor.unbind(0), added.unbind(0)):
        state = b.addcmul_(a, state)
    return added


def summed(state: Tensor, added: Tensor) -> Tensor:
    """S ← S + added, step by step."""
    for b in added.unbind(0):
        state = b.add_(state)
    return added


def largest(state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """S ← max(S + factor, added), step by step."""
    for a, b in zip(factor.unbind(0), added.unbind(0)):
        state = torch.maximum(state + a, b, out=b)
    return added


def earlier(state: Tensor, after: Tensor) -> Tensor:
    """The states before each step, from those after."""
    return torch.cat((state[None], after[:-1]))


def wide(x: Tensor, dims: int) -> Tensor:
    """With as many dimensions as others, those in front of one element."""
    return x[(None,) * (dims - x.dim())]
