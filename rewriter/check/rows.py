"""Which positions of an output are held against the model's own code, so that they fit a budget.

    everything, where that fits     else, of the dimensions that save most: the first, the last, those with the fewest keys,
                                    and one at random of each of some equal stretches between
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .cut import CutProgram, cut
from .demand import Demand, Picked, everything, kept
from .own import Own, Uncheckable

# Positions that are kept of the dimension that saves most, then of the next ones.
KEPT = (64, 6, 4, 2, 2, 2)
# By how much fewer are kept, one after the other, where that does not fit.
FEWER = (1, 2, 4, 8, 32, 64)
# A float mask's values below this stand for "no key".
MASKED = -1e4


@dataclass(frozen=True)
class Budget:
    """What one check may take: bytes at a time, and FLOP, both computations together."""

    bytes: int
    flops: float

    def holds(self, p: CutProgram, gradients: bool) -> bool:
        factor = 3 if gradients else 1
        return (p.held_bytes if gradients else p.bytes) * factor <= self.bytes and p.flops * factor <= self.flops


FULL = Budget(24 << 20, 4e8)
SAMPLED = Budget(160 << 20, 8e9)
# Where no sample fits: the share of what the own code would hold whole that the least one may hold, and the most bytes.
SHARE, MOST = 8, 1 << 30


def fitting(own: Own, given: Sequence[object], generator: torch.Generator, gradients: bool = False) -> CutProgram:
    """The own code, whole or cut so far that it fits. Raises Uncheckable where no cut does."""
    shape = own.shape
    whole = cut(own, everything(shape))
    if FULL.holds(whole, gradients):
        return whole
    special, order, least = poor(given), _by_saving(own), whole
    for fewer in FEWER:
        wanted: list[Picked | None] = list(everything(shape))
        for d, few in zip(order, KEPT):
            wanted[d] = picked(shape[d], max(few // fewer, 1), special.get(shape[d], ()), generator)
            least = cut(own, tuple(wanted))
            if SAMPLED.holds(least, gradients):
                return least
    if Budget(min((whole.held_bytes if gradients else whole.bytes) // SHARE, MOST), SAMPLED.flops).holds(least, gradients):
        # what a model holds for each head or batch is large by itself: it is used to holding many times that
        return least
    raise Uncheckable(f"even a sample of it would take {least.bytes >> 20} MiB and {least.flops:.1g} FLOP")


@lru_cache(maxsize=16)
def _by_saving(own: Own) -> tuple[int, ...]:
    """The dimensions of the output, the one first whose cut leaves the least memory."""
    shape = own.shape

    def left(d: int) -> tuple[int, float]:
        wanted: Demand = tuple(tuple(range(min(2, n))) if i == d else None for i, n in enumerate(shape))
        p = cut(own, wanted)
        return p.held_bytes, p.flops

    return tuple(sorted((d for d, n in enumerate(shape) if n > 1), key=left))


def picked(size: int, few: int, special: Sequence[int], generator: torch.Generator) -> Picked | None:
    """Some positions of a dimension, in order; None for all."""
    if size <= few:
        return None
    ends = (0, size - 1) if few < 8 else (0, 1, size - 2, size - 1)
    chosen = dict.fromkeys([*ends, *special][: max(few // 2, 1)])
    count = few - len(chosen)
    draws = torch.rand(count, generator=generator).tolist()
    chosen |= dict.fromkeys(min(int((i + x) * size / count), size - 1) for i, x in enumerate(draws))
    return tuple(sorted(chosen))


def poor(given: Sequence[object]) -> Mapping[int, list[int]]:
    """Where few keys are kept, by the size of the dimension: positions at which masks among the inputs keep least.

    This only says where to look first; what is found there is compared as everywhere.
    """
    out: dict[int, list[int]] = {}
    for x in given:
        if isinstance(x, Tensor) and x.dim() and x.numel() > 1:
            for size, position in _poorest(x.detach()):
                held = out.setdefault(size, [])
                if position not in held:
                    held.append(position)
    return out


def _poorest(x: Tensor) -> Iterator[tuple[int, int]]:
    """Of a mask: the row that keeps least, as a position of each dimension, and the first column that it does not keep."""
    if x.is_floating_point():
        keep = x > MASKED
        if bool(keep.all()):
            return
    elif x.dtype in (torch.bool, torch.uint8, torch.int64, torch.int32):
        keep = x != 0
    else:
        return
    rows = keep.reshape(-1, keep.shape[-1]).sum(-1)
    least = int(rows.argmin())
    gone = ~keep.reshape(-1, keep.shape[-1])[least]
    if bool(gone.any()):
        yield x.shape[-1], int(gone.int().argmax())
        yield x.shape[-1], x.shape[-1] - 1 - int(gone.flip(0).int().argmax())
    for size in reversed(x.shape[:-1]):
        least, at = divmod(least, size)
        if size > 1:
            yield size, at


def said(p: CutProgram) -> str:
    """What was compared, in words: `in full`, or `64 of 4096 × 6 of 32`."""
    cuts = [f"{k} of {n}" for k, n in zip(kept(p.own.shape, p.wanted), p.own.shape) if k != n]
    return " × ".join(cuts) if cuts else "in full"
