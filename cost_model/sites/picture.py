"""A mask as a picture: the class of every tile as runs of a row, coarsened until a page can carry it.

    "e3 p1 f7"    three empty cells, one partial, seven full, from the first key on
    cell          scale × scale tiles, classified as one: empty or full where all of its points are, else partial
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade
from ...patterns.mapping import TileMapping
from ...patterns.masks.tiles import KeyRun
from ...patterns.verdict import Obstacle
from ..count.tiles import NOTHING, Data
from ..operations import Sizes, size_int
from ..time.predict import tiles_of

# Cells of a side, and characters of all layers together, beyond which a picture is made coarser.
SIDE = 1024
CHARACTERS = 60_000
# Never coarser than this many cells a side; batch entries that differ are drawn up to so many.
SMALLEST, LAYERS = 16, 8
LETTERS = "epf"


@dataclass(frozen=True)
class Layer:
    """The cells of some batch entries: `label` names them, `rows` has one text of runs a row of cells."""

    label: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """Tile classes of a mask for drawing. A cell is `cell_p` queries by `cell_m` keys, `scale` tiles a side.

    `omitted` counts the batch entries that differ from all layers and are not drawn.
    """

    cell_p: int
    cell_m: int
    queries: int
    keys: int
    scale: int
    layers: tuple[Layer, ...]
    omitted: int = 0


def picture(c: Cascade, tiling: TileMapping, sizes: Mapping[str, int], data: Data = NOTHING) -> Picture | None:
    """The picture of an attention's mask as a mapping walks it; None where nothing is masked or a size has no value.

    Cells are classified themselves, so that a picture costs as much as its cells, however long the sequence.
    """
    view = attention(c)
    if isinstance(view, Obstacle):
        return None
    try:
        extent = {r: size_int(n) for r, n in Sizes(view.cascade, sizes).rank.items()}
    except ValueError:
        return None
    sides = extent[view.query] / tiling.tile_p, extent[view.key] / tiling.tile_m
    scale = 1 << max(0, math.ceil(math.log2(max(*sides, 1) / SIDE)))
    while True:
        tile = replace(tiling, tile_p=tiling.tile_p * scale, tile_m=tiling.tile_m * scale)
        jobs = tiles_of(c, tile, sizes, data)
        if isinstance(jobs, Obstacle) or jobs.map is None:
            return None
        tiles = jobs.map
        wide, high = -(-tiles.keys // tile.tile_m), -(-tiles.queries // tile.tile_p)
        rows = [_row(runs, tile.tile_m, wide) for runs in tiles.runs()]
        where = np.ndindex(*(extent[r] for r in tiles.batch))
        names = [" ".join(f"{r}={i}" for r, i in zip(tiles.batch, at)) for at in where]
        layers, omitted = _layers(names, rows, high)
        if sum(len(row) for layer in layers for row in layer.rows) <= CHARACTERS or max(wide, high) <= SMALLEST:
            return Picture(tile.tile_p, tile.tile_m, tiles.queries, tiles.keys, scale, layers, omitted)
        scale *= 2


def _row(runs: Sequence[KeyRun], cell: int, wide: int) -> str:
    """The cells of a row of `wide`, those between its runs empty."""
    out: list[str] = []
    at = 0
    for r in runs:
        start, stop = r.start // cell, -(-r.stop // cell)
        if start > at:
            out.append(f"e{start - at}")
        out.append(f"{LETTERS[r.kind]}{stop - start}")
        at = stop
    if at < wide:
        out.append(f"e{wide - at}")
    return " ".join(out)


def _layers(names: Sequence[str], rows: Sequence[str], high: int) -> tuple[tuple[Layer, ...], int]:
    """One layer for all batch entries that look alike, in order of appearance; how many are left out."""
    members: dict[tuple[str, ...], list[str]] = {}
    for i, name in enumerate(names):
        members.setdefault(tuple(rows[i * high : (i + 1) * high]), []).append(name)
    found = [Layer(_label(alike), texts) for texts, alike in members.items()]
    return tuple(found[:LAYERS]), sum(map(len, list(members.values())[LAYERS:]))


def _label(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
