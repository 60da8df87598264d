"""Work outside of attention: products by shape, passes over elements by bytes, weights; sizes may be open.

    product   rows × inner · inner × columns, `matrices` of them; of experts: all rows dealt out to so many matrices
    pass      what is computed element by element or row by row between products: read once, written once

Products of one input are one, as engines lay their weights side by side. How tensor parallelism divides a product is
its `cut`: its columns (nothing is sent), or its inner dimension (parts of a sum meet behind it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...patterns.cascade import Size
from ..json import Json, Read
from ..operations import bound_size, size_int

COLUMNS, INNER = "columns", "inner"


@dataclass(frozen=True)
class LayerProduct:
    """One product; `weight`: its right side is parameters. `last`: its rows leave the model as they are (logits).

    `keys`: its rows are those of keys that a step of decoding has from before, made again of what is cached.
    """

    rows: Size
    inner: Size
    columns: Size
    matrices: Size = 1
    dtype: str = "bf16"
    weight: bool = True
    experts: bool = False
    cut: str = ""
    last: bool = False
    keys: bool = False


@dataclass(frozen=True)
class Pass:
    """Elements that are computed between products in one go: bytes read and written. `cut`: heads or channels divide it;
    `keys`: as of a product.
    """

    read: Size
    written: Size
    cut: bool = False
    keys: bool = False


@dataclass(frozen=True)
class Weights:
    """Parameters of one kind: how many, bytes of each; `products`: of products, so that a narrower type serves; `cut`:
    tensor parallelism divides them."""

    elements: int
    width: int
    products: bool = False
    cut: bool = False

    def bytes(self, width: float | None = None, parts: int = 1) -> float:
        """Bytes on one device of `parts`, those of products in another width where one is given."""
        each = width if self.products and width is not None else self.width
        return self.elements * each / (parts if self.cut else 1)


@dataclass(frozen=True)
class LayerWork:
    """All of a graph's work outside of its attentions: each kind with how often it stands there.

    `sums`: bytes whose parts meet, where products are cut along their inner dimension over devices.
    """

    products: tuple[tuple[LayerProduct, int], ...] = ()
    passes: tuple[tuple[Pass, int], ...] = ()
    sums: tuple[tuple[Size, int], ...] = ()
    weights: tuple[Weights, ...] = ()

    def at(self, sizes: Mapping[str, int]) -> LayerWork:
        """The work with all sizes given. Raises ValueError where one has no value."""
        def of(size: Size) -> int:
            return size_int(bound_size(size, sizes))

        products = tuple(
            (replace(p, rows=of(p.rows), inner=of(p.inner), columns=of(p.columns), matrices=of(p.matrices)), n)
            for p, n in self.products
        )
        passes = tuple((replace(p, read=of(p.read), written=of(p.written)), n) for p, n in self.passes)
        return LayerWork(products, passes, tuple((of(n), times) for n, times in self.sums), self.weights)

    def without_keys(self) -> LayerWork:
        """The work where attention runs on what is cached as it is: keys from before are not made again."""
        products = tuple((p, n) for p, n in self.products if not p.keys)
        return replace(self, products=products, passes=tuple((p, n) for p, n in self.passes if not p.keys))

    @property
    def is_empty(self) -> bool:
        return not self.products

    def to_dict(self) -> dict[str, Json]:
        """Plain data of work whose sizes are given."""
        return {
            "products": [{**vars(p), "times": n} for p, n in self.products],
            "passes": [{**vars(p), "times": n} for p, n in self.passes],
            "sums": [list(x) for x in self.sums], "weights": [dict(vars(w)) for w in self.weights],
        }

    @staticmethod
    def from_dict(d: Read) -> LayerWork:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        products = tuple((LayerProduct(**_without_times(r)), int(r["times"])) for r in d["products"])
        passes = tuple((Pass(**_without_times(r)), int(r["times"])) for r in d["passes"])
        sums = tuple((int(n), int(times)) for n, times in d["sums"])
        return LayerWork(products, passes, sums, tuple(Weights(**w) for w in d["weights"]))


def _without_times(row: Read) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "times"}
