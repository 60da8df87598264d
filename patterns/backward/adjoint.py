"""The backward of an attention as terms, derived from its one-pass form: what the forward hands over, and every gradient.

    out = h(R)·Σ_m w(x)·V,   R_j = Σ_m g_j(x)           the one-pass form: all that is of the row stands behind the sums
    dW  = Σ_f acc·V,         dV = Σ_p weight·acc        weight = h·w, made again from what is saved
    δ   = Σ_f dOut·out = Σ_m dW·weight                  exchange: the two sums change places
    dx  = dW·h·w'(x) + Σ_j δ·(∂h/∂R_j / h)·g_j'(x)      softmax: weight·(dW − δ)
    dx += Σ_j dN·(∂N/∂R_j)·g_j'(x)                      of a number N(R) of the row that leaves; a log-sum-exp: weight·dN

A bound d that exponentials subtract passes nothing on, because the output does not depend on it: that is proved for every
bound, by ∂h/∂d + Σ_j ∂h/∂R_j·κ_j·R_j + κ·h = 0, where κ·R is what moving d does to a sum R. So no pass over the keys comes
before the one that makes dx, whatever the row rule is. Rows without a key: what the forward makes NaN has NaN gradients
wherever no mask selects 0, and rows that the model sets to 0 pass nothing back, as in PyTorch's own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.carried import RowState
from ..attention.rowstate import derive
from ..attention.score import only, without
from ..expr import Expr
from ..operators import facts, logarithm
from ..verdict import Obstacle
from .derivative import derivative, pullback
from .handed import Handing, Saved, Scalar, modest
from .products import ONE, Monomial, collected, product, products, vanishes


@dataclass(frozen=True)
class RowSum(Scalar):
    """A number of the row that is the sum of a term over one rank."""

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

    `out` and `dout` load the output and its gradient, `dweight` the product dW[…,p,m]. `row` sums over the value rank and
    reads `out`, `dout` and `saved`; `passes` sums over the key rank. `acc` is a term over [P, F]; `weight` and the terms of
    `scores`, one a product, are over [P, M]. `leaves`, the other floats of the score and of the row's end, say their own
    ranks; a tensor may stand there several times. All terms read coordinates, products, inputs, what the prelude makes,
    `saved`, `row` and `dweight`, and are computed in one wide type.
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
        sums = (*self.saved, *self.row, *self.passes)
        lines = [*sums, f"acc = {self.acc}", f"weight = {self.weight}", *self.scores, *self.leaves]
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


class _Backward(Handing):
    """One derivation. Bounds and h are loads of their own until the end, so that no law looks inside."""

    def __init__(self, a: Attention, state: RowState) -> None:
        super().__init__(a, state)
        self.conditions: list[tuple[Expr, float]] = []
        # h, as far as it is of the row, and what of it varies over the values
        self.h = self.bounded(self.levelled(self.coefficient(self.state.finish)))
        self.weight = self.bounded(self.state.weight)
        name = a.cascade.outputs[0]
        index, kind = a.cascade.producers[name][0].out.index, a.cascade.tensor[name].dtype
        self.out, self.dout = ex.load(name, index, kind), ex.load(self.fresh(f"d{name}"), index, kind)
        self.dweight = ex.load(self.fresh("dW"), tuple(map(ex.index, (*a.batch, a.query, a.key))), self.dtype)
        self.own = {self.out, self.dout, self.dweight}
        self.row: list[RowSum] = []
        self.delta: Expr | None = None
        # what leaves of the row, as the forward has it; its gradient stands in the same place
        self.numbers = [(self.of_row(self.fresh(f"d_row{i}"), n), self.bounded(n)) for i, n in enumerate(self.state.further)]
        for (d, _), n in zip(self.numbers, self.state.further):
            self.saved[d] = Saved(d, self.wide.back(n))
        self.own |= {d for d, _ in self.numbers}

    def adjoint(self) -> Adjoint:
        a = self.a
        self.check_bounds()
        self.check_maxima()
        self.check_numbers()
        self.split_end()
        # what the forward computes stays as it is written
        self.written = {x for e in self.lifts() for x in ex.walk(e)} | {self.whole}
        pairs = (*a.batch, a.query, a.key)
        leaves = dict.fromkeys(x for e in self.lifts() for x in ex.loads(e) if self.is_leaf(x))
        found = _or_stop(pullback(self.seeds(), leaves))
        gradients = [Gradient(self.wide.narrow(x), self.finished(d), pairs) for x, d in found.items()]
        names = {e.out.tensor for e in a.products}
        scores = tuple(g for g in gradients if str(g.load.attr) in names)
        others = (*(g for g in gradients if g not in scores), *self.leaves_of_end())
        weight, acc = self.finished(self.cleaned(self.whole)), self.finished(self.acc)
        saved = tuple(self.saved.values())
        return Adjoint(a, self.out, self.dout, self.dweight, saved, tuple(self.row), (), acc, weight, scores, others)

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

    def levelled(self, e: Expr) -> Expr:
        """The maximum of what a bound was subtracted from already: max(x − d, y − d) = 0 for d = max(x, y)."""

        def rule(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if x.op not in ("max", "min") or any(y.op != "sub" for y in args) or args[0].args[1] is not args[1].args[1]:
                return None
            d = args[0].args[1]
            again = ex.binary(x.op, args[0].args[0], args[1].args[0])
            return ex.const(0.0, x.dtype) if again is d and d in self.bounds else None

        return ex.rebuild(e, rule)

    def under(self, h: Expr) -> Expr:
        """h under the conditions of the row: 0 where the output is a number, NaN where it is none."""
        for c, value in reversed(self.conditions):
            h = ex.where(c, math.nan if math.isnan(value) else 0.0, h)
        return h

    def split_end(self) -> None:
        """Split h into what is of the row, which goes to the weight, and what varies over the values, which goes to acc."""
        value = self.a.value
        if any(value in c.ranks for c, _ in self.conditions):
            raise _NoGradient(f"a condition on {value} selects the output")
        self.acc = ex.cast(self.dout, self.dtype)
        row = self.h
        if value in self.h.ranks:
            row = without(self.h, value) or ex.const(1.0, self.dtype)
            self.acc = self.acc * (only(self.h, value) or 1.0)
        self.end, self.core, self.row_h = self.under(row), product(row), row
        if self.carried_loads(row) or self.conditions:
            self.scale = self.of_row("scale:", self.end)
        self.lse = self.logarithm_of_sum()
        self.whole = self.relative(self.weight) or self.weight * (row if self.scale is None else self.scale)

    def logarithm_of_sum(self) -> Saved | None:
        """exp(x − d)/l = exp(x − lse), lse = d + log l: one number a row, where no score is so large that log l is lost."""
        bounds = {b for _, b, _ in self.state.bounds}
        if len(bounds) != 1 or self.core.number != 1.0 or list(self.core.powers.values()) != [-1]:
            return None
        ((b,), (total,)) = bounds, self.core.powers
        x, log = self.exponent(self.weight), logarithm(b.base)
        if not log or x is None or not modest(x):
            return None
        if any(c is not ex.equal(b.d, -math.inf) for c, _ in self.conditions):
            return None
        term = b.d + ex.unary(log, self.put_back(total))
        return Saved(self.of_row(self.fresh("lse"), term), self.wide.back(term))

    def exponent(self, e: Expr) -> Expr | None:
        """x of base^(x − d)."""
        for _, b, _ in self.state.bounds:
            if e.op == b.base and e.args[0].op == "sub" and e.args[0].args[1] is self.bounds[b.d]:
                return e.args[0].args[0]
        return None

    def relative(self, e: Expr) -> Expr | None:
        """base^(x − lse) of base^(x − d), and 0 where the model sets the row to 0."""
        x = self.exponent(e)
        if self.lse is None or x is None:
            return None
        share = ex.unary(e.op, x - self.lse.load)
        zero = any(not math.isnan(value) for _, value in self.conditions)
        return ex.where(ex.equal(self.lse.load, -math.inf), 0.0, share) if zero else share

    def cleaned(self, e: Expr) -> Expr:
        """The weight that meets the values: 0 where the model sets the row to 0, whatever its scores are."""
        if self.scale is None or all(math.isnan(value) for _, value in self.conditions):
            return e
        return ex.where(ex.equal(self.scale, 0.0), 0.0, e)

    # what nothing may reach

    def check_bounds(self) -> None:
        """Does the output stay the same when a bound moves, and with it the sums under it?"""
        kappa = {(name, b.d): -k * math.log(facts(b.base).of) for name, b, k in self.state.bounds}
        for d, x in self.bounds.items():
            moved = self.slope(self.h, x) + self.h * kappa.get((str(self.total.attr), d), 0.0)
            for r in self.carried_loads(self.h):
                moved = moved + self.slope(self.h, r) * (r * kappa.get((str(r.attr), d), 0.0))
            if not vanishes(moved):
                raise _NoGradient(f"the output depends on {d} itself")

    def check_maxima(self) -> None:
        for e in (self.h, *self.lifts()):
            for r in self.carried_loads(e):
                passed = self.carried[str(r.attr)].op == "add" and e is self.h
                if not passed and not _zero(self.slope(e, r)):
                    raise _NoGradient(f"{r} is read beside exponents, and which key has a maximum's gradient is not known")

    def check_numbers(self) -> None:
        """Does what leaves of the row stay the same when a bound moves, and with it the sums under it?"""
        kappa = {(name, b.d): -k * math.log(facts(b.base).of) for name, b, k in self.state.bounds}
        self.numbers = [(d, self.finite(n)) for d, n in self.numbers]
        for _, n in self.numbers:
            for d, x in self.bounds.items():
                moved = self.slope(n, x)
                for r in self.carried_loads(n):
                    moved = moved + self.slope(n, r) * (r * kappa.get((str(r.attr), d), 0.0))
                if not vanishes(moved):
                    raise _NoGradient(f"what leaves of the row depends on {d} itself")
            for r in self.carried_loads(n):
                if self.carried[str(r.attr)].op != "add":
                    raise _NoGradient(f"{r} leaves, and which key has a maximum's gradient is not known")
            if any(self.is_leaf(x) and not _zero(self.slope(n, x)) for x in ex.loads(n)):
                raise _NoGradient("what leaves of the row reads more than the row's sums")

    def finite(self, e: Expr) -> Expr:
        """The number where its bounds are finite: others' rows have no gradients that anybody reads."""

        def rule(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
            return args[2] if x.op == "where" and self.of_infinity(args[0]) else None

        return ex.rebuild(e, rule)

    def of_infinity(self, c: Expr) -> bool:
        """Is a condition that a bound, or its size, is infinite?"""
        bounds = set(self.bounds.values())
        if c.op == "or":
            return all(map(self.of_infinity, c.args))
        if c.op != "eq" or not c.args[1].is_const or not math.isinf(float(c.args[1].value)):
            return False
        x = c.args[0].args[0] if c.args[0].op == "abs" else c.args[0]
        return x in bounds

    def slope(self, e: Expr, x: Expr) -> Expr:
        found = derivative(e, x)
        if isinstance(found, Obstacle):
            raise _NoGradient(found.reason)
        return found

    # what reaches the sums, and the end's own leaves

    def seeds(self) -> Mapping[Expr, Expr]:
        """The gradient of each lift: of the weight h·dW, of a sum what reaches it from the end."""
        seeds = {self.weight: self.dweight * self.row_h}
        for r in self.carried_loads(self.h):
            c = self.carried[str(r.attr)]
            if c.op == "add":
                lift, part = self.bounded(c.lift), self.part_of_end(r)
                seeds[lift] = seeds[lift] + part if lift in seeds else part
        for d, n in self.numbers:
            for r in self.carried_loads(n):
                lift, part = self.bounded(self.carried[str(r.attr)].lift), d * self.slope(n, r)
                seeds[lift] = seeds[lift] + part if lift in seeds else part
        return {lift: self.seed(d) for lift, d in seeds.items()}

    def seed(self, d: Expr) -> Expr:
        """h·(what is left), where all parts have h; else the whole under the row's conditions."""
        common, rest = collected(d)
        if self.scale is not None and common.holds(self.core):
            common = common * self.core.inverse() * Monomial(self.core.number, {self.scale: 1})
            return (common * product(rest)).term(d.dtype)
        return self.under((common * product(rest)).term(d.dtype))

    def part_of_end(self, x: Expr) -> Expr:
        """Σ_f dOut·total·∂h/∂x as a scalar of the row: δ·(∂h/∂x)/h, where that divides by nothing but what h divides by."""
        slope = self.slope(self.h, x)
        if (ratio := self.ratio(slope)) is not None:
            return _summed([Monomial(1.0, {self.shared_delta(): 1}) * p for p in ratio], self.dtype)
        return self.row_sum("eta", self.finished(self.reached(slope)))

    def ratio(self, slope: Expr) -> list[Monomial] | None:
        """(∂h/∂x)/h as products, where it is of the row and divides by nothing that h does not divide by itself."""
        whole = product(self.h)
        parts = [p * whole.inverse() for p in products(slope)]
        safe = all(n > 0 or whole.powers.get(e, 0) < 0 for p in parts for e, n in p.powers.items())
        return parts if safe and not any(self.a.value in e.ranks for p in parts for e in p.powers) else None

    def reached(self, slope: Expr) -> Expr:
        """dOut·total·∂h/∂x over [P, F]."""
        return self.under(ex.cast(self.dout, self.dtype) * self.total * slope)

    def shared_delta(self) -> Expr:
        if self.delta is None:
            term = ex.cast(self.dout, self.dtype) * ex.cast(self.out, self.dtype)
            self.delta = self.row_sum("delta", term)
        return self.delta

    def row_sum(self, name: str, term: Expr) -> Expr:
        at = tuple(map(ex.index, (*self.a.batch, self.a.query)))
        load = ex.load(self.fresh(name), at, self.dtype)
        self.row.append(RowSum(load, term, self.a.value))
        self.own.add(load)
        return load

    def leaves_of_end(self) -> list[Gradient]:
        found = []
        rows = (*self.a.batch, self.a.query)
        for x in ex.loads(self.h):
            if not self.is_leaf(x) or _zero(slope := self.slope(self.h, x)):
                continue
            of_row = self.ratio(slope) is not None
            term = self.under(self.part_of_end(x)) if of_row else self.reached(slope)
            space = rows if of_row else (*rows, self.a.value)
            found.append(Gradient(self.wide.narrow(x), self.finished(term), space))
        return found

    # the end of the derivation

    def finished(self, e: Expr) -> Expr:
        """The term with weights shared, and what the forward knows read from what it hands over."""
        return self.handed(self.regrouped(e))

    def regrouped(self, e: Expr) -> Expr:
        """The term with h and the weight as single factors of its products."""
        new: dict[Expr, Expr] = {}

        def go(x: Expr) -> Expr:
            if x in new or x in self.written or not x.args or x.op == "load":
                return new.get(x, x)
            if x.is_float and x.op in ("mul", "div", "neg"):
                p = self.laws(self.opened(product(x)))
                new[x] = Monomial(p.number, {go(a): n for a, n in p.powers.items()}).term(x.dtype)
            else:
                new[x] = ex.make(x.op, tuple(map(go, x.args)), x.attr, x.dtype)
            return new[x]

        return go(e)

    def opened(self, p: Monomial) -> Monomial:
        """Sums all of whose parts have h, as h times the rest: (dW·h·f − δ·h)·x = h·(dW·f − δ)·x."""
        h = self.core if self.scale is None else Monomial(1.0, {self.scale: 1})
        out = Monomial(p.number, {})
        for a, n in p.powers.items():
            common, rest = collected(a) if n == 1 and a.op in ("add", "sub") else (ONE, a)
            opens = common.powers and h.powers and common.holds(h)
            out = out * (common * product(rest) if opens else Monomial(1.0, {a: n}))
        return out

    def laws(self, p: Monomial) -> Monomial:
        """h for its factors; then the weight for h and its lift, or a share for h and an exponential under its bound."""
        h = self.core if self.scale is None else Monomial(1.0, {self.scale: 1})
        if self.scale is not None and self.core.powers and p.holds(self.core):
            p = p * self.core.inverse() * h
        lift = product(self.weight) * h
        if lift.powers and p.holds(lift):
            return Monomial(1.0, {self.whole: 1}) * p * lift.inverse()
        if self.scale is not None and self.scale in p.powers:
            for x, n in p.powers.items():
                if n > 0 and self.exponent(x) is not None:
                    # a share comes first: 0 at a masked key, whatever else is multiplied
                    share = self.relative(x) or x * self.scale
                    self.written.add(share)
                    return Monomial(1.0, {share: 1}) * p * Monomial(1.0, {x: -1, self.scale: -1})
        return p


def _or_stop(found: dict[Expr, Expr] | Obstacle) -> dict[Expr, Expr]:
    if isinstance(found, Obstacle):
        raise _NoGradient(found.reason)
    return found


def _summed(parts: list[Monomial], dtype: str) -> Expr:
    out = parts[0].term(dtype)
    for p in parts[1:]:
        out = out + p.term(dtype)
    return out


def _zero(e: Expr) -> bool:
    return e.is_const and e.value == 0.0
