"""What an attack from outside found, by kind: numbers that change their sign, rows hidden by a row's own mask, empty sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import reattend
from tests.tiers import few

pytestmark = pytest.mark.thin(3)

LOWEST = torch.finfo(torch.float32).min
OURS = reattend.Policy(allow=("reattend",), deny=("original",), check="never")
Score = Callable[[Tensor, int], Tensor]


class Scored(nn.Module):
    """Attention whose scores are edited with a number of the call."""

    def __init__(self, edit: Score) -> None:
        super().__init__()
        self.edit = edit

    def forward(self, q: Tensor, k: Tensor, v: Tensor, w: int) -> Tensor:
        return self.edit(q @ k.mT * 0.25, w).softmax(-1) @ v


def _distance(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]


SIGNED: dict[str, Score] = {
    "absolute": lambda s, w: s * abs(w),
    "at least one": lambda s, w: s * max(w, 1),
    "a shifted triangle": lambda s, w: s.masked_fill(_distance(s) > w, LOWEST),
    "a shifted triangle of −∞": lambda s, w: s.masked_fill(_distance(s) > w, -math.inf),
    "a window": lambda s, w: s.masked_fill(_distance(s).abs() > w, -math.inf),
    "a slope": lambda s, w: s + _distance(s) * (w * 0.01),
    "a quotient": lambda s, w: s.masked_fill(_distance(s) // 4 > w // 2, LOWEST),
}


@pytest.mark.parametrize(
    ("name", "ours"),
    few(
        [(name, ours) for name in SIGNED for ours in (False, True)],
        ("absolute", False), ("a shifted triangle", True), ("a window", True), ("a quotient", False),
    ),
)
def test_a_number_of_the_call_is_no_size(name: str, ours: bool) -> None:
    """Open where it changes, and then of either sign."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Scored(SIGNED[name])
    optimised = reattend.optimize(Scored(SIGNED[name]), policy=OURS if ours else reattend.Policy())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for w in (5, 7, 9, -3, 0, -1, 6):
            x = [torch.randn(2, 3, 40, 16) for _ in range(3)]
            torch.testing.assert_close(optimised(*x, w), model(*x, w), rtol=0, atol=1e-5, equal_nan=True)


class Added(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


@pytest.mark.parametrize("candidate", ["reattend", "sdpa"])
@pytest.mark.parametrize("shape", [(40, 1), (3, 40, 1), (2, 1, 1, 1), (2, 3, 40, 1), (1,), ()])
def test_a_mask_of_whole_rows_hides_them(shape: tuple[int, ...], candidate: str) -> None:
    """Scores that are all −∞ by a number of the row: NaN, as in the model, with no net to help."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Added()
    policy = reattend.Policy(allow=(candidate,), deny=("original",), check="never")
    optimised = reattend.optimize(Added(), policy=policy)
    mask = torch.zeros(shape)
    hidden = mask.clone()
    hidden.view(-1)[:2] = -math.inf
    with torch.no_grad():
        for m in (mask, hidden, mask):
            x = [torch.randn(2, 3, 40, 16) for _ in range(3)]
            torch.testing.assert_close(optimised(*x, m), model(*x, m), rtol=0, atol=1e-5, equal_nan=True)


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v


@pytest.mark.parametrize("policy", [reattend.Policy(), OURS], ids=["default", "ours"])
@pytest.mark.parametrize("calls", [((2, 40), (2, 33), (0, 33), (2, 0)), ((2, 0),)], ids=["later", "first"])
def test_empty_batches_and_keys(calls: tuple[tuple[int, int], ...], policy: reattend.Policy) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Plain(), reattend.optimize(Plain(), policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch, keys in calls:
            q = torch.randn(batch, 3, 21, 16, requires_grad=True)
            k, v = (torch.randn(batch, 3, keys, 16) for _ in range(2))
            torch.testing.assert_close(optimised(q, k, v, 0.25), model(q, k, v, 0.25), rtol=0, atol=1e-5)


def test_a_scale_that_is_no_number() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Plain(), reattend.optimize(Plain(), policy=reattend.Policy(deny=("original",)))
    x = [torch.randn(2, 3, 21, 16) for _ in range(3)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (0.25, math.nan, math.inf):
            torch.testing.assert_close(optimised(*x, scale), model(*x, scale), rtol=0, atol=1e-5, equal_nan=True)
