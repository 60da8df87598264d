"""Recurrences of a graph: a folded loop lifted into a cascade whose states are carried over an iterative rank.

    StepLoop  →  S[…, 0] = S0;  S[…, t + 1] = step(S[…, t], X[t]);  O[…, t] = what a step gives        →  Recurrence
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ...patterns.expr import Expr
from ...patterns.recurrence.recurrence import Recurrence, recurrence
from ...patterns.verdict import Obstacle
from ..graph.aliases import Aliases
from ..graph.node import CannotLift, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..graph.where import module_path, source_line
from ..lift.index import ZERO
from ..lift.lift import Lifter
from ..lift.rules import RULES
from .loop import Collected, StepLoop
from .step import INPUT, AfterStep, Fixed, Prior, StepPiece, body

STEP = "t"


@dataclass(frozen=True)
class FoundScan:
    """A recurrence of a graph. `tensors` maps the cascade's inputs to nodes; `results` its outputs to the nodes that they
    replace, for outputs that are read outside, in other shapes where a chunk's tokens have a dimension of their own.

    `nodes` make the results in `copies` of a `body`: one of each step, or of all steps one. `before`: nodes ahead of them
    that it stands for as well. `strays`: a value of the last step that is no state is read elsewhere.
    """

    steps: int
    recurrence: Recurrence
    tensors: Mapping[str, fx.Node]
    results: Mapping[str, fx.Node]
    where: str
    module: str
    body: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    copies: int
    before: tuple[fx.Node, ...] = ()
    strays: bool = False

    @property
    def output(self) -> fx.Node:
        """The node that stands for all: what the steps give, else the last state."""
        return next(iter(self.results.values()))


@dataclass(frozen=True)
class OtherScan:
    """A loop that hands values on in a way that no law here covers."""

    node: fx.Node
    reason: str


def lifted(loop: StepLoop) -> FoundScan | OtherScan:
    """The recurrence of a loop, or why it is none of the known ones."""
    first = next(n for n in loop.copies[0] if n is not None)
    try:
        made = _Lift(loop)
        cascade = made.cascade()
        seen = recurrence(cascade)
    except CannotLift as no:
        return OtherScan(no.node or first, no.reason)
    if isinstance(seen, Obstacle):
        return OtherScan(first, str(seen))
    if not made.results():
        return OtherScan(first, "nobody reads what its steps give")
    strays = any(place not in loop.carried for place in loop.finals)
    own = tuple(n for n in loop.copies[0] if n is not None)
    return FoundScan(
        loop.steps,
        seen,
        made.tensors,
        made.results(),
        source_line(first),
        module_path(first),
        own,
        frozenset(loop.nodes),
        loop.steps,
        strays=strays,
    )


class _Lift:
    def __init__(self, loop: StepLoop) -> None:
        self.loop = loop
        self.states = {place: f"S{k or ''}" for k, place in enumerate(loop.carried)}
        self.given = {c: f"O{k or ''}" for k, c in enumerate(loop.collected)}
        self.tensors: dict[str, fx.Node] = {}
        self.declared: dict[str, Tensor] = {}
        self.einsums: list[Einsum] = []
        self.ranks: dict[str, Size] = {STEP: loop.steps}
        self.names: dict[fx.Node, str] = {}

    def cascade(self) -> Cascade:
        loop = self.loop
        for place, initial in loop.carried.items():
            self._initial(place, initial)
        self._lift(list(self.states), False, self._next)
        self._lift(list(dict.fromkeys(c.place for c in loop.collected)), True, self._output)
        outputs = (*self.given.values(), *self.states.values())
        used = frozenset().union(*(e.ranks | set(e.over) for e in self.einsums))
        ranks = tuple(Rank(r, s, r == STEP) for r, s in self.ranks.items() if r in used)
        # states before the steps, then all that a step computes, in order
        return verify(Cascade("recurrence", ranks, tuple(self.declared.values()), tuple(self.einsums), outputs))

    def results(self) -> dict[str, fx.Node]:
        out = {name: c.node for c, name in self.given.items()}
        last = self.loop.copies[-1]
        for place in self.loop.finals:
            node = last[place]
            if place in self.states and node is not None:
                out[self.states[place]] = node
        inside = set(self.loop.nodes)
        return {n: x for n, x in out.items() if any(u not in inside for u in x.users)}

    def _initial(self, place: int, node: fx.Node) -> None:
        like = self.loop.copies[0][place]
        assert like is not None
        if shape_of(tensor_of(node)) != shape_of(tensor_of(like)) or dtype_of(node) != dtype_of(like):
            raise CannotLift("the first state has another shape or type than the others", like)
        name, shape = self.states[place], shape_of(tensor_of(like))
        self.declared[name] = Tensor(name, (*shape, self.loop.steps + 1), dtype_of(like))
        at = self.coordinates(shape)
        self.add(Einsum(Access(name, (*at, ex.const(0))), self.load(node, at)))

    def coordinates(self, shape: tuple[Size, ...]) -> tuple[Expr, ...]:
        """Ranks for the dimensions of a value, one each; those of one element have none."""
        out: list[Expr] = []
        taken: list[str] = []
        for size in shape:
            if size == 1:
                out.append(ZERO)
                continue
            fit = (r for r, s in self.ranks.items() if r != STEP and s == size and r not in taken)
            name = next(fit, f"r{len(self.ranks) - 1}")
            self.ranks[name] = size
            taken.append(name)
            out.append(ex.index(name))
        return tuple(out)

    def load(self, node: fx.Node, at: tuple[Expr, ...]) -> Expr:
        name = self.names.setdefault(node, f"X{len(self.names)}")
        self.tensors[name] = node
        shape = shape_of(tensor_of(node))
        self.declared.setdefault(name, Tensor(name, shape, dtype_of(node)))
        return ex.load(name, tuple(ZERO if s == 1 else i for s, i in zip(shape, at, strict=True)), dtype_of(node))

    def declare(self, name: str, shape: tuple[Size, ...], dtype: str) -> str:
        """A tensor with a value at each step."""
        self.declared[name] = Tensor(name, (*shape, self.loop.steps), dtype)
        return name

    def add(self, e: Einsum) -> None:
        self.einsums.append(e)

    def _lift(self, places: list[int], after: bool, write: Callable[[int, tuple[Expr, ...], Expr, str], None]) -> None:
        """Lift the values at some places of the body, and what they need."""
        graph, at_place = body(self.loop, places, after)
        values = _Values(self, graph, "O" if after else "S")
        for place, n in at_place.items():
            at = self.coordinates(shape_of(tensor_of(n)))
            write(place, at, values.term(n, at), dtype_of(n))

    def _next(self, place: int, at: tuple[Expr, ...], term: Expr, dtype: str) -> None:
        self.add(Einsum(Access(self.states[place], (*at, ex.index(STEP) + ex.const(1))), term))

    def _output(self, place: int, at: tuple[Expr, ...], term: Expr, dtype: str) -> None:
        for c, name in self.given.items():
            if c.place == place:
                shape, index = _laid(c, shape_of(tensor_of(c.node)), at)
                self.declared[name] = Tensor(name, shape, dtype)
                self.add(Einsum(Access(name, index), term))


class _Values:
    """Terms of the values of one body: what a product takes that is computed in the step has a value at each step."""

    def __init__(self, whole: _Lift, graph: fx.Graph, suffix: str) -> None:
        self.whole, self.graph, self.suffix = whole, graph, suffix
        self.aliases = Aliases(graph)
        self.defined: dict[fx.Node, str] = {}

    def term(self, n: fx.Node, at: tuple[Expr, ...]) -> Expr:
        """The term of a node's element. Raises CannotLift where an operator has none."""
        whole = self.whole
        lifter = Lifter(self.graph, self.aliases, RULES)
        lifter.ranks.update({r: s for r, s in whole.ranks.items() if r != STEP})
        out = lifter.value(n, at)
        whole.ranks.update({r: s for r, s in lifter.ranks.items() if r not in whole.ranks})
        computed = {x for x in lifter.leaves.values() if INPUT not in x.meta}
        if n in computed:
            said = [why for why, x in (*lifter.misses, *lifter.closed) if x is n]
            raise CannotLift(said[-1] if said else f"{op_name(n)} has no term", n)
        for x in sorted(computed):
            self._define(x)
        for e in lifter.einsums:
            tensor = lifter.tensors[e.out.tensor]
            # a reduction inside a step has a value at each step
            name = whole.declare(self._name(e.out.tensor, n), tensor.shape, tensor.dtype)
            body = self._renamed(lifter, e.body, n)
            whole.add(Einsum(Access(name, (*e.out.index, ex.index(STEP))), body, e.op, e.over))
        return self._renamed(lifter, out, n)

    def _define(self, n: fx.Node) -> None:
        if n in self.defined:
            return
        shape = shape_of(tensor_of(n))
        at = self.whole.coordinates(shape)
        term = self.term(n, at)
        self.defined[n] = self.whole.declare(f"V{len(self.defined)}{self.suffix}", shape, dtype_of(n))
        self.whole.add(Einsum(Access(self.defined[n], (*at, ex.index(STEP))), term))

    def _name(self, inner: str, n: fx.Node) -> str:
        return f"{inner}_{self.suffix}{list(self.graph.nodes).index(n)}"

    def _renamed(self, lifter: Lifter, term: Expr, n: fx.Node) -> Expr:
        """The term with its reads at step t of the tensors of the whole."""
        t, whole = ex.index(STEP), self.whole
        table: dict[Expr, Expr] = {}
        for x in ex.loads(term):
            node = lifter.leaves.get(str(x.attr))
            if node is None or node in self.defined:
                name = self._name(str(x.attr), n) if node is None else self.defined[node]
                table[x] = ex.load(name, (*x.args, t), x.dtype)
                continue
            match node.meta[INPUT]:
                case Prior(place):
                    table[x] = ex.load(whole.states[place], (*x.args, t), x.dtype)
                case AfterStep(place):
                    table[x] = ex.load(whole.states[place], (*x.args, t + ex.const(1)), x.dtype)
                case Fixed(source):
                    table[x] = whole.load(source, x.args)
                case StepPiece() as p:
                    table[x] = whole.load(p.node, _in_piece(p, x.args))
        return ex.substitute(term, table)


def _laid(c: Collected, shape: tuple[Size, ...], at: tuple[Expr, ...]) -> tuple[tuple[Size, ...], tuple[Expr, ...]]:
    """Where in the whole a step's value stands."""
    t = ex.index(STEP)
    if c.width is None:
        return shape, (*at[: c.dim], t, *at[c.dim :])
    return shape, (*at[: c.dim], t * ex.const(c.width) + at[c.dim], *at[c.dim + 1 :])


def _in_piece(p: StepPiece, at: tuple[Expr, ...]) -> tuple[Expr, ...]:
    start = ex.index(STEP) * ex.const(p.by) + ex.const(p.first)
    if p.length is None:
        return (*at[: p.dim], start, *at[p.dim :])
    return (*at[: p.dim], start + at[p.dim], *at[p.dim + 1 :])
