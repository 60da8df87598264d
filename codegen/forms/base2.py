"""Exponentials in base 2: `exp(s − d) = exp2(s·log₂e − d·log₂e)`, with log₂e folded into the score's own scale.

    before   S = QK·0.125;          M = max S;          w = exp(S − M)
    after    S = QK·0.125·log₂e;    M = max S;          w = exp2(S − M)        M is carried in units of log₂

Saves two operations an element. Then factors are gathered, over casts that a kernel in float32 does not make:
`bf16(QK)·bf16(0.125)·log₂e` has one, and a division by a number is none. Fill values stay as written: a scaled finfo.min
would overflow to −∞ and change what rows without a key yield; where a tensor is added to the score (it may hold fills) the
score is left alone and the difference is scaled, `exp2((S − M)·log₂e)`. For operands of 16 bits, which what is lost here
(2⁻¹³ of a weight) does not show beside: `tanh(x)·c = c − 2c / (exp2(2·log₂e·x) + 1)`.
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
# Caps, in units of log₂, up to which a soft-cap's error is 2⁻¹³ of a weight.
LARGEST_CAP = 256.0


def in_base2(t: Terms, key: str, products: frozenset[Expr]) -> Terms:
    """The terms with exponentials in base 2, or as they are where no bound is subtracted."""
    carried = {c.name for c in t.state.carried if c.op in ("max", "min")}
    bounds = {
        str(x.attr)
        for e in (t.state.weight, *(c.lift for c in t.state.carried))
        for y in ex.walk(e)
        if y.op == "exp"
        for x in ex.loads(y)
        if str(x.attr) in carried
    }
    if not bounds:
        return t
    if any(x.is_float and key in x.ranks and x not in products for x in ex.loads(t.score)):
        return replace(t, state=mapped_state(t.state, lambda e: _differences(e, frozenset(bounds))))
    filled = any(UNSCALED <= abs(float(x.value)) < math.inf for x in ex.walk(t.score) if x.is_const and x.is_float)
    scaling = _Scaling(frozenset(bounds), key, filled)
    new = mapped_state(t.state, scaling.rewrite)
    lifts = tuple(
        replace(c, lift=scaling.scaled(o.lift)) if c.name in bounds else c for c, o in zip(new.carried, t.state.carried)
    )
    mask = replace(t.mask, keep=scaling.rewrite(t.mask.keep), full=scaling.scaled(t.mask.full))
    return Terms(scaling.scaled(t.score), mask, replace(new, carried=lifts), t.handed(scaling.rewrite))


# --- factors ----------------------------------------------------------------------------------------------------


def one_factor(t: Terms) -> Terms:
    """The terms with the numbers of every product in one; what reads the score goes on reading it."""
    score, hole = gathered(t.score), ex.load("$score", (), t.score.dtype)

    def around(e: Expr) -> Expr:
        return ex.substitute(gathered(ex.substitute(e, {t.score: hole})), {hole: score})

    mask = replace(t.mask, keep=around(t.mask.keep), full=gathered(t.mask.full))
    return Terms(score, mask, mapped_state(t.state, around), t.handed(around))


def gathered(root: Expr) -> Expr:
    """The float term in float32, with one factor where numbers follow one another: (x·2 / 8)·log₂e = x·0.36."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if not e.is_float:
            return None
        if e.op == "const":
            return ex.const(float(e.value), "f32")
        if e.op == "cast" and args[0].is_float:
            return args[0]
        if e.op == "div" and args[1].is_const and _divides(float(args[1].value)):
            return _times(args[0], 1.0 / float(args[1].value))
        if e.op == "mul":
            number, rest = (args[1], args[0]) if args[1].is_const else args
            return _times(rest, float(number.value)) if number.is_const else None
        return _sum(*args) if e.op == "add" else None

    return ex.rebuild(ex.rebuild(root, rule), _capped)


def _capped(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
    """A soft-cap by one exponential; off by 2⁻²¹ of its cap, which must not be large."""
    if e.op != "mul" or args[0].op != "tanh" or not args[1].is_const or abs(float(args[1].value)) > LARGEST_CAP:
        return None
    root = ex.unary("rsqrt", ex.unary("exp2", _times(args[0].args[0], 2 * LOG2E)) + ex.const(1.0, "f32"))
    return (ex.const(1.0, "f32") - root * root * ex.const(2.0, "f32")) * args[1]


def _sum(a: Expr, b: Expr) -> Expr | None:
    """x·c + (row·k)·y = (x + (row·k/c)·y)·c: the sum has a factor as its first part has."""
    factored = positive_factor(a)
    if factored is None or b.op != "mul" or b.args[0].op != "mul" or not b.args[0].args[1].is_const:
        return None
    x, c = factored
    row, k = b.args[0].args
    return _times(x + row * ex.const(float(k.value) / float(c.value), "f32") * b.args[1], float(c.value))


def _divides(x: float) -> bool:
    return x != 0 and math.isfinite(x) and 1e-30 < abs(x) < 1e30


def _times(e: Expr, factor: float) -> Expr:
    """The term times a number, together with the one that it has."""
    if e.op == "mul" and e.args[1].is_const and _divides(float(e.args[1].value) * factor):
        return _times(e.args[0], float(e.args[1].value) * factor)
    return e * ex.const(factor, "f32")


def positive_factor(e: Expr) -> tuple[Expr, Expr] | None:
    """(u, c) where a term is u·c with a number c > 0: a maximum commutes with it. None where there is none."""
    if e.op != "mul" or not e.args[1].is_const or not 0 < float(e.args[1].value) < math.inf:
        return None
    return e.args[0], e.args[1]


# --- base 2 -----------------------------------------------------------------------------------------------------


def _differences(root: Expr, bounds: frozenset[str]) -> Expr:
    """Exponentials that subtract a bound in base 2, of differences in the model's own units."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op == "exp" and any(str(x.attr).removeprefix(OLD) in bounds for x in ex.loads(e)):
            return ex.unary("exp2", args[0] * ex.const(LOG2E, "f32"))
        return None

    return ex.rebuild(root, rule)


class _Scaling:
    """Rewrites terms while the `bounds` among the carried scalars are held in units of log₂."""

    def __init__(self, bounds: frozenset[str], key: str, filled: bool) -> None:
        self.bounds, self.key, self.filled = bounds, key, filled

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
                # the bound of a row of fills is a fill, which was not scaled
                memo[e] = ex.where(ex.unary("abs", e) >= UNSCALED, e, e * LN2) if self.filled else e * LN2
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
            case "mul" if any(self.key not in a.ranks for a in e.args):
                # a number of the row takes it up, once for all keys
                row, rest = e.args if self.key not in e.args[0].ranks else reversed(e.args)
                return self.rewrite(row) * ex.const(LOG2E, "f32") * self.rewrite(rest)
        return self.rewrite(e) * LOG2E
