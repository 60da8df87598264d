"""A product with a matrix of decays between places, read as the recurrence over places that it computes.

    Y[c] = Σ_{z ≤ c} e^(Σ_{z < u ≤ c} a[u]) X[z]      →   S[0] = X[0];  S[t + 1] = e^a[t + 1] S[t] + X[t + 1];  Y[c] = S[c]

So models write the states between chunks where they know no loop (Mamba-2, SSD): as many products as pairs of chunks. What
is read of the states, added to what each chunk gives by itself, is what a step gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ...patterns.expr import Expr
from ...patterns.recurrence.expand import factors_of, product_of
from ...patterns.recurrence.powers import Normal
from ...patterns.recurrence.recurrence import recurrence
from ...patterns.verdict import Obstacle
from ..graph.aliases import Aliases
from ..graph.node import FOLDED, CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..graph.where import module_path, source_line
from ..lift.rules import RULES
from .recurrences import STEP, FoundScan, OtherScan
from .running import SUMS, place_sum
from .within import Within, settled, table

PRODUCTS = frozenset(("einsum", "matmul", "bmm", "mm", "sum"))
# Between a running sum and the product with its exponentials, and how many of these there may be.
WAY = frozenset(
    (
        "exp",
        "masked_fill",
        "where",
        "transpose",
        "permute",
        "unsqueeze",
        "expand",
        "view",
        "reshape",
        "mul",
        "to",
        "contiguous",
    )
)
FARTHEST = 12
# How many sums with what the states give are tried as what a step gives.
TRIED = 3


@dataclass(frozen=True)
class Decayed:
    """`node` is Y: dimension `dim` of it are the places. `decay` at the place `SUMS`; `added` at the place `PLACE`."""

    node: fx.Node
    dim: int
    size: int
    decay: Expr
    added: Expr
    lifter: Within


# The coordinate of a place of what is added.
PLACE = "z'"


def decayed(
    graph: fx.Graph, aliases: Aliases, accept: Callable[[FoundScan], FoundScan | Obstacle]
) -> Iterator[FoundScan | OtherScan]:
    """Each recurrence over places that is written as a product with a matrix of decays, as what `accept` makes of it.

    Of those that it makes nothing of, the reason. Its nodes are marked as soon as it is given.
    """
    for n in list(graph.nodes):
        if FOLDED in n.meta or op_name(n) not in PRODUCTS or not _sums_on_the_way(n):
            continue
        try:
            d = _decayed(n, graph, aliases)
        except CannotLift:
            continue
        if d is None:
            continue
        out: FoundScan | OtherScan = OtherScan(n, "nothing is added to what its states give")
        for k, found in enumerate(_recurrences(d, graph, aliases)):
            made = found if isinstance(found, Obstacle) else accept(found)
            if not isinstance(made, Obstacle):
                out = made
                break
            # the sum next to the product is the likeliest
            out = out if k else OtherScan(n, str(made))
        if isinstance(out, FoundScan):
            for x in out.nodes:
                x.meta[FOLDED] = True
        yield out


def _sums_on_the_way(n: fx.Node) -> bool:
    """Whether a factor of a product is made of exponentials of a running sum."""
    stack, seen = [(i, FARTHEST) for i in n.all_input_nodes], set[fx.Node]()
    names: set[str] = set()
    while stack:
        x, left = stack.pop()
        if x in seen or not left:
            continue
        seen.add(x)
        names.add(op_name(x))
        if op_name(x) in WAY:
            stack += [(i, left - 1) for i in x.all_input_nodes]
    return {"exp", "cumsum"} <= names


def _decayed(n: fx.Node, graph: fx.Graph, aliases: Aliases) -> Decayed | None:
    shape = shape_of(tensor_of(n))
    if any(not isinstance(s, int) for s in shape):
        return None
    # what products read stays a product of its own, not multiplied out
    stops = {x for x in graph.nodes if x is not n and op_name(x) in PRODUCTS}
    lifter = Within(graph, aliases, RULES, stops)
    at = tuple(ex.index(f"d{d}") for d in range(len(shape)))
    lifter.ranks.update({f"d{d}": s for d, s in enumerate(shape)})
    value = lifter.value(n, at)
    made = next((e for e in lifter.einsums if value.op == "load" and e.out.tensor == value.attr), None)
    if made is None or made.op != "add" or len(made.over) != 1:
        return None
    (inner,), size = made.over, lifter.ranks[made.over[0]]
    body = ex.substitute(made.body, {ex.index(inner): ex.index(PLACE), **dict(zip(made.out.index, value.args))})
    lifter.ranks[PLACE] = size
    normal = Normal(lambda _: None, lifter.opened)
    matrices: list[tuple[int, Expr]] = []
    added: list[Expr] = []
    for f in factors_of(body):
        found = _matrix(normal, lifter, f, shape)
        if found is None:
            added.append(f)
        else:
            matrices.append(found)
    if len(matrices) != 1 or not added:
        return None
    dim, decay = matrices[0]
    rest = product_of(tuple(added))
    if shape[dim] != size or not isinstance(size, int) or at[dim].attr in rest.ranks or PLACE not in rest.ranks:
        return None
    return Decayed(n, dim, size, decay, rest, lifter)


def _matrix(normal: Normal, lifter: Within, f: Expr, shape: tuple[Size, ...]) -> tuple[int, Expr] | None:
    """The dimension of the places, and what is summed up at `SUMS`, of e^(Σ_{z < u ≤ c} a[u]) for z ≤ c and 0 elsewhere."""
    if PLACE not in f.ranks:
        return None
    p = normal.of(f)
    if p.factors or p.over or p.sign != 1 or list(p.exponents.values()) != [1]:
        return None
    (exponent,) = p.exponents
    found = place_sum(lifter, exponent, lifter.opened)
    if found is None or found.behind is not ex.index(PLACE) or found.upto.op != "index" or PLACE in found.term.ranks:
        return None
    row = str(found.upto.attr)
    kept = np.ones((found.size, found.size), bool)
    for k in p.keeps:
        values = table(k, row, PLACE, found.size)
        if values is None:
            return None
        kept &= values.astype(bool)
    dim = next((d for d in range(len(shape)) if row == f"d{d}"), -1)
    whole = (kept == np.tril(np.ones_like(kept))).all() and shape[dim] == found.size
    return (dim, found.term) if dim >= 0 and whole and row not in found.term.ranks else None


def _recurrences(d: Decayed, graph: fx.Graph, aliases: Aliases) -> Iterator[FoundScan | Obstacle]:
    """The recurrences over places whose steps give one of the sums with what is read of the states."""
    behind, tried = {d.node}, 0
    for n in list(graph.nodes):
        if not behind & set(n.all_input_nodes):
            continue
        behind.add(n)
        if op_name(n) == "add" and any(i not in behind for i in n.all_input_nodes):
            try:
                yield _Places(d, graph, aliases, behind).with_output(n)
            except CannotLift as no:
                yield Obstacle(no.reason)
            tried += 1
        if tried == TRIED:
            return


class _Places:
    """The cascade of a recurrence over places. `behind`: nodes that rest on the product."""

    def __init__(self, d: Decayed, graph: fx.Graph, aliases: Aliases, behind: Collection[fx.Node]) -> None:
        self.d, self.steps, self.behind = d, d.size - 1, frozenset(behind)
        self.lifter = Within(graph, aliases, RULES, {d.node, *d.lifter.stops} - (self.behind - {d.node}))
        self.tensors: dict[str, fx.Node] = {}
        self.declared: dict[str, Tensor] = {}

    def with_output(self, n: fx.Node) -> FoundScan:
        """The recurrence whose steps give `n`. Raises CannotLift where it is not given step by step."""
        d, t = self.d, ex.index(STEP)
        shape, dtype = shape_of(tensor_of(d.node)), dtype_of(d.node)
        kept = [x for x in range(len(shape)) if x != d.dim]
        at = tuple(ex.index(f"d{x}") if shape[x] != 1 else ex.const(0) for x in kept)
        self.declared["S"] = Tensor("S", (*(shape[x] for x in kept), self.steps + 1), dtype)
        given = self._given(n)
        made = [
            Einsum(Access("S", (*at, ex.const(0))), self._place(d.added, PLACE, ex.const(0))),
            Einsum(
                Access("S", (*at, t + ex.const(1))),
                ex.exp(self._place(d.decay, SUMS, t + ex.const(1))) * ex.load("S", (*at, t), dtype)
                + self._place(d.added, PLACE, t + ex.const(1)),
            ),
            *given,
        ]
        used = frozenset().union(*(e.ranks | set(e.over) for e in made))
        ranks = {**d.lifter.ranks, **self.lifter.ranks, STEP: self.steps}
        named = tuple(Rank(r, s, r == STEP) for r, s in ranks.items() if r in used)
        seen = recurrence(verify(Cascade("recurrence", named, tuple(self.declared.values()), tuple(made), ("O", "S"))))
        if isinstance(seen, Obstacle):
            raise CannotLift(str(seen), n)
        results = {"O": n, **self._final()}
        nodes = self._nodes(results)
        body = tuple(x for x in n.graph.nodes if x in nodes)
        return FoundScan(
            self.steps,
            seen,
            self.tensors,
            results,
            source_line(n),
            module_path(n),
            body,
            nodes,
            copies=1,
        )

    def _place(self, e: Expr, name: str, place: Expr) -> Expr:
        """A term of places at one of them, in terms of what it is made of there."""
        shape = shape_of(tensor_of(self.d.node))
        one = {ex.index(f"d{x}"): ex.const(0) for x, s in enumerate(shape) if s == 1}
        lifter = self.d.lifter
        lifter.ranks[STEP] = self.steps
        term = settled(lifter.opened(ex.substitute(e, {ex.index(name): place, **one})), STEP, self.steps)
        return ex.substitute(term, {x: self._read(lifter, x) for x in ex.loads(term)})

    def _read(self, lifter: Within, x: Expr) -> Expr:
        """A read of a node of the graph as one of an input of the cascade."""
        node = lifter.leaves.get(str(x.attr))
        if node is None:
            raise CannotLift("what its states are made of is a sum of its own", self.d.node)
        name = next((k for k, v in self.tensors.items() if v is node), f"X{len(self.tensors)}")
        self.tensors[name] = node
        self.declared[name] = Tensor(name, shape_of(tensor_of(node)), dtype_of(node))
        return ex.load(name, x.args, x.dtype)

    def _given(self, n: fx.Node) -> list[Einsum]:
        """The Einsums of what a step gives, by the place of the states that it reads."""
        lifter, d, shape = self.lifter, self.d, shape_of(tensor_of(n))
        lifter.ranks.update({f"o{x}": s for x, s in enumerate(shape)})
        at = tuple(ex.index(f"o{x}") if s != 1 else ex.const(0) for x, s in enumerate(shape))
        value = lifter.value(n, at)
        inner = {e.out.tensor: f"V{k}" for k, e in enumerate(lifter.einsums)}
        states = {
            x.args[d.dim]
            for e in (value, *(e.body for e in lifter.einsums))
            for x in ex.loads(e)
            if lifter.leaves.get(str(x.attr)) is d.node
        }
        place, zero = next(iter(states), None), ex.const(0)
        if place is None or len(states) > 1 or place not in at or (place is zero) != (self.steps == 1):
            raise CannotLift("what its steps give reads other states than their own", n)
        t = ex.index(STEP)
        names, only = ({place: t}, ()) if place is not zero else ({}, (t,))

        def renamed(e: Expr) -> Expr:
            found: dict[Expr, Expr] = {}
            for x in ex.loads(e):
                index = tuple(ex.substitute(i, names) for i in x.args)
                if str(x.attr) in inner:
                    found[x] = ex.load(inner[str(x.attr)], (*index, *only), x.dtype)
                elif lifter.leaves.get(str(x.attr)) is d.node:
                    found[x] = ex.load("S", (*index[: d.dim], *index[d.dim + 1 :], t), x.dtype)
                else:
                    found[x] = self._read(lifter, ex.load(str(x.attr), index, x.dtype))
            return ex.substitute(ex.substitute(e, found), names)

        out: list[Einsum] = []
        for e in lifter.einsums:
            made = lifter.tensors[e.out.tensor]
            self.declared[inner[made.name]] = Tensor(inner[made.name], (*made.shape, *(1 for _ in only)), made.dtype)
            index = (*(ex.substitute(i, names) for i in e.out.index), *only)
            out.append(Einsum(Access(inner[made.name], index), renamed(e.body), e.op, e.over))
        self.declared["O"] = Tensor("O", shape, dtype_of(n))
        index = tuple(ex.substitute(i, names) for i in at)
        if only:
            # the one step stands where there is one of everything
            last = max(x for x, i in enumerate(at) if i is place)
            index = (*index[:last], t, *index[last + 1 :])
        return [*out, Einsum(Access("O", index), renamed(value))]

    def _final(self) -> Mapping[str, fx.Node]:
        """The node that is the last state."""
        for u in self.d.node.users:
            given = arguments(u)
            if op_name(u) == "select" and given["index"] in (-1, self.steps):
                dim = given["dim"]
                if isinstance(dim, int) and dim % tensor_of(self.d.node).dim() == self.d.dim and u.users:
                    return {"S": u}
        return {}

    def _nodes(self, results: Mapping[str, fx.Node]) -> frozenset[fx.Node]:
        """What rests on the product on the way to the results, which nobody else may read."""
        nodes, stack = {self.d.node, *results.values()}, list(results.values())
        while stack:
            new = [i for i in stack.pop().all_input_nodes if i in self.behind and i not in nodes]
            nodes.update(new)
            stack += new
        if any(u not in nodes for x in nodes - set(results.values()) for u in x.users):
            raise CannotLift("the states between its steps are read elsewhere", self.d.node)
        return frozenset(nodes)
