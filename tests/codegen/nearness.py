"""How near a kernel's output has to be: to float64, by the error of the same cascade in torch's own operators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate

# One unit in the last place of an output of size 1.
ULP = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}


def close(out: Tensor, c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], most: float = 2.5) -> None:
    """NaN where the model has it, and elsewhere at most `most` times the error of the same cascade run in torch."""
    want = evaluate(c, tensors, sizes, widen=True)[c.outputs[0]]
    plain = evaluate(c, tensors, sizes)[c.outputs[0]].double()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())
    here = torch.isfinite(want)
    if not here.any():
        return
    scale = max(1.0, float(want[here].abs().max()))
    error, reference = ((x.double() - want)[here].abs().max().item() for x in (out, plain))
    assert error <= most * reference + 2 * ULP[c.tensor[c.outputs[0]].dtype] * scale
