"""A mask as a picture: the class of every tile as runs of a row, coarsened until a page can carry it.

    "e3 p1 f7"    three empty cells, one partial, seven full, from the first key on
    cell          scale × scale tiles, classified as one: empty or full where all of its points are, else partial
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..patterns.cascade import Cascade
from ..patterns.mapping import Mapping as Tiling
from ..patterns.recognise import Miss, attention
from .predict import tiles_of
from .work import Sizes, size_int

# Cells of a side, and characters of all layers together, beyond which a picture is made coarser.
SIDE = 1024
CHARACTERS = 60_000
# Batch entries that differ are drawn up to this many.
MAPS = 8
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


def picture(c: Cascade, tiling: Tiling, sizes: Mapping[str, int]) -> Picture | None:
    """The picture of an attention's mask as a mapping walks it; None where nothing is masked or a size has no value.

    Cells are classified themselves, so that a picture costs as much as its cells, however long the sequence.
    """
    try:
        scale = _scale(c, tiling, sizes)
    except ValueError:
        return None
    while True:
        jobs = tiles_of(c, replace(tiling, tile_p=tiling.tile_p * scale, tile_m=tiling.tile_m * scale), sizes)
        if isinstance(jobs, Miss) or jobs.map is None:
            return None
        tiles = jobs.map
        layers, omitted = _layers(np.asarray(tiles.classes), tiles.batch)
        if sum(len(row) for layer in layers for row in layer.rows) <= CHARACTERS or max(tiles.classes.shape[-2:]) <= 16:
            return Picture(tiles.tile_p, tiles.tile_m, tiles.queries, tiles.keys, scale, layers, omitted)
        scale *= 2


def _scale(c: Cascade, tiling: Tiling, sizes: Mapping[str, int]) -> int:
    """The smallest power of two with which a side has at most SIDE cells. Raises ValueError when a size has no value."""
    view = attention(c)
    if isinstance(view, Miss):
        return 1
    extent = Sizes(view.cascade, sizes).rank
    side = max(-(-size_int(extent[view.query]) // tiling.tile_p), -(-size_int(extent[view.key]) // tiling.tile_m))
    return 1 << max(0, (-(-side // SIDE) - 1).bit_length())


def _layers(cells: NDArray[np.uint8], batch: tuple[str, ...]) -> tuple[tuple[Layer, ...], int]:
    """One layer for all batch entries that look alike, in order of appearance."""
    members: dict[bytes, list[str]] = {}
    for where in np.ndindex(*cells.shape[:-2]):
        name = " ".join(f"{r}={i}" for r, i in zip(batch, where))
        members.setdefault(cells[where].tobytes(), []).append(name)
    shape = cells.shape[-2:]
    shown = list(members.items())[:MAPS]
    layers = tuple(
        Layer(_label(names), tuple(_rows(np.frombuffer(raw, np.uint8).reshape(shape)))) for raw, names in shown
    )
    return layers, sum(len(names) for names in list(members.values())[MAPS:])


def _label(names: list[str]) -> str:
    if names == [""]:
        return ""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _rows(cells: NDArray[np.uint8]) -> Iterator[str]:
    for row in cells:
        edges = np.flatnonzero(np.diff(row)) + 1
        starts = [0, *edges.tolist()]
        stops = [*edges.tolist(), len(row)]
        yield " ".join(f"{LETTERS[row[a]]}{b - a}" for a, b in zip(starts, stops))
