"""Ranges of run-time tensors: the least and greatest element of a padding mask or segment table over coordinate boxes.

Elements are reduced to blocks once, and blocks to runs of 2, 4, 8, … blocks (a sparse table), so any interval takes two
look-ups a dimension. Intervals that do not lie on blocks are read element by element where that is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from .arithmetic import LIMIT, Array, Span
from .intervals import native


def block_spans(arrays: Mapping[str, Array], blocks: Sequence[int] = (), xp: ModuleType = np) -> BlockSpans:
    """`of_load` for `classify` and `rows_with_key` from run-time tensors, exact for intervals on the given block sizes.

    `arrays` are numpy arrays or tensors of `xp`; tensors in host memory are read as numpy arrays when `xp` is numpy.
    Tensors that are not given stay unknown.
    """
    return BlockSpans({n: _host(a) if xp is np else a for n, a in arrays.items()}, tuple(blocks), xp)


def _host(array: Array) -> Array:
    """A numpy view of an array or of a tensor in host memory; types that numpy lacks are widened."""
    if isinstance(array, np.ndarray) or not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach()
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)


class BlockSpans:
    """Answers ranges over boxes and keeps its tables; make one per call, the tensors must not change meanwhile."""

    def __init__(self, arrays: Mapping[str, Array], blocks: tuple[int, ...], xp: ModuleType) -> None:
        self.arrays, self.blocks, self.xp = arrays, blocks, xp
        self.tables: dict[tuple[object, ...], tuple[Array, Array]] = {}

    def __call__(self, name: str, box: Sequence[Span]) -> Span | None:
        if name not in self.arrays:
            return None
        array = self.arrays[name]
        lows, highs, blocks = [], [], []
        for size, (lo, hi) in zip(array.shape, box):
            lo, hi = _clamp(lo, size, 0.0), _clamp(hi, size, size - 1.0)
            block = self._block(lo, hi, size)
            blocks.append(block)
            lows.append(lo // block if block else lo)
            highs.append(hi // block if block else hi)
        least, most = self._look_up(name, lows, highs, tuple(blocks))
        return _as_span(least, most, self.xp)

    def _block(self, lo: Array, hi: Array, size: int) -> int:
        """0 for single elements, else the largest block size that the intervals lie on."""
        if not (native(lo) and native(hi)):
            return 1
        if lo is hi or np.array_equal(lo, hi):
            return 0
        for block in sorted(self.blocks, reverse=True):
            if np.all(lo % block == 0) and np.all(((hi + 1) % block == 0) | (hi == size - 1)):
                return block
        return 1

    def _look_up(self, name: str, lows: list[Array], highs: list[Array], blocks: tuple[int, ...]) -> tuple[Array, Array]:
        least, most = self._blocked(name, blocks)
        # dimensions in which some interval is longer than a block
        wide = [d for d, (lo, hi) in enumerate(zip(lows, highs)) if blocks[d] and _differ(lo, hi)]
        if not wide:
            return self._gather(least, lows), self._gather(most, lows)
        if (name, blocks, tuple(wide)) not in self.tables and self._is_short(least, lows, highs, wide):
            return _read(least, most, lows, highs, wide[0])
        least, most = self._sparse(name, blocks, tuple(wide))
        levels, corners = [], [[lo, lo] for lo in lows]
        for d in wide:
            level = _log2(highs[d] - lows[d] + 1)
            levels.append(level)
            corners[d] = [lows[d], highs[d] + 1 - _power2(level)]
        out: tuple[Array, Array] | None = None
        for choice in range(1 << len(wide)):
            bit = {d: (choice >> i) & 1 for i, d in enumerate(wide)}
            at = [*levels, *(c[bit.get(d, 0)] for d, c in enumerate(corners))]
            low, high = self._gather(least, at), self._gather(most, at)
            out = (low, high) if out is None else (self._min(out[0], low), self._max(out[1], high))
        assert out is not None
        return out

    def _is_short(self, table: Array, lows: list[Array], highs: list[Array], wide: list[int]) -> bool:
        """Do the intervals hold fewer elements than the table, which a sparse one multiplies?"""
        if self.xp is not np or len(wide) > 1:
            return False
        count = math.prod(np.broadcast_shapes(*(x.shape for x in (*lows, *highs))))
        return count * (int((highs[wide[0]] - lows[wide[0]]).max()) + 1) <= int(table.size)

    def _gather(self, table: Array, at: list[Array]) -> Array:
        if self.xp is not np:
            at = [self.xp.as_tensor(i, device=table.device) for i in at]
        return table[tuple(at)]

    def _min(self, a: Array, b: Array) -> Array:
        return self.xp.minimum(a, b)

    def _max(self, a: Array, b: Array) -> Array:
        return self.xp.maximum(a, b)

    def _blocked(self, name: str, blocks: tuple[int, ...]) -> tuple[Array, Array]:
        """Least and greatest element of every block."""
        found = self.tables.get((name, blocks))
        if found is not None:
            return found
        array = self.arrays[name]
        if self.xp is not np and array.dtype == self.xp.bool:
            array = array.to(self.xp.uint8)
        least = most = array
        for d, block in enumerate(blocks):
            if block > 1:
                least, most = _reduced(least, d, block, self.xp, "amin"), _reduced(most, d, block, self.xp, "amax")
        self.tables[name, blocks] = least, most
        return least, most

    def _sparse(self, name: str, blocks: tuple[int, ...], wide: tuple[int, ...]) -> tuple[Array, Array]:
        """[levels of each wide dimension..., dimensions...]: extremes of 2^level consecutive blocks, cut at the end."""
        found = self.tables.get((name, blocks, wide))
        if found is not None:
            return found
        tables = []
        for table, join in zip(self._blocked(name, blocks), (self._min, self._max)):
            # innermost level axis first, so that the axes end up in the order of `wide`
            for done, d in enumerate(reversed(wide)):
                tables_d, axis = [table], d + done
                size = table.shape[axis]
                while (1 << len(tables_d)) <= size:
                    last = tables_d[-1]
                    shifted = np.minimum(np.arange(size) + (1 << (len(tables_d) - 1)), size - 1)
                    tables_d.append(join(last, _take(last, axis, shifted, self.xp)))
                table = self.xp.stack(tables_d)
            tables.append(table)
        self.tables[name, blocks, wide] = tables[0], tables[1]
        return tables[0], tables[1]


def _read(least: Array, most: Array, lows: list[Array], highs: list[Array], d: int) -> tuple[Array, Array]:
    """Extremes of intervals along one dimension, block by block."""
    length = int((highs[d] - lows[d]).max()) + 1
    at = [lo[..., None] for lo in lows]
    at[d] = np.minimum(lows[d][..., None] + np.arange(length), highs[d][..., None])
    return least[tuple(at)].min(-1), most[tuple(at)].max(-1)


def _clamp(x: Array, size: int, unknown: float) -> Array:
    """Coordinates inside the tensor; an unknown coordinate may be any."""
    if native(x):
        return np.clip(np.where(np.isnan(x), unknown, x), 0, size - 1).astype(np.int64)
    return x.nan_to_num(unknown).clamp(0, size - 1).long()


def _differ(lo: Array, hi: Array) -> bool:
    return not (native(lo) and native(hi)) or bool(np.any(lo != hi))


def _log2(n: Array) -> Array:
    if native(n):
        return np.frexp(n.astype(np.float64))[1] - 1
    return n.double().frexp()[1] - 1


def _power2(level: Array) -> Array:
    if native(level):
        return np.int64(1) << level.astype(np.int64)
    return 2 ** level.long()


def _reduced(array: Array, d: int, block: int, xp: ModuleType, how: str) -> Array:
    size = array.shape[d]
    count = -(-size // block)
    if count * block != size:
        # the last block repeats the last element
        array = _take(array, d, np.minimum(np.arange(count * block), size - 1), xp)
    array = array.reshape((*array.shape[:d], count, block, *array.shape[d + 1 :]))
    return getattr(array, how)(d + 1) if xp is not np else getattr(np, how)(array, axis=d + 1)


def _take(array: Array, axis: int, index: Array, xp: ModuleType) -> Array:
    if xp is np:
        return np.take(array, index, axis=axis)
    return array.index_select(axis, xp.as_tensor(index, device=array.device))


def _as_span(least: Array, most: Array, xp: ModuleType) -> Span:
    if native(least):
        if least.dtype == np.bool_:
            return least, most
        lo, hi = least.astype(np.float64), most.astype(np.float64)
        wide = least.dtype.itemsize == 8 and least.dtype.kind in "iu"
    else:
        lo, hi = least.double(), most.double()
        wide = least.dtype == xp.int64
    if wide:
        # integers that float64 does not count
        lo, hi = xp.where(lo < -LIMIT, -np.inf, lo), xp.where(hi > LIMIT, np.inf, hi)
        lo, hi = xp.where(lo > LIMIT, LIMIT, lo), xp.where(hi < -LIMIT, -LIMIT, hi)
    return lo, hi
