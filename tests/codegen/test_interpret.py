"""The mended interpreter: bf16 rounds and multiplies as torch has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reattend.codegen.files import cache
from reattend.codegen.triton import interpret

PATTERNS = np.arange(1 << 16, dtype=np.uint16)

KERNEL = """import triton
import triton.language as tl


@triton.jit
def product(x, y, out, rounded):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = i * 16 + j
    z = tl.dot(tl.load(x + at), tl.load(y + at), tl.zeros([16, 16], tl.float32))
    tl.store(out + at, z)
    tl.store(rounded + at, z.to(tl.bfloat16))
"""


def bits(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.view(torch.int16).numpy().view(np.uint16)
    return found


def test_every_pattern_is_widened_exactly() -> None:
    want = torch.from_numpy(PATTERNS.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(interpret.widen_bf16(PATTERNS), want)


def test_numbers_round_to_the_nearest_pattern_and_ties_to_even() -> None:
    """Every pattern followed by what lies just below, at and just above the middle to the next one."""
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = ((PATTERNS.astype(np.uint32)[:, None] << 16) | tails).view(np.float32)
    numbers = values[~np.isnan(values)]
    np.testing.assert_array_equal(interpret.narrow_bf16(numbers), bits(torch.from_numpy(numbers).bfloat16()))


def test_every_nan_stays_one() -> None:
    values = np.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFF80FFFF], dtype=np.uint32).view(np.float32)
    assert (interpret.narrow_bf16(values) == 0x7FC0).all()


@pytest.mark.interpreter
def test_a_product_of_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    interpret.repair()
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out, rounded = torch.full((16, 16), torch.nan), torch.full((16, 16), torch.nan, dtype=torch.bfloat16)
    cache.load(KERNEL).product[(1,)](x, y, out, rounded)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=0, atol=1e-5)
    assert torch.equal(rounded, out.bfloat16())
