"""Decoding over cached latents on a GPU, as serving engines run it: one set of keys and values for all heads.

    tiles     blocks of heads walk the latents, 64 keys at a time; where few programs are there, in parts that fill the units
    memory    latents once (what other blocks of heads read again is mostly held by the last cache), queries and results
    around    Q·W before and O·U behind, which stand for keys and values that are never made: products like others

Constants are fitted to measured rows, by device; a device without any has no time. Sources of the form: the FlashMLA public
code (a tile of 64 heads), DeepSeek-V2 (2405.04434), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ...patterns.cascade import Cascade
from ...patterns.passes.latents import inner
from ...patterns.verdict import Obstacle
from ..columns import Numbers
from ..count.eager import EagerOperator, apart, beforehand
from ..count.subject import bound, subject
from ..devices.device import Device
from ..devices.latents import latent_kernels
from ..devices.layers import layer_rates
from ..operations import WIDTH
from ..time.beforehand import plus
from ..time.cost import Cost
from .products import ProductShapes, matrix_rate, product_seconds

# Keys of a tile of latents.
KEYS = 64
FORM = "mla_generation"


def longer(a: Numbers, b: Numbers) -> Numbers:
    """The larger of two times that overlap, smooth where they are alike: neither hides the other wholly."""
    return np.asarray((a**4 + b**4) ** 0.25)


def near(moved: Numbers, d: Device) -> Numbers:
    """The share of bytes that the last cache holds from one call to the next like it."""
    return np.clip(5 - 4 * moved / d.l2_bytes, 0.0, 1.0)


def decode_seconds(
    batch: Numbers, keys: Numbers, heads: Numbers, d: Device, c: Mapping[str, float], *, latent: int, value: int,
    width: int = 2, again: bool = True,
) -> Numbers:
    """Seconds of one query of each sequence over latents of `latent` numbers, of which `value` are the values.

    `again`: the same call came just before, as where calls are timed, and the last cache holds what fits.
    """
    blocks, tiles = np.ceil(heads / c["rows"]), np.ceil(keys / KEYS)
    programs = batch * blocks
    parts = np.clip(np.floor(c["splits"] * d.units / programs), 1, tiles)
    rate = d.matrix_rate("bf16") / d.units
    products = 2 * c["rows"] * KEYS * (latent + value) / (c["matrix"] * rate)
    tile = max(products, width * KEYS * latent / c["draw"])
    kernel = np.ceil(programs * parts / d.units) * (c["program"] + np.ceil(tiles / parts) * tile)
    latents = width * batch * keys * latent
    moved = latents * (1 + c["again"] * (blocks - 1))
    # queries come before the first tile, and results go behind the last
    ends = width * batch * heads * (latent + value)
    held = near(latents + ends, d) if again else np.zeros_like(latents)
    a_byte = ((1 - held) / d.dram_bytes_per_s + held / d.l2_bytes_per_s) / c["memory"]
    kernel = longer(kernel, moved * a_byte) + c["ends"] * ends * a_byte
    # every part writes what it has in fp32, and the merge reads it
    merge = c["merge"] + c["part"] * parts + 8 * parts * batch * heads * value * c["ends"] * a_byte
    return np.asarray(c["call"] + kernel + np.where(parts > 1, merge, 0.0))


def predict_absorbed(c: Cascade, device: Device, sizes: Mapping[str, int]) -> Cost | Obstacle:
    """The time of an absorbed attention with one query a sequence, over latents. Raises ValueError without sizes.

    An Obstacle where it is no such attention, or where no kernel like it was timed on the device.
    """
    return _predicted(c, device, tuple(sorted(sizes.items())))


@lru_cache(maxsize=1024)
def _predicted(c: Cascade, device: Device, sizes: tuple[tuple[str, int], ...]) -> Cost | Obstacle:
    parts = inner(c)
    s = subject(parts.cascade) if not isinstance(parts, Obstacle) else parts
    facts = latent_kernels().get((device.name, FORM))
    if isinstance(parts, Obstacle) or isinstance(s, Obstacle):
        return s if isinstance(s, Obstacle) else Obstacle("no attention over latents")
    if facts is None:
        return Obstacle(f"no kernel over latents was timed on {device.name}")
    at = bound(s, dict(sizes))
    # heads that share all keys are rows of one attention, or members of a group
    heads, sequences = at.queries * at.group, at.batch // at.group
    if s.dtype not in ("bf16", "f16"):
        return Obstacle("kernels over latents were timed in 16 bits")
    if heads == 1 or at.value > at.embed:
        return Obstacle("its heads share no latents that hold the values")
    column = [np.array([float(n)]) for n in (sequences, at.keys, heads)]
    seconds = float(decode_seconds(
        column[0], column[1], column[2], device, facts, latent=at.embed, value=at.value, width=WIDTH[s.dtype], again=False
    )[0])
    moved = WIDTH[s.dtype] * sequences * (at.keys * at.embed + heads * (at.embed + at.value))
    pairs = sequences * heads * at.keys
    flops = 2 * pairs * (at.embed + at.value)
    times = {
        "memory": moved / (facts["memory"] * device.dram_bytes_per_s), "launch": facts["call"],
        "matrix": flops / (facts["matrix"] * device.matrix_rate("bf16")),
    }
    bound_by = "matrix" if times["matrix"] > times["memory"] else "memory"
    cost = Cost(seconds, bound_by, flops, moved, pairs, times, device.basis, facts["band"])
    around = (*beforehand(s.attention, at.extent), *(apart((parts.after,), at.extent) if parts.after is not None else ()))
    return replace(_with_maps(cost, around, device), bound=bound_by)


def _with_maps(cost: Cost, around: Sequence[EagerOperator], d: Device) -> Cost:
    """The cost with the products before and behind it; where heads lie in the weights, a kernel is told."""
    some = [o for o in around if o.kind == "product"]
    if not some:
        return cost
    rates = layer_rates()[d.name]["bf16"]
    rows, inner_, columns, matrices = (
        np.array([float(getattr(o, side)) for o in some]) for side in ("rows", "inner", "columns", "batch")
    )
    x = ProductShapes(rows, inner_, columns, matrices)
    more = sum(product_seconds(x, d, rates, matrix_rate(d, "bf16")).tolist())
    calls = len(some) * rates.call_seconds
    parts = {"launch": calls, "memory": more - calls}
    moved = sum(o.read_bytes + o.written_bytes for o in some)
    return plus(cost, Cost(more, "memory", sum(o.flops for o in some), moved, 0, parts, cost.basis, cost.band))
