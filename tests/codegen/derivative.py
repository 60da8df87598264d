"""Derivatives of terms: what a change of one sub-term does to a term, as a term, so that the same printers print it.

    derivative(score, product)  →  ∂ score / ∂ product, or None where the score does not depend on the product

Rules are one a slot: how much of a change d of that argument a node e passes on. Where a function has a corner, the rule is
one of its two slopes; where it is a staircase, 0. No rule multiplies by 0, so a masked infinity stays out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr

Rule = Callable[[Expr, Expr], Expr]


def _first(e: Expr) -> Expr:
    return e.args[0]


def _second(e: Expr) -> Expr:
    return e.args[1]


def _where(keep: Expr, d: Expr) -> Expr:
    """d where a condition holds, else nothing."""
    return ex.where(keep, d, 0.0)


def _sigmoid(x: Expr) -> Expr:
    return ex.unary("sigmoid", x)


def _power_base(e: Expr, d: Expr) -> Expr:
    """(xⁿ)′ = n·xⁿ⁻¹ by x"""
    return d * _second(e) * ex.binary("pow", _first(e), _second(e) - 1.0)


# What a node passes on of a change of each of its arguments; `where` of its two values, not of its condition.
RULES: Mapping[str, tuple[Rule, ...]] = {
    "cast": (lambda e, d: ex.cast(d, e.dtype),),
    "neg": (lambda e, d: -d,),
    "abs": (lambda e, d: d * ex.unary("sign", _first(e)),),
    "relu": (lambda e, d: _where(_first(e) > 0.0, d),),
    "exp": (lambda e, d: d * e,),
    "exp2": (lambda e, d: d * e * math.log(2),),
    "expm1": (lambda e, d: d * (e + 1.0),),
    "log": (lambda e, d: d / _first(e),),
    "log2": (lambda e, d: d / (_first(e) * math.log(2)),),
    "log10": (lambda e, d: d / (_first(e) * math.log(10)),),
    "log1p": (lambda e, d: d / (_first(e) + 1.0),),
    "asinh": (lambda e, d: d / ex.unary("sqrt", _first(e) * _first(e) + 1.0),),
    "atan": (lambda e, d: d / (_first(e) * _first(e) + 1.0),),
    "tanh": (lambda e, d: d * (1.0 - e * e),),
    "sigmoid": (lambda e, d: d * e * (1.0 - e),),
    # a line from 20 on, as in torch
    "softplus": (lambda e, d: ex.where(_first(e) > 20.0, d, d * _sigmoid(_first(e))),),
    "sqrt": (lambda e, d: d / (e * 2.0),),
    "rsqrt": (lambda e, d: d * e * e * e * -0.5,),
    "reciprocal": (lambda e, d: -(d * e * e),),
    "sin": (lambda e, d: d * ex.unary("cos", _first(e)),),
    "cos": (lambda e, d: -(d * ex.unary("sin", _first(e))),),
    "erf": (lambda e, d: d * ex.exp(-(_first(e) * _first(e))) * (2 / math.sqrt(math.pi)),),
    "add": (lambda e, d: d, lambda e, d: d),
    "sub": (lambda e, d: d, lambda e, d: -d),
    "mul": (lambda e, d: d * _second(e), lambda e, d: _first(e) * d),
    "div": (lambda e, d: d / _second(e), lambda e, d: -(d * e) / _second(e)),
    "mod": (lambda e, d: d, lambda e, d: -(d * ex.unary("floor", _first(e) / _second(e)))),
    "pow": (_power_base, lambda e, d: d * e * ex.unary("log", _first(e))),
    "max": (lambda e, d: _where(_first(e) > _second(e), d), lambda e, d: _where(_second(e) >= _first(e), d)),
    "min": (lambda e, d: _where(_first(e) < _second(e), d), lambda e, d: _where(_second(e) <= _first(e), d)),
    "where": (lambda e, d: _where(_first(e), d), lambda e, d: _where(ex.unary("not", _first(e)), d)),
}
# Constant between their jumps.
STAIRCASES = ("floor", "ceil", "round", "trunc", "sign", "floordiv")


def derivative(root: Expr, by: Expr) -> Expr | None:
    """∂ root / ∂ by, where `by` is a sub-term that stands for a number of its own; None: 0 everywhere."""
    known: dict[Expr, Expr | None] = {by: ex.const(1.0, by.dtype)}
    for e in ex.walk(root):
        if e not in known:
            known[e] = _passed(e, known)
    return known[root]


def _passed(e: Expr, known: Mapping[Expr, Expr | None]) -> Expr | None:
    """The sum over the arguments that change. Integers and truths change by jumps only."""
    if not e.is_float or e.op in STAIRCASES or e.op == "load":
        return None
    values = e.args[1:] if e.op == "where" else e.args
    changes = ((rule, known[a]) for rule, a in zip(RULES.get(e.op, ()), values))
    parts = [rule(e, d) for rule, d in changes if d is not None]
    return sum(parts[1:], parts[0]) if parts else None
