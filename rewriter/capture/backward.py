"""What a graph does to the gradients that flow back through it and a trace of it does not record.

A trace records the operators of the forward pass, and their own derivatives are those of the graph. A backward pass that is
written in Python (`torch.autograd.Function`) and a hook on a tensor are in no operator; the autograd graph of the values
that are traced has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from ..graph import torch_private

_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


class GradientWatch:
    """Follows the autograd graph of the values while they are traced: which calls have a backward or a hook of their own."""

    def __init__(self) -> None:
        self.found: list[tuple[fx.Node, str]] = []
        self._hooked: set[int] = set()
        # Held for as long as the trace lasts, so that no identity is used twice.
        self._seen: set[object] = set()
        self._tensors: list[Tensor] = []

    def call(self, n: fx.Node, given: object, run: Callable[[], Any]) -> Any:
        """Run one call of the graph. `given`: its arguments, which it may write to."""
        if torch_private.is_own_function(n.target):
            with _HooksSet() as hooks:
                made = run()
            if hooks.any:
                self.found.append((n, "a hook"))
            if torch.is_grad_enabled() and _wants(given) and not all(map(_wants, _floating(made))):
                # A backward that gives nothing leaves no step behind.
                self.found.append((n, "what may be a backward"))
        else:
            made = run()
        for x in torch_private.tree_leaves((made, given)):
            if isinstance(x, Tensor):
                self._look(n, x)
        return made

    def _look(self, n: fx.Node, x: Tensor) -> None:
        if torch_private.has_hooks(x) and id(x) not in self._hooked:
            self._hooked.add(id(x))
            self._tensors.append(x)
            self.found.append((n, "a hook"))
        waiting: list[Any] = [x.grad_fn]
        while waiting:
            step = waiting.pop()
            if step is None or step in self._seen:
                continue
            self._seen.add(step)
            waiting += [before for before, _ in step.next_functions]
            if isinstance(step, BackwardCFunction):
                self.found.append((n, "a backward"))

    def lost(self, graph: fx.GraphModule) -> str:
        """The first thing in a sentence that the trace does not carry; empty where it carries all."""
        recorded = {target for n in _calls(graph) for target in (n.target, torch_private.packet(n.target))}
        # An operator that is recorded brings its own backward with it.
        lost = ((n, what) for n, what in self.found if what == "a hook" or n.target not in recorded)
        return next((_sentence(n, what) for n, what in lost), "")


def _floating(values: object) -> list[Tensor]:
    return [x for x in torch_private.tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


def _wants(values: object) -> bool:
    return any(x.requires_grad for x in _floating(values))


def inside(gm: fx.GraphModule) -> str:
    """The same for the bodies of a graph's operators (checkpointed regions, branches), whose values nobody follows."""
    own = set(gm.graph.nodes)
    for n in _calls(gm):
        if n not in own and torch_private.has_backward(n.target):
            return _sentence(n, "a backward")
        if n not in own and torch_private.is_own_function(n.target):
            return _sentence(n, "what may be a backward")
    return ""


def _calls(gm: fx.GraphModule) -> Iterable[fx.Node]:
    graphs = (m.graph for m in gm.modules() if isinstance(m, fx.GraphModule))
    return (n for graph in graphs for n in graph.nodes if n.op in ("call_function", "call_method"))


def _sentence(n: fx.Node, what: str) -> str:
    name = str(getattr(n.target, "__name__", n.target))
    return f"gradients flow through {what} of its own inside it ({name}): it is no operator of the graph"


class _HooksSet(TorchFunctionMode):
    """Says whether a hook is set on any tensor, those that nobody else sees among them."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any |= getattr(func, "__name__", "") in _HOOKS
        return func(*args, **(kwargs or {}))
