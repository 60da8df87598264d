"""Windows that move with their row, cut by `unfold`, are keys under a mask: the windows are not made, and tiles are skipped.

    k.unfold(1, W, 1)[i, j] = k[i + j]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.patterns.expr import TRUE
from reattend.patterns.masks.split import split
from reattend.rewriter.find import detect
from tests.tiers import pairs

from .helpers import error_of, graph_of, read, values_of

B, H, N, D, W = 2, 3, 21, 8, 5


def tokens(n: int = N, batch: int = B, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, H, n, D, dtype=dtype) for _ in range(3)]


def windows(x: Tensor, before: int, after: int) -> Tensor:
    """(B, H, N, D) → (B, H, N, D, before + 1 + after)"""
    return F.pad(x, (0, 0, before, after)).unfold(2, before + 1 + after, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, score: Callable[[Tensor], Tensor], before: int, after: int) -> Tensor:
    s = score(torch.einsum("bhid,bhidw->bhiw", q, windows(k, before, after)) * 0.3)
    return torch.einsum("bhiw,bhidw->bhid", s.softmax(-1), windows(v, before, after))


def zeros_count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, lambda s: s, W, W)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])[:, None] + torch.arange(-W, 1)
    return attend(q, k, v, lambda s: s.masked_fill(at < 0, -torch.inf), W, 0)


def both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])[:, None] + torch.arange(-W, W + 1)
    return attend(q, k, v, lambda s: s.masked_fill((at < 0) | (at >= q.shape[2]), -1e9), W, W)


def by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slope = torch.arange(1, H + 1, dtype=q.dtype)[:, None, None]
    return attend(q, k, v, lambda s: s - slope * torch.arange(-W, W + 1).abs(), W, W)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q[..., None] * windows(k, W, 0)).sum(-2) * 0.3
    e = (s - s.amax(-1, keepdim=True)).exp()
    return ((e / e.sum(-1, keepdim=True))[..., None, :] * windows(v, W, 0)).sum(-1)


def of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q[..., None, :] @ windows(k, W, 0) * 0.3
    return (windows(v, W, 0) @ s.softmax(-1).mT)[..., 0]


def gates(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhidw->bhiw", q, windows(k, W, 0))
    return torch.einsum("bhiw,bhidw->bhid", s.sigmoid(), windows(v, W, 0))


ALL = (zeros_count, causal, both_sides, by_distance, by_hand, of_products, gates)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fn", ALL)
def test_the_windows_are_keys_under_a_mask(fn: Callable[..., Tensor], batch: int) -> None:
    view = read(fn, *tokens(batch=batch))
    assert "unfold" not in {t.name for t in view.cascade.inputs}
    assert view.cascade.rank[view.key].size == N + (2 * W if fn in (zeros_count, both_sides, by_distance) else W)


def test_a_step_of_two_is_no_window_of_its_row() -> None:
    def strided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bhid,bhidw->bhiw", q[:, :, :9], k.unfold(2, 5, 2))
        return torch.einsum("bhiw,bhidw->bhid", s.softmax(-1), v.unfold(2, 5, 2))

    args = tokens()
    gm = graph_of(strided, args)
    found, missed = detect.find(gm)
    assert bool(missed) != bool(found)
    assert all(error_of(f, values_of(gm, args)) <= 1e-12 for f in found)


class Model(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


@pytest.mark.parametrize(("fn", "dtype"), pairs(3, [zeros_count, causal, by_distance], [torch.float32, torch.bfloat16]))
def test_our_kernel_runs_as_the_model_does(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    args = [x.requires_grad_() for x in tokens(160, dtype=dtype)]
    ours = reattend.optimize(Model(fn), policy=reattend.Policy(allow="reattend"))
    got, want, exact = ours(*args), fn(*args), fn(*(x.detach().double() for x in args))
    own = float((want - exact).abs().max())
    assert float((got - exact).abs().max()) <= 2 * own + 1e-6
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), args) for y in (got, want))):
        assert float((a - b).abs().max()) <= (1e-4 if dtype is torch.float32 else 0.05) * float(b.abs().max())
    (site,) = reattend.report(ours).sites
    assert site.kernel == "reattend"
    assert not site.fell_back


def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No scale, no bias and no mask: a row takes the maximum of the product itself."""
    s = torch.einsum("bhid,bhidw->bhiw", q, windows(k, W, 0))
    return torch.einsum("bhiw,bhidw->bhid", s.softmax(-1), windows(v, W, 0))


def test_a_bare_product_is_bounded_by_the_window() -> None:
    view = read(bare, *tokens())
    assert split(view.score, view.key).keep is not TRUE


@pytest.mark.parametrize("fn", [bare, causal, by_distance])
def test_only_tiles_in_the_window_are_visited(fn: Callable[..., Tensor]) -> None:
    site = reattend.plan(Model(fn).eval(), tuple(tokens(2048, 1, torch.float32))).sites[0]
    assert site.choice == "reattend"
    assert {"causal", "window"} <= site.traits
    assert site.mask is not None
    assert site.mask.density < 0.05
    # what the model's own windows take is not known, and so not said
    assert site.original is not None
    assert site.original.cost is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_no_window_holds_reaches_no_row(which: int, number: float, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    policy = reattend.Policy(allow="reattend", deny="original", check="never")
    ours, args = reattend.optimize(Model(bare), policy=policy), tokens(160, dtype=dtype)
    ours(*args)
    args[which][0, 0, 80] = number
    for x in args:
        x.requires_grad_()
    got, want = ours(*args), bare(*args)
    assert torch.equal(got.isfinite(), want.isfinite())
    for a, b in zip(*(torch.autograd.grad(y.float().sum(), args) for y in (got, want))):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_a_row_without_a_key_has_no_gradient_beyond_its_window() -> None:
    def some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])[:, None] + torch.arange(-W, 1)
        return attend(q, k, v, lambda s: s.masked_fill(at < 3, -torch.inf), W, 0)

    torch._dynamo.reset()
    policy = reattend.Policy(allow="reattend", deny="original", check="never")
    ours, args = reattend.optimize(Model(some), policy=policy), [x.requires_grad_() for x in tokens(64, dtype=torch.float32)]
    got, want = ours(*args), some(*args)
    assert torch.equal(got.isnan(), want.isnan())
    for a, b in zip(*(torch.autograd.grad(y.sum(), args) for y in (got, want))):
        assert torch.equal(a.isnan(), b.isnan())
