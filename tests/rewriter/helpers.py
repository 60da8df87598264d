"""Capture of plain functions for the tests of lifting and detection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.evaluate import evaluate
from reattend.rewriter.find import detect
from reattend.rewriter.find.detect import Found


def graph_of(fn: Callable[..., Any], args: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a function."""
    return make_fx(fn, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*[a.detach() for a in args])


def recorded(gm: fx.GraphModule, args: Sequence[Any]) -> tuple[Any, dict[fx.Node, Any]]:
    """What a graph answers, and the value of every node at the time when it is computed."""
    values: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    return Record(gm).run(*args), values


def values_of(gm: fx.GraphModule, args: Sequence[torch.Tensor]) -> dict[fx.Node, Any]:
    with torch.no_grad():
        return recorded(gm, [a.detach() for a in args])[1]


def error_of(found: Found, values: dict[fx.Node, Any]) -> float:
    """‖evaluate(cascade) − the graph's own value‖∞ over ‖the graph's own value‖∞."""
    tensors = {name: values[node] for name, node in found.tensors.items()}
    out = evaluate(found.cascade, tensors)[found.cascade.outputs[0]]
    reference = values[found.output]
    return float((out - reference.reshape(out.shape)).abs().max() / reference.abs().max())


def read(fn: Callable[..., Tensor], *args: Tensor) -> Attention:
    """The one attention of a function, beside which nothing is missed and which computes what the function does."""
    gm = graph_of(fn, args)
    found, missed = detect.find(gm)
    assert len(found) == 1, [m.reason for m in missed]
    assert not missed, [m.reason for m in missed]
    assert error_of(found[0], values_of(gm, args)) <= 1e-12
    view = attention(found[0].cascade)
    assert isinstance(view, Attention)
    return view


def given(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64) for s in shapes]
