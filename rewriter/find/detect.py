"""Detection: find every attention of a graph, as a verified cascade with the graph nodes that it reads and replaces."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from operator import mul

import sympy
import torch
from torch import fx

from ...patterns import expr as ex
from ...patterns.attention import concat, ranks, recognise
from ...patterns.attention.attention import Attention
from ...patterns.cascade import Access, Cascade, Einsum, Size, Tensor, as_size, size_term, verify
from ...patterns.expr import Expr
from ...patterns.passes import joined
from ...patterns.terms.divisions import divided
from ...patterns.verdict import Obstacle
from ...patterns.windows.overlapped import overlapped, trimmed
from ...patterns.windows.slide import slide
from ..capture.weights import is_weight, weights_of
from ..graph.aliases import Aliases
from ..graph.inside import between
from ..graph.node import FOLDED, CannotLift, dtype_of, op_name, tensor_of
from ..graph.sizes import settle_signs, shape_of
from ..graph.torch_private import expression
from ..graph.where import module_path, source_line
from ..lift import operators_product
from ..lift.hoist import hoist
from ..lift.index import ZERO
from ..lift.lift import At, Lifter, Rule
from ..lift.names import canonical
from ..lift.operators_contract import WINDOWED, peel
from ..lift.operators_product import weight_of
from ..lift.rules import RULES
from . import defect
from .added import Addend, addends, candidates, sums
from .final import Final, compare_lengths, finals, hides_product
from .query import laid_out, with_query
from .spelled import spell
from .twins import match
from .unaccounted import PAIRS, made_by_pairs, unaccounted

_OF_LAYERS: Mapping[str, Rule] = {**RULES, **operators_product.LAYERS}


# Operators of torch that hold a whole attention, and what shows its parts.
_FAST_PATH = "torch.backends.mha.set_fastpath_enabled(False) runs it as operators that can be read, as a plan reads it"
_FLEX = "FlexAttention stays as it is where its row sums are read, gradients flow, autocast is on, or Inductor compiles it"
_PUBLIC = "call torch.nn.functional.scaled_dot_product_attention instead"
WHOLE: Mapping[str, str] = {
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _FAST_PATH),
    "flex_attention": _FLEX,
    **dict.fromkeys(
        (f"_scaled_dot_product_{kind}" for kind in (
            "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math",
        )), _PUBLIC,
    ),
}


@dataclass(frozen=True)
class Found:
    """An attention of a graph.

    `tensors` maps the cascade's inputs to graph nodes, `scalars` its symbols that are no size of a graph input to nodes;
    `output` is the node whose value the cascade's first output replaces, up to a reshape; `final` is the last
    product (they differ where the row is divided late).
    """

    cascade: Cascade
    tensors: Mapping[str, fx.Node]
    scalars: Mapping[str, fx.Node]
    output: fx.Node
    final: fx.Node
    where: str
    module: str
    nodes: frozenset[fx.Node]
    needs_grad: bool
    notes: tuple[str, ...] = ()
    # how many keys the windows of its rows hold, where these move with the row and were cut as copies
    window: Size = 0
    # nodes that the further outputs of `several` replace: weights, sums of them, log-sum-exps that are read outside
    further: tuple[fx.Node, ...] = ()
    several: Cascade | None = None


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
    # before any size is read: numbers are positive or known, and equal sizes have one symbol from here on
    settle_signs(gm.graph)
    compare_lengths(gm.graph)
    spell(gm.graph)
    aliases, weights = Aliases(gm.graph), weights_of(gm.graph)
    found: list[Found] = []
    # products one after the other with nothing between them: an attention may read these
    chains: list[Found] = []
    patterns: list[Found] = []
    missed: list[NearMiss] = []
    taken: set[fx.Node] = set()
    dismissed: set[fx.Node] = set()
    for whole, parts in _added(gm.graph, aliases):
        if isinstance(whole, Found):
            found.append(whole)
            taken |= {whole.output, *parts}
        else:
            missed.append(whole)
    for n in gm.graph.nodes:
        if (hint := WHOLE.get(op_name(n))) is not None:
            missed.append(replace(_near(n, "one operator of torch holds the whole attention", 1), hint=hint))
        if n.op != "call_function" or not isinstance(n.meta.get("val"), torch.Tensor) or n in taken or FOLDED in n.meta:
            continue
        try:
            twin = _twin(patterns, n, aliases)
            out = twin or _outcome(gm.graph, aliases, n, taken, weights)
            patterns += [out] if twin is None and isinstance(out, Found) else []
        except Exception as error:
            out = defective(n, error)
        if isinstance(out, Found) and is_plain(out.cascade):
            chains.append(out)
        elif isinstance(out, Found):
            found.append(out)
            taken |= {out.output, out.final}
        elif out is not None and out.depth > 0:
            missed.append(out)
        elif out is not None:
            dismissed.add(out.node)
    # what an attention computes is accounted for, whatever else it looks like
    inside = _inside(found)
    chains = [f for f in chains if f.output not in inside]
    found = sorted((*found, *chains), key=lambda f: aliases.position[f.output])
    taken |= {n for f in chains for n in (f.output, f.final)}
    inside |= _inside(chains)
    missed = [m for m in missed if m.node not in inside or defect.is_one(m.reason)]
    known = taken | {m.node for m in missed} | {n for n in gm.graph.nodes if FOLDED in n.meta}
    missed += [_near(n, reason, 1) for n, reason in dict(unaccounted(gm.graph, known, dismissed)).items()]
    return found, missed


def _inside(found: Sequence[Found]) -> set[fx.Node]:
    return {n for f in found for n in between({*f.tensors.values(), *f.scalars.values()}, f.output)}


def is_plain(c: Cascade) -> bool:
    """(Q · Kᵀ) · V and Q · (Kᵀ · V): nothing lies between two matrix products, and no row rule is applied."""
    view = recognise.attention(c)
    if not isinstance(view, Attention):
        return False
    weight = view.weight
    while weight.op == "cast":
        (weight,) = weight.args
    return not view.row and weight.op == "load" and str(weight.attr) in {e.out.tensor for e in view.products}


def _added(graph: fx.Graph, aliases: Aliases) -> Iterator[tuple[Found | NearMiss, tuple[fx.Node, ...]]]:
    """Attentions whose output is a sum of products, with these; the outermost sums come first."""
    before: list[Found] = []
    taken: set[fx.Node] = set()
    for n in candidates(graph):
        if n in taken:
            continue
        try:
            parts = addends(Lifter(graph, aliases, RULES), n)
            found = _sum_of(graph, aliases, n, parts, before) if parts else None
        except Exception as error:
            yield defective(n, error), ()
            continue
        if found is not None:
            own = (*(a.node for a in parts), *(x for a in parts for x in a.sums))
            before.append(found)
            taken |= {n, *own}
            yield found, own


def _sum_of(
    graph: fx.Graph, aliases: Aliases, n: fx.Node, parts: list[Addend], before: list[Found]
) -> Found | None:
    if (twin := _twin(before, n, aliases)) is not None:
        return twin
    try:
        final = sums(Lifter(graph, aliases, RULES), n, parts)
    except CannotLift:
        return None
    out = _attempt(graph, aliases, final) if final is not None else None
    return out if isinstance(out, Found) else None


def _outcome(
    graph: fx.Graph, aliases: Aliases, n: fx.Node, taken: Collection[fx.Node], weights: Collection[fx.Node]
) -> Found | NearMiss | None:
    """What stands at one node: an attention, else the attempt that got farthest."""
    best: NearMiss | None = None
    for out in _attempts(graph, aliases, n, taken, weights):
        if isinstance(out, Found):
            return out
        if best is None or out.depth > best.depth:
            best = out
    return best


def _twin(patterns: list[Found], n: fx.Node, aliases: Aliases) -> Found | None:
    """The attention at `n` as a copy of one lifted before, when their subgraphs are equal."""
    for f in patterns:
        if f.output.target is not n.target or f.output is not f.final:
            continue
        bound = match(f.output, f.tensors.values(), f.nodes, n, aliases)
        if bound is not None:
            leaves = {name: bound[x] for name, x in f.tensors.items()}
            return replace(f, tensors=leaves, output=n, final=n, where=source_line(n), module=module_path(n),
                           nodes=frozenset((n,)))
    return None


def up_to_the_product(f: Found, aliases: Aliases) -> Found | None:
    """The attention without what follows its last product; None where there is no such."""
    graph = f.final.graph
    for final in finals(Lifter(graph, aliases, RULES), f.final, (), weights_of(graph)) if f.output is not f.final else ():
        out = _attempt(graph, aliases, final, epilogue=False)
        if isinstance(out, Found):
            return out
    return None


def _attempts(
    graph: fx.Graph, aliases: Aliases, n: fx.Node, done: Collection[fx.Node], weights: Collection[fx.Node]
) -> Iterator[Found | NearMiss]:
    try:
        readings = list(finals(Lifter(graph, aliases, RULES), n, done, weights))
    except CannotLift as no:
        yield _near(n, no.reason, 0)
        return
    for final in readings:
        out = _attempt(graph, aliases, final)
        # most softmaxes of what a layer makes are gates and routers
        yield replace(out, depth=0) if isinstance(out, NearMiss) and final.layer is not None else out


def _attempt(
    graph: fx.Graph, aliases: Aliases, final: Final, offsets: bool = False, windows: bool = False, epilogue: bool = True
) -> Found | NearMiss:
    n = final.node
    lifter = Lifter(graph, aliases, RULES if final.layer is None else _OF_LAYERS, offsets, windows)
    try:
        lifted = _lift(lifter, final)
    except CannotLift as no:
        return _near(n, no.reason, 1)
    if not lifter.products:
        near = bool(told(lifter)) and (lifter.normalised or not final.of_weights)
        return _near(n, _reason(lifter, "no product of two token ranks stands behind the weights"), int(near))
    output, lifted = _with_epilogue(lifter, final, lifted) if epilogue else (n, lifted)
    lifted, key = overlapped(lifted, lifter.key) if windows else (lifted, lifter.key)
    hoisted = hoist(lifter, laid_out(lifter, lifted))
    whole = joined.join(hoisted)
    if whole is not hoisted and not offsets:
        # slices that lie side by side in one tensor are that tensor again
        return _attempt(graph, aliases, final, offsets=True, epilogue=epilogue)
    window: Size = 0
    if windows:
        window = whole.rank[key].size
        if (moved := slide(whole, key)) is whole:
            return _near(n, "its windows do not move with one row", 0)
        if (whole_keys := trimmed(moved, whole, key)) is None:
            return _near(n, "its windows hold keys that no token has", 0)
        whole = whole_keys
    elif any(op_name(x) in WINDOWED for x in lifter.leaves.values()):
        out = _attempt(graph, aliases, final, windows=True, epilogue=epilogue)
        if isinstance(out, Found):
            return out
    cascade = divided(ranks.one_value(ranks.unify(ranks.split(with_query(concat.split(whole))))))
    view = recognise.attention(cascade)
    if isinstance(view, Obstacle):
        return _near(n, _reason(lifter, view.reason), 1 if lifter.normalised or told(lifter) else 0)
    if (plane := ranks.fuse(cascade, *pair) if (pair := _plane(view)) else cascade) is not cascade:
        again = recognise.attention(plane)
        cascade, view = (plane, again) if isinstance(again, Attention) else (cascade, view)
    if refusal := _normalised_elsewhere(view):
        return _near(n, refusal, 1)
    if refusal := _weights_are_parameters(view):
        return _near(n, refusal, 0)
    leaves = {t.name: lifter.leaves[t.name] for t in cascade.inputs}
    if refusal := _projects(view, leaves) or (_gates(view, leaves, final.layer) if final.layer is not None else ""):
        return _near(n, refusal, 0)
    for name, node in leaves.items():
        read = lifter.read_at.get(node)
        if read is not None and aliases.written_between(node, read - 1, output):
            return _near(n, f"{name} ({node.name}) is written in place between its use in the scores and the output", 2)
    cascade, leaves = canonical(verify(cascade), leaves)
    return Found(
        cascade=cascade,
        tensors=leaves,
        scalars=_scalars(graph, lifter, cascade),
        output=output,
        final=n,
        where=source_line(n),
        module=module_path(n),
        nodes=frozenset(lifter.visited - set(leaves.values())),
        needs_grad=any(_wants_grad(x) for x in leaves.values()),
        window=window,
    )


def _scalars(graph: fx.Graph, lifter: Lifter, c: Cascade) -> dict[str, fx.Node]:
    """The node of every symbol that no input's shape shows: an offset into a cache, a maximum of two lengths."""
    shown = {str(s) for t in c.inputs for s in t.shape if isinstance(s, sympy.Symbol)}
    out = {k: v for k, v in lifter.scalars.items() if k in c.free_symbols}
    wanted = [s for s in c.free_symbols if s not in shown and s not in out]
    if wanted:
        for n in graph.nodes:
            value = n.meta.get("val")
            if isinstance(value, torch.SymInt) and (name := str(expression(value))) in wanted:
                out.setdefault(name, n)
    return out


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
    kept = [d for d, s in enumerate(final.shape) if s != 1]
    body = _weighted(lifter, final, weight, place)
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


def _weighted(lifter: Lifter, final: Final, weight: Expr, place: At) -> Expr:
    """The weight times the values, which lie end to end where there are several."""
    n, m, dtype = final.node, ex.index("m"), dtype_of(final.node)
    read = [peel(lifter, *v.place(lifter, place, m), frozenset("m"), n) for v in final.values]
    if len(read) == 1:
        ((value, factors),) = read
        return reduce(mul, [ex.cast(f, dtype) for f in factors], weight * ex.cast(value, dtype))
    start: Size = 0
    laid: list[Expr] = []
    ends: list[Expr] = []
    for v, (value, factors) in zip(final.values, read):
        own = reduce(mul, [ex.cast(f, value.dtype) for f in factors], value)
        laid.append(ex.substitute(own, {m: m - size_term(start)}))
        start = as_size(sympy.expand(sympy.sympify(start) + v.size))
        ends.append(m < size_term(start))
    return weight * ex.cast(concat.laid(ends, laid), dtype)


_EPILOGUE = frozenset(
    ("div", "divide", "true_divide", "mul", "multiply", "where", "masked_fill", "nan_to_num", "to", "_to_copy")
)


def _with_epilogue(lifter: Lifter, final: Final, c: Cascade) -> tuple[fx.Node, Cascade]:
    """Late division, and other row rules that stand after the last product, belong to the attention.

    before   O = Σ_m SN·V              (its only user divides by SD)
    after    O = Σ_m SN·V; Y = O / SD
    """
    node, shape = final.node, shape_of(tensor_of(final.node))
    best: tuple[fx.Node, Expr] | None = None
    if len(shape) != len(lifter.output_at):
        return node, c
    before = len(lifter.einsums)
    at = lifter.output_at
    kept = tuple(i for i in at if i is not ZERO)
    lifter.assume(node, at, ex.load("O", kept, dtype_of(node)))
    user = node
    for _ in range(4):
        users = [u for u in user.users if u.op == "call_function"]
        if len(users) != 1 or len(user.users) != 1 or op_name(users[0]) not in _EPILOGUE:
            break
        user = users[0]
        if not isinstance(user.meta.get("val"), torch.Tensor) or shape_of(tensor_of(user)) != shape:
            break
        term = lifter.value(user, at)
        rows = {e.out.tensor for e in lifter.einsums if e.op is not None and e.over == (lifter.key,)} - {"O"}
        if load_names(term) & rows:
            best = (user, term)
    if best is None:
        del lifter.einsums[before:]
        return node, c
    output, term = best
    dtype = dtype_of(output)
    lifter.tensors["Y"] = Tensor("Y", lifter.tensors["O"].shape, dtype)
    return output, replace(
        c,
        ranks=lifter.rank_list(),
        tensors=tuple(lifter.tensors.values()),
        einsums=(*lifter.einsums, Einsum(Access("Y", kept), term)),
        outputs=("Y",),
    )


def _plane(view: Attention) -> tuple[str, str] | None:
    """Rows and columns of queries that attend to a plane of just their size: together they are one rank, as the keys are.

    before   QK[y,x,m] = Σ_e Q[y,x,e]·K[m // X,m % X,e]        after   QK[p,m] = Σ_e Q[p // X,p % X,e]·K[m // X,m % X,e]
    """
    c, m = view.cascade, ex.index(view.key)
    out = [str(i.attr) for i in c.producers[c.outputs[0]][-1].out.index]
    keyed = [x for t in (*(e.body for e in view.products), view.values) for x in ex.loads(t) if view.key in x.ranks]
    for rows, columns in pairwise(out):
        width, size = size_term(c.rank[columns].size), sympy.sympify(c.rank[rows].size) * sympy.sympify(c.rank[columns].size)
        queries = view.query in (rows, columns) and {rows, columns} <= {view.query, *view.batch}
        if not queries or sympy.expand(size - sympy.sympify(c.rank[view.key].size)) != 0:
            continue
        if all({m // width, m % width} <= set(x.args) and not {rows, columns} & x.ranks for x in keyed):
            return rows, columns
    return None


def _weights_are_parameters(view: Attention) -> str:
    """Keys and values without any place for a batch are weights: a feed-forward or a router, not attention.

    A dimension of size 1 is such a place: one sequence, or one head for all.
    """
    batch = set(view.batch)
    query_side: set[str] = set()
    key_side: set[str] = set()
    for e in view.products:
        for load in ex.loads(e.body):
            (key_side if view.key in load.ranks else query_side).update(load.ranks & batch)
    key_side |= view.values.ranks & batch
    keyed = [x for t in (*(e.body for e in view.products), view.values) for x in ex.loads(t) if view.key in x.ranks]
    if query_side and not key_side and not any(i.is_const for x in keyed for i in x.args):
        return "keys and values are shared by every batch element: weights, not tokens"
    return ""


def _projects(view: Attention, leaves: Mapping[str, fx.Node]) -> str:
    """Without a row rule, a chain of two products is an attention only between tokens: (x · W) · Kᵀ is a projection."""
    if view.row:
        return ""
    keys = [x for e in view.products for x in ex.loads(e.body) if view.key in x.ranks]
    for side, loads in (("keys", keys), ("values", ex.loads(view.values))):
        read = [leaves[str(x.attr)] for x in loads if str(x.attr) in leaves]
        if read and all(is_weight(n) for n in read):
            return f"the {side} are weights of the model and nothing is normalised over them: a projection"
    return ""


def _gates(view: Attention, leaves: Mapping[str, fx.Node], layer: fx.Node) -> str:
    """A layer's weights are queries of tokens where no key is one of them: else its outputs choose among experts or taps."""
    keys = {str(x.attr) for e in view.products for x in ex.loads(e.body) if view.key in x.ranks}
    own, stack = set[fx.Node](), [weight_of(layer)]
    while stack:
        n = stack.pop()
        if n not in own:
            own.add(n)
            stack += n.all_input_nodes
    return "the keys are weights of a layer: a gate or a router" if any(leaves.get(k) in own for k in keys) else ""


def _normalised_elsewhere(view: Attention) -> str:
    """Slot attention and its kin: the scores are normalised over a rank that the last product keeps."""
    scores = {e.out.tensor for e in view.products}
    products = set(scores)
    for e in view.cascade.einsums:
        if not scores & {str(r.attr) for r in e.reads}:
            continue
        scores.add(e.out.tensor)
        if e.op is not None and view.key not in e.over and e.out.tensor not in products:
            return f"the scores are normalised over {', '.join(e.over)}, which the last product does not reduce"
    return ""


def told(lifter: Lifter) -> list[str]:
    """What the rules said that gave up between the products, and what hides a product."""
    hidden = [] if lifter.products else [m for m, n in lifter.closed if hides_product(n)]
    return [m for m, _ in lifter.misses if m != "an input"] + hidden


def _reason(lifter: Lifter, reason: str) -> str:
    """The rule that gave up says more than the shape that is missing."""
    if not told(lifter):
        return reason
    missed = dict.fromkeys(x for _, x in lifter.misses)
    if any(map(made_by_pairs, missed)):
        return PAIRS
    if any(op_name(x) == "cumsum" for x in missed) and not any(e.op == "max" for e in lifter.einsums):
        return "a recurrence that no loop goes through: what it multiplies holds a running sum of data"
    return f"{reason}; {told(lifter)[-1]}"


def _wants_grad(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _near(n: fx.Node, reason: str, depth: int) -> NearMiss:
    return NearMiss(n, reason, op_name(n), source_line(n), module_path(n), depth)


def defective(n: fx.Node, error: Exception) -> NearMiss:
    """What is left alone because our code raised: at this place only."""
    return _near(n, defect.reason(source_line(n) or n.name, error), 1)


def load_names(root: Expr) -> frozenset[str]:
    return frozenset(str(e.attr) for e in ex.loads(root))
