"""A cascade read along one rank: pointwise Einsums inlined, what its reductions over the rank are made of, and back.

    inline   A[p,m] = SN[p,m]/SD[p], SN[p,m] = exp(QK[p,m] − GM[p])   →   exp(QK[p,m] − GM[p]) / SD[p]
    refold   the other way: a sub-term that some tensor holds becomes a load of that tensor again
    pruned   without the Einsums that no output needs, in an order in which every tensor is written before it is read
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import networkx as nx
import numpy as np

from .. import expr as ex
from ..attention.score import reading
from ..attention.traits import is_mask, masked_side
from ..cascade import Cascade, Einsum, Rank, Tensor, verify
from ..expr import Expr
from ..operators import facts


class Reading:
    """The pointwise Einsums of a cascade as terms. Tensors written in pieces (iterative ones) stay loads."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.pointwise: dict[str, tuple[tuple[Expr, ...], Expr]] = {}
        for e in c.einsums:
            name = e.out.tensor
            if e.op is None and len(c.producers[name]) == 1 and e.out.plain:
                self.pointwise[name] = (e.out.index, ex.cast(self.inline(e.body), c.tensor[name].dtype))

    def inline(self, root: Expr) -> Expr:
        """The term with every load of a pointwise tensor replaced by what that tensor holds."""

        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e.op != "load" or str(e.attr) not in self.pointwise:
                return None
            at, body = self.pointwise[str(e.attr)]
            return ex.substitute(body, dict(zip(at, args, strict=True)))

        return ex.rebuild(root, rule)

    def refold(self, root: Expr, without: frozenset[str] = frozenset()) -> Expr:
        """The term over the cascade's tensors again, but for those that read one of the names in `without`."""
        table: dict[Expr, Expr] = {}
        for name, (at, body) in self.pointwise.items():
            if body.args and body.op not in ("load", "cast") and not reading(body, without):
                table.setdefault(body, ex.load(name, at, body.dtype))
        return ex.substitute(root, table)


def unused(name: str, taken: Iterable[str]) -> str:
    taken = set(taken)
    while name in taken:
        name += "_"
    return name


def rebuilt(
    c: Cascade, einsums: Iterable[Einsum], tensors: Mapping[str, Tensor], more: Sequence[Rank] = ()
) -> Cascade:
    """The cascade of these Einsums: what no output needs goes, the rest is sorted by dependence and verified."""
    kept = needed(tuple(einsums), c.outputs)
    ranks = {r.name: r for r in (*c.ranks, *more)}
    used = frozenset[str]().union(*(e.ranks | set(e.over) for e in kept))
    names = {e.out.tensor for e in kept} | {str(x.attr) for e in kept for x in e.reads}
    return verify(
        replace(
            c,
            ranks=tuple(r for r in ranks.values() if r.name in used),
            tensors=tuple(t for t in tensors.values() if t.name in names),
            einsums=kept,
        )
    )


def needed(einsums: tuple[Einsum, ...], outputs: Sequence[str]) -> tuple[Einsum, ...]:
    """The Einsums that an output rests on, stably sorted so that writers come first (not across iterative ranks)."""
    writers: dict[str, list[int]] = {}
    for i, e in enumerate(einsums):
        writers.setdefault(e.out.tensor, []).append(i)
    todo = [i for o in outputs for i in writers[o]]
    live: set[int] = set()
    while todo:
        i = todo.pop()
        if i in live:
            continue
        live.add(i)
        todo += [j for x in einsums[i].reads for j in writers.get(str(x.attr), ())]
    if any(len(w) > 1 for w in writers.values()):
        return tuple(einsums[i] for i in sorted(live))
    g: nx.DiGraph[int] = nx.DiGraph()
    g.add_nodes_from(sorted(live))
    g.add_edges_from((j, i) for i in live for x in einsums[i].reads for j in writers.get(str(x.attr), ()))
    return tuple(einsums[i] for i in nx.lexicographical_topological_sort(g))


def exposed(c: Cascade, terms: Mapping[str, Expr], key: str) -> tuple[Expr, ...]:
    """Where a −∞ may come from: what exponentials over the key take, and what maxima run over. `terms`: inlined bodies."""
    found = [e.args[0] for e in ex.walk(*terms.values()) if facts(e.op).law == "exponential" and key in e.ranks]
    found += [t for n, t in terms.items() if c.producers[n][0].op in ("max", "min")]
    return tuple(dict.fromkeys(found))


def products(c: Cascade, key: str) -> frozenset[str]:
    """Tensors over the key that are sums over other ranks: finite, as their operands are."""
    return frozenset(
        e.out.tensor
        for e in c.einsums
        if e.op == "add" and key not in e.over and any(key in i.ranks for i in e.out.index)
    )


def empty_rows(
    terms: Sequence[Expr], scores: Sequence[Expr], key: str, made: frozenset[str], rows: frozenset[str]
) -> list[dict[Expr, object]]:
    """Two-key rows without a kept key: every mask of `terms` false; one of them; a tensor that `scores` add holding −∞."""
    masked: dict[Expr, object] = {}
    finite: dict[Expr, object] = {ex.index(key): np.array([0, 1])}
    rowed = {e for t in terms for e in reading(t, rows)}
    for e in ex.walk(*terms):
        if is_mask(e, key) and e.args[0] not in rowed:
            masked[e.args[0]] = np.asarray(masked_side(e) is e.args[1])
        if e.op == "load" and str(e.attr) in made:
            finite[e] = np.array([0.3, -0.7])
    added = [x for t in scores for x in ex.loads(t) if x.is_float and key in x.ranks and str(x.attr) not in made | rows]
    kept: dict[Expr, object] = {c: ~np.asarray(v) for c, v in masked.items()}
    rows_of: list[dict[Expr, object]] = [masked] if masked else []
    if len(masked) > 1:
        rows_of += [{**kept, c: v} for c, v in masked.items()]
    if added:
        rows_of.append({**kept, **dict.fromkeys(added, np.full(2, -math.inf))})
    return [{**finite, **row} for row in rows_of]
