"""The laws of a reduction over the key: what moves behind it, so that few row scalars are left under it.

    Σ_m f·h = h·Σ_m f      Σ_m h = M·h      max_m (f + h) = h + max_m f      max_m f·h = h·max_m f  (h > 0)
    all_m (s = −∞) = (max_m s = −∞)         any_m c = max_m [c] > 0
m is the key's rank, f stands for a term that varies over it, h for row scalars.
"""

from __future__ import annotations

import math

from . import expr as ex
from .carried import OLD
from .cascade import IDENTITY, Einsum
from .expr import Expr
from .separate import Bound, Ground, Splitter, Stop


class Reducer(Splitter):
    """Walks a chain of reductions; `final` says what each row tensor is in terms of carried ones."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self.final: dict[Expr, Expr] = {}

    def reduction(self, r: Einsum, dtype: str) -> Expr:
        """Carry what a reduction needs and answer its value; raises Stop with the law that fails."""
        body = ex.substitute(r.body, self.final)
        name = r.out.tensor
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
                    raise Stop(body, f"a row reduction by {r.op} that uses an earlier one cannot be rescaled")
                value = self.carry(name, str(r.op), body, here, ())
        self.final[here] = ex.cast(value, dtype)
        return self.final[here]

    def sum(self, name: str, body: Expr, here: Expr) -> Expr:
        out: Expr | None = None
        for p in self.split(body):
            if self.key in p.lift.ranks:
                total = self.carry(name, "add", p.lift, here, p.bounds)
            else:
                # Σ_m of what does not vary over m: as often as there are keys
                total = ex.cast(self.ground.length, here.dtype) * p.lift
            value = p.done(total)
            out = value if out is None else out + value
        assert out is not None
        return out

    def extreme(self, name: str, op: str, body: Expr, here: Expr) -> Expr:
        if not self.rows(body):
            return self.carry(name, op, body, here, ())
        try:
            element, rest = self.apart(body)
        except Stop as stop:
            return self.scaled_extreme(name, op, body, here, stop)
        # max_m (s − d) = (max_m s) − d
        out = self.carry(name, op, element, here, ())
        for sign, t in rest:
            out = out + t if sign > 0 else out - t
        return out

    def scaled_extreme(self, name: str, op: str, body: Expr, here: Expr, stop: Stop) -> Expr:
        """max_m f(s)·h = h·max_m f(s) where h > 0."""
        parts = self.split(body)
        plain = len(parts) == 1 and not parts[0].bounds
        if not plain or not all(a.how != "zero" and self.positive(a.term) for a in parts[0].after):
            law = f"{op} of a term that is neither f(element) + h(row) nor f(element)·h(row) with h > 0"
            raise Stop(body, law) from stop
        return parts[0].done(self.carry(name, op, parts[0].lift, here, ()))

    def logical(self, name: str, op: str, body: Expr, here: Expr) -> Expr:
        if self.rows(body):
            raise Stop(body, "a condition on elements depends on an earlier row scalar")
        if op == "and" and body.op == "eq" and body.args[1].is_const and body.args[1].attr == -math.inf:
            # all_m (s = −∞) = (max_m s = −∞)
            like = ex.load(name, here.args, body.args[0].dtype)
            return ex.equal(self.carry(name, "max", body.args[0], like, ()), -math.inf)
        # any_m c = max_m [c] > 0, all_m c = min_m [c] > 0
        like = ex.load(name, here.args, self.ground.accumulate)
        one = ex.where(ex.cast(body, "b1"), ex.const(1.0, like.dtype), ex.const(0.0, like.dtype))
        return self.carry(name, "max" if op == "or" else "min", one, like, ()) > 0.0

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
