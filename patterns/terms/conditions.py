"""Normal form of conditions and choices, so that a mask reads the same however it was spelled.

    1 − f32(c)  →  where(c, 0, 1)      where(c, 0, 1)·k  →  where(c, 0, k)      (where(c, 1, 0) = 0)  →  ¬c

Operations with numbers move inside choices, casts of predicates become choices, negations move to the leaves. Every
rule keeps the value of the term, NaN and infinity included, the sign of a zero aside.
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import expr as ex
from ..expr import FALSE, TRUE, Expr
from .intervals import spans

# A constant that a score is replaced by, or that it gets added, counts as a fill at or below this.
FILL = -1e3

_FLIP = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_MIRROR = {"gt": "lt", "ge": "le"}
_BACK = {**_MIRROR, **{v: k for k, v in _MIRROR.items()}}


def normal(root: Expr) -> Expr:
    """An equal term in normal form."""
    return ex.rebuild(root, _normal)


def _normal(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
    match e.op:
        case "cast":
            return _normal_cast(args[0], e.dtype)
        case "where":
            return _normal_where(args[0], args[1], args[2], e.dtype)
        case "not" if e.dtype == "b1":
            return negated(args[0])
        case "const" | "index" | "symbol" | "load":
            return None
    return _pushed(e.op, args)


def _normal_cast(x: Expr, dtype: str) -> Expr:
    if dtype == "b1":
        return x if x.dtype == "b1" else _pushed("ne", (x, ex.const(0, x.dtype)))
    if x.dtype == "b1":
        return ex.where(x, ex.const(1, dtype), ex.const(0, dtype))
    if _is_choice(x):
        return ex.where(x.args[0], ex.cast(x.args[1], dtype), ex.cast(x.args[2], dtype))
    return ex.cast(x, dtype)


def _normal_where(cond: Expr, a: Expr, b: Expr, dtype: str) -> Expr:
    a, b = ex.cast(a, dtype), ex.cast(b, dtype)
    if dtype == "b1":
        return _choose(cond, a, b)
    # where(x ≠ k, a, x) = where(x ≠ k, a, k)
    if cond.op == "ne" and b is cond.args[0] and cond.args[1].is_const:
        b = ex.cast(cond.args[1], dtype)
    if cond.op == "eq" and a is cond.args[0] and cond.args[1].is_const:
        a = ex.cast(cond.args[1], dtype)
    if a.op == "where" and a.args[0] is cond:
        a = a.args[1]
    if b.op == "where" and b.args[0] is cond:
        b = b.args[2]
    return ex.where(cond, a, b)


def _choose(cond: Expr, a: Expr, b: Expr) -> Expr:
    """A choice between predicates, by `and` and `or`."""
    if a is TRUE:
        return cond | b
    if a is FALSE:
        return negated(cond) & b
    if b is TRUE:
        return negated(cond) | a
    if b is FALSE:
        return cond & a
    return ex.where(cond, a, b)


def _is_choice(e: Expr) -> bool:
    return e.op == "where" and (constant(e.args[1]) is not None or constant(e.args[2]) is not None)


def _is_flag(e: Expr) -> bool:
    """`where(c, 1, 0)`"""
    return e.op == "where" and constant(e.args[1]) == 1 and constant(e.args[2]) == 0


def _pushed(op: str, args: tuple[Expr, ...]) -> Expr:
    """Build `op(args)`, moved inside a choice when its other operand is a number."""
    if len(args) == 1:
        if not _is_choice(args[0]):
            return ex.unary(op, args[0])
        cond, a, b = args[0].args
        return _rechoose(cond, ex.unary(op, a), ex.unary(op, b))
    x, y = args
    if op == "sub" and _is_choice(y) and y.is_float:
        return _pushed("add", (x, _pushed("neg", (y,))))
    if _is_flag(x) and _is_flag(y) and op in ("mul", "min", "max"):
        cond = x.args[0] | y.args[0] if op == "max" else x.args[0] & y.args[0]
        dtype = ex.promote(x.dtype, y.dtype)
        return ex.where(cond, ex.const(1, dtype), ex.const(0, dtype))
    if x.op == "where" and y.op == "where" and x.args[0] is y.args[0]:
        return _rechoose(x.args[0], _pushed(op, (x.args[1], y.args[1])), _pushed(op, (x.args[2], y.args[2])))
    if _is_choice(x) and constant(y) is not None:
        return _rechoose(x.args[0], _pushed(op, (x.args[1], y)), _pushed(op, (x.args[2], y)))
    if _is_choice(y) and constant(x) is not None:
        return _rechoose(y.args[0], _pushed(op, (x, y.args[1])), _pushed(op, (x, y.args[2])))
    if op in _MIRROR:
        return ex.binary(_MIRROR[op], y, x)
    return ex.binary(op, x, y)


def _rechoose(cond: Expr, a: Expr, b: Expr) -> Expr:
    return _choose(cond, a, b) if a.dtype == b.dtype == "b1" else ex.where(cond, a, b)


def negated(e: Expr) -> Expr:
    """`¬e`, moved to the leaves; comparisons turn only between integers, where there is no NaN."""
    if e.dtype != "b1":
        return ex.unary("not", e)
    if e.op in _FLIP and (e.op in ("eq", "ne") or not any(a.is_float for a in e.args)):
        op = _FLIP[e.op]
        return ex.binary(_MIRROR[op], e.args[1], e.args[0]) if op in _MIRROR else ex.binary(op, *e.args)
    if e.op == "and":
        return negated(e.args[0]) | negated(e.args[1])
    if e.op == "or":
        return negated(e.args[0]) & negated(e.args[1])
    return ex.unary("not", e)


def conjuncts(e: Expr) -> tuple[Expr, ...]:
    """The distinct terms whose conjunction a predicate is."""
    out: dict[Expr, None] = {}
    stack = [e]
    while stack:
        x = stack.pop()
        if x.op == "and" and x.dtype == "b1":
            stack.extend(reversed(x.args))
        elif x is not TRUE:
            out[x] = None
    return tuple(out)


def conjunction(terms: tuple[Expr, ...]) -> Expr:
    out = TRUE
    for t in terms:
        out = out & t
    return out


def simplify_under(term: Expr, facts: Mapping[Expr, bool]) -> Expr:
    """The term where the given predicates have the given values; what they imply directly is used as well."""
    known: dict[Expr, Expr] = {}
    stack = list(facts.items())
    while stack:
        e, value = stack.pop()
        if e in known or e.is_const:
            continue
        known[e] = TRUE if value else FALSE
        if e.op in _BACK:
            stack.append((ex.binary(_BACK[e.op], e.args[1], e.args[0]), value))
        if e.op == "not" and e.dtype == "b1":
            stack.append((e.args[0], not value))
        elif e.op == ("and" if value else "or") and e.dtype == "b1":
            stack.extend((a, value) for a in e.args)
        else:
            stack.append((negated(e), not value))
    return ex.substitute(term, known)


def constant(e: Expr) -> float | None:
    """The value of a term without coordinates, loads or sizes, as an upper bound where a cast rounds it."""
    if e.op == "const":
        return float(e.value)
    if e.ranks or e.op in ("index", "symbol", "load") or any(a.op in ("symbol", "load") for a in ex.walk(e)):
        return None
    return float(spans(e, {})[1])
