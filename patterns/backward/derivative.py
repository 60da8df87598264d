"""Derivatives of terms, as terms: what a change of one sub-term does to a term, so that the same printers print it.

    derivative(score, product)     ∂ score / ∂ product
    pullback({y: d}, leaves)       what of gradients d at the roots y reaches each leaf

Both walk from the roots down, as autograd does: a `where` selects the gradient before it is multiplied, and what a mask
hides stays hidden even where it is NaN. Integers and truths pass nothing on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .. import expr as ex
from ..expr import Expr
from ..verdict import Obstacle
from .rules import RULES


class NoGradient(Exception):
    """Carries a reason to the one place that makes an Obstacle of it."""


def derivative(root: Expr, by: Expr) -> Expr | Obstacle:
    """∂ root / ∂ by, where `by` is a sub-term that stands for a number of its own; the number 0 where there is none."""
    found = pullback({root: ex.const(1.0, root.dtype)}, (by,))
    return found if isinstance(found, Obstacle) else found.get(by, ex.const(0.0, by.dtype))


def pullback(roots: Mapping[Expr, Expr], leaves: Collection[Expr]) -> dict[Expr, Expr] | Obstacle:
    """The gradient of Σ d·y over the roots by each leaf, in the leaf's type. A leaf that nothing reaches is left out.

    An operator on the way without a derivative is an Obstacle.
    """
    order = list(ex.walk(*roots))
    wanted: set[Expr] = set()
    for e in order:
        # of a load's coordinates there is no derivative, they are integers
        if e in leaves or (e.is_float and e.op != "load" and any(a in wanted for a in e.args)):
            wanted.add(e)
    reached = {y: ex.cast(d, y.dtype) for y, d in roots.items() if y in wanted}
    for e in reversed(order):
        if e not in reached or e in leaves:
            continue
        rules = RULES.get(e.op)
        if rules is None:
            return Obstacle(f"{e.op} has no derivative, in {e}")
        for rule, a in zip(rules, e.args):
            if a in wanted:
                part = ex.cast(rule(reached[e], e, *e.args), a.dtype)
                if not _nothing(part):
                    reached[a] = part if a not in reached else part * 2.0 if reached[a] is part else reached[a] + part
    return {e: d for e, d in reached.items() if e in leaves}


def _nothing(e: Expr) -> bool:
    return e.is_const and e.value == 0.0
