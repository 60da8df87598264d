"""Which nodes share storage and when it is written, so that no read is moved over a write."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from .memory import MEMORY
from .torch_private import OpOverload, schema

# In the metadata of a call that was put in the place of an attention: the candidate that it is.
SPLICED = "reattend"


class Aliases:
    """Storage classes of a graph and the positions of in-place writes to each."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, float] = {n: i for i, n in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[float]] = {}
        written: list[tuple[fx.Node, fx.Node]] = []
        inputs: dict[int, fx.Node] = {}
        for n in graph.nodes:
            if MEMORY in n.meta and n.op in ("placeholder", "get_attr"):
                self._join(n, inputs.setdefault(n.meta[MEMORY], n))
            if n.op != "call_function":
                continue
            for node in shared_by(n):
                self._join(n, node)
            if n.target is operator.getitem:
                continue
            if not isinstance(n.target, OpOverload):
                # An unknown callable may write to any tensor that it is given; what was spliced in does not.
                if not _is_pure(n.target) and SPLICED not in n.meta:
                    written.extend((n, a) for a in n.all_input_nodes)
                continue
            for argument, node in _given(n, schema(n.target)):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append((n, node))
        for writer, node in written:
            self._writes.setdefault(self._root(node), []).append(self.position[writer])

    def insert(self, nodes: Sequence[fx.Node], before: fx.Node) -> None:
        """Take nodes in that were put in before a node since, one after the other, and write nothing."""
        at = self.position[before]
        for i, n in enumerate(nodes):
            self.position[n] = at - 1 + (i + 1) / (len(nodes) + 1)
            for node in shared_by(n):
                self._join(n, node)

    def _root(self, n: fx.Node) -> fx.Node:
        while n in self._parent:
            n = self._parent[n]
        return n

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        x, y = self._root(a), self._root(b)
        if x is not y:
            self._parent[x] = y

    def written_between(self, n: fx.Node, after: fx.Node | float, before: fx.Node | float) -> bool:
        """Whether the storage of `n` is written strictly after `after` and strictly before `before`."""
        writes = self._writes.get(self._root(n))
        if not writes:
            return False
        low = after if isinstance(after, (int, float)) else self.position[after]
        high = before if isinstance(before, (int, float)) else self.position[before]
        at = bisect_right(writes, low)
        return at < len(writes) and writes[at] < high

    def storage(self, n: fx.Node) -> fx.Node:
        """One node that stands for all that share storage with `n`."""
        return self._root(n)

    def writers(self, n: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that write the storage of `n`."""
        at = {i: m for m, i in self.position.items()}
        return tuple(at[i] for i in self._writes.get(self._root(n), ()))

    def is_written(self, n: fx.Node) -> bool:
        return bool(self._writes.get(self._root(n)))


def shared_by(n: fx.Node) -> list[fx.Node]:
    """The nodes that `n` is given whose storage its value may share."""
    if n.op != "call_function":
        return []
    if n.target is operator.getitem:
        return _nodes(n.args[0])
    if not isinstance(n.target, OpOverload):
        return []
    said = schema(n.target)
    aliased = any(r.alias_info is not None for r in said.returns)
    of_schema = [node for argument, node in _given(n, said) if aliased and argument.alias_info is not None]
    return of_schema + _unsaid(n, said.name)


# Operators that may answer their first tensors, or views of them, while their schemas say that they make new ones.
# Found by running the samples that PyTorch 2.13 has of its own operators and comparing storages.
_UNSAID = frozenset(
    f"aten::{name}"
    for name in (
        *("type_as", "to_dense", "dequantize", "conj_physical", "lift", "sum_to_size", "_unsafe_view"),
        "flatten_dense_tensors",
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
        *("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid"),
        *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"),
        *(f"_cast_{kind}" for kind in ("Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")),
    )
)
# … and those that do so where they are given one tensor.
_UNSAID_OF_ONE = frozenset(("aten::einsum", "aten::cartesian_prod"))


def _unsaid(n: fx.Node, name: str) -> list[fx.Node]:
    """The nodes that the value of `n` may share storage with although the schema does not say so."""
    first = next((_nodes(a) for a in n.args if _nodes(a)), [])
    return first if name in _UNSAID or (name in _UNSAID_OF_ONE and len(first) == 1) else []


def _given(n: fx.Node, said: torch.FunctionSchema) -> Iterator[tuple[torch.Argument, fx.Node]]:
    """Every node that an operator is given, with what its schema says of the argument."""
    for i, argument in enumerate(said.arguments):
        for node in _nodes(n.args[i] if i < len(n.args) else n.kwargs.get(argument.name)):
            yield argument, node


def _nodes(value: object) -> list[fx.Node]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)]


def _is_pure(target: object) -> bool:
    module = getattr(target, "__module__", "") or ""
    return module in ("_operator", "operator", "math", "torch") or module.startswith(("torch.sym", "torch.amp"))
