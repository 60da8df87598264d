"""Attentions that nobody has named: random score, mask and row programs, written in plain PyTorch as a user would."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Step = Callable[[Tensor, "Grid"], Tensor]


@dataclass(frozen=True)
class Grid:
    """Index tensors of a score (B, H, P, M) and small data, as a model would hold them."""

    h: Tensor
    i: Tensor
    j: Tensor
    segments: Tensor
    bias: Tensor
    table: Tensor


@dataclass(frozen=True)
class Program:
    """An attention function of (q, k, v, segments, bias, table), and the text of what was drawn."""

    name: str
    scores: tuple[Step, ...]
    mask: Callable[[Grid], Tensor] | None
    fill: float
    additive: bool
    row: Callable[[Tensor, Grid], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        p, m = q.shape[2], k.shape[2]
        grid = Grid(
            torch.arange(q.shape[1])[:, None, None], torch.arange(p)[:, None], torch.arange(m), segments, bias, table
        )
        s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        for step in self.scores:
            s = step(s, grid)
        if self.mask is not None:
            keep = self.mask(grid)
            s = s + torch.where(keep, 0.0, self.fill) if self.additive else s.masked_fill(~keep, self.fill)
        return self.row(s, grid) @ v

    def __repr__(self) -> str:
        return self.name


def _choice(table: dict[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    return st.sampled_from(sorted(table.items(), key=lambda kv: kv[0]))


SCORES: dict[str, Step] = {
    "times 0.7": lambda s, g: s * 0.7,
    "distance": lambda s, g: s - 0.05 * (g.i - g.j).abs(),
    "slope a head": lambda s, g: s + (g.j - g.i) * 2.0 ** -(g.h + 1),
    "cap": lambda s, g: torch.tanh(s / 3.0) * 3.0,
    "cosine of distance": lambda s, g: s * torch.cos((g.i - g.j) * 0.3),
    "cosine inside a cap": lambda s, g: torch.tanh(s * torch.cos((g.i - g.j) * 0.1)) * 2.0,
    "dense bias": lambda s, g: s + g.bias,
    "table of clamped distance": lambda s, g: s + g.table[(g.j - g.i).clamp(-7, 7) + 7],
    "own position": lambda s, g: s + torch.sin(g.j * 0.5),
    "soft threshold": lambda s, g: torch.sign(s) * (s.abs() - 0.1).clamp(min=0),
    "parity": lambda s, g: torch.where((g.i + g.j) % 3 == 0, s, s * 0.5),
}
MASKS: dict[str, Callable[[Grid], Tensor]] = {
    "causal": lambda g: g.j <= g.i,
    "window": lambda g: (g.j <= g.i) & (g.i - g.j < 9),
    "near": lambda g: (g.i - g.j).abs() <= 5,
    "prefix": lambda g: (g.j <= g.i) | (g.j < 6),
    "blocks": lambda g: g.i // 8 == g.j // 8,
    "checkerboard by head": lambda g: (g.i + g.j + g.h) % 2 == 0,
    "segments": lambda g: g.segments[:, None, :, None] == g.segments[:, None, None, :],
    "padding": lambda g: (g.segments > 0)[:, None, None, :],
    "strided": lambda g: (g.i - g.j) % 4 == 0,
    "not self": lambda g: g.i != g.j,
    "head window": lambda g: (g.i - g.j).abs() <= 3 * (g.h + 1),
}


def _l1(s: Tensor, w: Tensor) -> Tensor:
    return w / (w.sum(-1, keepdim=True) + 1e-3)


ROWS: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "softmax": lambda s, g: s.softmax(-1),
    "exp over sum": lambda s, g: s.exp() / s.exp().sum(-1, keepdim=True),
    "stable by hand": lambda s, g: (e := (s - s.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True),
    "squares": lambda s, g: _l1(s, s.clamp(min=-20) ** 2),
    "sigmoid": lambda s, g: torch.sigmoid(s - math.log(s.shape[-1])),
    "softplus": lambda s, g: _l1(s, torch.nn.functional.softplus(s)),
    "relu": lambda s, g: _l1(s, torch.relu(s)),
    "off by one": lambda s, g: (e := (s - s.amax(-1, keepdim=True)).exp()) / ((-s.amax(-1, keepdim=True)).exp() + e.sum(-1, keepdim=True)),
    "log softmax": lambda s, g: s.log_softmax(-1).exp(),
}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """One program: up to two score steps, up to two masks joined by and / or, a fill, a row rule."""
    steps = draw(st.lists(_choice(SCORES), max_size=2))
    masks = draw(st.lists(_choice(MASKS), max_size=2))
    row_name, row = draw(_choice(ROWS))
    both = draw(st.booleans())
    # a row rule without exponentials takes no −∞: squares and sums of it are NaN in the original as well
    finite = row_name in ("squares",)
    fill = -1e4 if finite else draw(st.sampled_from([-math.inf, -1e9, torch.finfo(torch.float32).min]))
    additive = draw(st.booleans())
    mask = None
    if len(masks) == 1:
        mask = masks[0][1]
    elif masks:
        (_, a), (_, b) = masks
        mask = (lambda g: a(g) & b(g)) if both else (lambda g: a(g) | b(g))
    joined = (" and " if both else " or ").join(n for n, _ in masks) or "no mask"
    name = f"{' → '.join(n for n, _ in steps) or 'plain'}; {joined} ({fill:.0e}{', added' if additive else ''}); {row_name}"
    return Program(name, tuple(s for _, s in steps), mask, fill, additive, row)


def inputs(p: int = 37, m: int = 37, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v (2, 4, n, 16), segments (2, max(p, m)) with 0 for padding, bias (4, p, m), table (15,)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 4, n, 16, generator=generator, dtype=torch.float64).to(dtype) for n in (p, m, m))
    segments = (torch.arange(max(p, m)) // 13 + 1).repeat(2, 1)
    segments[0, -5:] = 0
    bias = torch.randn(4, p, m, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randn(15, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, segments, bias, table
