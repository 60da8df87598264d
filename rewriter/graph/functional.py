"""A graph without writes into what it makes itself: a write through a view becomes a new value of the whole.

    before   s = mul(a, c); t = slice(s, -1, 0, 5); fill_(t, −∞); p = softmax(s)
    after    s = mul(a, c); t = slice(s, -1, 0, 5); u = slice_scatter(s, fill(t, −∞), -1, 0, 5); p = softmax(u)

Every view is taken anew of the newest value when it is read. Left as it is: memory that came in from outside, that is
returned, or of which it is not certain which values lie in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from . import torch_private
from .aliases import Aliases, shared_by
from .liveness import is_pure
from .node import arguments, op_name, written_arguments
from .torch_private import OpOverload, schema

# In the metadata of a value that stands for memory after a write.
EDITED = "edited"
_ATEN = torch.ops.aten


class _Untold(Exception):
    """What is written would not lie in memory as it did."""


def functional(gm: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of a graph without the writes that can be told, or None where none of them goes through a view."""
    homes = _homes(gm.graph, Aliases(gm.graph))
    through = [n for n in homes if _is_write(n) and not _is_write(_target(n)) and _target(n) is not homes[n]]
    # in a stretch without gradients a write keeps the history of what it writes into, and a new value has none
    if not through or any(mode in str(n.target) for n in gm.graph.nodes for mode in ("set_grad_enabled", "inference_mode")):
        return None
    try:
        return fx.GraphModule(gm, _Copy(homes).graph(gm.graph))
    except _Untold:
        return None


def adopt(gm: fx.GraphModule) -> None:
    """Where nothing depends on what a write moves (a check, a measurement), the graph goes without writes."""
    pure = functional(gm)
    if pure is not None:
        gm.graph = pure.graph


def _homes(graph: fx.Graph, aliases: Aliases) -> dict[fx.Node, fx.Node]:
    """For each node of written memory that is told apart: the node that made the memory.

    Whether a value shares that memory is of no interest behind the last write.
    """
    last = {aliases.storage(t): aliases.position[n] for n in graph.nodes for t in written_arguments(n)}
    home: dict[fx.Node, fx.Node] = {}
    unsure: set[fx.Node] = set()
    for n in graph.nodes:
        if n.op == "output" or _may_write(n):
            unsure |= {aliases.storage(x) for x in n.all_input_nodes}
        if n.op == "output" or aliases.position[n] > last.get(aliases.storage(n), -1.0):
            continue
        parents = [_target(n)] if _is_write(n) else shared_by(n)
        viewed = _views(n)
        if parents and viewed:
            home[n] = home.get(parents[0], parents[0])
        elif not parents or viewed is False:
            home[n] = n
        if n not in home or not _tells(n) or (_is_write(n) and not _undone(n, home)):
            unsure.add(aliases.storage(n))
    return {n: h for n, h in home.items() if aliases.storage(n) not in unsure}


def _tells(n: fx.Node) -> bool:
    """Whether it is known what a node does: an operator that makes one tensor, and writes none but its first."""
    known = n.op == "call_function" and isinstance(n.target, OpOverload) and isinstance(n.meta.get("val"), torch.Tensor)
    if not known or not _is_write(n):
        return known
    return written_arguments(n) == [_target(n)] and _pure_form(n) is not None


def _may_write(n: fx.Node) -> bool:
    """Whether a node may write into what it is given in a way that is not told."""
    return not is_pure(n) and n.op != "placeholder" and not (_is_write(n) and _tells(n))


def _is_write(n: fx.Node) -> bool:
    return n.op == "call_function" and isinstance(n.target, OpOverload) and bool(written_arguments(n))


def _target(n: fx.Node) -> fx.Node:
    return written_arguments(n)[0]


def _pure_form(n: fx.Node) -> OpOverload | None:
    """The operator that answers what this one writes, and draws no random numbers; None where there is no such."""
    assert isinstance(n.target, OpOverload)
    name = schema(n.target).name.removeprefix("aten::")
    packet = getattr(_ATEN, name[:-1], None) if name.endswith("_") else None
    # it draws random numbers, or changes what a tensor shows, and no element
    if {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(n.target.tags):
        return None
    return getattr(packet, schema(n.target).overload_name or "default", None)


def _undone(n: fx.Node, home: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether what is written can be laid back into the whole, view by view."""
    while n is not home.get(n, n):
        if not _is_write(n) and op_name(n) not in _BACK:
            return False
        n = _target(n) if _is_write(n) else shared_by(n)[0]
    return True


_VIEWS = frozenset((
    "slice", "select", "transpose", "swapaxes", "permute", "unsqueeze", "squeeze", "view", "_unsafe_view", "unflatten",
    "view_as", "alias", "diagonal", "t", "mT", "narrow", "expand", "expand_as", "movedim",
))


def _views(n: fx.Node) -> bool | None:
    """Whether a node shows the memory of what it is given; None where that is not certain."""
    name = op_name(n)
    if _is_write(n) or name in _VIEWS:
        return True
    given = shared_by(n)
    if not given:
        return False
    value, source = n.meta.get("val"), given[0].meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return None
    if name in ("to", "type_as", "float", "contiguous", "reshape", "flatten") and value.dtype != source.dtype:
        return False
    if name == "contiguous":
        return source.is_contiguous()
    if name in ("reshape", "flatten") and source.is_contiguous():
        return True
    return None


class _Copy:
    """A graph as it is copied: `whole` is the newest value of each memory, `version` how often it was written."""

    def __init__(self, homes: Mapping[fx.Node, fx.Node]) -> None:
        self.homes = homes
        self.out = fx.Graph()
        self.table: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.version: dict[fx.Node, int] = {}
        self._views: dict[tuple[fx.Node, int], fx.Node] = {}

    def graph(self, graph: fx.Graph) -> fx.Graph:
        for n in graph.nodes:
            home = self.homes.get(n)
            if home is None:
                self.table[n] = self.out.node_copy(n, self.now)
            elif home is n:
                self.whole[n], self.version[n] = self.out.node_copy(n, self.now), 0
            elif _is_write(n):
                self.put(_target(n), self.written(n))
                self.version[home] += 1
        return self.out

    def now(self, n: fx.Node) -> fx.Node:
        """The newest value of a node."""
        home = self.homes.get(n)
        if home is None:
            return self.table[n]
        if home is n:
            return self.whole[n]
        if _is_write(n):
            return self.now(_target(n))
        key = (n, self.version[home])
        if key not in self._views:
            self._views[key] = self.out.node_copy(n, self.now)
        return self._views[key]

    def written(self, n: fx.Node) -> fx.Node:
        """What a write puts in the place of its target."""
        form, was = _pure_form(n), n.meta["val"]
        assert form is not None
        given: Any = fx.map_arg(cast("Any", arguments(n)), self.now)
        # `copy` has no derivative; what is copied is given
        copied: fx.Node | None = given["src"] if op_name(n) == "copy" else None
        new = copied or self.call(n, form, *fx.map_arg(n.args, self.now), **fx.map_arg(n.kwargs, self.now))
        if new.meta["val"].device != was.device:
            raise _Untold
        if new.meta["val"].dtype != was.dtype:
            new = self.call(n, _ATEN.to.dtype, new, was.dtype)
        if copied is None:
            return new
        if not all(isinstance(s, int) for s in was.shape):
            raise _Untold
        return self.call(n, _ATEN.expand.default, new, list(was.shape))

    def put(self, n: fx.Node, value: fx.Node) -> None:
        """Lay a value back into the whole."""
        if self.homes[n] is n:
            if value.meta["val"].stride() != n.meta["val"].stride():
                raise _Untold
            value.meta[EDITED] = True
            self.whole[n] = value
        elif _is_write(n):
            self.put(_target(n), value)
        else:
            source = shared_by(n)[0]
            view = View(fx.map_arg(cast("Any", arguments(n)), self.now), source.meta["val"], self.now(source))
            target, args = _BACK[op_name(n)](view, value)
            self.put(source, self.call(n, target, *args))

    def call(self, like: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        n = call(self.out, like, target, *args, **kwargs)
        if n is None:
            raise _Untold
        return n


def call(graph: fx.Graph, like: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node | None:
    """A node of this graph with its fake value, which stands in the code where `like` does; None if it has no derivative."""
    n = graph.call_function(target, args, kwargs)
    n.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "seq_nr")}
    given = fx.map_arg((args, kwargs), lambda x: x.meta["val"])
    tensors = [v for v in torch_private.tree_leaves(given) if isinstance(v, torch.Tensor)]
    mode = torch_private.detect_fake_mode(tensors)
    assert mode is not None
    with mode, torch.enable_grad():
        made = target(*given[0], **given[1])
    if made.requires_grad and (made.grad_fn is None or "NotImplemented" in made.grad_fn.name()):
        return None
    n.meta["val"] = made.detach().requires_grad_(made.requires_grad)
    return n


@dataclass(frozen=True)
class View:
    """A view: its arguments by name, and what it is taken of, as it was traced and as it is now."""

    given: Mapping[str, Any]
    traced: torch.Tensor
    source: fx.Node


Back = Callable[[View, fx.Node], tuple[OpOverload, tuple[Any, ...]]]


def _scatter(target: OpOverload, *names: str) -> Back:
    """The value laid into its source, at the place that the view names."""
    return lambda v, value: (target, (v.source, value, *(v.given[x] for x in names)))


def _same(v: View, value: fx.Node) -> tuple[OpOverload, tuple[Any, ...]]:
    return _ATEN.alias.default, (value,)


def _shaped(v: View, value: fx.Node) -> tuple[OpOverload, tuple[Any, ...]]:
    if not all(isinstance(s, int) for s in v.traced.shape):
        raise _Untold
    return _ATEN.reshape.default, (value, list(v.traced.shape))


def _permuted(v: View, value: fx.Node) -> tuple[OpOverload, tuple[Any, ...]]:
    rank = v.traced.dim()
    dims = [int(d) % rank for d in v.given["dims"]]
    return _ATEN.permute.default, (value, [dims.index(d) for d in range(rank)])


def _swapped(v: View, value: fx.Node) -> tuple[OpOverload, tuple[Any, ...]]:
    _, first, second = v.given.values()
    return _ATEN.transpose.int, (value, first, second)


def _turned(v: View, value: fx.Node) -> tuple[OpOverload, tuple[Any, ...]]:
    return _ATEN.transpose.int, (value, -1, -2)


# How a value is laid back, by the view through which it was written.
_BACK: Mapping[str, Back] = {
    "slice": _scatter(_ATEN.slice_scatter.default, "dim", "start", "end", "step"),
    "select": _scatter(_ATEN.select_scatter.default, "dim", "index"),
    "diagonal": _scatter(_ATEN.diagonal_scatter.default, "offset", "dim1", "dim2"),
    "alias": _same, "contiguous": _same, "to": _same, "type_as": _same, "float": _same,
    **dict.fromkeys(("view", "_unsafe_view", "unflatten", "view_as", "unsqueeze", "squeeze", "reshape", "flatten"), _shaped),
    "permute": _permuted, "transpose": _swapped, "swapaxes": _swapped, "mT": _turned, "t": _turned,
}
