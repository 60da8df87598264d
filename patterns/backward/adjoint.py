"""The backward of an attention as terms, derived from its one-pass form: what the forward hands over, and every gradient.

    out = h(R)·Σ_m w(x)·V,   R_j = Σ_m g_j(x)                           the one-pass form: all that is of the row stands behind Σ
    dW  = Σ_f acc·V,         dV = Σ_p weight·acc                        weight = h·w, recomputed from what is saved
    δ   = Σ_f dOut·out = Σ_m dW·weight                                  exchange: the two sums change places
    dx  = dW·h·w'(x) + Σ_j δ·(∂h/∂R_j / h)·g_j'(x)                      softmax: weight·(dW − δ)
A bound d that the exponentials subtract passes nothing on where the output does not depend on it: for every bound it is proved that
∂h/∂d + Σ_j ∂h/∂R_j·κ_j·R_j + κ·h = 0, where κ·R is what moving d does to a sum R. So no pass over the keys comes before the one
that computes dx, whatever the row rule is.

Rows without a key: what the forward makes NaN has NaN gradients wherever no mask selects 0, and rows that the model sets to 0 pass
nothing back, as in PyTorch's own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.carried import RowState, guarded
from ..attention.rowstate import derive
from ..attention.score import only, without
from ..expr import Expr
from ..operators import facts, logarithm
from ..verdict import Obstacle
from .derivative import derivative, pullback
from .products import Product, collected, product, products, vanishes
from .wide import Wide

# A score beside which log l still counts, in float32 as in the score's own rounding.
MODEST = 1e3


@dataclass(frozen=True)
class Saved:
    """What the forward hands over, read as `load`: a term over what a row carries at its end (and its accumulator)."""

    load: Expr
    term: Expr

    def __str__(self) -> str:
        return f"{self.load} = {self.term}"


@dataclass(frozen=True)
class RowSum:
    """A scalar of the row, read as `load`: the sum of a term over one rank."""

    load: Expr
    term: Expr
    over: str

    def __str__(self) -> str:
        return f"{self.load} = Σ_{self.over} {self.term}"


@dataclass(frozen=True)
class Gradient:
    """The gradient of what stands at `load`: the sum of `term` over those ranks of `space` that the load does not have."""

    load: Expr
    term: Expr
    space: tuple[str, ...]

    def __str__(self) -> str:
        return f"d{self.load} = Σ {self.term}"


@dataclass(frozen=True)
class Adjoint:
    """The backward of one attention; the head of this file says how its parts are used.

    `out` and `dout` load the output and its gradient, `dweight` the product dW[…,p,m]. `row` sums over the value rank and reads `out`,
    `dout` and `saved`; `passes` sums over the key rank. `acc` is a term over [P, F]; `weight` and the terms of `scores` (one a product)
    are over [P, M]. `leaves`, the other floats of the score and of the row's end, say their own ranks, and a tensor may stand there several
    times. All of them read coordinates, products, inputs, what the prelude makes, `saved`, `row` and `dweight`.
    """

    attention: Attention
    out: Expr
    dout: Expr
    dweight: Expr
    saved: tuple[Saved, ...]
    row: tuple[RowSum, ...]
    passes: tuple[RowSum, ...]
    acc: Expr
    weight: Expr
    scores: tuple[Gradient, ...]
    leaves: tuple[Gradient, ...]

    def __str__(self) -> str:
        lines = [*self.saved, *self.row, *self.passes, f"acc = {self.acc}", f"weight = {self.weight}", *self.scores, *self.leaves]
        return "\n".join(map(str, lines))


@lru_cache(maxsize=512)
def adjoint(a: Attention) -> Adjoint | Obstacle:
    """The backward of an attention, or what keeps it from having one."""
    state = derive(a)
    if isinstance(state, Obstacle):
        return state
    try:
        return _Backward(a, state).adjoint()
    except _NoGradient as stop:
        return Obstacle(f"no gradient: {stop}", str(a.contraction.out), depth=7)


class _NoGradient(Exception):
    """Carries a reason to the one place that catches it."""


def _or_stop(found: dict[Expr, Expr] | Obstacle) -> dict[Expr, Expr]:
    if isinstance(found, Obstacle):
        raise _NoGradient(found.reason)
    return found


class _Backward:
    """One derivation. Bounds and h stand as loads of their own (`bound:0`, `scale:`) until the end, so that no law looks inside."""

    def __init__(self, a: Attention, state: RowState) -> None:
        self.a, self.wide = a, Wide(a.cascade)
        self.state = state = self.wide.state(state)
        self.dtype = self.wide.dtype
        self.carried = {c.name: c for c in state.carried}
        self.total = next(x for x in ex.loads(state.finish) if str(x.attr) == a.contraction.out.tensor)
        self.products = {e.out.tensor for e in a.products}
        self.bounds = {b.d: self.of_row(f"bound:{i}", b.d) for i, b in enumerate(dict.fromkeys(b for _, b, _ in state.bounds))}
        self.table = {**{guarded(d): x for d, x in self.bounds.items()}, **self.bounds}
        self.conditions: list[tuple[Expr, float]] = []
        self.end = self.bounded(self.levelled(self.coefficient(state.finish)))
        self.weight = self.bounded(state.weight)
        self.saved: dict[Expr, Saved] = {}
        self.row: list[RowSum] = []
        self.delta: Expr | None = None
        self.tensors = set(a.cascade.tensor) | set(self.carried)

    def adjoint(self) -> Adjoint:
        a = self.a
        self.check()
        self.out = ex.load(a.cascade.outputs[0], self.output_index(), a.cascade.tensor[a.cascade.outputs[0]].dtype)
        self.dout = ex.load(self.fresh(f"d{self.out.attr}"), self.out.args, self.out.dtype)
        self.dweight = ex.load(self.fresh("dW"), tuple(map(ex.index, (*a.batch, a.query, a.key))), self.dtype)
        self.of_end()
        seeds = self.seeds()
        leaves = [x for x in ex.loads(self.weight) if self.is_leaf(x)]
        for c in self.carried.values():
            leaves += [x for x in ex.loads(self.bounded(c.lift)) if self.is_leaf(x) and x not in leaves and c.op == "add"]
        found = _or_stop(pullback(seeds, leaves))
        pairs = (*a.batch, a.query, a.key)
        gradients = [Gradient(self.wide.narrow(x), self.finished(d), pairs) for x, d in found.items()]
        scores = tuple(g for g in gradients if str(g.load.attr) in self.products)
        others = (*(g for g in gradients if g not in scores), *self.leaves_of_end())
        weight = self.finished(self.whole)
        acc = self.finished(self.acc)
        return Adjoint(
            a, self.out, self.dout, self.dweight, tuple(self.saved.values()), tuple(self.row), (), acc, weight, scores, others
        )

    # names

    def fresh(self, name: str) -> str:
        while name in self.tensors:
            name += "_"
        self.tensors.add(name)
        return name

    def of_row(self, name: str, like: Expr) -> Expr:
        """A load at those coordinates of the row, and of the value where `like` has it, over which `like` varies."""
        ranks = (*self.a.batch, self.a.query, self.a.value)
        return ex.load(name, tuple(ex.index(r) for r in ranks if r in like.ranks), self.dtype)

    def output_index(self) -> tuple[Expr, ...]:
        (e,) = self.a.cascade.producers[self.a.cascade.outputs[0]]
        return e.out.index

    def bounded(self, e: Expr) -> Expr:
        """The term with its bounds as numbers of their own."""
        return ex.substitute(e, self.table)

    def levelled(self, e: Expr) -> Expr:
        """The maximum of what a bound was subtracted from already: max(x − d, y − d) = max(x, y) − d = 0 for d = max(x, y)."""

        def rule(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if x.op not in ("max", "min") or any(y.op != "sub" for y in args) or args[0].args[1] is not args[1].args[1]:
                return None
            d = args[0].args[1]
            return ex.const(0.0, x.dtype) if ex.binary(x.op, args[0].args[0], args[1].args[0]) is d and d in self.bounds else None

        return ex.rebuild(e, rule)

    def is_leaf(self, x: Expr) -> bool:
        return x.is_float and str(x.attr) not in self.carried and x not in self.bounds.values()

    # the row's end

    def coefficient(self, e: Expr) -> Expr:
        """h of finish = h·total; where a condition of the row makes it a number, that goes to `conditions`."""
        if e is self.total:
            return ex.const(1.0, self.dtype)
        inside = [self.total in ex.loads(x) for x in e.args]
        match e.op, inside:
            case "cast", [True]:
                return self.coefficient(e.args[0])
            case "neg", [True]:
                return -self.coefficient(e.args[0])
            case "mul", [True, False]:
                return self.coefficient(e.args[0]) * e.args[1]
            case "mul", [False, True]:
                return e.args[0] * self.coefficient(e.args[1])
            case "div", [True, False]:
                return self.coefficient(e.args[0]) / e.args[1]
            case "where", [False, True, False] if e.args[2].is_const:
                self.conditions.append((~e.args[0], float(e.args[2].value)))
                return self.coefficient(e.args[1])
            case "where", [False, False, True] if e.args[1].is_const:
                self.conditions.append((e.args[0], float(e.args[1].value)))
                return self.coefficient(e.args[2])
        raise _NoGradient(f"the output is no multiple of {self.total}")

    def under(self, h: Expr) -> Expr:
        """h under the conditions of the row: 0 where the output is a number, NaN where it is none."""
        for c, value in reversed(self.conditions):
            h = ex.where(c, math.nan if math.isnan(value) else 0.0, h)
        return h

    def of_end(self) -> None:
        """Split h into what is of the row, which goes to the weight, and what varies over the values, which goes to acc."""
        value = self.a.value
        if any(value in c.ranks for c, _ in self.conditions):
            raise _NoGradient(f"a condition on {value} selects the output")
        dout = ex.cast(self.dout, self.dtype)
        row, own = self.end, None
        if value in self.end.ranks:
            row, own = without(self.end, value) or ex.const(1.0, self.dtype), only(self.end, value)
        self.acc = dout if own is None else dout * own
        self.row_end = row
        self.core = product(row)
        self.scale: Expr | None = None
        if self.core.powers or self.conditions:
            self.scale = self.of_row("scale:", self.under(row))
        self.lse = self.logarithm_of_sum()
        self.whole = self.weight * (row if self.scale is None else self.scale)
        if self.lse is not None:
            self.whole = self.relative(self.weight)
        self.written = {*ex.walk(self.weight), self.whole, *(x for c in self.carried.values() for x in ex.walk(self.bounded(c.lift)))}

    def logarithm_of_sum(self) -> Expr | None:
        """exp(x − d)/l = exp(x − lse) with lse = d + log l: one number a row, where no score is so large that log l is lost in it."""
        found = {b for _, b, _ in self.state.bounds}
        if len(found) != 1 or self.core.number != 1.0 or list(self.core.powers.values()) != [-1]:
            return None
        (b,) = found
        log = logarithm(b.base)
        at_bound = self.exponent(self.weight)
        if not log or at_bound is None or not modest(at_bound, self.products):
            return None
        if any(c is not ex.equal(b.d, -math.inf) for c, _ in self.conditions):
            return None
        (total,) = self.core.powers
        lse = self.of_row(self.fresh("lse"), self.row_end)
        self.lse_of = Saved(lse, self.wide.back(b.d + ex.unary(log, self.put_back(total))))
        return lse

    def exponent(self, e: Expr) -> Expr | None:
        """x of base^(x − d)."""
        for _, b, _ in self.state.bounds:
            if e.op == b.base and e.args[0].op == "sub" and e.args[0].args[1] is self.bounds[b.d]:
                return e.args[0].args[0]
        return None

    def relative(self, e: Expr) -> Expr:
        """base^(x − lse) of base^(x − d), and 0 where the model sets the row to 0."""
        x, lse = self.exponent(e), self.lse
        assert x is not None
        assert lse is not None
        share = ex.unary(e.op, x - lse)
        zero = any(value == value for _, value in self.conditions)
        return ex.where(ex.equal(lse, -math.inf), 0.0, share) if zero else share

    def check(self) -> None:
        """No gradient reaches a bound, and none a maximum."""
        kappa = {(name, b.d): -k * math.log(facts(b.base).of) for name, b, k in self.state.bounds}
        for d, x in self.bounds.items():
            moved = self.slope(self.end, x) + self.end * kappa.get((str(self.total.attr), d), 0.0)
            for r in self.carried_loads(self.end):
                moved = moved + self.slope(self.end, r) * (r * kappa.get((str(r.attr), d), 0.0))
            if not vanishes(moved):
                raise _NoGradient(f"the output depends on {d} itself")
        lifts = [self.weight, *(self.bounded(c.lift) for c in self.carried.values() if c.op == "add")]
        for e in (self.end, *lifts):
            for r in self.carried_loads(e):
                if (self.carried[str(r.attr)].op != "add" or e is not self.end) and not _zero(self.slope(e, r)):
                    raise _NoGradient(f"{r} is read beside the exponents, and which key has a maximum's gradient is not known")

    def slope(self, e: Expr, x: Expr) -> Expr:
        found = derivative(e, x)
        if isinstance(found, Obstacle):
            raise _NoGradient(found.reason)
        return found

    def carried_loads(self, e: Expr) -> list[Expr]:
        return [x for x in ex.loads(e) if str(x.attr) in self.carried]

    # what reaches the sums and the end's own leaves

    def part_of_end(self, x: Expr) -> Expr:
        """Σ_f dOut·total·∂h/∂x as a scalar of the row: δ·(∂h/∂x)/h, where the division is one that h makes itself."""
        slope = self.slope(self.end, x)
        ratio = [p * product(self.end).inverse() for p in products(slope)]
        made = product(self.end).powers
        if all(n > 0 or made.get(e, 0) < 0 for p in ratio for e, n in p.powers.items()):
            return _summed([Product(1.0, {self.shared_delta(): 1}) * p for p in ratio], self.dtype)
        term = self.reached(x, slope)
        load = self.of_row(self.fresh("eta"), self.out)
        load = ex.load(str(load.attr), tuple(i for i in load.args if i.attr != self.a.value), self.dtype)
        self.row.append(RowSum(load, self.finished(term), self.a.value))
        return load

    def reached(self, x: Expr, slope: Expr) -> Expr:
        """dOut·total·∂h/∂x over [P, F]."""
        return self.under(ex.cast(self.dout, self.dtype) * self.total * slope)

    def shared_delta(self) -> Expr:
        if self.delta is None:
            at = tuple(map(ex.index, (*self.a.batch, self.a.query)))
            self.delta = ex.load(self.fresh("delta"), at, self.dtype)
            term = ex.cast(self.dout, self.dtype) * ex.cast(self.out, self.dtype)
            self.row.append(RowSum(self.delta, term, self.a.value))
        return self.delta

    def seeds(self) -> dict[Expr, Expr]:
        """The gradient of each lift: of the weight h·dW, of a sum what reaches it from the end."""
        seeds = {self.weight: self.dweight * self.row_end}
        for r in self.carried_loads(self.end):
            c = self.carried[str(r.attr)]
            if c.op == "add":
                lift, part = self.bounded(c.lift), self.part_of_end(r)
                seeds[lift] = seeds[lift] + part if lift in seeds else part
        return {lift: self.seed(d) for lift, d in seeds.items()}

    def seed(self, d: Expr) -> Expr:
        """h·(what is left), where all parts have h; else the whole under the row's conditions."""
        common, rest = collected(d)
        if self.scale is None:
            return (common * product(rest)).term(d.dtype)
        if common.holds(self.core):
            left = common * Product(self.core.number, self.core.powers).inverse() * Product(1.0, {self.scale: 1})
            return (left * Product(1.0, {rest: 1})).term(d.dtype) if not rest.is_const else (left * product(rest)).term(d.dtype)
        return self.under((common * product(rest)).term(d.dtype))

    def leaves_of_end(self) -> list[Gradient]:
        found = []
        for x in ex.loads(self.end):
            if not self.is_leaf(x) or _zero(slope := self.slope(self.end, x)):
                continue
            made, ratio = product(self.end).powers, [p * product(self.end).inverse() for p in products(slope)]
            rows = (*self.a.batch, self.a.query)
            if all(n > 0 or made.get(e, 0) < 0 for p in ratio for e, n in p.powers.items()):
                found.append(Gradient(self.wide.narrow(x), self.finished(self.under(self.part_of_end(x))), rows))
            else:
                found.append(Gradient(self.wide.narrow(x), self.finished(self.reached(x, slope)), (*rows, self.a.value)))
        return found

    # the end of the derivation

    def finished(self, e: Expr) -> Expr:
        """The term with weights shared, bounds and h put back, and what the forward knows read from what it hands over."""
        return self.wide.back(self.handed(self.regrouped(e)))

    def regrouped(self, e: Expr) -> Expr:
        """The term with h and the weight as single factors of its products; what the forward computes stays as it is written."""
        new: dict[Expr, Expr] = {}

        def go(x: Expr) -> Expr:
            if x in new or x in self.written or not x.args or x.op == "load":
                return new.get(x, x)
            if x.is_float and x.op in ("mul", "div", "neg"):
                p = self.laws(product(x))
                new[x] = Product(p.number, {go(a): n for a, n in p.powers.items()}).term(x.dtype)
            else:
                new[x] = ex.make(x.op, tuple(map(go, x.args)), x.attr, x.dtype)
            return new[x]

        return go(e)

    def laws(self, p: Product) -> Product:
        """h for its factors; then the weight for h and its lift, or for h and an exponential under the same bound."""
        if self.scale is not None and self.core.powers and p.holds(self.core):
            p = p * self.core.inverse() * Product(1.0, {self.scale: 1})
        lift = product(self.weight) if self.scale is None else product(self.weight) * Product(1.0, {self.scale: 1})
        if p.powers and lift.powers and p.holds(lift):
            return Product(1.0, {self.whole: 1}) * p * lift.inverse()
        if self.lse is not None and self.scale in p.powers:
            for x, n in p.powers.items():
                if n > 0 and self.exponent(x) is not None:
                    return p * Product(1.0, {x: -1, self.scale: -1, self.relative(x): 1})
        return p

    def put_back(self, e: Expr) -> Expr:
        """Bounds as what they are, h as what it is."""
        table = {x: guarded(d) if self.guards(d) else d for d, x in self.bounds.items()}
        if self.scale is not None:
            table[self.scale] = ex.substitute(self.under(self.row_end), table)
        return ex.substitute(e, table)

    def guards(self, d: Expr) -> bool:
        """Does the one-pass form guard the bound?"""
        terms = (self.state.weight, *(c.lift for c in self.state.carried))
        return any(x is guarded(d) for t in terms for x in ex.walk(t))

    def handed(self, e: Expr) -> Expr:
        """The largest terms of the row that the forward knows, read from what it hands over."""
        new: dict[Expr, Expr] = {}

        def go(x: Expr) -> Expr:
            if x not in new:
                if x is self.lse:
                    self.saved[x] = self.lse_of
                new[x] = self.hand(x) if self.is_handed(x) else x
                if new[x] is x and x.args and x.op != "load":
                    args = tuple(map(go, x.args))
                    new[x] = x if args == x.args else ex.make(x.op, args, x.attr, x.dtype)
            return new[x]

        return go(e)

    def is_handed(self, x: Expr) -> bool:
        if x is self.total:
            return True
        if not x.is_float or {self.a.key, self.a.value} & x.ranks:
            return False
        known = {*self.bounds.values(), self.scale}
        inner = ex.loads(x)
        return any(y in known or str(y.attr) in self.carried for y in inner) and not any(self.is_new(y) for y in inner)

    def is_new(self, x: Expr) -> bool:
        """Is it known in the backward alone?"""
        return x in (self.out, self.dout, self.dweight, self.lse, *(r.load for r in self.row))

    def hand(self, x: Expr) -> Expr:
        if x not in self.saved:
            name = "scale" if x is self.scale else "bound" if x in self.bounds.values() else "held"
            like = self.of_row(self.fresh(name), self.put_back(x))
            self.saved[x] = Saved(ex.load(str(like.attr), like.args, x.dtype), self.wide.back(self.put_back(x)))
        return self.saved[x].load


def modest(e: Expr, products: Collection[str]) -> bool:
    """Are the finite values of a term made of products and small numbers alone? Of a tensor or a coordinate nothing is known."""
    match e.op:
        case "const":
            return math.isinf(e.value) or abs(e.value) < MODEST
        case "load":
            return str(e.attr) in products
        case "where":
            return all(modest(x, products) for x in e.args[1:])
        case "cast":
            return e.args[0].dtype == "b1" or (e.args[0].is_float and modest(e.args[0], products))
    return e.is_float and (facts(e.op).bounded or all(modest(x, products) for x in e.args))


def _summed(parts: list[Product], dtype: str) -> Expr:
    out = parts[0].term(dtype)
    for p in parts[1:]:
        out = out + p.term(dtype)
    return out


def _zero(e: Expr) -> bool:
    return e.is_const and e.value == 0.0
