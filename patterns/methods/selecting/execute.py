"""A selection program on tensors: each step once, scores row by row of cells where nobody needs them whole.

    q [b, h, p, e]   k [b, g, m, e], h / g heads share keys   →   b1 [b, h, rows of cells, columns of cells]

torch comes as an argument: nothing here imports it. No step draws random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from . import steps as st
from .cells import Cells

# Elements of scores that are held at once where they are summed into coarser cells.
HELD = 1 << 22
Tensor = Any


@dataclass
class Execution:
    """One run. `scale`: of the model's own scores."""

    torch: ModuleType
    q: Tensor
    k: Tensor
    cells: Cells
    scale: float
    made: dict[st.SelectionStep, Tensor] = field(default_factory=dict)

    @property
    def group(self) -> int:
        return int(self.q.shape[1] // self.k.shape[1])

    def table(self, root: st.CellTable) -> Tensor:
        """The program's table, b1 [b, h, i, j]: no cell in which the model keeps no pair, no row of cells without one.

        A row of queries none of whose own keys lies in a kept cell gets all of its cells back (R3).
        """
        kept = self(root) & self.some(root)
        return kept | (self.some(root) & ~self.alive(root, kept))

    def alive(self, root: st.CellTable, kept: Tensor) -> Tensor:
        """[b, h, i, 1]: does every query of a row of cells that keeps a key in the model keep one in the table?"""
        one = self.cells.own_cells(1, root.keys)
        single = self.cells.some(1, root.keys) if root.rows > 1 else None
        if one is not None and single is not None and self._own_is_kept(root, kept):
            return kept.new_ones(*kept.shape[:3], 1)
        if single is None:
            return kept.any(-1, keepdim=True) | ~self.some(root).any(-1, keepdim=True)
        # a row of cells is alive where each of its queries is
        s = self.torch.from_numpy(single)
        out = kept.new_ones(*kept.shape[:3], 1)
        for i in range(kept.shape[2]):
            part = s[i * root.rows : (i + 1) * root.rows]
            has = part.any(-1)
            out[:, :, i] = ((kept[:, :, i : i + 1] & part).any(-1) | ~has).all(-1, keepdim=True)
        return out

    def _own_is_kept(self, root: st.CellTable, kept: Tensor) -> bool:
        """Does every query keep the cell of its own place, and the model that place?"""
        own, c = self.cells.own_cells(1, root.keys), self.cells
        if own is None or root.last or not c.sees_itself:
            return False
        at = self.torch.from_numpy(own[0])
        rows = self.torch.arange(c.queries) // root.rows
        return bool(kept[:, :, rows, at].all())

    def __call__(self, s: st.SelectionStep) -> Tensor:
        if s not in self.made:
            self.made[s] = self._make(s)
        return self.made[s]

    # what the model keeps

    def some(self, s: st.CellGrid) -> Tensor:
        """[i, j]"""
        return self.torch.from_numpy(self.cells.some(s.rows, s.keys, s.last))

    def _near(self, s: st.CellGrid, first: int, own: int) -> Tensor:
        """[i, j]: the first cells, and the own ones of every row with those before, together `own` wide at least."""
        i, j = self.cells.count(s.rows, s.keys, s.last)
        column = self.torch.arange(j)[None].expand(i, j)
        out = column < first
        places = self.cells.own_cells(s.rows, s.keys, s.last)
        if places is not None and own:
            low, high = (self.torch.from_numpy(x)[:, None] for x in places)
            out = out | ((column > self.torch.minimum(low, high - own + 1) - 1) & (column <= high))
        return out & self.some(s)

    # steps

    def _make(self, s: st.SelectionStep) -> Tensor:
        match s:
            case st.TokenRows():
                return self._operand(s)
            case st.Alike():
                return self._distance(s) < s.distance
            case st.Summed():
                return self._summed(s)
            case st.Scores():
                return self.part(s, 0, self.cells.count(s.rows, s.keys, s.last)[0])
            case st.CellTable():
                return self._table(s)
        raise TypeError(f"{type(s).__name__} is no step that can be run")

    def _operand(self, s: st.TokenRows) -> Tensor:
        t = self.torch
        match s:
            case st.Queries():
                return self.q
            case st.Keys():
                return self.k
            case st.Last():
                x = self(s.of)
                return x[:, :, max(0, x.shape[2] - s.rows) :]
            case st.GroupMean():
                x = self(s.of)
                mean = x.unflatten(1, (-1, self.group)).mean(2, keepdim=True)
                return mean.expand(-1, -1, self.group, -1, -1).flatten(1, 2)
            case st.Pooled():
                return t.cat([_pooled(t, self(s.of), s.size, how) for how in s.how], -1)
            case st.Folded():
                x = self(s.of)
                if s.shift:
                    # keys before the first one: the first itself
                    x = t.cat([x[:, :, :1].expand(-1, -1, s.shift, -1), x[:, :, : -s.shift]], 2)
                x = _padded(t, x, s.size, 0.0).unflatten(2, (-1, s.size))
                return (x.flip(3) if s.backwards else x).flatten(3)
            case st.Mapped():
                return t.einsum("bhie,heg->bhig", self(s.of).float(), t.as_tensor(s.weight.values).float())
            case st.Rotated():
                return _rotated(t, self(s.of), s.base)
        raise TypeError(f"{type(s).__name__} is no operand")

    def part(self, s: st.Scores, i0: int, i1: int) -> Tensor:
        """Rows i0 to i1 of scores: [b, h, i1 − i0, j]."""
        if s in self.made:
            return self.made[s][:, :, i0:i1]
        t = self.torch
        match s:
            case st.Products():
                return self._products(s, i0, i1)
            case st.RowSoftmax():
                x = self.part(s.of, i0, i1)
                return t.softmax(x.float(), -1).nan_to_num(0.0)
            case st.OverHeads():
                x = self.part(s.of, i0, i1)
                many = x.shape[1] if s.every else self.group
                x = x.unflatten(1, (-1, many))
                x = x.amax(2, keepdim=True) if s.how == "max" else x.mean(2, keepdim=True)
                return x.expand(-1, -1, many, -1, -1).flatten(1, 2)
            case st.Raised():
                x = self.part(s.of, i0, i1)
                return x.masked_fill(self._near(s, s.first, s.own)[i0:i1], t.inf)
            case st.Summed():
                return self(s)[:, :, i0:i1]
            case st.Offsets():
                return self._offsets(s)
            case st.Unit():
                return self._unit(s)[:, :, i0:i1]
        raise TypeError(f"{type(s).__name__} has no rows")

    def _unit(self, s: st.Unit) -> Tensor:
        x, some = self(s.of), self.some(s)
        over = (-1,) if s.scope == "row" else (-2, -1)
        low = x.masked_fill(~some, self.torch.inf).amin(over, keepdim=True)
        width = x.masked_fill(~some, -self.torch.inf).amax(over, keepdim=True) - low
        out = (x - low) / width.where(width > 0, self.torch.ones_like(width))
        return out.where(width > 0, self.torch.ones_like(out)).masked_fill(~some, -self.torch.inf)

    def _products(self, s: st.Products, i0: int, i1: int) -> Tensor:
        t = self.torch
        q, k, some = self(s.q), self(s.k), self.some(s)[i0:i1]
        scale = s.times * (self.scale if s.scale is None else s.scale)
        seen = some.any(0).nonzero()
        stop = int(seen[-1]) + 1 if len(seen) else 0
        out = t.full((*q.shape[:2], i1 - i0, some.shape[1]), -t.inf, dtype=t.float32)
        if s.odd is None:
            out[..., :stop] = self._times(q[:, :, i0:i1], k[:, :, :stop]).mul_(scale)
        else:
            for odd, keys in ((0, k), (1, self(s.odd))):
                begin = (odd - i0) % 2
                out[:, :, begin::2, :stop] = self._times(q[:, :, i0 + begin : i1 : 2], keys[:, :, :stop]).mul_(scale)
        return out.masked_fill_(~some, -t.inf)

    def _times(self, q: Tensor, k: Tensor) -> Tensor:
        """q [b, h, i, e] · k [b, g, j, e] in float32, a product for each head of keys."""
        b, h, i, e = q.shape
        g = k.shape[1]
        folded = q.float().reshape(b, g, h // g * i, e)
        return (folded @ k.float().mT).reshape(b, h, i, k.shape[2])

    def _summed(self, s: st.Summed) -> Tensor:
        """Cells summed into coarser ones, so many rows at a time that few scores are held."""
        t, of = self.torch, s.of
        i, j = self.cells.count(of.rows, of.keys, of.last)
        many = i if not s.to_rows else s.to_rows // of.rows
        wide = s.to_keys // of.keys
        step = max(1, HELD // max(1, j * self.q.shape[0] * self.q.shape[1] * many)) * many
        out = []
        for i0 in range(0, i, step):
            x = self.part(of, i0, min(i0 + step, i))
            for d, n in ((2, many), (3, wide)):
                if n > 1:
                    none = 0.0 if s.how == "sum" else -t.inf
                    x = _padded(t, x, n, none, d).unflatten(d, (-1, n))
                    x = x.sum(d + 1) if s.how == "sum" else x.amax(d + 1)
            out.append(x / many if s.mean else x)
        return t.cat(out, 2)

    def _offsets(self, s: st.Offsets) -> Tensor:
        x = self(s.of)
        c = self.cells
        own = c.own_cells(1, 1, s.last)
        if own is None:
            raise ValueError("offsets need rows that have a place among the keys")
        out = x.new_zeros(*x.shape[:2], c.keys)
        for r, at in enumerate(own[0].tolist()):
            # key `at − o` stands at offset o
            out[:, :, : at + 1] += x[:, :, r, : at + 1].flip(-1)
        return out[:, :, None]

    def _distance(self, s: st.Alike) -> Tensor:
        """√JS: Σ p log(p / m) with 0 · log 0 = 0, so that underflow is no NaN."""
        t = self.torch
        a, b = (x.double() / x.double().sum(-1, keepdim=True) for x in (self(s.a), self(s.b)))
        m = (a + b) / 2
        parts = [(t.xlogy(x, x) - t.xlogy(x, m)).sum((-1, -2)) for x in (a, b)]
        return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()

    def _table(self, s: st.CellTable) -> Tensor:
        t = self.torch
        match s:
            case st.Everything():
                return self.some(s).expand(*self.q.shape[:2], -1, -1)
            case st.Largest():
                return self._largest(self(s.of), s.count) & self._seen(s.of)
            case st.Mass():
                return self._mass(s)
            case st.Above():
                x, seen = self(s.of), self._seen(s.of)
                return (x >= s.threshold) & seen if s.threshold > 0 else seen.expand_as(x)
            case st.Spread():
                return self._spread(s)
            case st.Columns():
                return self(s.of).expand(-1, -1, -(-self.cells.queries // s.size), -1)
            case st.Slashes():
                return self._slashes(s)
            case st.Either():
                return self(s.of) | self(s.other)
            case st.Forced():
                return self(s.of) | self._near(s, s.first, s.own)
            case st.GroupUnion():
                x = self(s.of)
                return x.unflatten(1, (-1, self.group)).any(2).repeat_interleave(self.group, 1)
            case st.Chosen():
                return t.where(self(s.test)[..., None, None], self(s.of), self(s.other))
        raise TypeError(f"{type(s).__name__} is no table")

    def _seen(self, s: st.Scores) -> Tensor:
        """Cells that may be kept: [i, j] of the model's mask; of offsets, all that some row has."""
        if any(isinstance(x, st.Offsets) for x in st.walk(s)):
            return self.torch.ones((1, self.cells.keys), dtype=self.torch.bool)
        return self.some(s)

    def _largest(self, x: Tensor, count: int) -> Tensor:
        kept = self.torch.zeros_like(x, dtype=self.torch.bool)
        if count >= x.shape[-1]:
            return ~kept
        order = x.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return kept.scatter_(-1, order, True)

    def _mass(self, s: st.Mass) -> Tensor:
        t, seen = self.torch, self._seen(s.of)
        x = self(s.of)
        if s.share >= 1:
            return seen.expand_as(x)
        whole = x.where(seen, t.zeros((), dtype=x.dtype))
        flat = whole.flatten(2) if s.scope == "head" else whole
        ordered, order = flat.double().sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        chosen = before < s.share * ordered.sum(-1, keepdim=True)
        chosen |= t.arange(flat.shape[-1]) < s.least
        return t.zeros_like(chosen).scatter_(-1, order, chosen).view_as(x) & seen

    def _spread(self, s: st.Spread) -> Tensor:
        x = self(s.of)
        many = x.shape[2] if not s.to_rows else s.to_rows // s.of.rows
        for d, n in ((2, many), (3, s.to_keys // s.of.keys)):
            if n > 1:
                x = _padded(self.torch, x, n, False, d).unflatten(d, (-1, n)).any(d + 1)
        return x

    def _slashes(self, s: st.Slashes) -> Tensor:
        """Offset o crosses the cells from that of (first row, its place − o) to that of (last row, its place − o)."""
        t, c = self.torch, self.cells
        kept = self(s.of)[:, :, 0]
        running = t.nn.functional.pad(kept.to(t.int32).cumsum(-1, dtype=t.int32), (1, 0))
        p0, p1 = c.rows(s.size, 0)
        own = c.own_cells(1, 1)
        assert own is not None
        first, last = (t.from_numpy(own[0][np.asarray(p)])[:, None] for p in (p0, p1))
        column = t.arange(-(-c.keys // s.size))[None] * s.size
        # offsets between a query and a key of the cell: [first − the last key, last − the first key]
        low = (first - (column + s.size - 1).clamp(max=c.keys - 1)).clamp(0, c.keys)
        high = (last - column + 1).clamp(0, c.keys)
        return (running[..., high] - running[..., low]) > 0


def _padded(t: ModuleType, x: Tensor, size: int, value: float | bool, dim: int = 2) -> Tensor:
    short = -x.shape[dim] % size
    if not short:
        return x
    shape = [*x.shape]
    shape[dim] = short
    return t.cat([x, x.new_full(shape, value)], dim)


def _pooled(t: ModuleType, x: Tensor, size: int, how: str) -> Tensor:
    """[b, h, ⌈n / size⌉, e] in float32; the last one of those that are there."""
    n = x.shape[2]
    none = {"mean": 0.0, "max": -t.inf, "min": t.inf}[how]
    parts = _padded(t, x.float(), size, none).unflatten(2, (-1, size))
    if how != "mean":
        return parts.amax(3) if how == "max" else parts.amin(3)
    total = t.full((parts.shape[2], 1), float(size))
    total[-1] = n - (parts.shape[2] - 1) * size
    return parts.sum(3) / total


def _rotated(t: ModuleType, x: Tensor, base: float) -> Tensor:
    half = x.shape[-1] // 2
    turn = base ** -(t.arange(half, dtype=t.float32) / half)
    angle = t.arange(x.shape[2], dtype=t.float32)[:, None] * turn
    a, b = x[..., :half], x[..., half:]
    return t.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
