"""Keys from several places under one row are one attention over joined keys, however scores and values are put together.

    softmax(cat(q·kᵀ, q·xᵀ)) · cat(v, y)        p = softmax(…);  p[…, :M] · v + p[…, M:] · y
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reattend.patterns.masks.split import split
from reattend.rewriter.find import detect

from .helpers import error_of, graph_of, read, values_of

B, H, N, M, R, D = 2, 4, 12, 10, 3, 8


def tokens(*lengths: int, heads: int = H, batch: int = B) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, heads, n, D, dtype=torch.float64) for n in lengths]


def joined(q: Tensor, *keys: Tensor) -> Tensor:
    return torch.cat([q @ k.mT * 0.3 for k in keys], -1).softmax(-1)


def two(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (torch.cat([q @ k.mT, q @ x.mT], -1) * 0.3).softmax(-1) @ torch.cat([v, y], -2)


def split_values(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    p = joined(q, k, x)
    n = k.shape[-2]
    return p[..., :n] @ v + p[..., n:] @ y


def values_in_another_order(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    p = joined(q, x, k)
    n = x.shape[-2]
    return p[..., n:] @ v + p[..., :n] @ y


def added_in_place(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    p = joined(q, k, x)
    out = p[..., : k.shape[-2]] @ v
    out += p[..., k.shape[-2] :] @ y
    return out


def by_split(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    first, second = torch.split(joined(q, k, x), [k.shape[-2], x.shape[-2]], -1)
    return first @ v + second @ y


def in_a_flat_batch(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    q, k, v, x, y = (t.flatten(0, 1) for t in (q, k, v, x, y))
    p = torch.cat([torch.bmm(q, k.mT), torch.bmm(q, x.mT)], -1).softmax(-1).to(q.dtype)
    return torch.bmm(p[..., : k.shape[-2]], v) + torch.bmm(p[..., k.shape[-2] :], y)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    s = [torch.einsum("bhid,bhjd->bhij", q, t) for t in (k, x)]
    p = torch.cat(s, 3).softmax(3)
    n = k.shape[-2]
    return torch.einsum("bhij,bhjd->bhid", p[..., :n], v) + torch.einsum("bhij,bhjd->bhid", p[..., n:], y)


SPELLINGS = (two, split_values, values_in_another_order, added_in_place, by_split, in_a_flat_batch, by_einsum)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fn", SPELLINGS)
def test_two_key_sets(fn: Callable[..., Tensor], batch: int) -> None:
    view = read(fn, *tokens(N, M, M, R, R, batch=batch))
    assert view.cascade.rank[view.key].size == M + R
    assert len(view.products) == 1


@pytest.mark.parametrize("lengths", [(1, M), (M, 1), (R, M, 1), (M, M, M), (1, R, M, R)])
@pytest.mark.parametrize("late", [False, True])
def test_key_sets_of_any_number_and_size(lengths: tuple[int, ...], late: bool) -> None:
    """A single key among them has no coordinate of its own, and its product with the weights is an outer one."""

    def f(q: Tensor, *kv: Tensor) -> Tensor:
        keys, values = kv[: len(lengths)], kv[len(lengths) :]
        p = joined(q, *keys)
        if not late:
            return p @ torch.cat(values, -2)
        parts = torch.split(p, list(lengths), -1)
        products = [w * v if v.shape[-2] == 1 else w @ v for w, v in zip(parts, values)]
        out = products[0]
        for x in products[1:]:
            out = out + x
        return out

    view = read(f, *tokens(N, *lengths, *lengths))
    assert view.cascade.rank[view.key].size == sum(lengths)
    assert len(view.products) == 1


def test_joined_masks_stay_a_predicate() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        i = torch.arange(N)
        near = (q @ k.mT).masked_fill(i[None] > i[:, None], -math.inf)
        far = (q @ x.mT).masked_fill(torch.arange(R) % 2 != 0, -math.inf)
        return torch.cat([near, far], -1).softmax(-1) @ torch.cat([v, y], -2)

    view = read(f, *tokens(N, N, N, R, R))
    mask = split(view.score, view.key)
    assert mask.fills == (-math.inf,)
    assert not [x for x in mask.keep.ranks if x not in (view.query, view.key)]


def test_columns_without_a_key_beside_two_key_sets() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor, sink: Tensor) -> Tensor:
        s = torch.cat([q @ x.mT, q @ k.mT, sink.view(1, H, 1, 1).expand(B, H, N, 1)], -1)
        p = s.softmax(-1)
        return p[..., :R] @ y + p[..., R:-1] @ v

    view = read(f, *tokens(N, M, M, R, R), torch.randn(H, dtype=torch.float64))
    assert view.cascade.rank[view.key].size == M + R
    assert len(view.products) == 1


def test_queries_of_their_own_for_each_key_set() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return torch.cat([q @ k.mT, r @ x.mT], -1).softmax(-1) @ torch.cat([v, y], -2)

    view = read(f, *tokens(N, M, M, R, R, N))
    (product,) = view.products
    assert view.cascade.rank[product.over[0]].size == 2 * D


def test_words_and_entities() -> None:
    """Both sides from two places, each pair with queries of its own; the keys are slices of one tensor."""

    def f(k: Tensor, v: Tensor, *q: Tensor) -> Tensor:
        words, entities = k[:, :, :M], k[:, :, M:]
        top = torch.cat([q[0] @ words.mT, q[1] @ entities.mT], 3)
        below = torch.cat([q[2] @ words.mT, q[3] @ entities.mT], 3)
        return (torch.cat([top, below], 2) * 0.25).softmax(-1) @ v

    view = read(f, *tokens(M + R, M + R, M, M, R, R))
    assert len(view.products) == 1
    keyed = {x.attr for x in view.cascade.einsums[0].reads if view.key in x.ranks}
    assert len(keyed) == 1


def test_queries_from_two_places() -> None:
    def f(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.cat([q @ k.mT, r @ k.mT], -2) * 0.3).softmax(-1) @ v

    view = read(f, *tokens(N, R, M, M))
    assert view.cascade.rank[view.query].size == N + R
    assert len(view.products) == 1


def test_bands_of_a_block_sparse_attention() -> None:
    """Blocks of queries over the first keys, three blocks around, and the last keys."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.view(B, H, 6, 2, D) for t in (q, k, v))
        band, bands = (torch.cat([t[:, :, :-2], t[:, :, 1:-1], t[:, :, 2:]], 3) for t in (k, v))
        s = [torch.einsum("bhlqd,bhkd->bhlqk", q[:, :, 1:-1], k[:, :, 0]), q[:, :, 1:-1] @ band.mT]
        s.append(torch.einsum("bhlqd,bhkd->bhlqk", q[:, :, 1:-1], k[:, :, -1]))
        p = torch.cat(s, -1).softmax(-1)
        out = p[..., 2:8] @ bands
        out = out + torch.einsum("bhlqk,bhkd->bhlqd", p[..., :2], v[:, :, 0])
        return out + torch.einsum("bhlqk,bhkd->bhlqd", p[..., 8:], v[:, :, -1])

    view = read(f, *tokens(N, N, N))
    assert view.cascade.rank[view.key].size == 10
    assert len(view.products) == 1


# --- what is no join --------------------------------------------------------------------------------------------------


def test_two_rows_that_are_added_are_two_attentions() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + (q @ x.mT).softmax(-1) @ y

    found, _ = detect.find(graph_of(f, tokens(N, M, M, R, R)))
    assert len(found) == 2


def test_stretches_that_overlap_are_no_join() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        p = joined(q, k, x)
        return p[..., :M] @ v + p[..., R : M + R] @ y

    args = tokens(N, M, M, R, M)
    gm = graph_of(f, args)
    found, _ = detect.find(gm)
    assert all(error_of(x, values_of(gm, args)) <= 1e-12 for x in found)
    assert all(x.output.name != "add" for x in found)


def test_weights_scaled_before_the_sum_are_no_join() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        p = joined(q, k, x)
        return p[..., :M] @ v + (p[..., M:] * 2) @ y

    args = tokens(N, M, M, R, R)
    gm = graph_of(f, args)
    found, _ = detect.find(gm)
    assert all(error_of(x, values_of(gm, args)) <= 1e-12 for x in found)
    assert all(x.output.name != "add" for x in found)


def test_values_written_between_the_products() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        p = joined(q, k, x)
        y = y.clone()
        out = p[..., :M] @ v
        y[:, :, 0] = out.mean()
        return out + p[..., M:] @ y

    args = tokens(N, M, M, R, R)
    gm = graph_of(f, args)
    found, _ = detect.find(gm)
    assert all(error_of(x, values_of(gm, args)) <= 1e-12 for x in found)


@pytest.mark.parametrize("queries", [1, N])
def test_one_query_over_a_cache_and_its_own_key(queries: int) -> None:
    """Decoding: neither the query nor the new key has a coordinate."""

    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return joined(q, k, x) @ torch.cat([v, y], -2)

    view = read(f, *tokens(queries, M, M, 1, 1))
    assert view.cascade.rank[view.key].size == M + 1


def test_a_mask_of_one_key_set_beside_a_column_without_a_key() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        near = (q @ k.mT).masked_fill(torch.arange(M) > torch.arange(N)[:, None], -1e4)
        p = torch.cat([near, q @ x.mT, torch.zeros(B, H, N, 1, dtype=q.dtype)], -1).softmax(-1)
        return p[..., :M] @ v + p[..., M:-1] @ y

    view = read(f, *tokens(N, M, M, R, R))
    assert view.cascade.rank[view.key].size == M + R
