"""Ranks of a lifted cascade brought to one form: merged ranks split, and the same coordinate under one name everywhere.

    split   O[r,p,f] with terms r // H and r % H   →   O[b,h,p,f], r = b·H + h        (a (B·H)-flattened batch)
    unify   S[r1,r2,p,m] read as S[b,h,p,m]        →   S is defined over b, h          (bound names are free to choose)
    fuse    O[b,h,g,p,f] with terms h·G + g        →   O[b,n,p,f], h = n // G, g = n % G       (heads in groups)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import sympy

from .. import expr as ex
from ..cascade import Access, Cascade, Einsum, Rank, Tensor, as_size, size_term, term_size
from ..expr import Expr


def split(c: Cascade) -> Cascade:
    """Split every output rank that is read only as `r // n` and `r % n` for one n dividing its size."""
    for rank in c.ranks:
        n = _divisor(c, rank)
        if n is not None:
            c = _split(c, rank, n)
    return c


def _divisor(c: Cascade, rank: Rank) -> Expr | None:
    """The one n by which the rank is divided, if the output's batch is read by quotient and remainder.

    A query that the queries have as it is (the scores of a plane, to which a bias by row and column is added) stays one.
    """
    out = c.producers[c.outputs[0]][-1].out.index
    r = ex.index(rank.name)
    if r not in out or _queried(c, r) or rank.name in _of_values(c):
        return None
    found: dict[str, set[Expr]] = {"floordiv": set(), "mod": set()}
    for e in c.einsums:
        for t in ex.walk(e.body):
            if t.op in found and t.args[0] is r:
                found[t.op].add(t.args[1])
    # a quotient alone is a head group, and stays an index map
    if len(found["mod"]) != 1 or found["mod"] != found["floordiv"]:
        return None
    (n,) = found["mod"]
    if any(x.op in ("index", "load") for x in ex.walk(n)):
        return None
    quotient = sympy.cancel(sympy.sympify(rank.size) / sympy.sympify(term_size(n)))
    return n if sympy.fraction(quotient)[1] == 1 and quotient != 1 else None


def _of_values(c: Cascade) -> list[str]:
    """Ranks of the output that no score has, in the output's order: those of the values."""
    last = c.producers[c.outputs[0]][-1].out.index
    scored = frozenset().union(*(e.ranks for e in c.einsums if e.out.index != last))
    return [str(i.attr) for i in last if str(i.attr) not in scored]


def one_value(c: Cascade) -> Cascade:
    """Values of several dimensions side by side in the output as one rank.

    before   O[b,p,h,f] = Σ_m A[b,p,m]·V[b,m,h,f]        after   O[b,p,u] = Σ_m A[b,p,m]·V[b,m,u // F,u % F]
    """
    while len(own := _of_values(c)) > 1:
        out = [str(i.attr) for i in c.producers[c.outputs[0]][-1].out.index]
        pair = next((p for p in pairwise(out) if set(p) <= set(own)), None)
        fused = fuse(c, *pair) if pair is not None else c
        if fused is c:
            break
        c = fused
    return c


def _queried(c: Cascade, r: Expr) -> bool:
    """Does a product read an operand along just this rank, and its keys not at all?"""
    last = c.producers[c.outputs[0]][-1].out.index
    keys = {k for e in c.einsums if e.op is not None and e.out.index == last for k in e.over}
    for e in c.einsums:
        if e.op == "add" and e.out.index != last and any(i.ranks & keys for i in e.out.index):
            far = [x for x in e.reads if not x.ranks & keys]
            if any(r in x.args for x in far) and not any(r in ex.walk(x) for x in e.reads if x not in far):
                return True
    return False


def _split(c: Cascade, rank: Rank, n: Expr) -> Cascade:
    high, low = f"{rank.name}q", f"{rank.name}r"
    count = sympy.cancel(sympy.sympify(rank.size) / sympy.sympify(term_size(n)))
    sizes = {high: as_size(count), low: term_size(n)}
    whole = ex.index(high) * n + ex.index(low)
    table = {ex.index(rank.name): whole}
    halves = Rank(high, sizes[high]), Rank(low, sizes[low])
    # dimensions indexed by the rank where a tensor is defined; its readers split their term in the same way
    cut: dict[str, int] = {}
    for e in c.einsums:
        for d, i in enumerate(e.out.index):
            if i is ex.index(rank.name):
                cut[e.out.tensor] = d

    # another coordinate of the same size may bear the name where it is reduced
    bound = any(rank.name in e.over for e in c.einsums)

    def rewrite(root: Expr, over: tuple[str, ...]) -> Expr:
        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e.op == "index":
                return None if rank.name in over else table.get(e)
            if e.op == "load" and str(e.attr) in cut:
                d = cut[str(e.attr)]
                split_at = (quotient(args[d], n), remainder(args[d], n))
                return ex.load(str(e.attr), (*args[:d], *split_at, *args[d + 1 :]), e.dtype)
            if e.op == "floordiv" and args[1] is n:
                return quotient(args[0], n)
            if e.op == "mod" and args[1] is n:
                return remainder(args[0], n)
            return None

        return ex.rebuild(root, rule)

    def place(e: Einsum) -> Access:
        if e.out.tensor not in cut:
            return e.out
        d = cut[e.out.tensor]
        return Access(e.out.tensor, (*e.out.index[:d], ex.index(high), ex.index(low), *e.out.index[d + 1 :]))

    def shape(t: Tensor) -> Tensor:
        if t.name not in cut:
            return t
        d = cut[t.name]
        return replace(t, shape=(*t.shape[:d], sizes[high], sizes[low], *t.shape[d + 1 :]))

    return replace(
        c,
        ranks=tuple(x for r in c.ranks for x in ((*halves, *((r,) if bound else ())) if r is rank else (r,))),
        tensors=tuple(shape(t) for t in c.tensors),
        einsums=tuple(replace(e, out=place(e), body=rewrite(e.body, e.over)) for e in c.einsums),
    )


def quotient(t: Expr, n: Expr) -> Expr:
    """t // n, carried out for t = a·n + b (0 ≤ b < n: b is a remainder or a rank of size n, as `_split` builds them)."""
    if t.op == "add" and t.args[0].op == "mul" and t.args[0].args[1] is n and t.args[1].op in ("index", "mod"):
        return t.args[0].args[0]
    return t // n


def remainder(t: Expr, n: Expr) -> Expr:
    if t.op == "add" and t.args[0].op == "mul" and t.args[0].args[1] is n and t.args[1].op in ("index", "mod"):
        return t.args[1]
    return t % n


def unify(c: Cascade) -> Cascade:
    """Name the output ranks of every Einsum as its first reader names them, from the outputs backwards."""
    einsums = list(c.einsums)
    sizes: Mapping[str, Rank] = c.rank
    read_as: dict[str, tuple[Expr, ...]] = {}
    for k in reversed(range(len(einsums))):
        e = einsums[k]
        wanted = read_as.get(e.out.tensor)
        if wanted is not None and wanted != e.out.index and _renames(e, wanted, sizes):
            e = _rename(e, dict(zip(e.out.index, wanted)))
            einsums[k] = e
        for load in e.reads:
            read_as.setdefault(str(load.attr), load.args)
    used = frozenset().union(*(e.ranks | set(e.over) for e in einsums))
    return replace(c, einsums=tuple(einsums), ranks=tuple(r for r in c.ranks if r.name in used))


def _renames(e: Einsum, wanted: tuple[Expr, ...], ranks: Mapping[str, Rank]) -> bool:
    """Whether the output of `e` may be indexed by `wanted`: distinct ranks of the same sizes, none of them reduced."""
    if any(i.op != "index" for i in (*wanted, *e.out.index)) or len(set(wanted)) != len(wanted):
        return False
    names = [str(i.attr) for i in wanted]
    same = all(ranks[a].size == ranks[str(b.attr)].size for a, b in zip(names, e.out.index))
    return same and not set(names) & set(e.over)


def _rename(e: Einsum, table: Mapping[Expr, Expr]) -> Einsum:
    return replace(
        e,
        out=Access(e.out.tensor, tuple(table.get(i, i) for i in e.out.index)),
        body=ex.substitute(e.body, table),
    )


def fuse(c: Cascade, high: str, low: str) -> Cascade:
    """Two ranks of the output as one: the inverse of `split`; the cascade itself where they do not stay side by side.

    Tensors that only one of them indexes keep it, and are read at its quotient or remainder.
    """
    name = f"{high}{low}"
    h, g, n, size = ex.index(high), ex.index(low), ex.index(name), size_term(c.rank[low].size)
    table = {h: n // size, g: n % size}
    both = {t for t, es in c.producers.items() if all(h in e.out.index and g in e.out.index for e in es)}
    if name in c.rank or any(_apart(e, both, h, g) for e in c.einsums):
        return c

    def place(args: tuple[Expr, ...], x: Expr, y: Expr) -> tuple[Expr, ...]:
        return tuple(n if i is x else i for i in args if i is not y)

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op == "load" and str(e.attr) in both:
            return ex.load(str(e.attr), place(args, table[h], table[g]), e.dtype)
        whole = e.op == "add" and args[0] is table[h] * size and args[1] is table[g]
        return n if whole else table.get(e)

    def shape(t: Tensor) -> Tensor:
        if t.name not in both:
            return t
        out = c.producers[t.name][-1].out.index
        sizes = [s if i is not h else s * c.rank[low].size for i, s in zip(out, t.shape) if i is not g]
        return replace(t, shape=tuple(sizes))

    einsums = tuple(
        replace(e, out=Access(e.out.tensor, place(e.out.index, h, g)), body=ex.rebuild(e.body, rule))
        if e.out.tensor in both else e for e in c.einsums
    )
    used = frozenset().union(*(e.ranks | set(e.over) for e in einsums))
    fused = Rank(name, c.rank[high].size * c.rank[low].size)
    ranks = [x for r in c.ranks for x in ((fused, r) if r.name == high else (r,)) if x.name in used]
    return replace(c, ranks=tuple(ranks), tensors=tuple(shape(t) for t in c.tensors), einsums=einsums)


def _apart(e: Einsum, both: set[str], h: Expr, g: Expr) -> bool:
    """Does an Einsum keep the two ranks of a tensor apart: reduce one, or read the tensor elsewhere than at both?"""
    read = [x for x in e.reads if str(x.attr) in both]
    elsewhere = [x for x in read if e.out.tensor not in both or h not in x.args or g not in x.args]
    return bool(elsewhere) or bool({str(h.attr), str(g.attr)} & set(e.over))
