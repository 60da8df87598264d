"""Selections that the laboratory carries itself: which tiles of keys each tile of queries reads, as a boolean table.

They are anchors, not methods of the package: what a static choice loses, what pooled scores find, and what the best
possible choice of as many tiles would keep. The model's own mask wins: only tiles in which it keeps a pair are chosen from,
and all choose the first tile and the diagonal.

    keep[b, h, i, j]  over tiles of T tokens;  every row of tiles keeps the same number, or all it may: the largest with
                      which at most `share` of the tiles are kept that the model's mask leaves, two at least
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TILE = 8


class Selection(Protocol):
    """What chooses tiles: q, k [B, H, N, E], the scale of scores and the model's mask [N, N] in, keep [B, H, I, J] out."""

    @property
    def share(self) -> float: ...

    def tiles(self, q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor: ...


def tiled(x: Tensor) -> Tensor:
    """[B, H, N, E] → [B, H, I, T, E]."""
    if x.shape[-2] % TILE:
        raise ValueError(f"The laboratory's selections take whole tiles of {TILE} tokens, given {x.shape[-2]}")
    return x.unflatten(-2, (-1, TILE))


def by_tile(allowed: Tensor) -> Tensor:
    """[…, N, N] → [I, J]: the tiles that have an allowed pair."""
    return allowed.unflatten(-1, (-1, TILE)).any(-1).unflatten(-2, (-1, TILE)).any(-2)


def best(scores: Tensor, share: float, allowed: Tensor) -> Tensor:
    """Of each row of tiles those that score best, first and own tile forced; scores [B, H, I, J] → bool."""
    n = scores.shape[-1]
    valid, forced = by_tile(allowed), torch.eye(n, dtype=torch.bool)
    forced[:, 0] = True
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(~valid, float("-inf"))
    place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (place < count(valid.sum(-1), share)) & valid


def count(valid: Tensor, share: float) -> int:
    """How many tiles a row keeps: the most that leave the whole within its share, two at least; valid [I] tiles a row."""
    most = share * float(valid.sum())
    return max((c for c in range(2, int(valid.max()) + 1) if float(valid.clamp(max=c).sum()) <= most), default=2)


def weights(q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """Softmax weights under the model's mask, [B, H, N, N]."""
    return (q @ k.transpose(-2, -1) * scale).masked_fill(~allowed, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class SinkAndWindow:
    """The first tile and the nearest ones, whatever they hold (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

    share: float

    def tiles(self, q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
        n = tiled(q).shape[2]
        near = -(torch.arange(n)[:, None] - torch.arange(n)).abs()
        return best(near.float(), self.share, allowed).expand(*q.shape[:2], n, n)


@dataclass(frozen=True)
class Pooled:
    """By the product of mean queries and mean keys, as MoBA, SeerAttention's untrained form and others estimate."""

    share: float

    def tiles(self, q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
        return best(tiled(q).mean(-2) @ tiled(k).mean(-2).transpose(-2, -1), self.share, allowed)


@dataclass(frozen=True)
class Antidiagonal:
    """By softmax weights of antidiagonal sums of four by four scores (XAttention, Xu et al. 2025, arXiv 2503.16428).

    Keys of odd strides are rolled by one, so that distances of either parity are seen; the published sums miss even ones.
    """

    share: float

    def tiles(self, q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
        stride = 4
        a = q.unflatten(-2, (-1, stride)).flip(-2).flatten(-2)
        b = k.unflatten(-2, (-1, stride))
        odd = b.roll(1, -2)
        b = torch.where((torch.arange(b.shape[2]) % 2 == 1)[:, None, None], odd, b).flatten(-2)
        whole = allowed.unflatten(-1, (-1, stride)).any(-1).unflatten(-2, (-1, stride)).any(-2)
        p = weights(a, b, scale / stride, whole)
        cells = TILE // stride
        return best(p.unflatten(-1, (-1, cells)).sum(-1).unflatten(-2, (-1, cells)).sum(-2), self.share, allowed)


@dataclass(frozen=True)
class LargestScore:
    """By the largest score of any pair in the tile over its row's own log-sum: every element is looked at (SALE's test in
    float32, Ji et al. 2025, arXiv 2505.24179; here with exact rows instead of anchors)."""

    share: float

    def tiles(self, q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
        p = weights(q, k, scale, allowed)
        return best(p.unflatten(-1, (-1, TILE)).amax(-1).unflatten(-2, (-1, TILE)).amax(-2), self.share, allowed)


@dataclass(frozen=True)
class Oracle:
    """By the mass that the exact softmax puts on the tile: what no estimate of the sum can beat on average."""

    share: float

    def tiles(self, q: Tensor, k: Tensor, scale: float, allowed: Tensor) -> Tensor:
        p = weights(q, k, scale, allowed)
        return best(p.unflatten(-1, (-1, TILE)).sum(-1).unflatten(-2, (-1, TILE)).sum(-2), self.share, allowed)


SELECTIONS = (SinkAndWindow, Pooled, Antidiagonal, LargestScore, Oracle)
