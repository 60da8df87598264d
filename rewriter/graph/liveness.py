"""What of a graph is still read: after an attention is replaced its interior goes, in-place operators on it included."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...patterns.cascade import OF_SIZES
from ...patterns.operators import OPERATORS
from .aliases import Aliases
from .node import arguments, op_name, written_arguments
from .torch_private import OpOverload, schema

# Python's functions that a graph computes sizes by.
ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    **{op: OPERATORS[op].fold for op in OF_SIZES}, "min": torch.sym_min, "max": torch.sym_max,
}


def erase_dead(gm: fx.GraphModule) -> int:
    """Erase what nobody reads. Operators that draw random numbers, are unknown, or write what is read elsewhere stay.

    Returns the number of nodes erased.
    """
    alive = _live(gm.graph)
    dead = [n for n in gm.graph.nodes if n not in alive]
    for n in reversed(dead):
        gm.graph.erase_node(n)
    gm.delete_all_unused_submodules()
    return len(dead)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs need: their inputs, and every write to storage that is read."""
    aliases = Aliases(graph)
    writers: dict[fx.Node, list[fx.Node]] = {}
    owned: dict[fx.Node, bool] = {}
    work: list[fx.Node] = []
    for n in graph.nodes:
        place = aliases.storage(n)
        owned[place] = owned.get(place, True) and n.op == "call_function"
        for written in written_arguments(n):
            writers.setdefault(aliases.storage(written), []).append(n)
        if n.op in ("placeholder", "output", "call_module", "call_method") or not (is_pure(n) or written_arguments(n)):
            work.append(n)
    # What came in from outside is read by whoever gave it.
    work += [w for place, ws in writers.items() if not owned[place] for w in ws]
    alive: set[fx.Node] = set()
    while work:
        n = work.pop()
        if n in alive:
            continue
        alive.add(n)
        work.extend(n.all_input_nodes)
        work.extend(writers.get(aliases.storage(n), ()))
    return alive


def survivors(
    nodes: Collection[fx.Node], outputs: Sequence[fx.Node], read: Collection[fx.Node] = ()
) -> frozenset[fx.Node]:
    """The nodes of an attention's interior that stay alive when its outputs are replaced, because others read them.

    `read` is what stands in the place of the outputs reads.
    """
    inside, replaced = set(nodes) - set(outputs), set(outputs)
    # In-place operators on the interior belong to it.
    local = {u for n in inside for u in n.users if u not in replaced and set(written_arguments(u)) & inside}
    alive: set[fx.Node] = set()
    # what is made of the interior for the interior alone (a tensor of its shape) goes with it
    for n in reversed(outputs[0].graph.nodes):
        used = n in read or any(u in alive and u not in replaced for u in n.users)
        if used or not (is_pure(n) or n in local):
            alive.add(n)
    return frozenset((alive & set(nodes)) - replaced)


def is_pure(n: fx.Node) -> bool:
    """Whether a node only computes its value."""
    if n.op != "call_function":
        return n.op == "get_attr"
    if isinstance(n.target, OpOverload):
        return not schema(n.target).is_mutable and not _draws(n)
    return n.target in (operator.getitem, *ARITHMETIC.values()) or getattr(n.target, "__module__", "") in (
        "_operator",
        "math",
    )


def _draws(n: fx.Node) -> bool:
    """Whether an operator draws random numbers; dropout that is switched off does not, whatever its tag says."""
    given, name = arguments(n), op_name(n)
    if name == "scaled_dot_product_attention":
        return given["dropout_p"] != 0.0
    if "dropout" in name:
        return given.get("train") is not False and given.get("p") != 0.0
    return torch.Tag.nondeterministic_seeded in n.target.tags  # type: ignore[union-attr]
