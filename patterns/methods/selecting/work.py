"""What a selection costs, counted from its steps and sizes: each step once, whatever reads it.

    products   2 · e flops a cell that is computed (columns past the mask's last one are not)
    others     what they read and write in float32
"""

from __future__ import annotations

from dataclasses import dataclass

from ..method import SelectionWork
from . import steps as st
from .cells import Cells


@dataclass(frozen=True)
class SelectionSizes:
    """Sizes of the attention that a selection is made for: batch, heads, heads of keys, the length of a head."""

    batch: int
    heads: int
    key_heads: int
    depth: int
    element_bytes: int = 4


def count(root: st.SelectionStep, cells: Cells, x: SelectionSizes) -> SelectionWork:
    """The work of a program."""
    parts = [_step(s, cells, x) for s in st.walk(root)]
    return SelectionWork(
        sum(w.flops for w in parts), sum(w.bytes for w in parts), sum(w.exps for w in parts), sum(w.sorted for w in parts),
        sum(w.kernels for w in parts),
    )


def _step(s: st.SelectionStep, c: Cells, x: SelectionSizes) -> SelectionWork:
    match s:
        case st.Queries() | st.Keys() | st.Last():
            return SelectionWork()
        case st.TokenRows():
            read, written = (_elements(o, c, x) for o in (next(r for r in s.reads if isinstance(r, st.TokenRows)), s))
            flops = 2.0 * read * depth(s, x) if isinstance(s, st.Mapped) else 0.0
            return SelectionWork(flops, bytes=x.element_bytes * read + 4.0 * written, kernels=1)
        case st.Alike():
            n = _grid(s.a, c, x)
            return SelectionWork(exps=4 * n, bytes=8 * n, kernels=4)
        case st.Products():
            n, computed = _grid(s, c, x), _computed(s, c) * x.batch * x.heads
            read = _elements(s.q, c, x) + _elements(s.k, c, x)
            return SelectionWork(2.0 * computed * depth(s.q, x), x.element_bytes * read + 8.0 * n, kernels=3)
        case st.Unit():
            return SelectionWork(bytes=24 * _grid(s, c, x), kernels=6)
        case st.RowSoftmax():
            n = _grid(s, c, x)
            return SelectionWork(exps=n, bytes=8 * n, kernels=2)
        case st.Summed() | st.Spread():
            read = _grid(s.of, c, x)
            return SelectionWork(bytes=4 * (read + _grid(s, c, x)), kernels=2)
        case st.Largest() | st.Mass():
            n = _grid(s, c, x)
            return SelectionWork(sorted=n, bytes=40 * n, kernels=4)
        case st.CellGrid():
            n = _grid(s, c, x)
            return SelectionWork(bytes=8 * n, kernels=1)
    raise TypeError(f"{type(s).__name__} is not counted")


def depth(o: st.TokenRows, x: SelectionSizes) -> int:
    """The length of an operand's row."""
    match o:
        case st.Pooled():
            return depth(o.of, x) * len(o.how)
        case st.Folded():
            return depth(o.of, x) * o.size
        case st.Mapped():
            return int(o.weight.values.shape[2])
        case st.Last() | st.Rotated() | st.GroupMean():
            return depth(o.of, x)
    return x.depth


def _elements(o: st.TokenRows, c: Cells, x: SelectionSizes) -> float:
    queries = any(isinstance(s, st.Queries) for s in st.walk(o))
    tokens = c.queries if queries else c.keys
    last = next((s.rows for s in st.walk(o) if isinstance(s, st.Last)), tokens)
    heads = x.heads if queries else x.key_heads
    return float(x.batch * heads * -(-min(tokens, last) // o.unit) * depth(o, x))


def _grid(s: st.CellGrid, c: Cells, x: SelectionSizes) -> float:
    rows, columns = c.count(s.rows, s.keys, s.last)
    return float(x.batch * x.heads * rows * columns)


def _computed(s: st.Products, c: Cells) -> float:
    """Cells up to the last column that some row of a piece sees: what `Execution.part` computes, at its finest."""
    some = c.some(s.rows, s.keys, s.last)
    columns = some.shape[1]
    last = columns - some[:, ::-1].argmax(1)
    return float((last * some.any(1)).sum())
