"""Products by other names: distances between tokens, and layers whose weights are queries of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.rewriter.find import detect
from reattend.rewriter.find.spelled import spell
from reattend.rewriter.graph import functional

from .helpers import error_of, given, graph_of, read, values_of

LAYER = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# As many taps, and channels, as there are tokens.
SQUARE = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MANY = ((2, 4, 27, 8), (2, 4, 30, 8), (2, 4, 30, 8))


def far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-0.3 * torch.cdist(q, k) ** 2).softmax(-1) @ v


def squared_in_a_flat_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    d = torch.cdist(q.flatten(0, 1), k.flatten(0, 1)).pow(2).view(*q.shape[:-1], -1)
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(3)
    out: Tensor = d.neg().masked_fill(~keep, -torch.inf).softmax(-1) @ v
    return out


def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k[:, :1])).softmax(-1) @ v[:, :1]


@pytest.mark.parametrize("fn", [far, squared, squared_in_a_flat_batch, one_key_head])
def test_a_distance_of_many_tokens_is_a_product(fn: Callable[..., Tensor]) -> None:
    view = read(fn, *given(*MANY))
    assert (view.query, view.key) == ("p", "m")


def of_other_norms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k, p=1.0)).softmax(-1) @ v


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")).softmax(-1) @ v


FEW = ((2, 4, 25, 8), (2, 4, 25, 8), (2, 4, 25, 8))


@pytest.mark.parametrize(
    ("fn", "shapes", "why"), [(of_other_norms, MANY, "norm p = 1.0"), (one_by_one, MANY, "subtracts"), (far, FEW, "subtracts")]
)
def test_a_distance_that_is_no_product_is_named(
    fn: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], why: str
) -> None:
    found, missed = detect.find(graph_of(fn, given(*shapes)))
    assert not found
    assert [why in m.reason for m in missed] == [True]


def by_a_linear(x: Tensor, v: Tensor) -> Tensor:
    return F.linear(x, LAYER).mT.softmax(-1) @ v


def by_a_linear_with_a_bias_and_padding(x: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
    return (F.linear(x, LAYER, bias).mT + pad[:, None]).softmax(-1) @ v


def by_images(x: Tensor, v: Tensor) -> Tensor:
    scores = F.conv2d(x.mT[..., None], LAYER[:, :, None, None]).flatten(2)
    return torch.einsum("...si,...id->...sd", scores.softmax(-1), v)


def by_sequences(x: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(x.mT, LAYER[:, :, None], bias).softmax(-1) @ v


def by_one_query(x: Tensor, v: Tensor) -> Tensor:
    return F.conv1d(x.mT, LAYER[:1, :, None]).softmax(-1) @ v


X, V = (3, 7, 8), (3, 7, 5)


@pytest.mark.parametrize(("fn", "shapes"), [
    (by_a_linear, (X, V)), (by_a_linear_with_a_bias_and_padding, (X, V, (4,), (3, 7))), (by_images, (X, V)),
    (by_sequences, (X, V, (4,))), (by_one_query, (X, V)),
])
def test_a_layer_holds_queries(fn: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    assert read(fn, *given(*shapes)).key == "m"


def of_neighbours(x: Tensor, v: Tensor) -> Tensor:
    return F.conv1d(x.mT, LAYER[:, :, None].expand(-1, -1, 3), padding=1).softmax(-1) @ v


def in_groups(x: Tensor, v: Tensor) -> Tensor:
    return F.conv1d(x.mT, LAYER[:, :4, None], groups=2).softmax(-1) @ v


def in_strides(x: Tensor, v: Tensor) -> Tensor:
    return F.conv1d(x.mT, LAYER[:, :, None], stride=2).softmax(-1) @ v[:, ::2]


def over_taps(x: Tensor, v: Tensor) -> Tensor:
    """As many outputs as values: what a token chooses among, by its own features, is no token."""
    return F.linear(x[..., :7], SQUARE).softmax(-1) @ v


def of_channels(x: Tensor, v: Tensor) -> Tensor:
    return F.conv1d(x.mT[:, :7], SQUARE[..., None]).mT.softmax(-1) @ v


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.conv2d((q @ k.mT).softmax(-1), LAYER[:, :4, None, None]) @ v


def mixed_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(q @ k.mT, LAYER[:, :4, None, None]).softmax(-1) @ v


TOKENS = ((2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 8))


@pytest.mark.parametrize(("fn", "shapes"), [
    (of_neighbours, (X, V)), (in_groups, (X, V)), (in_strides, (X, V)), (over_taps, (X, V)), (of_channels, (X, V)),
    (mixed, TOKENS), (mixed_before, TOKENS),
])
def test_a_layer_that_holds_none_is_left_alone(fn: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    found, _ = detect.find(graph_of(fn, given(*shapes)))
    assert not found


def test_experts_are_no_tokens() -> None:
    """A convolution's taps of size 1 are no place for a batch."""
    gate, experts = nn.Conv2d(8, 4, 1), torch.randn(4, 20)

    def chosen(x: Tensor) -> Tensor:
        pooled: Any = gate(x.mean((2, 3), keepdim=True)).flatten(1)
        return pooled.softmax(-1) @ experts  # type: ignore[no-any-return]

    assert detect.find(graph_of(chosen, [torch.randn(3, 8, 5, 5)]))[0] == []


def linear_with_a_sum_a_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As LoFTR writes it, and Performer."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state, z = torch.einsum("bhmd,bhme->bhde", k, v), 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(-2)) + 1e-6)
    return torch.einsum("bhnd,bhde,bhn->bhne", q, state, z)


def scaled_scores(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return torch.einsum("h,bhid,bhjd->bhij", t, q, k).softmax(-1) @ v


def gated_rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd,bhi->bhid", (q @ k.mT).softmax(-1), v, g)


def gated_twice(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bhij,h,bhjd,bi->bhid", (q @ k.mT).softmax(-1), g[0, :, 0], v, g[:, 0])


def gated_values(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A factor of rows and of the values' own rank: no weight of a key."""
    return torch.einsum("bhij,bhjd,bhid->bhid", (q @ k.mT).softmax(-1), v, g)


def weighed_keys(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """A factor of the reduced letter: three operands are reduced together."""
    return torch.einsum("bhij,bhjd,j->bhid", (q @ k.mT).softmax(-1), v, w)


def spread(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """A letter of the output that no operand of the product has."""
    return torch.einsum("bhij,bhjd,g->bhidg", (q @ k.mT).softmax(-1), v, w)


@pytest.mark.parametrize(("fn", "more"), [
    (linear_with_a_sum_a_row, ()), (scaled_scores, ((4,),)), (gated_rows, ((2, 4, 7),)), (gated_twice, ((2, 4, 7),)),
])
def test_operands_without_a_reduced_letter_are_factors(fn: Callable[..., Tensor], more: Sequence[tuple[int, ...]]) -> None:
    args = given(*TOKENS, *more)
    gm = graph_of(fn, args)
    found, missed = detect.find(gm)
    assert [error_of(f, values_of(gm, args)) < 1e-12 for f in found] == [True], [m.reason for m in missed]


def projected(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The heads' outputs are projected and added up by the same einsum."""
    return torch.einsum("bhij,bhjd,hdo->bio", (q @ k.mT).softmax(-1), v, w)


def between(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """A matrix between queries and keys."""
    out: Tensor = torch.einsum("bhid,hde,bhje->bhij", q, w, k).softmax(-1) @ v
    return out


@pytest.mark.parametrize(("fn", "more"), [
    (weighed_keys, (7,)), (spread, (3,)), (gated_values, (2, 4, 7, 8)), (projected, (4, 8, 5)), (between, (4, 8, 8)),
])
def test_three_operands_are_products_of_two_one_after_the_other(fn: Callable[..., Tensor], more: tuple[int, ...]) -> None:
    args = given(*TOKENS, more)
    gm = graph_of(fn, args)
    want = gm(*args)
    found, _ = detect.find(gm)
    assert found
    assert all(error_of(f, values_of(gm, args)) < 1e-12 for f in found)
    # spelled out, the graph computes what torch's own einsum does
    gm.recompile()
    assert torch.equal(gm(*args), want)


def rows_across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (torch.linalg.vecdot(q[..., :, None, :], k[..., None, :, :]) * 0.3).softmax(-1) @ v
    return out


def rows_of_another_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (torch.linalg.vecdot(q.mT[..., :, None], k.mT[..., None, :], dim=-3) * 0.3).softmax(-1) @ v
    return out


def inner_of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.inner(q[0, 0], k[0, 0]) * 0.3).softmax(-1) @ v[0, 0]


def linear_of_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear((F.linear(q[0, 0], k[0, 0].tanh()) * 0.3).softmax(-1), v[0, 0].t())


def cosines(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (7 * F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)).softmax(-1) @ v
    return out


@pytest.mark.parametrize(
    "fn", [rows_across, rows_of_another_dimension, inner_of_one_head, linear_of_tokens, cosines]
)
def test_products_of_rows_are_products(fn: Callable[..., Tensor]) -> None:
    view = read(fn, *given(*MANY))
    assert (view.query, view.key) == ("p", "m")


def test_the_cosine_of_a_token_that_is_zero_is_that_of_torch() -> None:
    q, k, v = given(*MANY)
    q[0, 0, 0], k[0, 0, 1] = 0.0, 1e-9
    read(cosines, q, k, v)


def test_cosines_with_gradients_are_named() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cosines(q, k, v)

    plan = reattend.plan(Model(), tuple(x.requires_grad_() for x in given(*MANY)))
    assert not plan.sites
    assert ["gradients of its own" in m.reason for m in plan.misses] == [True]


def test_rows_beside_rows_are_no_product() -> None:
    def gates(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate: Tensor = torch.linalg.vecdot(q, k).softmax(-1)[..., None] * v
        return gate + F.cosine_similarity(q, k, dim=-1)[..., None]

    found, missed = detect.find(graph_of(gates, given(*TOKENS)))
    assert not found
    assert not missed


@pytest.mark.parametrize("equation", [
    "bhij,bhjd,hdo->bio", "bij,bjk,bkl,blm->bim", "...ij,...jk,jl->...il", "ij,jk,kl", "ab,bc,a,cd->ad", "abc,acd,ade,bd->abe",
])
def test_an_einsum_is_spelled_as_torch_computes_it(equation: str) -> None:
    left = equation.partition("->")[0].split(",")
    sizes = {c: 2 + k for k, c in enumerate(sorted(set(equation) - set(",->.")))}
    args = given(*(tuple([2] * ("..." in s) + [sizes[c] for c in s.replace("...", "")]) for s in left))
    gm = graph_of(lambda *x: torch.einsum(equation, *x), args)
    want = gm(*args)
    spell(gm.graph)
    gm.recompile()
    assert str(gm.graph).count("einsum.default") == len(args) - 1
    assert torch.equal(gm(*args), want)


def test_a_bug_of_ours_leaves_an_einsum_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter((functional.call, None))

    def broken(*args: Any, **kwargs: Any) -> Any:
        first = next(made)
        if first is None:
            raise KeyError("somewhere")
        return first(*args, **kwargs)

    args = given(*TOKENS, (4, 8, 5))
    gm = graph_of(projected, args)
    want, before = gm(*args), len(gm.graph.nodes)
    monkeypatch.setattr("reattend.rewriter.find.spelled.call", broken)
    with pytest.warns(UserWarning, match="KeyError"):
        spell(gm.graph)
    gm.recompile()
    assert len(gm.graph.nodes) == before
    assert torch.equal(gm(*args), want)
