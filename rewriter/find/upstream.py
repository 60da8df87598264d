"""Upstream of an attention: its keys and values as the linear maps that make them, down to what a token need keep.

    before   QK[b,h,p,m] = Σ_e Q·K[b,h,m,e]                                       K and V are inputs of the cascade
    after    X[b,h,m,e] = Σ_c C[b,m,c]·W[h·E+e,c];  QK = Σ_e Q·where(e < E1, X, R[b,m,e−E1])       C, W and R are

Followed are views, casts, joins, padding, copies into a fresh tensor, and one product with weights. Anything else (a norm,
a rotation by position, a sum of two tokens' values) is where a tensor is read as it stands. What the larger cascade is
good for is decided in `patterns.absorb`, by algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast as typed

import torch
from torch import fx

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Access, Cascade, Einsum, Size, Tensor, verify
from ...patterns.expr import Expr
from ...patterns.verdict import Obstacle
from ..capture.weights import PARAMETER
from ..graph.aliases import Aliases
from ..graph.node import CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import same, shape_of
from ..graph.where import module_path
from ..lift import operators_contract, operators_edit, operators_view
from ..lift.index import ZERO
from ..lift.lift import At, Lifter, Rule
from ..lift.names import rename
from ..lift.operators_contract import Contraction
from .detect import Found

_GATHERS = frozenset(("index", "index_select", "gather", "embedding", "unfold"))
_JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
_VIEWS = frozenset(operators_view.RULES) - _GATHERS - _JOINS
_FRESH = frozenset(("new_empty", "empty", "empty_like", "new_zeros", "zeros", "zeros_like"))
# What stands for a write into a fresh tensor in a graph without writes.
_WRITES = frozenset(("slice_scatter", "copy"))
# Nodes among which the module that a tensor comes from is sought.
_LIMIT = 64


@dataclass(frozen=True)
class Reached:
    """An attention with what makes its keys and values; `tensors` are the graph nodes of its inputs."""

    cascade: Cascade
    tensors: Mapping[str, fx.Node]


def upstream(graph: fx.Graph, aliases: Aliases, f: Found) -> Reached | Obstacle:
    """A found attention, reaching up to the weights that make keys and values of other tensors; or why it does not.

    Inputs are named after the module that computes them, so that equal layers are equal cascades.
    """
    view = attention(f.cascade)
    assert isinstance(view, Attention), view
    lifter = _Climber(graph, aliases, view.cascade, f.output)
    found: dict[Expr, Expr] = {}
    for x in _keyed(view):
        node = f.tensors.get(str(x.attr))
        if node is not None and lifter.expands(node):
            found[x] = lifter.value(node, x.args)
    if not found:
        made = {str(x.attr): _maker(f.tensors[str(x.attr)]) for x in _keyed(view) if str(x.attr) in f.tensors}
        said = ", ".join(f"{name} comes from {op}" for name, op in made.items())
        return Obstacle(f"no product with weights stands behind keys or values ({said})")
    return _named(_joined(view.cascade, lifter, found), lifter, f)


def projection_width(output: fx.Node) -> Size:
    """Channels of the linear layer that an attention's output goes into, through views alone; 0 where there is none."""
    n = output
    while len(n.users) == 1:
        (n,) = n.users
        if op_name(n) in _PRODUCTS and n.all_input_nodes[-1].op == "get_attr":
            return shape_of(tensor_of(n))[-1]
        if op_name(n) not in _VIEWS:
            return 0
    return 0


def _keyed(view: Attention) -> list[Expr]:
    """What products and values read along the keys."""
    terms = [*(e.body for e in view.products), view.values]
    return list(dict.fromkeys(x for t in terms for x in ex.loads(t) if view.key in x.ranks))


def _maker(n: fx.Node) -> str:
    """The operator that computes a value, behind what only moves it."""
    while op_name(n) in _VIEWS and n.all_input_nodes:
        n = n.all_input_nodes[0]
    return "an input" if n.op == "placeholder" else op_name(n)


def _joined(c: Cascade, lifter: _Climber, found: Mapping[Expr, Expr]) -> Cascade:
    einsums = (*lifter.einsums, *(replace(e, body=ex.substitute(e.body, found)) for e in c.einsums))
    names = {str(x.attr) for e in einsums for x in e.reads} | {e.out.tensor for e in einsums}
    ranks = {r.name for r in c.ranks}
    return replace(
        c, einsums=einsums, tensors=tuple(t for t in lifter.tensors.values() if t.name in names),
        ranks=(*c.ranks, *(r for r in lifter.rank_list() if r.name not in ranks)),
    )


def _named(c: Cascade, lifter: _Climber, f: Found) -> Reached:
    names: dict[str, str] = {}
    taken = {t.name for t in c.tensors} - set(lifter.leaves)
    for leaf, node in lifter.leaves.items():
        stem, k = _word(node, f.module), 2
        name = stem
        while name in taken:
            name, k = f"{stem}{k}", k + 1
        taken.add(name)
        names[leaf] = name
    named = verify(rename(c, {}, names))
    nodes = {**f.tensors, **{names[leaf]: node for leaf, node in lifter.leaves.items()}}
    return Reached(named, {t.name: nodes[t.name] for t in named.inputs})


def _word(n: fx.Node, home: str) -> str:
    """A name for a tensor that all layers alike give it: of the parameter that it is, or the module that it comes from."""
    if n.op == "get_attr":
        # a flattened path: what follows the attention's own module, or the last layer's number
        words = str(n.target).replace(".", "_").rpartition(f"{home.replace('.', '_')}_" if home else "model_")[2].split("_")
        last = max((i for i, w in enumerate(words) if w.isdigit()), default=-1)
        return "_".join(words[last + 1 :]) or "W"
    near = _nearest(n, home)
    if near is not None:
        return module_path(near).removeprefix(f"{home}.").rpartition(".")[2]
    return "input" if n.op == "placeholder" else op_name(n)


def _nearest(n: fx.Node, home: str) -> fx.Node | None:
    """The closest node at or above this one that a module of the attention's own module computes."""
    seen, level = {n}, [n]
    while level and len(seen) < _LIMIT:
        for x in level:
            if module_path(x).startswith(f"{home}." if home else "") and module_path(x) != home:
                return x
        level = list(dict.fromkeys(i for x in level for i in x.all_input_nodes if i not in seen))
        seen |= set(level)
    return None


class _Climber(Lifter):
    """A lifter that follows only what is linear in a token's values, over the ranks of a cascade that is there."""

    def __init__(self, graph: fx.Graph, aliases: Aliases, c: Cascade, reader: fx.Node) -> None:
        super().__init__(graph, aliases, _RULES)
        self.ranks = {r.name: r.size for r in c.ranks}
        self.tensors = {t.name: t for t in c.tensors}
        self.reader = reader
        self.inside = 0
        self._expands: dict[fx.Node, bool] = {}
        self._static: dict[fx.Node, bool] = {}

    def expands(self, n: fx.Node) -> bool:
        """Whether a product with weights stands behind a node, with nothing between that is not linear."""
        if n not in self._expands:
            name = op_name(n)
            if name in _PRODUCTS:
                self._expands[n] = self.map_of(n) is not None
            elif name in _WRITES:
                self._expands[n] = any(self.expands(x) for x in n.all_input_nodes)
            elif name in _FRESH:
                self._expands[n] = any(self.expands(w.all_input_nodes[-1]) for w in self.aliases.writers(n))
            elif name in _JOINS:
                self._expands[n] = any(self.expands(x) for x in n.all_input_nodes)
            else:
                # `type_as` and its like name another tensor, whose values they do not read
                through = name in _VIEWS or name in operators_view.SEVERAL
                self._expands[n] = through and any(self.expands(x) for x in n.all_input_nodes[:1])
        return self._expands[n]

    def static(self, n: fx.Node) -> bool:
        """Whether a value is the same for all inputs: a weight, or what is computed of weights alone."""
        if n not in self._static:
            own = n.all_input_nodes
            given = n.op == "get_attr" or bool(n.op == "placeholder" and n.meta.get(PARAMETER))
            self._static[n] = given or (bool(own) and all(self.static(x) for x in own))
        return self._static[n]

    def map_of(self, n: fx.Node) -> Contraction | None:
        """A node as a product of tokens with weights."""
        found = _PRODUCTS[op_name(n)](self, n)
        if found is None:
            return None
        sides = [self.static(node) for node, _ in found.operands(tuple(ZERO for _ in found.shape), ZERO)]
        return found if sides.count(True) == 1 else None

    def value(self, n: fx.Node, at: At) -> Expr:
        """As the lifter's, but for what is not followed: that is read as it stands."""
        at = tuple(ZERO if s == 1 else i for s, i in zip(shape_of(tensor_of(n)), at, strict=True))
        made = self.assembled if op_name(n) in _FRESH else self.edited if op_name(n) == "slice_scatter" else None
        if not self.inside and made is not None and self.expands(n):
            try:
                return made(n, at)
            except CannotLift as no:
                self.misses.append((no.reason, n))
                return self.leaf(n, at)
        if not self.inside and self.expands(n):
            return super().value(n, at)
        return super().value(n, at) if op_name(n) in _VIEWS and not _narrows(n) else self.leaf(n, at)

    def leaf(self, n: fx.Node, at: At, reader: fx.Node | None = None) -> Expr:
        return super().leaf(n, at, reader or self.reader)

    def assembled(self, n: fx.Node, at: At) -> Expr:
        """A fresh tensor that copies fill, slice by slice; what nobody writes may be anything, so it is 0.

        before   t = empty(…, 3); t[…, :2].copy_(x); t[…, 2:].copy_(y)         after   where(i < 2, x[i], y[i − 2])
        """
        out = ex.const(0.0, dtype_of(n))
        for w in self.aliases.writers(n):
            if op_name(w) != "copy" or self.position[w] > self.position[self.reader]:
                raise CannotLift(f"{n.name} is written by {op_name(w)}", w)
            a = arguments(w)
            out = self.over(typed("fx.Node", a["self"]), typed("fx.Node", a["src"]), n, at, out)
        return out

    def edited(self, n: fx.Node, at: At) -> Expr:
        """The same where each copy is a value of its own: `slice_scatter(slice_scatter(empty, x, …), y, …)`."""
        base = n.all_input_nodes[0]
        fresh = op_name(base) in _FRESH and not self.aliases.writers(base)
        before = ex.const(0.0, dtype_of(n)) if fresh else self.value(base, at)
        source = typed("fx.Node", arguments(n)["src"])
        d, start, end = _slice(n, shape_of(tensor_of(source)))
        place = (*at[:d], at[d] - start, *at[d + 1 :])
        return _between(ex.cast(self.value(source, place), dtype_of(n)), before, at[d], start, end)

    def over(self, view: fx.Node, source: fx.Node, n: fx.Node, at: At, before: Expr) -> Expr:
        """The value at `at` of `n` after `source` is copied into `view`, a chain of slices of `n`."""
        chain: list[fx.Node] = []
        while view is not n:
            if op_name(view) != "slice":
                raise CannotLift(f"{n.name} is written through {op_name(view)}", view)
            chain.append(view)
            view = view.all_input_nodes[0]
        where, bounds = list(at), list[tuple[Expr, int, int | None]]()
        for s in reversed(chain):
            d, start, end = _slice(s)
            bounds.append((where[d], start, end))
            where[d] = where[d] - start
        out = ex.cast(self.value(source, self.broadcast(source, tuple(where))), dtype_of(n))
        for i, start, end in bounds:
            out = _between(out, before, i, start, end)
        return out


def _between(inside: Expr, outside: Expr, i: Expr, start: int, end: int | None) -> Expr:
    out = inside if end is None else ex.where(i < end, inside, outside)
    return out if start == 0 else ex.where(i < start, outside, out)


def _slice(s: fx.Node, inner: Sequence[Size] = ()) -> tuple[int, int, int | None]:
    """Dimension, first coordinate and end of a slice (of this shape) with step 1; no end where it reaches the tensor's."""
    a = arguments(s)
    inner, outer = inner or shape_of(tensor_of(s)), shape_of(tensor_of(s.all_input_nodes[0]))
    d, start = operators_view.dim_of(a["dim"], len(outer)), a["start"] or 0
    whole, kept = outer[d], inner[d]
    if same(whole, kept):
        return d, 0, None
    if a["step"] not in (None, 1) or not (isinstance(start, int) and isinstance(whole, int) and isinstance(kept, int)):
        raise CannotLift("a slice with a step or an open bound", s)
    start = start + whole if start < 0 else start
    return d, start, start + kept if start + kept < whole else None


def _narrows(n: fx.Node) -> bool:
    """A cast to fewer bytes: what is kept is what comes out of it."""
    source = n.all_input_nodes[0].meta.get("val") if n.all_input_nodes else None
    return isinstance(source, torch.Tensor) and tensor_of(n).element_size() < source.element_size()


def _map(lifter: Lifter, n: fx.Node, a: Mapping[str, object], at: At) -> Expr:
    """A product with weights as an Einsum of its own, at just these coordinates; a bias is added behind it."""
    assert isinstance(lifter, _Climber)
    found = lifter.map_of(n)
    assert found is not None
    dtype = dtype_of(n)
    place = tuple(ZERO if s == 1 else i for s, i in zip(found.shape, found.place(at), strict=True))
    rank = lifter._fresh("c", lifter.ranks)
    lifter.ranks[rank] = found.size
    lifter.inside += 1
    left, right = (ex.cast(lifter.value(x, where), dtype) for x, where in found.operands(place, ex.index(rank)))
    lifter.inside -= 1
    body = left * right
    free = [r for r in lifter.ranks if r in body.ranks and r != rank]
    name = lifter._fresh("X", lifter.tensors)
    lifter.tensors[name] = Tensor(name, tuple(lifter.ranks[r] for r in free), dtype)
    index = tuple(ex.index(r) for r in free)
    lifter.einsums.append(Einsum(Access(name, index), body, "add", (rank,)))
    out = ex.load(name, index, dtype)
    bias = a["self"] if op_name(n) == "addmm" else a.get("bias")
    if not isinstance(bias, fx.Node):
        return out
    return out + ex.cast(lifter.value(bias, lifter.broadcast(bias, at)), dtype)


def _plain_addmm(lifter: Lifter, n: fx.Node) -> Contraction | None:
    a = arguments(n)
    return operators_contract.batch_product(lifter, n) if a["alpha"] == a["beta"] == 1 else None


_PRODUCTS: Mapping[str, Callable[[Lifter, fx.Node], Contraction | None]] = {
    **operators_contract.PRODUCTS, "addmm": _plain_addmm,
}
_RULES: Mapping[str, Rule] = {
    **{name: rule for name, rule in operators_view.RULES.items() if name not in _GATHERS},
    **dict.fromkeys(_PRODUCTS, _map), "copy": operators_edit.copy,
}
