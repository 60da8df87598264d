"""Functions mapped over a dimension, and FlexAttentions that a model calls itself: written out, found, and computed alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import reattend
from tests.tiers import few

pytestmark = pytest.mark.thin(3)

INF = float("inf")
N = 48


class Fn(nn.Module):
    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Tensor) -> Any:
        return self.f(*args)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def qkv(dtype: torch.dtype = torch.float32, batch: int = 2, keys: int = 4, tokens: int = N) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    heads = (4, keys, keys)
    return tuple(torch.randn(batch, h, tokens, 16).to(dtype) for h in heads)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def blocks(keep: Callable[..., Tensor]) -> Any:
    return create_block_mask(keep, None, None, N, N, device="cpu")


SLOPES, TABLE, SEGMENTS = torch.rand(4), torch.randn(4, 2 * N - 1), torch.arange(N) // 20
CAUSAL = blocks(causal)
LEFT, RIGHT = torch.randn(4, 8), torch.randn(N, 8)

SCORES: dict[str, Any] = {
    "plain": lambda q, k, v: flex_attention(q, k, v),
    "causal": lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -INF)),
    "slopes": lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + SLOPES[h] * (j - i)),
    "table": lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + TABLE[h, i - j + N - 1]),
    "cap": lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: 9 * (s / 9).tanh(), block_mask=CAUSAL, scale=0.4),
    "vectors": lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + (LEFT[h] * RIGHT[j]).sum()),
    "rows without a key": lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(i > j + 3, s, -INF)),
}
MASKS: dict[str, tuple[Any, set[str]]] = {
    "causal": (CAUSAL, {"causal"}),
    "window": (blocks(lambda b, h, i, j: (i >= j) & (i - j < 12)), {"causal", "window"}),
    "segments": (blocks(lambda b, h, i, j: (i >= j) & (SEGMENTS[i] == SEGMENTS[j])), {"causal"}),
    "rows without a key": (blocks(lambda b, h, i, j: i > j + 3), set()),
}


def held(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Any:
    """The optimised model against the original and float64; its report."""
    torch._dynamo.reset()
    model = Fn(f)
    with torch.no_grad():
        own, exact = model(*args), model(*(x.double() for x in args))
        ours = reattend.optimize(copy.deepcopy(model))
        got = ours(*args)
    assert got.dtype == own.dtype
    assert torch.equal(got.isnan(), own.isnan())
    error, limit = ((x.double() - exact).square().mean().sqrt() for x in (got, own))
    assert error <= 1.5 * limit + 1e-6 * exact.square().mean().sqrt()
    return reattend.report(ours)


@pytest.mark.parametrize("name", few(SCORES, "table"))
def test_a_score_function_is_a_term(name: str) -> None:
    report = held(SCORES[name], qkv())
    assert len(report.sites) == 1
    assert all(c.ok for c in report.checks)


@pytest.mark.parametrize("name", few(MASKS, "window", "rows without a key"))
def test_a_mask_function_is_a_predicate(name: str) -> None:
    mask, wanted = MASKS[name]
    report = held(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), qkv())
    (run,) = report.sites
    assert wanted <= run.site.traits


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("batch", few([1, 2], 2))
def test_in_16_bits_with_heads_in_groups(dtype: torch.dtype, batch: int) -> None:
    report = held(lambda q, k, v: flex_attention(q, k, v, block_mask=CAUSAL, enable_gqa=True), qkv(dtype, batch, keys=2))
    (run,) = report.sites
    assert {"causal", "gqa"} <= run.site.traits


@pytest.mark.slow
def test_a_block_mask_made_inside_and_lengths_at_run_time() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=create_block_mask(causal, None, None, N, N, device="cpu"))

    assert len(held(f, qkv()).sites) == 1
    lengths = torch.tensor([30, 48])
    by_length = held(lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(j < lengths[b], s, -INF)), qkv())
    assert len(by_length.sites) == 1


def test_what_else_a_flex_attention_answers_is_its_own() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, more = flex_attention(q, k, v, block_mask=CAUSAL, return_aux=AuxRequest(lse=True))
        assert more.lse is not None
        return out, more.lse

    torch._dynamo.reset()
    ours, args = reattend.optimize(Fn(f)), qkv()
    with torch.no_grad():
        for got, want in zip(ours(*args), f(*args), strict=True):
            assert torch.equal(got, want)
    (miss,), plan = reattend.report(ours).misses, reattend.plan(Fn(f), args)
    assert "FlexAttention" in miss.hint
    assert [m.hint for m in plan.misses] == [miss.hint]


@pytest.mark.slow
def test_a_long_one_is_held_on_sampled_rows() -> None:
    tokens = 512
    mask = create_block_mask(causal, None, None, tokens, tokens, device="cpu")
    report = held(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), qkv(batch=1, tokens=tokens))
    assert [c.verdict for c in report.checks] == ["same"]
    assert report.fallbacks == 0


@pytest.mark.slow
def test_one_flex_attention_after_another() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, block_mask=CAUSAL)
        assert isinstance(out, Tensor)
        again = flex_attention(out, out.tanh(), v, block_mask=CAUSAL)
        assert isinstance(again, Tensor)
        return again

    assert len(held(f, qkv()).sites) == 2


def test_a_plan_sees_it_as_well_with_open_sizes() -> None:
    plan = reattend.plan(Fn(SCORES["causal"]), qkv(), dynamic=True)
    assert [s.traits for s in plan.sites] == [{"causal"}]


MAPPED: dict[str, Any] = {
    "batch": lambda q, k, v: torch.vmap(attend)(q, k, v) + 0,
    "batch and heads": lambda q, k, v: torch.vmap(torch.vmap(attend))(q, k, v),
    "one operator": lambda q, k, v: torch.vmap(F.scaled_dot_product_attention)(q, k, v),
    "keys for all": lambda q, k, v: torch.vmap(attend, in_dims=(0, None, None))(q, k[0], v[0]),
    "a scan behind it": lambda q, k, v: associative_scan(torch.add, attend(q, k, v), 0, combine_mode="generic"),
    "one map after another": lambda q, k, v: torch.vmap(attend)(torch.vmap(torch.tanh)(q), torch.vmap(torch.sin)(k), v),
    "heads last": lambda q, k, v: torch.vmap(attend, in_dims=1, out_dims=-1)(q, k, v),
}


@pytest.mark.parametrize("name", few(MAPPED, "batch and heads", "a scan behind it", "heads last"))
def test_a_mapped_attention_is_found(name: str) -> None:
    report = held(MAPPED[name], qkv())
    assert len(report.sites) == 1
    assert not any(p.error for p in report.pieces)


def test_gradients_flow_through_a_mapped_attention() -> None:
    torch._dynamo.reset()
    args = [x.requires_grad_() for x in qkv()]
    ours = reattend.optimize(Fn(MAPPED["batch"]))
    got, want = (torch.autograd.grad(f(*args).square().sum(), args) for f in (ours, MAPPED["batch"]))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert len(reattend.report(ours).sites) == 1


@pytest.mark.parametrize(
    "inner",
    [
        lambda x: torch.func.grad(lambda y: (y * y).sum())(x),
        lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    ],
)
def test_what_cannot_be_written_out_runs_as_it_came(inner: Callable[[Tensor], Tensor]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(torch.vmap(inner)(q), k, v)

    torch._dynamo.reset()
    ours, args = reattend.optimize(Fn(f)), qkv()
    with torch.no_grad():
        torch.testing.assert_close(ours(*args), f(*args))
    report = reattend.report(ours)
    assert report.sites or report.misses or any(p.error for p in report.pieces) or report.given_up


def test_no_map_is_left_open_where_a_trace_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from reattend.rewriter.graph import torch_private

    def fails(run: Callable[..., object], values: list[object]) -> object:
        with torch_private.leaving_maps():
            run(*values)
            torch._C._functorch._vmap_increment_nesting(2, "error")
            raise ValueError("no trace")

    monkeypatch.setattr(torch_private, "dispatched_graph", fails)
    torch._dynamo.reset()
    ours, args = reattend.optimize(Fn(MAPPED["batch"])), qkv()
    with torch.no_grad():
        torch.testing.assert_close(ours(*args), attend(*args))
    assert "no trace" in reattend.report(ours).pieces[0].error
    assert not torch_private.is_transformed()
