"""Divisions of coordinates that the ranges of ranks carry out: what a chain of views makes of a shifted row.

    (x // n)·n + x % n                                =  x
    (600·p + m − p + 300) // 600,  p < 300, m < 300   =  p                  because 1 ≤ m − p + 300 < 600
    (m − p + 299 ≥ 0)                                 =  true

Sizes may be symbols, which are positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from .. import expr as ex
from ..cascade import Cascade, Size, size_term
from ..expr import Expr

DIVISIONS = ("floordiv", "mod")


@dataclass(frozen=True)
class Linear:
    """Σ coefficient · atom + constant over the integers; coefficients are sizes, none of them 0."""

    terms: tuple[tuple[Expr, Size], ...]
    constant: Size = 0

    def plus(self, other: Linear, factor: Size = 1) -> Linear:
        table = dict(self.terms)
        for a, c in other.terms:
            table[a] = _simple(table.get(a, 0) + factor * c)
        kept = tuple((a, c) for a, c in table.items() if c != 0)
        return Linear(kept, _simple(self.constant + factor * other.constant))

    def term(self) -> Expr:
        """Positive addends first, so that no sum begins with a difference."""
        out = ex.const(0)
        for a, c in sorted(self.terms, key=lambda t: _negative(t[1])):
            out = out - a * size_term(_simple(-c)) if _negative(c) else out + a * size_term(c)
        if _negative(self.constant):
            return out - size_term(_simple(-self.constant))
        return out + size_term(self.constant)


def divided(c: Cascade) -> Cascade:
    """The cascade with every division of coordinates that is provably exact carried out."""
    if not any(t.op in DIVISIONS for e in c.einsums for t in ex.walk(e.body)):
        return c
    known = _Ranges({r.name: r.size for r in c.ranks})
    einsums = tuple(replace(e, body=known.rewritten(e.body)) for e in c.einsums)
    used = frozenset(str(x.attr) for e in einsums for x in e.reads) | {e.out.tensor for e in einsums}
    return replace(c, einsums=einsums, tensors=tuple(t for t in c.tensors if t.name in used))


def read_at(body: Expr, at: Mapping[Expr, Expr], extent: Mapping[str, Size]) -> Expr:
    """A term at other coordinates, over ranks of these sizes; divisions that the new ones make exact are carried out.

        QK[r // 4, r % 4] at r = 4·h + p, p < 4     →     QK[h, p]
    """
    out = ex.substitute(body, at)
    return out if all(x.op == "index" for x in at.values()) else _Ranges(extent).rewritten(out)


def collected(e: Expr, extent: Mapping[str, Size]) -> Expr:
    """An integer term with equal addends collected: i + (m − i)  =  m."""
    return _Ranges(extent).linear(e).term() if e.dtype == "i64" else e


class _Ranges:
    """Terms over ranks whose sizes are known, by number or by symbol."""

    def __init__(self, extent: Mapping[str, Size]) -> None:
        self.extent = extent
        self.memo: dict[Expr, Linear] = {}

    def rewritten(self, root: Expr) -> Expr:
        return ex.rebuild(root, self._rule)

    def _rule(self, e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op in ex.COMPARISONS and all(a.dtype == "i64" for a in args):
            return self._decided(e, args)
        if e.op == "load":
            return ex.load(str(e.attr), tuple(self._shorter(a) for a in args), e.dtype)
        return None

    def _shorter(self, e: Expr) -> Expr:
        """An equal term with fewer divisions, else the term."""
        if e.dtype != "i64" or not _divisions(e):
            return e
        found = self.linear(e).term()
        return found if _divisions(found) < _divisions(e) else e

    def _decided(self, e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        """A comparison of divisions that holds for all coordinates, or for none."""
        if not any(map(_divisions, args)):
            return None
        low, high = self.bounds(self.linear(args[0]).plus(self.linear(args[1]), -1))
        least, most = _sign(low), _sign(high)
        always = {"lt": most == -1, "le": most in (-1, 0), "gt": least == 1, "ge": least in (0, 1)}
        never = {"lt": least in (0, 1), "le": least == 1, "gt": most in (-1, 0), "ge": most == -1}
        if always.get(e.op, False):
            return ex.TRUE
        if never.get(e.op, False):
            return ex.FALSE
        return ex.make(e.op, tuple(self._shorter(a) for a in args), None, e.dtype)

    def linear(self, e: Expr) -> Linear:
        if e not in self.memo:
            self.memo[e] = self._paired(self._linear(e))
        return self.memo[e]

    def _linear(self, e: Expr) -> Linear:
        if e.op == "const":
            return Linear((), int(e.value))
        if e.op == "symbol":
            return Linear((), sympy.Symbol(str(e.attr), integer=True, positive=True))
        if e.dtype != "i64" or e.op not in ("add", "sub", "neg", "mul", *DIVISIONS) or any(a.dtype != "i64" for a in e.args):
            return Linear(((e, 1),))
        parts = [self.linear(a) for a in e.args]
        match e.op:
            case "neg":
                return Linear(()).plus(parts[0], -1)
            case "add" | "sub":
                return parts[0].plus(parts[1], 1 if e.op == "add" else -1)
            case "mul" if not parts[0].terms or not parts[1].terms:
                number, other = parts if not parts[0].terms else parts[::-1]
                return Linear(()).plus(other, number.constant)
            case "floordiv" | "mod" if not parts[1].terms and _sign(parts[1].constant) == 1:
                return self._divided(e.op, parts[0], parts[1].constant)
        return Linear(((e, 1),))

    def _divided(self, op: str, x: Linear, n: Size) -> Linear:
        """x = n·whole + rest; the rest is one of several, of which one may be shown to lie in 0 … n − 1."""
        for near in (True, False):
            whole, rest = _split(x, n, near)
            if self._within(rest, n):
                return whole if op == "floordiv" else rest
        whole, rest = _split(x, n, False)
        left = Linear(((ex.binary(op, rest.term(), size_term(n)), 1),))
        return whole.plus(left) if op == "floordiv" else left

    def _within(self, x: Linear, n: Size) -> bool:
        low, high = self.bounds(x)
        return _sign(low) in (0, 1) and high is not None and _sign(_simple(n - high)) == 1

    def bounds(self, x: Linear) -> tuple[Size | None, Size | None]:
        """The least and greatest value over all coordinates; None where that is not known."""
        low: Size | None = x.constant
        high: Size | None = x.constant
        for a, c in x.terms:
            top = self._top(a)
            if top is None or _sign(c) is None:
                return None, None
            if _negative(c):
                low = _simple(low + c * top) if low is not None else None
            else:
                high = _simple(high + c * top) if high is not None else None
        return low, high

    def _top(self, a: Expr) -> Size | None:
        """The largest value of an atom that is never below 0; None for what is not known to be such."""
        if a.op == "index":
            return _simple(self.extent[str(a.attr)] - 1)
        if a.op == "mod" and a.args[1].op in ("const", "symbol"):
            return _simple(self.linear(a.args[1]).constant - 1)
        if a.op == "floordiv" and a.args[1].is_const:
            low, high = self.bounds(self.linear(a.args[0]))
            n = int(a.args[1].value)
            return high // n if isinstance(high, int) and _sign(low) in (0, 1) else None
        return None

    def _paired(self, x: Linear) -> Linear:
        """c·n·(y // n) + c·(y % n) = c·y"""
        for low, c in x.terms:
            if low.op != "mod":
                continue
            n = self.linear(low.args[1])
            high = ex.binary("floordiv", *low.args)
            if not n.terms and dict(x.terms).get(high) == _simple(c * n.constant):
                rest = Linear(tuple(t for t in x.terms if t[0] not in (low, high)), x.constant)
                return self._paired(rest.plus(self.linear(low.args[0]), c))
        return x


def _split(x: Linear, n: Size, near: bool) -> tuple[Linear, Linear]:
    """x = n · whole + rest, coefficients of the rest `near` 0, or not below it; the constant is below n."""
    whole, rest = Linear(()), Linear(())
    for a, c in x.terms:
        q, r = _quotient(c, n, near)
        whole, rest = whole.plus(Linear(((a, 1),)), q), rest.plus(Linear(((a, 1),)), r)
    q, r = _quotient(x.constant, n, False)
    return replace(whole, constant=q), replace(rest, constant=r)


def _quotient(c: Size, n: Size, near: bool) -> tuple[Size, Size]:
    if isinstance(c, int) and isinstance(n, int):
        q = (2 * c + n) // (2 * n) if near else c // n
        return q, c - q * n
    if not sympy.sympify(n).is_polynomial() or not sympy.sympify(c).is_polynomial():
        return 0, c
    q, r = (_simple(v) for v in sympy.div(c, n))
    return (q, r) if _whole(q) else (0, c)


def _whole(size: Size) -> bool:
    """Are the coefficients of a polynomial whole numbers? Those of a quotient may be fractions."""
    if isinstance(size, int) or not size.free_symbols:
        return isinstance(size, int)
    return all(k.is_Integer for k in sympy.Poly(size).coeffs())


def _simple(size: Size) -> Size:
    if isinstance(size, int):
        return size
    found = sympy.expand(size)
    return int(found) if found.is_Integer else found


def _sign(size: Size | None) -> int | None:
    """−1, 0 or 1; None where it depends on the symbols."""
    if size is None:
        return None
    if isinstance(size, int):
        return (size > 0) - (size < 0)
    return 1 if size.is_positive else -1 if size.is_negative else None


def _negative(size: Size) -> bool:
    return _sign(size) == -1


def _divisions(e: Expr) -> int:
    return sum(t.op in DIVISIONS for t in ex.walk(e))
