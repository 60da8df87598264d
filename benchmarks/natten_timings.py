"""The sparsity model against NATTEN's published timings; needs no GPU.

    python benchmarks/natten_timings.py

    seconds = makespan over the units of  tiles · (ρ where the kernel masks, else 1)  ·  seconds of a tile

NATTEN masks every tile, unless the whole problem is perfectly block-sparse. The ratio of neighbourhood attention to its
strided form on one device has no other unknown than ρ: fitted on five of the six ratios, it must predict the sixth. One
rate a device then puts all fourteen timings on a scale. natten.toml holds the timings and their source.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from reattend.cost_model.count.neighborhood import GridTiles, TokenAxis, grid_tiles
from reattend.cost_model.count.schedule import launch_span
from reattend.patterns import expr as ex
from reattend.patterns.masks.windows import neighborhood
from reattend.patterns.verdict import Obstacle

DATA: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("natten.toml").read_text())


@dataclass(frozen=True)
class Point:
    """One timing: `stride` is empty for dense attention."""

    case: str
    device: str
    kernel: str
    stride: tuple[int, ...]
    seconds: float

    @property
    def units(self) -> int:
        return int(DATA["device"][self.device]["units"])

    @property
    def tile(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        q, k = DATA["case"][self.case]["tile"][self.device]
        return tuple(q), tuple(k)

    @property
    def tile_flops(self) -> int:
        """FLOP of the two products of one tile."""
        q, k = self.tile
        return 4 * math.prod(q) * math.prod(k) * int(DATA["case"][self.case]["embed"])

    def __str__(self) -> str:
        return f"{self.case} {'×'.join(map(str, self.stride)) or 'dense'} {self.device}"


@lru_cache
def points() -> tuple[Point, ...]:
    return tuple(
        Point(t["case"], device, t["kernel"], tuple(t.get("stride", ())), seconds)
        for t in DATA["timing"] for device, seconds in t["seconds"].items()
    )


@lru_cache
def tiles(p: Point) -> GridTiles:
    """The key tiles of a timing's kernel, counted from the predicate of its mask."""
    case = DATA["case"][p.case]
    keep, axes, extents = ex.TRUE, [], {}
    sides = zip(case["lengths"], case["window"], p.stride or case["window"], *p.tile)
    for d, (length, window, stride, tile_q, tile_k) in enumerate(sides):
        q, k = f"p{d}", f"m{d}"
        axes.append(TokenAxis(q, k, tile_q, tile_k))
        extents |= {q: length, k: length}
        if p.stride:
            keep = keep & neighborhood(ex.index(q), ex.index(k), length=length, window=window, stride=stride)
    found = grid_tiles(keep, axes, extents)
    assert not isinstance(found, Obstacle), found
    return found


@lru_cache
def load(p: Point, factor: float) -> float:
    """Tiles in sequence on the unit that ends last; every tile is masked where any of the problem is."""
    found = tiles(p)
    jobs = found.jobs()
    costs = jobs.visited * (factor if found.partial else 1.0)
    heads = int(DATA["case"][p.case]["heads"])
    return launch_span(costs, heads, p.units, heavy_first=False)


@dataclass(frozen=True)
class Ratio:
    """Neighbourhood attention over its strided form that is the fastest to be perfectly block-sparse, on one device."""

    plain: Point
    strided: Point

    @property
    def measured(self) -> float:
        return self.plain.seconds / self.strided.seconds

    def predicted(self, factor: float) -> float:
        return load(self.plain, factor) / load(self.strided, factor)

    def by_longest(self) -> float:
        """NATTENSim's rule: the query tile that visits most, and a mask that costs nothing."""
        return tiles(self.plain).most / tiles(self.strided).most


@lru_cache
def ratios() -> tuple[Ratio, ...]:
    sparse = [p for p in points() if p.stride]
    found = []
    for p in sparse:
        if max(p.stride) == 1:
            others = [s for s in sparse if (s.case, s.device) == (p.case, p.device) and s is not p]
            found.append(Ratio(p, min(others, key=lambda s: s.stride)))
    return tuple(found)


def error(predicted: float, measured: float) -> float:
    return predicted / measured - 1


def mape(given: Sequence[Ratio], factor: float) -> float:
    return sum(abs(error(r.predicted(factor), r.measured)) for r in given) / len(given)


def fit(given: Sequence[Ratio]) -> float:
    """The mask's cost ρ by least squares of the logarithms: where only the first of each pair masks, a geometric mean."""
    masking = [r for r in given if tiles(r.plain).partial and not tiles(r.strided).partial]
    return math.exp(sum(math.log(r.measured / r.predicted(1.0)) for r in masking) / len(masking))


def leave_one_out() -> tuple[tuple[Ratio, float, float], ...]:
    """(ratio, ρ fitted on the others, its prediction)."""
    out = []
    for r in ratios():
        factor = fit([x for x in ratios() if x is not r])
        out.append((r, factor, r.predicted(factor)))
    return tuple(out)


def loo_mape() -> float:
    held = leave_one_out()
    return sum(abs(error(predicted, r.measured)) for r, _, predicted in held) / len(held)


def rate(device: str, factor: float) -> float:
    """FLOP per second and unit that puts a device's sparse timings in the middle of the predictions."""
    logs = [
        math.log(p.tile_flops * load(p, factor) / p.seconds) for p in points() if p.device == device and p.stride
    ]
    return math.exp(sum(logs) / len(logs))


def main() -> None:
    factor = fit(ratios())
    print(f"six ratios of neighbourhood to strided attention; ρ = {factor:.3f} on all six")
    print(f"{'ratio':34}{'measured':>9}{'held out':>9}{'error':>8}{'ρ':>7}{'longest tile, free mask':>25}")
    for r, f, predicted in leave_one_out():
        name = f"{r.plain} / {'×'.join(map(str, r.strided.stride))}"
        off = error(predicted, r.measured)
        print(f"{name:34}{r.measured:9.3f}{predicted:9.3f}{off:+8.1%}{f:7.3f}{r.by_longest():25.3f}")
    rule = sum(abs(error(r.by_longest(), r.measured)) for r in ratios()) / len(ratios())
    print(f"MAPE: {mape(ratios(), factor):.1%} fitted, {loo_mape():.1%} leaving one out; NATTENSim's rule {rule:.1%}")
    print("\nall timings; one rate a device from its sparse timings, so that errors are residuals; cuDNN is another kernel")
    print(f"{'timing':28}{'tiles':>10}{'masked':>8}{'measured ms':>13}{'predicted':>11}{'residual':>10}")
    for p in points():
        found = tiles(p)
        predicted = p.tile_flops * load(p, factor) / rate(p.device, factor)
        masked = "yes" if found.partial else "no"
        print(
            f"{p!s:28}{found.mean:10.2f}{masked:>8}{p.seconds * 1e3:13.3f}{predicted * 1e3:11.3f}"
            f"{error(predicted, p.seconds):+10.1%}"
        )
    for device in DATA["device"]:
        per_device = rate(device, factor) * int(DATA["device"][device]["units"]) / 1e12
        print(f"{device}: {per_device:.0f} TFLOP/s in unmasked tiles")


if __name__ == "__main__":
    main()
