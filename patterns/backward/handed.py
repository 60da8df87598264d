"""What the forward hands over to the backward, and how the backward's terms read it.

    bound:0, scale:, lse      stand for a bound d, for h and for d + log l while terms are derived
    handed(term)              the largest terms of the row that the forward knows become loads of what is saved
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.carried import RowState, guarded
from ..expr import Expr
from ..operators import facts
from .wide import Wide

# A score beside which log l still counts, in float32 as in the score's own rounding.
MODEST = 1e3


@dataclass(frozen=True)
class Scalar:
    """A number of the row, or of the row and a value, that is read as `load`."""

    load: Expr
    term: Expr


@dataclass(frozen=True)
class Saved(Scalar):
    """What the forward hands over: a term over what a row carries at its end, and over the sum of the values."""

    def __str__(self) -> str:
        return f"{self.load} = {self.term}"


class Handing:
    """The names of one derivation, and what is saved so far."""

    def __init__(self, a: Attention, state: RowState) -> None:
        self.a, self.wide = a, Wide(a.cascade)
        self.state = self.wide.state(state)
        self.dtype = self.wide.dtype
        self.carried = {c.name: c for c in self.state.carried}
        self.taken = set(a.cascade.tensor) | set(self.carried)
        self.total = next(x for x in ex.loads(self.state.finish) if str(x.attr) == a.contraction.out.tensor)
        self.bounds: dict[Expr, Expr] = {}
        for _, b, _ in self.state.bounds:
            self.bounds.setdefault(b.d, self.of_row(f"bound:{len(self.bounds)}", b.d))
        self.table = {**{guarded(d): x for d, x in self.bounds.items()}, **self.bounds}
        self.saved: dict[Expr, Saved] = {}
        # h as the forward has it, under the conditions of the row; what stands for it, and for d + log l
        self.end: Expr = ex.const(1.0)
        self.scale: Expr | None = None
        self.lse: Saved | None = None
        # what the backward alone knows
        self.own: set[Expr] = set()

    def fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def of_row(self, name: str, like: Expr) -> Expr:
        """A load at those coordinates of the row, and of the value, over which `like` varies."""
        ranks = (*self.a.batch, self.a.query, self.a.value)
        return ex.load(name, tuple(ex.index(r) for r in ranks if r in like.ranks), self.dtype)

    def bounded(self, e: Expr) -> Expr:
        """The term with its bounds as numbers of their own."""
        return ex.substitute(e, self.table)

    def lifts(self) -> list[Expr]:
        """What the sums of the row add up, the weight first."""
        sums = (c.lift for c in self.carried.values() if c.op == "add")
        return [self.bounded(e) for e in (self.state.weight, *sums)]

    def carried_loads(self, e: Expr) -> list[Expr]:
        return [x for x in ex.loads(e) if str(x.attr) in self.carried]

    def is_leaf(self, x: Expr) -> bool:
        """Is a load a product, an input or what the prelude made: a float with a gradient of its own?"""
        return x.is_float and str(x.attr) not in self.carried and x not in self.bounds.values()

    def put_back(self, e: Expr) -> Expr:
        """Bounds as what they are, h as what it is."""
        table = {x: guarded(d) if self._guards(d) else d for d, x in self.bounds.items()}
        if self.scale is not None:
            table[self.scale] = ex.substitute(self.end, table)
        return ex.substitute(e, table)

    def _guards(self, d: Expr) -> bool:
        """Does the one-pass form guard the bound?"""
        terms = (self.state.weight, *(c.lift for c in self.state.carried))
        return any(x is guarded(d) for t in terms for x in ex.walk(t))

    def handed(self, e: Expr) -> Expr:
        """The term as the backward reads it, its loads as the cascade has them."""
        new: dict[Expr, Expr] = {}

        def go(x: Expr) -> Expr:
            if x not in new:
                if self.lse is not None and x is self.lse.load:
                    self.saved[x] = self.lse
                new[x] = self._hand(x) if self._is_known(x) else x
                if new[x] is x and x.args and x.op != "load":
                    args = tuple(map(go, x.args))
                    new[x] = x if args == x.args else ex.make(x.op, args, x.attr, x.dtype)
            return new[x]

        return self.wide.back(go(e))

    def _is_known(self, x: Expr) -> bool:
        """Is it a term of the row that the forward has at its end, and no other input by itself?"""
        if x is self.total:
            return True
        if not x.is_float or {self.a.key, self.a.value} & x.ranks:
            return False
        inner, known = ex.loads(x), {*self.bounds.values(), self.scale}
        if self.lse is not None and self.lse.load in inner:
            return False
        return any(y in known or str(y.attr) in self.carried for y in inner) and not self.own & set(inner)

    def _hand(self, x: Expr) -> Expr:
        if x not in self.saved:
            term = self.put_back(x)
            name = "scale" if x is self.scale else "bound" if x in self.bounds.values() else "held"
            load = self.of_row(self.fresh(name), term)
            self.saved[x] = Saved(load, self.wide.back(term))
        return self.saved[x].load


def modest(e: Expr) -> bool:
    """Are a term's finite values proved to be small, by a cap say? Of products, tensors and coordinates nothing is known."""
    match e.op:
        case "const":
            return math.isinf(e.value) or abs(e.value) < MODEST
        case "load":
            return False
        case "where":
            return all(modest(x) for x in e.args[1:])
        case "cast":
            return e.args[0].dtype == "b1" or (e.args[0].is_float and modest(e.args[0]))
    return e.is_float and (facts(e.op).bounded or all(map(modest, e.args)))
