"""What a row carries over tiles of keys, as plain data, and how small it may be; `rowstate` says how it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import expr as ex
from ..expr import Expr
from ..operators import facts

# Prefix of a carried name in a correction: its value before this tile.
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
class Bound:
    """A running bound d that `base`^(element − d) subtracts. `rises`: d never falls as tiles are added."""

    base: str
    d: Expr
    rises: bool


def guarded(d: Expr) -> Expr:
    """d̂: the bound, or 0 where it is −∞ because every key so far is masked."""
    return ex.where(ex.equal(d, -math.inf), ex.const(0.0, d.dtype), d)


@dataclass(frozen=True)
class RowState:
    """The carried scalars in order of dependence, what multiplies V, and how the row ends.

    `bounds`: (sum, d, k) for each bound d under a sum, carried or the contraction's own: the sum holds base^(−k·d).
    `further`: what else of the row leaves, in terms of what is carried, as `finish` is.
    """

    carried: tuple[Carried, ...]
    weight: Expr
    correction: Expr | None
    finish: Expr
    bounds: tuple[tuple[str, Bound, float], ...]
    further: tuple[Expr, ...] = ()

    @property
    def corrections(self) -> list[Expr]:
        """What multiplies earlier sums at each tile: the accumulator's factor, then those of carried scalars."""
        return [e for e in (self.correction, *(c.correction for c in self.carried)) if e is not None]

    def __str__(self) -> str:
        factor = f" · {self.correction}" if self.correction is not None else ""
        lines = [*map(str, self.carried), f"acc ← acc{factor} + Σ ({self.weight})·V", f"out = {self.finish}"]
        return "\n".join(lines)


def least(e: Expr, carried: Sequence[Carried]) -> float:
    """A lower bound of a term over what a row carries (−∞ where nothing is known)."""
    match e.op:
        case "const":
            return float(e.value)
        case "relu":
            return max(0.0, least(e.args[0], carried))
        case "sqrt":
            return math.sqrt(max(0.0, least(e.args[0], carried)))
        case "cast":
            return least(e.args[0], carried)
        case "add":
            return sum(least(x, carried) for x in e.args)
        case "min" | "where":
            return min(least(x, carried) for x in e.args[-2:])
        case "max":
            return max(least(x, carried) for x in e.args)
        case "mul" if e.args[0] is e.args[1]:
            return 0.0
        case "mul" | "div" | "reciprocal":
            return 0.0 if all(least(x, carried) >= 0.0 for x in e.args) else -math.inf
        case "pow":
            even = e.args[1].is_const and float(e.args[1].value) % 2 == 0
            return 0.0 if even or least(e.args[0], carried) >= 0.0 else -math.inf
        case "load":
            c = next((c for c in carried if c.name == str(e.attr)), None)
            if c is None:
                return -math.inf
            return least(c.lift, carried) if c.op != "add" else 0.0 if least(c.lift, carried) >= 0.0 else -math.inf
    return facts(e.op).range[0]
