"""Every function of floats in the table of operators, for the tests that run printed text."""

from __future__ import annotations

import math

from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.operators import OPERATORS


def functions(x: Expr) -> dict[str, Expr]:
    """Each function of one operand that yields a float, on `x` or, where it is not defined below 0, on 1.5 + |x|."""
    found = (o for o in OPERATORS.values() if o.arity == 1 and o.result != "truth" and o.name != "not")
    return {o.name: ex.unary(o.name, x if not math.isnan(o.fold(-2.0)) else ex.unary("abs", x) + 1.5) for o in found}
