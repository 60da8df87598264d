"""A command of `reattend` in this process, and what it is given: a config, and factories as `commands:strict_model`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reattend.cli import main

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 99,
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def strict_model() -> object:
    class Slots(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return torch.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.5, True) @ q

    return Slots(), (torch.randn(2, 8, 16),), {}


def branching_model() -> object:
    class Branching(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            out = (q @ q.transpose(-1, -2)).softmax(-1) @ q
            return out if out.sum().item() > 0 else -out

    return Branching(), (torch.randn(2, 8, 16),), {}


def bare_groups() -> object:
    """Grouped heads whose numbers are sizes of inputs: they are found with fixed sizes only."""

    class Bare(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    return Bare(), (torch.randn(2, 4, 32, 16), torch.randn(2, 2, 32, 16)), {}


def narrow() -> object:
    """Inputs that the model is not for."""
    return nn.Linear(16, 16), (torch.randn(2, 8),), {}


def misnamed() -> object:
    return nn.Linear(16, 16), (), {"x": torch.randn(2, 16)}
