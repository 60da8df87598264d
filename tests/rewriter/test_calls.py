"""A graph traced call by call is the graph traced as a whole, and equal calls are traced once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from reattend.rewriter.capture import backward, calls, capture
from reattend.rewriter.capture.templates import Unfit
from reattend.rewriter.graph import torch_private
from tests.tiers import one_in


class Both:
    """A backend that traces each graph both ways."""

    def __init__(self) -> None:
        self.pairs: list[tuple[fx.GraphModule, fx.GraphModule]] = []
        self.traced: list[int] = []
        self.unfit: list[str] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        with pytest.MonkeyPatch.context() as patch:
            count = 0
            call, trace = backward.GradientWatch.call, calls.trace

            def counted(*given: Any) -> Any:
                nonlocal count
                count += 1
                return call(*given)

            def noted(*given: Any) -> fx.GraphModule:
                try:
                    return trace(*given)
                except Exception as why:
                    self.unfit.append(f"{type(why).__name__}: {why}")
                    raise

            patch.setattr(backward.GradientWatch, "call", counted)
            patch.setattr(calls, "trace", noted)
            ours = capture.from_dynamo(gm, inputs).graph
            self.traced.append(count)
            patch.setattr(calls, "trace", _never)
            self.pairs.append((ours, capture.from_dynamo(gm, inputs).graph))
        return ours.forward


def _never(*_: Any) -> fx.GraphModule:
    raise Unfit("off")


def lines(gm: fx.GraphModule) -> list[object]:
    """A graph without the names of its nodes: operators, arguments, values. Sizes stand as what they are, whoever says them."""
    place: dict[fx.Node, object] = {}
    out: list[object] = []

    def plain(x: Any) -> object:
        if isinstance(x, fx.Node):
            return place[x]
        if isinstance(x, (list, tuple)):
            return tuple(map(plain, x))
        if isinstance(x, slice):
            return ("slice", plain(x.start), plain(x.stop), plain(x.step))
        return repr(x)

    for n in gm.graph.nodes:
        value = n.meta.get("val")
        if isinstance(value, torch.SymInt):
            place[n] = f"size {torch_private.expression(value)}"
            continue
        place[n] = len(out)
        stack = [p for p, _ in n.meta.get("nn_module_stack", {}).values()]
        called = n.target if n.op == "call_function" else ""
        out.append((n.op, called, plain(n.args), plain(tuple(n.kwargs.items())), _said(value), n.meta.get("stack_trace"), stack))
    return out


def _said(x: Any) -> object:
    if isinstance(x, Tensor):
        sizes = tuple(torch_private.expression(s) if isinstance(s, torch.SymInt) else s for s in (*x.shape, *x.stride()))
        return (sizes, x.dtype, x.device, x.requires_grad)
    return tuple(map(_said, x)) if isinstance(x, (list, tuple)) else repr(x)


def both(step: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Both:
    """The graphs of a function or a module, traced both ways and held against each other and against eager code."""
    torch._dynamo.reset()
    backend = Both()
    given = [[x.clone() if isinstance(x, Tensor) and not x.requires_grad else x for x in args] for _ in range(2)]
    torch.manual_seed(0)
    want = step(*given[0])
    torch.manual_seed(0)
    got = torch.compile(step, backend=backend, dynamic=dynamic)(*given[1])
    assert backend.pairs
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(given[1], given[0], rtol=0, atol=0)
    for ours, whole in backend.pairs:
        assert lines(ours) == lines(whole)
    return backend


class Layer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        s = (q @ k.mT / 2).masked_fill(~keep, torch.finfo(q.dtype).min)
        made: Tensor = x + self.out((F.dropout(s.softmax(-1), 0.1, self.training) @ v).transpose(1, 2).flatten(2))
        return made


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "gradients", "dynamic"), one_in(3, [
    (torch.float32, False, True), (torch.bfloat16, True, False), (torch.float16, True, True),
]))
def test_layers_are_traced_once_and_give_the_same_graph(dtype: torch.dtype, gradients: bool, dynamic: bool) -> None:
    with torch.set_grad_enabled(gradients):
        made = [both(Stack(n).to(dtype), torch.randn(2, 5, 16, dtype=dtype), dynamic=dynamic) for n in (2, 4)]
    assert [b.unfit for b in made] == [[], []]
    assert made[0].traced == made[1].traced


def test_a_number_that_comes_as_a_tensor() -> None:
    made = both(lambda x: x * x.size(-1) ** -0.5, torch.randn(3, 5), dynamic=True)
    assert not made.unfit


def test_gradients_are_those_of_the_model() -> None:
    torch._dynamo.reset()
    model, x = Stack(3).train(False), torch.randn(2, 5, 16)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    backend = Both()
    got = torch.autograd.grad(torch.compile(model, backend=backend)(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, wanted)
    assert not backend.unfit


def test_autocast_and_grad_mode_are_part_of_the_key() -> None:
    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a = x @ w
        with torch.autocast("cpu", torch.bfloat16):
            b = x @ w
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                c = x @ w
        return a, b, c, x @ w

    made = both(step, torch.randn(4, 4), torch.randn(4, 4, requires_grad=True))
    assert not made.unfit
    assert made.traced == [3]


def test_one_tensor_twice_is_not_two_tensors() -> None:
    class M(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.multi_head_attention_forward(  # tells by identity whether keys are values
                x, x, x, 8, 2, self.w, None, None, None, False, 0.0, self.o, None, need_weights=False,
            )[0] + F.multi_head_attention_forward(
                x, y, y, 8, 2, self.w, None, None, None, False, 0.0, self.o, None, need_weights=False,
            )[0] + torch.add(x, x) * torch.add(x, y)

        def __init__(self) -> None:
            super().__init__()
            self.w, self.o = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(8, 8))

    with torch.no_grad():
        both(M(), torch.randn(5, 3, 8), torch.randn(5, 3, 8))


def test_constants_of_another_type_or_sign_are_other_calls() -> None:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x * 1, x * 1.0, x * True, 1 / (y * 0.0), 1 / (y * -0.0), y.sum(0), y.sum(0, keepdim=True), y.sum(1)

    made = both(step, torch.randint(5, (3, 3)), torch.rand(3, 3) + 1)
    assert not made.unfit


def test_inference_mode() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        a = x * 2
        a.add_(y)
        b = y * 2
        b.add_(a)
        return F.relu(a + b, inplace=True).float() + b.float().to(torch.float32)

    with torch.inference_mode():
        both(step, torch.randn(3, 4), torch.randn(3, 4))


def test_writes_in_place_are_read_by_what_follows() -> None:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = x * 2
        a.add_(y)
        b = x * 2
        b[..., 1:] = y[..., 1:]
        c = a.masked_fill_(b > 0, -1.0) + a
        x.mul_(2)
        return a, b, c, x * 2, torch.relu_(c).add_(x)

    made = both(step, torch.randn(3, 4), torch.randn(3, 4))
    assert not made.unfit


def test_several_results_sizes_and_constants() -> None:
    def step(x: Tensor) -> tuple[Any, ...]:
        a, b = torch.split(x, 2, -1)
        top, at = x.max(-1)
        n = x.shape[0] * 2 + 1
        grid = torch.arange(n)[:, None] * torch.tensor([1, 2, 3])
        return a, b, top, at, grid, grid.view(-1, n), x.new_zeros(n, x.shape[0]), torch.randn(n), torch.full((n,), 0.0)

    for dynamic in (False, True):
        made = both(step, torch.randn(5, 4), dynamic=dynamic)
        assert not made.unfit


@pytest.mark.parametrize("x", [
    torch.randn(4, 6).mT, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(6, 1)[::2],
    torch.randn(8)[2:].view(3, 2), torch.randn(3, 1).expand(3, 4),
])
def test_other_layouts(x: Tensor) -> None:
    made = both(lambda x: (x * 2, x.contiguous(), x.clone(), x.reshape(-1), x.mT + x.mT.contiguous()), x)
    assert not made.unfit


def _reshaped(x: Tensor) -> Tensor:
    y = x * 2
    z = y + 1
    y.unsqueeze_(0)
    return y + z


def _again(x: Tensor) -> Tensor:
    y = checkpoint(torch.sin, x, use_reentrant=False)
    assert isinstance(y, Tensor)
    return y + 1


def _turned(x: Tensor) -> Tensor:
    y = x * 2
    z = y.sum(0)
    return y.t_().t_() + z


@pytest.mark.parametrize("step", [_reshaped, _again, _turned])
def test_what_more_than_the_key_may_decide_is_traced_as_a_whole(step: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        made = both(step, torch.randn(3, 4))
    assert made.unfit
    assert all(u.startswith("Unfit") for u in made.unfit)
