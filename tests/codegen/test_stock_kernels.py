"""The kernels that ours are counted against compute causal attention too: run by the interpreter against SDPA."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from reattend.codegen.triton import interpret
from tests.loading import benchmark

pytestmark = pytest.mark.interpreter

HEADS, GROUP, TOKENS, D, TILE, BLOCK = 4, 2, 128, 16, 16, 32


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    interpret.repair()
    return benchmark("stock_kernels")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(h, TOKENS, D) for h in (HEADS, HEADS // GROUP, HEADS // GROUP))
    return q, k, v


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def strides(*tensors: Tensor) -> list[int]:
    return [n for t in tensors for n in t.stride()[:2]]


def shape(**more: Any) -> dict[str, Any]:
    return {"G": GROUP, "D": D, "BM": TILE, "BN": TILE, **more}


def test_tutorial(kernels: ModuleType) -> None:
    q, k, v = inputs()
    out = torch.full_like(q, torch.nan)
    kernels.tutorial[TOKENS // TILE, HEADS](q, k, v, out, D**-0.5, *strides(q, k, v, out), **shape())
    torch.testing.assert_close(out, wanted(q, k, v), rtol=0, atol=1e-5)


def test_descriptors(kernels: ModuleType) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    q, k, v = inputs()
    out = torch.full_like(q, torch.nan)
    given = [TensorDescriptor.from_tensor(t.view(-1, D), [TILE, D]) for t in (q, k, v, out)]
    kernels.descriptors[TOKENS // TILE, HEADS](*given, D**-0.5, TOKENS, **shape())
    torch.testing.assert_close(out, wanted(q, k, v), rtol=0, atol=1e-5)


def test_listed(kernels: ModuleType) -> None:
    """Row block i has the blocks before it as full ones, and itself as a partial one."""
    q, k, v = inputs()
    out = torch.full_like(q, torch.nan)
    blocks = TOKENS // BLOCK
    full = torch.arange(blocks, dtype=torch.int32).expand(blocks, blocks).contiguous()
    partial = torch.arange(blocks, dtype=torch.int32)[:, None].expand(blocks, blocks).contiguous()
    counts = torch.ones(blocks, dtype=torch.int32), torch.arange(blocks, dtype=torch.int32)
    kernels.listed[TOKENS // TILE, HEADS](
        q, k, v, out, counts[0], partial, counts[1], full, *strides(q, k, v, out), blocks, **shape(SCALE=D**-0.5, BLOCK=BLOCK)
    )
    torch.testing.assert_close(out, wanted(q, k, v), rtol=0, atol=1e-5)


def test_listed_skips_what_its_lists_leave_out(kernels: ModuleType) -> None:
    """Blocks that do not follow one another: the first and the third, for queries of the last."""
    q, k, v = inputs()
    out = torch.full_like(q, torch.nan)
    blocks = TOKENS // BLOCK
    full = torch.tensor([0, 2, 0, 0], dtype=torch.int32).expand(blocks, blocks).contiguous()
    none, two = torch.zeros(blocks, dtype=torch.int32), torch.full((blocks,), 2, dtype=torch.int32)
    kernels.listed[TOKENS // TILE, HEADS](
        q, k, v, out, none, full, two, full, *strides(q, k, v, out), blocks, **shape(SCALE=D**-0.5, BLOCK=BLOCK)
    )
    keep = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    keep[:, :BLOCK] = keep[:, 2 * BLOCK : 3 * BLOCK] = True
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
