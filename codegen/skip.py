"""May a masked element be left out? Proved on the row program by interval analysis, not assumed of softmax.

    an element of score x changes nothing  ⇔  each lift is its reduction's identity and the weight is 0

A row state that subtracts a running bound needs a kept key for that (beside −∞ it is guarded and needs none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..patterns import expr as ex
from ..patterns.expr import Expr
from ..patterns.intervals import Span, spans
from ..patterns.masks import VANISHING, Mask
from ..patterns.rowstate import RowState

# Largest magnitude of a finite score that the proofs allow; fills lie far beyond it.
FINITE = 1e29
# Weights beyond this are not cast to float16.
HALF = 6e4
_SCORE = "$score"


def vanishes(state: RowState, score: Expr, lo: float, hi: float) -> bool:
    """Does an element whose score lies in [lo, hi] change nothing in a row whose bounds are finite?"""
    for c in state.carried:
        low, high = _span(_opened(c.lift), state, _opened(score), lo, hi)
        idle = {
            "add": low == high == 0.0, "max": high <= -FINITE, "min": low >= FINITE, "mul": low == high == 1.0,
        }.get(c.op, False)  # fmt: skip
        if not idle:
            return False
    return _span(_opened(state.weight), state, _opened(score), lo, hi) == (0.0, 0.0)


def _opened(root: Expr) -> Expr:
    """Bounded functions by the exponentials that they are of, exact where these vanish.

    sigmoid(x) = exp(x) / (1 + exp(x))        softplus(x) = log(1 + exp(x))
    """

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op == "sigmoid":
            return ex.exp(args[0]) / (1.0 + ex.exp(args[0]))
        return ex.unary("log1p", ex.exp(args[0])) if e.op == "softplus" else None

    return ex.rebuild(root, rule)


def fits_half(state: RowState, score: Expr) -> bool:
    """Do the weights stay inside float16: bounded functions, or exponentials of a score minus a bound of the row?"""
    weight = state.weight
    while weight.op in ("where", "cast"):
        weight = weight.args[-1] if weight.op == "cast" or weight.args[1].is_const else weight.args[1]
    if weight.op in ("exp", "exp2") and state.correction is not None:
        return True
    low, high = _span(state.weight, state, score, -FINITE, FINITE)
    return low >= -HALF and high <= HALF


def _span(e: Expr, state: RowState, score: Expr, lo: float, hi: float) -> tuple[float, float]:
    """The range of a term while the score lies in [lo, hi] and the row's bounds are finite."""
    ops = {c.name: c.op for c in state.carried}

    def bounds(name: str, box: Sequence[Span]) -> Span | None:
        if name == _SCORE:
            return np.float64(lo), np.float64(hi)
        if ops.get(name) in ("max", "min"):
            return np.float64(-FINITE), np.float64(FINITE)
        return None

    e = ex.substitute(e, {score: ex.load(_SCORE, (), score.dtype)})
    e = ex.substitute(e, {ex.symbol(n): ex.index(f"${n}") for n in ex.symbols(e)})
    low, high = spans(e, {r: (np.float64(0), np.float64(2**24)) for r in e.ranks}, bounds=bounds)
    return float(np.min(low)), float(np.max(high))


def null(state: RowState, score: Expr) -> float | None:
    """A score that stands for "no key here": −∞ or 0, or None where neither is neutral."""
    return next((x for x in (-math.inf, 0.0) if vanishes(state, score, x, x)), None)


def rule(state: RowState, score: Expr, mask: Mask) -> str:
    """Which empty tiles a kernel may skip.

    "always"; "guarded": only in row blocks all of whose rows keep a key; "never".
    """
    if mask.keep is ex.TRUE:
        return "never"
    for fill in mask.fills:
        # Finite terms may have been added to the fill.
        reach = (fill, fill) if math.isinf(fill) else (-math.inf, fill / 2) if fill <= VANISHING else (fill, fill)
        if not vanishes(state, score, *reach):
            return "never"
    bound = {c.name for c in state.carried if c.op in ("max", "min")}
    leans = any(str(x.attr) in bound for e in (state.weight, *(c.lift for c in state.carried)) for x in ex.loads(e))
    return "guarded" if leans and any(f != -math.inf for f in mask.fills) else "always"
