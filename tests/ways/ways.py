"""Ways of running an optimised model: what each is called, and what comes of it; docs/ways.md is the same table."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.sites.site import ORIGINAL
from reattend.rewriter.choose.policy import Policy

PAGE = Path(__file__).parents[2] / "docs" / "ways.md"
WORKS, AS_WRITTEN = "works", "as written, and `report` says so"
ROWS: dict[str, str] = {}


def way(name: str, outcome: str, *marks: pytest.MarkDecorator) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A test of one row of the page."""

    def named(test: Callable[..., Any]) -> Callable[..., Any]:
        assert ROWS.setdefault(name, outcome) == outcome
        return functools.reduce(lambda t, mark: mark(t), marks, test)

    return named


# --- models -----------------------------------------------------------------------------------------------------------

POLICY = Policy(allow=("reattend", "sdpa"), deny="original")


def llama(kind: str = "Llama", **options: Any) -> Any:
    """A tiny decoder of transformers, with grouped heads."""
    import transformers

    given = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **options}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=96, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=None, **given
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.dim() > 1 else nn.init.normal_(p, 1.0, 0.1)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Causal self-attention as people write it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
        out: Tensor = self.out((s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width))
        return out


class Stack(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# --- what came of it ----------------------------------------------------------------------------------------------------


def optimised(model: Any) -> Any:
    """A copy of a model whose attentions must run a kernel."""
    return reattend.optimize(copy.deepcopy(model), policy=POLICY)


def went_round(model: nn.Module, why: str) -> bool:
    """Does the report name calls that went round for this reason?"""
    found = reattend.report(model)
    return found.bypassed[why] > 0 and f"went round reattend {found.bypassed[why]}×: {why}" in str(found)


def ran(model: nn.Module) -> int:
    """How many attentions ran a kernel of ours or a vendor's."""
    return sum(n for kernel, n in reattend.report(model).kernels.items() if kernel != ORIGINAL)


def equal(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= bound * want.abs().max()
