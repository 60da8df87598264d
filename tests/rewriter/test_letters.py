"""Letters of einsum that stand for several ranks: planes of queries and keys, scores over two letters, values of two.

    bhwnd,bxynd->bnhwxy; softmax over x and y; bnhwxy,bxynd->bhwnd        one query rank, one key rank
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reattend.codegen.forms.form import Form, form
from reattend.codegen.forms.operands import Names, operand
from reattend.rewriter.find import detect

from .helpers import given, graph_of, read


def plane(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhwnd,bxynd->bnhwxy", q, k) * 0.3
    p = s.flatten(4).softmax(-1).view_as(s)
    return torch.einsum("bnhwxy,bxynd->bhwnd", p, v)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sides", [(4, 3), (3, 5), (4, 4)])
def test_a_plane_of_queries_and_keys(batch: int, sides: tuple[int, int]) -> None:
    view = read(plane, *given(*3 * [(batch, *sides, 2, 8)]))
    assert view.cascade.rank[view.query].size == view.cascade.rank[view.key].size == sides[0] * sides[1]


def test_a_plane_of_queries_over_another_plane_of_keys() -> None:
    view = read(plane, *given((2, 4, 3, 2, 8), *2 * [(2, 5, 6, 2, 8)]))
    assert view.cascade.rank[view.key].size == 30


def test_operands_of_a_plane_are_flattened_not_fetched() -> None:
    view = read(plane, *given(*3 * [(2, 4, 3, 2, 8)]))
    f = form(view.cascade)
    assert isinstance(f, Form)
    names = Names(view.cascade, {t.name: t.name for t in view.cascade.inputs}, {})
    order = (*f.heads.order, view.key, view.value)
    text, share, plain = operand(view.values, order, f.heads, names, "f32")
    assert text == f"{view.values.attr}.permute(0, 3, 1, 2, 4).flatten(2, 3)"
    assert (share, plain) == (1, True)


def test_scores_over_two_letters_and_values_of_two() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bihd,bjhd->bij", q, k) * 0.1
        return torch.einsum("bij,bjhd->bihd", s.softmax(-1), v)

    view = read(f, *given(*3 * [(2, 12, 3, 8)]))
    assert len(view.products[0].over) == 2
    assert view.cascade.rank[view.value].size == 24


def test_rows_tied_over_a_merged_rank() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(2, 3, 1, 0, 4).reshape(2, 3, 12, 20) for t in (q, k, v))
        return (q @ k.mT * 0.1).softmax(-1) @ v

    view = read(f, *given(*3 * [(5, 12, 2, 3, 4)]))
    assert view.cascade.rank[view.value].size == 20


def test_rows_tied_whose_values_lie_apart_are_named() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("rinhd,rjnhd->hnij", q, k) * 0.1
        return torch.einsum("hnij,rjnhd->rinhd", s.softmax(-1), v)

    found, missed = detect.find(graph_of(f, given(*3 * [(5, 12, 2, 3, 4)])))
    assert not found
    assert any("2 ranks" in m.reason for m in missed)


@pytest.mark.parametrize("dims", [([1], [1]), ([-1], [-1])])
def test_tensordot(dims: tuple[list[int], list[int]]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights: Tensor = torch.tensordot(q, k, dims).softmax(-1)
        out: Tensor = torch.tensordot(weights, v, 1)
        return out

    read(f, *given(*3 * [(12, 8)]))
