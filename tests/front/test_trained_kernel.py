"""Our kernel in training, through the front door: it runs, the losses are the original's, and a wrong gradient is found out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.codegen import trained

pytestmark = pytest.mark.slow
OURS = reattend.Policy(allow=("reattend",))


class Block(nn.Module):
    """Attention within a window, in plain PyTorch; `bias`: with a learned number a head that is added to its scores."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.slope = nn.Parameter(torch.full((2, 1, 1), 0.1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
        i = torch.arange(n)
        s = q @ k.transpose(-2, -1) * 0.25
        if self.slope is not None:
            s = s + self.slope * (i - i[:, None])
        s = s.masked_fill((i > i[:, None]) | (i[:, None] - i >= 24), float("-inf"))
        out: Tensor = self.out((s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 32))
        return out


def model(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(bias), nn.GELU(), Block(bias)).train()


def losses(m: nn.Module, steps: int = 6) -> list[float]:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 96, 32, generator=g) for _ in range(2))
    by = torch.optim.SGD(m.parameters(), lr=1.0)
    out = []
    for _ in range(steps):
        by.zero_grad()
        loss = (m(x) - y).square().mean()
        loss.backward()
        by.step()
        out.append(loss.item())
    return out


@pytest.mark.filterwarnings("error:reattend.*:UserWarning")
def test_the_losses_are_those_of_the_original() -> None:
    m = reattend.optimize(model(), policy=OURS)
    found, wanted = losses(m), losses(model())
    assert wanted[-1] < wanted[0]
    assert found == pytest.approx(wanted, rel=1e-5)
    report = reattend.report(m)
    assert report.kernels["reattend"] == 12, str(report)
    assert not report.fallbacks
    assert all(c.ok for c in report.checks), str(report)
    assert any(c.gradients for c in report.checks), str(report)


def test_where_a_gradient_is_wanted_that_it_does_not_give_the_original_runs() -> None:
    m = reattend.optimize(model(bias=True), policy=OURS)
    assert losses(m) == pytest.approx(losses(model(bias=True)), rel=1e-5)
    report = reattend.report(m)
    assert not report.kernels["reattend"], str(report)
    for name, p in m.named_parameters():
        p.requires_grad_(not name.endswith("slope"))
    losses(m, 1)
    assert reattend.report(m).kernels["reattend"] == 2, str(reattend.report(m))


def test_second_derivatives_are_those_of_the_original() -> None:
    def twice(m: nn.Module) -> Tensor:
        x = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (first,) = torch.autograd.grad(m(x).square().mean(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    torch.testing.assert_close(twice(reattend.optimize(model(), policy=OURS)), twice(model()), rtol=1e-4, atol=1e-8)


def test_a_wrong_gradient_is_found_before_it_reaches_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trained._kernel

    def wrong(program: str) -> trained.TrainedKernel:
        made = real(program)

        def backward(*given: Any, **sizes: int) -> list[Tensor]:
            return [g * 1.01 for g in made.backward(*given, **sizes)]

        return replace(made, backward=backward)

    monkeypatch.setattr(trained, "_kernel", wrong)
    m = reattend.optimize(model(), policy=OURS)
    with pytest.warns(UserWarning, match="keeps the original code"):
        found = losses(m)
    assert found == losses(model())
