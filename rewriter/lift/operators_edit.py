"""Edits: a tensor with other values at some coordinates is a choice by a predicate; one rule an operator.

    slice_scatter(x, y, d, a, b)      where(a ≤ i_d < b, y[…, i_d − a, …], x)
    index_fill(x, d, indices, c)      where(∨_j i_d = indices[j], c, x)       for indices that the graph holds
    index_put(x, [keep], c)           where(keep, c, x)                       for a mask
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast as typed

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import size_term
from ...patterns.expr import Expr
from ..graph.node import CannotLift, constant_of, dtype_of, op_name, tensor_of
from ..graph.sizes import same, shape_of
from .index import ZERO
from .lift import At, Lifter, Rule
from .operators_view import dim_of, source, term_of

Args = Mapping[str, object]
# How many constant indices make a predicate: more are a table.
_MOST = 64


def copy(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """copy(x, y) is y, broadcast to x and in its type."""
    return ex.cast(lifter.arg(a["src"], at), dtype_of(n))


def slice_scatter(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x, y = source(n, a), typed("fx.Node", a["src"])
    d = dim_of(a["dim"], len(at))
    if a["step"] not in (None, 1):
        raise CannotLift("an edit of a slice with a step", n)
    whole, kept = shape_of(tensor_of(x))[d], shape_of(tensor_of(y))[d]
    size, i = size_term(whole), at[d]
    start = _from_end(term_of(lifter, a["start"], ZERO), size)
    end = start + size_term(kept)
    inside = (ex.TRUE if start is ZERO else i >= start) & (ex.TRUE if same(kept, whole) or end is size else i < end)
    return _chosen(lifter, n, inside, y, (*at[:d], i - start, *at[d + 1 :]), at)


def select_scatter(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    d = dim_of(a["dim"], len(at))
    i = _from_end(term_of(lifter, a["index"], ZERO), size_term(shape_of(tensor_of(n))[d]))
    place = (*at[:d], *at[d + 1 :])
    return _chosen(lifter, n, ex.equal(at[d], i), typed("fx.Node", a["src"]), place, at, (at[d], i))


def diagonal(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[…, i] = x[…, i − min(offset, 0), …, i + max(offset, 0), …]"""
    x = source(n, a)
    first, second, offset = _dims(a, len(at) + 1)
    rest, i = iter(at[:-1]), at[-1]
    place = {first: i + max(-offset, 0), second: i + max(offset, 0)}
    return lifter.value(x, tuple(place[d] if d in place else next(rest) for d in range(len(at) + 1)))


def diagonal_scatter(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    first, second, offset = _dims(a, len(at))
    i = at[first] if offset >= 0 else at[second]
    rest = tuple(x for d, x in enumerate(at) if d not in (first, second))
    # where they meet, one coordinate is the other
    alike = (at[second], at[first] + offset) if offset >= 0 else (at[first], at[second] - offset)
    return _chosen(lifter, n, ex.equal(at[second] - at[first], offset), typed("fx.Node", a["src"]), (*rest, i), at, alike)


def fill_diagonal(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    if len(at) != 2 or a["wrap"]:
        raise CannotLift("a diagonal of more than two dimensions", n)
    return ex.where(ex.equal(at[0], at[1]), _scalar(lifter, n, a["fill_value"]), lifter.value(source(n, a), at))


def index_fill(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    d = dim_of(a["dim"], len(at))
    hit = _among(n, at[d], typed("fx.Node", a["index"]), shape_of(tensor_of(n))[d])
    return ex.where(hit, _scalar(lifter, n, a["value"]), lifter.value(source(n, a), at))


def index_put(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """With one number: at the places that a mask keeps, or at constant indices of one dimension."""
    x, value = source(n, a), typed("fx.Node", a["values"])
    given = list(typed("Sequence[fx.Node | None]", a["indices"]))
    tensors = [i for i in given if i is not None]
    if len(tensors) != 1 or any(s != 1 for s in shape_of(tensor_of(value))):
        raise CannotLift("index_put of several values, or at several indices", n)
    (where,), d = tensors, given.index(tensors[0])
    if dtype_of(where) in ("b1", "u8"):
        hit = lifter.value(where, at[d : d + tensor_of(where).dim()])
        hit = hit if hit.dtype == "b1" else ex.unary("not", ex.equal(hit, 0))
    else:
        hit = _among(n, at[d], where, shape_of(tensor_of(x))[d])
    old, new = lifter.value(x, at), ex.cast(lifter.arg(value, ()), dtype_of(n))
    return ex.where(hit, old + new if a["accumulate"] else new, old)


def _chosen(
    lifter: Lifter, n: fx.Node, inside: Expr, y: fx.Node, place: At, at: At, alike: tuple[Expr, Expr] | None = None
) -> Expr:
    """What is laid in where the condition holds, and the tensor elsewhere; there, the terms of `alike` are the same.

        before   where(p = 0, S[0,m] + 1, S[p,m])        after   where(p = 0, S[p,m] + 1, S[p,m])
    """
    new = ex.cast(lifter.value(y, lifter.broadcast(y, place)), dtype_of(n))
    old = lifter.value(typed("fx.Node", n.args[0]), at)
    if alike is not None and not alike[0].is_const:
        new = ex.substitute(new, {ex.substitute(x, dict([alike])): x for x in ex.loads(old)})
    if new.op == "where" and new.args[2] is old:
        # where(c, where(d, x, y), y) = where(c ∧ d, x, y)
        return ex.where(inside & new.args[0], new.args[1], old)
    return ex.where(inside, new, old)


def _from_end(i: Expr, size: Expr) -> Expr:
    if not i.is_const:
        return i
    if size.is_const:
        return ex.const(min(max(int(i.value) + int(size.value) if i.value < 0 else int(i.value), 0), int(size.value)))
    return size + i if i.value < 0 else i


def _dims(a: Args, rank: int) -> tuple[int, int, int]:
    offset = a["offset"]
    if not isinstance(offset, int):
        raise CannotLift("a diagonal whose offset is no constant")
    return dim_of(a["dim1"], rank), dim_of(a["dim2"], rank), offset


def _scalar(lifter: Lifter, n: fx.Node, value: object) -> Expr:
    return ex.cast(lifter.arg(value, ()), dtype_of(n))


def _among(n: fx.Node, i: Expr, indices: fx.Node, size: object) -> Expr:
    """Whether a coordinate is one of the indices, where the graph holds them."""
    while op_name(indices) in ("lift_fresh_copy", "lift_fresh", "detach", "alias", "clone", "to"):
        indices = typed("fx.Node", indices.args[0])
    held = constant_of(indices)
    if held is None or not isinstance(size, int) or held.numel() > _MOST:
        raise CannotLift(f"{op_name(n)} at indices that are no constants of the graph", n)
    found = sorted({int(x) % size for x in held.flatten().tolist()})
    out = ex.FALSE
    for start, end in _stretches(found):
        out = out | (ex.equal(i, start) if end == start + 1 else (i >= start) & (i < end))
    return out


def _stretches(found: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours together, each stretch with its end."""
    out: list[tuple[int, int]] = []
    for x in found:
        if out and out[-1][1] == x:
            out[-1] = (out[-1][0], x + 1)
        else:
            out.append((x, x + 1))
    return out


RULES: dict[str, Rule] = {
    "copy": copy, "slice_scatter": slice_scatter, "select_scatter": select_scatter, "diagonal_scatter": diagonal_scatter,
    "diagonal": diagonal, "fill_diagonal": fill_diagonal, "index_fill": index_fill, "index_put": index_put,
}
