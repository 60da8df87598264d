"""Sums over places up to one, or between two: a running sum, and one over what a mask leaves of each row.

cumsum(g)[i]                              Σ_{u ≤ i} g[u]
cumsum(where(u > j, g[u], 0), u)[i]       Σ_{j < u ≤ i} g[u]      0 where i ≤ j
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import fx

from ...patterns import expr as ex
from ...patterns.expr import Expr
from ..graph.node import arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from .within import Within, table

# The coordinate of the place that is summed over.
SUMS = "u'"


@dataclass(frozen=True)
class PlaceSum:
    """Σ of `term` over its places `SUMS` up to `upto`, those up to `behind` left out; `size`: how many places there are.

    `others` are the coordinates of the sum but for its place.
    """

    term: Expr
    upto: Expr
    behind: Expr | None
    size: int
    others: tuple[Expr, ...]


def place_sum(lifter: Within, e: Expr, opened: Callable[[Expr], Expr]) -> PlaceSum | None:
    """What a read of a running sum is; None for any other term. `opened` reads operands through."""
    node = lifter.leaves.get(str(e.attr)) if e.op == "load" else None
    if node is None or op_name(node) != "cumsum":
        return None
    given = arguments(node)
    dim, source = given["dim"], given["self"]
    assert isinstance(dim, int)
    assert isinstance(source, fx.Node)
    dim %= tensor_of(node).dim()
    size = shape_of(tensor_of(node))[dim]
    if not isinstance(size, int) or dtype_of(source) != dtype_of(node):
        return None
    lifter.ranks[SUMS] = size
    term = opened(lifter.value(source, (*e.args[:dim], ex.index(SUMS), *e.args[dim + 1 :])))
    others = (*e.args[:dim], *e.args[dim + 1 :])
    behind = None
    if term.op == "where":
        masked = _behind(term, size, others)
        if masked is not None:
            term, behind = masked
    return PlaceSum(term, e.args[dim], behind, size, others)


def _behind(term: Expr, size: int, others: tuple[Expr, ...]) -> tuple[Expr, Expr] | None:
    """A term and the place j, where a mask leaves of it the places behind j alone."""
    keeps, left, nothing = term.args
    zero = [x.op == "const" and float(x.value) == 0 for x in (nothing, left)]
    places = sorted(keeps.ranks - {SUMS})
    if not any(zero) or len(places) != 1 or ex.index(places[0]) not in others:
        return None
    kept = table(keeps, SUMS, places[0], size)
    if kept is None:
        return None
    kept = kept.astype(bool) if zero[0] else ~kept.astype(bool)
    term = left if zero[0] else nothing
    strictly = np.tril(np.ones((size, size), bool), -1)
    return (term, ex.index(places[0])) if (kept == strictly).all() and places[0] not in term.ranks else None
