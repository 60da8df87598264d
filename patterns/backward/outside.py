"""Floats that multiply a product outside of its sum, a scale that is learned: what reaches them.

    QK = τ[h]·Σ_e Q·K        dτ[h] = Σ dQK·(Σ_e Q·K)        the sum stands as a load of its own: `sum_of(QK)`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .. import expr as ex
from ..expr import Expr
from ..verdict import Obstacle
from .derivative import pullback

SUM = "sum of "


def sum_of(product: Expr) -> Expr:
    """A product as it is summed, without what multiplies it."""
    return ex.load(SUM + str(product.attr), product.args, product.dtype)


def outside(factors: Iterable[tuple[Expr, Expr]], gradients: Mapping[Expr, Expr]) -> list[tuple[Expr, Expr]] | Obstacle:
    """The floats of (product, what multiplies its sum), each with its gradient's term; `gradients`: those of products."""
    out: list[tuple[Expr, Expr]] = []
    for load, factor in factors:
        own = [y for y in ex.loads(factor) if y.is_float]
        if own and load in gradients:
            reached = pullback({factor: gradients[load] * ex.cast(sum_of(load), "f32")}, own)
            if isinstance(reached, Obstacle):
                return reached
            out += reached.items()
    return out
