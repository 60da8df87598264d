"""The laws of a reduction over the key: what moves behind it, so that few row scalars are left under it.

    Σ_m f·h = h·Σ_m f      Σ_m h = M·h      max_m (f + h) = h + max_m f      max_m f·h = h·max_m f  (h > 0)
    all_m (s = −∞) = (max_m s = −∞)         any_m c = max_m [c] > 0
m is the key's rank, f stands for a term that varies over it, h for row scalars.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from .. import expr as ex
from ..cascade import Einsum
from ..expr import Expr
from .carried import Bound
from .separate import After, SplitContext, Splitter, Stop, Summand


class Reducer(Splitter, ABC):
    """Walks a chain of reductions; `final` says what each row tensor is in terms of carried ones."""

    def __init__(self, context: SplitContext) -> None:
        super().__init__(context)
        self.final: dict[Expr, Expr] = {}

    @abstractmethod
    def carry(self, name: str, op: str, lift: Expr, here: Expr, bounds: tuple[tuple[Bound, float], ...]) -> Expr:
        """Carry one more scalar and answer its load."""

    def row(self, keep: Expr) -> tuple[Expr, ...]:
        """The coordinates of the rows that a condition speaks of."""
        return tuple(ex.index(r) for r in self.context.row)

    def zeroed(self, p: Summand) -> bool:
        """Must a row that keeps nothing be set to 0, because what moved or is guarded might make something else of it?"""
        return bool(p.after or p.bounds)

    def emptied(self, p: Summand, keep: Expr) -> tuple[After, ...]:
        return (After("zero", ~(self.kept(keep) > 0.0)),) if self.zeroed(p) else ()

    def kept(self, keep: Expr) -> Expr:
        """Carry whether a mask kept a key of the row."""
        dtype = self.context.accumulate
        one = ex.where(keep, ex.const(1.0, dtype), ex.const(0.0, dtype))
        return self.carry("KEPT", "max", one, ex.load("KEPT", self.row(keep), dtype), ())

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
                total = ex.cast(self.context.length, here.dtype) * p.lift
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
        like = ex.load(name, here.args, self.context.accumulate)
        one = ex.where(ex.cast(body, "b1"), ex.const(1.0, like.dtype), ex.const(0.0, like.dtype))
        return self.carry(name, "max" if op == "or" else "min", one, like, ()) > 0.0
