"""A step's term as a sum of products, multiplied out only as far as it depends on the state.

    k · ((v − Σ_r S[r,…] · w[r]) · β)        →        k · v · β   −   k · β · w[r] · S[r,…]  over r
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .. import expr as ex
from ..cascade import Cascade, Einsum
from ..expr import Expr


@dataclass(frozen=True)
class StateProduct:
    """`sign` · the factors, summed over the ranks `over`. At most one factor is a read of the state."""

    sign: int
    factors: tuple[Expr, ...]
    over: frozenset[str] = frozenset()

    def state(self, name: str) -> Expr | None:
        """The read of the state."""
        return next((x for x in self.factors if x.op == "load" and str(x.attr) == name), None)

    def without(self, factor: Expr | None) -> tuple[Expr, ...]:
        left = list(self.factors)
        if factor is not None:
            left.remove(factor)
        return tuple(left)


class Expansion:
    """Terms of a cascade's steps, multiplied out around one state."""

    def __init__(self, c: Cascade, name: str) -> None:
        self.c, self.name = c, name
        self._depends: dict[str, bool] = {}
        self._fresh = 0

    def of(self, e: Expr) -> list[StateProduct] | None:
        """The products that a term is the sum of; None where it is not linear in the state."""
        if not self.depends(e):
            return [self._plain(e)]
        match e.op:
            case "load" if str(e.attr) == self.name:
                return [StateProduct(1, (e,))]
            case "load":
                return self._inlined(e)
            case "cast" if e.is_float and e.args[0].is_float:
                # a state that is rounded is carried unrounded
                return self.of(e.args[0])
            case "neg":
                return _negated(self.of(e.args[0]))
            case "add" | "sub":
                left, right = self.of(e.args[0]), self.of(e.args[1])
                right = _negated(right) if e.op == "sub" else right
                return None if left is None or right is None else [*left, *right]
            case "mul" if not all(map(self.depends, e.args)):
                left, right = self.of(e.args[0]), self.of(e.args[1])
                return None if left is None or right is None else [_times(a, b) for a in left for b in right]
        return None

    def depends(self, e: Expr) -> bool:
        """Whether a term rests on the state of this step or the one before."""
        return any(self._reads(str(x.attr)) for x in ex.loads(e))

    def _reads(self, tensor: str) -> bool:
        if tensor == self.name:
            return True
        if tensor not in self._depends:
            producers = self.c.producers.get(tensor, ())
            # another state is known by itself
            self._depends[tensor] = len(producers) == 1 and self.depends(producers[0].body)
        return self._depends[tensor]

    def _inlined(self, x: Expr) -> list[StateProduct] | None:
        e = self.c.producers[str(x.attr)][0]
        if e.op not in (None, "add"):
            return None
        body, over = self._opened(e, x)
        inner = self.of(body)
        return None if inner is None else [StateProduct(p.sign, p.factors, p.over | over) for p in inner]

    def _opened(self, e: Einsum, x: Expr) -> tuple[Expr, frozenset[str]]:
        """What an Einsum computes for the element that is read, and the ranks that it is summed over, named anew."""
        table = dict(zip(e.out.index, x.args, strict=True))
        over: set[str] = set()
        for r in e.over:
            if self.c.rank[r].size == 1:
                table[ex.index(r)] = ex.const(0)
                continue
            name = f"{r}.{self._fresh}"
            self._fresh += 1
            over.add(name)
            table[ex.index(r)] = ex.index(name)
        return ex.substitute(e.body, table), frozenset(over)

    def _plain(self, e: Expr) -> StateProduct:
        """A term without the state, as factors."""
        sign, out = 1, list[Expr]()
        for f in self._factors(e):
            if f.op == "neg":
                sign, f = -sign, f.args[0]
            out.append(f)
        return StateProduct(sign, tuple(out))

    def _factors(self, e: Expr) -> Iterator[Expr]:
        if e.op == "mul":
            for x in e.args:
                yield from self._factors(x)
            return
        made = self.c.producers.get(str(e.attr), ()) if e.op == "load" else ()
        if len(made) == 1 and made[0].op in (None, "add") and all(self.c.rank[r].size == 1 for r in made[0].over):
            # an outer product that was written as a matrix product
            yield from self._factors(self._opened(made[0], e)[0])
            return
        yield e


def _negated(products: list[StateProduct] | None) -> list[StateProduct] | None:
    return None if products is None else [StateProduct(-p.sign, p.factors, p.over) for p in products]


def _times(a: StateProduct, b: StateProduct) -> StateProduct:
    return StateProduct(a.sign * b.sign, (*a.factors, *b.factors), a.over | b.over)


def factors_of(e: Expr) -> Iterator[Expr]:
    """The factors of a term, left to right; a term that is no product is one."""
    if e.op == "mul":
        for x in e.args:
            yield from factors_of(x)
    else:
        yield e


def product_of(factors: tuple[Expr, ...], sign: int = 1, table: Mapping[Expr, Expr] | None = None) -> Expr:
    """Factors as one term, with some coordinates named otherwise."""
    out: Expr | None = None
    for f in factors:
        out = f if out is None else out * f
    out = ex.const(1.0) if out is None else out
    return ex.substitute(-out if sign < 0 else out, dict(table or {}))
