"""Positions of a plane in the score (SAM, ViTDet): q · row and q · column are computed before the score, and define no key.

    S[h,p,m] = QK[h,p,m] + R[h,p // W,p % W,m // W] + C[h,p // W,p % W,m % W]
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reattend.rewriter.find import detect

from .helpers import given, graph_of, read

H, W, C = 6, 4, 8


def bias(r: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    by_row = torch.einsum("bhwc,hkc->bhwk", r, rows)[..., None]
    return by_row + torch.einsum("bhwc,wkc->bhwk", r, columns)[..., None, :]


def added_flat(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r = bias(q.view(-1, H, W, C), rows, columns)
    return (q @ k.mT * 0.3 + r.reshape(-1, H * W, H * W)).softmax(-1) @ v


def added_to_a_view(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    a = (q @ k.mT * 0.3).view(-1, H, W, H, W) + bias(q.view(-1, H, W, C), rows, columns)
    return a.view(-1, H * W, H * W).softmax(-1) @ v


def by_products(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r = q.view(-1, H, W, C)
    by_row = (r @ rows.mT)[..., None]
    by_column = (r.transpose(1, 2) @ columns.mT).transpose(1, 2)[..., None, :]
    return (q @ k.mT * 0.3 + (by_row + by_column).flatten(3).flatten(1, 2)).softmax(-1) @ v


@pytest.mark.parametrize("fn", [added_flat, added_to_a_view, by_products])
@pytest.mark.parametrize("batch", [1, 3])
def test_bias_by_row_and_column(fn: Callable[..., Tensor], batch: int) -> None:
    view = read(fn, *given(*3 * [(batch, H * W, C)], (H, H, C), (W, W, C)))
    assert len(view.products) == 1
    assert len(view.prelude) == 2
    assert view.cascade.rank[view.query].size == H * W


def test_queries_that_lie_as_a_plane() -> None:
    """Rows and columns of queries apart: what varies over either is no key of theirs."""

    def f(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        a = (q.flatten(1, 2) @ k.flatten(1, 2).mT).view(-1, H, W, H, W) + bias(q, rows, columns)
        return a.view(-1, H * W, H * W).softmax(-1) @ v.flatten(1, 2)

    view = read(f, *given(*3 * [(2, H, W, C)], (H, H, C), (W, W, C)))
    assert [str(e.out.tensor) for e in view.products] == ["QK"]


def test_heads_of_one_projection_stay_a_batch() -> None:
    """The batch of heads is still read by sequence and head, though the bias has it in one."""

    def f(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        q, k, v = x.reshape(2, H * W, 3, 2, C).permute(2, 0, 3, 1, 4).reshape(3, 4, H * W, C).unbind(0)
        return added_to_a_view(q, k, v, rows, columns)

    view = read(f, *given((2, H, W, 6 * C), (H, H, C), (W, W, C)))
    assert len(view.batch) == 2
    assert view.cascade.rank[view.query].size == H * W


def test_a_bias_alone_is_no_attention() -> None:
    def f(q: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        r = bias(q.view(-1, H, W, C), rows, columns)
        return r.reshape(-1, H * W, H * W).softmax(-1) @ v

    args = given(*2 * [(3, H * W, C)], (H, H, C), (W, W, C))
    found, missed = detect.find(graph_of(f, args))
    assert not found
    assert missed
