"""Which nodes hold weights alone: parameters of the model, and what is computed from nothing else."""

from __future__ import annotations

from torch import fx, nn

# Set on the inputs of a graph that are parameters of the model.
PARAMETER = "reattend_parameter"


def weights_of(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node that `is_weight`, found in one pass."""
    given: set[fx.Node] = set()
    reached: set[fx.Node] = set()
    for n in graph.nodes:
        if n.op == "placeholder":
            (reached if n.meta.get(PARAMETER) else given).add(n)
        elif _holds_parameter(n) or any(x in reached for x in n.all_input_nodes):
            reached.add(n)
        if any(x in given for x in n.all_input_nodes):
            given.add(n)
    return frozenset(reached - given)


def is_weight(n: fx.Node) -> bool:
    """Does no input of the graph but parameters reach a node, and at least one of these?"""
    reached = False
    seen: set[fx.Node] = set()
    stack = [n]
    while stack:
        x = stack.pop()
        if x in seen:
            continue
        seen.add(x)
        if x.op == "placeholder" and not x.meta.get(PARAMETER):
            return False
        reached |= x.op == "placeholder" or _holds_parameter(x)
        stack.extend(x.all_input_nodes)
    return reached


def _holds_parameter(n: fx.Node) -> bool:
    if n.op != "get_attr":
        return False
    value: object = n.graph.owning_module
    for part in str(n.target).split("."):
        value = getattr(value, part)
    return isinstance(value, nn.Parameter)
