"""Models of the laboratory, as people write them: causal, rotary positions, a short convolution before the attention.

The convolution over three tokens is that of BASED (Arora et al. 2024, arXiv 2402.18668): with it one layer can bind a value
to the key before it, and recall is learned in minutes. Attention is plain PyTorch; nothing here knows of reattend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: vocabulary, width, heads, layers; the slowest rotation has a wavelength of 2π · base tokens."""

    words: int
    width: int = 64
    heads: int = 2
    layers: int = 2
    base: float = 10_000.0


def rotated(x: Tensor, base: float) -> Tensor:
    """x [B, H, N, E] with rotary positions (Su et al. 2021, arXiv 2104.09864), halves rotated against each other."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.base = shape.heads, shape.base
        self.near = nn.Conv1d(shape.width, shape.width, 3, padding=2, groups=shape.width)
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = x + self.near(x.transpose(1, 2))[..., :n].transpose(1, 2)
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = rotated(q, self.base), rotated(k, self.base)
        o = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.wide = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.wide(self.behind(x))


class Model(nn.Module):
    """words [B, N] int64 → logits [B, N, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(shape.words, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.words)

    def features(self, words: Tensor) -> Tensor:
        """What the head reads, [B, N, D]: in training it is asked at the answers alone."""
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.features(words))
