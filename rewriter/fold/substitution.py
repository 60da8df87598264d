"""Forward substitution written row by row: the inverse of a unit lower triangular matrix, as one value.

    for i in 1 … C − 1:   L[i, :i] ← L[i, :i] + Σ_j L[i, j] · L[j, :i]            L strictly lower triangular
    L + I                 =   (I − L₀)⁻¹                                           L₀ what L was before the first row

Each row is proved: what it writes, where, and that nothing but the row before it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import fx

from ...patterns import expr as ex
from ..graph.aliases import Aliases
from ..graph.node import CannotLift, arguments, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.rules import RULES
from .within import Within, table


@dataclass(frozen=True)
class Inverse:
    """`node` is (I − L)⁻¹ of the strictly lower triangle of `strict`, whose elements elsewhere must be 0."""

    node: fx.Node
    strict: fx.Node
    size: int


def inverses(nodes: Iterable[fx.Node], graph: fx.Graph, aliases: Aliases) -> list[Inverse]:
    """Every forward substitution among some nodes of a graph."""
    out: list[Inverse] = []
    for n in nodes:
        if op_name(n) != "select_scatter" or _row(n) != 1 or not isinstance(n.args[0], fx.Node):
            continue
        found = _inverse(graph, aliases, n)
        if found is not None:
            out.append(found)
    return out


def _row(n: fx.Node) -> int | None:
    """The row that a select_scatter writes into a square matrix."""
    given, shape = arguments(n), shape_of(tensor_of(n))
    dim, index = given["dim"], given["index"]
    square = len(shape) > 2 and shape[-1] == shape[-2] and isinstance(shape[-1], int)
    if not square or not isinstance(dim, int) or not isinstance(index, int) or dim % len(shape) != len(shape) - 2:
        return None
    return index


def _inverse(graph: fx.Graph, aliases: Aliases, first: fx.Node) -> Inverse | None:
    strict, n = first.args[0], first
    assert isinstance(strict, fx.Node)
    size = shape_of(tensor_of(first))[-1]
    assert isinstance(size, int)
    before = strict
    for i in range(1, size):
        if _row(n) != i or n.args[0] is not before or not _substitutes(graph, aliases, n, before, i):
            return None
        if i == size - 1:
            break
        following = [u for u in n.users if op_name(u) == "select_scatter" and _row(u) == i + 1 and u.args[0] is n]
        if len(following) != 1:
            return None
        before, n = n, following[0]
    users = [u for u in n.users if op_name(u) == "add" and _adds_identity(graph, aliases, u, n)]
    return Inverse(users[0], strict, size) if len(users) == 1 and len(n.users) == 1 else None


def _substitutes(graph: fx.Graph, aliases: Aliases, n: fx.Node, before: fx.Node, i: int) -> bool:
    """Whether row i becomes itself plus its product with the rows before it, up to column i, and nothing else changes."""
    lifter = Within(graph, aliases, RULES, {before})
    at = tuple(ex.index(f"b{d}") for d in range(tensor_of(n).dim() - 2))
    lifter.ranks.update({f"b{d}": s for d, s in enumerate(shape_of(tensor_of(n))[:-2])})
    try:
        # column 0 … i − 1 of row i; what stands elsewhere follows from where is written
        written = _written_row(n, i)
        if written is None:
            return False
        value, whole = written
        # of one column there is no coordinate
        column = ex.index("c") if i > 1 else ex.const(0)
        lifter.ranks["c"] = i
        term = lifter.opened(lifter.value(value, (*at, column)))
    except CannotLift:
        return False
    if whole is not before or term.op != "add":
        return False
    own = ex.load("", (*_placed(lifter, at, before), ex.const(i), column), "")
    for x, y in (term.args, term.args[::-1]):
        if _is_read(x, lifter, before, own.args) and _is_product(y, lifter, before, own.args, i):
            return True
    return False


def _placed(lifter: Within, at: tuple[ex.Expr, ...], like: fx.Node) -> tuple[ex.Expr, ...]:
    shape = shape_of(tensor_of(like))[:-2]
    return tuple(ex.const(0) if s == 1 else i for s, i in zip(shape, at))


def _written_row(n: fx.Node, i: int) -> tuple[fx.Node, fx.Node] | None:
    """What a write puts into columns 0 … i − 1 of row i, and the matrix whose row stays elsewhere."""
    row = n.args[1]
    if not isinstance(row, fx.Node) or op_name(row) != "slice_scatter":
        return None
    given, shape = arguments(row), shape_of(tensor_of(row))
    kept, value = row.args[0], row.args[1]
    dim = given["dim"]
    if not isinstance(dim, int) or dim % len(shape) != len(shape) - 1 or given.get("step", 1) != 1:
        return None
    if given["start"] not in (0, None) or given["end"] != i or not isinstance(value, fx.Node):
        return None
    if not isinstance(kept, fx.Node) or op_name(kept) != "select":
        return None
    chosen = arguments(kept)
    source, where = kept.args[0], chosen["dim"]
    if not isinstance(source, fx.Node) or chosen["index"] != i or not isinstance(where, int):
        return None
    rank = tensor_of(source).dim()
    return (value, source) if where % rank == rank - 2 else None


def _is_read(x: ex.Expr, lifter: Within, before: fx.Node, at: tuple[ex.Expr, ...]) -> bool:
    return x.op == "load" and lifter.leaves.get(str(x.attr)) is before and x.args == _ones_dropped(at, before)


def _ones_dropped(at: tuple[ex.Expr, ...], n: fx.Node) -> tuple[ex.Expr, ...]:
    return tuple(ex.const(0) if s == 1 else i for s, i in zip(shape_of(tensor_of(n)), at))


def _is_product(y: ex.Expr, lifter: Within, before: fx.Node, at: tuple[ex.Expr, ...], i: int) -> bool:
    """Σ_j L[i, j] · L[j, c] over j from 0 to i − 1."""
    *batch, row, column = at
    if i == 1:
        # one row: a product without a sum
        zero = ex.const(0)
        return y.op == "mul" and _both(y.args, lifter, before, ((*batch, row, zero), (*batch, zero, column)))
    e = next((x for x in lifter.einsums if y.op == "load" and x.out.tensor == y.attr), None)
    if e is None or e.op != "add" or len(e.over) != 1 or lifter.ranks[e.over[0]] != i or e.body.op != "mul":
        return False
    j = ex.index(e.over[0])
    body = lifter.opened(ex.substitute(e.body, dict(zip(e.out.index, y.args, strict=True))))
    return body.op == "mul" and _both(body.args, lifter, before, ((*batch, row, j), (*batch, j, column)))


def _both(
    factors: tuple[ex.Expr, ...], lifter: Within, before: fx.Node, wanted: tuple[tuple[ex.Expr, ...], ...]
) -> bool:
    """Whether two factors are reads of the matrix at the two places, in either order."""
    one, other = wanted
    return any(
        _is_read(a, lifter, before, one) and _is_read(b, lifter, before, other) for a, b in (factors, factors[::-1])
    )


def _adds_identity(graph: fx.Graph, aliases: Aliases, n: fx.Node, last: fx.Node) -> bool:
    given = arguments(n)
    other = [x for x in (given["self"], given["other"]) if x is not last]
    if len(other) != 1 or not isinstance(other[0], fx.Node) or given.get("alpha", 1) != 1:
        return False
    size = shape_of(tensor_of(n))[-1]
    if shape_of(tensor_of(other[0]))[-2:] != (size, size):
        return False
    lifter = Within(graph, aliases, RULES, set())
    i, j = ex.index("i"), ex.index("j")
    lifter.ranks.update({"i": size, "j": size})
    rank = tensor_of(other[0]).dim()
    term = lifter.value(other[0], (*(ex.const(0) for _ in range(rank - 2)), i, j))
    values = table(term, "i", "j", size) if isinstance(size, int) else None
    return values is not None and bool((values == np.eye(len(values))).all())
