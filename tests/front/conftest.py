"""Small models for the front doors: a decoder from transformers, and a few lines of plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .commands import CONFIG


class Block(nn.Module):
    """Self-attention with a causal mask, as people write it."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        mixed = s.masked_fill(~keep, float("-inf")).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, n, width))
        return out


class Stack(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 40, 16)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def llama() -> Callable[..., Any]:
    """A tiny Llama with grouped heads; keyword arguments go to its config."""

    def make(**options: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        given = {"attn_implementation": "eager", "num_hidden_layers": 2, **options}
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
            pad_token_id=0, bos_token_id=1, eos_token_id=None, **given,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return make


def left_padded(batch: int = 2, length: int = 12, padding: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, 256, (batch, length))
    keep = torch.ones_like(ids)
    keep[0, :padding] = 0
    return {"input_ids": ids.masked_fill(keep == 0, 0), "attention_mask": keep}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return left_padded()
