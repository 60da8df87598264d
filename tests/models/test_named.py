"""No attention vanishes: where one ran, the report shows a site or says why there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import reattend


def columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT * 0.25
    a[..., -5:] = -torch.inf
    return a.softmax(-1) @ v


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.mix((q @ k.mT * 0.25).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
        return out


class Columns(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return columns(q, k, v)


@pytest.mark.parametrize("model", [Columns(), Mixed()])
def test_a_miss_says_what_stands_in_between(model: nn.Module) -> None:
    torch._dynamo.reset()
    args = tuple(torch.randn(2, 4, 48, 16) for _ in range(3))
    ours = reattend.optimize(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.allclose(ours(*args), model(*args), atol=1e-5)
    report = reattend.report(ours)
    assert len(report.sites) + len(report.misses) == 1
    assert all(m.reason for m in report.misses)


def test_a_fused_layer_of_torch_is_named_with_what_shows_its_parts() -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    x = torch.randn(2, 48, 32)
    ours = reattend.optimize(copy.deepcopy(layer))
    with torch.no_grad():
        assert torch.allclose(ours(x), layer(x), atol=1e-5)
    (miss,) = reattend.report(ours).misses
    assert "set_fastpath_enabled" in miss.hint


def test_a_plan_says_what_a_call_runs_in_one_operator() -> None:
    torch._dynamo.reset()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 24, 32)
    with torch.no_grad():
        plan, ours = reattend.plan(model, x), reattend.optimize(copy.deepcopy(model))
        ours(x)
    assert len(plan.sites) == len(reattend.report(ours).misses) == 2
    assert "torch may run layers.[0-1] as one operator" in plan.note
    assert "×2" in str(reattend.report(ours))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            assert "one operator" not in reattend.plan(model, x).note
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
