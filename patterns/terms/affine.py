"""Affine normal form of integer terms, so that differences of coordinates are exact: `(p + 3) − (m + 3)` is `p − m`.

    term  =  Σ coefficient · atom + constant        an atom is a rank, a size, a load, or any term that is no sum
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .. import expr as ex
from ..expr import Expr


@dataclass(frozen=True)
class Affine:
    """A sum over the integers. No coefficient is 0; atoms are in order of their text."""

    terms: tuple[tuple[Expr, int], ...]
    constant: int

    @cached_property
    def atoms(self) -> tuple[Expr, ...]:
        return tuple(a for a, _ in self.terms)

    @cached_property
    def divisor(self) -> int:
        """The greatest common divisor of the coefficients; 0 for a constant."""
        return math.gcd(*(c for _, c in self.terms))

    def coefficient(self, atom: Expr) -> int:
        return next((c for a, c in self.terms if a is atom), 0)

    def __add__(self, other: Affine) -> Affine:
        return combine(self, other, 1)

    def __sub__(self, other: Affine) -> Affine:
        return combine(self, other, -1)

    def scaled(self, factor: int) -> Affine:
        if factor == 0:
            return Affine((), 0)
        return Affine(tuple((a, c * factor) for a, c in self.terms), self.constant * factor)

    def term(self) -> Expr:
        """The sum as a term."""
        out = ex.const(0)
        for a, c in self.terms:
            out = out - a * -c if c < 0 and out.op != "const" else out + a * c
        return out + self.constant


def combine(a: Affine, b: Affine, sign: int) -> Affine:
    table = dict(a.terms)
    for atom, c in b.terms:
        table[atom] = table.get(atom, 0) + sign * c
    return _affine(table, a.constant + sign * b.constant)


def _affine(table: dict[Expr, int], constant: int) -> Affine:
    kept = [(a, c) for a, c in table.items() if c]
    return Affine(tuple(sorted(kept, key=lambda t: str(t[0])) if len(kept) > 1 else kept), constant)


def atom(e: Expr) -> Affine:
    return Affine(((e, 1),), 0)


@lru_cache(maxsize=16384)
def affine(e: Expr) -> Affine:
    """The normal form of an integer term. Sums in types narrower than i64 may wrap and stay atoms."""
    if e.op == "const" and e.dtype in ex.INTEGERS:
        return Affine((), int(e.value))
    if e.dtype != "i64" or not all(a.dtype in ex.INTEGERS for a in e.args):
        return atom(e)
    match e.op:
        case "add":
            return affine(e.args[0]) + affine(e.args[1])
        case "sub":
            return affine(e.args[0]) - affine(e.args[1])
        case "neg":
            return affine(e.args[0]).scaled(-1)
        case "mul":
            x, y = (affine(a) for a in e.args)
            if not y.terms:
                return x.scaled(y.constant)
            return y.scaled(x.constant) if not x.terms else atom(e)
        case "cast":
            return affine(e.args[0])
        case "floordiv":
            n = affine(e.args[1])
            return _quotient(affine(e.args[0]), n.constant) if not n.terms and n.constant > 0 else atom(e)
        case "mod":
            n = affine(e.args[1])
            return _remainder(affine(e.args[0]), n.constant) if not n.terms and n.constant > 0 else atom(e)
    return atom(e)


def _quotient(x: Affine, n: int) -> Affine:
    """(n·X + Y) // n = X + Y // n"""
    whole = Affine(tuple((a, c // n) for a, c in x.terms if c % n == 0), x.constant // n)
    rest = Affine(tuple((a, c) for a, c in x.terms if c % n), x.constant % n)
    if not rest.terms:
        return whole
    # (n·Z + r) // n with 0 ≤ r < n may still share a factor: (4z + 2) // 8 = (2z + 1) // 4
    g = math.gcd(rest.divisor, n)
    rest = Affine(tuple((a, c // g) for a, c in rest.terms), rest.constant // g)
    return whole + atom(ex.binary("floordiv", rest.term(), n // g))


def _remainder(x: Affine, n: int) -> Affine:
    """(n·X + Y) % n = Y % n, with coefficients brought next to 0"""

    def near(c: int) -> int:
        c %= n
        return c - n if 2 * c > n else c

    rest = Affine(tuple((a, near(c)) for a, c in x.terms if c % n), x.constant % n)
    if not rest.terms:
        return Affine((), rest.constant)
    return atom(ex.binary("mod", rest.term(), n))


def says_at_most_zero(e: Expr, form: Affine) -> bool:
    """Is a comparison of integers `form ≤ 0`?"""
    if e.op not in ("lt", "le", "gt", "ge") or any(x.dtype not in ex.INTEGERS for x in e.args):
        return False
    x, y = e.args if e.op in ("lt", "le") else e.args[::-1]
    difference = affine(x) - affine(y)
    return (difference if e.op in ("le", "ge") else difference + Affine((), 1)) == form
