"""Faults met in the field, each case of a kind held to float64: at most twice the original's own error, NaN where it has NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from tests.cases import spelled  # noqa: F401  more cases
from tests.cases.field import CASES

pytestmark = pytest.mark.thin(12)

# Errors below this are not compared: it is what a sum of numbers of float32 in another order may be off by.
FLOOR = 2e-6


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def rms(a: Tensor, b: Tensor) -> float:
    """The RMS of a − b over that of b, NaN left out."""
    a, b = a.double(), b.double()
    return float((a - b).nan_to_num(0).pow(2).mean().sqrt() / b.nan_to_num(0).pow(2).mean().sqrt().clamp_min(1e-12))


def close(got: Tensor, own: Tensor, exact: Tensor) -> None:
    assert got.dtype == own.dtype
    assert torch.equal(got.isnan(), own.isnan())
    assert rms(got, exact) <= max(2 * rms(own, exact), FLOOR)


def outputs(model: nn.Module, args: tuple[Any, ...], gradients: bool) -> list[Tensor]:
    """The result, and where gradients are wanted those of the floating inputs."""
    if not gradients:
        with torch.no_grad():
            return [model(*args)]
    given = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    out = model(*given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    torch._dynamo.reset()
    found = CASES[name]
    model, args = found.make()
    own = outputs(model, args, found.gradients)
    exact = outputs(copy.deepcopy(model).double(), tuple(map(wide, args)), found.gradients)
    ours = reattend.optimize(copy.deepcopy(model))
    for x, y, z in zip(outputs(ours, args, found.gradients), own, exact, strict=True):
        close(x, y, z)
    report = reattend.report(ours)
    if found.kernel:
        assert report.sites
        assert all(s.site.choice != "original" and s.ran for s in report.sites), report
