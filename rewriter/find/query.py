"""One query: the coordinate that a decoding step, or a learned query, has none of is put back.

    before   QK[b,h,m] = Σ_e Q[b,h,0,e]·K[b,h,m,e]        after   QK[b,h,p,m] = Σ_e Q[b,h,p,e]·K[b,h,m,e],  P = 1
"""

from __future__ import annotations

from dataclasses import replace

from ...patterns import expr as ex
from ...patterns.cascade import Access, Cascade, Einsum, Rank, Tensor
from ...patterns.expr import Expr
from ..graph.node import dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.index import ZERO
from ..lift.lift import Lifter
from ..lift.operators_view import RULES


def laid_out(lifter: Lifter, c: Cascade) -> Cascade:
    """A query without a coordinate of its own is read where the model lays it out with one.

    before   QK[b,m] = Σ_e Q[e]·K[b,m,e]; q.view(1, E)     after   QK[b,m] = Σ_e Q[0,e]·K[b,m,e]
    """
    found = _single(c)
    if found is None or 1 in c.tensor[str(found[1].attr)].shape:
        return c
    q = found[1]
    name, at = str(q.attr), tuple(i for i in q.args if not i.is_const)
    if any(x is not q for e in c.einsums for x in e.reads if x.attr == name):
        return c
    for n in sorted(lifter.visited, key=lifter.position.__getitem__):
        shape = shape_of(tensor_of(n))
        if op_name(n) not in RULES or 1 not in shape or len(shape) - shape.count(1) != len(at) or dtype_of(n) != q.dtype:
            continue
        rest = iter(at)
        where = tuple(ZERO if s == 1 else next(rest) for s in shape)
        if lifter.value(n, where) is q:
            if (was := lifter.leaves[name]) in lifter.read_at:
                lifter.read_at[n] = lifter.read_at[was]
            lifter.leaves[name] = n
            lifter.tensors[name] = replace(c.tensor[name], shape=shape)
            return _reread(c, q, ex.load(name, where, q.dtype), lifter.tensors[name])
    return c


def _reread(c: Cascade, q: Expr, laid: Expr, tensor: Tensor) -> Cascade:
    einsums = tuple(replace(e, body=ex.substitute(e.body, {q: laid})) for e in c.einsums)
    return replace(c, einsums=einsums, tensors=tuple(tensor if t.name == tensor.name else t for t in c.tensors))


def _single(c: Cascade) -> tuple[Einsum, Expr] | None:
    """The product of a query that varies over no token rank with keys, and that query."""
    if "p" in c.rank:
        return None
    for e in c.einsums:
        q = next((x for x in e.reads if "m" not in x.ranks), None)
        k = next((x for x in e.reads if "m" in x.ranks), None)
        if e.op != "add" or q is None or k is None:
            continue
        out = frozenset().union(*(i.ranks for i in e.out.index))
        return None if (q.ranks & out) - k.ranks or str(q.attr) not in {t.name for t in c.inputs} else (e, q)
    return None


def with_query(c: Cascade) -> Cascade:
    """Decoding has one query; its coordinate is put back, so that every attention has a query rank.

    before   QK[b,h,m] = Σ_e Q[b,h,0,e]·K[b,h,m,e]        after   QK[b,h,p,m] = Σ_e Q[b,h,p,e]·K[b,h,m,e],  P = 1
    """
    if (found := _single(c)) is None:
        return c
    product, q = found
    dim = next((d for d, s in reversed(list(enumerate(c.tensor[str(q.attr)].shape))) if s == 1), None)
    if dim is None:
        return c
    p = ex.index("p")
    moved = ex.load(str(q.attr), (*q.args[:dim], p, *q.args[dim + 1 :]), q.dtype)
    longer: dict[str, int] = {}
    einsums: list[Einsum] = []
    last = {"m", *(str(i.attr) for i in c.producers[c.outputs[0]][-1].out.index[-1:])}
    for e in c.einsums:
        table = {q: moved} if e is product else {}
        for x in e.reads:
            if (where := longer.get(str(x.attr))) is not None:
                table[x] = ex.load(str(x.attr), (*x.args[:where], p, *x.args[where:]), x.dtype)
        if not table:
            einsums.append(e)
            continue
        where = len(e.out.index) - (1 if e.out.index and str(e.out.index[-1].attr) in last else 0)
        longer[e.out.tensor] = where
        index = (*e.out.index[:where], p, *e.out.index[where:])
        einsums.append(replace(e, out=Access(e.out.tensor, index), body=ex.substitute(e.body, table)))
    tensors = tuple(
        replace(t, shape=(*t.shape[: longer[t.name]], 1, *t.shape[longer[t.name] :])) if t.name in longer else t
        for t in c.tensors
    )
    return replace(c, ranks=(*c.ranks, Rank("p", 1)), tensors=tensors, einsums=tuple(einsums))
