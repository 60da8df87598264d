"""Seconds of products on a GPU: a roofline over tiles, waves and bytes, with a few rates a device and type.

    program   rows × columns of a tile over the inner dimension: at the matrix unit's rate, or as its operands are drawn
    launch    programs in waves over the units; where few, the inner dimension is split among those that idle
    memory    operands and results once; the longer of both, rounded where they are alike, since neither hides wholly
    best      of the tiles that libraries have, the one that is done first
    experts   rows are dealt out: of E experts, E·(1 − (1 − 1/E)^rows) are met, and their weights read

Everything is an array over products, so that a plan prices all of its own at once. Weights come from memory at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..columns import Numbers
from ..devices.device import Device
from ..devices.layers import ProductRates

# Rows and columns of tiles that libraries choose among.
TILES = ((256, 128), (128, 256), (128, 128), (64, 256), (128, 64), (64, 128), (64, 64))
_SIDES = tuple(np.array(side, np.float64) for side in zip(*TILES))
# The least inner dimension of a part; how two times that overlap round; seconds after which half of the power share counts.
DEPTH, JOIN, SLOW_SECONDS = 1024, 2.25, 2e-3


@dataclass(frozen=True, eq=False)
class ProductShapes:
    """Products as columns. `given`, `weights`, `result`: bytes of an element of each side."""

    rows: Numbers
    inner: Numbers
    columns: Numbers
    matrices: Numbers
    given: float = 2.0
    weights: float = 2.0
    result: float = 2.0


def product_seconds(x: ProductShapes, d: Device, r: ProductRates, rate: float) -> Numbers:
    """Seconds of each product, its call included; `rate`: FLOP a second of the device's matrix units in this type."""
    body = _kernel(x, d, r, rate, x.matrices)
    cast = r.row_seconds * x.rows + r.cast_share * x.rows * x.inner * (x.given + 2) / d.dram_bytes_per_s
    return np.asarray(r.call_seconds + body + x.matrices * cast)


def expert_seconds(products: Sequence[ProductShapes], d: Device, r: ProductRates, rate: float) -> Numbers:
    """Seconds of the products of experts, one behind the other, and of the dealing. `rows`: choices of all tokens."""
    rows, experts = products[0].rows, products[0].matrices
    met = np.maximum(1.0, experts * (1 - (1 - 1 / experts) ** rows))
    seconds = r.call_seconds + r.row_seconds * rows
    for x in products:
        dealt = 2 * rows * (x.inner + x.columns)
        seconds = seconds + _kernel(_with_rows(x, rows / met), d, r, rate, met) + r.cast_share * dealt / d.dram_bytes_per_s
    return np.asarray(seconds)


def _with_rows(x: ProductShapes, rows: Numbers) -> ProductShapes:
    return ProductShapes(rows, x.inner, x.columns, x.matrices, x.given, x.weights, x.result)


def _kernel(x: ProductShapes, d: Device, r: ProductRates, rate: float, matrices: Numbers) -> Numbers:
    unit = r.matrix_share * rate / d.units
    high, wide = (side.reshape(-1, *[1] * x.rows.ndim) for side in _SIDES)
    programs = matrices * np.ceil(x.rows / high) * np.ceil(x.columns / wide)
    parts = np.clip(np.floor(d.units / programs), 1, np.ceil(x.inner / DEPTH))
    inner = x.inner / parts
    drawn = (high * x.given + wide * x.weights) * inner / r.draw_bytes_per_s
    tile = r.program_seconds + np.maximum(2 * high * wide * inner / unit, drawn)
    seconds = np.ceil(programs * parts / d.units) * tile + np.where(parts > 1, r.merge_seconds, 0.0)
    best = seconds.min(0)
    moved = matrices * (x.given * x.rows * x.inner + x.weights * x.inner * x.columns + x.result * x.rows * x.columns)
    memory = moved / (r.memory_share * d.dram_bytes_per_s)
    body = (best**JOIN + memory**JOIN) ** (1 / JOIN)
    return np.asarray(body * (1 + r.power_share * body / (body + SLOW_SECONDS)))


def matrix_rate(d: Device, dtype: str) -> float:
    """FLOP a second of the matrix units: of fp8 twice that of 16 bits, as the data sheets of all that have it say."""
    return 2 * d.matrix_rate("bf16") if dtype == "fp8" else d.matrix_rate(dtype)
