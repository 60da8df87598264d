"""Products by other names: distances between tokens, and layers whose weights are queries of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import mul
from typing import cast as typed

import torch
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Einsum, Size
from ...patterns.expr import Expr
from ..graph.node import CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..graph.torch_private import bounds
from .index import ZERO
from .lift import At, Lifter, Rule, scratch
from .operators_contract import Contraction, contract, peel, vecdot

Args = Mapping[str, object]

# --- distances ----------------------------------------------------------------------------------------------------

# torch's cdist multiplies where there are more tokens than this on either side; fewer it subtracts one by one.
_SUBTRACTED = 25


def cdist(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """Euclidean distances, as torch computes them of many tokens: |q − k| = √max(Σ q² + Σ k² − 2·Σ q·k, 0)."""
    x, y = typed("fx.Node", a["x1"]), typed("fx.Node", a["x2"])
    shape, dtype = shape_of(tensor_of(n)), dtype_of(n)
    if a["p"] != 2.0:
        raise CannotLift(f"cdist with the norm p = {a['p']} is no product", n)
    if tensor_of(n).requires_grad:
        raise CannotLift("cdist has a gradient of 0 where two tokens are one, which a root has not", n)
    if a["compute_mode"] == 2 or (a["compute_mode"] != 1 and not any(_is_many(s) for s in tensor_of(n).shape[-2:])):
        raise CannotLift(f"cdist subtracts token from token where there may be {_SUBTRACTED} or fewer of them", n)
    size = shape_of(tensor_of(x))[-1]

    def operands(w: At, e: Expr) -> tuple[tuple[fx.Node, At], tuple[fx.Node, At]]:
        left, right = (*w[:-2], w[-2], e), (*w[:-2], w[-1], e)
        return (x, lifter.broadcast(x, left)), (y, lifter.broadcast(y, right))

    product = contract(lifter, n, Contraction(operands, size, shape), at)
    left, right = _square(lifter, n, x, "XX", at[:-1]), _square(lifter, n, y, "YY", (*at[:-2], at[-1]))
    whole = ex.maximum(left + right - product * ex.const(2.0, dtype), ex.const(0.0, dtype))
    return ex.unary("sqrt", whole)


def _is_many(size: int | torch.SymInt) -> bool:
    """Are there certainly more tokens than are subtracted one by one?"""
    if isinstance(size, int):
        return size > _SUBTRACTED
    known = bounds(size)
    return known is not None and bool(known[0] > _SUBTRACTED)


def cosine_similarity(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """Cosines of tokens with tokens, as torch computes them: Σ q·k/(max(|q|, ε)·max(|k|, ε))."""
    x, y, dtype = typed("fx.Node", a["x1"]), typed("fx.Node", a["x2"]), dtype_of(n)
    product = vecdot(lifter, n)
    if product is None:
        raise CannotLift("cosine_similarity is no product of tokens with tokens", n)
    if tensor_of(n).requires_grad:
        raise CannotLift("cosine_similarity has gradients of its own where a token is 0", n)
    if dtype not in ("f32", "f64"):
        raise CannotLift("cosine_similarity rounds its operands to 16 bits once more when it has divided them", n)
    out, d = contract(lifter, n, product, at), typed("int", a["dim"]) % (len(at) + 1)
    for what, operand in (("XX", x), ("YY", y)):
        behind = tensor_of(operand).dim() - (len(at) + 1)
        square = _square(lifter, n, operand, what, at, d + behind)
        out = out / ex.maximum(ex.unary("sqrt", square), ex.const(typed("float", a["eps"]), dtype))
    return out


def _square(lifter: Lifter, n: fx.Node, x: fx.Node, what: str, at: At, dim: int = -1) -> Expr:
    """Σ x² of a token over one of its dimensions, as `what`; `at` are the coordinates in all others."""
    shape, dtype = list(shape_of(tensor_of(x))), dtype_of(n)
    dim %= len(shape)
    size = shape.pop(dim)

    def build(where: At) -> Einsum:
        e = lifter.rank(size, "", [str(i.attr) for i in where if i.op == "index"])
        term, factors = peel(lifter, x, (*where[:dim], ex.index(e), *where[dim:]), frozenset((e,)), n)
        value = reduce(mul, (ex.cast(f, dtype) for f in factors), ex.cast(term, dtype))
        return scratch(value * value, "add", (e,))

    place = tuple(ZERO if s == 1 else i for s, i in zip(shape, at[len(at) - len(shape) :], strict=True))
    return lifter.define(n, what, shape, place, build, dtype)


# --- layers -------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def is_layer(n: fx.Node) -> bool:
    """Does a node multiply every token by the same weights, and look at no other?"""
    return is_pointwise(n) or (op_name(n) == "linear" and weight_of(n).op in ("placeholder", "get_attr"))


def is_pointwise(n: fx.Node) -> bool:
    """Is a node a convolution of one tap on a batch, over all channels at once?"""
    if op_name(n) not in _CONVOLUTIONS:
        return False
    a, weight, given = arguments(n), shape_of(tensor_of(weight_of(n))), tensor_of(n.all_input_nodes[0])
    padding = a["padding"]
    unpadded = isinstance(padding, str) or not any(typed("list[int]", padding))
    every = all(s == 1 for s in typed("list[int]", a["stride"]))
    return a["groups"] == 1 and unpadded and every and all(s == 1 for s in weight[2:]) and given.dim() == len(weight)


def weight_of(n: fx.Node) -> fx.Node:
    """The weight of a layer, one row an output."""
    return typed("fx.Node", arguments(n)["weight"])


def pointwise(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[b, o, …] = Σ_e weight[o, e]·x[b, e, …] + bias[o]"""
    if not is_pointwise(n):
        raise CannotLift(f"{op_name(n)} has no term", n)
    x, weight = typed("fx.Node", a["input"]), weight_of(n)
    taps = (ZERO,) * (len(at) - 2)
    size: Size = shape_of(tensor_of(x))[1]
    product = Contraction(
        lambda w, e: ((weight, (w[1], e, *taps)), (x, (w[0], e, *w[2:]))), size, shape_of(tensor_of(n))
    )
    out = contract(lifter, n, product, at)
    return out if a["bias"] is None else out + ex.cast(lifter.arg(a["bias"], (at[1],)), dtype_of(n))


RULES: dict[str, Rule] = {"cdist": cdist, "cosine_similarity": cosine_similarity}
# … where a layer is known to make scores of tokens.
LAYERS: Mapping[str, Callable[[Lifter, fx.Node, Args, At], Expr]] = dict.fromkeys(_CONVOLUTIONS, pointwise)
