"""Dropout that is counted: `Policy(dropout="own")` trains through our kernels, at the model's rate, and can be replayed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import reattend
from reattend import Policy
from reattend.rewriter.graph import dropout
from reattend.rewriter.graph.dropout import RANGE, draws_at
from tests.tiers import pairs

OWN = Policy(dropout="own")
OURS = Policy(dropout="own", allow="reattend", deny="original")


class Attention(nn.Module):
    def __init__(self, way: str, rate: float = 0.25) -> None:
        super().__init__()
        self.way, self.rate, self.qkv = way, rate, nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        if self.way == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        if self.way == "masked sdpa":
            keep = torch.arange(x.shape[1]) < x.shape[1] - 3
            return F.scaled_dot_product_attention(q, k, v, keep[None, None, None], dropout_p=rate, scale=0.2)
        if self.way == "biased sdpa":
            bias = -torch.arange(x.shape[1], device=x.device).to(x.dtype)
            return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], bias[None], dropout_p=rate, enable_gqa=True)
        s = (q @ k.mT * 0.25).masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), -torch.inf)
        out: Tensor = F.dropout(s.softmax(-1), self.rate, self.training) @ v
        return out


WAYS = ("by hand", "sdpa", "masked sdpa", "biased sdpa")


def tokens(dtype: torch.dtype = torch.float32, length: int = 48) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def optimized(model: nn.Module, policy: Policy = OURS) -> nn.Module:
    torch._dynamo.reset()
    return reattend.optimize(copy.deepcopy(model), policy=policy)


@pytest.mark.parametrize(("way", "dtype"), pairs(4, WAYS, [torch.float32, torch.bfloat16, torch.float16]))
def test_training_runs_our_kernel_and_both_ways_are_checked(way: str, dtype: torch.dtype) -> None:
    ours = optimized(Attention(way).to(dtype))
    x = tokens(dtype).requires_grad_()
    ours(x).float().square().sum().backward()
    report = reattend.report(ours)
    assert [s.kernel for s in report.sites] == ["reattend"], str(report)
    assert not report.sites[0].fell_back
    assert [c.verdict for c in report.checks] == ["same"] * len(report.checks), str(report)
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("way", ["by hand", "sdpa"])
def test_each_call_draws_anew_and_a_seed_draws_again(way: str) -> None:
    ours, x = optimized(Attention(way)), tokens()
    torch.manual_seed(3)
    first, second = ours(x), ours(x)
    torch.manual_seed(3)
    assert torch.equal(ours(x), first)
    assert not torch.equal(first, second)


def test_the_mean_of_many_calls_is_the_attention_without_dropout() -> None:
    model = Attention("by hand")
    ours, x = optimized(model), tokens()
    n = 400
    with torch.no_grad():
        calls = torch.stack([ours(x) for _ in range(n)])
        mean, spread = calls.mean(0), calls.std(0)
        want = model.eval()(x)
    assert float(((mean - want) / (spread / n**0.5 + 1e-6)).abs().mean()) < 1.0
    # and it spreads as torch's own does
    with torch.no_grad():
        own = torch.stack([model.train()(x) for _ in range(n)]).std(0)
    assert float((spread.mean() / own.mean()).log().abs()) < 0.05


def test_numbers_are_independent_of_row_column_and_call() -> None:
    rows, columns = torch.arange(512)[:, None], torch.arange(512)
    a, b = (draws_at(torch.tensor(s), rows, columns).double() / RANGE for s in ([3, 4], [3, 5]))
    for x in (a, b):
        assert float((x.mean() - 0.5).abs()) < 5 * 12**-0.5 / 512
        assert float((x.var() - 1 / 12).abs()) < 1e-3
    pairs = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[1:, 1:], a[:-1, :-1]), (a[:-1, 1:], a[1:, :-1]), (a, a.mT)]
    for x, y in pairs:
        x, y = x - x.mean(), y - y.mean()
        assert float((x * y).mean().abs()) * 12 < 5 / 512
    for rate in (0.1, 0.5):
        dropped = (a < rate).double()
        assert float((dropped.mean() - rate).abs()) < 5 * (rate * (1 - rate)) ** 0.5 / 512
        # as many of each row as of a binomial
        assert float(dropped.sum(1).var() / (512 * rate * (1 - rate)) - 1) < 0.35


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_again_what_it_drew(reentrant: bool) -> None:
    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.saved = inner, False

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant) if self.saved else self.inner(x)
            return out

    block = Block(optimized(Attention("by hand")))
    grads = []
    for saved in (False, True):
        block.saved = saved
        x = tokens().requires_grad_()
        torch.manual_seed(5)
        block(x).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_without_it_torch_draws_and_the_miss_says_what_would_help() -> None:
    model = Attention("by hand")
    ours, x = optimized(model, Policy()), tokens()
    torch.manual_seed(0)
    got = ours(x)
    torch.manual_seed(0)
    assert torch.equal(got, model(x))
    (miss,) = reattend.report(ours).misses
    assert 'Policy(dropout="own")' in miss.reason


def test_outside_of_training_nothing_changes() -> None:
    model = Attention("sdpa").eval()
    ours, x = optimized(model, OWN), tokens()
    assert torch.allclose(ours(x), model(x), atol=1e-6)


def test_what_no_kernel_takes_draws_as_torch_does() -> None:
    """Dropout behind an attention, and one whose attention keeps the model's own code."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention("by hand")

        def forward(self, x: Tensor) -> Tensor:
            drawn = F.dropout(x @ x.mT.tanh(), 0.5, self.training) + F.dropout(x, 0.1, self.training).sum()
            out: Tensor = drawn + self.inner(x).sum()
            return out

    model = Model()
    ours = optimized(model, Policy(dropout="own", deny="reattend"))
    torch.manual_seed(0)
    got = ours(tokens())
    torch.manual_seed(0)
    assert torch.equal(got, model(tokens()))


def test_one_that_cannot_be_counted_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention("by hand"), Attention("masked sdpa")

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), self.second(x)])

    def refused(self: dropout._Spelling, *_: object) -> fx.Node:
        self.put(torch.ops.reattend.seed.default, self.given(self.node))
        raise dropout._Refused

    monkeypatch.setattr(dropout._Spelling, "masked", refused)
    model = Two()
    ours = optimized(model, OURS)
    ours(tokens())
    report = reattend.report(ours)
    assert [s.kernel for s in report.sites] == ["reattend"]
    assert ["live dropout" in m.reason for m in report.misses] == [True]


def test_a_plan_says_so() -> None:
    plan = reattend.plan(Attention("by hand"), (tokens(length=512),), policy=OWN)
    assert [s.choice for s in plan.sites] == ["reattend"]
    assert "dropout is counted" in str(plan)
    assert not reattend.plan(Attention("by hand"), (tokens(),)).sites


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="original"):
        Policy(dropout="mine")


def test_a_write_in_place_is_none_that_can_be_counted() -> None:
    """What is dropped in place is read elsewhere as well."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention("by hand")

        def forward(self, x: Tensor) -> Tensor:
            y = x.tanh()
            F.dropout(y, 0.5, self.training, inplace=True)
            out: Tensor = self.inner(x)
            both: Tensor = y + 0 * out.sum()
            return both

    ours = optimized(Model(), Policy(dropout="own", allow="reattend", deny="original", check="never"))
    y, x = ours(tokens()), tokens()
    kept = y != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert torch.allclose(y[kept], 2 * x.tanh()[kept])
    assert [s.kernel for s in reattend.report(ours).sites] == ["reattend"]


def test_dropout_of_dropout_is_torchs_where_no_kernel_takes_it() -> None:
    """One node of the model has one value, whoever reads it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention("by hand")

        def forward(self, x: Tensor) -> Tensor:
            once = F.dropout(x + 3, 0.5, self.training)
            twice = F.dropout(once, 0.5, self.training)
            q = twice[:, None]
            out = F.scaled_dot_product_attention(q, q.tanh(), torch.ones_like(q), dropout_p=0.0)
            both: Tensor = torch.stack([once, twice]) + 0 * (self.inner(x).sum() + out.sum())
            return both

    ours = optimized(Model(), Policy(dropout="own", allow="reattend", deny="original", check="never"))
    once, twice = ours(tokens())
    assert bool((twice[once == 0] == 0).all())
    assert torch.equal(twice[twice != 0], 2 * once[twice != 0])
