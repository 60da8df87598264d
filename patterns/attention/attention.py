"""`Attention`: the view of a cascade that everything after recognition reads; `recognise.attention` makes it."""

from __future__ import annotations

from dataclasses import dataclass

from ..cascade import Cascade, Einsum
from ..expr import Expr


@dataclass(frozen=True)
class Attention:
    """One attention, read off `cascade`.

    `cascade` computes the same outputs from the same inputs as the cascade that was asked about; it is that very one
    unless an index map or a clash of rank names had to be folded. `prelude` holds Einsums that `products`, `row`,
    `weight`, `values` or `finish` read as ordinary tensors (norms, projections, gathered scores): they are computed
    beforehand. In `products`, `row` and `contraction` all pointwise Einsums are inlined. `further`: numbers of the row that
    leave besides, in terms of `row`.
    """

    cascade: Cascade
    batch: tuple[str, ...]
    query: str
    key: str
    value: str
    prelude: tuple[Einsum, ...]
    products: tuple[Einsum, ...]
    score: Expr
    row: tuple[Einsum, ...]
    weight: Expr
    values: Expr
    finish: Expr
    contraction: Einsum
    further: tuple[Expr, ...] = ()

    @property
    def row_names(self) -> frozenset[str]:
        return frozenset(e.out.tensor for e in self.row)
