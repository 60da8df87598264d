"""What a row carries over tiles of keys, as plain data; `rowstate` says precisely what a generator does with it."""

from __future__ import annotations

from dataclasses import dataclass

from ..expr import Expr

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
class RowState:
    """The carried scalars in order of dependence, what multiplies V, and how the row ends."""

    carried: tuple[Carried, ...]
    weight: Expr
    correction: Expr | None
    finish: Expr

    @property
    def corrections(self) -> list[Expr]:
        """What multiplies earlier sums at each tile: the accumulator's factor, then those of carried scalars."""
        return [e for e in (self.correction, *(c.correction for c in self.carried)) if e is not None]

    def __str__(self) -> str:
        factor = f" · {self.correction}" if self.correction is not None else ""
        lines = [*map(str, self.carried), f"acc ← acc{factor} + Σ ({self.weight})·V", f"out = {self.finish}"]
        return "\n".join(lines)
