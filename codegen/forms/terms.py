"""The element-wise program of an attention, and how its terms are rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...patterns.attention.rowstate import Carried, RowState
from ...patterns.expr import Expr
from ...patterns.masks.split import Mask


@dataclass(frozen=True)
class Terms:
    """The element-wise program of an attention: the score as written, its mask, the row state over it.

    `saved`: row scalars over the carried finals that are handed over beside the output (None: no output but that one).
    """

    score: Expr
    mask: Mask
    state: RowState
    saved: tuple[Expr, ...] | None = None

    def handed(self, f: Callable[[Expr], Expr]) -> tuple[Expr, ...] | None:
        """`saved`, rewritten by `f`."""
        return None if self.saved is None else tuple(map(f, self.saved))


def mapped_state(state: RowState, f: Callable[[Expr], Expr]) -> RowState:
    """Every term of a row state rewritten by `f`."""

    def carried(k: Carried) -> Carried:
        return replace(k, lift=f(k.lift), correction=None if k.correction is None else f(k.correction))

    return replace(
        state,
        carried=tuple(carried(k) for k in state.carried),
        weight=f(state.weight),
        correction=None if state.correction is None else f(state.correction),
        finish=f(state.finish),
    )


def mapped_elements(state: RowState, f: Callable[[Expr], Expr]) -> RowState:
    """What an element does to a row state, its lifts and its weight, rewritten by `f`."""
    return replace(state, carried=tuple(replace(c, lift=f(c.lift)) for c in state.carried), weight=f(state.weight))


def uncast(e: Expr) -> Expr:
    """The term without casts between float types: operands are taken in the type that they have."""
    while e.op == "cast" and e.is_float and e.args[0].is_float:
        e = e.args[0]
    return e
