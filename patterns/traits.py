"""What can be said about an attention: the rule for rows without a key, a word for its row rule, its traits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import expr as ex
from .constant import REDUCE, number
from .expr import Expr
from .score import factors, reading

if TYPE_CHECKING:
    from .recognise import Attention


def no_key_rule(a: Attention) -> str:
    """What the model computes for a row all of whose keys are masked, found by running its row program on one.

    "nan"; "uniform" (the mean over all keys); "zero"; "never" (no mask can empty a row); "unmasked" (an additive
    fill that is too small to drown the scores, or a fill the row rule shifts away: the row attends as if unmasked).
    Only masks that stand in the terms count: a float tensor that is added is a bias.
    """
    table = {e: _masked(e) for e in ex.walk(*(r.body for r in a.row), a.weight) if _is_mask(e, a.key)}
    if not table:
        return "never"
    keys = {n.out.tensor: np.array([0.3, -0.7]) for n in a.products}
    values: dict[str, object] = dict(keys)
    known: dict[Expr, object] = {ex.index(a.key): np.array([0, 1])}
    for r in a.row:
        body = np.broadcast_to(number(_drop(r.body, table), values, known), (2,))
        assert r.op is not None
        values[r.out.tensor] = REDUCE[r.op](body)
    weight = np.broadcast_to(number(_drop(a.weight, table), values, known), (2,))
    with np.errstate(all="ignore"):
        values[a.contraction.out.tensor] = np.sum(weight * np.array([1.0, 3.0]))
    out = float(number(a.finish, values))
    if np.isnan(out):
        return "nan"
    if out == 0.0:
        return "zero"
    return "uniform" if weight[0] == weight[1] else "unmasked"


def _drop(term: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace masks from the inside out, so that nested masks all take their masked side."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e not in table:
            return None
        return args[1] if table[e] is e.args[1] else args[2]

    return ex.rebuild(term, rule)


def _is_mask(e: Expr, key: str) -> bool:
    return e.op == "where" and key in e.args[0].ranks and (e.args[1].is_const or e.args[2].is_const)


def _masked(e: Expr) -> Expr:
    """The side of a `where` that a masked key takes: the constant one, the smaller of two."""
    _, x, y = e.args
    if x.is_const and y.is_const:
        return x if x.value < y.value else y
    return x if x.is_const else y


def kind(a: Attention) -> str:
    """A word for the row rule. For people to read; no code depends on it."""
    above = [e for e in ex.walk(a.weight) if a.key in e.ranks and e not in set(ex.walk(a.score))]
    ops = {e.op for e in above}
    sums = any(r.op == "add" for r in a.row)
    if ops & {"exp", "exp2"}:
        return "softmax" if sums else "exp"
    for op in ("sigmoid", "softplus", "relu", "tanh", "sin", "cos"):
        if op in ops:
            return op
    if "pow" in ops or any(e.op == "mul" and e.args[0] is e.args[1] for e in above):
        return "power"
    return "linear" if not ops - {"mul", "div", "cast", "neg", "where"} else "pointwise"


def traits(a: Attention) -> frozenset[str]:
    """Words for what stands in the terms. For people to read; no code depends on them."""
    out: set[str] = set()
    terms = list(ex.walk(a.score))
    products = {e.out.tensor for e in a.products}
    keyed = [f for e in a.products for f in factors(e.body)[0] if a.key in f.ranks]
    if any(i.op == "floordiv" for f in keyed for x in ex.loads(f) for i in x.args):
        out.add("gqa")
    masks = ex.walk(*(e.args[0] for e in terms if _is_mask(e, a.key)))
    bounds = {_side(e, a) for e in masks if e.op in ("lt", "le", "gt", "ge")}
    if bounds & {"upper", "lower"}:
        out.add("causal" if bounds & {"upper"} else "window")
    if {"upper", "lower"} <= bounds:
        out.add("window")
    for e in terms:
        if e.op == "tanh":
            out.add("softcap")
        if e.op == "load" and str(e.attr) not in products and a.key in e.ranks:
            out.add("mask" if e.dtype == "b1" else "bias" if e.is_float else "ids")
        if e.op == "mul" and _slope(e, a):
            out.add("alibi")
    if any(e.op == "load" and str(e.attr) not in products | a.row_names for e in _row_loads(a)):
        out.add("sink")
    if a.prelude:
        out.add("prelude")
    size = {n: a.cascade.rank[n].size for n in (a.query, a.key)}
    if size[a.query] == 1:
        out.add("decode")
    elif size[a.query] != size[a.key] and not bounds:
        out.add("cross")
    return frozenset(out)


def _row_loads(a: Attention) -> list[Expr]:
    """Loads without the key that meet row tensors, in row reductions, weight or epilogue."""
    out: list[Expr] = []
    for t in (*(r.body for r in a.row), a.weight, a.finish):
        for e in ex.walk(t):
            if e.op in ("max", "add") and a.key not in e.ranks and reading(e, a.row_names):
                out += [x for x in ex.loads(e) if x.ranks.isdisjoint([a.value]) and x.is_float]
    return out


def _side(e: Expr, a: Attention) -> str:
    """Which side of the keys a comparison of key and query bounds, at a coordinate-only term."""
    if not {a.key, a.query} <= e.ranks or ex.loads(e):
        return ""
    small, large = e.args if e.op in ("lt", "le") else e.args[::-1]
    at = [number(small - large, {}, {ex.index(a.key): k, ex.index(a.query): q}) for k, q in ((0, 0), (9, 0), (0, 9))]
    return "upper" if at[1] > at[0] else "lower" if at[2] > at[0] else ""


def _slope(e: Expr, a: Attention) -> bool:
    """A product of the key's distance and something that varies over the batch ranks."""
    for x, y in (e.args, e.args[::-1]):
        if a.key in x.ranks and not ex.loads(x) and y.ranks <= set(a.batch) and not y.is_const:
            return True
    return False
