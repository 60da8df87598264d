"""Tile counts of a plan, of masks as models write them, are those of the dense mask: in one to three dimensions, shifted, strided,
dilated and causal, from a formula, a constant buffer, or slice assignments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.sites.site import TileCounts
from tests.tiers import few

# By dimension: does a query at this coordinate keep a key at that one?
Kept = Callable[[Tensor, Tensor], Tensor]


def near(reach: int) -> Kept:
    return lambda q, k: (q - k).abs() <= reach


def shifted(back: int, ahead: int) -> Kept:
    return lambda q, k: (q - k <= back) & (k - q <= ahead)


def behind(reach: int) -> Kept:
    return lambda q, k: (k <= q) & (q - k < reach)


def blocks(size: int, offset: int = 0) -> Kept:
    return lambda q, k: (q + offset) // size == (k + offset) // size


def strided(size: int, reach: int) -> Kept:
    """The window of a query is that of the first of its group."""
    return lambda q, k: (k - q // size * size <= reach) & (q // size * size - k <= reach)


def dilated(step: int, reach: int) -> Kept:
    return lambda q, k: ((q - k) % step == 0) & ((q - k).abs() <= reach)


def every(q: Tensor, k: Tensor) -> Tensor:
    return q * 0 == k * 0


MASKS: dict[str, tuple[tuple[int, ...], tuple[Kept, ...]]] = {
    "window": ((1100,), (near(90),)),
    "window shifted": ((1100,), (shifted(200, 17),)),
    "window causal": ((1024,), (behind(150),)),
    "window strided": ((1024,), (strided(48, 100),)),
    "window dilated": ((1024,), (dilated(3, 240),)),
    "window strided and short": ((1024,), (strided(48, 20),)),
    "blocks": ((1000,), (blocks(130),)),
    "blocks shifted": ((1000,), (blocks(130, 65),)),
    "plane": ((30, 40), (near(4), near(6))),
    "plane shifted": ((32, 32), (shifted(9, 2), shifted(1, 12))),
    "plane strided": ((32, 32), (strided(4, 5), strided(8, 6))),
    "plane dilated": ((32, 32), (dilated(2, 8), near(5))),
    "plane of blocks": ((32, 32), (blocks(8), blocks(8))),
    "plane of blocks shifted": ((32, 32), (blocks(8, 4), blocks(8, 4))),
    "plane causal in rows": ((32, 32), (behind(6), every)),
    "cross of rows": ((24, 40), (every, near(0))),
    "video": ((6, 12, 16), (near(1), near(4), near(5))),
    "video causal in time": ((6, 12, 16), (behind(3), near(4), near(5))),
    "video shifted": ((6, 12, 16), (shifted(2, 0), shifted(5, 1), shifted(1, 7))),
    "video strided and dilated": ((4, 16, 16), (near(1), strided(4, 5), dilated(2, 6))),
}


def formula(lengths: Sequence[int], kept: Sequence[Kept]) -> Tensor:
    """The mask from positions, as tensor operators: [N, N]."""
    n = torch.arange(math.prod(lengths))
    out = torch.ones(1, 1, dtype=torch.bool)
    inner = math.prod(lengths)
    for size, keep in zip(lengths, kept, strict=True):
        inner //= size
        at = n // inner % size
        out = out & keep(at[:, None], at[None, :])
    return out


class Formula(nn.Module):
    def __init__(self, lengths: Sequence[int], kept: Sequence[Kept]) -> None:
        super().__init__()
        self.lengths, self.kept = lengths, kept

    def mask(self) -> Tensor:
        return formula(self.lengths, self.kept)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~self.mask(), -torch.inf)
        return torch.softmax(scores, -1) @ v


class Buffer(Formula):
    kept_mask: Tensor

    def __init__(self, lengths: Sequence[int], kept: Sequence[Kept]) -> None:
        super().__init__(lengths, kept)
        self.register_buffer("kept_mask", formula(lengths, kept))

    def mask(self) -> Tensor:
        return self.kept_mask


class Assigned(Formula):
    """Windows that do not overlap are numbered by slice assignments, as Swin numbers those of its shifted windows."""

    size, shift = 8, 4

    def mask(self) -> Tensor:
        numbers = torch.zeros(*self.lengths, dtype=torch.int64)
        cuts = (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None))
        for i, place in enumerate(itertools.product(cuts, repeat=len(self.lengths))):
            numbers[place] = i
        at = numbers.flatten()
        return at[:, None] == at[None, :]


def counted(model: nn.Module, n: int) -> TileCounts:
    """The tiles that a plan for a GPU counts for the kernel of ours."""
    q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
    plan = reattend.plan(model, (q, k, v), target="h200", policy=reattend.Policy(allow="reattend"))
    (site,) = plan.sites
    assert site.mask is not None
    assert site.mask.tiles is not None
    return site.mask.tiles


def brute_force(mask: Tensor, tile_p: int, tile_m: int) -> tuple[int, int]:
    """Tiles of the dense mask in which some key is kept, and in which every key is; those beyond its ends do not count."""
    n, m = mask.shape
    kept = full = 0
    for rows in torch.split(mask, tile_p):
        for tile in torch.split(rows, tile_m, 1):
            kept += int(tile.any())
            full += int(tile.all())
    assert n == m
    return kept, full


def check(model: Formula) -> None:
    mask = model.mask()
    found = counted(model, len(mask))
    kept, full = brute_force(mask, found.tile_p, found.tile_m)
    heads = found.total // (-(-len(mask) // found.tile_p) * -(-len(mask) // found.tile_m))
    assert heads in (1, 2)
    assert (found.visited, found.full) == (heads * kept, heads * full)


@pytest.mark.parametrize(
    ("kind", "name"), few([(k, n) for k in (Formula, Buffer) for n in MASKS], (Formula, "window dilated"), (Buffer, "plane shifted"))
)
def test_tiles_are_those_of_the_dense_mask(kind: type[Formula], name: str) -> None:
    check(kind(*MASKS[name]))


@pytest.mark.parametrize("lengths", few([[1000], [32, 40], [16, 16, 4 * 3]], [32, 40]))
def test_tiles_of_a_mask_written_slice_by_slice(lengths: list[int]) -> None:
    check(Assigned(lengths, ()))
