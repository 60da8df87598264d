"""What else of an attention is read: its weights, their sums over heads, log-sum-exps, as further outputs of its cascade.

    before   p = softmax(s); out = p @ v; return out, p.mean(1)        p is read outside
    after    Found(O = …; further: the node of the mean, A = Σ_h W / H)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Access, Cascade, Einsum, Tensor
from ...patterns.passes.further import with_further
from ...patterns.verdict import Obstacle
from ..graph.aliases import Aliases
from ..graph.node import CannotLift, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.index import ZERO
from ..lift.lift import Lifter
from ..lift.operators_contract import CONTRACTIONS
from ..lift.operators_reduce import logsumexp_of_any_row
from ..lift.rules import RULES
from .detect import Found
from .final import SHAPE_ONLY

# What a reduction of scores or weights is reached through, and what may follow it.
_MOVED = SHAPE_ONLY - CONTRACTIONS - {"cat", "stack"}
_REDUCED = frozenset(("mean", "sum", "amax", "logsumexp"))
_RULES = {**RULES, "logsumexp": logsumexp_of_any_row}
_SCALED = frozenset(("div", "mul", "multiply", "divide", "true_divide"))


def with_outputs(f: Found, aliases: Aliases, escaped: Collection[fx.Node], inside: Collection[fx.Node]) -> Found | str:
    """The attention with all of its nodes that are read outside as further outputs; or why one is none."""
    nodes: dict[fx.Node, None] = {}
    for n in sorted(escaped, key=aliases.position.__getitem__):
        for u in n.users:
            if u not in inside and u is not f.output:
                nodes[_reduced(u) or n] = None
    others: dict[str, tuple[Cascade, dict[str, str]]] = {}
    for n in nodes:
        outside = [u for u in n.users if u not in inside]
        if aliases.is_written(n):
            return f"{n.name} is written in place"
        if any(aliases.position[u] < aliases.position[f.output] for u in outside):
            return f"{n.name} is read before the output is made"
        found = _lifted(f, aliases, n)
        if isinstance(found, str):
            return found
        others[f"F{len(others) + 1}"] = found
    c = with_further(f.cascade, others)
    return c.reason if isinstance(c, Obstacle) else replace(f, further=tuple(nodes), several=c)


def _reduced(n: fx.Node) -> fx.Node | None:
    """The reduction that a node is or leads to alone, with what that is scaled by."""
    best: fx.Node | None = None
    for _ in range(6):
        name = op_name(n)
        plain = name in _SCALED and not any(isinstance(a, fx.Node) for a in n.args[1:])
        if (best is None and name in _REDUCED) or (best is not None and plain):
            best = n
        elif best is not None or name not in _MOVED:
            break
        if len(n.users) != 1:
            break
        n = next(iter(n.users))
    return best


def _lifted(f: Found, aliases: Aliases, n: fx.Node) -> tuple[Cascade, dict[str, str]] | str:
    """The cascade of one node, lifted by itself down to what the attention reads, and its inputs' names there."""
    lifter = Lifter(n.graph, aliases, _RULES, stops=frozenset(f.tensors.values()))
    shape = shape_of(tensor_of(n))
    at = [ZERO] * len(shape)
    for d, s in enumerate(shape):
        if s != 1:
            lifter.ranks[f"x{d}"] = s
            at[d] = ex.index(f"x{d}")
    try:
        term = lifter.value(n, tuple(at))
    except CannotLift as no:
        return no.reason
    kept = tuple(i for i in at if i is not ZERO)
    out = Tensor("Y", tuple(s for s in shape if s != 1), dtype_of(n))
    lifter.tensors["Y"] = out
    lifter.einsums.append(Einsum(Access("Y", kept), ex.cast(term, out.dtype)))
    names = {node: name for name, node in f.tensors.items()}
    read = {str(x.attr) for e in lifter.einsums for x in e.reads}
    foreign = [node.name for name, node in lifter.leaves.items() if name in read and node not in names]
    if foreign:
        return f"{n.name} is made of {foreign[0]} as well"
    c = Cascade(n.name, lifter.rank_list(), tuple(lifter.tensors.values()), tuple(lifter.einsums), ("Y",))
    return c, {name: names[node] for name, node in lifter.leaves.items() if node in names}
