"""The separability laws of a reduction's body, decided by sympy on tiny terms over opaque symbols.

    Σ g(x, d)   can be rescaled to d'   iff   g = G(x)·H(d)   iff   ∂²/∂x∂d log g = 0      by H(d')/H(d)
    max g(x, d) can be shifted to d'    iff   g = G(x) + H(d) iff   ∂²g/∂x∂d = 0           by H(d') − H(d)
Source: the repair term of Neptune and RedFuser's separability, in one statement.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import sympy

from .. import expr as ex
from ..expr import Expr
from ..operators import facts
from .constant import number, tries


def multiplicative(g: sympy.Expr, x: sympy.Symbol, d: sympy.Symbol) -> sympy.Expr | None:
    """The factor that turns Σ g(x, d) into Σ g(x, d'), or None.

    >>> x, d = sympy.symbols("x d", positive=True)
    >>> multiplicative(sympy.exp(x - d), x, d)
    exp(d - d')
    """
    if not _apart(g, x, d):
        return None
    return sympy.powsimp(sympy.simplify(g.subs({x: 1, d: _primed(d)}) / g.subs(x, 1)))


def _apart(g: sympy.Expr, x: sympy.Symbol, d: sympy.Symbol) -> bool:
    """Is ∂²/∂x∂d log g = 0? False as well where sympy would have to simplify too much to say so."""
    mixed = sympy.diff(sympy.expand_log(sympy.log(g), force=True), x, d)
    return bool(mixed == 0) or (sympy.count_ops(mixed) <= _MOST and bool(sympy.simplify(mixed) == 0))


# Operators of a term that sympy is asked to simplify: on exponentials inside one another it may take hours.
_MOST = 60


def additive(g: sympy.Expr, x: sympy.Symbol, d: sympy.Symbol) -> sympy.Expr | None:
    """The shift that turns max g(x, d) into max g(x, d'), or None."""
    if sympy.simplify(sympy.diff(g, x, d)) != 0:
        return None
    return sympy.simplify(g.subs({x: 1, d: _primed(d)}) - g.subs(x, 1))


def _primed(d: sympy.Symbol) -> sympy.Symbol:
    return sympy.Symbol(f"{d}'", positive=d.is_positive)


@lru_cache(maxsize=1024)
def separates(e: Expr, element: Expr, rows: tuple[Expr, ...]) -> bool:
    """Is a term G(element)·H(rows)? False as well when it holds an operator that sympy has no form for."""
    if _refuted(e, element, rows):
        return False
    x = sympy.Symbol("x", positive=True)
    symbols = {element: x, **{r: sympy.Symbol(f"d{i}", positive=True) for i, r in enumerate(rows)}}
    g = _symbolic(e, symbols)
    return g is not None and all(_apart(g, x, symbols[r]) for r in rows)


def _refuted(e: Expr, element: Expr, rows: tuple[Expr, ...]) -> bool:
    """Numbers that contradict g(x, d)·g(x', d') = g(x, d')·g(x', d), or none that support it.

    Cheaper than asking sympy for a proof that fails.
    """
    supported = False
    (others, *_) = tries((e,), dict.fromkeys((element, *rows), 1.0))
    for x, y in itertools.combinations((-1.3, 0.7, 1.9, 5.1), 2):
        for u, v in ((0.4, 1.7), (0.05, 0.9), (-0.8, 3.1)):
            at = [(p, q) for p in (x, y) for q in (u, v)]
            g = [float(number(e, {}, {**others, element: p, **{r: q + 0.3 * i for i, r in enumerate(rows)}})) for p, q in at]
            a, b = g[0] * g[3], g[1] * g[2]
            if not (math.isfinite(a) and math.isfinite(b)):
                continue
            if not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12):
                return True
            supported |= a != 0.0
    return not supported


def moments(g: sympy.Expr, x: sympy.Symbol, d: sympy.Symbol) -> tuple[sympy.Expr, ...] | None:
    """The coefficients h_0(d), h_1(d), … of Σ g(x, d) = Σ_k h_k(d)·Σ x^k, or None where g is no polynomial in x.

    >>> x, d = sympy.symbols("x d", positive=True)
    >>> moments((x - d) ** 2, x, d)
    (d**2, -2*d, 1)
    """
    if not g.is_polynomial(x):
        return None
    coefficients = tuple(reversed(sympy.Poly(sympy.expand(g), x).all_coeffs()))
    return coefficients if not any(h.has(x) for h in coefficients) else None


def _symbolic(e: Expr, symbols: dict[Expr, sympy.Symbol]) -> sympy.Expr | None:
    """A small term for sympy; leaves that have no symbol yet get one."""
    if e in symbols:
        return symbols[e]
    if e.op == "const":
        return sympy.nsimplify(e.value) if math.isfinite(e.value) else None
    if e.op in ("load", "index", "symbol"):
        symbols[e] = sympy.Symbol(f"c{len(symbols)}", positive=True)
        return symbols[e]
    if e.op == "cast":
        return _symbolic(e.args[0], symbols)
    args = [_symbolic(a, symbols) for a in e.args]
    form = facts(e.op).in_algebra(sympy)
    return None if form is None or any(a is None for a in args) else form(*args)


def unseparable(e: Expr, key: str, rows: frozenset[str]) -> str:
    """In words: which separability law a term with the key and row scalars breaks."""
    text = ", ".join(sorted(rows)) or "no row scalar"
    if e.op == "where":
        return f"a choice between terms that scale differently with {text}"
    if e.op in ("max", "min", *ex.COMPARISONS):
        return f"{e.op} of an element and a row scalar ({text}) is no f(element)·h(row)"
    return f"{e.op} is no f(element)·h({text})"
