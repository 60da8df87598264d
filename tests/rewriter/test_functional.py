"""Graphs without writes compute what the graphs with them do, bit by bit and in their gradients; what cannot be told is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reattend.rewriter.graph.functional import functional
from reattend.rewriter.graph.node import written_arguments

from .helpers import graph_of

INF = math.inf


def columns(a: Tensor) -> Tensor:
    a[..., -2:] = -INF
    return a * 1


def one_row(a: Tensor) -> Tensor:
    a[:, 0, 1:] = -1e4
    return a * 1


def a_block_is_raised(a: Tensor) -> Tensor:
    a[:, :2, :3] += 1.0
    return a * 1


def a_block_gets_another(a: Tensor) -> Tensor:
    a[:, :2, :2] = a[:, 2:4, 2:4] + a[:, :2, :2]
    return a * 1


def diagonal(a: Tensor) -> Tensor:
    a.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return a * 1


def upper_diagonal(a: Tensor) -> Tensor:
    a.diagonal(offset=1, dim1=-2, dim2=-1).fill_(-INF)
    return a * 1


def through_a_transpose(a: Tensor) -> Tensor:
    a.mT[..., :2].mul_(2.0)
    return a * 1


def through_a_view(a: Tensor) -> Tensor:
    a.view(-1, 5)[::1].add_(torch.arange(5.0))
    a.permute(2, 0, 1)[1:3] = 0.0
    return a * 1


def a_view_taken_before(a: Tensor) -> Tensor:
    first, rest = a[..., :2], a[..., 2:]
    a[..., 1:4] = 3.0
    return torch.cat([rest, first * 2], -1)


def a_value_read_before(a: Tensor) -> Tensor:
    before = a * 2
    top = a.mean(-1, keepdim=True)
    a[..., :2] = -1.0
    return a + before + top


def twice(a: Tensor) -> Tensor:
    a[..., :2] = 1.0
    b = a[..., 1:].clone()
    b[..., 0] = 7.0
    a[..., 1:] = b
    return a * 1


def of_another_type(a: Tensor) -> Tensor:
    b = a.to(torch.float64)
    b[..., :2] = a[..., 2:4]
    return b.to(torch.float32) * 1


def by_index_and_mask(a: Tensor) -> Tensor:
    a[..., 1:][..., torch.ones(5, 4, dtype=torch.bool).triu(2)] = -5.0
    return a * 1


EDITS = (
    columns, one_row, a_block_is_raised, a_block_gets_another, diagonal, upper_diagonal, through_a_transpose, through_a_view,
    a_view_taken_before, a_value_read_before, twice, of_another_type, by_index_and_mask,
)


def made(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit of a value that the graph makes itself."""
    return lambda x: edit(x * 1.5)


def given() -> Tensor:
    return torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("edit", EDITS)
def test_values_and_gradients_are_those_of_the_graph(edit: Callable[[Tensor], Tensor]) -> None:
    gm = graph_of(made(edit), [given()])
    pure = functional(gm)
    assert pure is not None
    assert not [n for n in pure.graph.nodes if written_arguments(n)]
    pure.graph.lint()
    assert torch.equal(pure(given()), gm(given()))
    results: list[Tensor] = []
    for m in (gm, pure):
        x = given().requires_grad_()
        results += torch.autograd.grad((m(x).nan_to_num(0, 0, 0) * given()).sum(), x)
    assert torch.equal(*results)


def returned(x: Tensor) -> Any:
    a = x * 1.5
    a[..., :2] = 0.0
    return a


def of_an_input(x: Tensor) -> Tensor:
    x[..., :2] = 0.0
    return x * 1


def without_gradients(x: Tensor) -> Tensor:
    a = x * 1.5
    with torch.no_grad():
        a[..., :2] = 0.0
    return a * 1


def what_it_shows(x: Tensor) -> Tensor:
    a = x * 1.5
    b = a[..., :5]
    b.transpose_(0, 1)
    a[..., :2].add_(1.0)
    return a * 1


def random(x: Tensor) -> Tensor:
    a = x * 1.5
    a[..., :2].uniform_()
    return a * 1


def of_parts(x: Tensor) -> Tensor:
    a = x * 1.5
    first, _ = torch.split(a, [2, 3], -1)
    first.zero_()
    return a * 1


def of_all_at_once(x: Tensor) -> Tensor:
    a = x * 1.5
    torch._foreach_add_([a[..., :2]], 1.0)
    a[..., 2:].zero_()
    return a * 1


@pytest.mark.parametrize(
    "fn", [returned, of_an_input, without_gradients, what_it_shows, random, of_parts, of_all_at_once],
)
def test_what_cannot_be_told_is_left(fn: Callable[[Tensor], Tensor]) -> None:
    assert functional(graph_of(fn, [given()])) is None


def test_writes_into_a_whole_value_are_lifted_as_they_are() -> None:
    """A chain of writes into one value needs no other graph."""
    assert functional(graph_of(lambda x: (x * 1.5).masked_fill_(x > 0, 0.0).add_(1.0) * 1, [given()])) is None
