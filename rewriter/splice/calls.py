"""How the operators of a rewritten graph are called: by torch's own Python function where there is one for just them.

    torch.ops.aten.transpose.int(x, 1, 2)   →   torch.transpose(x, 1, 2)        the same operator, read in half the time

A decoding step of a small model is some hundred calls, each of a microsecond or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..graph.torch_private import OpOverload, schema

_SAME_NAME = (
    "neg", "exp", "log", "sin", "cos", "tanh", "sigmoid", "relu", "sqrt", "rsqrt", "abs", "bitwise_not", "clone",
    "reshape", "permute", "unsqueeze", "squeeze", "matmul", "bmm", "mm", "cat", "stack", "embedding", "layer_norm",
)
# Functions that take what the operator takes, in its order, by the operator's full name.
PLAIN: Mapping[str, Callable[..., Any]] = {
    **{f"aten::{name}.Tensor": getattr(torch, name) for name in ("add", "sub", "mul", "div", "bitwise_and", "bitwise_or")},
    **{f"aten::{name}.{kind}": getattr(torch, name)
       for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")},
    **{f"aten::{name}": getattr(torch, name) for name in _SAME_NAME},
    "aten::transpose.int": torch.transpose, "aten::select.int": torch.select, "aten::squeeze.dim": torch.squeeze,
    "aten::softmax.int": torch.softmax, "aten::pow.Tensor_Scalar": torch.pow, "aten::mean.dim": torch.mean,
    "aten::flatten.using_ints": torch.flatten, "aten::where.self": torch.where, "aten::linear": F.linear,
    "aten::view": Tensor.view, "aten::expand": Tensor.expand, "aten::to.dtype": Tensor.to,
    "aten::contiguous": Tensor.contiguous,
}
# Those that run no operator at all.
SIZES: Mapping[str, Callable[..., Any]] = {"aten::sym_size.int": Tensor.size}
# How many arguments a function takes by position, where its operator takes more.
_BY_POSITION: Mapping[Callable[..., Any], int] = {Tensor.to: 4}


def call_plainly(gm: fx.GraphModule) -> None:
    """Give the operators of a graph their Python functions."""
    known = {**PLAIN, **SIZES}
    for n in gm.graph.nodes:
        if n.op == "call_function" and isinstance(n.target, OpOverload):
            plain = known.get(_name(n.target))
            if plain is not None and len(n.args) <= _BY_POSITION.get(plain, len(n.args)):
                n.target = plain


def _name(operator: OpOverload) -> str:
    s = schema(operator)
    return f"{s.name}.{s.overload_name}" if s.overload_name else s.name
