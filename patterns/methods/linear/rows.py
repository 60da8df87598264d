"""What linear methods share: is a row a softmax of its score, which terms are queries and keys, and rows with other weights.

    before   O[p,f] = Σ_m softmax_m(S[p,m])·V[m,f]
    after    D[p] = Σ_m W[p,m];  N[p,f] = Σ_m W[p,m]·V[m,f];  O[p,f] = N / D       W = where(keep, w(p, m), 0)

Where w is a product of features of the query and of the key, N and D are states that one pass over the keys carries: the
quadratic form is the meaning, its scan belongs to who computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ... import expr as ex
from ...attention.attention import Attention
from ...attention.score import factors
from ...attention.traits import SCORES, VALUES, made_up, run_row
from ...cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ...expr import Expr
from ...masks.split import split
from ...terms.constant import number


def is_softmax(a: Attention) -> bool:
    """Does a row end as Σ exp(s)·v / Σ exp(s), whatever else its terms read? Tried on made-up rows."""
    want = np.exp(SCORES)
    expected = float((want * VALUES).sum() / want.sum())
    for row in made_up(a, {a.score: SCORES}):
        if not np.isclose(float(number(a.finish, run_row(a, row), row)), expected, rtol=1e-9, atol=0.0):
            return False
    return True


@dataclass(frozen=True)
class Operands:
    """The terms of a score that is a scaled product: Σ_over query·key, and the predicate of its mask."""

    query: Expr
    key: Expr
    over: tuple[str, ...]
    keep: Expr


def operands(a: Attention) -> Operands | str:
    """Queries and keys of a score that is a constant times one product, or in a phrase why there are none."""
    if len(a.products) != 1:
        return f"its score is made of {len(a.products)} products"
    (product,) = a.products
    mask = split(a.score, a.key)
    above, below = factors(mask.full)
    rest = [x for x in (*above, *below) if not x.is_const]
    if [str(x.attr) for x in rest] != [product.out.tensor]:
        return "its score is more than a scaled product (a bias, a cap, a slope), which feature maps would drop"
    above, below = factors(product.body)
    keys = [x for x in above if a.key in x.ranks]
    queries = [x for x in above if a.key not in x.ranks]
    if below or not queries or not keys or any(a.query in x.ranks for x in keys):
        return "its product is not one of queries and keys"
    return Operands(_times(queries), _times(keys), product.over, mask.keep)


def _times(terms: Iterable[Expr]) -> Expr:
    first, *rest = terms
    for x in rest:
        first = first * x
    return first


@dataclass
class RowBuilder:
    """Einsums that are put behind an attention's products; names are new ones, ranks those of the attention and more."""

    of: Attention
    ranks: dict[str, Size] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    einsums: list[Einsum] = field(default_factory=list)

    def fresh(self, base: str) -> str:
        """A name that no tensor has."""
        taken = self.of.cascade.tensor.keys() | self.tensors.keys()
        return next(n for n in (base, *(f"{base}{i}" for i in range(2, 99))) if n not in taken)

    def rank(self, name: str, size: Size) -> str:
        """A rank that no other has, of this size."""
        taken = {r.name for r in self.of.cascade.ranks} | self.ranks.keys()
        found = next(n for n in (name, *(f"{name}{i}" for i in range(2, 99))) if n not in taken)
        self.ranks[found] = size
        return found

    def size(self, rank: str) -> Size:
        return self.ranks[rank] if rank in self.ranks else self.of.cascade.rank[rank].size

    def input(self, name: str, ranks: tuple[str, ...], dtype: str) -> Expr:
        """A tensor that is given beside the attention's own."""
        name = self.fresh(name)
        self.tensors[name] = Tensor(name, tuple(self.size(r) for r in ranks), dtype)
        return ex.load(name, tuple(ex.index(r) for r in ranks), dtype)

    def put(self, name: str, ranks: tuple[str, ...], body: Expr, op: str | None = None, over: tuple[str, ...] = ()) -> Expr:
        """An Einsum over ranks, and the load of what it writes."""
        name, at = self.fresh(name), tuple(ex.index(r) for r in ranks)
        self.tensors[name] = Tensor(name, tuple(self.size(r) for r in ranks), body.dtype)
        self.einsums.append(Einsum(Access(name, at), body, op, over))
        return ex.load(name, at, body.dtype)

    @property
    def row(self) -> tuple[str, ...]:
        return (*self.of.batch, self.of.query)

    def softmax(self, x: Expr, ranks: tuple[str, ...], over: str, name: str) -> Expr:
        """softmax of x over one of its ranks, shifted by its maximum."""
        outer = tuple(r for r in ranks if r != over)
        top = self.put(f"{name}M", outer, x, "max", (over,))
        e = self.put(f"{name}E", ranks, ex.exp(x - top))
        return self.put(name, ranks, e / self.put(f"{name}S", outer, e, "add", (over,)))

    def mean(self, weight: Expr, name: str, least: float = 0.0) -> Expr:
        """Σ_m weight·V / (Σ_m weight + least), over the output's ranks."""
        total = self.put(f"{name}D", self.row, weight, "add", (self.of.key,))
        summed = self.put(f"{name}N", (*self.row, self.of.value), weight * self.of.values, "add", (self.of.key,))
        return summed / (total + least if least else total)

    def cascade(self, out: Expr, name: str, before: Iterable[Einsum] = ()) -> Cascade:
        """The attention's inputs, what its products need, these Einsums, and `out` in the place of its output."""
        a, c = self.of, self.of.cascade
        (output,) = c.outputs
        (last,) = c.producers[output]
        einsums = [*a.prelude, *a.products, *before, *self.einsums, Einsum(last.out, out)]
        wanted: set[str] = {output}
        kept: list[Einsum] = []
        for e in reversed(einsums):
            if e.out.tensor in wanted:
                kept.append(e)
                wanted |= {str(x.attr) for x in e.reads}
        kept.reverse()
        used = frozenset().union(*(e.ranks | set(e.over) for e in kept))
        ranks = (*c.ranks, *(Rank(n, s) for n, s in self.ranks.items()))
        tensors = tuple(t for t in (*c.tensors, *self.tensors.values()) if t.name in wanted)
        made = Cascade(f"{c.name} under {name}", tuple(r for r in ranks if r.name in used), tensors, tuple(kept), c.outputs)
        return verify(made)
