"""A lifter of what stands between some nodes of a graph and others: it stops at given nodes, and reads operands through.

    stops {k, g}:   exp(cumsum(g)[i]) · k[i]     stays in terms of k and of the running sum, however k was made
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from torch import fx

from ...patterns import expr as ex
from ...patterns.expr import Expr
from ...patterns.terms.constant import Values, number
from ..graph.aliases import Aliases
from ..lift.lift import At, Lifter, Rule

# How often operands are read through before what is left is taken as it is.
_DEEPEST = 64


class Within(Lifter):
    """A lifter that reads some nodes as inputs, whatever made them."""

    def __init__(self, graph: fx.Graph, aliases: Aliases, rules: Mapping[str, Rule], stops: Collection[fx.Node]) -> None:
        super().__init__(graph, aliases, rules)
        self.stops = frozenset(stops)

    def value(self, n: fx.Node, at: At) -> Expr:
        return self.leaf(n, at) if n in self.stops else super().value(n, at)

    def opened(self, e: Expr) -> Expr:
        """A term whose operands that products read as they are, are terms as well."""
        for _ in range(_DEEPEST):
            table: dict[Expr, Expr] = {}
            for x in ex.loads(e):
                node = self.leaves.get(str(x.attr))
                if node is None or node in self.stops:
                    continue
                inner = self.value(node, x.args)
                if inner is not x:
                    table[x] = inner
            if not table:
                return e
            e = ex.substitute(e, table)
        return e


def table(e: Expr, rows: str, columns: str, size: int) -> Values | None:
    """The values of a term of two coordinates alone at all of them; None for any other term."""
    if ex.loads(e) or not e.ranks <= {rows, columns}:
        return None
    at = np.arange(size)
    return np.broadcast_to(number(e, {}, {ex.index(rows): at[:, None], ex.index(columns): at}), (size, size))


def settled(e: Expr, rank: str, size: int) -> Expr:
    """A term in which choices by one coordinate alone are made, where they are the same at all of its places."""
    while True:
        choices: dict[Expr, Expr] = {}
        for x in ex.walk(e):
            taken = table(x.args[0], rank, rank, size) if x.op == "where" else None
            if taken is not None and taken.any() == taken.all():
                choices[x] = x.args[1 if taken.all() else 2]
        if not choices:
            return e
        e = ex.substitute(e, choices)
