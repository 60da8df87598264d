"""The one-pass form of a row program: which state a row carries over tiles of keys, derived from its reductions.

A row program is a chain of reductions over the key rank, each of which may use the results of those before it:
    r_1 = ⊕_m g_1(s_m)      r_2 = ⊕_m g_2(s_m, r_1)      …      out = finish(Σ_m w(s_m, r)·V_m, r)
Three laws turn it into one pass. s stands for what varies over the key (an element), r for earlier row scalars.
    defer    Σ f(s)·h(r) = h(r)·Σ f(s);   max f(s) + h(r) = h(r) + max f(s)      h moves behind the reduction
    repair   Σ exp(s − d), d a running bound:  state ← state·exp(d_old − d_new) + Σ_tile exp(s − d_new)
    expand   Σ (f(s) + g(s))·h = h·Σ f(s) + h·Σ g(s);   Σ h(r) = M·h(r)
A chain that none of them splits has no such form, and the Miss states the law that failed.

What a code generator does with a `RowState` (both generators follow this, to the letter):
    start        every `Carried` holds `identity`; the accumulator of the contraction holds 0
    each tile    for each Carried in order, with T = reduce `op` over the tile's keys of `lift`:
                     new = op(old, T)                  when `correction` is None
                     new = old · correction + T        op "add"        (op "max" and "min" never have a correction)
                 accumulator = accumulator · correction + Σ_tile weight·V       (factor 1 when it is None)
    after        the output is `finish`
In `lift` and `weight` a load of a carried name is its NEW value; a Carried reads only Carried before it. In a
`correction` a load of NAME is the new value and a load of `old:NAME` the value before this tile. In `finish` a load of
a carried name, or of the contraction's tensor, is the final value. All of them are loaded at the row's coordinates.
Keys beyond the end of a ragged tile, and keys of tiles that are skipped, take no part: they contribute `identity` to
a carried value and 0 to the accumulator (select, do not multiply: their lift may be NaN).

Rows whose bound d is −∞, because every key so far is masked with −∞: `s − d` would be NaN and would stay NaN. So the
bound is guarded where it is subtracted, d̂ = where(d = −∞, 0, d), in lifts and on the new side of corrections:
`exp(s − d̂)` is then 0 and `exp(d_old − d̂_new)` is 0 as long as d_old = −∞, whatever d_new is; both are at most 1
otherwise. If the bound is −∞ at the end, the guarded state holds 0 where the model's own arithmetic gives
exp(−∞ − (−∞)) = NaN: `finish` restores that NaN by where(d = −∞, NaN, …), unless its result is the same without
(0/0 is NaN as well; a rule that selects 0 for such rows selects it). A mask that is applied to the weights themselves
gives 0 for a row without a key even if its normaliser is NaN: then a Carried of op "max" holds whether a key was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy

from . import expr as ex
from .cascade import IDENTITY, Access, Cascade, Einsum, Rank, Size, Tensor, size_term, verify
from .expr import Expr
from .recognise import Attention, Miss, number

OLD = "old:"


@dataclass(frozen=True)
class Carried:
    """One row scalar that is carried over tiles; the module's docstring says how it is updated."""

    name: str
    op: str
    identity: float
    lift: Expr
    correction: Expr | None = None

    def __str__(self) -> str:
        factor = f" · {self.correction}" if self.correction is not None else ""
        return f"{self.name} ← {self.op}({self.name}{factor}, {self.lift})"


@dataclass(frozen=True)
class RowState:
    """The carried scalars in order of dependence, what multiplies V, and how the row ends."""

    carried: tuple[Carried, ...]
    weight: Expr
    correction: Expr | None
    finish: Expr

    def __str__(self) -> str:
        factor = f" · {self.correction}" if self.correction is not None else ""
        lines = [*map(str, self.carried), f"acc ← acc{factor} + Σ ({self.weight})·V", f"out = {self.finish}"]
        return "\n".join(lines)


class _Stop(Exception):
    """Carries a Miss to the one place that catches it."""

    def __init__(self, term: Expr, law: str) -> None:
        super().__init__(law)
        self.term, self.law = term, law


@lru_cache(maxsize=512)
def derive(a: Attention) -> RowState | Miss:
    """The one-pass form of an attention's row program, or the law that fails."""
    d = _Derivation(a)
    where: object = ""
    try:
        for r in a.row:
            where = r.out
            d.reduction(r)
        where = a.contraction.out
        return d.state()
    except _Stop as stop:
        return Miss(f"no one-pass form: {stop.law}, in {_short(stop.term)}", str(where), depth=6)


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) <= 160 else text[:157] + "…"


# --- what a term is, as a product of a part with the key and a part without ---------------------------------------


@dataclass(frozen=True)
class _After:
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
class _Bound:
    """A running bound d that `base`^(element − d) subtracts. `rises`: d never falls as tiles are added."""

    base: str
    d: Expr
    rises: bool


@dataclass(frozen=True)
class _Part:
    """A summand: `lift` keeps the key (and the guarded bounds), `after` what was deferred, `bounds` what is repaired."""

    lift: Expr
    after: tuple[_After, ...] = ()
    bounds: tuple[tuple[_Bound, float], ...] = ()

    def done(self, x: Expr) -> Expr:
        for a in self.after:
            x = a(x)
        return x


def _powers(*groups: tuple[tuple[_Bound, float], ...]) -> tuple[tuple[_Bound, float], ...]:
    table: dict[_Bound, float] = {}
    for g in groups:
        for b, k in g:
            table[b] = table.get(b, 0.0) + k
    return tuple((b, k) for b, k in table.items() if k != 0.0)


class _Derivation:
    """Walks the chain of reductions; `final` says what each row tensor is in terms of carried ones."""

    def __init__(self, a: Attention) -> None:
        self.a, self.key = a, a.key
        self.carried: list[Carried] = []
        self.ops: dict[str, str] = {}
        self.bodies: dict[str, Expr] = {}
        self.final: dict[Expr, Expr] = {}
        self.bounds: dict[str, tuple[tuple[_Bound, float], ...]] = {}
        self.memo: dict[Expr, tuple[_Part, ...]] = {}

    # what varies over what

    def rows(self, e: Expr) -> frozenset[str]:
        """The carried names that a term reads."""
        return frozenset(str(x.attr) for x in ex.loads(e) if str(x.attr) in self.ops)

    def mixed(self, e: Expr) -> bool:
        return self.key in e.ranks and bool(self.rows(e))

    # the chain

    def reduction(self, r: Einsum) -> None:
        body = ex.substitute(r.body, self.final)
        name = r.out.tensor
        dtype = self.a.cascade.tensor[name].dtype
        here = ex.load(name, r.out.index, dtype)
        self.bodies[name] = body
        match r.op:
            case "add":
                value = self.sum(name, body, here)
            case "max" | "min":
                value = self.extreme(name, str(r.op), body, here)
            case "or" | "and":
                value = self.logical(name, str(r.op), body, here)
            case _:
                if self.rows(body):
                    raise _Stop(body, f"a row reduction by {r.op} that uses an earlier one cannot be rescaled")
                value = self.carry(name, str(r.op), body, here, ())
        self.final[here] = ex.cast(value, dtype)

    def sum(self, name: str, body: Expr, here: Expr) -> Expr:
        out: Expr | None = None
        for p in self.split(body):
            if self.key in p.lift.ranks:
                total = self.carry(name, "add", p.lift, here, p.bounds)
            else:
                # Σ_m of what does not vary over m: as often as there are keys
                total = ex.cast(size_term(self.a.cascade.rank[self.key].size), here.dtype) * p.lift
            value = p.done(total)
            out = value if out is None else out + value
        assert out is not None
        return out

    def extreme(self, name: str, op: str, body: Expr, here: Expr) -> Expr:
        if not self.rows(body):
            return self.carry(name, op, body, here, ())
        try:
            element, rest = self.apart(body)
        except _Stop as stop:
            return self.scaled_extreme(name, op, body, here, stop)
        # max_m (s − d) = (max_m s) − d
        out = self.carry(name, op, element, here, ())
        for sign, t in rest:
            out = out + t if sign > 0 else out - t
        return out

    def scaled_extreme(self, name: str, op: str, body: Expr, here: Expr, stop: _Stop) -> Expr:
        """max_m f(s)·h = h·max_m f(s) where h > 0."""
        parts = self.split(body)
        plain = len(parts) == 1 and not parts[0].bounds
        if not plain or not all(a.how != "zero" and self.positive(a.term) for a in parts[0].after):
            law = f"{op} of a term that is neither f(element) + h(row) nor f(element)·h(row) with h > 0"
            raise _Stop(body, law) from stop
        return parts[0].done(self.carry(name, op, parts[0].lift, here, ()))

    def logical(self, name: str, op: str, body: Expr, here: Expr) -> Expr:
        if self.rows(body):
            raise _Stop(body, "a condition on elements depends on an earlier row scalar")
        if op == "and" and body.op == "eq" and body.args[1].is_const and body.args[1].attr == -math.inf:
            # all_m (s = −∞) = (max_m s = −∞)
            like = ex.load(name, here.args, body.args[0].dtype)
            return ex.equal(self.carry(name, "max", body.args[0], like, ()), -math.inf)
        # any_m c = max_m [c] > 0, all_m c = min_m [c] > 0
        like = ex.load(name, here.args, self.a.cascade.accumulate)
        one = ex.where(ex.cast(body, "b1"), ex.const(1.0, like.dtype), ex.const(0.0, like.dtype))
        return self.carry(name, "max" if op == "or" else "min", one, like, ()) > 0.0

    def carry(self, name: str, op: str, lift: Expr, here: Expr, bounds: tuple[tuple[_Bound, float], ...]) -> Expr:
        """Carry a reduction and answer its load; one that is carried already is not carried twice."""
        correction = self.correction(bounds, lift)
        for c in self.carried:
            if (c.op, c.lift, c.correction) == (op, lift, correction):
                return ex.load(c.name, here.args, here.dtype)
        taken = {c.name for c in self.carried}
        while name in taken:
            name += "_"
        self.carried.append(Carried(name, op, float(IDENTITY[op]), lift, correction))
        self.ops[name] = op
        self.bounds[name] = bounds
        return ex.load(name, here.args, here.dtype)

    def correction(self, bounds: tuple[tuple[_Bound, float], ...], lift: Expr) -> Expr | None:
        """The factor that moves a sum from the old bounds to the new ones: ∏ base^(k·(d_old − d̂_new))."""
        out: Expr | None = None
        for b, k in bounds:
            if k < 0:
                raise _Stop(lift, "a term grows as its running bound rises: no correction stays below 1")
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

    def reads(self, e: Expr) -> tuple[Expr, ...]:
        return tuple(x for x in ex.loads(e) if str(x.attr) in self.ops)

    def before(self, e: Expr) -> Expr:
        """The term with the values before this tile."""
        return ex.substitute(e, {x: ex.load(OLD + str(x.attr), x.args, x.dtype) for x in self.reads(e)})

    def guarded(self, d: Expr) -> Expr:
        """d̂: the bound, or 0 where it is −∞; the bound itself where the scores cannot be −∞."""
        if not self.can_empty:
            return d
        return ex.where(ex.equal(d, -math.inf), ex.const(0.0, d.dtype), d)

    @property
    def can_empty(self) -> bool:
        """May a score be −∞? Products are finite; a tensor that is added may hold −∞, and large fills may add up."""
        products = {e.out.tensor for e in self.a.products}
        for e in ex.walk(self.a.score):
            if e.is_const and e.is_float and not abs(e.value) < 1e30:
                return True
            if e.op == "load" and e.is_float and str(e.attr) not in products and self.key in e.ranks:
                return True
            if e.op in ("log", "log2", "log1p", "div", "reciprocal", "rsqrt") and self.key in e.args[-1].ranks:
                return True
        return False

    def state(self) -> RowState:
        a = self.a
        weight = ex.substitute(a.weight, self.final)
        parts = self.split(weight)
        if len(parts) != 1:
            raise _Stop(weight, f"the weight is a sum of {len(parts)} terms that scale apart: one accumulator holds one")
        (part,) = parts
        at = a.contraction.out
        total = next((x for x in ex.loads(a.finish) if str(x.attr) == at.tensor), None)
        assert total is not None
        self.bounds[at.tensor] = part.bounds
        correction = self.correction(part.bounds, part.lift)
        finish = ex.substitute(a.finish, {total: part.done(total), **self.final})
        finish = self.restored(finish)
        return RowState(self.used(part.lift, correction, finish), part.lift, correction, finish)

    def used(self, *roots: Expr | None) -> tuple[Carried, ...]:
        """The carried scalars that something reads, in order."""
        names: set[str] = set()
        todo = [t for t in roots if t is not None]
        while todo:
            for x in ex.loads(todo.pop()):
                name = str(x.attr).removeprefix(OLD)
                if name not in self.ops or name in names:
                    continue
                names.add(name)
                c = next(c for c in self.carried if c.name == name)
                todo += [c.lift] if c.correction is None else [c.lift, c.correction]
        return tuple(c for c in self.carried if c.name in names)

    def restored(self, finish: Expr) -> Expr:
        """The epilogue with the model's NaN for rows whose bound is −∞, where it is not there by itself."""
        repaired = {n: tuple(b for b, _ in bs) for n, bs in self.bounds.items() if bs}
        if not repaired or not self.can_empty:
            return finish
        # What the row ends with when every score is −∞, and with it every bound: all that a bound holds is −∞.
        known = {self.a.score: float("-inf")}
        bounds = [b.d for bs in repaired.values() for b in bs]
        values: dict[str, object] = {str(x.attr): -math.inf for d in bounds for x in ex.loads(d) if x.is_float}
        for c in self.carried:
            if c.op in ("max", "min"):
                values[c.name] = number(c.lift, values, known) if self.key in c.lift.ranks else c.identity
            elif c.name not in repaired:
                values[c.name] = 2 * number(c.lift, values, known)
        guarded = number(finish, {**values, **dict.fromkeys(repaired, 0.0)})
        model = number(finish, {**values, **dict.fromkeys(repaired, math.nan)})
        same = (math.isnan(guarded) and math.isnan(model)) or float(guarded) == float(model)
        if same:
            return finish
        table = {}
        for x in ex.loads(finish):
            if str(x.attr) in repaired:
                empty: Expr = ex.FALSE
                for b in repaired[str(x.attr)]:
                    empty = empty | ex.equal(b.d, -math.inf)
                table[x] = ex.where(empty, ex.const(math.nan, x.dtype), x)
        return ex.substitute(finish, table)

    # multiplicative split

    def split(self, e: Expr) -> tuple[_Part, ...]:
        """The term as a sum of parts lift·after; raises _Stop with the law that fails."""
        if e not in self.memo:
            self.memo[e] = self._split(e)
        return self.memo[e]

    def _split(self, e: Expr) -> tuple[_Part, ...]:
        if not self.rows(e):
            return (_Part(e),)
        if self.key not in e.ranks:
            return (_Part(ex.const(1.0, e.dtype if e.is_float else "f32"), (_After("mul", e),)),)
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
            case "exp" | "exp2":
                return (self.exponential(e),)
            case "pow" if e.args[1].is_const:
                return (self.power(e, e.args[0], float(e.args[1].value)),)
            case "sqrt":
                return (self.power(e, e.args[0], 0.5),)
            case "rsqrt":
                return (self.power(e, e.args[0], -0.5),)
            case "abs" | "relu":
                return (self.homogeneous(e),)
            case "where":
                return self.select(e)
        raise self.stop(e)

    def stop(self, e: Expr) -> _Stop:
        return _Stop(e, unseparable(e, self.key, self.rows(e)))

    def product(self, e: Expr) -> tuple[_Part, ...]:
        left, right = (self.split(x) for x in e.args)
        return _merge(
            tuple(
                _Part(_unit(x.lift * y.lift, x.lift, y.lift), x.after + y.after, _powers(x.bounds, y.bounds))
                for x in left
                for y in right
            )
        )

    def quotient(self, e: Expr) -> tuple[_Part, ...]:
        above = self.split(e.args[0]) if e.op == "div" else (_Part(ex.const(1.0, e.dtype)),)
        below = e.args[-1]
        if self.key not in below.ranks:
            return tuple(replace(p, after=(*p.after, _After("div", below))) for p in above)
        parts = self.split(below)
        if len(parts) != 1 or any(a.how == "zero" for a in parts[0].after):
            raise self.stop(e)
        turned = tuple(_After("div" if a.how == "mul" else "mul", a.term) for a in parts[0].after)
        down = tuple((b, -k) for b, k in parts[0].bounds)
        return tuple(
            _Part(p.lift / parts[0].lift, p.after + turned, _powers(p.bounds, down)) for p in above
        )

    def exponential(self, e: Expr) -> _Part:
        """exp(s − d − log l) = exp(s − d)/l: bounds stay inside and are repaired, sums move behind."""
        element, rest = self.apart(e.args[0])
        after: list[_After] = []
        falls: list[tuple[int, Expr]] = []
        log = "log" if e.op == "exp" else "log2"
        for sign, t in rest:
            ops = {self.ops[n] for n in self.rows(t)}
            if ops & {"max", "min"}:
                if ops - {"max", "min"}:
                    raise self.stop(e)
                falls.append((sign, t))
            elif t.op == log:
                after.append(_After("mul" if sign > 0 else "div", t.args[0]))
            else:
                after.append(_After("mul" if sign > 0 else "div", ex.unary(e.op, t)))
        if not falls:
            return _Part(ex.unary(e.op, element), tuple(after))
        d = self.bound(falls)
        if self.slope(d) < 0:
            # exp(s + max s) grows by itself, as the model wrote it: nothing to keep small
            return _Part(ex.unary(e.op, element), (*after, _After("div", ex.unary(e.op, d))))
        bound = _Bound(e.op, d, self.slope(d) > 0)
        return _Part(ex.unary(e.op, element - self.guarded(d)), tuple(after), ((bound, 1.0),))

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

    def power(self, e: Expr, base: Expr, k: float) -> _Part:
        """(f·h)^k = f^k·h^k for whole k, or where both are at least 0."""
        parts = self.split(base)
        if len(parts) != 1:
            raise self.stop(e)
        (p,) = parts
        if not k.is_integer() and not (all(self.nonnegative(a.term) for a in p.after) and self.nonnegative(p.lift)):
            raise _Stop(e, "a root of a product splits only where both factors are provably at least 0")
        if k < 0 and any(a.how == "zero" for a in p.after):
            raise self.stop(e)
        after = tuple(a if a.how == "zero" else _After(a.how, _power(a.term, k)) for a in p.after)
        return _Part(_power(p.lift, k), after, tuple((b, k * n) for b, n in p.bounds))

    def homogeneous(self, e: Expr) -> _Part:
        """|f·h| = |f|·|h|; relu(f·h) = relu(f)·h where h > 0."""
        parts = self.split(e.args[0])
        if len(parts) != 1:
            raise self.stop(e)
        (p,) = parts
        if e.op == "relu" and not all(a.how == "zero" or self.positive(a.term) for a in p.after):
            raise _Stop(e, "relu(f·h) = relu(f)·h needs h > 0")
        after = p.after if e.op == "relu" else tuple(
            a if a.how == "zero" else _After(a.how, ex.unary("abs", a.term)) for a in p.after
        )  # fmt: skip
        return replace(p, lift=ex.unary(e.op, p.lift), after=after)

    def select(self, e: Expr) -> tuple[_Part, ...]:
        c, x, y = e.args
        if self.mixed(c):
            c = self.of_the_row(c)
            return self.split(ex.where(c, x, y)) if self.mixed(ex.where(c, x, y)) else (_Part(ex.where(c, x, y)),)
        if self.key not in c.ranks:
            if _zero(x):
                return tuple(replace(p, after=(*p.after, _After("zero", c))) for p in self.split(y))
            if _zero(y):
                return tuple(replace(p, after=(*p.after, _After("zero", ~c))) for p in self.split(x))
            raise _Stop(e, "a row condition selects between two terms, neither of which is 0")
        if _zero(x) or _zero(y):
            return self.masked(e, c if _zero(y) else ~c, x if _zero(y) else y)
        left, right = self.split(x), self.split(y)
        if len(left) == len(right) == 1 and (left[0].after, left[0].bounds) == (right[0].after, right[0].bounds):
            return (replace(left[0], lift=ex.where(c, left[0].lift, right[0].lift)),)
        raise self.stop(e)

    def masked(self, e: Expr, keep: Expr, x: Expr) -> tuple[_Part, ...]:
        """where(keep, f·h, 0) = where(keep, f, 0)·h, and 0 for a row that keeps nothing, whatever h is."""
        parts = self.split(x)
        out = []
        for p in parts:
            lift = ex.where(keep, p.lift, ex.const(0.0, p.lift.dtype))
            after = p.after
            if after or p.bounds:
                after = (*after, _After("zero", ~(self.kept(keep) > 0.0)))
            out.append(replace(p, lift=lift, after=after))
        return tuple(out)

    def kept(self, keep: Expr) -> Expr:
        at = tuple(ex.index(r) for r in (*self.a.batch, self.a.query))
        dtype = self.a.cascade.accumulate
        one = ex.where(keep, ex.const(1.0, dtype), ex.const(0.0, dtype))
        return self.carry("KEPT", "max", one, ex.load("KEPT", at, dtype), ())

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
        raise _Stop(c, "a condition on elements depends on a row scalar: a threshold does not split")

    def nan_rows(self, p: Expr) -> Expr:
        while p.op == "cast":
            p = p.args[0]
        if p.op == "div" and self.key not in p.args[1].ranks and self.covers(p.args[1], p.args[0]):
            total = p.args[1]
            return ex.unary("isnan", total) | ex.equal(total, 0.0)
        if p.op in ("exp", "exp2"):
            _, rest = self.apart(p.args[0])
            out: Expr = ex.FALSE
            for _, t in rest:
                out = out | ex.unary("isnan", t)
            logs = [t.args[0] for sign, t in rest if sign < 0 and t.op in ("log", "log2")]
            for t in logs:
                out = out | ex.equal(t, 0.0)
            if logs:
                return out
        raise _Stop(p, "whether an element is NaN is a fact of the row only for u/Σu with u ≥ 0")

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
            raise self.stop(u)
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
        match e.op:
            case "const":
                return float(e.value) >= 0
            case "exp" | "exp2" | "sigmoid" | "softplus" | "relu" | "abs" | "sqrt" | "rsqrt":
                return True
            case "cast" | "reciprocal":
                return self.nonnegative(e.args[0])
            case "add" | "div" | "min":
                return all(self.nonnegative(x) for x in e.args)
            case "mul":
                return e.args[0] is e.args[1] or all(self.nonnegative(x) for x in e.args)
            case "max":
                return any(self.nonnegative(x) for x in e.args)
            case "where":
                return self.nonnegative(e.args[1]) and self.nonnegative(e.args[2])
            case "pow":
                k = e.args[1]
                return self.nonnegative(e.args[0]) or (k.is_const and float(k.value) % 2 == 0)
            case "load" if str(e.attr) in self.ops:
                lift = next(c.lift for c in self.carried if c.name == str(e.attr))
                return self.nonnegative(lift)
        return False

    def positive(self, e: Expr) -> bool:
        """More than 0, or the row is degenerate in the model as well (a sum of squares that is 0 divides by 0)."""
        return self.nonnegative(e)


def _merge(parts: tuple[_Part, ...]) -> tuple[_Part, ...]:
    table: dict[tuple[object, object], _Part] = {}
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


# --- the laws, by sympy -------------------------------------------------------------------------------------------

_SYMPY: Mapping[str, Callable[..., sympy.Expr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "exp": sympy.exp, "exp2": lambda a: 2**a, "log": sympy.log, "tanh": sympy.tanh,
    "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)), "relu": lambda a: sympy.Max(a, 0), "sqrt": sympy.sqrt,
    "rsqrt": lambda a: 1 / sympy.sqrt(a), "abs": sympy.Abs, "pow": lambda a, b: a**b, "max": sympy.Max,
    "min": sympy.Min, "sin": sympy.sin, "cos": sympy.cos, "reciprocal": lambda a: 1 / a, "expm1": lambda a: sympy.exp(a) - 1,
    "log1p": lambda a: sympy.log(1 + a), "softplus": lambda a: sympy.log(1 + sympy.exp(a)), "erf": sympy.erf,
}  # fmt: skip


def multiplicative(g: sympy.Expr, x: sympy.Symbol, d: sympy.Symbol) -> sympy.Expr | None:
    """The factor that turns Σ g(x, d) into Σ g(x, d'), or None: g = G(x)·H(d) iff ∂²/∂x∂d log g = 0.

    >>> x, d = sympy.symbols("x d", positive=True)
    >>> multiplicative(sympy.exp(x - d), x, d)
    exp(d - d')
    """
    mixed = sympy.diff(sympy.expand_log(sympy.log(g), force=True), x, d)
    if mixed != 0 and sympy.simplify(mixed) != 0:
        return None
    new = sympy.Symbol(f"{d}'", positive=d.is_positive)
    return sympy.powsimp(sympy.simplify(g.subs({x: 1, d: new}) / g.subs(x, 1)))


def additive(g: sympy.Expr, x: sympy.Symbol, d: sympy.Symbol) -> sympy.Expr | None:
    """The shift that turns max g(x, d) into max g(x, d'), or None: g = G(x) + H(d) iff ∂²g/∂x∂d = 0."""
    if sympy.simplify(sympy.diff(g, x, d)) != 0:
        return None
    new = sympy.Symbol(f"{d}'", positive=d.is_positive)
    return sympy.simplify(g.subs({x: 1, d: new}) - g.subs(x, 1))


def unseparable(e: Expr, key: str, rows: frozenset[str]) -> str:
    """In words: which separability law a term with the key and row scalars breaks."""
    text = ", ".join(sorted(rows)) or "no row scalar"
    if e.op == "where":
        return f"a choice between terms that scale differently with {text}"
    if e.op in ("max", "min", *ex.COMPARISONS):
        return f"{e.op} of an element and a row scalar ({text}) is no f(element)·h(row)"
    return f"{e.op} is no f(element)·h({text})"


# --- the tiled cascade --------------------------------------------------------------------------------------------


def stream(a: Attention, state: RowState) -> Cascade:
    """One pass over tiles of M0 keys with carried state, as FuseMax's Cascade 5.

    before   R[p] = ⊕_m g(S[p,m]);  N[p,f] = Σ_m W[p,m]·V[m,f]
    after    m = m1·M0 + m0;  per m1 (iterative):  BS = S;  R[p,m1+1] = ⊕(R[p,m1], ⊕_m0 lift);  N[p,f,m1+1] = …

    Takes the inputs of `a.cascade` and gives its output under the same name. The tile's size is the symbol named as
    the inner rank in capitals (`M0` for a key rank `m`); the last tile may be ragged.
    """
    return _Stream(a, state).cascade()


class _Stream:
    """Builds the tiled cascade; `table` maps terms over the key to terms over its two halves."""

    def __init__(self, a: Attention, state: RowState) -> None:
        self.a, self.st, self.c = a, state, a.cascade
        self.outer = _unused(f"{a.key}1", self.c.rank)
        self.inner = _unused(f"{a.key}0", self.c.rank)
        width = sympy.Symbol(self.inner.upper(), integer=True, positive=True)
        size = self.c.rank[a.key].size
        self.width: Size = width
        self.tiles: Size = sympy.floor((size + width - 1) / width)
        key = ex.index(self.outer) * size_term(width) + ex.index(self.inner)
        self.valid = key < size_term(size)
        self.table: dict[Expr, Expr] = {ex.index(a.key): key}
        self.tensors: dict[str, Tensor] = {t.name: t for t in self.c.inputs}
        self.reserved = dict(self.c.tensor)
        self.einsums: list[Einsum] = []
        self.running: dict[str, str] = {}

    def cascade(self) -> Cascade:
        a, c = self.a, self.c
        for e in a.prelude:
            self.tensors[e.out.tensor] = c.tensor[e.out.tensor]
            self.einsums.append(e)
        total = a.contraction.out
        self.start(total.tensor, total.index, 0.0, c.tensor[total.tensor].dtype)
        for s in self.st.carried:
            load = self.example(s)
            self.start(s.name, load.args, s.identity, load.dtype)
        for p in a.products:
            at = p.out.index
            self.tile(f"B{p.out.tensor}", ex.load(p.out.tensor, at, c.tensor[p.out.tensor].dtype), p.body, p.op, p.over)
        if a.score.op != "load":
            self.tile("BS", a.score, a.score)
        roots = [*(s.lift for s in self.st.carried), self.st.weight]
        for i, s in enumerate(self.st.carried):
            self.share(s.lift, roots[i + 1 :])
            self.step(s.name, s.op, self.over_tile(s.lift), None, s.identity, s.correction)
        self.step(total.tensor, "add", self.over_tile(self.st.weight), a.values, 0.0, self.st.correction)
        self.end()
        return self.result()

    def result(self) -> Cascade:
        ranks = [r for r in self.c.ranks if r.name != self.a.key]
        ranks += [Rank(self.outer, self.tiles, iterative=True), Rank(self.inner, self.width)]
        used = frozenset().union(*(e.ranks | set(e.over) for e in self.einsums))
        read = {str(x.attr) for e in self.einsums for x in e.reads} | {e.out.tensor for e in self.einsums}
        return verify(
            Cascade(
                f"{self.c.name} in one pass",
                tuple(r for r in ranks if r.name in used),
                tuple(t for t in self.tensors.values() if t.name in read),
                tuple(self.einsums),
                self.c.outputs,
                self.c.accumulate,
            )
        )

    def over_tile(self, e: Expr) -> Expr:
        return ex.substitute(e, self.table)

    def example(self, s: Carried) -> Expr:
        """A load of a carried scalar, wherever one stands: its coordinates and its type."""
        terms = [*(t for k in self.st.carried for t in (k.lift, k.correction)), self.st.weight, self.st.finish]
        for t in terms:
            for x in ex.loads(t) if t is not None else ():
                if str(x.attr) == s.name:
                    return x
        raise AssertionError(f"nothing reads {s.name}")

    def declare(self, name: str, ranks: tuple[Expr, ...], more: tuple[Size, ...], dtype: str) -> str:
        name = _unused(name, self.reserved)
        shape = (*(self.c.rank[str(i.attr)].size for i in ranks), *more)
        self.tensors[name] = self.reserved[name] = Tensor(name, shape, dtype)
        return name

    def start(self, name: str, at: tuple[Expr, ...], identity: float, dtype: str) -> None:
        new = self.declare(f"R{name}", at, (self.tiles + 1,), dtype)
        self.running[name] = new
        here, step = ex.load(name, at, dtype), ex.index(self.outer)
        self.table[here] = ex.load(new, (*at, step + 1), dtype)
        self.table[ex.load(OLD + name, at, dtype)] = ex.load(new, (*at, step), dtype)
        self.einsums.append(Einsum(Access(new, (*at, ex.const(0))), ex.const(identity, dtype)))

    def tile(self, name: str, term: Expr, body: Expr, op: str | None = None, over: tuple[str, ...] = ()) -> None:
        """A tensor that holds one tile of `term`, and that stands for it from here on."""
        own = tuple(ex.index(r) for r in (*self.a.batch, self.a.query) if r in term.ranks)
        new = self.declare(name, own, (self.tiles, self.width), term.dtype)
        at = (*own, ex.index(self.outer), ex.index(self.inner))
        self.einsums.append(Einsum(Access(new, at), self.over_tile(body), op, over))
        self.table[term] = ex.load(new, at, term.dtype)

    def share(self, root: Expr, later: list[Expr]) -> None:
        """Give the largest terms with a transcendental function that later lifts hold as well a tensor of their own."""
        others = [set(ex.walk(r)) for r in later]

        def go(e: Expr) -> None:
            if e in self.table or self.a.key not in e.ranks or e.op == "load":
                return
            if any(e in o for o in others) and any(x.op in ex.FLOAT_UNARY for x in ex.walk(e)):
                self.tile("SL", e, e)
                return
            for x in e.args:
                go(x)

        go(root)

    def step(self, name: str, op: str, lift: Expr, values: Expr | None, identity: float, correction: Expr | None) -> None:
        """R[m1+1] = op(R[m1]·correction, op_m0 lift)"""
        running = self.running[name]
        access = next(e.out for e in self.einsums if e.out.tensor == running)
        ranks, step = access.index[:-1], ex.index(self.outer)
        dtype = self.tensors[running].dtype
        body = ex.where(self.valid, lift, ex.const(identity, lift.dtype))
        body = body if values is None else body * self.over_tile(values)
        local = self.declare(f"L{name}", ranks, (self.tiles,), dtype)
        self.einsums.append(Einsum(Access(local, (*ranks, step)), body, op, (self.inner,)))
        old = ex.load(running, (*ranks, step), dtype)
        if correction is not None:
            old = old * self.corrected(correction)
        new = ex.binary(op, old, ex.load(local, (*ranks, step), dtype))
        self.einsums.append(Einsum(Access(running, (*ranks, step + 1)), new))

    def corrected(self, correction: Expr) -> Expr:
        if correction not in self.table:
            own = tuple(ex.index(r) for r in (*self.a.batch, self.a.query) if r in correction.ranks)
            new = self.declare("PR", own, (self.tiles,), correction.dtype)
            at = (*own, ex.index(self.outer))
            self.einsums.append(Einsum(Access(new, at), self.over_tile(correction)))
            self.table[correction] = ex.load(new, at, correction.dtype)
        return self.table[correction]

    def end(self) -> None:
        (name,) = self.c.outputs
        (e,) = self.c.producers[name]
        last = size_term(self.tiles)
        table = {}
        for x in ex.loads(self.st.finish):
            if str(x.attr) in self.running:
                table[x] = ex.load(self.running[str(x.attr)], (*x.args, last), x.dtype)
        self.tensors[name] = self.c.tensor[name]
        self.einsums.append(Einsum(Access(name, e.out.index), ex.substitute(self.st.finish, table)))


def _unused(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "_"
    return name
