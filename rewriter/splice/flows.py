"""Gradients of several flows at once, as `is_grads_batched` asks for them: our backward runs for one after the other.

    cascade_backward(grad of n flows, …) → n times cascade_backward(grad, …), their results together again
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...codegen.operator import library
from ..graph import torch_private


def _each(
    grad: Tensor, out: Tensor, saved: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], program: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    level = torch_private.flows_level()
    if level != 1:
        raise RuntimeError("reattend: gradients of several flows at once are taken one map deep, and there are more here")
    held = (grad, out, saved, *tensors)
    several = [torch_private.stands_for_flows(x) for x in held]
    plain = [torch_private.apart(x, level) if s else x for x, s in zip(held, several)]
    count = next(x.shape[0] for x, s in zip(plain, several) if s)
    made = []
    for i in range(count):
        g, o, r, *x = (x[i] if s else x for x, s in zip(plain, several))
        made.append(torch.ops.reattend.cascade_backward.default(g, o, r, x, sizes, program, wanted))
    return [torch_private.together(torch.stack(same), level) for same in zip(*made, strict=True)]


if torch_private.maps_gradients():
    library.impl("cascade_backward", _each, torch_private.FLOWS)  # type: ignore[no-untyped-call]
