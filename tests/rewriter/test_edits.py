"""Scores that are edited by slice, index, diagonal, mask and scatter: a predicate over coordinates, in place or not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.masks.split import split
from reattend.rewriter.find import detect
from reattend.rewriter.find.place import place
from reattend.rewriter.graph.functional import functional
from reattend.rewriter.graph.shape_only import with_sizes

from .helpers import error_of, graph_of, values_of

N = 12
INF = math.inf
Edit = Callable[[Tensor], Tensor]


def read(edit: Edit) -> Attention:
    """The one attention whose scores are edited, which computes what the function does."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return edit(q @ k.mT * 0.25).softmax(-1) @ v

    torch.manual_seed(0)
    args = [torch.randn(2, 3, N, 8, dtype=torch.float64) for _ in range(3)]
    gm = graph_of(f, args)
    gm = functional(gm) or gm
    (found,), _ = detect.find(gm)
    assert error_of(found, values_of(gm, args)) <= 1e-12
    view = attention(found.cascade)
    assert isinstance(view, Attention)
    return view


def last_columns(a: Tensor) -> Tensor:
    a[..., -5:] = -INF
    return a


def first_columns_but_one_row(a: Tensor) -> Tensor:
    a[:, :, 1:, :3] = -INF
    return a


def a_column(a: Tensor) -> Tensor:
    a[..., 4] = -INF
    return a


def one_row(a: Tensor) -> Tensor:
    a[:, :, 0, 1:] = -INF
    return a


def its_own_diagonal(a: Tensor) -> Tensor:
    a.diagonal(dim1=-2, dim2=-1).fill_(-INF)
    return a


def another_diagonal(a: Tensor) -> Tensor:
    a.diagonal(offset=-2, dim1=-2, dim2=-1).fill_(-INF)
    return a


def a_mask_as_index(a: Tensor) -> Tensor:
    a[:, :, torch.ones(N, N, dtype=torch.bool).triu(1)] = -INF
    return a


def a_mask_of_all(a: Tensor) -> Tensor:
    a[torch.ones(N, N, dtype=torch.bool).triu(1).expand_as(a)] = -INF
    return a


def scattered_slice(a: Tensor) -> Tensor:
    return torch.slice_scatter(a, torch.full_like(a[..., :4], -INF), -1, 2, 6)


def scattered_column(a: Tensor) -> Tensor:
    return torch.select_scatter(a, torch.full_like(a[..., 0], -INF), -1, -1)


def scattered_diagonal(a: Tensor) -> Tensor:
    return torch.diagonal_scatter(a, torch.full(a.shape[:-1], -INF, dtype=a.dtype), 0, -2, -1)


MASKS = (
    last_columns, first_columns_but_one_row, a_column, one_row, its_own_diagonal, another_diagonal, a_mask_as_index,
    a_mask_of_all, scattered_slice, scattered_column, scattered_diagonal,
)


@pytest.mark.parametrize("edit", MASKS)
def test_fills_are_a_predicate(edit: Edit) -> None:
    view = read(edit)
    mask = split(view.score, view.key)
    assert mask.fills == (-INF,)
    assert mask.keep.ranks <= {view.query, view.key}


def a_block_is_raised(a: Tensor) -> Tensor:
    a[:, :, :5, :5] += 1.0
    return a


def a_part_is_scaled(a: Tensor) -> Tensor:
    a[..., 1:] *= 0.5
    return a


def a_column_gets_more(a: Tensor) -> Tensor:
    a[..., 0] = a[..., 0] + 1.0
    return a


def a_row_gets_more(a: Tensor) -> Tensor:
    a[:, :, 3] = a[:, :, 3] * 2.0
    return a


def the_diagonal_gets_less(a: Tensor) -> Tensor:
    a.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return a


def a_bias_for_some(a: Tensor) -> Tensor:
    bias = torch.arange(float(N)).to(a.dtype)
    a[:, :, 2:] = a[:, :, 2:] + bias
    a[..., :2].clamp_(max=0.5)
    return a


@pytest.mark.parametrize(
    "edit", [a_block_is_raised, a_part_is_scaled, a_column_gets_more, a_row_gets_more, the_diagonal_gets_less, a_bias_for_some],
)
def test_parts_of_the_scores_get_something(edit: Edit) -> None:
    view = read(edit)
    assert len(view.products) == 1
    assert not view.prelude


def test_constant_indices_are_read() -> None:
    """Indices that the graph holds: a stretch of neighbours is two comparisons."""
    held = torch.tensor([0, 1, 2, 7])
    view = read(lambda a: a.index_fill(-1, held, -INF))
    mask = split(view.score, view.key)
    assert mask.fills == (-INF,)
    assert not mask.keep.ranks - {view.key}


def test_indices_of_the_call_are_named() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        return (q @ k.mT).index_fill(-1, i, -INF).softmax(-1) @ v

    args = [*(torch.randn(2, 3, N, 8) for _ in range(3)), torch.tensor([1, 4])]
    found, missed = detect.find(graph_of(f, args))
    assert not found
    assert any("no constants of the graph" in m.reason for m in missed)


def test_a_mask_made_by_slices_is_a_predicate() -> None:
    """Regions of a shifted window, numbered by slices."""

    def numbered(a: Tensor) -> Tensor:
        region = torch.zeros(N)
        region[4:8], region[8:] = 1.0, 2.0
        return a.masked_fill(region[:, None] != region[None], -INF)

    view = read(numbered)
    mask = split(view.score, view.key)
    assert mask.fills == (-INF,)
    assert not [x for x in view.cascade.inputs if len(x.shape) < 2]


def test_scores_read_for_their_shape_are_not_read() -> None:
    """`expand_as(scores)`: the mask that it makes is read as it is, and the scores are not."""

    def f(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sink: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        s[~keep.expand_as(s)] = -INF
        return torch.cat([s, sink.expand(2, 3, N, 1)], -1).softmax(-1)[..., :-1] @ v

    torch.manual_seed(0)
    args = [*(torch.randn(2, 3, N, 8, dtype=torch.float64) for _ in range(3)), torch.rand(2, 1, N, 1) > 0.5]
    args.append(torch.randn(1, dtype=torch.float64))
    gm = graph_of(f, args)
    gm = functional(gm) or gm
    with_sizes(gm)
    (found,), _ = detect.find(gm)
    assert error_of(found, values_of(gm, args)) <= 1e-12
    assert not place(found, "site").bound


def test_values_made_of_the_scores_keep_the_original() -> None:
    """What the attention reads is made of its own scores, which would be computed twice."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * 0.25
        v = v.clone()
        v[:, :, 0] = s.mean()
        return s.softmax(-1) @ v

    gm = functional(graph_of(f, [torch.randn(2, 3, N, 8) for _ in range(3)]))
    assert gm is not None
    (found,), _ = detect.find(gm)
    assert "read elsewhere" in place(found, "site").bound
