"""Products over stretches of one row's weights that are added: one product over values that lie end to end.

    before   O = Σ_i w[i]·v[i] + Σ_j w[M + j]·x[j]        after   O = Σ_m w[m] · where(m < M, v[m], x[m − M])

That the weights are stretches of one row is proved on their terms: moved to the row's coordinate, all are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import sympy
from torch import Tensor, fx

from ...patterns import expr as ex
from ...patterns.attention.concat import is_size
from ...patterns.cascade import as_size, size_term, term_size
from ...patterns.expr import Expr
from ..graph.node import CannotLift, arguments, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.index import ZERO
from ..lift.lift import At, Lifter
from ..lift.operators_contract import CONTRACTIONS, PRODUCTS, VIEWS, Contraction, step_through
from .final import SHAPE_ONLY, Final, ValueRun, leads_to_product

# How many products are added at most.
_MOST = 16


@dataclass(frozen=True)
class Addend:
    """A product that is added, behind views: its coordinates, which operand is the weights, and the sums it goes through."""

    node: fx.Node
    product: Contraction
    place: Callable[[Lifter, At], At]
    side: int
    sums: tuple[fx.Node, ...]

    def weights(self, lifter: Lifter, at: At, m: Expr) -> tuple[fx.Node, At]:
        return self.product.operands(self.product.place(self.place(lifter, at)), m)[self.side]

    def values(self, lifter: Lifter, at: At, m: Expr) -> tuple[fx.Node, At]:
        return self.product.operands(self.product.place(self.place(lifter, at)), m)[1 - self.side]

    def weight(self, lifter: Lifter, at: At, m: Expr) -> Expr:
        return lifter.value(*self.weights(lifter, at, m))


@dataclass(frozen=True)
class _Stretch:
    """The weights of a product as a stretch of a row that begins at `start`; `weight` is the row's at its coordinate `m`."""

    addend: Addend
    start: sympy.Expr
    weight: Expr

    @property
    def end(self) -> sympy.Expr:
        return sympy.expand(self.start + sympy.sympify(self.addend.product.size))


def candidates(graph: fx.Graph) -> list[fx.Node]:
    """Sums of nothing but what may be products, the outermost first: found in one walk, for sums may be long chains."""
    out: dict[fx.Node, None] = {}
    for n in graph.nodes:
        if op_name(n) == "add" and isinstance(n.meta.get("val"), Tensor):
            sides = n.all_input_nodes
            if len(sides) == 2 and all(x in out or op_name(_unviewed(x)) in _MULTIPLY for x in sides):
                out[n] = None
    return list(reversed(out))


_MULTIPLY = CONTRACTIONS | {"mul", "multiply"}


def _unviewed(n: fx.Node) -> fx.Node:
    while op_name(n) in VIEWS:
        n = n.all_input_nodes[0]
    return n


def addends(lifter: Lifter, n: fx.Node) -> list[Addend]:
    """The products with parts of one value that are added to make a node; none where anything else is added."""
    nodes = list(_summands(n)) if op_name(n) == "add" else []
    found = [a for x, through in nodes if (a := _product_behind(x, through, lifter)) is not None]
    if not 1 < len(found) <= _MOST or len(found) < len(nodes):
        return []
    for side in (0, 1):
        sided = [replace(a, side=side) for a in found]
        if len({_origin(a) for a in sided}) == 1 and leads_to_product(_origin(sided[0])):
            return sided
    return []


def sums(lifter: Lifter, n: fx.Node, parts: list[Addend]) -> Final | None:
    """Node `n` as one product of all weights with all values; None where they are no stretches of one row."""
    shape = shape_of(tensor_of(n))
    at = tuple(ZERO if s == 1 else ex.index(f"d{d}") for d, s in enumerate(shape))
    lifter.ranks |= {f"d{d}": s for d, s in enumerate(shape) if s != 1}
    order = _in_order(_stretches(lifter, at, parts))
    if len(order) < len(parts):
        return None
    # of several weights, those of a coordinate can be told
    shown = next(s for s in order if s.addend.product.size != 1)
    before = size_term(as_size(sympy.expand(shown.start - order[0].start)))
    values = tuple(ValueRun(s.addend.product.size, s.addend.values) for s in order)
    size = as_size(sympy.expand(order[-1].end - order[0].start))

    def weight(lifter: Lifter, where: At, m: Expr) -> Expr:
        return shown.addend.weight(lifter, where, m - before)

    return Final(n, shape, lambda where: where, size, weight, values, op_name(n))


def _summands(n: fx.Node, through: tuple[fx.Node, ...] = ()) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """What is added to make a node, each with the sums on the way to it."""
    a = arguments(n) if op_name(n) == "add" else {}
    sides = [x for x in (a.get("self"), a.get("other")) if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]
    if len(sides) < 2 or a["alpha"] != 1 or any(shape_of(tensor_of(x)) != shape_of(tensor_of(n)) for x in sides):
        yield n, through
        return
    for x in sides:
        yield from _summands(x, (*through, n))


def _product_behind(n: fx.Node, through: tuple[fx.Node, ...], lifter: Lifter) -> Addend | None:
    """The product that a node is, seen through views."""
    views: list[fx.Node] = []
    node = n
    while op_name(node) in VIEWS:
        views.append(node)
        node = node.all_input_nodes[0]
    name = op_name(node)
    build = PRODUCTS[name] if name in CONTRACTIONS and name in PRODUCTS else _of_one if name in ("mul", "multiply") else None
    product = build(lifter, node) if build is not None else None

    def place(lifter: Lifter, at: At) -> At:
        for v in views:
            moved = step_through(lifter, v, at)
            if moved is None:
                raise CannotLift("products are added behind views that cannot be told apart", n)
            at = moved[1]
        return at

    return None if product is None else Addend(node, product, place, 0, through)


def _of_one(lifter: Lifter, n: fx.Node) -> Contraction | None:
    """A product with one weight a row is spelled as an outer product: `w[…, :1] · v`."""
    a = arguments(n)
    x, y = a["self"], a["other"]
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return None
    if not isinstance(x.meta.get("val"), Tensor) or not isinstance(y.meta.get("val"), Tensor):
        return None
    shape, sides = shape_of(tensor_of(n)), [shape_of(tensor_of(z)) for z in (x, y)]
    outer = len(shape) > 1 and all(sides) and {s[-1] for s in sides} == {1, shape[-1]} != {1}
    return Contraction(lambda w, e: ((x, lifter.broadcast(x, w)), (y, lifter.broadcast(y, w))), 1, shape) if outer else None


def _origin(a: Addend) -> fx.Node:
    """The node whose value the weights are a part of."""
    probe = tuple(ZERO for _ in a.product.shape)
    n, _ = a.product.operands(probe, ZERO)[a.side]
    while op_name(n) in SHAPE_ONLY - CONTRACTIONS - {"cat", "stack"}:
        n = n.all_input_nodes[0]
    return n


def _stretches(lifter: Lifter, at: At, parts: list[Addend]) -> list[_Stretch]:
    """The stretches that are told apart; a product with one weight lies where the row has that weight."""
    many = [(k, a) for k, a in enumerate(parts) if a.product.size != 1]
    out = [s for k, a in many if (s := _stretch(lifter, a, at, f"m{k}")) is not None]
    for a in parts:
        if a.product.size == 1 and out:
            term, m = a.weight(lifter, at, ZERO), ex.index("m")
            starts = [x for s in out for x in (s.end, sympy.expand(s.start - 1))]
            found = next((x for x in starts if ex.substitute(out[0].weight, {m: size_term(as_size(x))}) is term), None)
            out += [] if found is None else [_Stretch(a, found, out[0].weight)]
    return out


def _stretch(lifter: Lifter, a: Addend, at: At, rank: str) -> _Stretch | None:
    lifter.ranks[rank] = a.product.size
    m, whole = ex.index(rank), ex.index("m")
    term = a.weight(lifter, at, m)
    starts = {_start_of(i, m) for x in ex.loads(term) for i in x.args if rank in i.ranks}
    (start,) = starts if len(starts) == 1 else (None,)
    if start is None or not is_size(start):
        return None
    return _Stretch(a, sympy.sympify(term_size(start)), ex.substitute(term, {m: whole - start}))


def _start_of(i: Expr, m: Expr) -> Expr | None:
    if i is m:
        return ZERO
    return i.args[1 - i.args.index(m)] if i.op == "add" and m in i.args else None


def _in_order(stretches: list[_Stretch]) -> list[_Stretch]:
    """Stretches in the order of the row; not all of them where they are of several rows or leave something out."""
    if len({s.weight for s in stretches}) != 1:
        return []
    ends = {s.end for s in stretches}
    here = next((s.start for s in stretches if s.start not in ends), None)
    left, out = list(stretches), list[_Stretch]()
    while found := [s for s in left if s.start == here]:
        left.remove(found[0])
        out.append(found[0])
        here = found[0].end
    return out
