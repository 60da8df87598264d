"""Lifting: what a graph node computes at given coordinates, as a term; reductions and products become Einsums.

Lifting is driven by demand. `Lifter.value(node, at)` asks one rule per operator (`operators_*.py`) for the term of
the element of `node` at the index terms `at`. Views only rewrite `at`, pointwise operators build terms, and reductions
and contractions define a tensor of the cascade and answer a load of it. So spellings vanish here, and what is left is
products, row reductions and terms over coordinates and loads.

A node that no rule covers, or whose data is written in place before it is read, becomes an input tensor of the cascade.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Access, Einsum, Rank, Size, Tensor, size_term
from ...patterns.expr import Expr
from ...patterns.terms.narrow import narrowed
from ..graph.aliases import Aliases
from ..graph.node import FOLDED, CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import same, shape_of, size_of
from ..graph.torch_private import known_size, least, traced_size
from .index import ZERO, is_simple

At = tuple[Expr, ...]
Rule = Callable[["Lifter", fx.Node, Mapping[str, object], At], Expr]


@dataclass(frozen=True)
class Origin:
    """The node and coordinates that a term came from."""

    node: fx.Node
    at: At


# How many operators are lifted one inside the other: what is farther upstream is read as the model computes it.
DEEPEST = 64
# How long a term may be that stands for one node: a longer one is cheaper to read than to compute for every score.
LONGEST = 1024
# … of windows, whose places are told later: what is put together of chunks reads each row's keys at several.
LONGEST_OF_WINDOWS = 4 * LONGEST
# Python's arithmetic with floats, which is that of float64.
_REAL: Mapping[object, str] = {
    operator.pow: "pow", operator.truediv: "div", operator.mul: "mul", operator.add: "add", operator.sub: "sub",
    operator.neg: "neg", math.sqrt: "sqrt", torch.sym_sqrt: "sqrt", torch.sym_float: "cast",
}
_REPEATS = frozenset(("expand", "expand_as", "broadcast_to"))


class Lifter:
    """One attempt to lift the value of one node. Collects ranks, tensors and Einsums as they are demanded.

    With `offsets`, operands that are slices are read as what they are slices of; with `windows`, so are windows that move
    with their row. `stops` are read as they are.
    """

    def __init__(
        self, graph: fx.Graph, aliases: Aliases, rules: Mapping[str, Rule], offsets: bool = False, windows: bool = False,
        stops: Collection[fx.Node] = (),
    ) -> None:
        self.aliases, self.rules, self.offsets, self.windows = aliases, rules, offsets, windows
        self.stops = stops
        self.longest = LONGEST_OF_WINDOWS if windows else LONGEST
        self.position = aliases.position
        self.ranks: dict[str, Size] = {}
        self.tensors: dict[str, Tensor] = {}
        self.einsums: list[Einsum] = []
        self.leaves: dict[str, fx.Node] = {}
        self.read_at: dict[fx.Node, float] = {}
        self.scalars: dict[str, fx.Node] = {}
        self.origin: dict[Expr, Origin] = {}
        self.visited: set[fx.Node] = set()
        self.products: set[str] = set()
        self.outside: dict[fx.Node, tuple[At, tuple[Expr, ...]]] = {}
        self.key = ""
        self.output_at: At = ()
        self.misses: list[tuple[str, fx.Node]] = []
        # what is read as it is, because nothing is known of how it is made
        self.closed: list[tuple[str, fx.Node]] = []
        self._memo: dict[tuple[fx.Node, At], Expr] = {}
        self._defined: dict[tuple[fx.Node, str], tuple[str, tuple[int, ...]]] = {}
        self._leaf_of: dict[fx.Node, str] = {}
        self._hint: dict[tuple[fx.Node, int], str] = {}
        self._consumer: list[fx.Node] = []
        self._lengths: dict[Expr, int] = {}

    # --- values ---------------------------------------------------------------------------------------------------

    def arg(self, value: object, at: At) -> Expr:
        """The term of an operator's argument: a node at coordinates (broadcast to them), or a Python scalar."""
        if isinstance(value, fx.Node):
            if isinstance(value.meta.get("val"), torch.Tensor):
                return self.value(value, self.broadcast(value, at))
            return self.scalar(value)
        if isinstance(value, (bool, int, float)):
            return ex.const(value)
        raise CannotLift(f"argument {value!r} has no term")

    def scalar(self, n: fx.Node) -> Expr:
        """A symbolic integer or float of the graph."""
        value = n.meta.get("val")
        if isinstance(value, torch.SymInt):
            # every symbol is taken for a size
            if known_size(value) is None and least(value) < 0:
                raise CannotLift(f"{n.name} is a number that may be negative", n)
            try:
                return size_term(size_of(value))
            except ValueError:
                if traced_size(value) is None or not value >= 0:
                    raise CannotLift(f"{n.name} is a number that may be negative", n) from None
                self.scalars[n.name] = n
                return ex.symbol(n.name)
        if isinstance(value, (bool, int, float)):
            return ex.const(value)
        if isinstance(value, torch.SymFloat) and n.op == "call_function" and n.target in _REAL:
            args = tuple(ex.cast(self.arg(a, ()), "f64") for a in n.args)
            return args[0] if n.target is torch.sym_float else ex.make(_REAL[n.target], args)
        tensor = n.args[0] if op_name(n) == "item" else None
        if isinstance(tensor, fx.Node):
            # a Python number that Dynamo passes as a tensor without dimensions
            return self.value(tensor, (ZERO,) * tensor_of(tensor).dim())
        raise CannotLift(f"{n.name} is a scalar that depends on data", n)

    def broadcast(self, n: fx.Node, at: At) -> At:
        """Coordinates of `n` when it is broadcast to a value with coordinates `at`."""
        shape = shape_of(tensor_of(n))
        if len(shape) > len(at):
            raise CannotLift(f"{n.name} has more dimensions than the value it is broadcast to", n)
        tail = at[len(at) - len(shape) :]
        return tuple(ZERO if s == 1 else i for s, i in zip(shape, tail))

    def value(self, n: fx.Node, at: At) -> Expr:
        """The term of the element of node `n` at coordinates `at` (one per dimension)."""
        shape = shape_of(tensor_of(n))
        at = tuple(ZERO if s == 1 else i for s, i in zip(shape, at, strict=True))
        key = (n, at)
        if key in self._memo:
            return self._memo[key]
        for d, i in enumerate(at):
            if i.op == "index":
                self._hint.setdefault((n, d), str(i.attr))
        if self._consumer and self.aliases.written_between(n, n, self._consumer[-1]):
            self.closed.append((self._written(n, self._consumer[-1]), n))
            return self.leaf(n, at)
        if n in self.stops:
            return self.leaf(n, at)
        if FOLDED in n.meta:
            self.closed.append(("a recurrence makes it step by step", n))
            return self.leaf(n, at)
        rule = self.rules.get(op_name(n))
        if rule is None:
            self.closed.append((f"{op_name(n)} has no term", n))
            return self.leaf(n, at)
        if len(self._consumer) == DEEPEST:
            self.misses.append((f"more than {DEEPEST} operators stand one behind the other", n))
            return self.leaf(n, at)
        try:
            with self.read_by(n):
                out = rule(self, n, arguments(n), at)
        except CannotLift as no:
            self.misses.append((no.reason, n))
            out = None
        if out is None:
            # whoever asks for it reads it, not the node itself, which may be a write
            return self.leaf(n, at)
        # narrowing walks the term as it is written out
        if self._length(out) <= self.longest:
            out = ex.cast(narrowed(out, dtype_of(n)), dtype_of(n))
        if self._length(out) > self.longest:
            self.misses.append((f"a term of more than {self.longest} operators", n))
            out = self._memo[key] = self.leaf(n, at)
            return out
        self.visited.add(n)
        self._memo[key] = out
        # the most downstream node that strides can address; one that repeats another says no more than that one
        if out not in self.origin or (is_simple(at) and op_name(n) not in _REPEATS):
            self.origin[out] = Origin(n, at)
        return out

    @contextmanager
    def read_by(self, n: fx.Node) -> Iterator[None]:
        """What is asked for meanwhile is asked for by node `n`."""
        self._consumer.append(n)
        try:
            yield
        finally:
            self._consumer.pop()

    def _written(self, n: fx.Node, reader: fx.Node) -> str:
        by = next(w for w in self.aliases.writers(n) if self.position[n] < self.position[w] < self.position[reader])
        return f"{n.name} is written in place (by {op_name(by)}_) before {reader.name} reads it"

    def _length(self, e: Expr) -> int:
        """How many operators a term has, written out."""
        if e not in self._lengths:
            self._lengths[e] = 1 + sum(self._length(a) for a in e.args)
        return self._lengths[e]

    def assume(self, n: fx.Node, at: At, term: Expr) -> None:
        """Read node `n` at `at` as `term` from here on."""
        self._memo[(n, tuple(ZERO if s == 1 else i for s, i in zip(shape_of(tensor_of(n)), at)))] = term

    @property
    def normalised(self) -> bool:
        """Whether a reduction other than a product has been lifted: something normalises the scores."""
        return any(e.op is not None and e.out.tensor not in (*self.products, "O") for e in self.einsums)

    def is_key(self, n: fx.Node, dim: int) -> bool:
        """Whether dimension `dim` (counted from the end) of `n`, or of a value it is made of, was read along the key."""
        shape = shape_of(tensor_of(n))
        return len(shape) >= -dim and self._hint.get((n, len(shape) + dim), "") == self.key != ""

    def leaf(self, n: fx.Node, at: At, reader: fx.Node | None = None) -> Expr:
        """Read node `n` as an input tensor of the cascade, at the time when `reader` (default: the asker) runs."""
        name = self._leaf_of.get(n)
        if name is None:
            name = self._fresh(_clean(n.name), self.tensors)
            self._leaf_of[n] = name
            self.leaves[name] = n
            self.tensors[name] = Tensor(name, shape_of(tensor_of(n)), dtype_of(n))
        reader = reader or (self._consumer[-1] if self._consumer else None)
        if reader is not None:
            self.read_at[n] = min(self.read_at.get(n, self.position[reader]), self.position[reader])
        shape = shape_of(tensor_of(n))
        return ex.load(name, tuple(ZERO if s == 1 else i for s, i in zip(shape, at, strict=True)), dtype_of(n))

    # --- definitions ------------------------------------------------------------------------------------------------

    def rank(self, size: Size, hint: str = "", avoid: Sequence[str] = ()) -> str:
        """A rank for a bound coordinate of this size: the hinted one when it fits (bound names are free to choose)."""
        if hint and hint not in avoid and hint in self.ranks and same(self.ranks[hint], size):
            return hint
        for name, s in self.ranks.items():
            if name not in avoid and same(s, size) and hint == "*":
                return name
        name = self._fresh("r0", self.ranks)
        self.ranks[name] = size
        return name

    def bound_rank(self, n: fx.Node, dim: int, avoid: Sequence[str]) -> str:
        """The rank of a reduced dimension of node `n`: the name under which that dimension was demanded, if any."""
        size = shape_of(tensor_of(n))[dim]
        return self.rank(size, self._hint.get((n, dim), ""), avoid)

    def define(
        self, n: fx.Node, what: str, shape: Sequence[Size], at: At, body: Callable[[At], Einsum], dtype: str
    ) -> Expr:
        """A tensor of the cascade named `what`, defined once for node `n`; answers its load at `at`.

        Dimensions of size 1 are left out. `body` gets the coordinates (ranks, or 0 where the size is 1) and builds the
        Einsum for them; its output access is replaced by the right one.
        """
        key = (n, what)
        if key not in self._defined:
            kept = tuple(d for d, s in enumerate(shape) if s != 1)
            names: list[str] = []
            for d in kept:
                i = at[d]
                hint = str(i.attr) if i.op == "index" else self._hint.get((n, d), "")
                names.append(self.rank(shape[d], hint, names))
            coordinates = [ZERO] * len(shape)
            for d, r in zip(kept, names):
                coordinates[d] = ex.index(r)
            built = body(tuple(coordinates))
            name = self._fresh(what, self.tensors)
            self.tensors[name] = Tensor(name, tuple(shape[d] for d in kept), dtype)
            self.einsums.append(
                Einsum(Access(name, tuple(ex.index(r) for r in names)), built.body, built.op, built.over)
            )
            self._defined[key] = (name, kept)
        name, kept = self._defined[key]
        return ex.load(name, tuple(at[d] for d in kept), dtype)

    def _fresh(self, want: str, taken: Mapping[str, object]) -> str:
        if want not in taken and want != "r0":
            return want
        stem = want.rstrip("0123456789") or "t"
        k = 0
        while f"{stem}{k}" in taken:
            k += 1
        return f"{stem}{k}"

    def rank_list(self) -> tuple[Rank, ...]:
        used: set[str] = set()
        for e in self.einsums:
            used |= e.ranks | set(e.over)
        return tuple(Rank(r, s) for r, s in self.ranks.items() if r in used)


def _clean(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def scratch(body: Expr, op: str | None = None, over: tuple[str, ...] = ()) -> Einsum:
    """An Einsum whose output access is still to be filled in by `define`."""
    return Einsum(Access("", ()), body, op, over)
