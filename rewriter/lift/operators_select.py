"""Selections: a constant scattered to indices that the model computed is a predicate of coordinates; one rule an operator.

    scatter(x, d, T, c)      where(IN, c, x)      IN[…,i,…] = or_j (T[…,j,…] = i)

    scatter_add(0, T', valid) ≠ 0      the same, where T' is T brought into the tensor, and valid says that it lay there

The indices stay what the model computed: their order among ties is that of the operator that made them. A column behind the
end that takes what is selected in vain (−1 written as M) is never read, so that it asks for no rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast as typed

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Einsum, size_term
from ...patterns.expr import Expr
from ...patterns.terms.conditions import conjuncts
from ..graph.node import CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import same, shape_of
from . import operators_point
from .index import ZERO
from .lift import At, Lifter, Rule, scratch
from .operators_view import dim_of, source

Args = Mapping[str, object]
_CLAMPS = frozenset(("clamp", "clip", "clamp_min", "clamp_max"))
_SAME = frozenset(("to", "_to_copy", "clone", "contiguous", "detach", "alias"))


def scatter(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x, index = source(n, a), typed("fx.Node", a["index"])
    if a.get("reduce") is not None:
        raise CannotLift("a scatter that reduces", n)
    d = dim_of(a["dim"], len(at))
    new = _constant(lifter, n, a, at)
    return ex.where(_member(lifter, n, index, d, at), new, lifter.value(x, at))


def _constant(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """The one number that is scattered."""
    given = a["src"] if "src" in a else a["value"]
    term = lifter.arg(given, at) if isinstance(given, fx.Node) else ex.const(typed("float", given))
    if not term.is_const:
        raise CannotLift("a scatter of several values", n)
    return ex.cast(term, dtype_of(n))


def _member(lifter: Lifter, n: fx.Node, index: fx.Node, d: int, at: At) -> Expr:
    """Whether the coordinate `at[d]` is among the indices."""
    whole, given = shape_of(tensor_of(n)), shape_of(tensor_of(index))
    if any(not same(s, g) for k, (s, g) in enumerate(zip(whole, given, strict=True)) if k != d):
        raise CannotLift("a scatter to a part of the rows", n)
    if _permutes(index, d) and same(given[d], whole[d]):
        return ex.TRUE
    if given[d] == 1:
        return ex.equal(lifter.leaf(index, (*at[:d], ZERO, *at[d + 1 :])), at[d])

    def body(where: At) -> Einsum:
        slot = lifter.rank(given[d], avoid=[str(i.attr) for i in where if i.op == "index"])
        read = lifter.leaf(index, (*where[:d], ex.index(slot), *where[d + 1 :]), reader=n)
        return scratch(ex.equal(read, where[d]), "or", (slot,))

    return lifter.define(n, "IN", whole, at, body, "b1")


def differs(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """A comparison with 0 of how often positions are named says which are."""
    x = a["self"]
    if isinstance(x, fx.Node) and op_name(x) == "scatter_add" and a["other"] in (0, False):
        if lifter.aliases.written_between(x, x, n):
            raise CannotLift(f"{x.name} is written in place before {n.name} reads it", n)
        with lifter.read_by(x):
            return _counted(lifter, x, arguments(x), lifter.broadcast(x, at))
    return operators_point.RULES[op_name(n)](lifter, n, a, at)


def _counted(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """scatter_add(0, clamp(T, 0, M − 1), 0 ≤ T < M) ≠ 0: whether the coordinate is among T."""
    base, index, src = (typed("fx.Node", a[name]) for name in ("self", "index", "src"))
    zero, d = lifter.value(base, at), dim_of(a["dim"], len(at))
    named = _brought(index)
    if dtype_of(n) not in ("i32", "i64") or not (zero.is_const and zero.value == 0):
        raise CannotLift("what is added up is no count from 0 on", n)
    shape, size = shape_of(tensor_of(index)), shape_of(tensor_of(n))[d]
    rows = tuple(at[k] if k != d else ex.index(lifter.rank(shape[d], avoid=_names(at))) for k in range(len(at)))
    told = lifter.leaf(named, rows, reader=n)
    lifter.assume(named, rows, told)
    place, counts = lifter.value(index, rows), lifter.value(src, rows)
    first, last = ex.const(0, told.dtype), ex.cast(size_term(size) - 1, told.dtype)
    inside = (told >= first, told < ex.cast(size_term(size), told.dtype))
    valid = counts.args[0] if counts.op == "cast" and counts.args[0].dtype == "b1" else counts
    brought = ex.minimum(ex.maximum(told, first), last)
    if valid.dtype != "b1" or set(conjuncts(valid)) != set(inside) or ex.cast(place, "i64") is not ex.cast(brought, "i64"):
        raise CannotLift(f"{place} counted by {counts} is not what lies inside, each once", n)
    return _member(lifter, n, named, d, at)


def _names(at: At) -> list[str]:
    return [str(i.attr) for i in at if i.op == "index"]


def _brought(n: fx.Node) -> fx.Node:
    """The indices that are clamped and cast on their way."""
    while op_name(n) in (*_SAME, *_CLAMPS) and dtype_of(n) in ("i32", "i64"):
        n = typed("fx.Node", n.args[0])
    return n


def _permutes(index: fx.Node, d: int) -> bool:
    """Are these all positions along a dimension, each once: a sort, or a top-k of all there is?"""
    while op_name(index) in _SAME and dtype_of(index) in ("i32", "i64"):
        index = typed("fx.Node", index.args[0])
    if op_name(index) == "argsort":
        made = index
    elif op_name(index) == "getitem" and index.args[1] == 1:
        made = typed("fx.Node", index.args[0])
    else:
        return False
    if op_name(made) not in ("topk", "sort", "argsort"):
        return False
    given = arguments(made)
    of, own = tensor_of(source(made, given)), shape_of(tensor_of(index))
    return dim_of(given["dim"], of.dim()) == d and same(shape_of(of)[d], own[d])


RULES: dict[str, Rule] = {"scatter": scatter, **dict.fromkeys(("ne", "not_equal", "gt", "greater"), differs)}
