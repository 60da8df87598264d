"""Which nodes share storage and when it is written, so that no read is moved over a write."""

from __future__ import annotations

import operator
from bisect import bisect_right

import torch
from torch import fx

# In the metadata of a call that was put in the place of an attention: the candidate that it is.
SPLICED = "reattend"


class Aliases:
    """Storage classes of a graph and the positions of in-place writes to each."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {n: i for i, n in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        written: list[tuple[fx.Node, fx.Node]] = []
        for n in graph.nodes:
            if n.op != "call_function":
                continue
            if n.target is operator.getitem:
                self._join(n, n.args[0])
                continue
            if not isinstance(n.target, torch._ops.OpOverload):
                # An unknown callable may write to any tensor that it is given; what was spliced in does not.
                if not _is_pure(n.target) and SPLICED not in n.meta:
                    written.extend((n, a) for a in n.all_input_nodes)
                continue
            for i, a in enumerate(n.target._schema.arguments):
                if a.alias_info is None:
                    continue
                value = n.args[i] if i < len(n.args) else n.kwargs.get(a.name)
                for node in value if isinstance(value, (list, tuple)) else [value]:
                    if not isinstance(node, fx.Node):
                        continue
                    if any(r.alias_info is not None for r in n.target._schema.returns):
                        self._join(n, node)
                    if a.alias_info.is_write:
                        written.append((n, node))
            if _may_alias(n.target):
                self._join(n, n.args[0])
        for writer, node in written:
            self._writes.setdefault(self._root(node), []).append(self.position[writer])

    def _root(self, n: fx.Node) -> fx.Node:
        while n in self._parent:
            n = self._parent[n]
        return n

    def _join(self, a: object, b: object) -> None:
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return
        x, y = self._root(a), self._root(b)
        if x is not y:
            self._parent[x] = y

    def written_between(self, n: fx.Node, after: fx.Node | int, before: fx.Node | int) -> bool:
        """Whether the storage of `n` is written strictly after `after` and strictly before `before`."""
        writes = self._writes.get(self._root(n))
        if not writes:
            return False
        low = after if isinstance(after, int) else self.position[after]
        high = before if isinstance(before, int) else self.position[before]
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


def _may_alias(target: torch._ops.OpOverload) -> bool:
    """Composite operators that answer a view of their input where they can, without saying so in the schema."""
    name = target._schema.name
    return name in ("aten::reshape", "aten::contiguous", "aten::flatten", "aten::to", "aten::type_as", "aten::reshape_as",
                    "aten::dropout", "aten::unflatten", "aten::expand_as", "aten::view_as", "aten::movedim")  # fmt: skip


def _is_pure(target: object) -> bool:
    module = getattr(target, "__module__", "") or ""
    return module in ("_operator", "operator", "math", "torch") or module.startswith(("torch.sym", "torch.amp"))
