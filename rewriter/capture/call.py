"""Capture of one call of a function on the values at hand: no Dynamo, no module, and no frame is looked at.

    before   f(q, k, v, 512)                            a Python function of tensors and integers
    after    a graph of ATen operators, with symbols for the sizes that are said to be open, and guards on those

What the function reads beside its arguments is the caller's concern: a tensor that reaches it otherwise is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction

from ..graph import torch_private
from ..graph.node import op_name
from .capture import Captured, CaptureError, finish, first_line
from .weights import PARAMETER

Value = Tensor | int
# Where a size stands: which value, and which of its dimensions; an integer has the dimension −1.
SizeAt = tuple[int, int]
# What is planned at one size serves others of its kind: up to four times as many, and for offsets sixteen times.
_OCTAVES, _OFFSET_OCTAVES = 2, 4


@dataclass(frozen=True)
class CapturedCall:
    """A call's graph, of its tensors and open integers. `holds` says whether the graph is right for another call's."""

    captured: Captured
    passed: tuple[int, ...]
    opened: frozenset[SizeAt]
    hint: tuple[int, ...]
    holds: Callable[[Sequence[Value], tuple[int, ...]], bool]

    def arguments(self, values: Sequence[Value]) -> list[Value]:
        return [values[i] for i in self.passed]


def sizes_of(values: Sequence[Value]) -> tuple[int, ...]:
    """All that a capture may depend on: integers, and every size and stride of the tensors."""
    out: list[int] = []
    for x in values:
        if isinstance(x, Tensor):
            out += x.shape
            out += x.stride()
        else:
            out.append(x)
    return tuple(out)


def size_places(values: Sequence[Value]) -> list[SizeAt | None]:
    """What stands where in `sizes_of`: sizes and integers by their places, strides by None."""
    out: list[SizeAt | None] = []
    for i, x in enumerate(values):
        if isinstance(x, Tensor):
            out += [(i, d) for d in range(x.dim())] + [None] * x.dim()
        else:
            out.append((i, -1))
    return out


def from_call(
    function: Callable[..., Tensor], values: Sequence[Value], opened: Collection[SizeAt] = (), frame: str = ""
) -> CapturedCall:
    """The graph of `function(*values)`, with symbols for the opened sizes. Sizes 0 and 1 stay what they are.

    `frame` names the site that the operators belong to. Raises CaptureError.
    """
    start = time.perf_counter()
    flat = sizes_of(values)
    places = size_places(values)
    wanted = frozenset(p for p, n in zip(places, flat) if p is not None and p in opened and (p[1] < 0 or n > 1))
    fakes = torch_private.CallFakes(bool(wanted))
    passed = tuple(i for i, x in enumerate(values) if isinstance(x, Tensor) or (i, -1) in wanted)
    given = [_fake(fakes, values[i], [d for j, d in wanted if j == i]) for i in passed]

    def run(*taken: Any) -> Tensor:
        now = list[Any](values)
        for i, x in zip(passed, taken, strict=True):
            now[i] = x
        out = function(*now)
        if torch.is_grad_enabled() and _has_own_backward(out):
            raise CaptureError("gradients flow through a backward of its own: it is no operator of the graph")
        return out

    graph = _traced(run, given, fakes)
    _refuse_constants(graph)
    for node, i in zip((n for n in graph.graph.nodes if n.op == "placeholder"), passed):
        _describe(node, values[i], given[passed.index(i)])
    with torch_private.quietly():
        finish(graph, lambda key, path: path, frame)
    captured = Captured(graph, "call", time.perf_counter() - start)
    return CapturedCall(captured, passed, wanted, flat, _guards(fakes, given, passed, flat, places, wanted))


def _fake(fakes: torch_private.CallFakes, x: Value, dims: Sequence[int]) -> Any:
    if not isinstance(x, Tensor):
        return fakes.number(x)
    made = fakes.tensor(x.detach(), dims)
    return made.requires_grad_(x.requires_grad and torch.is_grad_enabled())


def _traced(run: Callable[..., Tensor], given: Sequence[Any], fakes: torch_private.CallFakes) -> fx.GraphModule:
    try:
        with fakes.mode, torch.set_grad_enabled(torch.is_grad_enabled()), torch_private.quietly():
            return torch_private.pre_dispatch_graph(run, given)
    except CaptureError:
        raise
    except Exception as error:
        # Whatever the function does that no graph can hold: the caller runs it as it is.
        raise CaptureError(f"{type(error).__name__}: {first_line(error)}") from error


def _has_own_backward(out: Tensor) -> bool:
    """Does a backward that is written in Python stand behind a value?"""
    seen: set[object] = set()
    waiting: list[Any] = [out.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        if isinstance(step, BackwardCFunction):
            return True
        seen.add(step)
        waiting += [before for before, _ in step.next_functions]
    return False


def _refuse_constants(graph: fx.GraphModule) -> None:
    """A tensor that is no argument may be another one at the next call; numbers that the function writes are copied."""
    for n in graph.graph.nodes:
        if n.op == "get_attr" and any(op_name(u) not in ("lift_fresh", "lift_fresh_copy") for u in n.users):
            raise CaptureError("it reads a tensor that it is not given")


def _describe(node: fx.Node, value: Value, fake: Any) -> None:
    node.meta.setdefault("val", fake)
    if isinstance(value, nn.Parameter):
        node.meta[PARAMETER] = True
    if isinstance(fake, Tensor) and fake.requires_grad and not node.meta["val"].requires_grad:
        node.meta["val"].requires_grad_(True)


def _guards(
    fakes: torch_private.CallFakes, given: Sequence[Any], passed: Sequence[int], flat: tuple[int, ...],
    places: Sequence[SizeAt | None], opened: frozenset[SizeAt],
) -> Callable[[Sequence[Value], tuple[int, ...]], bool]:
    """What was a number in the trace is that number, open sizes are of their kind, and the trace's own guards hold."""
    if not opened:
        return lambda values, sizes: sizes == flat
    made = [given[passed.index(i)] if i in passed else n for i, n in _first_values(places, flat)]
    fixed = [i for i, n in enumerate(sizes_of(made)) if not isinstance(n, torch.SymInt)]
    octaves = {i: _OCTAVES if p[1] >= 0 else _OFFSET_OCTAVES for i, p in enumerate(places) if p is not None and p in opened}
    kinds = [(i, octave, flat[i].bit_length() // octave) for i, octave in octaves.items()]
    own, pick = fakes.guards(), itemgetter(*fixed, fixed[0])
    known = pick(flat)

    def holds(values: Sequence[Value], sizes: tuple[int, ...]) -> bool:
        return (
            len(sizes) == len(flat) and pick(sizes) == known and all(sizes[i].bit_length() // o == k for i, o, k in kinds)
            and own([values[i] for i in passed])
        )

    return holds


def _first_values(places: Sequence[SizeAt | None], flat: Sequence[int]) -> list[tuple[int, int]]:
    """Each value's number, once, with its integer where it is one."""
    out: dict[int, int] = {}
    for p, n in zip(places, flat):
        if p is not None:
            out.setdefault(p[0], n)
    return list(out.items())
