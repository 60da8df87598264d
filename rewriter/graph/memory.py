"""Inputs of a graph that lie in the same memory: a write into one is seen in the others, and no node says so.

    a, b = cache, cache[:, :n]      two inputs; copy_(a, …) changes what is read of b
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

# In the metadata of an input: which memory it lies in, where another input lies there too. Numbers within one graph.
MEMORY = "reattend_memory"


def span(x: object) -> tuple[int, int] | None:
    """The bytes of a tensor's storage, first and behind the last; None of what has none that a plain tensor could share."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided or x.device.type == "meta":  # type: ignore[attr-defined]
        return None
    storage = x.untyped_storage()  # type: ignore[attr-defined]
    at, size = storage.data_ptr(), storage.nbytes()
    return (at, at + size) if size else None


def shared(values: Iterable[tuple[int, object]]) -> list[frozenset[int]]:
    """Those of some numbered values that lie in the same memory as another one, memory by memory."""
    spans = sorted((*s, i) for i, x in values if (s := span(x)) is not None)
    groups, end = list[list[int]](), -1
    for begin, behind, i in spans:
        if begin >= end:
            groups.append([])
        groups[-1].append(i)
        end = max(end, behind)
    return [frozenset(g) for g in groups if len(g) > 1]


def mark(placeholders: Sequence[fx.Node], values: Sequence[object]) -> None:
    """Note on a graph's inputs which of them share memory."""
    for number, group in enumerate(shared(enumerate(values))):
        for i in group:
            placeholders[i].meta[MEMORY] = number


@dataclass(frozen=True)
class Layout:
    """Which inputs share memory with those that a graph writes to, when it was rewritten. `watched` are inputs by number.

    Parameters are looked at when the graph is rewritten, and taken to keep to their memory.
    """

    written: frozenset[int]
    watched: tuple[int, ...]
    known: frozenset[frozenset[int]]

    def holds(self, values: Sequence[object]) -> bool:
        return self._of(values) == self.known

    def _of(self, values: Sequence[object]) -> frozenset[frozenset[int]]:
        return frozenset(g for g in shared((i, values[i]) for i in self.watched) if g & self.written)


def layout(written: Collection[int], values: Sequence[object]) -> Layout | None:
    """The layout of these inputs; None where nothing is written."""
    if not written:
        return None
    watched = tuple(i for i, x in enumerate(values) if i in written or not isinstance(x, nn.Parameter))
    empty = Layout(frozenset(written), watched, frozenset())
    return Layout(empty.written, watched, empty._of(values))
