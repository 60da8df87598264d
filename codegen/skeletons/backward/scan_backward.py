"""The gradients of steps of states whose elements follow from themselves: the same steps from behind.

    S_t = f_t S_{t−1} + b_t          g_t = dS_t + f_{t+1} g_{t+1},   db_t = g_t,   df_t = g_t S_{t−1},   dS_0 = f_1 g_1
    S_t = max(S_{t−1} + f_t, b_t)    what reaches a step goes to what was the larger one, at a tie half to each
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scan import earlier, largest, scaled, summed


def scaled_trained(state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """`scaled` in new memory, with gradients."""
    out: Tensor = ScaledSteps.apply(state, factor, added)
    return out


def summed_trained(state: Tensor, added: Tensor) -> Tensor:
    """`summed` in new memory, with gradients."""
    out: Tensor = SummedSteps.apply(state, added)
    return out


def largest_trained(state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """`largest` in new memory, with gradients."""
    out: Tensor = LargestSteps.apply(state, factor, added)
    return out


class ScaledSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
        after = scaled(state, factor, added.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(state, factor, after)
        return after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, ...]:
        state, factor, after = ctx.saved_tensors
        total = flow.clone(memory_format=torch.contiguous_format)
        rows, factors = total.unbind(0), factor.unbind(0)
        for t in range(len(rows) - 2, -1, -1):
            rows[t].addcmul_(factors[t + 1], rows[t + 1])
        d_factor = total * earlier(state, after) if ctx.needs_input_grad[1] else None
        return factors[0] * rows[0], d_factor, total


class SummedSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, added: Tensor) -> Tensor:
        return summed(state, added.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, Tensor]:
        total = flow.clone(memory_format=torch.contiguous_format)
        rows = total.unbind(0)
        for t in range(len(rows) - 2, -1, -1):
            rows[t].add_(rows[t + 1])
        return rows[0].clone(), total


class LargestSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
        after = largest(state, factor, added.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(state, factor, added, after)
        return after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, factor, added, after = ctx.saved_tensors
        old = earlier(state, after) + factor
        # as torch.maximum has it
        passed, lower = torch.where(old == added, 0.5, 1.0).to(flow.dtype), old < added
        total = flow.clone(memory_format=torch.contiguous_format)
        rows = total.unbind(0)
        for t in range(len(rows) - 2, -1, -1):
            rows[t].add_((passed[t + 1] * rows[t + 1]).masked_fill_(lower[t + 1], 0.0))
        d_old = (total * passed).masked_fill_(lower, 0.0)
        return d_old[0].clone(), d_old, (total * passed).masked_fill_(old > added, 0.0)
