"""The last product of an attention: which value it is, what weighs the values, and where the values lie."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import cast as typed

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from ..graph.node import CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import agree, shape_of
from ..lift.index import ZERO
from ..lift.lift import At, Lifter, scratch
from ..lift.operators_contract import CONTRACTIONS, PRODUCTS, Contraction, contract
from ..lift.operators_point import LIVE_DROPOUT
from ..lift.operators_product import is_layer


@dataclass(frozen=True)
class Final:
    """`O[at] = Σ_m weight(at, m) · value(at, m)`; `shape` keeps missing dimensions as 1 and `place` fills them in.

    `values` lie end to end: each with its size, its node and its coordinates there.
    `of_weights`: the values are weights of the model, which are attended to under a row rule only. `layer`: what makes the
    scores, where it is no product of two computed tensors.
    """

    node: fx.Node
    shape: tuple[Size, ...]
    place: Callable[[At], At]
    size: Size
    weight: Callable[[Lifter, At, Expr], Expr]
    values: tuple[ValueRun, ...]
    why: str
    of_weights: bool = False
    layer: fx.Node | None = None


@dataclass(frozen=True)
class ValueRun:
    """So many values, and where each lies: `place(at, m)` is a node and the coordinates in it."""

    size: Size
    place: Callable[[Lifter, At, Expr], tuple[fx.Node, At]]


def finals(
    lifter: Lifter, n: fx.Node, done: Collection[fx.Node] = (), weights: Collection[fx.Node] = ()
) -> Iterator[Final]:
    """Every reading of node `n` as the last product: each operand in turn may weigh the other.

    `done` are outputs of attentions found before; nothing is sought behind them. `weights` are those of the model.
    """
    name = op_name(n)
    if name == "scaled_dot_product_attention":
        yield _sdpa(n)
        return
    build = PRODUCTS.get(name)
    if name in ("baddbmm", "addmm") or build is None:
        return
    c = build(lifter, n)
    if c is None:
        return
    probe = tuple(ZERO for _ in c.shape)
    first, second = c.operands(probe, ZERO)
    if name == "linear" and second[0].op in ("placeholder", "get_attr"):
        return
    for side in (0, 1):
        weighs, values = (first, second)[side][0], (first, second)[1 - side][0]
        chained = values not in weights and is_chained(weighs, done, weights)
        if leads_to_product(weighs, done) or chained:
            yield _from_contraction(n, c, side, values in weights)
        elif values not in weights and (layer := layer_behind(weighs, done)) is not None:
            yield replace(_from_contraction(n, c, side, False), layer=layer)


def _from_contraction(n: fx.Node, c: Contraction, side: int, of_weights: bool) -> Final:
    def weight(lifter: Lifter, at: At, m: Expr) -> Expr:
        node, where = c.operands(at, m)[side]
        return c.scaled(lifter, n, lifter.value(node, where), at)

    def value(lifter: Lifter, at: At, m: Expr) -> tuple[fx.Node, At]:
        return c.operands(at, m)[1 - side]

    return Final(n, c.shape, c.place, c.size, weight, (ValueRun(c.size, value),), op_name(n), of_weights)


# How many nodes behind the weights are looked at, the nearest first.
_LIMIT = 512
SOFTMAXES = frozenset(("softmax", "_softmax", "_safe_softmax", "special_softmax", "log_softmax", "_log_softmax"))
NOT_BETWEEN = frozenset(("placeholder", "linear", "embedding", "layer_norm", "convolution", "conv1d", "conv2d", "output"))
SHAPE_ONLY = CONTRACTIONS | frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "t", "permute", "expand",
    "contiguous", "clone", "slice", "select", "to", "_to_copy", "getitem", "cat", "stack", "detach", "alias", "split",
    "chunk", "unbind",
))
_MOVED = SHAPE_ONLY - CONTRACTIONS - {"cat", "stack", "getitem"}
# What scales or masks scores, each where it is.
_MASKED = frozenset(("mul", "multiply", "div", "add", "masked_fill", "dropout", "mT", "swapaxes", "movedim"))


def hides_product(n: fx.Node) -> bool:
    """Whether a node that is read as it is, is a contraction or rests on one."""
    return op_name(n) in CONTRACTIONS or leads_to_product(n)


def layer_behind(start: fx.Node, done: Collection[fx.Node] = ()) -> fx.Node | None:
    """The layer of which the weights are a softmax: each of its rows may be a query of all tokens.

    None where it mixes scores: where a product that no attention accounts for stands behind it.
    """
    n, normalised = start, False
    while n.all_input_nodes and n not in done:
        if normalised and is_layer(n):
            x = n.all_input_nodes[0]
            return None if x not in done and (is_chained(x, done, ()) or leads_to_product(x, done)) else n
        normalised |= op_name(n) in SOFTMAXES
        if op_name(n) not in SOFTMAXES | _MOVED | _MASKED:
            return None
        n = n.all_input_nodes[0]
    return None


def is_chained(start: fx.Node, done: Collection[fx.Node], weights: Collection[fx.Node]) -> bool:
    """Whether a product of two computed tensors stands behind views and casts alone: (Q · Kᵀ) · V and Q · (Kᵀ · V)."""
    n = start
    while op_name(n) in _MOVED and n not in done and n.all_input_nodes:
        n = n.all_input_nodes[0]
    return n not in done and op_name(n) in CONTRACTIONS and not any(x in weights for x in n.all_input_nodes)


def leads_to_product(start: fx.Node, done: Collection[fx.Node] = ()) -> bool:
    """Whether a contraction stands upstream of the weights, behind something other than views and casts."""
    seen: set[fx.Node] = set()
    queue: deque[tuple[fx.Node, bool]] = deque([(start, False)])
    while queue and len(seen) < _LIMIT:
        n, between = queue.popleft()
        if n in seen or n in done:
            continue
        seen.add(n)
        name = op_name(n)
        if n is not start and between and (name in CONTRACTIONS or is_product_sum(n)):
            return True
        if name in NOT_BETWEEN or n.op in ("placeholder", "get_attr"):
            continue
        queue.extend((a, between or name not in SHAPE_ONLY) for a in n.all_input_nodes)
    return any(is_product_sum(x) for x in seen if x is not start)


def is_product_sum(n: fx.Node) -> bool:
    return op_name(n) == "sum" and any(op_name(a) in ("mul", "multiply") for a in n.all_input_nodes)


# --- scaled_dot_product_attention -----------------------------------------------------------------------------------


def compare_lengths(graph: fx.Graph) -> None:
    """SDPA's rule for shapes compares no keys with values: two caches grow by symbols of their own, until one asks."""
    for n in graph.nodes:
        if op_name(n) == "scaled_dot_product_attention":
            _as_many_values_as_keys(n)


def _as_many_values_as_keys(n: fx.Node) -> bool:
    a = arguments(n)
    k, v = (tensor_of(typed("fx.Node", a[x])) for x in ("key", "value"))
    return agree(k.shape[-2], v.shape[-2])


def _sdpa(n: fx.Node) -> Final:
    a = arguments(n)
    q, k, v = (typed("fx.Node", a[x]) for x in ("query", "key", "value"))
    kv_shape = shape_of(tensor_of(k))

    def grouped(node: fx.Node, at: At) -> At:
        """`enable_gqa` reads key head h // G, where G is the number of query heads over key heads."""
        shape = shape_of(tensor_of(node))
        if not a.get("enable_gqa") or len(at) < 3 or len(shape) < 3:
            return at
        heads, own = shape_of(tensor_of(q))[-3], shape[-3]
        if heads == own or own == 1:
            return at
        if not isinstance(heads, int) or not isinstance(own, int):
            raise CannotLift("grouped heads of symbolic number", n)
        return (*at[:-3], at[-3] // (heads // own), *at[-2:])

    def operands(w: At, e: Expr) -> tuple[tuple[fx.Node, At], tuple[fx.Node, At]]:
        batch, p, m = w[:-2], w[-2], w[-1]
        left, right = (*batch, p, e), grouped(k, (*batch, m, e))
        return (q, broadcast_to(q, left)), (k, broadcast_to(k, right))

    scores_shape = (*shape_of(tensor_of(n))[:-1], kv_shape[-2])
    product = Contraction(operands, kv_shape[-1], scores_shape)

    def score(lifter: Lifter, at: At) -> Expr:
        dtype = dtype_of(n)
        given, width = a.get("scale"), kv_shape[-1]
        if given is not None:
            scale = lifter.arg(given, at)
        elif width == 0:
            raise CannotLift("keys of width 0 have no scale", n)
        elif isinstance(width, int):
            scale = ex.const(1.0 / math.sqrt(width))
        else:
            scale = ex.const(1.0, "f64") / ex.unary("sqrt", ex.cast(size_term(width), "f64"))
        s = contract(lifter, n, product, at) * ex.cast(scale, dtype)
        if a.get("is_causal"):
            s = ex.where(at[-1] <= at[-2], s, -math.inf)
        mask = a.get("attn_mask")
        if isinstance(mask, fx.Node):
            term = lifter.value(mask, lifter.broadcast(mask, at))
            s = ex.where(term, s, -math.inf) if term.dtype == "b1" else s + ex.cast(term, dtype)
        return s

    def weight(lifter: Lifter, at: At, m: Expr) -> Expr:
        if not _as_many_values_as_keys(n):
            raise CannotLift("not as many keys as values", n)
        if a.get("dropout_p"):
            raise CannotLift(LIVE_DROPOUT, n)
        dtype = dtype_of(n)
        w = (*at[:-1], m)
        rest = (*scores_shape[:-1], 1)

        def scores(x: At) -> Expr:
            return lifter.define(n, "S", scores_shape, (*x[:-1], m), lambda y: scratch(score(lifter, y)), dtype)

        def top(x: At) -> Expr:
            return lifter.define(n, "GM", rest, x, lambda y: scratch(scores(y), "max", (str(m.attr),)), dtype)

        def numerator(x: At) -> Expr:
            shape = scores_shape
            return lifter.define(n, "SN", shape, (*x[:-1], m), lambda y: scratch(ex.exp(scores(y) - top(y))), dtype)

        total = lifter.define(n, "SD", rest, w, lambda y: scratch(numerator(y), "add", (str(m.attr),)), dtype)
        return ex.where(ex.equal(top(w), ex.const(-math.inf, dtype)), ex.const(0.0, dtype), numerator(w) / total)

    def value(lifter: Lifter, at: At, m: Expr) -> tuple[fx.Node, At]:
        return v, broadcast_to(v, grouped(v, (*at[:-2], m, at[-1])))

    return Final(n, shape_of(tensor_of(n)), lambda at: at, kv_shape[-2], weight, (ValueRun(kv_shape[-2], value),),
                 "scaled_dot_product_attention")


def broadcast_to(n: fx.Node, at: At) -> At:
    """Broadcast coordinates without a lifter at hand."""
    shape = shape_of(tensor_of(n))
    return tuple(ZERO if s == 1 else i for s, i in zip(shape, at[len(at) - len(shape) :]))
