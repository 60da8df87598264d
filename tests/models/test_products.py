"""Distances and pooling layers, as optimised models: right by every kernel, in each type, and with gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import reattend

from .test_crashes import Fn, same, tensors

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FORCED = reattend.Policy(allow=("reattend", "sdpa"), deny=("original",))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Distances(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = torch.cdist(q.flatten(0, 1), k.flatten(0, 1)).pow(2)
        return (-0.2 * flat.view(*q.shape[:-1], -1)).softmax(-1) @ v


class Pooling(nn.Module):
    """Attention pooling as in MGP-STR: each output of a layer is a weighted mean over all tokens."""

    def __init__(self, queries: int, width: int) -> None:
        super().__init__()
        self.scores, self.values = nn.Conv2d(width, queries, 1, bias=False), nn.Conv2d(width, width, 1, groups=4, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).mT[..., None]
        weights = self.scores(x).flatten(2).softmax(-1)
        return torch.einsum("...si,...id->...sd", weights, self.values(x).flatten(2).mT)


@TYPES
def test_distances(dtype: torch.dtype) -> None:
    report = same(Distances(), tensors((2, 3, 40, 16), (2, 3, 50, 16), (2, 3, 50, 16), dtype=dtype), policy=FORCED)
    assert [c.ok for c in report.checks] == [True], report.checks


def test_a_distance_between_a_token_and_itself_has_the_models_gradient() -> None:
    """A root has none there, and torch gives 0: the model's own code runs."""
    own = Fn(lambda x, v: (-torch.cdist(x, x)).softmax(-1) @ v)
    same(own, tensors((2, 3, 40, 16), (2, 3, 40, 16)), policy=FORCED, grad=True, sites=0)


@TYPES
@pytest.mark.parametrize("grad", [False, True])
def test_pooling(dtype: torch.dtype, grad: bool) -> None:
    report = same(Pooling(5, 16).to(dtype), tensors((3, 30, 16), dtype=dtype), policy=FORCED, grad=grad)
    assert [c.ok for c in report.checks] == [True], report.checks


def test_the_layer_that_pools_learns() -> None:
    """Its weights are queries without a batch: their gradient is summed over it."""
    model = Pooling(5, 16)
    ours = reattend.optimize(copy.deepcopy(model), policy=FORCED)
    x = torch.randn(3, 30, 16)
    for m in (model, ours):
        m(x).square().sum().backward()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    report = reattend.report(ours)
    assert [s.kernel for s in report.sites] != ["original"]
    assert all(c.why for s in report.sites for c in s.site.candidates if not c.feasible)
    assert [c.ok for c in report.checks] == [True], report.checks


@TYPES
@pytest.mark.parametrize("grad", [False, True])
def test_a_factor_a_row_in_one_einsum(dtype: torch.dtype, grad: bool) -> None:
    gated = Fn(lambda q, k, v, g: torch.einsum("bhij,bhjd,bhi->bhid", (q @ k.mT * 0.25).softmax(-1), v, g))
    args = tensors((2, 3, 30, 16), (2, 3, 40, 16), (2, 3, 40, 16), (2, 3, 30), dtype=dtype)
    report = same(gated, args, policy=FORCED, grad=grad)
    assert all(c.ok for c in report.checks), report.checks
    assert grad or report.checks
