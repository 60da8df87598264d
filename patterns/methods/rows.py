"""Some rows of a cascade, and what they keep: what a method is measured and audited by, without a tensor of all pairs.

    O[p,f] for all p      →  O[r,f] at p = ROWS[r]           ROWS: i64, an input of its own
    kept share of a row      Σ_m where(keep, |w|, 0)  and  Σ_m |w|,  w the weight under the model's own mask
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from .. import expr as ex
from ..attention.attention import Attention
from ..cascade import Access, Cascade, Einsum, Tensor, verify
from ..expr import Expr
from ..masks.split import split

ROWS = "ROWS"
SIZE = sympy.Symbol(ROWS, integer=True, positive=True)
KEPT, ALL = "KEPT_WEIGHT", "ALL_WEIGHT"


def some_rows(a: Attention) -> Cascade:
    """The attention's cascade for the rows that ROWS names; its output has as many rows, in that order."""
    c = a.cascade
    return _at_rows(c, a.query, c.einsums, c.tensors, c.outputs)


def kept_share(a: Attention, method: Attention) -> Cascade:
    """For the rows that ROWS names, the weight of the keys that a method keeps (KEPT_WEIGHT), and of all (ALL_WEIGHT).

    Both over the ranks of a row. A method's attention is that of its replacement, over the ranks of the attention's own.
    """
    c = a.cascade
    keep = split(method.score, method.key).keep
    at = tuple(ex.index(r) for r in (*a.batch, a.query))
    shape = tuple(c.rank[str(i.attr)].size for i in at)
    size = ex.unary("abs", a.weight)
    none = ex.const(0.0, a.weight.dtype)
    kept = Einsum(Access(KEPT, at), ex.where(keep, size, none), "add", (a.key,))
    whole = Einsum(Access(ALL, at), size, "add", (a.key,))
    behind = tuple(t for t in method.cascade.inputs if t.name not in c.tensor)
    tensors = (*c.tensors, *behind, *(Tensor(n, shape, "f32") for n in (KEPT, ALL)))
    return _at_rows(c, a.query, (*a.prelude, *a.products, *a.row, kept, whole), tensors, (KEPT, ALL))


def _at_rows(
    c: Cascade, query: str, einsums: tuple[Einsum, ...], tensors: tuple[Tensor, ...], outputs: tuple[str, ...]
) -> Cascade:
    """Inputs are read at the rows named; what is computed is stored row by row. Raises ValueError where rows read others."""
    p = ex.index(query)
    here = ex.load(ROWS, (p,), "i64")
    made = {e.out.tensor: e for e in einsums}

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e is p:
            return here
        if e.op == "load" and str(e.attr) in made:
            own = made[str(e.attr)].out.index
            if any(o is p and x is not here for o, x in zip(own, args)):
                raise ValueError(f"{e} reads another row than its own: some rows cannot be computed alone")
            return ex.load(str(e.attr), tuple(p if o is p and x is here else x for o, x in zip(own, args)), e.dtype)
        return None

    moved = tuple(replace(e, body=ex.rebuild(e.body, rule)) for e in einsums)
    read = {str(x.attr) for e in moved for x in e.reads} | set(made)
    used = frozenset().union(*(e.ranks | set(e.over) for e in moved))
    stored = {
        e.out.tensor: tuple(SIZE if i is p else n for i, n in zip(e.out.index, t.shape))
        for e in moved for t in tensors if t.name == e.out.tensor
    }
    rows = Tensor(ROWS, (SIZE,), "i64")
    return verify(
        Cascade(
            f"rows of {c.name}", tuple(replace(r, size=SIZE) if r.name == query else r for r in c.ranks if r.name in used),
            (*(replace(t, shape=stored.get(t.name, t.shape)) for t in tensors if t.name in read), rows),
            moved, outputs, c.accumulate,
        )
    )

