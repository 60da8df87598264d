"""The mapping: how a cascade is tiled and run on a device. Plain data; what is computed never depends on it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TileMapping:
    """Sizes that bind the partitions of a streaming cascade, and how a device walks the tiles.

    `tile_p` query rows and `tile_m` keys per tile; `warps` and `stages` as Triton has them (CPU: ignored); `split_m`
    programs share one row block's keys and merge (1: none; at other sizes as many as keep the device busy);
    `heavy_first` walks the row blocks with most tiles first; `body` names the code that computes one tile: "triton", or
    on the CPU "sdpa" (SDPA on key slices, a causal triangle whole), "slices" (the same, triangles cut as well), "product"
    (two products around the printed score and row rule), "selected" (the same around keys that each row names), "latent"
    (that around the latents that keys and values are made of), "whole" (whole rows, whose scores others read too), "fused"
    (one pass in C++ around them; tiles of 16 queries and 32 keys, or multiples) or "decode" (the same for few queries:
    keys as they lie in memory, split over the threads).
    """

    tile_p: int
    tile_m: int
    warps: int = 4
    stages: int = 2
    split_m: int = 1
    heavy_first: bool = True
    body: str = "triton"

    @property
    def is_compiled(self) -> bool:
        """Is it C++ that the machine's compiler has to compile?"""
        return self.body in ("fused", "decode")

    def to_text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @staticmethod
    def parse(text: str) -> TileMapping:
        return TileMapping(**json.loads(text))

    def __str__(self) -> str:
        tile = f"{self.body} {self.tile_p}×{self.tile_m}"
        if self.body != "triton":
            return tile
        split = f", keys split in {self.split_m}" if self.split_m > 1 else ""
        return f"{tile}, {self.warps} warps, {self.stages} stages{split}"
