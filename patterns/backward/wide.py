"""A row program in one wide float type: as kernels compute it, who drop the casts by which a model rounds in between.

    bf16(exp(f32(S) − GM))·…   →   exp(S − GM)·…        S, GM stand as numbers of the wide type until `back` puts in f32(S)
"""

from __future__ import annotations

from dataclasses import replace

from .. import expr as ex
from ..attention.carried import RowState
from ..cascade import Cascade
from ..expr import Expr


class Wide:
    """Float64 where the cascade has any, else the type that it accumulates in."""

    def __init__(self, c: Cascade) -> None:
        self.dtype = "f64" if any(t.dtype == "f64" for t in c.tensors) else c.accumulate
        self.own: dict[Expr, Expr] = {}

    def __call__(self, e: Expr) -> Expr:
        return ex.rebuild(e, self.step)

    def step(self, e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if not e.is_float:
            return None
        match e.op:
            case "const":
                return ex.const(e.value, self.dtype)
            case "cast":
                return ex.cast(args[0], self.dtype)
            case "load" if e.dtype != self.dtype:
                wide = ex.load(str(e.attr), args, self.dtype)
                self.own[wide] = ex.load(str(e.attr), args, e.dtype)
                return wide
        return None

    def narrow(self, load: Expr) -> Expr:
        """The load as the cascade has it."""
        return self.own.get(load, load)

    def back(self, e: Expr) -> Expr:
        """The term with its loads as the cascade has them, each of them widened where it is read."""
        return ex.substitute(e, {wide: ex.cast(own, self.dtype) for wide, own in self.own.items()})

    def state(self, s: RowState) -> RowState:
        return replace(
            s,
            carried=tuple(replace(c, lift=self(c.lift)) for c in s.carried),
            weight=self(s.weight),
            finish=self(s.finish),
            further=tuple(map(self, s.further)),
            bounds=tuple((name, replace(b, d=self(b.d)), k) for name, b, k in s.bounds),
        )
