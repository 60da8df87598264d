"""Solutions of unit lower triangular systems in products: N = (I + A)⁻¹ B read as Σ_j T[i, j] · B[j].

    solve_triangular(A, B)[i, f]      →      Σ_j T[i, j] · B[j, f]        T a tensor of its own, of which `systems` knows A
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Einsum
from ...patterns.expr import Expr
from ...patterns.recurrence.powers import Normal, Powers
from ..graph.node import arguments, op_name, tensor_of
from ..graph.sizes import shape_of
from .substitution import Inverse
from .within import Within

# In front of the name of a tensor T.
SOLVED = "solved "


@dataclass(frozen=True)
class System:
    """T is (I + A)⁻¹ of the strictly lower triangle of A = `node`; where `whole`, (I − A)⁻¹ of all of it."""

    node: fx.Node
    whole: bool


class Solving(Normal):
    """Products in normal form, solutions of triangular systems among them."""

    def __init__(
        self, produced: Callable[[str], Einsum | None], opened: Callable[[Expr], Expr], lifter: Within,
        inverses: Mapping[fx.Node, Inverse],
    ) -> None:
        super().__init__(produced, opened)
        self.lifter, self.inverses = lifter, inverses
        self.systems: dict[str, System] = {}

    def _factor(self, e: Expr, out: Powers) -> None:
        node = self.lifter.leaves.get(str(e.attr)) if e.op == "load" else None
        if node is not None and node in self.inverses:
            out.factors[self._solution(System(self.inverses[node].strict, True), e.args)] += 1
        elif node is not None and _is_unit_lower(node):
            self._solved(node, e, out)
        else:
            super()._factor(e, out)

    def _solution(self, system: System, at: tuple[Expr, ...]) -> Expr:
        name = f"{SOLVED}{system.node.name}{' whole' if system.whole else ''}"
        self.systems[name] = system
        return ex.load(name, at, "f64")

    def _solved(self, node: fx.Node, e: Expr, out: Powers) -> None:
        given = arguments(node)
        system, right = given["self"], given["B"]
        assert isinstance(system, fx.Node)
        assert isinstance(right, fx.Node)
        *batch, row, column = e.args
        inner = f"j'{len(self.systems)}.{len(out.over)}"
        out.over.add(inner)
        out.factors[self._solution(System(system, False), (*batch, row, ex.index(inner)))] += 1
        self._factor(self.opened(self.lifter.value(right, (*batch, ex.index(inner), column))), out)


def _is_unit_lower(n: fx.Node) -> bool:
    if op_name(n) != "linalg_solve_triangular":
        return False
    given = arguments(n)
    a, b = given["self"], given["B"]
    alike = isinstance(a, fx.Node) and isinstance(b, fx.Node) and shape_of(tensor_of(a))[:-2] == shape_of(tensor_of(b))[:-2]
    return alike and given["upper"] is False and given.get("left", True) is True and given.get("unitriangular") is True
