"""May a masked element be left out? Proved on the row program by interval analysis, not assumed of softmax.

    an element of score x changes nothing  ⇔  each lift is its reduction's identity and the weight is 0

A row state that subtracts a running bound needs a kept key for that (beside −∞ it is guarded and needs none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np

from ...patterns import expr as ex
from ...patterns.attention.rowstate import RowState
from ...patterns.expr import Expr
from ...patterns.masks.split import VANISHING, Mask
from ...patterns.operators import OPERATORS, facts, named
from ...patterns.terms.conditions import conjuncts, negated, simplify_under
from ...patterns.terms.intervals import Span, spans
from .terms import mapped_elements

# Largest magnitude of a finite score that the proofs allow; fills lie far beyond it.
FINITE = 1e29
# Weights beyond this are not cast to float16.
HALF_MOST = 6e4
_SCORE = "$score"
_OPENED = named(lambda o: o.positive and not o.law and callable(o.algebra))
_TERMS = SimpleNamespace(
    **{o.algebra: partial(ex.unary, o.name) for o in OPERATORS.values() if isinstance(o.algebra, str) and o.arity == 1}
)


def vanishes(state: RowState, score: Expr, key: str, lo: float, hi: float) -> bool:
    """Does an element whose score lies in [lo, hi] change nothing in a row whose bounds are finite?"""
    return _idle(mapped_elements(state, lambda e: _in_range(_opened(e), _opened(score), lo, hi)), key, lo, hi)


def _idle(state: RowState, key: str, lo: float = 0.0, hi: float = 0.0) -> bool:
    """Is every lift the identity and the weight 0, whatever the tensors hold that vary over the key?"""
    for c in state.carried:
        low, high = _span(c.lift, state, key, lo, hi)
        idle = {"add": low == high == 0.0, "max": high <= -FINITE, "min": low >= FINITE}.get(c.op, False)
        if not idle:
            return False
    return _span(state.weight, state, key, lo, hi) == (0.0, 0.0)


def predicate(state: RowState, score: Expr, key: str) -> Expr:
    """A mask that is applied outside the score, as in `where(keep, w, 0)`: what an element needs to count at all."""
    terms = (score, state.weight, *(c.lift for c in state.carried))
    conditions = {t.args[0] for t in ex.walk(*terms) if t.op == "where" and key in t.args[0].ranks}
    keep = ex.TRUE
    for cond in sorted((x for c in conditions for x in (c, negated(c))), key=str):
        dropped = mapped_elements(state, lambda e, cond=cond: simplify_under(e, {cond: False}))  # type: ignore[misc]
        if not cond.is_const and _idle(dropped, key):
            keep = keep & cond
    return keep


def _opened(root: Expr) -> Expr:
    """Positive functions that are made of exponentials by these, exact where they vanish: softplus(x) = log(1 + exp(x)).

    The table's formulas are over sympy; here terms stand for it.
    """

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op not in _OPENED:
            return None
        made = facts(e.op).in_algebra(_TERMS)
        assert made is not None
        term: Expr = made(*args)
        return term

    return ex.rebuild(root, rule)


def fits_half(state: RowState, score: Expr, key: str) -> bool:
    """Do the weights stay inside float16: bounded functions, or exponentials of a score minus a bound of the row?"""
    weight = state.weight
    while weight.op in ("where", "cast"):
        weight = weight.args[-1] if weight.op == "cast" or weight.args[1].is_const else weight.args[1]
    if facts(weight.op).law == "exponential" and state.correction is not None:
        return True
    low, high = _span(_in_range(state.weight, score, -FINITE, FINITE), state, key, -FINITE, FINITE)
    return low >= -HALF_MOST and high <= HALF_MOST


def _in_range(e: Expr, score: Expr, lo: float, hi: float) -> Expr:
    """The term over a score of which only the range is known."""
    known = ex.const(lo, score.dtype) if lo == hi else ex.load(_SCORE, (), score.dtype)
    return ex.substitute(e, {score: known})


def _span(e: Expr, state: RowState, key: str, lo: float, hi: float) -> tuple[float, float]:
    """The range of a term while `_SCORE` lies in [lo, hi] and what belongs to the row is finite."""
    ops = {c.name: c.op for c in state.carried}
    of_row = {str(x.attr) for x in ex.loads(e) if key not in x.ranks and ops.get(str(x.attr)) != "add"}

    def of_load(name: str, box: Sequence[Span]) -> Span | None:
        if name == _SCORE:
            return np.float64(lo), np.float64(hi)
        return (np.float64(-FINITE), np.float64(FINITE)) if name in of_row else None

    e = ex.substitute(e, {ex.symbol(n): ex.index(f"${n}") for n in ex.symbols(e)})
    low, high = spans(e, {r: (np.float64(0), np.float64(2**24)) for r in e.ranks}, of_load=of_load)
    return float(np.min(low)), float(np.max(high))


def null(state: RowState, score: Expr, key: str) -> float | None:
    """A score that stands for "no key here": −∞ or 0, or None where neither is neutral."""
    return next((x for x in (-math.inf, 0.0) if vanishes(state, score, key, x, x)), None)


def rule(state: RowState, score: Expr, mask: Mask, key: str) -> str:
    """Which empty tiles a kernel may skip.

    "always"; "guarded": only in row blocks all of whose rows keep a key; "never".
    """
    if mask.keep is ex.TRUE:
        return "never"
    for fill in mask.fills:
        if not vanishes(state, score, key, *_reach(fill)):
            return "never"
    bound = {c.name for c in state.carried if c.op in ("max", "min")}
    leans = any(str(x.attr) in bound for e in (state.weight, *(c.lift for c in state.carried)) for x in ex.loads(e))
    return "guarded" if leans and any(f != -math.inf for f in mask.fills) else "always"


def vanishes_backwards(terms: Sequence[Expr], keep: Expr, bound: float = FINITE) -> bool:
    """Are all terms, a weight and the gradients of scores, 0 at every key that the mask hides?

    Whatever floats up to `bound` they read.
    """
    return all(_nothing(_opened(simplify_under(e, {part: False})), bound) for part in conjuncts(keep) for e in terms)


def _reach(fill: float) -> tuple[float, float]:
    """Scores that a fill leaves: finite terms may have been added to it."""
    return (fill, fill) if math.isinf(fill) or fill > VANISHING else (-math.inf, fill / 2)


def idle_without_a_key(terms: Sequence[Expr], scalars: Sequence[Expr]) -> bool:
    """Are all terms 0 in a row without a key, or read nothing of the row? What is of the row may be no number there."""
    empty = {ex.equal(x, -math.inf): True for x in scalars}
    return not any(x in ex.loads(simplify_under(e, empty)) for e in terms for x in scalars)


def _nothing(e: Expr, bound: float) -> bool:
    """Is a term 0, whatever floats it reads?"""
    finite = {str(x.attr) for x in ex.loads(e) if x.is_float}

    def of_load(name: str, box: Sequence[Span]) -> Span | None:
        return (np.float64(-bound), np.float64(bound)) if name in finite else None

    e = ex.substitute(e, {ex.symbol(n): ex.index(f"${n}") for n in ex.symbols(e)})
    low, high = spans(e, {r: (np.float64(0), np.float64(2**24)) for r in e.ranks}, of_load=of_load)
    return float(np.min(low)) == 0.0 == float(np.max(high))
