"""Row reductions: one rule an operator, each of which defines Einsums; a softmax becomes Cascade 4 of FuseMax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast as typed

import torch
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Einsum, size_term
from ...patterns.expr import Expr
from ...patterns.terms.narrow import narrowed
from ..graph.node import CannotLift, arguments, dtype_of, tensor_of
from ..graph.sizes import shape_of
from .index import ZERO
from .lift import At, Lifter, Rule, scratch
from .operators_view import SEVERAL, dim_of, source

Args = Mapping[str, object]


# --- row reductions -----------------------------------------------------------------------------------------------


def _reduced(
    lifter: Lifter, x: fx.Node, what: str, op: str, dims: Sequence[int], at: At, dtype: str,
    body: Callable[[At], Expr] | None = None, owner: fx.Node | None = None,
) -> Expr:
    """`what[rest] = reduce(op) over dims of x`; `at` holds the coordinates of x, those of `dims` are ignored."""
    shape = shape_of(tensor_of(x))
    term = body or (lambda where: ex.cast(lifter.value(x, where), dtype))
    live = [d for d in dims if shape[d] != 1]
    if not live:
        return term(tuple(ZERO if d in dims else i for d, i in enumerate(at)))
    rest = [1 if d in dims else s for d, s in enumerate(shape)]

    def build(where: At) -> Einsum:
        taken = [str(i.attr) for i in where if i.op == "index"]
        full = list(where)
        over = []
        for d in live:
            r = lifter.bound_rank(x, d, taken)
            taken.append(r)
            over.append(r)
            full[d] = ex.index(r)
        return scratch(term(tuple(full)), op, tuple(over))

    where = tuple(ZERO if d in dims else i for d, i in enumerate(at))
    return lifter.define(owner or x, what, rest, where, build, dtype)


def _scores(lifter: Lifter, x: fx.Node, at: At, dtype: str) -> Expr:
    """The input of a softmax as a tensor of the cascade of its own, so that each Einsum reads as in the papers."""
    direct = lifter.value(x, at)
    if direct.op in ("load", "const"):
        return ex.cast(direct, dtype)
    shape = shape_of(tensor_of(x))
    own = dtype_of(x)
    # a fill that the narrower type of the softmax has not is ±∞ there
    name = "S" if narrowed(direct, dtype) is direct else "SC"
    made = lifter.define(x, name, shape, at, lambda where: scratch(narrowed(lifter.value(x, where), dtype)), own)
    return ex.cast(made, dtype)


def _softmax_parts(lifter: Lifter, n: fx.Node, x: fx.Node, d: int, at: At) -> tuple[Expr, Expr, Expr]:
    """(score, row maximum, row sum of exp(score − maximum)) at `at`."""
    dtype = dtype_of(n)
    for k, i in enumerate(at):
        if i.op == "index":
            lifter._hint.setdefault((x, k), str(i.attr))
    score = _scores(lifter, x, at, dtype)
    top = _reduced(lifter, x, "GM", "max", [d], at, dtype, lambda w: _scores(lifter, x, w, dtype), n)

    def numerator(w: At) -> Expr:
        here = _reduced(lifter, x, "GM", "max", [d], w, dtype, lambda v: _scores(lifter, x, v, dtype), n)
        return ex.exp(_scores(lifter, x, w, dtype) - here)

    total = _reduced(lifter, x, "SD", "add", [d], at, dtype, numerator, n)
    return score, top, total


def softmax(safe: bool) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        x = source(n, a)
        d = dim_of(a["dim"], len(at))
        if shape_of(tensor_of(x))[d] == 1:
            raise CannotLift("softmax over one element", n)
        _, top, total = _softmax_parts(lifter, n, x, d, at)
        shape = shape_of(tensor_of(x))
        dtype = dtype_of(n)

        def numerator(w: At) -> Expr:
            s, m, _ = _softmax_parts(lifter, n, x, d, w)
            return ex.exp(s - m)

        share = lifter.define(n, "SN", shape, at, lambda w: scratch(numerator(w)), dtype) / total
        if safe:
            share = ex.where(ex.equal(top, ex.const(-math.inf, dtype)), ex.const(0.0, dtype), share)
        return share

    return rule


def log_softmax(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    score, top, total = _softmax_parts(lifter, n, source(n, a), dim_of(a["dim"], len(at)), at)
    return score - top - ex.unary("log", total)


def full_place(at: At, dims: Sequence[int], keepdim: object, rank: int) -> At:
    """Coordinates of the input of a reduction (0 in the reduced dimensions) from those of its output."""
    if keepdim:
        return at
    rest = iter(at)
    return tuple(ZERO if d in dims else next(rest) for d in range(rank))


def dims_of(a: Args, rank: int) -> list[int]:
    value = a.get("dim")
    if value is None or value == []:
        return list(range(rank))
    return [dim_of(value, rank)] if isinstance(value, int) else [dim_of(d, rank) for d in typed("Sequence[int]", value)]


def logsumexp(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = source(n, a)
    rank = len(shape_of(tensor_of(x)))
    dims = dims_of(a, rank)
    if len(dims) != 1:
        raise CannotLift("logsumexp over several dimensions", n)
    _, top, total = _softmax_parts(lifter, n, x, dims[0], full_place(at, dims, a["keepdim"], rank))
    return top + ex.unary("log", total)


def logsumexp_of_any_row(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """As torch ends rows whose scores are all −∞, or among them ∞: by that number. exp(s − lse) is NaN either way."""
    sum_of_row = logsumexp(lifter, n, a, at)
    top = sum_of_row.args[0]
    return ex.where(ex.equal(ex.unary("abs", top), math.inf), top, sum_of_row)


def reduction(what: str, op: str, average: bool = False) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        x = source(n, a)
        shape = shape_of(tensor_of(x))
        dims = dims_of(a, len(shape))
        dtype = dtype_of(n) if isinstance(n.meta["val"], torch.Tensor) else dtype_of(x)
        out = _reduced(lifter, x, what, op, dims, full_place(at, dims, a.get("keepdim"), len(shape)), dtype, None, n)
        if average:
            count: Expr = ex.const(1)
            for d in dims:
                count = count * size_term(shape[d])
            out = out / ex.cast(count, dtype)
        return out

    return rule


def extreme(what: str, op: str) -> Callable[[Lifter, fx.Node, int, At], Expr]:
    """max.dim and min.dim: their values; positions have no term."""
    rule = reduction(what, op)

    def several(lifter: Lifter, n: fx.Node, i: int, at: At) -> Expr:
        if i != 0:
            raise CannotLift("the position of a maximum", n)
        return rule(lifter, n, arguments(n), at)

    return several


SEVERAL.update({"max": extreme("R", "max"), "min": extreme("R", "min")})

RULES: dict[str, Rule] = {
    "softmax": softmax(safe=False), "_softmax": softmax(safe=False), "_safe_softmax": softmax(safe=True),
    "special_softmax": softmax(safe=False), "log_softmax": log_softmax, "_log_softmax": log_softmax,
    "logsumexp": logsumexp, "amax": reduction("R", "max"), "amin": reduction("R", "min"),
    "mean": reduction("R", "add", average=True),
}
