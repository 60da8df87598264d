"""Attentions with parameters of their own, as models write them and as SDPA takes them: what `training.py` trains.

    alibi   slopes that are learned, causal         t5      a table of 32 buckets of distances, as T5's encoder has it
    swin    windows of 7 × 7, a table of 13 × 13    sinks   a logit a head beside a causal window of 128, as gpt-oss has it
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

LOWEST = torch.finfo(torch.float32).min
SIDE = 7


class Biased(nn.Module):
    """Softmax of scaled products and a bias of the module's own."""

    def bias(self, n: int) -> Tensor:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return (scores + self.bias(q.shape[-2])).softmax(-1) @ v

    def given_to_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=self.bias(q.shape[-2]))


class Alibi(Biased):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)]))

    def bias(self, n: int) -> Tensor:
        i = torch.arange(n)
        away = (i - i[:, None]).to(self.slopes.dtype)
        hidden = torch.zeros(n, n, dtype=away.dtype).masked_fill(i > i[:, None], torch.finfo(away.dtype).min)
        return self.slopes[:, None, None] * away + hidden


class T5(Biased):
    def __init__(self, heads: int, buckets: int = 32, longest: int = 128) -> None:
        super().__init__()
        self.table, self.buckets, self.longest = nn.Embedding(buckets, heads), buckets, longest

    def bias(self, n: int) -> Tensor:
        i = torch.arange(n)
        away, half = i - i[:, None], self.buckets // 2
        exact = half // 2
        far = away.abs().float().clamp(min=1) / exact
        logs = exact + (far.log() / math.log(self.longest / exact) * (half - exact)).long()
        place = (away > 0).long() * half + torch.where(away.abs() < exact, away.abs(), logs.clamp(max=half - 1))
        return self.table(place).permute(2, 0, 1)


class Swin(Biased):
    place: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, heads) * 0.02)
        at = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        away = at[:, :, None] - at[:, None, :] + SIDE - 1
        self.register_buffer("place", away[0] * (2 * SIDE - 1) + away[1])

    def bias(self, n: int) -> Tensor:
        return self.table[self.place.view(-1)].view(n, n, -1).permute(2, 0, 1)


class Sinks(nn.Module):
    def __init__(self, heads: int, window: int = 128) -> None:
        super().__init__()
        self.sinks, self.window = nn.Parameter(torch.randn(heads)), window

    def hidden(self, n: int, dtype: torch.dtype) -> Tensor:
        i = torch.arange(n)
        keep = (i <= i[:, None]) & (i[:, None] - i < self.window)
        return torch.zeros(n, n, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.hidden(n, q.dtype)
        sinks = self.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, n, -1)
        both = torch.cat([scores, sinks], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        return both.softmax(-1)[..., :-1] @ v

    def given_to_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One more key and value of zeros, whose score is the sink."""
        n = q.shape[-2]
        sinks = self.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, n, -1)
        mask = torch.cat([self.hidden(n, q.dtype).expand(q.shape[0], q.shape[1], n, n), sinks], dim=-1)
        return sdpa(q, pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1)), attn_mask=mask)


@dataclass(frozen=True)
class Learned:
    """An attention, and the batch, heads, tokens and head size at which it is trained; None: as many tokens as asked."""

    make: Callable[[int], Biased | Sinks]
    batch: int
    heads: int
    tokens: int | None
    head: int


LEARNED = {
    "alibi": Learned(Alibi, 1, 8, None, 64), "t5": Learned(T5, 1, 8, None, 64),
    "swin": Learned(Swin, 256, 4, SIDE * SIDE, 32), "sinks": Learned(Sinks, 1, 8, None, 64),
}
