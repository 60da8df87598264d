"""The body of a loop as a graph of its own: what a step reads, its states before and after, what it gives.

    a = select(x, 2, t); s' = a · s; y = s' · c        inputs: piece x at t, state s; or, for what a step gives, next s'
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.node import FOLDED, CannotLift, arguments, op_name
from .loop import CopyBefore, SameCopy, StepLoop, Stepped, by_name

# In the metadata of an input of a step's graph: what it stands for.
INPUT = "reattend_input"


@dataclass(frozen=True)
class Prior:
    """The state at a place of the body, before the step."""

    place: int


@dataclass(frozen=True)
class AfterStep:
    """The state at a place of the body, after the step."""

    place: int


@dataclass(frozen=True)
class Fixed:
    """A value that is the same in all steps."""

    node: fx.Node


@dataclass(frozen=True)
class StepPiece:
    """What step t reads of a tensor: its index `first + by · t` along `dim`, or `length` of them from there on."""

    node: fx.Node
    dim: int
    first: int
    by: int
    length: int | None


def body(loop: StepLoop, wanted: Collection[int], after: bool) -> tuple[fx.Graph, Mapping[int, fx.Node]]:
    """The graph that makes the values at the wanted places, and its nodes there.

    With `after`, the states behind the step are inputs of it. Raises CannotLift for a step that reads its own number.
    """
    return _Body(loop, after).graph(wanted)


class _Body:
    def __init__(self, loop: StepLoop, after: bool) -> None:
        self.loop, self.after = loop, after
        self.first = loop.copies[0]
        self.out = fx.Graph()
        self.inputs: dict[object, fx.Node] = {}
        self.table: dict[int, fx.Node] = {}

    def graph(self, wanted: Collection[int]) -> tuple[fx.Graph, Mapping[int, fx.Node]]:
        needed, stack = set[int](), list(wanted)
        while stack:
            place = stack.pop()
            if place in needed:
                continue
            needed.add(place)
            if not (self.after and place in self.loop.carried):
                stack += [r.place for r in self.loop.references[place] if isinstance(r, SameCopy)]
        for place in sorted(needed):
            self.table[place] = self._node(place)
        return self.out, {p: self.table[p] for p in wanted}

    def _node(self, place: int) -> fx.Node:
        n = self.first[place]
        assert n is not None
        row = self.loop.references[place]
        if self.after and place in self.loop.carried:
            return self._input(AfterStep(place), n, "next")
        if any(isinstance(r, Stepped) for r in row):
            return self._input(_piece(n, row), n, "piece")
        given = iter(row)
        args = _rebuilt(n.args, given, self._argument)
        kwargs = dict(zip(n.kwargs, _rebuilt(tuple(n.kwargs.values()), given, self._argument)))
        assert callable(n.target)
        made = self.out.call_function(n.target, tuple(args), kwargs)
        made.meta = {k: v for k, v in n.meta.items() if k != FOLDED}
        return made

    def _argument(self, r: object) -> Any:
        match r:
            case SameCopy(place):
                return self.table[place]
            case CopyBefore(place, _):
                like = self.first[place]
                assert like is not None
                return self._input(Prior(place), like, "state")
            case (fx.Node() as node,):
                return self._input(Fixed(node), node, "fixed")
            case (value,):
                return value
        raise CannotLift(f"{r} is no argument of a step")

    def _input(self, what: object, like: fx.Node, stem: str) -> fx.Node:
        if what not in self.inputs:
            # without a node: before all others
            with self.out.inserting_before(next(iter(self.out.nodes), None)):
                made = self.out.placeholder(f"{stem}_{len(self.inputs)}")
            made.meta = {k: v for k, v in like.meta.items() if k == "val"}
            made.meta[INPUT] = what
            self.inputs[what] = made
        return self.inputs[what]


def _rebuilt(args: tuple[Any, ...], given: Any, argument: Any) -> list[Any]:
    return [_rebuilt(tuple(a), given, argument) if isinstance(a, (list, tuple)) else argument(next(given)) for a in args]


def _piece(n: fx.Node, row: tuple[object, ...]) -> StepPiece:
    """The part of a tensor that a step reads. Raises CannotLift where the step's number means something else."""
    name, source = op_name(n), row[0]
    whole = isinstance(source, tuple) and isinstance(source[0], fx.Node)
    if name not in ("select", "slice", "narrow") or not whole:
        raise CannotLift(f"a step reads its own number ({name})", n)
    assert isinstance(source, tuple)
    tensor = source[0]
    assert isinstance(tensor, fx.Node)
    value = tensor.meta["val"]
    assert isinstance(value, torch.Tensor)
    given, stepped = arguments(n), {k: r for k, r in by_name(n, row).items() if isinstance(r, Stepped)}
    first, dim = stepped.get("index" if name == "select" else "start"), given["dim"]
    if first is None or "dim" in stepped or not isinstance(dim, int):
        raise CannotLift(f"a step reads its own number ({name})", n)
    if first.by < 1 or first.first < 0:
        raise CannotLift(f"a step reads its inputs from behind ({name})", n)
    dim %= value.dim()
    if name == "select":
        return StepPiece(tensor, dim, first.first, first.by, None)
    length = n.meta["val"].shape[dim]
    if given.get("step", 1) != 1 or not isinstance(length, int):
        raise CannotLift("a step reads every other index of its input", n)
    # no piece is cut off at the end of its tensor, as all are as long as their ends are apart
    if name == "slice" and stepped.get("end") != Stepped(first.first + length, first.by):
        raise CannotLift("the pieces that steps read are cut off", n)
    return StepPiece(tensor, dim, first.first, first.by, length)
