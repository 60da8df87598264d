"""Gradients that a backward of the model's own or a hook changes are the original's, and the report says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.compiler import nested_compile_region
from torch.utils.checkpoint import checkpoint

import reattend
from tests.tiers import few

pytestmark = pytest.mark.thin(3)

REASON = "of its own inside it"


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Rounded(torch.autograd.Function):
    """Straight through: the gradient of a step function is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Scaled(torch.autograd.Function):
    """Saved tensors, two inputs, and a result without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        sign = x.sign()
        ctx.mark_non_differentiable(sign)
        return x * y, sign

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 3 * g * y, 5 * g * x


def apply(f: type[torch.autograd.Function], *args: Tensor) -> Any:
    return f.apply(*args)  # type: ignore[no-untyped-call]


def hooked(x: Tensor) -> Tensor:
    x = x * 1
    if x.requires_grad:
        x.register_hook(lambda g: g.clamp(-1e-3, 1e-3))  # type: ignore[no-untyped-call]
    return x


def doubled_inside(x: Tensor) -> Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)  # type: ignore[no-untyped-call]
    return y + 1


whole = torch._dynamo.allow_in_graph(lambda x: apply(Reverse, x * 2) + 1)  # type: ignore[no-untyped-call]
whole_hook = torch._dynamo.allow_in_graph(doubled_inside)  # type: ignore[no-untyped-call]
whole_sign = torch._dynamo.allow_in_graph(lambda x: apply(Scaled, x, x)[1])  # type: ignore[no-untyped-call]


@torch.library.custom_op("reattend_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x * 0.5


halved.register_fake(torch.empty_like)
halved.register_autograd(lambda ctx, g: 7 * g)

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse": lambda x: apply(Reverse, x),
    "straight through": lambda x: apply(Rounded, x * 2),
    "saved": lambda x: torch.add(*apply(Scaled, x, x + 1)),
    "hook": hooked,
    "checkpointed": lambda x: checkpoint(lambda z: apply(Reverse, z) * 2, x, use_reentrant=False),
    "checkpointed hook": lambda x: checkpoint(hooked, x, use_reentrant=False),
    "branch": lambda x: torch.cond(x.sum() > -1e9, lambda z: apply(Reverse, z) * 2, lambda z: z * 3, (x,)),
    "compiled region": nested_compile_region(lambda x: apply(Reverse, x).sin()),
    "left whole": lambda x: whole(x),
    "a hook in what is left whole": lambda x: whole_hook(x),
    "no gradient from what is left whole": lambda x: x + whole_sign(x),
}


class Model(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor], attends: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(32, 32), nn.Linear(32, 32)
        self.step, self.attends = step, attends

    def forward(self, x: Tensor) -> Tensor:
        y = self.step(self.f(x))
        if not self.attends:
            made: Tensor = self.g(y)
            return made
        out: Tensor = self.g((y @ y.mT).softmax(-1) @ y)
        return out


def both(step: Callable[[Tensor], Tensor], attends: bool, allow: tuple[str, ...] = ("sdpa", "original")) -> tuple[Model, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(step, attends)
    return model, reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(allow=allow))


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of the input and of every weight."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    assert all(g is not None for g in grads)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("attends", few([True, False], True))
@pytest.mark.parametrize("name", STEPS)
def test_gradients_are_the_originals(name: str, attends: bool) -> None:
    model, ours = both(STEPS[name], attends)
    x = torch.randn(2, 16, 32)
    for a, b in zip(trained(ours, x), trained(model, x), strict=True):
        torch.testing.assert_close(a, b)
    assert any(REASON in p.error for p in reattend.report(ours).pieces)


@pytest.mark.parametrize("name", STEPS)
def test_without_gradients_the_attention_is_rewritten(name: str) -> None:
    model, ours = both(STEPS[name], True, allow=("sdpa",))
    x = torch.randn(2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))
    report = reattend.report(ours)
    assert [p.error for p in report.pieces] == [""]
    assert [s.kernel for s in report.sites] == ["sdpa"]


def test_a_backward_that_no_gradient_reaches_is_no_reason() -> None:
    class Frozen(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = self.g(x)
            out: Tensor = (y @ y.mT).softmax(-1) @ y + apply(Rounded, x)
            return out

    torch._dynamo.reset()
    ours = reattend.optimize(Frozen(lambda x: x, True))
    ours(torch.randn(2, 16, 32)).sum().backward()
    assert [p.error for p in reattend.report(ours).pieces] == [""]


def test_an_operator_with_a_backward_in_python_is_carried() -> None:
    """The graph holds it, and its backward with it."""
    model, ours = both(lambda x: halved(x), True)
    x = torch.randn(2, 16, 32)
    for a, b in zip(trained(ours, x), trained(model, x), strict=True):
        torch.testing.assert_close(a, b)
    assert [p.error for p in reattend.report(ours).pieces] == [""]


def test_a_checkpoint_and_detached_values_are_no_reason() -> None:
    def step(x: Tensor) -> Tensor:
        y = checkpoint(torch.sin, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y + (y.round() - y).detach()

    model, ours = both(step, True)
    x = torch.randn(2, 16, 32)
    for a, b in zip(trained(ours, x), trained(model, x), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)
    assert [p.error for p in reattend.report(ours).pieces] == [""]


def test_a_backward_before_the_graph_is_no_reason() -> None:
    """What comes from outside, a view of it among them, is differentiated outside."""
    torch._dynamo.reset()
    model = Model(lambda x: x * 2, True)
    ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(allow=("sdpa", "original")))
    got, want = (
        trained(nn.Sequential(before, m), torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)))
        for before, m in ((Before(), ours), (Before(), model))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert [p.error for p in reattend.report(ours).pieces] == [""]


class Before(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = hooked(apply(Reverse, x))[:, 1:]
        return made
