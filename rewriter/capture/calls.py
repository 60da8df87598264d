"""A graph of Dynamo's traced call by call: calls that are equal in all that a trace depends on are traced once.

    before   linear(x₁, w₁); gelu(y₁); …; linear(x₂₄, w₂₄); gelu(y₂₄); …       24 layers, each call of each traced
    after    one layer's calls traced, the others written down from them

A trace of a call depends on its function, its constants, the metadata of the tensors and sizes given, which of them are one,
and the modes around it: together its key. It is traced on fresh values, so that nothing flows from call to call but through
what calls give. What it gives must be what Dynamo noted for the call, and the metadata of what it was given must stand;
where anything else may matter, `Unfit` says so, and the graph is traced as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.fx.traceback as traceback
from torch import Tensor, fx, nn

from ..graph import torch_private
from .backward import GradientWatch
from .modes import Switches, modes

# Nested tuples and lists of cells and of plain values.
Tree: TypeAlias = Any
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))
_OPEN = (torch.SymInt, torch.SymFloat, torch.SymBool)
# What a tensor without data answers from what it remembers of itself: a Python number that Dynamo passes as a tensor.
_BY_IDENTITY = ("item",)
# What a trace says of a node itself; all else in its metadata comes from the call that it stands for.
_OF_THE_TRACE = ("val", "tensor_meta", "seq_nr")


class Unfit(Exception):
    """A graph whose trace may depend on more than the key of each call; the sentence says on what."""


@dataclass(eq=False)
class Cell:
    """One tensor or size while the graph is walked: the node that holds it now, which a write in place changes."""

    node: fx.Node
    said: object
    value: Any


@dataclass(frozen=True)
class Template:
    """The trace of one call. `given` are its inputs, `after` the nodes that hold these when it is over, `result` a tree of
    nodes, of the inputs that are given back, by number, and of plain values; `said` the result's metadata."""

    nodes: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    result: Tree
    said: Tree
    values: Tree
    module: fx.GraphModule


@dataclass(frozen=True)
class _Back:
    """In the result of a call: its input of this number, given back."""

    number: int


def trace(
    gm: fx.GraphModule, flat: Sequence[object], held: Sequence[fx.Node], mode: torch_private.FakeTensorMode,
    watch: GradientWatch,
) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a graph of Dynamo's, on the fake values of its inputs and then of its attributes.

    Raises Unfit; whatever a call raises while it is traced may be raised as well.
    """
    walk = _CallByCall(gm, mode, watch)
    try:
        return walk.graph(flat, held)
    finally:
        walk.switches.leave()


class _CallByCall:
    def __init__(self, gm: fx.GraphModule, mode: torch_private.FakeTensorMode, watch: GradientWatch) -> None:
        self.gm, self.mode, self.watch = gm, mode, watch
        self.out, self.root = fx.Graph(), nn.Module()
        self.env: dict[fx.Node, Tree] = {}
        self.known: dict[object, Template] = {}
        self.said: dict[int, object] = {}
        self.switches, self.modes = Switches(), modes()

    def graph(self, flat: Sequence[object], held: Sequence[fx.Node]) -> fx.GraphModule:
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for n, value in zip([*inputs, *held], flat, strict=True):
            self.env[n] = self._input(n, value)
        for n in self.gm.graph.nodes:
            match n.op:
                case "call_function" | "call_method":
                    self.env[n] = self._call(n)
                case "output":
                    self.out.output(_map(n.args[0], lambda x: _nodes(self.env[x])))
                case "get_attr" if n not in self.env:
                    raise Unfit(f"{n.target} is no tensor")
                case "call_module":
                    raise Unfit("a module is called")
        return fx.GraphModule(self.root, self.out)

    def _input(self, n: fx.Node, value: object) -> Tree:
        if isinstance(value, _PLAIN):
            node = self.out.placeholder(str(n.target))
            node.meta = {"val": value}
            return value
        noted = torch_private.noted(n)
        if noted is not torch_private.NOTHING and self._said(noted) != self._said(value):
            raise Unfit(f"{n.name} was changed while Dynamo traced")
        node = self.out.placeholder(str(n.target) if n.op == "placeholder" else n.name)
        with self.mode, torch.no_grad():
            node.meta["val"] = value.detach() if isinstance(value, Tensor) else value
        return Cell(node, self._said(value), value)

    # --- calls ----------------------------------------------------------------------------------------------------

    def _call(self, n: fx.Node) -> Tree:
        if n.target in torch_private.SWITCHES:
            return self._switch(n)
        if torch_private.traces_nothing(n.target):
            return None
        if n.target is operator.getitem and isinstance(self.env.get(n.args[0]), (tuple, list)):  # type: ignore[arg-type]
            picked: Tree = self.env[n.args[0]][n.args[1]]  # type: ignore[index]
            return picked
        if torch_private.is_own_function(n.target) or torch_private.has_body(n.target):
            raise Unfit(f"{n.name} has code of its own")
        noted = torch_private.noted(n)
        if noted is torch_private.NOTHING and n.target is operator.setitem:
            noted = None
        if noted is torch_private.NOTHING:
            raise Unfit(f"{n.name} may change what calls after it do")
        cells: dict[Cell, int] = {}
        key = (n.op, n.target, self._key(n.args, cells), self._key(n.kwargs, cells), self.modes)
        found = self.known.get(key)
        if found is None:
            found = self._traced(n, cells)
            if n.target not in _BY_IDENTITY:
                self.known[key] = found
        if found.said != self._tree_said(noted):
            raise Unfit(f"{n.name} is not what Dynamo noted")
        return self._written(n, found, list(cells))

    def _switch(self, n: fx.Node) -> Tree:
        """Autocast or grad mode from here on."""
        node = self.out.create_node("call_function", n.target, *_map((n.args, n.kwargs), lambda x: self.env[x]))
        node.meta = {k: v for k, v in n.meta.items() if k in ("stack_trace", "nn_module_stack")}
        self.switches.act(n)
        self.modes = modes()
        return node

    def _key(self, x: Any, cells: dict[Cell, int]) -> object:
        """An argument without identities: cells by number where they first appear, with their metadata."""
        if isinstance(x, fx.Node):
            return self._key(self.env[x], cells)
        if isinstance(x, Cell):
            if x in cells:
                return ("again", cells[x])
            cells[x] = len(cells)
            return ("given", x.said)
        if isinstance(x, (tuple, list)):
            return (type(x), tuple(self._key(y, cells) for y in x))
        if isinstance(x, dict):
            return (dict, tuple((k, self._key(y, cells)) for k, y in x.items()))
        if isinstance(x, slice):
            return (slice, *(self._key(y, cells) for y in (x.start, x.stop, x.step)))
        if isinstance(x, _PLAIN):
            return (type(x), repr(x))
        raise Unfit(f"{type(x).__name__} is given")

    def _traced(self, n: fx.Node, cells: dict[Cell, int]) -> Template:
        """The call's trace, on values of its own."""
        order = list(cells)
        given = [c.value if n.target in _BY_IDENTITY else self._fresh(c) for c in order]
        before = [self._said_now(x) for x in given]
        results: list[Any] = []

        def run(*values: Any) -> Any:
            table = dict(zip(order, values))
            args, kwargs = _map((n.args, n.kwargs), lambda x: _put(self.env[x], table))
            target: Any = n.target
            do = (lambda: getattr(args[0], target)(*args[1:], **kwargs)) if n.op == "call_method" else (
                lambda: target(*args, **kwargs))
            results.append(_plain(self.watch.call(n, list(values), do)))
            results.append(values)
            return results[0], list(values)

        with self.mode, traceback.preserve_node_meta(), traceback.set_current_meta(n):
            made = torch_private.pre_dispatch_graph(run, given)
        result, values = results
        if [self._said_now(x) for x in values] != before:
            raise Unfit(f"{n.name} changes the metadata of what it is given")
        nodes = list(made.graph.nodes)
        ((out, after),) = nodes[-1].args
        if any(isinstance(x, _OPEN) for m in nodes for x in torch_private.tree_leaves((m.args, m.kwargs))):
            raise Unfit(f"{n.name} is traced with a size that no node holds")
        place = {id(x): i for i, x in reversed(list(enumerate(values)))}
        kept = tuple(m for m in nodes if m.op not in ("placeholder", "output"))
        return Template(
            kept, tuple(m for m in nodes if m.op == "placeholder"), tuple(after), _backs(result, out, place),
            self._tree_said(result, now=True), result, made,
        )

    def _fresh(self, c: Cell) -> Any:
        """A value with the metadata of a cell's, and nothing else of it."""
        if not isinstance(c.value, Tensor):
            return c.value
        x = c.value
        with self.mode, torch.no_grad():
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        made.requires_grad_(x.requires_grad)
        if self._said_now(made) != c.said:
            raise Unfit("a value cannot be made from its metadata")
        return made

    def _written(self, n: fx.Node, t: Template, given: Sequence[Cell]) -> Tree:
        """Write a call down from a template; the tree of its result."""
        table: dict[fx.Node, fx.Node] = {m: c.node for m, c in zip(t.given, given)}
        for m in t.nodes:
            table[m] = self._node(n, m, table, t.module)
        for c, m in zip(given, t.after):
            c.node = table[m]

        def tree(x: Any, said: Any, value: Any) -> Tree:
            if isinstance(x, _Back):
                return given[x.number]
            if isinstance(x, fx.Node):
                return Cell(table[x], said, value)
            if isinstance(x, (tuple, list)):
                return type(x)(tree(*y) for y in zip(x, said[1], value))
            return x

        return tree(t.result, t.said, t.values)

    def _node(self, n: fx.Node, m: fx.Node, table: dict[fx.Node, fx.Node], module: fx.GraphModule) -> fx.Node:
        target = m.target
        if m.op == "get_attr":
            target = f"_constant{len(dict(self.root.named_buffers()))}"
            # each call has a constant of its own, as when each is traced
            self.root.register_buffer(target, getattr(module, str(m.target)).clone(), persistent=False)
        args, kwargs = fx.map_arg((m.args, m.kwargs), table.__getitem__)
        made = self.out.create_node(m.op, target, args, kwargs, name=m.name)
        made.meta = {k: m.meta[k] if k in _OF_THE_TRACE else n.meta.get(k, m.meta[k]) for k in m.meta}
        made.meta.pop("from_node", None)
        return made

    # --- metadata -------------------------------------------------------------------------------------------------

    def _said(self, x: Any) -> object:
        """What a trace can see of a value that stays; kept by its identity."""
        at = id(x)
        if at not in self.said:
            self.said[at] = self._said_now(x)
        return self.said[at]

    def _tree_said(self, x: Any, now: bool = False) -> object:
        if isinstance(x, (tuple, list)):
            return (list if isinstance(x, list) else tuple, tuple(self._tree_said(y, now) for y in x))
        return self._said_now(x) if now else self._said(x)

    def _said_now(self, x: Any) -> object:
        if isinstance(x, torch_private.FakeTensor):
            return _metadata(x)
        size = _term(x)
        if isinstance(size, _PLAIN):
            return (type(size), repr(size))
        if isinstance(x, _OPEN):
            return (type(x), size)
        raise Unfit(f"a value is a {type(x).__name__}")


def _metadata(x: Tensor) -> object:
    if x.layout is not torch.strided or torch_private.has_hooks(x):
        raise Unfit("a tensor is sparse, or has hooks")
    flags = (x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())
    return (tuple(map(_term, (*x.shape, *x.stride()))), x.dtype, x.device, *flags)


def _term(x: Any) -> Any:
    """An open size as a term, or as the number that it is."""
    known = torch_private.known_size(x) if isinstance(x, torch.SymInt) else None
    return known if known is not None else torch_private.expression(x) if isinstance(x, _OPEN) else x  # type: ignore[arg-type]


def _map(x: Any, change: Callable[[fx.Node], Any]) -> Any:
    return fx.map_arg(x, change)


def _put(tree: Tree, table: dict[Cell, Any]) -> Any:
    """A tree with values in the place of cells."""
    if isinstance(tree, Cell):
        return table[tree]
    return type(tree)(_put(x, table) for x in tree) if isinstance(tree, (tuple, list)) else tree


def _nodes(tree: Tree) -> Any:
    """A tree with nodes in the place of cells."""
    if isinstance(tree, Cell):
        return tree.node
    return type(tree)(_nodes(x) for x in tree) if isinstance(tree, (tuple, list)) else tree


def _plain(x: Any) -> Any:
    """Results with names as tuples."""
    if isinstance(x, (tuple, list)):
        return (list if isinstance(x, list) else tuple)(_plain(y) for y in x)
    return x


def _backs(result: Any, out: Any, place: dict[int, int]) -> Tree:
    """The nodes of a result; what was given is shown as that."""
    if isinstance(result, (tuple, list)):
        return type(result)(_backs(x, y, place) for x, y in zip(result, out, strict=True))
    if id(result) in place and isinstance(result, (Tensor, *_OPEN)):
        return _Back(place[id(result)])
    if isinstance(out, fx.Node):
        return out
    if isinstance(result, (Tensor, *_OPEN)):
        raise Unfit("a result is in no node")
    return result
