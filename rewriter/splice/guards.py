"""Guards: conditions on run-time data under which a chosen call is exact, and the original subgraph where they fail.

    before   y = call(q, k, v)
    after    y = guarded((q, k, v), …)      call where every condition holds and the kernel can run, else the original

Shapes, types and modes need no guard here: Dynamo captures anew when they change.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from ..check.watch import REPORT, Watch
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
    """A call with its conditions and the original subgraph. `fallbacks` counts, by name, how often the original ran.

    A call that raises, or whose result the `watch` finds to differ from the original's, is not made again.
    """

    def __init__(
        self, name: str, target: Callable[..., Any], original: fx.GraphModule, conditions: Sequence[Condition],
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.target, self.conditions, self.watch = name, target, tuple(conditions), watch
        self.original = original
        self.fallbacks: Counter[str] = Counter()
        self.broken = ""
        self.lock = threading.Lock()

    def forward(
        self, arguments: Sequence[Any], inputs: Sequence[Any], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> Any:
        if not self.broken and all(c.holds(tensors, sizes) for c in self.conditions):
            out = self._attempt(arguments, inputs)
            if not self.broken:
                return out
            if self.watch is not None and self.watch.refuse is not None:
                raise self.watch.refuse(f"{self.name}: keeps the original code: {self.broken}")
            warnings.warn(f"reattend: {self.name} keeps the original code: {self.broken}: {REPORT}", stacklevel=2)
        with self.lock:
            self.fallbacks[self.name] += 1
        # Every cast that autocast made is written in the subgraph.
        with no_autocast():
            return self.original(*inputs)

    def _attempt(self, arguments: Sequence[Any], inputs: Sequence[Any]) -> Any:
        """The call's result; `broken` says why it must not be used."""
        try:
            out = self.target(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # A vendor's compiler may fail on what its checks let through: the model must not.
            lines = str(error).strip().splitlines()
            self.broken = f"{type(error).__name__}: {lines[0] if lines else ''}"
            if self.watch is not None:
                self.watch.raised(self.broken)
            return None
        if self.watch is not None:
            self.broken = self.watch(self.original, self.target, arguments, inputs, out)
        return out


def original_subgraph(
    gm: fx.GraphModule, output: fx.Node, interior: frozenset[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The code of an attention as a module of its own, and the nodes that it reads.

    None where a part of it is written in place from outside, so that running it later would differ.
    """
    aliases = Aliases(gm.graph)
    inside = [n for n in gm.graph.nodes if n in interior or n is output]
    members = set(inside)
    if any(aliases.is_written(n) and any(w not in members for w in aliases.writers(n)) for n in inside):
        return None
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    outside = list(dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in members))
    for i, n in enumerate(outside):
        table[n] = graph.placeholder(f"given_{i}")
        table[n].meta = dict(n.meta)
    for n in inside:
        table[n] = graph.node_copy(n, table.__getitem__)
    graph.output(table[output])
    return fx.GraphModule(gm, graph, "Original"), outside
