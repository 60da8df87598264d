"""A site's own code, ready to run again: without writes in place where possible, with fake values at the sizes at hand.

Identical layers share it: it is read once for a text and the sizes and types of what is given.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.templates import OPEN
from ..graph.aliases import Aliases
from ..graph.liveness import erase_dead, is_pure
from ..graph.node import op_name
from ..graph.same import said
from ..graph.torch_private import FakeTensorMode, OpOverload, schema, tree_leaves


class Uncheckable(RuntimeError):
    """A site whose own code cannot be run again beside the rewritten one; the sentence says why."""


@dataclass(frozen=True, eq=False)
class Own:
    """A site's own code: its graph without writes in place where that can be had, and fake values at the sizes at hand."""

    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    written: bool

    @property
    def output(self) -> fx.Node:
        (out,) = (n for n in self.graph.nodes if n.op == "output")
        answer = out.args[0]
        assert isinstance(answer, fx.Node)
        return answer

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[self.output].shape)


def one_output(gm: fx.GraphModule, i: int) -> fx.GraphModule:
    """The own code of one of several outputs, which reads all that is given."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {})[i])  # type: ignore[index]
    made = fx.GraphModule(gm, graph, "One")
    erase_dead(made)
    return made


def read(gm: fx.GraphModule, given: Sequence[Any]) -> Own:
    """The own code of a site for these inputs. Raises Uncheckable where running it again would change something."""
    at = _key(gm.graph, given)
    with _lock:
        if at in _known:
            _known.move_to_end(at)
            return _known[at]
    graph, written = _without_writes(gm.graph)
    for n in graph.nodes:
        if n.op not in ("placeholder", "output") and not _repeatable(n):
            raise Uncheckable(f"{op_name(n)} draws random numbers, or is not known to compute its value alone")
    own = Own(graph, _carried(graph, given) or _fakes(gm, graph, given), written)
    with _lock:
        _known[at] = own
        while len(_known) > KEPT:
            _known.popitem(last=False)
    return own


# Texts of own code that are kept, by what they say and what they are given: those of one model's kinds of layers.
KEPT = 16
_known: OrderedDict[object, Own] = OrderedDict()
_lock = threading.Lock()


def _key(graph: fx.Graph, given: Sequence[Any]) -> object:
    """What own code says, whatever its nodes are called, and the metadata of what it is given."""
    return said(graph), tuple(map(_metadata, given))


def _metadata(x: Any) -> object:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), repr(x))


def _repeatable(n: fx.Node) -> bool:
    pure = is_pure(n)
    if pure or n.op != "call_function" or not isinstance(n.target, OpOverload):
        return pure
    # A write in place that is left is into memory of the graph's own.
    return schema(n.target).is_mutable and torch.Tag.nondeterministic_seeded not in n.target.tags


def _carried(graph: fx.Graph, given: Sequence[Any]) -> dict[fx.Node, Any]:
    """The fake values that a graph's nodes carry from its capture; none where that had other inputs, or open sizes."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    values = {n: n.meta["val"] for n in graph.nodes if "val" in n.meta and n.op != "output"}
    if len(values) != len(graph.nodes) - 1 or any(_is_open(x) for v in values.values() for x in tree_leaves(v)):
        return {}
    alike = all(_metadata(values[n]) == _metadata(x) for n, x in zip(places, given, strict=True))
    return values if alike else {}


def _is_open(x: Any) -> bool:
    if isinstance(x, Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*x.shape, *x.stride()))
    return isinstance(x, OPEN)


def _fakes(gm: fx.GraphModule, graph: fx.Graph, given: Sequence[Any]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        fakes = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in given]
        runner = Record(gm, graph=graph, garbage_collect_values=False)
        runner.extra_traceback = False
        runner.run(*fakes)
    return values


def _without_writes(graph: fx.Graph) -> tuple[fx.Graph, bool]:
    """A copy in which `s.masked_fill_(m, f)` reads `t = s.masked_fill(m, f)`, and whether writes are left.

    Raises Uncheckable for a write into what is given.
    """
    aliases = Aliases(graph)
    writes = [n for n in graph.nodes if is_write(n)]
    homes = {aliases.storage(n) for n in writes}
    shared = [n for n in graph.nodes if aliases.storage(n) in homes]
    if any(n.op == "placeholder" for n in shared):
        raise Uncheckable("it writes into its inputs")
    whole = {*writes, *{aliases.storage(n): n for n in reversed(shared)}.values()}
    last = {aliases.storage(n): aliases.position[n] for n in writes}
    # a view that is taken when all is written shows the newest value
    plain = all(n in whole or aliases.position[n] > last[aliases.storage(n)] for n in shared)
    plain = plain and all(_functional(n) for n in writes)
    out, table, newest = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()
    for n in graph.nodes:
        made = out.node_copy(n, lambda x: newest.get(aliases.storage(x), table[x]) if plain and x in whole else table[x])
        table[n] = made
        if plain and n in whole:
            newest[aliases.storage(n)] = made
            if is_write(n):
                made.target = _functional(n) or made.target
    return out, bool(writes) and not plain


def is_write(n: fx.Node) -> bool:
    return n.op == "call_function" and isinstance(n.target, OpOverload) and schema(n.target).is_mutable


def _functional(n: fx.Node) -> OpOverload | None:
    """The operator that answers what this one writes; None where there is no such."""
    assert isinstance(n.target, OpOverload)
    name = schema(n.target).name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, schema(n.target).overload_name or "default", None)
