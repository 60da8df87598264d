"""What a model gives lies apart, or in one memory, as it does without us: whoever gets it may write to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend

pytestmark = pytest.mark.thin(6)

B, N, D, HEADS = 2, 128, 64, 4
Given = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Attention(nn.Module):
    """Self-attention; `end` makes what is given of the result, which is [b, n, h, f]."""

    heads = HEADS

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.end(((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2))


class OneHead(Attention):
    """A single head: joining it is a view in the model's code as well."""

    heads = 1


class Broken(Attention):
    """The graph ends where its results are written."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2)
        y, z = self.end(o)
        torch._dynamo.graph_break()
        y.add_(1)
        return y, z


def joined(o: Tensor) -> Tensor:
    return o.reshape(o.shape[0], o.shape[1], D)


def itself(o: Tensor) -> Tensor:
    return o


def back(o: Tensor) -> Tensor:
    return o.transpose(1, 2)


def reshape_and_contiguous(o: Tensor) -> Given:
    return joined(o), o.contiguous()


def two_reshapes(o: Tensor) -> Given:
    return joined(o), o.reshape(o.shape[0], -1)


def two_contiguous(o: Tensor) -> Given:
    return o.contiguous(), o.contiguous()


def flatten_and_chunk(o: Tensor) -> Given:
    return o.flatten(2), *o.reshape(o.shape[0], -1, D).chunk(2, -1)


def chunks_of_one(o: Tensor) -> Given:
    whole = o.flatten(2)
    return whole, *whole.chunk(2, -1)


def copies_of_a_copy(o: Tensor) -> Given:
    whole = o.contiguous()
    return whole, whole.reshape(o.shape[0], -1), o.reshape(-1, D)


def heads_joined_twice(o: Tensor) -> Given:
    """Views as the result lies in the model's code, and copies where heads lie last."""
    inner = o.transpose(1, 2)
    return inner.reshape(B * o.shape[2], N, -1), inner.reshape(B * N * o.shape[2], -1)


FORMS = [
    reshape_and_contiguous, two_reshapes, two_contiguous, flatten_and_chunk, chunks_of_one, copies_of_a_copy,
    heads_joined_twice,
]


def mode(trained: bool) -> AbstractContextManager[object]:
    return torch.enable_grad() if trained else torch.no_grad()


def both(model: nn.Module, kernel: str, trained: bool) -> tuple[nn.Module, nn.Module]:
    """The optimised model, which has run once with the kernel where it can, and its original."""
    ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(allow=(kernel,), deny=("original",)))
    ours(given(next(model.parameters()).dtype))
    # our kernels for the CPU have no gradient
    assert kernel in reattend.report(ours).kernels or (kernel == "reattend" and trained)
    return ours, model


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def made(kind: type[Attention], end: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return kind(end).to(dtype)


def shared(outs: Given) -> list[list[bool]]:
    return [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in outs] for b in outs]


@pytest.mark.parametrize("kernel", ["sdpa", "reattend"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_what_is_written_after_the_model_is_seen_where_it_was(form: Callable[[Tensor], Given], trained: bool, kernel: str) -> None:
    x = given()
    with mode(trained):
        ours, own = (m(x) for m in both(made(Attention, form), kernel, trained))
        assert shared(ours) == shared(own)
    with torch.no_grad():
        for outs in (ours, own):
            outs[0].detach().add_(1)
        for a, b in zip(ours, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "reattend"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", [Attention, OneHead])
@pytest.mark.parametrize("end", [joined, itself, back, torch.Tensor.contiguous], ids=lambda f: f.__name__)
def test_a_residual_may_be_added_where_the_result_lies(
    end: Callable[[Tensor], Tensor], kind: type[Attention], trained: bool, dtype: torch.dtype, kernel: str
) -> None:
    if kind is OneHead and kernel == "reattend":
        pytest.skip("a single head has no kernel of ours in bf16, and none of ours has a gradient here")
    x, found = given(dtype), []
    with mode(trained):
        for m in both(made(kind, end, dtype), kernel, trained):
            m.zero_grad()
            y = m(x)
            y += x.reshape(y.shape)
            if trained:
                y.float().pow(2).sum().backward()
            found.append([y.detach(), *(p.grad for p in m.parameters() if trained)])
    for ours, own in zip(*found, strict=True):
        wide = 1e-4 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(ours, own, rtol=wide, atol=wide * float(own.abs().max()))


@pytest.mark.parametrize("kernel", ["sdpa", "reattend"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("form", [reshape_and_contiguous, two_reshapes, two_contiguous], ids=lambda f: f.__name__)
def test_a_write_behind_a_graph_break(form: Callable[[Tensor], Given], trained: bool, kernel: str) -> None:
    with mode(trained):
        ours, own = (m(given()) for m in both(made(Broken, form), kernel, trained))
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_written_result_can_be_differentiated() -> None:
    def penalty(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x)
        y += x
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    ours, own = (penalty(m, given().requires_grad_()) for m in both(made(Attention, joined), "sdpa", True))
    torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-4 * float(own.abs().max()))
