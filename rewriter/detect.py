"""Detection: find every attention of a graph, as a verified cascade with the graph nodes that it reads and replaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ..patterns import expr as ex
from ..patterns import recognise
from ..patterns.cascade import Access, Cascade, Einsum, Tensor, verify
from ..patterns.expr import Expr
from . import operators_point, operators_reduce, operators_view
from .aliases import Aliases
from .final import Final, finals
from .hoist import hoist
from .lift import ZERO, CannotLift, Lifter, Rule, dtype_of, op_name, tensor_of
from .names import canonical
from .operators_reduce import peel
from .sizes import shape_of
from .where import module_path, source_line

RULES: Mapping[str, Rule] = {**operators_view.RULES, **operators_point.RULES, **operators_reduce.RULES}


@dataclass(frozen=True)
class Found:
    """An attention of a graph.

    `tensors` maps the cascade's inputs to graph nodes, `scalars` its symbols that are no size of a graph input to nodes;
    `output` is the node whose value the cascade's first output replaces, up to dimensions of size 1.
    """

    cascade: Cascade
    tensors: Mapping[str, fx.Node]
    scalars: Mapping[str, fx.Node]
    output: fx.Node
    where: str
    module: str
    nodes: frozenset[fx.Node]
    needs_grad: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NearMiss:
    """A last product that might have been an attention, and why it is left alone."""

    node: fx.Node
    reason: str
    what: str
    where: str
    module: str
    depth: int = 0
    hint: str = field(default="")


def find(gm: fx.GraphModule) -> tuple[list[Found], list[NearMiss]]:
    """Every attention of a pre-dispatch ATen graph, in graph order, and what looked like one.

    before   scores = q @ k.T; p = softmax(scores · scale + mask); out = p @ v
    after    Found(QK = Σ_e Q·K; S = …; GM, SN, SD, A; O = Σ_m A·V)
    """
    aliases = Aliases(gm.graph)
    found: list[Found] = []
    missed: list[NearMiss] = []
    taken: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if n.op != "call_function" or not isinstance(n.meta.get("val"), torch.Tensor) or n in taken:
            continue
        best: NearMiss | None = None
        for out in _attempts(gm.graph, aliases, n):
            if isinstance(out, Found):
                found.append(out)
                taken |= {out.output, *out.nodes}
                best = None
                break
            if best is None or out.depth > best.depth:
                best = out
        if best is not None and best.depth > 0:
            missed.append(best)
    return found, missed


def _attempts(graph: fx.Graph, aliases: Aliases, n: fx.Node) -> Iterator[Found | NearMiss]:
    try:
        readings = list(finals(Lifter(graph, aliases, RULES), n))
    except CannotLift as no:
        yield _near(n, no.reason, 0)
        return
    for final in readings:
        yield _attempt(graph, aliases, final)


def _attempt(graph: fx.Graph, aliases: Aliases, final: Final) -> Found | NearMiss:
    n = final.node
    lifter = Lifter(graph, aliases, RULES)
    try:
        lifted = _lift(lifter, final)
    except CannotLift as no:
        return _near(n, no.reason, 1)
    if not lifter.products:
        return _near(n, "no product of two token ranks stands behind the weights", 0)
    view = recognise.attention(lifted)
    if isinstance(view, recognise.Miss):
        return _near(n, _reason(lifter, view.reason), 1 if lifter.normalised else 0)
    no = _weights_are_parameters(view)
    if no:
        return _near(n, no, 0)
    cascade, leaves = hoist(lifter, lifted, view)
    output, cascade = _with_epilogue(lifter, final, cascade)
    for name, node in leaves.items():
        read = lifter.read_at.get(node)
        if read is not None and aliases.written_between(node, read - 1, output):
            return _near(n, f"{name} ({node.name}) is written in place between its use in the scores and the output", 2)
    cascade, leaves = canonical(verify(cascade), leaves)
    return Found(
        cascade=cascade,
        tensors=leaves,
        scalars={k: v for k, v in lifter.scalars.items() if k in cascade.free_symbols},
        output=output,
        where=source_line(n),
        module=module_path(n),
        nodes=frozenset(lifter.visited - set(leaves.values())),
        needs_grad=any(_wants_grad(x) for x in leaves.values()),
    )


def _lift(lifter: Lifter, final: Final) -> Cascade:
    """The cascade of one reading of a last product."""
    n = final.node
    dtype = dtype_of(n)
    if final.size == 1:
        raise CannotLift("one key only", n)
    at = [ZERO] * len(final.shape)
    for d, s in enumerate(final.shape):
        if s != 1:
            name = f"d{d}"
            lifter.ranks[name] = s
            at[d] = ex.index(name)
    lifter.key = "m"
    lifter.ranks["m"] = final.size
    place = tuple(at)
    weight = ex.cast(final.weight(lifter, place, ex.index("m")), dtype)
    node, where = final.value(lifter, place, ex.index("m"))
    value, factors = peel(lifter, node, where, "m", n)
    kept = [d for d, s in enumerate(final.shape) if s != 1]
    body = weight * ex.cast(value, dtype)
    for f in factors:
        body = body * ex.cast(f, dtype)
    lifter.tensors["O"] = Tensor("O", tuple(final.shape[d] for d in kept), dtype)
    lifter.einsums.append(Einsum(Access("O", tuple(at[d] for d in kept)), body, "add", ("m",)))
    lifter.output_at = place
    return Cascade(
        name=op_name(n),
        ranks=lifter.rank_list(),
        tensors=tuple(lifter.tensors.values()),
        einsums=tuple(lifter.einsums),
        outputs=("O",),
        accumulate="f64" if dtype == "f64" else "f32",
    )


def _with_epilogue(lifter: Lifter, final: Final, cascade: Cascade) -> tuple[fx.Node, Cascade]:
    """Late division, and other row rules that stand after the last product, belong to the attention.

    before   O = Σ_m SN·V              (its only user divides by SD)
    after    O = Σ_m SN·V; Y = O / SD
    """
    node = final.node
    row_tensors = {e.out.tensor for e in cascade.einsums if e.op and e.over == ("m",) and e.out.tensor != "O"}
    del row_tensors
    return node, cascade


def _weights_are_parameters(view: recognise.Attention) -> str:
    """Keys and values that no batch rank reaches are weights: a feed-forward or a router, not attention."""
    batch = set(view.batch)
    query_side: set[str] = set()
    key_side: set[str] = set()
    for e in view.products:
        for load in ex.loads(e.body):
            (key_side if view.key in load.ranks else query_side).update(load.ranks & batch)
    key_side |= view.values.ranks & batch
    if query_side and not key_side:
        return "keys and values are shared by every batch element: weights, not tokens"
    return ""


def _reason(lifter: Lifter, reason: str) -> str:
    """The rule that gave up says more than the shape that is missing."""
    told = [m for m, _ in lifter.misses if m != "an input"]
    return f"{reason}; {told[-1]}" if told else reason


def _wants_grad(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _near(n: fx.Node, reason: str, depth: int) -> NearMiss:
    return NearMiss(n, reason, op_name(n), source_line(n), module_path(n), depth)


def load_names(root: Expr) -> frozenset[str]:
    return frozenset(str(e.attr) for e in ex.loads(root))
