"""A graph of Dynamo's traced call by call: calls that are equal in all that a trace depends on are traced once.

    before   linear(x₁, w₁); gelu(y₁); …; linear(x₂₄, w₂₄); gelu(y₂₄); …       24 layers, each call of each traced
    after    one layer's calls traced, the others written down from them

A trace of a call depends on its function, its constants, the metadata of the tensors and sizes given, which of them are one,
and the modes around it: together its key. It is traced on fresh values, so that nothing flows from call to call but through
what calls give; all are traced in one go, with marks between. What a call gives must be what Dynamo noted for it, and the
metadata of what it was given must stand; where anything else may matter, `Unfit` says so: the graph is traced as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch import Tensor, fx

from ..graph import torch_private
from .backward import GradientWatch
from .modes import Switches, modes
from .templates import (
    OPEN,
    PLAIN,
    Back,
    CallStep,
    CallTemplate,
    Cell,
    Leaf,
    Tree,
    Unfit,
    fresh_result,
    metadata,
    plain,
    term,
)
from .write import GraphWriter

# What a tensor without data answers from what it remembers of itself: a Python number that Dynamo passes as a tensor.
_BY_IDENTITY = ("item",)


def trace(
    gm: fx.GraphModule, flat: Sequence[object], held: Sequence[fx.Node], mode: torch_private.FakeTensorMode,
    watch: GradientWatch,
) -> fx.GraphModule:
    """The pre-dispatch ATen graph of a graph of Dynamo's, on the fake values of its inputs and then of its attributes.

    Raises Unfit.
    """
    inputs = [*(n for n in gm.graph.nodes if n.op == "placeholder"), *held]
    reader = _CallReader(mode, watch)
    told = [i for i, x in enumerate(flat) if _tells(x)]

    def run(*_: object) -> object:
        try:
            with traceback.preserve_node_meta():
                return reader.read(gm, dict(zip(inputs, flat, strict=True)))
        finally:
            reader.switches.leave()

    try:
        with mode:
            made = torch_private.pre_dispatch_graph(run, [flat[i] for i in told])
    except Unfit:
        raise
    except torch_private.restarts():
        raise
    except Exception as error:
        raise Unfit(f"a call is not traced by itself: {type(error).__name__}: {error}") from error
    return GraphWriter(reader.env, reader.steps, reader.marks, made, [inputs[i] for i in told]).written(gm, inputs, flat)


def _tells(x: object) -> bool:
    """Does a value tell a number? A tensor of no dimensions may be one that Dynamo passes so."""
    if isinstance(x, Tensor):
        return not x.dim() or any(isinstance(s, torch.SymInt) for s in x.shape)
    return isinstance(x, OPEN)


class _CallReader:
    """Walks a graph of Dynamo's inside one trace, in which each call of a new key runs on values of its own."""

    def __init__(self, mode: torch_private.FakeTensorMode, watch: GradientWatch) -> None:
        self.mode, self.watch = mode, watch
        self.env: dict[fx.Node, Tree] = {}
        self.steps: list[CallStep] = []
        self.outputs: list[Any] = []
        self.marks = 0
        self.known: dict[object, CallTemplate] = {}
        # Values that the next call of a new key may be run on, by their metadata.
        self.pool: dict[object, list[tuple[Tensor, int]]] = {}
        self.said: dict[int, object] = {}
        # Identities are kept, so what has them is.
        self.alive: list[object] = []
        self.switches, self.modes = Switches(), modes()

    def read(self, gm: fx.GraphModule, given: Mapping[fx.Node, object]) -> list[Any]:
        self.env |= {n: self._input(n, value) for n, value in given.items()}
        for n in gm.graph.nodes:
            if n.op in ("call_function", "call_method"):
                self.env[n] = self._call(n)
            elif n.op not in ("placeholder", "output") and n not in self.env:
                raise Unfit(f"{n.name} is no tensor, or a module")
        self._mark()
        return self.outputs

    def _mark(self, gradients: bool | None = None) -> int:
        """Leave a mark in the trace: a node that sets grad mode. Answers the number of what follows it."""
        torch_private.SET_GRAD(torch.is_grad_enabled() if gradients is None else gradients)
        self.marks += 1
        return self.marks

    def _input(self, n: fx.Node, value: object) -> Tree:
        if isinstance(value, PLAIN):
            return value
        noted = torch_private.noted(n)
        if noted is not torch_private.NOTHING and self._said(noted) != self._said(value):
            raise Unfit(f"{n.name} was changed while Dynamo traced")
        return Cell(self._said(value), value)

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
        noted = None if n.target is operator.setitem else torch_private.noted(n)
        if noted is torch_private.NOTHING:
            raise Unfit(f"{n.name} may change what calls after it do")
        cells: dict[Cell, int] = {}
        key = (n.op, n.target, self._key(n.args, cells), self._key(n.kwargs, cells), self.modes)
        given = tuple(cells)
        found = self.known.get(key)
        if found is None:
            found = self._traced(n, given)
            if n.target not in _BY_IDENTITY:
                self.known[key] = found
        if found.said != self._tree_said(noted):
            raise Unfit(f"{n.name} is not what Dynamo noted")
        result = fresh_result(found.result, given)
        self.steps.append(CallStep(n, found, given, result))
        return result

    def _switch(self, n: fx.Node) -> Tree:
        """Autocast or grad mode from here on."""
        if n.target is torch_private.SET_GRAD:
            self._mark(bool(n.args[0]))
        else:
            self.switches.act(n)
        self.modes = modes()
        token = Cell(None, None)
        self.steps.append(CallStep(n, None, (), token))
        return token

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
        if isinstance(x, PLAIN):
            return (type(x), repr(x))
        raise Unfit(f"{type(x).__name__} is given")

    def _traced(self, n: fx.Node, cells: Sequence[Cell]) -> CallTemplate:
        """Run a call on values of its own."""
        by_identity = n.target in _BY_IDENTITY
        made = [(c.value, None) if by_identity or not isinstance(c.value, Tensor) else self._fresh(c) for c in cells]
        values, marks = [x for x, _ in made], tuple(mark for _, mark in made)
        before = [(self._said_now(x), torch_private.writes(x)) for x in values]
        table = dict(zip(cells, values))
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda x: _put(self.env[x], table))
        target: Any = n.target

        def run() -> Any:
            return getattr(args[0], target)(*args[1:], **kwargs) if n.op == "call_method" else target(*args, **kwargs)

        call = self._mark()
        with traceback.set_current_meta(n):
            result = plain(self.watch.call(n, values, run))
        self._mark()
        if [self._said_now(x) for x in values] != [said for said, _ in before]:
            raise Unfit(f"{n.name} changes the metadata of what it is given")
        self.alive += [values, result]
        place = {id(x): i for i, x in reversed(list(enumerate(values)))}
        back = {id(x) for x in torch_private.tree_leaves(result)}
        # What is written in Python may hold a value in another node than it came in, and say nothing of it.
        opaque = isinstance(target, FunctionType)
        touched = [
            opaque or times < 0 or id(x) in back or torch_private.writes(x) != times for x, (_, times) in zip(values, before)
        ]
        after = tuple(self._output(x) if mark and new else None for x, mark, new in zip(values, marks, touched))
        for c, x, mark, new in zip(cells, values, marks, touched):
            if mark and not new:
                self.pool.setdefault(c.said, []).append((x, mark))
        return CallTemplate(call, marks, after, self._leaves(result, place), self._tree_said(result))

    def _output(self, x: Any) -> int:
        self.outputs.append(x)
        return len(self.outputs) - 1

    def _leaves(self, x: Any, place: Mapping[int, int]) -> Tree:
        """The tree of a result; what was given is shown as that."""
        if isinstance(x, (tuple, list)):
            return type(x)(self._leaves(y, place) for y in x)
        if not isinstance(x, (Tensor, *OPEN)):
            return x
        return Back(place[id(x)]) if id(x) in place else Leaf(self._output(x), self._said(x), x)

    def _fresh(self, c: Cell) -> tuple[Tensor, int]:
        """A value with the metadata of a cell's, and nothing else of it, and the mark behind which it is made.

        It may have been read by other calls, which neither wrote to it nor gave it back.
        """
        if waiting := self.pool.get(c.said):
            return waiting.pop()
        x, mark = c.value, self._mark()
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        made.requires_grad_(x.requires_grad)
        if self._said_now(made) != c.said:
            raise Unfit("a value cannot be made from its metadata")
        return made, mark

    # --- metadata -------------------------------------------------------------------------------------------------

    def _said(self, x: Any) -> object:
        """What a trace can see of a value that stays; kept by its identity."""
        at = id(x)
        if at not in self.said:
            self.said[at] = self._said_now(x)
            self.alive.append(x)
        return self.said[at]

    def _tree_said(self, x: Any) -> object:
        if isinstance(x, (tuple, list)):
            return (list if isinstance(x, list) else tuple, tuple(map(self._tree_said, x)))
        return self._said(x)

    def _said_now(self, x: Any) -> object:
        if isinstance(x, torch_private.FakeTensor):
            return metadata(x)
        size = term(x)
        if isinstance(size, PLAIN):
            return (type(size), repr(size))
        if isinstance(x, OPEN):
            return (type(x), size)
        raise Unfit(f"a value is a {type(x).__name__}")


def _put(tree: Tree, table: dict[Cell, Any]) -> Any:
    """A tree with values in the place of cells."""
    if isinstance(tree, Cell):
        return table[tree]
    return type(tree)(_put(x, table) for x in tree) if isinstance(tree, (tuple, list)) else tree
