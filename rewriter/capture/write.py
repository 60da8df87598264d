"""What was read of a graph of Dynamo's, written down as a graph of operators: each call from the trace of its template.

    read     linear(x₁, w₁) like call 3; linear(x₂, w₂) like call 3        written     linear(x₁, w₁); linear(x₂, w₂)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import torch_private
from .templates import OPEN, CallStep, Cell, Leaf, Tree, Unfit, term

# What a trace says of a node itself; all else in its metadata comes from the call that it stands for.
_OF_THE_TRACE = ("val", "tensor_meta", "seq_nr")


class GraphWriter:
    """Writes the new graph down: what was read, call by call, from the trace of the calls that were run.

    `env` has the values of the read graph's nodes as trees of cells; `told` are its nodes that the trace has as inputs.
    """

    def __init__(
        self, env: Mapping[fx.Node, Tree], steps: Sequence[CallStep], marks: int, made: fx.GraphModule,
        told: Sequence[fx.Node],
    ) -> None:
        self.env, self.steps, self.made = env, steps, made
        self.out, self.root = fx.Graph(), nn.Module()
        nodes = list(made.graph.nodes)
        self.shown: Sequence[Any] = nodes[-1].args[0]
        self.told = dict(zip((n for n in nodes if n.op == "placeholder"), told))
        # What stands behind each mark.
        self.behind: list[list[fx.Node]] = [[]]
        for n in nodes:
            if n.target is torch_private.SET_GRAD:
                self.behind.append([])
            elif n.op not in ("placeholder", "output"):
                self.behind[-1].append(n)
        if len(self.behind) != marks + 1:
            raise Unfit("a call sets grad mode")
        self.sizes: dict[fx.Node, fx.Node] = {}

    def written(self, gm: fx.GraphModule, inputs: Sequence[fx.Node], flat: Sequence[object]) -> fx.GraphModule:
        self.inputs = {n: self._input(n, x) for n, x in zip(inputs, flat)}
        for step in self.steps:
            self._step(step)
        (output,) = (n for n in gm.graph.nodes if n.op == "output")
        self.out.output(fx.map_arg(output.args[0], lambda x: _nodes(self.env[x])))
        return fx.GraphModule(self.root, self.out)

    def _input(self, n: fx.Node, value: object) -> fx.Node:
        node = self.out.placeholder(str(n.target) if n.op == "placeholder" else n.name)
        node.meta["val"] = value
        if isinstance(value, Tensor):
            with torch.no_grad():
                node.meta["val"] = value.detach()
        if isinstance(cell := self.env[n], Cell):
            cell.node = node
        return node

    def _step(self, s: CallStep) -> None:
        t = s.template
        if t is None:
            s.result.node = self._switch(s.node)
            return
        table: dict[fx.Node, fx.Node | None] = {}
        for c, mark in zip(s.given, t.given):
            if mark is not None:
                table[self._made(mark, s)] = c.node
        for m in self.behind[t.mark]:
            table[m] = self._node(s, m, table)
        for c, i in zip(s.given, t.after):
            if i is not None:
                c.node = self._at(self.shown[i], table, s)
        self._fill(t.result, s.result, table, s)

    def _made(self, mark: int, s: CallStep) -> fx.Node:
        """The node that makes a value to run calls on; before it, its sizes may stand."""
        made = [m for m in self.behind[mark] if m.target is torch.ops.aten.empty_strided.default]
        if len(made) != 1:
            raise Unfit(f"{s.node.name} reads what was not made for it")
        return made[0]

    def _fill(self, tree: Tree, cells: Tree, table: Mapping[fx.Node, fx.Node | None], s: CallStep) -> None:
        """Say in which nodes the results of a call are."""
        if isinstance(tree, (tuple, list)):
            for x, y in zip(tree, cells):
                self._fill(x, y, table, s)
        elif isinstance(tree, Leaf):
            cells.node = self._at(self.shown[tree.number], table, s)

    def _switch(self, n: fx.Node) -> fx.Node:
        node = self.out.create_node("call_function", n.target, *fx.map_arg((n.args, n.kwargs), lambda x: self.env[x].node))
        node.meta = {k: v for k, v in n.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return node

    def _node(self, s: CallStep, m: fx.Node, table: Mapping[fx.Node, fx.Node | None]) -> fx.Node:
        target = m.target
        if m.op == "get_attr":
            target = f"_constant{len(dict(self.root.named_buffers()))}"
            # each call has a constant of its own, as when each is traced
            self.root.register_buffer(target, getattr(self.made, str(m.target)).clone(), persistent=False)
        args, kwargs = fx.map_arg((m.args, m.kwargs), lambda x: self._at(x, table, s))
        if any(isinstance(x, OPEN) for x in torch_private.tree_leaves((m.args, m.kwargs))):
            raise Unfit(f"{s.node.name} is traced with a size that no node holds")
        made = self.out.create_node(m.op, target, args, kwargs, name=m.name)
        said = s.node.meta
        made.meta = {k: m.meta[k] if k in _OF_THE_TRACE else said.get(k, m.meta[k]) for k in m.meta if k != "from_node"}
        return made

    # --- sizes ----------------------------------------------------------------------------------------------------

    def _at(self, m: object, table: Mapping[fx.Node, fx.Node | None], s: CallStep) -> fx.Node:
        """Where a node of the trace is in the new graph. Beside the call's own there are sizes, which any call may show."""
        if not isinstance(m, fx.Node):
            raise Unfit(f"a result of {s.node.name} is in no node")
        found = table.get(m) or self.sizes.get(m) or self._given_size(m, s)
        if found is None:
            found = self.sizes[m] = self._size(m, s)
        return found

    def _given_size(self, m: fx.Node, s: CallStep) -> fx.Node | None:
        """The size of that value among the call's own, or as a dimension of what it is given."""
        value = m.meta.get("val")
        if m.op == "placeholder" or not isinstance(value, OPEN):
            return None
        for c in s.given:
            if isinstance(c.value, type(value)) and term(c.value) == term(value):
                return c.node
        for c in s.given:
            for d, size in enumerate(c.value.shape if isinstance(c.value, Tensor) else ()):
                if isinstance(size, torch.SymInt) and term(size) == term(value):
                    made = self.out.call_function(torch.ops.aten.sym_size.int, (c.node, d))
                    made.meta["val"] = size
                    return made
        return None

    def _size(self, m: fx.Node, s: CallStep) -> fx.Node:
        """A size that the inputs of the graph show, written down where it is first read."""
        if m.op == "placeholder":
            return self.inputs[self.told[m]]
        if m.op != "call_function" or not isinstance(m.meta.get("val"), OPEN):
            raise Unfit(f"{s.node.name} reads a value of another call")
        made = self.out.create_node("call_function", m.target, *fx.map_arg((m.args, m.kwargs), lambda x: self._at(x, {}, s)))
        made.meta["val"] = m.meta["val"]
        return made


def _nodes(tree: Tree) -> Any:
    """A tree with nodes in the place of cells."""
    if isinstance(tree, Cell):
        return tree.node
    return type(tree)(_nodes(x) for x in tree) if isinstance(tree, (tuple, list)) else tree
