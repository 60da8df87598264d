"""The benchmark of products outside of attention: its split, and that it prices rows as a plan does. No row needed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from reattend.cost_model.devices.device import shipped
from reattend.cost_model.devices.layers import layer_rates
from reattend.cost_model.layer.products import ProductShapes, matrix_rate, product_seconds
from tests.loading import benchmark

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def layers() -> Iterator[ModuleType]:
    sys.path.insert(0, FOLDER)
    try:
        yield benchmark("gpu_layers")
    finally:
        sys.path.remove(FOLDER)


def test_a_shape_lies_in_one_part_whatever_its_type(layers: ModuleType) -> None:
    for n in range(1, 40):
        shape = (n, 4096, 4096)
        assert len({layers.Measured(kind, shape, 1e-5, "").part for kind in ("bf16", "fp8")}) == 1
        assert len({layers.Measured(kind, shape, 1e-5, "").part for kind in ("experts_bf16", "experts_fp8")}) == 1


def test_rows_are_priced_as_plans_price_products(layers: ModuleType) -> None:
    rows = [layers.Measured("bf16", (n, 4096, 6144), 1e-5, "") for n in (1, 16, 4096)]
    d, r = shipped("h200"), layer_rates()["h200"]["bf16"]
    x = np.array([m.shape for m in rows], np.float64).T
    found = product_seconds(ProductShapes(x[0], x[1], x[2], np.ones(3)), d, r, matrix_rate(d, "bf16"))
    assert list(layers.priced(rows, d, r)) == list(found)


def test_a_fit_finds_rates_that_give_its_rows(layers: ModuleType) -> None:
    d, r = shipped("h200"), layer_rates()["h200"]["bf16"]
    shapes = [(m, k, n) for m in (1, 16, 256, 4096) for k in (1024, 8192) for n in (1024, 8192)]
    rows = [layers.Measured("bf16", s, 1.0, "") for s in shapes]
    rows = [layers.Measured("bf16", m.shape, t, "") for m, t in zip(rows, layers.priced(rows, d, r))]
    found = layers.ProductRates(**layers.fitted(rows, d), band=0.0)
    assert layers.band_of(rows, d, found) <= 0.15
