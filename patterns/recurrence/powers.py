"""A product of reads, exponentials of sums and choices of 0, in one normal form.

    (Σ_k q[i,k] · b[j,k]) · exp(where(j > i, −∞, G[i] − G[j]))    →    Σ_k q[i,k] · b[j,k] · e^(G[i] − G[j])   where j ≤ i

Where a factor is 0, the product is 0: so it is for all that is finite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import expr as ex
from ..cascade import Einsum
from ..expr import Expr


@dataclass
class Powers:
    """`sign` · factors · e^(exponents, each so many times), summed over `over`; 0 where a predicate of `keeps` fails."""

    sign: int = 1
    factors: Counter[Expr] = field(default_factory=Counter)
    exponents: Counter[Expr] = field(default_factory=Counter)
    keeps: list[Expr] = field(default_factory=list)
    over: set[str] = field(default_factory=set)


class Normal:
    """Terms in normal form. `produced` gives the Einsum of a tensor, where it has one; `opened` reads operands through."""

    def __init__(self, produced: Callable[[str], Einsum | None], opened: Callable[[Expr], Expr]) -> None:
        self.produced, self.opened = produced, opened
        self._fresh = 0

    def of(self, *terms: Expr) -> Powers:
        """The product of some terms."""
        out = Powers()
        for t in terms:
            self._factor(self.opened(t), out)
        out.exponents = Counter({e: n for e, n in out.exponents.items() if n})
        return out

    def _factor(self, e: Expr, out: Powers) -> None:
        match e.op:
            case "mul":
                for x in e.args:
                    self._factor(x, out)
            case "neg":
                out.sign = -out.sign
                self._factor(e.args[0], out)
            case "cast" if e.is_float and e.args[0].is_float:
                self._factor(e.args[0], out)
            case "exp":
                self._exponent(e.args[0], 1, out)
            case "where" if _is(e.args[2], 0.0):
                out.keeps.append(e.args[0])
                self._factor(e.args[1], out)
            case "where" if _is(e.args[1], 0.0):
                out.keeps.append(ex.make("not", (e.args[0],)))
                self._factor(e.args[2], out)
            case "load" if (made := self.produced(str(e.attr))) is not None and made.op in (None, "add"):
                self._opened(made, e, out)
            case "const" if _is(e, 1.0):
                pass
            case _:
                out.factors[e] += 1

    def _exponent(self, e: Expr, sign: int, out: Powers) -> None:
        match e.op:
            case "add" | "sub":
                self._exponent(e.args[0], sign, out)
                self._exponent(e.args[1], sign if e.op == "add" else -sign, out)
            case "neg":
                self._exponent(e.args[0], -sign, out)
            case "cast" if e.is_float and e.args[0].is_float:
                self._exponent(e.args[0], sign, out)
            case "where" if sign > 0 and _is(e.args[1], -math.inf):
                out.keeps.append(ex.make("not", (e.args[0],)))
                self._exponent(e.args[2], sign, out)
            case "where" if sign > 0 and _is(e.args[2], -math.inf):
                out.keeps.append(e.args[0])
                self._exponent(e.args[1], sign, out)
            case _:
                out.exponents[e] += sign

    def _opened(self, made: Einsum, at: Expr, out: Powers) -> None:
        table = dict(zip(made.out.index, at.args, strict=True))
        for r in made.over:
            name = f"{r}'{self._fresh}"
            self._fresh += 1
            out.over.add(name)
            table[ex.index(r)] = ex.index(name)
        self._factor(self.opened(ex.substitute(made.body, table)), out)


def _is(e: Expr, value: float) -> bool:
    return e.op == "const" and float(e.value) == value
