"""What of a gradient that reaches an operator's result reaches each operand: one row an operator, as autograd has it.

    RULES[op][i](d, y, *operands)      y = op(*operands), d the gradient of y; the gradient of operand i

No operand: a staircase or a truth, which passes nothing on. An operator that is not here has no derivative in torch either.
Selections select and never multiply by 0, so that NaN and ∞ stay where autograd leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from .. import expr as ex
from ..expr import Expr
from ..operators import named

Rule: TypeAlias = Callable[..., Expr]


def _larger(d: Expr, a: Expr, b: Expr, clamp: bool) -> Expr:
    """What reaches a of max(a, b): at a tie all of it in a clamp, else half."""
    if clamp:
        return ex.where(a >= b, d, 0.0)
    return ex.where(ex.equal(a, b), d * 0.5, ex.where(a < b, 0.0, d))


def _smaller(d: Expr, a: Expr, b: Expr, clamp: bool) -> Expr:
    if clamp:
        return ex.where(a <= b, d, 0.0)
    return ex.where(ex.equal(a, b), d * 0.5, ex.where(a > b, 0.0, d))


def _of_base(d: Expr, y: Expr, a: Expr, b: Expr) -> Expr:
    """b·aᵇ⁻¹, and nothing for b = 0."""
    slope = d * (b * ex.binary("pow", a, b - 1.0))
    return slope if b.is_const and b.value != 0.0 else ex.where(ex.equal(b, 0.0), 0.0, slope)


def _of_exponent(d: Expr, y: Expr, a: Expr, b: Expr) -> Expr:
    """aᵇ·log a, and nothing where 0 is raised to what is not negative."""
    return ex.where(ex.equal(a, 0.0) & (b >= 0.0), 0.0, d * (y * ex.unary("log", a)))


RULES: Mapping[str, tuple[Rule, ...]] = {
    # signs, steps and selections
    "neg": (lambda d, y, x: -d,),
    "abs": (lambda d, y, x: d * ex.unary("sign", x),),
    "relu": (lambda d, y, x: ex.where(y <= 0.0, 0.0, d),),
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "sign"), ()),
    **dict.fromkeys(named(lambda o: o.result == "truth"), ()),
    **dict.fromkeys(("not", "and", "or", "xor", "draw"), ()),
    # exponentials and logarithms
    "exp": (lambda d, y, x: d * y,),
    "exp2": (lambda d, y, x: d * y * math.log(2),),
    "expm1": (lambda d, y, x: d * (y + 1.0),),
    "log": (lambda d, y, x: d / x,),
    "log2": (lambda d, y, x: d / (x * math.log(2)),),
    "log10": (lambda d, y, x: d / (x * math.log(10)),),
    "log1p": (lambda d, y, x: d / (x + 1.0),),
    "asinh": (lambda d, y, x: d * ex.unary("rsqrt", x * x + 1.0),),
    # a line from 20 on, as in torch
    "softplus": (lambda d, y, x: ex.where(x > 20.0, d, d * ex.unary("sigmoid", x)),),
    # bounded curves
    "tanh": (lambda d, y, x: d * (1.0 - y * y),),
    "sigmoid": (lambda d, y, x: d * ((1.0 - y) * y),),
    "erf": (lambda d, y, x: d * (ex.exp(-(x * x)) * (2 / math.sqrt(math.pi))),),
    "atan": (lambda d, y, x: d / (x * x + 1.0),),
    "sin": (lambda d, y, x: d * ex.unary("cos", x),),
    "cos": (lambda d, y, x: d * -ex.unary("sin", x),),
    # roots and reciprocals
    "sqrt": (lambda d, y, x: d / (y * 2.0),),
    "rsqrt": (lambda d, y, x: d * (y * y * y * -0.5),),
    "reciprocal": (lambda d, y, x: d * -(y * y),),
    # arithmetic
    "add": (lambda d, y, a, b: d, lambda d, y, a, b: d),
    "sub": (lambda d, y, a, b: d, lambda d, y, a, b: -d),
    "mul": (lambda d, y, a, b: d * b, lambda d, y, a, b: d * a),
    "div": (lambda d, y, a, b: d / b, lambda d, y, a, b: -d * (y / b)),
    "mod": (lambda d, y, a, b: d, lambda d, y, a, b: -d * (a // b)),
    # lifting writes a clamp as max(x, number), torch.maximum of a number as max(number, x)
    "max": (lambda d, y, a, b: _larger(d, a, b, b.is_const), lambda d, y, a, b: _larger(d, b, a, False)),
    "min": (lambda d, y, a, b: _smaller(d, a, b, b.is_const), lambda d, y, a, b: _smaller(d, b, a, False)),
    "pow": (_of_base, _of_exponent),
    # choices between two values, and conversions
    "where": (
        lambda d, y, c, a, b: d,
        lambda d, y, c, a, b: ex.where(c, d, 0.0),
        lambda d, y, c, a, b: ex.where(c, 0.0, d),
    ),
    "cast": (lambda d, y, x: d,),
}
