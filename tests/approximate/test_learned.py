"""Methods with learned inputs are refused at a site until something gives them; one without is measured like any other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import reattend
from reattend.patterns.methods.linear.based import TaylorWindow
from reattend.patterns.methods.linear.hedgehog import Hedgehog


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def test_learned_inputs_are_refused_and_a_polynomial_is_measured() -> None:
    g = torch.Generator().manual_seed(0)
    data = [tuple(torch.randn(1, 2, 48, 16, generator=g) for _ in range(3)) for _ in range(4)]
    methods = (Hedgehog("maps.safetensors", 8), TaylorWindow(8))
    policy = reattend.Policy(approximate=True, methods=methods, max_error=0.5, calibration=data)
    (site,) = reattend.plan(Causal().eval(), data[0], policy=policy).sites
    found = {c.name: c for c in site.candidates}
    hedgehog, taylor = (found[str(m)] for m in methods)
    assert not hedgehog.feasible
    assert "learned inputs (WQ, WK)" in hedgehog.why
    assert taylor.feasible
    assert taylor.error is not None
    # its rows weigh keys anew: there is no share of the weight that they keep
    assert taylor.error.mass is None
    # scores of about one: the polynomial is near the exponential, and not equal to it
    assert 1e-6 < taylor.error.mean < 0.2
