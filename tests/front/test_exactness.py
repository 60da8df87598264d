"""What exact means where numbers are none: NaN is not hidden, and what overflows in a narrow type need not in a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reattend
from tests.cases.field import Fn, causal, tensors

pytestmark = pytest.mark.thin(3)

WAYS = ("reattend", "sdpa", pytest.param("flex", marks=pytest.mark.slow))
EVERY = ("original", "reattend", "sdpa", "flex")


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights: Tensor = causal(q @ k.mT * 0.125).softmax(-1)
    return weights @ v


def run(way: str, *args: Tensor, f: Callable[..., Tensor] = masked) -> Tensor:
    """One call of that candidate, which may fall back to the original where its guard says so."""
    torch._dynamo.reset()
    model = reattend.optimize(Fn(f), policy=reattend.Policy(deny=tuple(w for w in EVERY if w != way)))
    with torch.no_grad():
        out: Tensor = model(*args)
    (site,) = reattend.report(model).sites
    assert site.kernel == way
    return out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_number_reaches_every_row_that_keeps_its_key(way: str, where: str, bad: float) -> None:
    q, k, v = tensors(*3 * [(1, 4, 256, 32)])
    (k if where == "keys" else v)[0, 0, 100] = bad
    q = q.abs() if where == "keys" else q
    out = run(way, q, k, v)
    assert not out[0, 0, 100:].isfinite().any()
    assert out[0, 1:].isfinite().all()


@pytest.mark.parametrize("way", WAYS[:2])
def test_scores_beyond_a_narrow_type_may_stay_finite(way: str) -> None:
    """The model's products overflow in float16 and its rows are NaN; a kernel's are those of float64."""
    q, k, v = (t.half() for t in tensors(*3 * [(1, 4, 256, 32)]))
    q, k = q * 120, k * 120
    assert masked(q, k, v).isnan().any()
    out, exact = run(way, q, k, v), masked(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def cast_at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Queries and keys that were turned in complex128, as rotary embeddings of image models do."""
    mask = mask.to(v.dtype) if mask.is_floating_point() else mask
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS[:2])
def test_operands_in_float64_that_are_cast_at_once_leave_the_mask_its_type(
    way: str, kind: torch.dtype, dtype: torch.dtype
) -> None:
    q, k, v = tensors(*3 * [(2, 4, 100, 16)])
    keep = torch.ones(2, 1, 100, 100, dtype=torch.bool)
    keep[1, ..., 90:] = False
    mask = keep if kind == torch.bool else torch.where(keep, 0.5, -1e4).to(kind)
    given = q.double(), k.double(), v.to(dtype), mask
    out = run(way, *given, f=cast_at_once)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, cast_at_once(*given), rtol=near, atol=near)
