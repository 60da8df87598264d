"""Derivatives beyond the first: a candidate has every one that the model's code has, or steps aside when it is asked for."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reattend
from reattend.rewriter.splice.derivatives import _Way
from tests.cases.field import Fn, attend, causal, tensors
from tests.tiers import few

pytestmark = pytest.mark.thin(3)

SDPA = reattend.Policy(allow=("sdpa",))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def masked(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return causal(q @ k.mT * 0.25).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1))


def one_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of one tensor, which the result is made of as well."""
    return attend(q, k + v, v) + k


def leaves(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors(*3 * [shape], dtype=dtype)]


def penalty(f: Callable[..., Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the squared gradients: what a gradient penalty, or a Hessian times a vector, asks for."""
    first = torch.autograd.grad(f(*x).pow(2).sum(), x, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in first), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("f", [attend, masked, grouped, one_tensor], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", few([1, 2], 2))
def test_second_derivatives_are_the_originals(f: Callable[..., Any], batch: int) -> None:
    x = leaves(batch, 4, 256, 16)
    model = reattend.optimize(Fn(f), policy=SDPA)
    for ours, theirs in zip(penalty(model, x), penalty(f, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))
    assert reattend.report(model).kernels == {"sdpa": 1}


def test_second_derivatives_in_bf16() -> None:
    x = leaves(1, 4, 256, 32, dtype=torch.bfloat16)
    exact = penalty(attend, [t.detach().double().requires_grad_() for t in x])
    own, ours = penalty(attend, x), penalty(reattend.optimize(Fn(attend), policy=SDPA), x)
    for a, b, e in zip(ours, own, exact, strict=True):
        assert (a - e).norm() <= 2 * (b - e).norm()


def test_first_derivatives_are_the_kernels_and_can_be_asked_for_again() -> None:
    x = leaves(1, 4, 256, 16)
    model = reattend.optimize(Fn(attend), policy=SDPA)
    out = model(*x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    for ours, again, theirs in zip(first, torch.autograd.grad(out, x), torch.autograd.grad(attend(*x).sum(), x), strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, theirs)


def test_a_third_derivative() -> None:
    def third(f: Callable[..., Tensor], x: list[Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(f(*x).pow(2).sum(), x[0], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x[1], create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), x[2])[0]

    x = leaves(1, 2, 64, 16)
    ours, theirs = third(reattend.optimize(Fn(attend), policy=SDPA), x), third(attend, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_second_derivatives_through_a_checkpoint_inside_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(self.inner(q), k, v)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return checkpoint(self.block, q, k, v, use_reentrant=False)

    torch.manual_seed(0)
    model, x = Model(), leaves(1, 4, 128, 16)
    own = torch.autograd.grad(model(*x).pow(2).sum(), x)
    for ours, theirs in zip(torch.autograd.grad(reattend.optimize(copy.deepcopy(model), policy=SDPA)(*x).pow(2).sum(), x), own):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("f", few([attend, masked], masked), ids=lambda f: f.__name__)
def test_forward_derivatives_are_not_lost(f: Callable[..., Any]) -> None:
    q, k, v = tensors(*3 * [(1, 4, 512, 32)])
    model = reattend.optimize(Fn(f))

    def tangent(g: Callable[..., Tensor]) -> Any:
        with torch.no_grad(), fwd.dual_level():
            out = fwd.unpack_dual(g(fwd.make_dual(q, torch.ones_like(q)), k, fwd.make_dual(v, k))).tangent  # type: ignore[no-untyped-call]
        assert out is not None
        return out

    torch.testing.assert_close(tangent(model), tangent(f))
    with torch.no_grad():
        torch.testing.assert_close(model(q, k, v), f(q, k, v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tangent(model), tangent(f))


def test_two_threads_go_back_through_one_graph() -> None:
    """Each meets the other in the middle, and takes its own gradients."""
    x = leaves(1, 4, 256, 16)
    model = reattend.optimize(Fn(attend), policy=SDPA)
    out = model(*x)
    flows = [torch.randn(out.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    wanted = [torch.autograd.grad(attend(*x), x, f) for f in flows]
    meet = threading.Barrier(2)
    found: list[tuple[Tensor, ...]] = [(), ()]

    def back(i: int) -> None:
        for _ in range(8):
            meet.wait()
            found[i] = torch.autograd.grad(out, x, flows[i], create_graph=True, retain_graph=True)
            for ours, theirs in zip(found[i], wanted[i], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    errors: list[BaseException] = []

    def caught(i: int) -> None:
        try:
            back(i)
        except BaseException as error:
            errors.append(error)
            meet.abort()

    threads = [threading.Thread(target=caught, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]


def test_second_derivatives_of_one_input_keep_nothing_of_the_others() -> None:
    x = leaves(1, 2, 64, 16)
    model = reattend.optimize(Fn(attend), policy=SDPA)
    out = model(*x)
    torch.autograd.grad(out.sum(), x[0], create_graph=True, retain_graph=True)
    assert not any(w.gradients for w in gc.get_objects() if type(w) is _Way)
    (again,) = torch.autograd.grad(out.sum(), x[1], create_graph=True)
    torch.testing.assert_close(again, torch.autograd.grad(attend(*x).sum(), x[1])[0], rtol=1e-4, atol=1e-5)


def test_what_needs_no_gradient_lives_no_longer_than_the_backward() -> None:
    q, first, v = leaves(1, 2, 64, 16)
    model = reattend.optimize(Fn(attend), policy=SDPA)
    model(q, first.detach(), v)
    k = first.detach().clone()
    out = model(q, k, v)
    gone = weakref.ref(k)
    out.sum().backward()
    del k
    gc.collect()
    assert gone() is None
    assert out.shape == q.shape
