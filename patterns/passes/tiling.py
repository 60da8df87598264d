"""Tiles: a rank cut in two, and every reduction over it into one within tiles and one over them.

    R = ⊕_m g    →    m = m1·M0 + m0;   LR[m1] = ⊕_m0 g;   R = ⊕_m1 LR[m1]
By itself this changes no count of passes: it is what `repair` starts from. Source: FuseMax (MICRO 2024), section IV.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from .. import expr as ex
from ..cascade import IDENTITY, Access, Cascade, Einsum, Rank, Tensor, size_term
from ..expr import Expr
from ..verdict import Refusal
from .chain import rebuilt, unused
from .rewrites import Family, Rewritten


def partition(c: Cascade, family: Family) -> Rewritten | Refusal:
    """Cut the rank into tiles of M0, and every reduction over it into one within tiles and one over tiles.

    before   GM[p] = max_m S[p,m]      after   LGM[p,m1] = max_m0 S[p,m1,m0];  GM[p] = max_m1 LGM[p,m1]

    M0 is a new symbol; the last tile may be ragged. Outputs keep their shape and are written at m1·M0 + m0.
    """
    if len(family) != 1:
        return Refusal("partition", f"{'·'.join(family)} is cut into tiles already")
    (key,) = family
    if any(r.iterative for r in c.ranks):
        return Refusal("partition", "the cascade carries state already")
    for e in c.einsums:
        if key in e.over and e.op in ("max", "min") and not e.body.is_float:
            return Refusal("partition", f"{e.out.tensor} reduces integers: no identity fills a ragged tile")
    return _Cut(c, key).rewritten()


class _Cut:
    def __init__(self, c: Cascade, key: str) -> None:
        self.c, self.key = c, key
        self.outer, self.inner = unused(f"{key}1", c.rank), unused(f"{key}0", c.rank)
        self.width = sympy.Symbol(self.inner.upper(), integer=True, positive=True)
        size = c.rank[key].size
        self.tiles = sympy.floor((size + self.width - 1) / self.width)
        self.whole = ex.index(self.outer) * size_term(self.width) + ex.index(self.inner)
        self.valid = self.whole < size_term(size)
        # dimensions that the rank indexes where a tensor is written; an output keeps its shape and is a view of its tiles
        self.cut = {e.out.tensor: d for e in c.einsums for d, i in enumerate(e.out.index) if i is ex.index(key)}
        self.tensors = {t.name: self.tensor(t) for t in c.tensors}
        self.named = {n: unused(f"B{n}", c.tensor) if n in c.outputs else n for n in self.cut}

    def rewritten(self) -> Rewritten:
        einsums = [new for e in self.c.einsums for new in self.einsum(e)]
        for name in self.c.outputs:
            if name in self.cut:
                tiled = self.tensors[name]
                self.tensors[self.named[name]] = replace(tiled, name=self.named[name])
                self.tensors[name] = self.c.tensor[name]
                at = tuple(self.term(i) for i in self.c.producers[name][0].out.index)
                einsums.append(Einsum(Access(name, at), self.term(ex.load(name, self.written(name), tiled.dtype))))
        more = (Rank(self.outer, self.tiles), Rank(self.inner, self.width))
        family = (self.outer, self.inner)
        return Rewritten("partition", rebuilt(self.c, einsums, self.tensors, more), family)

    def written(self, name: str) -> tuple[Expr, ...]:
        return self.c.producers[name][0].out.index

    def tensor(self, t: Tensor) -> Tensor:
        if t.name not in self.cut:
            return t
        d = self.cut[t.name]
        return replace(t, shape=(*t.shape[:d], self.tiles, self.width, *t.shape[d + 1 :]))

    def term(self, root: Expr) -> Expr:
        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e is ex.index(self.key):
                return self.whole
            if e.op != "load" or str(e.attr) not in self.cut:
                return None
            d = self.cut[str(e.attr)]
            w = size_term(self.width)
            same = e.args[d] is ex.index(self.key)
            halves = (ex.index(self.outer), ex.index(self.inner)) if same else (args[d] // w, args[d] % w)
            return ex.load(self.named[str(e.attr)], (*args[:d], *halves, *args[d + 1 :]), e.dtype)

        return ex.rebuild(root, rule)

    def einsum(self, e: Einsum) -> tuple[Einsum, ...]:
        body, name = self.term(e.body), e.out.tensor
        at = tuple(self.term(i) for i in e.out.index)
        if name in self.cut:
            d = self.cut[name]
            at = (*at[:d], ex.index(self.outer), ex.index(self.inner), *at[d + 1 :])
            name = self.named[name]
        if self.key not in e.over:
            return (replace(e, out=Access(name, at), body=body),)
        within = (*(r for r in e.over if r != self.key), self.inner)
        local = unused(f"L{name}", self.c.tensor)
        here = (*at, ex.index(self.outer))
        like = self.c.tensor[name]
        self.tensors[local] = Tensor(local, (*like.shape, self.tiles), like.dtype)
        dtype = like.dtype
        return (
            Einsum(Access(local, here), self.filled(body, str(e.op)), e.op, within),
            Einsum(Access(name, at), ex.load(local, here, dtype), e.op, (self.outer,)),
        )

    def filled(self, body: Expr, op: str) -> Expr:
        """The body, and the identity beyond the end; in a product only the factor that is summed is filled."""
        if op == "add" and body.op == "mul":
            left, right = body.args
            side = left if self.inner in left.ranks else right
            full = ex.where(self.valid, side, ex.const(0.0, side.dtype))
            return full * right if side is left else left * full
        return ex.where(self.valid, body, ex.const(IDENTITY[op], body.dtype))
