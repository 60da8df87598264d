"""Queries and keys with a known structure, and the table that a method makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.patterns.attention.attention import Attention
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.selecting.cells import Cells, causal
from reattend.patterns.methods.selecting.execute import Execution
from reattend.patterns.methods.selecting.program import SelectedMethod
from tests.methods.attentions import view


def codes(n: int, depth: int, seed: int = 0) -> Tensor:
    """[n, depth]: directions of length 1 that hardly meet."""
    x = torch.randn(n, depth, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def flat(heads: int, tokens: int, depth: int, seed: int = 0) -> Tensor:
    """[1, heads, tokens, depth]: rows without a preference."""
    return torch.randn(1, heads, tokens, depth, generator=torch.Generator().manual_seed(seed)) * 0.05


def cut(x: Tensor, dim: int, into: tuple[int, int]) -> Tensor:
    """`unflatten`, typed."""
    dim %= x.dim()
    return x.reshape(*x.shape[:dim], *into, *x.shape[dim + 1 :])


def run(q: Tensor, k: Tensor, cells: Cells | None = None, scale: float = 1.0) -> Execution:
    return Execution(torch, q, k, cells or causal(q.shape[2], k.shape[2]), scale)


def table_of(method: SelectedMethod, q: Tensor, k: Tensor, a: Attention | None = None) -> Tensor:
    """The table of a method for causal rows at the end of the keys, through its law."""
    a = a or view(P=q.shape[2], M=k.shape[2])
    made = method.replace(a)
    assert isinstance(made, Replacement), made
    assert made.program is not None
    return made.program.run(torch, {"Q": q, "K": k}, {})  # type: ignore[no-any-return]


def pairs(table: Tensor, rows: int, keys: int, queries: int, tokens: int) -> Tensor:
    """[b, h, p, m]: which pairs a table and the causal mask keep."""
    out = table.repeat_interleave(rows, 2)[:, :, :queries].repeat_interleave(keys, 3)[..., :tokens]
    return out & (torch.arange(tokens) <= torch.arange(queries)[:, None] + tokens - queries)


def recall(q: Tensor, k: Tensor, kept: Tensor, scale: float) -> Tensor:
    """[b, h, p]: the share of each row's softmax that is kept, in float64."""
    group = q.shape[1] // k.shape[1]
    scores = (q.double() @ k.double().repeat_interleave(group, 1).mT) * scale
    n, m = scores.shape[-2:]
    seen = torch.arange(m) <= torch.arange(n)[:, None] + m - n
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) * kept).sum(-1)
