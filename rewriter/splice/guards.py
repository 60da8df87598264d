"""Guards: conditions on run-time data under which a chosen call is exact, and the original subgraph where they fail.

    before   y = call(q, k, v)
    after    y = guarded((q, k, v), …)      call where every condition holds and the kernel can run, else the original

Shapes, types and modes need no guard here: Dynamo captures anew when they change.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...patterns import expr as ex
from ...patterns.attention.recognise import Attention
from ...patterns.cascade import Cascade, Einsum, bind
from ...patterns.evaluate import evaluate
from ...patterns.expr import Expr
from ...patterns.masks.split import runtime_classify, split
from ..capture.autocast import no_autocast
from ..graph.aliases import Aliases

TILE = 64


@dataclass(frozen=True)
class Condition:
    """What must hold of the inputs: `holds(tensors by name, sizes by symbol)`."""

    sentence: str
    tensors: tuple[str, ...]
    sizes: tuple[str, ...]
    holds: Callable[[Mapping[str, Tensor], Mapping[str, int]], bool]


def every_row_keeps_a_key(c: Cascade, a: Attention) -> Condition:
    """Proved tile by tile from the mask and its run-time data; a row that is not proved to keep a key counts as empty.

    What the mask reads of the attention's prelude (a number of padded tokens) is computed for it.
    """
    keep = split(a.score, a.key).keep
    read = tuple(dict.fromkeys(str(x.attr) for x in ex.loads(keep)))
    before = _upstream(a.prelude, read)
    made = tuple(n for n in read if n in {e.out.tensor for e in before})
    given = dict.fromkeys(str(x.attr) for e in before for x in e.reads if str(x.attr) not in c.producers)
    names = (*(n for n in read if n not in made), *(n for n in given if n not in read))
    ranks = {r: c.rank[r].size for r in {*keep.ranks, a.query, a.key}}
    symbols = tuple(s for s in c.free_symbols)

    def holds(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
        known = bind_shapes(c, tensors, sizes)
        extents = {r: int(bind(n, known)) for r, n in ranks.items()}
        data = {n: tensors[n].detach() for n in names}
        if made:
            data |= evaluate(replace(c, einsums=before, outputs=made), data, known)
        return _rows_are_keyed(keep, a, extents, known, {n: data[n] for n in read})

    return Condition("every row keeps a key", names or (c.inputs[0].name,), symbols, holds)


def _upstream(einsums: Sequence[Einsum], names: Sequence[str]) -> tuple[Einsum, ...]:
    """Those of some Einsums in order that the named tensors depend on."""
    wanted, out = set(names), list[Einsum]()
    for e in reversed(einsums):
        if e.out.tensor in wanted:
            wanted |= {str(x.attr) for x in e.reads}
            out.append(e)
    return tuple(reversed(out))


def _rows_are_keyed(
    keep: Expr, a: Attention, extents: Mapping[str, int], sizes: Mapping[str, int], data: Mapping[str, Tensor]
) -> bool:
    on_device = any(t.device.type != "cpu" for t in data.values())
    arrays = data if on_device else {n: t.numpy() for n, t in data.items()}
    walk = runtime_classify(
        keep, query=a.query, key=a.key, extents=extents, symbols=sizes, tile_p=TILE, tile_m=TILE, arrays=arrays,
        xp=torch if on_device else np,
    )  # fmt: skip
    return bool(walk.certain.all())


def bind_shapes(c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """Symbols from what is at hand: given sizes, and dimensions of the tensors that are symbols themselves."""
    known = {k: int(v) for k, v in sizes.items()}
    for t in c.inputs:
        if t.name in tensors:
            for size, actual in zip(t.shape, tensors[t.name].shape):
                if not isinstance(size, int) and size.is_Symbol:
                    known.setdefault(str(size), int(actual))
    return known


class Guarded(nn.Module):
    """A call with its conditions and the original subgraph. `fallbacks` counts, by name, how often the original ran."""

    def __init__(
        self, name: str, target: Callable[..., Any], original: fx.GraphModule, conditions: Sequence[Condition]
    ) -> None:
        super().__init__()
        self.name, self.target, self.conditions = name, target, tuple(conditions)
        self.original = original
        self.fallbacks: Counter[str] = Counter()
        self.broken = ""
        self.lock = threading.Lock()

    def forward(
        self, arguments: Sequence[Any], inputs: Sequence[Any], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> Any:
        if not self.broken and all(c.holds(tensors, sizes) for c in self.conditions):
            try:
                return self.target(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # A vendor's compiler may fail on what its checks let through: the model must not.
                self.broken = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                )
                warnings.warn(f"reattend: {self.name} keeps the original code: {self.broken}", stacklevel=2)
        with self.lock:
            self.fallbacks[self.name] += 1
        # Every cast that autocast made is written in the subgraph.
        with no_autocast():
            return self.original(*inputs)


def original_subgraph(
    gm: fx.GraphModule, output: fx.Node, interior: frozenset[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The code of an attention as a module of its own, and the nodes that it reads.

    What shares memory with something outside and is written is no code to be run again: its value is read.

        before   q = linear(x); q.mul_(s); k = view(q)      after   given k

    None where such a value is written once more before the output, so that reading it late would differ.
    """
    aliases = Aliases(gm.graph)
    foreign = _written_outside(gm.graph, aliases, {*interior, output})
    inside = _needed(output, {*interior, output} - foreign)
    members = set(inside)
    outside = list(dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in members))
    reads = {i: min(aliases.position[n] for n in inside if i in n.all_input_nodes) for i in outside}
    if output in foreign or any(aliases.written_between(i, at - 1, output) for i, at in reads.items()):
        return None
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    for i, n in enumerate(outside):
        table[n] = graph.placeholder(f"given_{i}")
        table[n].meta = dict(n.meta)
    for n in inside:
        table[n] = graph.node_copy(n, table.__getitem__)
    graph.output(table[output])
    return fx.GraphModule(gm, graph, "Original"), outside


def _written_outside(graph: fx.Graph, aliases: Aliases, inside: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The nodes inside whose memory is written and is known outside: running them again would write, or read, it again."""
    shared = {aliases.storage(n) for n in graph.nodes if n not in inside}
    return frozenset(n for n in inside if aliases.is_written(n) and aliases.storage(n) in shared)


def _needed(output: fx.Node, members: Collection[fx.Node]) -> list[fx.Node]:
    """The members that the output rests on, and those that write what it reads, in the graph's order."""
    seen: set[fx.Node] = set()
    stack = [output]
    while stack:
        n = stack.pop()
        if n in members and n not in seen:
            seen.add(n)
            stack += n.all_input_nodes
    return [n for n in output.graph.nodes if n in seen]
