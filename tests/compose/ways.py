"""Every way to run a module: as the default policy has it, forced onto each candidate, and onto each body for the CPU.

One capture serves all ways of one draw: each rewrites a graph of its own, and `Ways.way` says which one runs. Most captures
leave Dynamo out, which would take most of the time: the function itself is traced to the graph that Dynamo's would give.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from reattend.codegen import operator as ours
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from reattend.rewriter.capture import capture
from reattend.rewriter.capture.weights import PARAMETER
from reattend.rewriter.check.verdicts import Check
from reattend.rewriter.choose import choose
from reattend.rewriter.choose.candidates import our_call
from reattend.rewriter.choose.policy import Policy
from reattend.rewriter.graph import torch_private
from reattend.rewriter.graph.liveness import erase_dead
from reattend.rewriter.graph.torch_private import FakeTensorMode
from reattend.rewriter.run import session
from reattend.rewriter.run.session import Session
from reattend.rewriter.splice import splice
from reattend.rewriter.splice.guards import Guarded

from .module import Composed

BODIES = {
    "product": TileMapping(16, 16, body="product"), "product-": TileMapping(128, 128, body="product"),
    "sdpa body": TileMapping(16, 16, body="sdpa"), "slices": TileMapping(32, 32, body="slices"),
    "fused": TileMapping(16, 32, body="fused"),
}
POLICIES = {
    "default": Policy(), "checked": Policy(check="first"),
    **{n: Policy(allow=n, deny="original") for n in ("sdpa", "flex", "reattend")},
    "checked reattend": Policy(allow="reattend", deny="original", check="first"),
    "checked sdpa": Policy(allow="sdpa", deny="original", check="first"),
}


@dataclass
class Rewritten:
    """One way's graph, what runs in it, and what went wrong while it was made."""

    run: Callable[..., Any]
    kernels: tuple[str, ...] = ()
    checks: list[Check] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    error: str = ""


class Ways:
    """The ways of one module. Set `way`, then call `run`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.way, self.captures = tuple(names), "original", list[Mapping[str, Rewritten]]()

    def run(self, *values: Tensor) -> Tensor:
        """The module's result by the way."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the module as it was."""

    def made(self, way: str) -> list[Rewritten]:
        return [c[way] for c in self.captures if way in c]

    def _keep(self, captured: capture.Captured) -> Mapping[str, Rewritten]:
        graphs = {way: _copied(captured.graph) for way in self.names}
        table = {way: _rewritten(graph, way) for way, graph in graphs.items()}
        self.captures.append(table)
        return table


class ByDynamo(Ways):
    """As `reattend.optimize` has it: a session whose backend keeps a graph of each way."""

    def __init__(self, model: Composed, names: Sequence[str]) -> None:
        super().__init__(names)
        self.model, self.session = model, Session(Policy(), None, backend=self._backend)
        self.session.install(model)

    def run(self, *values: Tensor) -> Tensor:
        out: Tensor = self.model(*values)
        return out

    def close(self) -> None:
        self.session.detach()

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str]) -> Callable[..., Any]:
        table = self._keep(capture.from_dynamo(gm, inputs, names))

        def run(*values: Any) -> Any:
            # as a session's own graphs are counted
            session._running.pieces = getattr(session._running, "pieces", 0) + 1
            return gm.forward(*values) if self.way == "original" else table[self.way].run(*values)

        return run


class Traced(Ways):
    """The module's function traced at the sizes and types of these values; parameters come behind the inputs."""

    def __init__(self, model: Composed, names: Sequence[str], values: Sequence[Tensor]) -> None:
        super().__init__(names)
        self.model = model
        self.table = self._keep(capture.Captured(self._traced(values), "traced", 0.0))

    def run(self, *values: Tensor) -> Tensor:
        if self.way == "original":
            return self.model.attend(values, self.model.w)
        out: Tensor = self.table[self.way].run(*values, *self.model.w.values())
        return out

    def _traced(self, values: Sequence[Tensor]) -> fx.GraphModule:
        count, own = len(values), list(self.model.w.values())
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x, static_shapes=True) for x in (*values, *own)]

        def attend(*given: Tensor) -> Tensor:
            return self.model.attend(given[:count], dict(zip(self.model.weights, given[count:])))

        with mode:
            graph = torch_private.pre_dispatch_graph(attend, fakes)
        places = [n for n in graph.graph.nodes if n.op == "placeholder"]
        for n, x in zip(places, (*values, *own)):
            if x.requires_grad:
                capture._mark(n.meta["val"])
            if isinstance(x, nn.Parameter):
                n.meta[PARAMETER] = True
        capture.finish(graph, lambda key, path: path)
        return graph


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same attributes."""
    graph = fx.Graph()
    out = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(out, tuple)
    node = graph.output(out[0])
    node.meta = copy.copy(out[1].meta)
    return fx.GraphModule(gm, graph)


def _rewritten(gm: fx.GraphModule, way: str) -> Rewritten:
    made = Rewritten(gm.forward)
    try:
        if way in BODIES:
            made.kernels = _forced(gm, BODIES[way])
        else:
            plan = choose.rewrite(capture.Captured(gm, "dynamo", 0.0), choose.Request(POLICIES[way]), made.checks)
            made.kernels = tuple(s.choice for s in plan.sites)
            made.error = next((m.reason for m in plan.misses if "report" in m.reason), "")
    except Exception as error:
        made.error = f"{type(error).__name__}: {error}"
    for m in gm.modules():
        if isinstance(m, Guarded):
            m.fallbacks = made.fallbacks
    made.run = gm.forward
    return made


def _forced(gm: fx.GraphModule, mapping: TileMapping) -> tuple[str, ...]:
    """Every attention of a graph by one body of our kernel; those that it cannot take keep their own code."""
    erase_dead(gm)
    decisions, _ = choose.decide(gm, choose.Request(POLICIES["reattend"]))
    out = []
    for d in decisions:
        call = None
        if "reattend" in d.calls:
            kernel = ours.build(d.found.cascade, mapping, "cpu")
            call = None if isinstance(kernel, Refusal) else our_call(d.found.cascade, mapping)
        if call is not None:
            splice.replace(gm, d.found.output, d.found.tensors, d.found.scalars, call, name=d.site.name)
        out.append("original" if call is None else "reattend")
    splice.finish(gm)
    return tuple(out)


def of(number: int, gradients: bool, *, flex: bool = False, fused: bool = False) -> tuple[str, ...]:
    """The ways of a draw: the policies take turns, with the net and without; what compiles runs where it is asked for.

    The operator that a body is put in by hand with has no backward: where gradients are wanted, policies alone are ways.
    """
    policies = ("default", "sdpa", "reattend")
    checked, plain = ("checked", "checked sdpa", "checked reattend")[number % 3], policies[number // 3 % 3]
    if gradients:
        ways = dict.fromkeys((checked if number % 3 < 2 else "checked", "sdpa", plain))
    else:
        ways = dict.fromkeys((checked, plain, "product", "product-" if number % 4 == 0 else "sdpa body", "slices"))
        ways |= {"fused": None} if fused else {}
    return (*ways, *(("flex",) if flex else ()))
