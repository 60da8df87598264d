"""Sums of products in a normal form, over the reals: so that equal factors meet, cancel and are shared.

    Factors    c · ∏ atom^power        an atom is whatever is no product, quotient, sign or number
    collected  h·x − d·h  →  (x − d)·h
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy

from .. import expr as ex
from ..expr import Expr


@dataclass(frozen=True)
class Factors:
    """A number times powers of atoms, in the order in which they were met."""

    number: float
    powers: Mapping[Expr, int]

    def __mul__(self, other: Factors) -> Factors:
        powers = dict(self.powers)
        for a, n in other.powers.items():
            powers[a] = powers.get(a, 0) + n
        return Factors(self.number * other.number, {a: n for a, n in powers.items() if n})

    def inverse(self) -> Factors:
        return Factors(1.0 / self.number, {a: -n for a, n in self.powers.items()})

    def holds(self, other: Factors) -> bool:
        """Is every factor of `other` one of these, on the same side of the line?"""
        return all(self.powers.get(a, 0) * n >= n * n for a, n in other.powers.items())

    def term(self, dtype: str) -> Expr:
        """Factors above the line, then the number, then divisors."""
        out: Expr | None = None
        for a, n in self.powers.items():
            for _ in range(n):
                out = a if out is None else out * a
        if out is None:
            out = ex.const(self.number, dtype)
        elif self.number == -1.0:
            out = -out
        elif self.number != 1.0:
            out = out * self.number
        for a, n in self.powers.items():
            for _ in range(-n):
                out = out / a
        return ex.cast(out, dtype)


ONE = Factors(1.0, {})


def product(e: Expr) -> Factors:
    """A term as one product; a term that is a sum is an atom of it."""
    if e.is_float:
        match e.op:
            case "const" if e.value == e.value and abs(e.value) not in (0.0, float("inf")):
                return Factors(float(e.value), {})
            case "neg":
                return Factors(-1.0, {}) * product(e.args[0])
            case "mul":
                return product(e.args[0]) * product(e.args[1])
            case "div":
                return product(e.args[0]) * product(e.args[1]).inverse()
            case "reciprocal":
                return product(e.args[0]).inverse()
    return Factors(1.0, {e: 1})


def products(e: Expr) -> list[Factors]:
    """A term as a sum of products: sums are multiplied out, as far as they are factors above the line."""
    match e.op:
        case "add":
            return [*products(e.args[0]), *products(e.args[1])]
        case "sub":
            return [*products(e.args[0]), *(Factors(-1.0, {}) * p for p in products(e.args[1]))]
        case "neg":
            return [Factors(-1.0, {}) * p for p in products(e.args[0])]
        case "mul" if e.is_float:
            return [p * q for p in products(e.args[0]) for q in products(e.args[1])]
        case "div":
            return [p * product(e.args[1]).inverse() for p in products(e.args[0])]
    return [product(e)]


def shared(parts: Iterable[Factors]) -> Factors:
    """The factors that all parts have."""
    first, *rest = parts
    powers = dict(first.powers)
    for p in rest:
        powers = {a: _nearer(n, p.powers[a]) for a, n in powers.items() if p.powers.get(a, 0) * n > 0}
    return Factors(1.0, powers)


def _nearer(n: int, m: int) -> int:
    return min(n, m) if n > 0 else max(n, m)


def collected(e: Expr) -> tuple[Factors, Expr]:
    """A sum as (the factors that all its parts have, the sum of what is left)."""
    parts = products(e)
    common = shared(parts)
    out: Expr | None = None
    for p in parts:
        left = p * common.inverse()
        if out is not None and left.number < 0:
            out = out - Factors(-left.number, left.powers).term(e.dtype)
        else:
            out = left.term(e.dtype) if out is None else out + left.term(e.dtype)
    assert out is not None
    return common, out


def vanishes(e: Expr) -> bool:
    """Is a rational function of its atoms 0 for all of them? Proved by sympy."""
    atoms: dict[Expr, sympy.Symbol] = {}

    def go(x: Expr) -> sympy.Expr:
        if x.is_float:
            match x.op:
                case "const" if x.value == x.value and abs(x.value) != float("inf"):
                    return sympy.nsimplify(x.value, rational=True)
                case "neg":
                    return -go(x.args[0])
                case "add":
                    return go(x.args[0]) + go(x.args[1])
                case "sub":
                    return go(x.args[0]) - go(x.args[1])
                case "mul":
                    return go(x.args[0]) * go(x.args[1])
                case "div":
                    return go(x.args[0]) / go(x.args[1])
                case "reciprocal":
                    return 1 / go(x.args[0])
                case "cast" if x.args[0].is_float:
                    return go(x.args[0])
        return atoms.setdefault(x, sympy.Symbol(f"x{len(atoms)}"))

    return bool(sympy.cancel(sympy.together(go(e))) == 0)
