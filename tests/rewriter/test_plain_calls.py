"""How rewritten graphs are called: by functions that run just the operator; a graph without a replacement runs as it came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reattend
from reattend.rewriter.graph.torch_private import schema
from reattend.rewriter.splice.calls import PLAIN, call_plainly

X, Y = torch.rand(2, 3, 4) + 0.1, torch.randn(2, 3, 4)
MASK, WEIGHT = Y > 0, torch.randn(4, 4)
# Arguments beside the first tensor, by the operator's name.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "reshape": ([2, 12],), "permute": ([2, 0, 1],), "unsqueeze": (1,), "squeeze": (), "matmul": (WEIGHT,),
    "transpose.int": (1, 2), "select.int": (1, 2), "squeeze.dim": (0,), "softmax.int": (-1,), "pow.Tensor_Scalar": (2,),
    "mean.dim": ([-1], True), "flatten.using_ints": (1, 2), "linear": (WEIGHT,), "view": ([6, 4],), "expand": ([2, 3, 4],),
    "to.dtype": (torch.float64,), "layer_norm": ([4], None, None, 1e-3),
}


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that a call runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operands(name: str) -> tuple[Any, ...]:
    name = name.removeprefix("aten::")
    match name:
        case "where.self":
            return MASK, X, Y
        case "bitwise_and.Tensor" | "bitwise_or.Tensor":
            return MASK, ~MASK
        case "bitwise_not":
            return (MASK,)
        case "cat" | "stack":
            return [X, Y], 1
        case "embedding":
            return WEIGHT, torch.tensor([1, 3])
        case "bmm":
            return X, Y.mT
        case "mm":
            return X[0], WEIGHT
    if name.endswith(".Scalar"):
        return X, 0.5
    return (X, Y) if name.endswith(".Tensor") else (X, *ARGUMENTS.get(name, ()))


def run(function: Any, args: tuple[Any, ...]) -> tuple[Tensor, list[str]]:
    with Seen() as seen:
        out = function(*args)
    assert isinstance(out, Tensor)
    return out, seen.names


@pytest.mark.parametrize("name", PLAIN)
def test_a_function_runs_just_its_operator(name: str) -> None:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    args = operands(name)
    got, names = run(PLAIN[name], args)
    want, others = run(operator, args)
    assert names == others
    assert (got.dtype, got.stride()) == (want.dtype, want.stride())
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", PLAIN)
def test_all_arguments_may_come_by_position(name: str) -> None:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    args = operands(name)
    args += tuple(a.default_value for a in schema(operator).arguments[len(args) :] if not a.kwarg_only)
    gm = fx.GraphModule({}, fx.Graph())
    given: list[Any] = [gm.graph.placeholder(f"x{i}") if isinstance(a, Tensor) else a for i, a in enumerate(args)]
    if isinstance(args[0], list):
        given[0] = [gm.graph.placeholder("x"), gm.graph.placeholder("y")]
    gm.graph.output(gm.graph.call_function(operator, tuple(given)))
    call_plainly(gm)
    gm.recompile()
    tensors = args[0] if isinstance(args[0], list) else [a for a in args if isinstance(a, Tensor)]
    assert torch.equal(gm(*tensors), operator(*args))


def test_a_graph_calls_them() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.slice.Tensor, (graph.call_function(torch.ops.aten.neg.default, (x,)), 1, 0, 2)))
    gm = fx.GraphModule({}, graph)
    call_plainly(gm)
    gm.recompile()
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [torch.neg, torch.ops.aten.slice.Tensor]
    assert torch.equal(gm(X), -X[:, :2])


def test_a_size_is_the_tensor_s_own() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.sym_size.int, (graph.placeholder("x"), 2)))
    gm = fx.GraphModule({}, graph)
    call_plainly(gm)
    gm.recompile()
    assert torch.ops.aten.sym_size.int not in [n.target for n in gm.graph.nodes]
    assert gm(X) == 4


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).softmax(-1) @ v


def test_a_graph_in_which_nothing_is_replaced_runs_as_it_came() -> None:
    """Bit by bit, and by the operators of the model."""
    torch._dynamo.reset()
    qkv = [torch.randn(2, 4, 24, 16) for _ in range(3)]
    model = reattend.optimize(Attention(), policy=reattend.Policy(allow="original", deny=("reattend", "sdpa", "flex")))
    with torch.no_grad():
        model(*qkv)
        (got, names), (want, others) = run(model, tuple(qkv)), run(Attention(), tuple(qkv))
    assert names == others
    assert torch.equal(got, want)
    (site,) = reattend.report(model).sites
    assert site.ran >= 1
