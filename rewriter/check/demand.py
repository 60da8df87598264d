"""What of a tensor is wanted: for each dimension some of its positions, or all.

    demand    ((0, 7, 4095), None)      rows 0, 7 and 4095, every column
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Picked = tuple[int, ...]
Demand = tuple[Picked | None, ...]


def everything(shape: Sequence[int]) -> Demand:
    return (None,) * len(shape)


def kept(shape: Sequence[int], demand: Demand) -> list[int]:
    """The shape of what is wanted."""
    return [n if d is None else len(d) for n, d in zip(shape, demand, strict=True)]


def joined(a: Demand, b: Demand) -> Demand:
    """What serves two readers: a dimension of which they want different positions is wanted whole."""
    return tuple(x if x == y else None for x, y in zip(a, b, strict=True))


def pick(value: Tensor, have: Demand, want: Demand) -> Tensor:
    """The wanted positions of a value that has those of `have`."""
    for d, (h, w) in enumerate(zip(have, want, strict=True)):
        if w is not None and h is None:
            value = value.index_select(d, positions(w, value))
        elif h != w:
            raise ValueError("positions are wanted that were left out")
    return value


def positions(picked: Picked, like: Tensor) -> Tensor:
    return torch.tensor(picked, dtype=torch.int64, device=like.device)


def groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions of a reshape that go together.

        [2, 3, 20] → [6, 4, 5]      ([0, 1], [0]), ([2], [1, 2])

    What is left at the end has one element and is left out.
    """
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs, a, b = [i], [j], before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                ins.append(i)
                a, i = a * before[i], i + 1
            else:
                outs.append(j)
                b, j = b * after[j], j + 1
        yield ins, outs


def ravelled(shape: Sequence[int], demand: Sequence[Picked | None]) -> Picked | None:
    """The wanted positions of some dimensions as positions of all of them laid out in one; None for all."""
    if all(d is None for d in demand):
        return None
    out = [0]
    for n, d in zip(shape, demand, strict=True):
        out = [x * n + i for x in out for i in (range(n) if d is None else d)]
    return tuple(out)


def unravelled(picked: Picked, shape: Sequence[int]) -> list[Picked]:
    """The positions in each of some dimensions of positions of all of them laid out in one."""
    step = math.prod(shape)
    out: list[Picked] = []
    for n in shape:
        step //= max(n, 1)
        out.append(tuple(x // max(step, 1) % n for x in picked))
    return out
