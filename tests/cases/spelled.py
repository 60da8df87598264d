"""Spellings of real models, as small models beside those of `field`: joined keys, positions of a plane, edited scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases.field import INF, Fn, Inputs, case, causal, tensors

# --- joined keys: several key sets under one softmax ------------------------------------------------------------------


def two_sets(f: Callable[..., Tensor], dtype: torch.dtype, batch: int = 2, keys: int = 300) -> tuple[nn.Module, Inputs]:
    return Fn(f), tensors(*3 * [(batch, 4, keys, 32)], *2 * [(batch, 4, 17, 32)], dtype=dtype)


def weights(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    return (torch.cat([causal(q @ k.mT), q @ x.mT], -1) * 0.2).softmax(-1)


def values_joined(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return weights(q, k, x) @ torch.cat([v, y], -2)


def weights_split(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    p, n = weights(q, k, x), k.shape[-2]
    return p[..., n:] @ y + p[..., :n] @ v


@case("joined keys", gradients=True)
def values_joined_with_gradients() -> tuple[nn.Module, Inputs]:
    return two_sets(values_joined, torch.float32)


@case("joined keys", gradients=True)
def weights_split_with_gradients() -> tuple[nn.Module, Inputs]:
    return two_sets(weights_split, torch.float32, 1)


@case("joined keys")
def values_joined_bf16() -> tuple[nn.Module, Inputs]:
    return two_sets(values_joined, torch.bfloat16, 1)


@case("joined keys")
def weights_split_fp16() -> tuple[nn.Module, Inputs]:
    return two_sets(weights_split, torch.float16)


@case("joined keys")
def heads_in_groups_over_two_key_sets_bf16() -> tuple[nn.Module, Inputs]:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        k, v, x, y = (t[:, :, None].expand(-1, -1, 4, -1, -1).flatten(1, 2) for t in (k, v, x, y))
        return weights_split(q, k, v, x, y)

    return Fn(f), tensors((2, 8, 128, 32), *2 * [(2, 2, 128, 32)], *2 * [(2, 2, 9, 32)], dtype=torch.bfloat16)


@case("joined keys")
def tokens_first_and_a_key_for_all_heads() -> tuple[nn.Module, Inputs]:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (torch.cat([q @ x.mT, q @ k.mT], -1) * 0.2).softmax(-1) @ torch.cat([y.expand(2, 4, -1, -1), v], -2)

    return Fn(f), tensors(*3 * [(2, 200, 4, 32)], *2 * [(2, 1, 5, 32)])


@case("joined keys", kernel=False)
def a_window_beside_global_keys_fp16() -> tuple[nn.Module, Inputs]:
    """A window that is cut by views, and keys that all queries see."""

    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, 16)) for t in (q, k, v))  # type: ignore[no-untyped-call]
        s = torch.cat([torch.einsum("bhnid,bhjd->bhnij", q, x), q @ k.mT], -1)
        p, n = (s * 0.2).softmax(-1), x.shape[-2]
        return (p[..., n:] @ v + torch.einsum("bhnij,bhjd->bhnid", p[..., :n], y)).flatten(2, 3)

    return Fn(f), tensors(*3 * [(2, 4, 256, 32)], *2 * [(2, 4, 8, 32)], dtype=torch.float16)


@case("joined keys", gradients=True)
def two_layers_of_joined_keys() -> tuple[nn.Module, Inputs]:
    """Layers alike, which are found as twins; a bias_k and a bias_v that all of a batch share."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.extra = nn.Linear(32, 96), nn.Parameter(torch.randn(2, 4, 1, 8))

        def forward(self, z: Tensor) -> Any:
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(z).chunk(3, -1))
            p = (torch.cat([q @ k.mT, q @ self.extra[0].mT], -1) * 0.35).softmax(-1)
            return z + (p[..., :-1] @ v + p[..., -1:] * self.extra[1]).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()), tensors((2, 400, 32))


# --- positions of a plane -----------------------------------------------------------------------------------------------


def by_row_and_column(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    h, w = rows.shape[0], columns.shape[0]
    r = q.view(-1, h, w, q.shape[-1])
    a = (q @ k.mT * 0.2).view(-1, h, w, h, w) + torch.einsum("bhwc,hkc->bhwk", r, rows)[..., None]
    a = a + torch.einsum("bhwc,wkc->bhwk", r, columns)[..., None, :]
    return a.view(-1, h * w, h * w).softmax(-1) @ v


def plane(dtype: torch.dtype, batch: int) -> tuple[nn.Module, Inputs]:
    return Fn(by_row_and_column), tensors(*3 * [(batch, 12 * 8, 16)], (12, 12, 16), (8, 8, 16), dtype=dtype)


@case("planes", kernel=False, gradients=True)
def positions_of_a_plane_with_gradients() -> tuple[nn.Module, Inputs]:
    return plane(torch.float32, 4)


@case("planes", kernel=False)
def positions_of_a_plane_bf16() -> tuple[nn.Module, Inputs]:
    return plane(torch.bfloat16, 1)


@case("planes", kernel=False)
def positions_of_a_plane_fp16() -> tuple[nn.Module, Inputs]:
    return plane(torch.float16, 3)


# --- edits: scores written by slices and masks ----------------------------------------------------------------------------


def edited(edit: Callable[[Tensor], object], dtype: torch.dtype, batch: int) -> tuple[nn.Module, Inputs]:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = q @ k.mT * 0.2
        edit(a)
        weights: Tensor = a.softmax(-1)
        return weights @ v

    return Fn(f), tensors(*3 * [(batch, 4, 300, 32)], dtype=dtype)


def without_last_keys(a: Tensor) -> None:
    a[..., -45:] = -INF


def a_block_raised(a: Tensor) -> None:
    a[:, :, :100, :100] += 1.0


@case("edits", gradients=True)
def last_keys_hidden_by_a_slice() -> tuple[nn.Module, Inputs]:
    return edited(without_last_keys, torch.float32, 2)


@case("edits")
def last_keys_hidden_by_a_slice_bf16() -> tuple[nn.Module, Inputs]:
    return edited(without_last_keys, torch.bfloat16, 1)


@case("edits", gradients=True)
def a_block_of_scores_raised() -> tuple[nn.Module, Inputs]:
    return edited(a_block_raised, torch.float32, 1)


@case("edits")
def a_block_of_scores_raised_fp16() -> tuple[nn.Module, Inputs]:
    return edited(a_block_raised, torch.float16, 2)


@case("edits", kernel=False, gradients=True)
def scores_that_are_read_before_they_are_edited() -> tuple[nn.Module, Inputs]:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = q @ k.mT * 0.2
        before = a.mean(-1, keepdim=True)
        a[..., :30] = -INF
        return a.softmax(-1) @ v + before

    return Fn(f), tensors(*3 * [(2, 4, 200, 32)])
