"""Exponentials in base 2: `exp(s − d) = exp2(s·log₂e − d·log₂e)`, with log₂e folded into the score's own scale.

    before   S = QK·0.125;          M = max S;          w = exp(S − M)
    after    S = QK·0.125·log₂e;    M = max S;          w = exp2(S − M)        M is carried in units of log₂

Saves two operations an element. Fill values stay as written: a scaled finfo.min would overflow to −∞ and change what
rows without a key yield; where a tensor is added to the score (it may hold fills) nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ...patterns import expr as ex
from ...patterns.attention.rowstate import OLD
from ...patterns.expr import Expr
from .terms import Terms, mapped_state

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Constants of at least this magnitude are fills, not numbers to compute with.
UNSCALED = 1e30


def in_base2(t: Terms, key: str, products: frozenset[Expr]) -> Terms:
    """The terms with exponentials in base 2, or as they are where a tensor is added or no bound is subtracted."""
    carried = {c.name for c in t.state.carried if c.op in ("max", "min")}
    bounds = {
        str(x.attr)
        for e in (t.state.weight, *(c.lift for c in t.state.carried))
        for y in ex.walk(e)
        if y.op == "exp"
        for x in ex.loads(y)
        if str(x.attr) in carried
    }
    if not bounds or any(x.is_float and key in x.ranks and x not in products for x in ex.loads(t.score)):
        return t
    scaling = _Scaling(frozenset(bounds))
    new = mapped_state(t.state, scaling.rewrite)
    lifts = tuple(
        replace(c, lift=scaling.scaled(o.lift)) if c.name in bounds else c for c, o in zip(new.carried, t.state.carried)
    )
    mask = replace(t.mask, keep=scaling.rewrite(t.mask.keep), full=scaling.scaled(t.mask.full))
    return Terms(scaling.scaled(t.score), mask, replace(new, carried=lifts), t.handed(scaling.rewrite))


class _Scaling:
    """Rewrites terms while the `bounds` among the carried scalars are held in units of log₂."""

    def __init__(self, bounds: frozenset[str]) -> None:
        self.bounds = bounds

    def is_bound(self, e: Expr) -> bool:
        return e.op == "load" and str(e.attr).removeprefix(OLD) in self.bounds

    def reads_bound(self, e: Expr) -> bool:
        return any(self.is_bound(x) for x in ex.loads(e))

    def rewrite(self, root: Expr) -> Expr:
        """The term over scaled bounds: exponentials that subtract one go to base 2, other reads are scaled back."""
        memo: dict[Expr, Expr] = {}
        for e in ex.walk(root):
            args = tuple(memo[a] for a in e.args)
            if self.is_bound(e):
                memo[e] = e * LN2
            elif e.op == "exp" and self.reads_bound(e):
                memo[e] = ex.unary("exp2", self.scaled(e.args[0]))
            elif e.op == "eq" and e.args[1].is_const and math.isinf(e.args[1].value):
                # infinite before and after
                memo[e] = ex.equal(self.scaled(e.args[0]) if self.reads_bound(e.args[0]) else args[0], e.args[1])
            else:
                memo[e] = e if args == e.args else ex.make(e.op, args, e.attr, e.dtype)
        return memo[root]

    def scaled(self, root: Expr) -> Expr:
        """The term times log₂e, with the factor moved to where a constant takes it up."""
        memo: dict[Expr, Expr] = {}
        for e in ex.walk(root):
            memo[e] = self._scaled(e, memo)
        return memo[root]

    def _scaled(self, e: Expr, memo: Mapping[Expr, Expr]) -> Expr:
        if not e.is_float:
            return e
        args = [memo[a] for a in e.args]
        match e.op:
            case "const":
                return e if abs(float(e.value)) >= UNSCALED else ex.const(float(e.value) * LOG2E, "f32")
            case "load" if self.is_bound(e):
                return e
            case "add" | "sub" | "max" | "min" | "neg":
                return ex.make(e.op, tuple(args), None, e.dtype)
            case "where":
                return ex.where(self.rewrite(e.args[0]), args[1], args[2])
            case "cast" if e.args[0].is_float:
                return args[0]
            case "mul" if e.args[1].is_const:
                return self.rewrite(e.args[0]) * ex.const(float(e.args[1].value) * LOG2E, "f32")
            case "mul" if e.args[0].is_const:
                return self.rewrite(e.args[1]) * ex.const(float(e.args[0].value) * LOG2E, "f32")
            case "div" if e.args[1].is_const:
                return self.rewrite(e.args[0]) * ex.const(LOG2E / float(e.args[1].value), "f32")
        return self.rewrite(e) * LOG2E
