"""Vendors' attention kernels as facts: tiles, order, what a program costs before its first tile. Read from kernels.toml.

    a device's own rates stand in its file; what belongs to a kernel wherever it runs stands here, with its source
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("kernels.toml")


@dataclass(frozen=True)
class VendorFacts:
    """One family of kernels. `tiles` are query rows and keys by the widest head size that they serve.

    `few_rows` is the tile of few queries; with `few_prompts` what is said of few rows holds of prompts, else of one query
    alone. `packed`: the heads of a group fill a tile's rows at every length, else for one query alone, which takes `swaps`
    copies where there are several sequences and key heads. `heavy_first`: rows with most tiles come first; `heads_apart`:
    the heads of a group come one pass over the batch after another. `resident` programs share a unit where shared
    memory allows
    it, `few_resident` with few rows; the rule of the split counts with `split_slots` of them. It `splits` the keys of "all"
    launches, of "decode" steps (one query), or of those alone whose "groups" share key heads, but never of at most
    `whole_tiles` tiles: into as few parts as make even "waves", or as many as "fill" the units once. A program takes
    `program_clocks` beside its tiles (`few_clocks` with few rows, which draw at most `draw_bytes_per_clock`); a merge takes
    `part_clocks` a part of split keys. `exp_share` of the exponentials go to the
    special-function units, the others to the lanes.
    """

    name: str
    title: str
    tiles: Mapping[int, tuple[int, int]] = field(hash=False)
    few_rows: int
    few_prompts: bool
    packed: bool
    heavy_first: bool
    heads_apart: bool
    resident: int
    few_resident: int
    split_slots: int
    splits: str
    split_rule: str
    whole_tiles: int
    program_clocks: float
    few_clocks: float
    draw_bytes_per_clock: float
    part_clocks: float
    swaps: int
    exp_share: float
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def tile(self, head: int) -> tuple[int, int]:
        """Query rows and keys of a tile for heads of this size; the widest one's where none serves it."""
        return self.tiles[min((h for h in self.tiles if h >= head), default=max(self.tiles))]

    def width(self, head: int) -> int:
        """The head size that products run with: the next one that has a tile."""
        return min((h for h in self.tiles if h >= head), default=head)


@cache
def vendor_kernels() -> Mapping[str, VendorFacts]:
    """Every kernel of the file by name. Raises ValueError on a field that is missing or unknown."""
    out = {}
    wanted = {f.name for f in fields(VendorFacts)} - {"name", "sources"}
    for name, table in tomllib.loads(FILE.read_text("utf-8")).items():
        if set(table) != wanted:
            raise ValueError(f"kernel {name}: {', '.join(sorted(set(table) ^ wanted))} missing or unknown")
        values: dict[str, Any] = {k: row[0] for k, row in table.items() if k != "title"}
        values["tiles"] = {int(h): (int(rows), int(keys)) for h, (rows, keys) in values["tiles"].items()}
        sources = {k: str(row[-1]) for k, row in table.items() if k != "title"}
        out[name] = VendorFacts(name, table["title"], sources=sources, **values)
    return out
