"""Splitting a term into what varies over the key and what is a row scalar: the laws of the one-pass derivation.

multiplicative   u = Σ lift(element, d̂)·after(row)      exponentials keep their running bound d inside
additive         u = element + Σ ±row
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .. import expr as ex
from ..cascade import IDENTITY
from ..expr import Expr
from ..operators import facts, logarithm
from ..terms.constant import leaves, number
from ..terms.laws import separates, unseparable
from .carried import OLD, Bound, Carried, guarded, least
from .score import elements, reading

# Terms above the element that sympy is asked about.
SMALL = 24
# Beside a number as large float32 keeps no seven bits behind the point: too few of the logarithm of a number of keys.
DROWNS = 2.0**16
# The smallest number that no rounding makes 0.
_NORMAL = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-126}


class Stop(Exception):
    """Carries a law and its term to the one place that catches it."""

    def __init__(self, term: Expr, law: str) -> None:
        super().__init__(law)
        self.term, self.law = term, law


@dataclass(frozen=True)
class After:
    """One thing that is done to a finished sum: times or divided by a row scalar, or 0 where a row condition holds."""

    how: str
    term: Expr

    def __call__(self, x: Expr) -> Expr:
        match self.how:
            case "mul":
                return x * self.term
            case "div":
                return x / self.term
        return ex.where(self.term, ex.const(0.0, x.dtype), x)


@dataclass(frozen=True)
class Summand:
    """A summand: `lift` keeps the key (and the guarded bounds), `after` what was deferred, `bounds` what is repaired."""

    lift: Expr
    after: tuple[After, ...] = ()
    bounds: tuple[tuple[Bound, float], ...] = ()

    def done(self, x: Expr) -> Expr:
        for a in self.after:
            x = a(x)
        return x


def powers(*groups: tuple[tuple[Bound, float], ...]) -> tuple[tuple[Bound, float], ...]:
    table: dict[Bound, float] = {}
    for g in groups:
        for b, k in g:
            table[b] = table.get(b, 0.0) + k
    return tuple((b, k) for b, k in table.items() if k != 0.0)


@dataclass(frozen=True)
class SplitContext:
    """What a split knows of the cascade around a term.

    `key` is the rank that is reduced and `length` its size; `exposed` are the terms from which a running bound may be
    subtracted, `products` tensors that are finite, `rows` the row tensors; `row` names the coordinates of a row.
    """

    key: str
    length: Expr
    exposed: tuple[Expr, ...]
    products: frozenset[str]
    rows: frozenset[str]
    row: tuple[str, ...]
    accumulate: str


class Splitter:
    """Splits terms over carried names; `ops` says how each carried name is reduced, `bodies` what it sums."""

    def __init__(self, context: SplitContext) -> None:
        self.context, self.key = context, context.key
        self.carried: list[Carried] = []
        self.ops: dict[str, str] = {}
        self.bodies: dict[str, Expr] = {}
        self.memo: dict[Expr, tuple[Summand, ...]] = {}

    def rows(self, e: Expr) -> frozenset[str]:
        """The carried names that a term reads."""
        return frozenset(str(x.attr) for x in ex.loads(e) if str(x.attr) in self.ops)

    def mixed(self, e: Expr) -> bool:
        return self.key in e.ranks and bool(self.rows(e))

    def reads(self, e: Expr) -> tuple[Expr, ...]:
        return tuple(x for x in ex.loads(e) if str(x.attr) in self.ops)

    def before(self, e: Expr) -> Expr:
        """The term with the values before this tile."""
        return ex.substitute(e, {x: ex.load(OLD + str(x.attr), x.args, x.dtype) for x in self.reads(e)})

    def guarded(self, d: Expr) -> Expr:
        """d̂: the bound, or 0 where it is −∞; the bound itself where the scores cannot be −∞."""
        return guarded(d) if self.can_empty else d

    @cached_property
    def can_empty(self) -> bool:
        """May a score be −∞? Products are finite; a tensor that is added may hold −∞, and large fills may add up."""
        products = self.context.products
        for root in self.context.exposed:
            rowed = reading(root, self.context.rows)
            for e in ex.walk(root):
                if self.key not in e.ranks or e in rowed:
                    continue
                if any(x.is_const and x.is_float and not abs(x.value) < 1e30 for x in e.args):
                    return True
                if e.op == "load" and e.is_float and str(e.attr) not in products:
                    return True
                if facts(e.op).pole and self.key in e.args[-1].ranks:
                    return True
        return False

    @cached_property
    def can_drown(self) -> bool:
        """May a row's scores all be so low that its bound swallows a logarithm? What a whole row gets added counts, too."""
        for root in self.context.exposed:
            rowed = reading(root, self.context.rows)
            for e in ex.walk(root):
                if e in rowed:
                    continue
                if any(x.is_const and x.is_float and not abs(x.value) < DROWNS for x in e.args):
                    return True
                if e.op == "load" and e.is_float and str(e.attr) not in (*self.context.products, *self.ops):
                    return True
        return False

    def split(self, e: Expr) -> tuple[Summand, ...]:
        """The term as a sum of parts lift·after; raises Stop with the law that fails."""
        if e not in self.memo:
            try:
                self.memo[e] = self._split(e)
            except Stop:
                part = self.probed(e)
                if part is None:
                    raise
                self.memo[e] = (part,)
        return self.memo[e]

    def probed(self, e: Expr) -> Summand | None:
        """g(x, r) = g(x, 1)·g(x₀, r)/g(x₀, 1), where sympy proves that g separates and no rule above knows how."""
        found = elements(e, frozenset(self.ops), self.key)
        rows = self.reads(e)
        if len(found) != 1 or sum(1 for _ in ex.walk(e)) > SMALL + sum(1 for _ in ex.walk(found[0])):
            return None
        (x,) = found
        # of a tensor, a coordinate or a size nothing is known
        known = not leaves((e,), {x, *rows}) and not any(self.key in r.ranks for r in rows)
        if not known or self.grows(e) or not separates(e, x, rows):
            return None
        for point in (1.0, 2.0):
            part = self.at_point(e, x, rows, point)
            if part is not None:
                return part
        return None

    def grows(self, e: Expr) -> bool:
        """Does an exponential of the element take a row scalar with it, without which it may pass all bounds?"""
        return any(facts(t.op).steep and self.mixed(t) for t in ex.walk(e))

    def at_point(self, e: Expr, x: Expr, rows: tuple[Expr, ...], point: float) -> Summand | None:
        one, at = {r: ex.const(1.0, r.dtype) for r in rows}, {x: ex.const(point, x.dtype)}
        lift, row, unit = (
            ex.substitute(e, one),
            ex.substitute(e, at),
            float(number(ex.substitute(e, {**one, **at}), {})),
        )
        if unit == 0.0 or not math.isfinite(unit):
            return None
        # The proof is for positive symbols: signs, zero and domains are tried, as far as the element takes them.
        o = facts(x.op)
        values = [v for v in (-1.7, -0.3, 0.0, 0.4, 2.1) if o.range[0] <= v <= o.range[1] and not (o.positive and v == 0)]
        for v, d in itertools.product(values, (0.0, 0.3, 1.9)):
            known = {x: v, **dict.fromkeys(rows, d)}
            with np.errstate(all="ignore"):
                apart = number(lift, {}, known) * number(row, {}, known) / unit
            if not np.isclose(number(e, {}, known), apart, rtol=1e-9, atol=0.0, equal_nan=True):
                return None
        return Summand(lift, (After("mul", row / unit),))

    def _split(self, e: Expr) -> tuple[Summand, ...]:
        if not self.rows(e):
            return (Summand(e),)
        if self.key not in e.ranks:
            return (Summand(ex.const(1.0, e.dtype if e.is_float else "f32"), (After("mul", e),)),)
        match e.op:
            case "add" | "sub":
                right = self.split(e.args[1])
                if e.op == "sub":
                    right = tuple(replace(p, lift=-p.lift) for p in right)
                return _merge((*self.split(e.args[0]), *right))
            case "neg":
                return tuple(replace(p, lift=-p.lift) for p in self.split(e.args[0]))
            case "cast":
                return tuple(replace(p, lift=ex.cast(p.lift, e.dtype)) for p in self.split(e.args[0]))
            case "mul":
                return self.product(e)
            case "div" | "reciprocal":
                return self.quotient(e)
            case "pow" if e.args[1].is_const:
                return self.whole_power(e, e.args[0], float(e.args[1].value))
            case "where":
                return self.select(e)
        o = facts(e.op)
        match o.law:
            case "exponential":
                return (self.exponential(e),)
            case "power":
                return (self.power(e, e.args[0], o.of),)
            case "homogeneous":
                return (self.homogeneous(e),)
        raise self.stop(e)

    def stop(self, e: Expr) -> Stop:
        return Stop(e, unseparable(e, self.key, self.rows(e)))

    def product(self, e: Expr) -> tuple[Summand, ...]:
        left, right = (self.split(x) for x in e.args)
        return _merge(
            tuple(
                Summand(_unit(x.lift * y.lift, x.lift, y.lift), x.after + y.after, powers(x.bounds, y.bounds))
                for x in left
                for y in right
            )
        )

    def quotient(self, e: Expr) -> tuple[Summand, ...]:
        above = self.split(e.args[0]) if e.op == "div" else (Summand(ex.const(1.0, e.dtype)),)
        below = e.args[-1]
        if self.key not in below.ranks:
            return tuple(replace(p, after=(*p.after, After("div", below))) for p in above)
        parts = self.split(below)
        if len(parts) != 1 or any(a.how == "zero" for a in parts[0].after):
            raise self.stop(e)
        turned = tuple(After("div" if a.how == "mul" else "mul", a.term) for a in parts[0].after)
        down = tuple((b, -k) for b, k in parts[0].bounds)
        return tuple(Summand(p.lift / parts[0].lift, p.after + turned, powers(p.bounds, down)) for p in above)

    def exponential(self, e: Expr) -> Summand:
        """exp(s − d − log l) = exp(s − d)/l: bounds stay inside and are repaired, sums move behind."""
        try:
            element, rest = self.apart(e.args[0])
        except Stop as stop:
            raise Stop(e, f"{e.op} of a term that splits into no sum: {stop.law}") from stop
        after: list[After] = []
        falls: list[tuple[int, Expr]] = []
        log = logarithm(e.op)
        for sign, t in rest:
            ops = {self.ops[n] for n in self.rows(t)}
            if ops and ops <= {"max", "min"}:
                falls.append((sign, t))
            elif t.op != log and ops & {"max", "min"}:
                raise self.stop(e)
            elif t.op == log:
                after.append(After("mul" if sign > 0 else "div", t.args[0]))
            else:
                after.append(After("mul" if sign > 0 else "div", ex.unary(e.op, t)))
        if not falls:
            return Summand(ex.unary(e.op, element), tuple(after))
        d = self.bound(falls)
        if self.slope(d) < 0:
            # exp(s + max s) grows by itself, as the model wrote it: nothing to keep small
            return Summand(ex.unary(e.op, element), (*after, After("div", ex.unary(e.op, d))))
        bound = Bound(e.op, d, self.slope(d) > 0)
        u = e.args[0]
        if after and (self.can_empty or self.can_drown) and u.op == "sub" and u.args[0] is element:
            # exp(s − (d + log l)): with all scores at a large fill, d swallows log l, and the model's weights are 1
            after = [After("mul", ex.unary(e.op, d - u.args[1]))]
        return Summand(ex.unary(e.op, element - self.guarded(d)), tuple(after), ((bound, 1.0),))

    def bound(self, falls: list[tuple[int, Expr]]) -> Expr:
        """d = −Σ of the row addends."""
        out: Expr | None = None
        for sign, t in sorted(falls, key=lambda f: f[0]):
            if out is None:
                out = t if sign < 0 else -t
            else:
                out = out + t if sign < 0 else out - t
        assert out is not None
        return out

    def slope(self, d: Expr) -> int:
        """1: never falls as keys are added; −1: never rises; 0: unknown."""
        if not self.rows(d):
            return 2
        if d.op == "load":
            return {"max": 1, "min": -1}.get(self.ops.get(str(d.attr), ""), 0)
        signs = [self.slope(x) for x in d.args]
        if d.op == "neg":
            return -signs[0]
        if d.op == "sub":
            signs[1] = -signs[1] if abs(signs[1]) == 1 else signs[1]
        if d.op == "mul" and any(x.is_const and float(x.value) < 0 for x in d.args):
            signs = [-s if abs(s) == 1 else s for s in signs]
        if d.op in ("mul", "div") and not any(x.is_const for x in d.args):
            return 0
        if d.op not in ("add", "sub", "max", "min", "mul", "div", "cast"):
            return 0
        known = {s for s in signs if s != 2}
        return known.pop() if len(known) == 1 else 0

    def whole_power(self, e: Expr, base: Expr, k: float) -> tuple[Summand, ...]:
        """(f + h)^k = Σ C(k, i)·f^i·h^(k − i) for k = 2, 3, 4: the moments of f."""
        if k not in (2.0, 3.0, 4.0) or len(self.split(base)) == 1:
            return (self.power(e, base, k),)
        out = base
        for _ in range(int(k) - 1):
            out = Expr("mul", (out, base), None, e.dtype)
        return self.split(out)

    def power(self, e: Expr, base: Expr, k: float) -> Summand:
        """(f·h)^k = f^k·h^k for whole k, or where both are at least 0."""
        parts = self.split(base)
        if len(parts) != 1:
            raise self.stop(e)
        (p,) = parts
        if not k.is_integer() and not (all(self.nonnegative(a.term) for a in p.after) and self.nonnegative(p.lift)):
            raise Stop(e, "a root of a product splits only where both factors are provably at least 0")
        # 0^k is 0 for k > 0 alone
        if k <= 0 and any(a.how == "zero" for a in p.after):
            raise self.stop(e)
        after = tuple(a if a.how == "zero" else After(a.how, _power(a.term, k)) for a in p.after)
        return Summand(_power(p.lift, k), after, tuple((b, k * n) for b, n in p.bounds))

    def homogeneous(self, e: Expr) -> Summand:
        """|f·h| = |f|·|h|; relu(f·h) = relu(f)·h where h > 0, and relu(−1/0) is 0, which −1·∞ and 0/0 are not."""
        parts = self.split(e.args[0])
        if len(parts) != 1:
            raise self.stop(e)
        (p,) = parts
        after = p.after
        if e.op == "abs":
            after = tuple(a if a.how == "zero" else After(a.how, ex.unary("abs", a.term)) for a in p.after)
        elif not all(a.how == "zero" or self.keeps_signs(p.lift, a) for a in p.after):
            raise Stop(e, f"{e.op}(f·h) = {e.op}(f)·h needs h > 0")
        return replace(p, lift=ex.unary(e.op, p.lift), after=after)

    def select(self, e: Expr) -> tuple[Summand, ...]:
        c, x, y = e.args
        if self.mixed(c):
            c = self.of_the_row(c)
            return self.split(ex.where(c, x, y)) if self.mixed(ex.where(c, x, y)) else (Summand(ex.where(c, x, y)),)
        if self.key not in c.ranks:
            if _zero(x):
                return tuple(replace(p, after=(*p.after, After("zero", c))) for p in self.split(y))
            if _zero(y):
                return tuple(replace(p, after=(*p.after, After("zero", ~c))) for p in self.split(x))
            raise Stop(e, "a row condition selects between two terms, neither of which is 0")
        if _zero(x) or _zero(y):
            return self.masked(e, c if _zero(y) else ~c, x if _zero(y) else y)
        left, right = self.split(x), self.split(y)
        if len(left) == len(right) == 1 and (left[0].after, left[0].bounds) == (right[0].after, right[0].bounds):
            return (replace(left[0], lift=ex.where(c, left[0].lift, right[0].lift)),)
        raise self.stop(e)

    def masked(self, e: Expr, keep: Expr, x: Expr) -> tuple[Summand, ...]:
        """where(keep, f·h, 0) = where(keep, f, 0)·h, and 0 for a row that keeps nothing, whatever h is."""
        parts = self.split(x)
        out = []
        for p in parts:
            lift = ex.where(keep, p.lift, ex.const(0.0, p.lift.dtype))
            out.append(replace(p, lift=lift, after=(*p.after, *self.emptied(p, keep))))
        return tuple(out)

    def emptied(self, p: Summand, keep: Expr) -> tuple[After, ...]:
        """What is done to the finished sum of a row that keeps nothing: none here, a guarded sum over nothing is 0."""
        return ()

    def of_the_row(self, c: Expr) -> Expr:
        """A condition on a probability p = u/l (l = Σ u ≥ 0 and maybe more) that holds for a whole row or for no key.

        isnan(p) = isnan(l) or l = 0, because each u is in [0, l]; for the same reason p is never ±∞.
        """
        match c.op:
            case "and" | "or":
                return ex.binary(c.op, *(self.of_the_row(x) if self.mixed(x) else x for x in c.args))
            case "not":
                return ~self.of_the_row(c.args[0])
            case "isnan":
                return self.nan_rows(c.args[0])
            case "ne" if c.args[0] is c.args[1]:
                return self.nan_rows(c.args[0])
            case "isinf":
                self.nan_rows(c.args[0])
                return ex.FALSE
            case "eq" if c.args[1].is_const and math.isinf(c.args[1].value):
                self.nan_rows(c.args[0])
                return ex.FALSE
        raise Stop(c, "a condition on elements depends on a row scalar: a threshold does not split")

    def nan_rows(self, p: Expr) -> Expr:
        while p.op == "cast":
            p = p.args[0]
        if p.op == "div" and self.key not in p.args[1].ranks and self.covers(p.args[1], p.args[0]):
            total = p.args[1]
            return ex.unary("isnan", total) | ex.equal(total, 0.0)
        if facts(p.op).law == "exponential":
            _, rest = self.apart(p.args[0])
            out: Expr = ex.FALSE
            for _, t in rest:
                out = out | ex.unary("isnan", t)
            logs = [t.args[0] for sign, t in rest if sign < 0 and facts(t.op).law == "logarithm"]
            for t in logs:
                out = out | ex.equal(t, 0.0)
            if logs:
                return out
        raise Stop(p, "whether an element is NaN is a fact of the row only for u/Σu with u ≥ 0")

    def covers(self, total: Expr, u: Expr) -> bool:
        """total = Σ u (+ terms that are at least 0), with u ≥ 0."""
        while total.op == "cast":
            total = total.args[0]
        while u.op == "cast":
            u = u.args[0]
        if total.op == "add":
            return any(self.covers(x, u) and self.nonnegative(y) for x, y in (total.args, total.args[::-1]))
        if total.op != "load" or str(total.attr) not in self.bodies:
            return False
        body = self.bodies[str(total.attr)]
        while body.op == "cast":
            body = body.args[0]
        return self.ops.get(str(total.attr)) == "add" and body is u and self.nonnegative(u)

    def correction(self, bounds: tuple[tuple[Bound, float], ...], lift: Expr) -> Expr | None:
        """The factor that moves a sum from the old bounds to the new ones: ∏ base^(k·(d_old − d̂_new))."""
        out: Expr | None = None
        for b, k in bounds:
            if k < 0:
                raise Stop(lift, "a term grows as its running bound rises: no correction stays below 1")
            by = self.before(b.d) - self.guarded(b.d)
            factor = ex.unary(b.base, by if k == 1.0 else by * k)
            if not b.rises:
                start = [ex.load(OLD + str(x.attr), x.args, x.dtype) for x in self.reads(b.d)]
                for x in start:
                    op = self.ops[str(x.attr).removeprefix(OLD)]
                    empty = ex.equal(x, float(IDENTITY[op]))
                    factor = ex.where(empty, ex.const(0.0, factor.dtype), factor)
            out = factor if out is None else out * factor
        return out

    # additive split

    def apart(self, u: Expr) -> tuple[Expr, list[tuple[int, Expr]]]:
        """u = element + Σ ±t: the sub-term with the key and the row addends, equal ones cancelled."""
        element: list[tuple[int, Expr]] = []
        rest: dict[Expr, int] = {}
        plain: list[tuple[int, Expr]] = []
        for sign, t in self.addends(u, 1):
            if self.key in t.ranks:
                element.append((sign, t))
            elif self.rows(t):
                rest[t] = rest.get(t, 0) + sign
            else:
                plain.append((sign, t))
        if not element:
            raise self.stop(u)
        out: Expr | None = None
        for sign, t in sorted(element, key=lambda p: -p[0]) + plain:
            if out is None:
                out = t if sign > 0 else -t
            else:
                out = out + t if sign > 0 else out - t
        assert out is not None
        return out, [(1 if n > 0 else -1, t) for t, n in rest.items() for _ in range(abs(n))]

    def addends(self, u: Expr, sign: int) -> list[tuple[int, Expr]]:
        if u.op in ("max", "min") and self.key not in u.ranks and self.rows(u):
            return self.common(u, sign)
        if not self.mixed(u) and not (self.key not in u.ranks and self.rows(u)):
            return [(sign, u)]
        match u.op:
            case "add" | "sub":
                left = self.addends(u.args[0], sign)
                return left + self.addends(u.args[1], sign if u.op == "add" else -sign)
            case "neg":
                return self.addends(u.args[0], -sign)
            case "cast":
                return [(s, ex.cast(t, u.dtype)) for s, t in self.addends(u.args[0], sign)]
            case "mul":
                for x, k in (u.args, u.args[::-1]):
                    if self.key not in k.ranks and not self.rows(k):
                        return [(s, t * k) for s, t in self.addends(x, sign)]
            case "div":
                x, k = u.args
                if self.key not in k.ranks and not self.rows(k):
                    return [(s, t / k) for s, t in self.addends(x, sign)]
        if self.mixed(u):
            raise Stop(u, f"{u.op} is no element + h({', '.join(sorted(self.rows(u)))})")
        return [(sign, u)]

    def common(self, u: Expr, sign: int) -> list[tuple[int, Expr]]:
        """max(x − d, y − d) = max(x, y) − d"""
        left, right = (self.addends(x, 1) for x in u.args)
        shared = [p for p in left if p in right]
        if not shared:
            return [(sign, u)]
        out = []
        for side in (left, right):
            left_over = list(side)
            for p in shared:
                left_over.remove(p)
            term: Expr = ex.const(0.0, u.dtype)
            for s, t in left_over:
                term = term + t if s > 0 else term - t
            out.append(term)
        return [(sign, ex.binary(u.op, *out)), *((sign * s, t) for s, t in shared)]

    # signs

    def nonnegative(self, e: Expr) -> bool:
        return least(e, self.carried) >= 0.0

    def positive(self, e: Expr) -> bool:
        """More than 0, or the row is degenerate in the model as well (a sum of squares that is 0 divides by 0)."""
        return self.nonnegative(e)

    def keeps_signs(self, f: Expr, a: After) -> bool:
        """Is the row scalar at least 0, and f·h of the sign of f? An element that is never negative has one sign."""
        if not self.nonnegative(a.term) or self.nonnegative(f):
            return self.nonnegative(a.term)
        # what must not be 0, so that nothing is infinite
        divisors = [a.term] if a.how == "div" else []
        divisors += [t.args[-1] for t in ex.walk(a.term) if facts(t.op).pole]
        divisors += [t.args[0] for t in ex.walk(a.term) if t.op == "pow" and not self.nonnegative(t.args[1])]
        return all(least(x, self.carried) >= _NORMAL.get(x.dtype, 1.0) for x in divisors)


def _merge(parts: tuple[Summand, ...]) -> tuple[Summand, ...]:
    table: dict[tuple[object, object], Summand] = {}
    for p in parts:
        k = (p.after, p.bounds)
        table[k] = replace(p, lift=table[k].lift + p.lift) if k in table else p
    return tuple(table.values())


def _unit(whole: Expr, x: Expr, y: Expr) -> Expr:
    return y if _one(x) and y.is_float else x if _one(y) and x.is_float else whole


def _one(e: Expr) -> bool:
    return e.is_const and e.attr == 1.0


def _zero(e: Expr) -> bool:
    while e.op == "cast":
        e = e.args[0]
    return e.is_const and e.attr == 0


def _power(e: Expr, k: float) -> Expr:
    if k == 0.5:
        return ex.unary("sqrt", e)
    if k == -0.5:
        return ex.unary("rsqrt", e)
    if k == 2.0:
        return e * e
    return ex.binary("pow", e, k)
