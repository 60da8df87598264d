"""Scores that SDPA can express, and row rules that are its softmax up to how the row ends.

    score = scale · QK + added          lift = exp(score − d̂), weight = the same          out = finish(N, max, sum)

torch's kernel gives o = N / sum and lse = max + log sum. The end of the row is computed from these by max := lse,
sum := exp(lse − d̂), N := o · sum: a finish that depends on the scores through N and the sums alone cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.rowstate import RowState
from ...patterns.attention.separate import DROWNS
from ...patterns.expr import Expr
from ...patterns.terms.constant import number, tries
from .terms import uncast

# Added to any finite score in float32 it leaves itself: a fill at or below this may as well be added.
ABSORBS = -1e30
# From here on float32 loses the logarithm of a number of keys beside a score.
FILLED = -DROWNS


@dataclass(frozen=True)
class Scaled:
    """`score = scale · product + added`; `added` is None where nothing is."""

    scale: Expr
    added: Expr | None


def scaled(score: Expr, product: str, absorbs: float = ABSORBS) -> Scaled | str:
    """The score as a multiple of the product plus a term, or the part that makes it something else.

    A fill of at most `absorbs` in the place of the score may as well be added to it.
    """
    parts: dict[Expr, tuple[Expr, Expr]] = {}
    zero, one = ex.const(0.0), ex.const(1.0)
    for e in ex.walk(score):
        if e.op == "load" and str(e.attr) == product:
            parts[e] = (one, zero)
            continue
        used = [parts[a] for a in e.args]
        if all(_zero(s) for s, _ in used):
            parts[e] = (zero, e)
            continue
        found = _linear(e, used, absorbs)
        if found is None:
            return f"the score is no multiple of the product plus a term: {_short(e)}"
        parts[e] = found
    scale, rest = parts[score]
    return Scaled(scale, None if _zero(rest) else rest)


def _zero(e: Expr) -> bool:
    return e.is_const and e.value == 0 and not isinstance(e.value, bool)


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) <= 120 else text[:117] + "…"


def _linear(e: Expr, args: list[tuple[Expr, Expr]], absorbs: float) -> tuple[Expr, Expr] | None:
    match e.op:
        case "cast" if e.is_float:
            return args[0]
        case "neg":
            return -args[0][0], -args[0][1]
        case "add" | "sub":
            return _joined(e.op, args[0][0], args[1][0]), _joined(e.op, args[0][1], args[1][1])
        case "mul" if _zero(args[0][0]) or _zero(args[1][0]):
            (s, t), (_, factor) = args if _zero(args[1][0]) else args[::-1]
            return s * factor, _times(t, factor, "mul")
        case "div" if _zero(args[1][0]):
            return args[0][0] / args[1][1], _times(args[0][1], args[1][1], "div")
        case "where" if _zero(args[0][0]):
            return _chosen(args, absorbs)
        case "max" if _zero(args[1][0]) and _absorbs(args[1][1], ABSORBS):
            # max(s + fill, lowest): what was filled is at most `lowest`, everything else is above it
            return args[0][0], ex.maximum(ex.cast(args[0][1], "f32"), ex.cast(args[1][1], "f32"))
    return None


def _joined(op: str, a: Expr, b: Expr) -> Expr:
    if _zero(b):
        return a
    return (b if op == "add" else -b) if _zero(a) else ex.binary(op, a, b)


def _times(t: Expr, factor: Expr, op: str) -> Expr:
    return t if _zero(t) else ex.binary(op, t, factor)


def _chosen(args: list[tuple[Expr, Expr]], absorbs: float) -> tuple[Expr, Expr] | None:
    """where(c, s·QK + a, fill) = s·QK + where(c, a, fill) for a fill that absorbs the score."""
    (_, cond), (s, a), (t, b) = args
    if s is t:
        return s, ex.where(cond, a, b)
    if _zero(t) and _absorbs(b, absorbs):
        return s, ex.where(cond, a, b)
    if _zero(s) and _absorbs(a, absorbs):
        return t, ex.where(cond, a, b)
    return None


def _absorbs(e: Expr, most: float) -> bool:
    e = uncast(e)
    return e.is_const and float(e.value) <= most


# --- the end of a softmax row -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How rows end after SDPA: `empty` for rows without a key; `finish` over o, lse (None: the output is o).

    `counts`: a row of fills so large that its log-sum-exp is one of them ends by how many they are; `lse` does not tell.
    """

    empty: float
    finish: Expr | None
    counts: bool = False


def ending(a: Attention, state: RowState) -> Ending | str:
    """The end of the row in terms of SDPA's output `o` and log-sum-exp `lse`, or why the row rule is no softmax."""
    tops = [c for c in state.carried if c.op == "max" and uncast(c.lift) is uncast(a.score)]
    sums = [c for c in state.carried if c.op == "add" and c.correction is not None]
    if len(tops) != 1 or len(sums) != 1 or len(state.carried) != 2:
        return "the row rule is no softmax: it does not carry a maximum of the score and one sum of exponentials"
    top, total = tops[0], sums[0]
    weight = uncast(state.weight)
    if weight is not uncast(total.lift):
        return "the row rule is no softmax: its weight is not what it sums"
    if weight.op != "exp" or weight.args[0].op != "sub" or uncast(weight.args[0].args[0]) is not uncast(a.score):
        return "the row rule is no softmax: it does not sum exp(score − bound)"
    bound = weight.args[0].args[1]
    loads = {str(x.attr): x for x in ex.loads(state.finish)}
    at_row = next((x for x in ex.loads(weight) if str(x.attr) == top.name), None)
    if at_row is None:
        return "the row rule is no softmax: its bound is not the maximum of the score"
    o = ex.load("o", (), a.contraction.body.dtype)
    lse = ex.load("lse", (), at_row.dtype)
    mass = ex.exp(lse - ex.substitute(bound, {at_row: lse}))
    n, s, g = loads.get(a.contraction.out.tensor), loads.get(total.name), loads.get(top.name, at_row)
    if n is None or s is None:
        return "the row ends without its sum: no softmax"
    plain_end = uncast(state.finish)
    if plain_end.op == "div" and uncast(plain_end.args[0]) is n and uncast(plain_end.args[1]) is s:
        return Ending(math.nan, None)
    if _zero_for_empty(plain_end, n, s, g):
        return Ending(0.0, None)
    rng = np.random.default_rng(7)
    if not _blind(state.finish, n, s, g, bound, at_row, [rng.normal(size=5) * 3 for _ in range(8)]):
        return "the end of the row depends on its maximum itself"
    counts = not _blind(state.finish, n, s, g, bound, at_row, [np.full(5, -(2.0**100))])
    return Ending(0.0, ex.substitute(state.finish, {n: o * mass, s: mass, g: lse}), counts)


def _zero_for_empty(e: Expr, n: Expr, s: Expr, g: Expr) -> bool:
    """where(max = −∞, 0, N / sum)"""
    if e.op != "where" or e.args[0] is not ex.equal(g, -math.inf):
        return False
    rest = uncast(e.args[2])
    return _zero(uncast(e.args[1])) and rest.op == "div" and uncast(rest.args[0]) is n and uncast(rest.args[1]) is s


def _blind(
    finish: Expr, n: Expr, s: Expr, g: Expr, bound: Expr, at_row: Expr, rows: Sequence[np.ndarray[Any, Any]]
) -> bool:
    """Is the end the same from (N, sum, max) and from (o · mass, mass, lse)? Tested on rows of scores."""
    rng = np.random.default_rng(7)
    loads = {str(x.attr) for t in (finish, bound) for x in ex.loads(t)}
    names = loads - {str(x.attr) for x in (n, s, g)}
    # coordinates and sizes
    (open_, *_) = tries((finish, bound), {}, loads)
    for scores in rows:
        values = rng.normal(size=5)
        others: dict[str, object] = {x: rng.normal() for x in sorted(names)}
        top = scores.max()
        parts = np.exp(scores - number(bound, {**others, str(at_row.attr): top}, open_))
        direct = number(finish, {**others, str(n.attr): parts @ values, str(s.attr): parts.sum(), str(g.attr): top}, open_)
        shares = np.exp(scores - top)
        lse, o = np.log(shares.sum()) + top, shares @ values / shares.sum()
        mass = np.exp(lse - number(bound, {**others, str(at_row.attr): lse}, open_))
        again = number(finish, {**others, str(n.attr): o * mass, str(s.attr): mass, str(g.attr): lse}, open_)
        if not np.allclose(direct, again, rtol=1e-9, atol=1e-12):
            return False
    return True
