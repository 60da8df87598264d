"""Concatenated scores: a reduction over pieces laid end to end is the merge of reductions over each piece.

    before   GM[p] = max_r where(r < M, S[p,r], sink)          r over M + 1 elements
    after    GM_1[p] = max_m S[p,m];  GM[p] = max(GM_1[p], sink)

This is how attention sinks and other extra columns become part of the row state instead of a longer rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import sympy

from .. import expr as ex
from ..cascade import OF_SIZES, Access, Cascade, Einsum, Rank, Size, Tensor, as_size, size_term, term_size
from ..expr import Expr
from ..membership import membership
from ..terms.affine import affine
from ..terms.extents import settled


@dataclass(frozen=True)
class Segment:
    """What a joined term is for the coordinates from `lo` to `hi` of its rank."""

    rank: str
    term: Expr
    lo: Size
    hi: Size

    @property
    def size(self) -> Size:
        return as_size(sympy.expand(sympy.sympify(self.hi) - sympy.sympify(self.lo)))

    @property
    def own(self) -> Expr:
        """The term over the piece's own coordinate, from 0."""
        i = ex.index(self.rank)
        return self.term if self.lo == 0 else ex.substitute(self.term, {i: i + size_term(self.lo)})


def joined_rank(e: Expr) -> str | None:
    """The rank along which a term is laid end to end: `where(rank < size, …, …)`."""
    if e.op == "where" and e.args[0].op == "lt" and e.args[0].args[0].op == "index" and is_size(e.args[0].args[1]):
        return str(e.args[0].args[0].attr)
    return None


def pieces(e: Expr, rank: str, hi: Size, lo: Size = 0) -> list[Segment]:
    """The pieces of a term along a rank, from `lo` to `hi`."""
    if joined_rank(e) != rank:
        return [Segment(rank, e, lo, hi)]
    cut = term_size(e.args[0].args[1])
    return [*pieces(e.args[1], rank, cut, lo), *pieces(e.args[2], rank, hi, cut)]


def laid(ends: Sequence[Expr], terms: Sequence[Expr]) -> Expr:
    """Terms end to end, each while the condition of its end holds; a cast that all have stands outside."""
    if len({(t.op, t.dtype, t.args[0].dtype) for t in terms if t.op == "cast"}) == 1 and all(t.op == "cast" for t in terms):
        return ex.cast(laid(ends, [t.args[0] for t in terms]), terms[0].dtype)
    out = terms[-1]
    for end, t in zip(reversed(ends[:-1]), reversed(terms[:-1])):
        out = ex.where(end, t, out)
    return out


def split(c: Cascade) -> Cascade:
    """Split every reduction over a rank that joins pieces; a cascade without such a rank is answered unchanged."""
    whole = _whole(c)
    c = _inline(c, whole)
    # what was made of a longer rank may be read of its first part alone
    whole |= _whole(c)
    joined = {
        r: cut for e in c.einsums for r in e.over
        if r not in whole and not _multiplies_inputs(c, e) and (cut := _cut(c, e, r)) is not None
    }
    if not joined:
        return settle(c)
    ranks = dict(c.rank)
    tensors = {t.name: t for t in c.tensors}
    einsums: list[Einsum] = []
    for e in c.einsums:
        (rank,) = e.over if len(e.over) == 1 else ("",)
        cut = joined.get(rank)
        if e.op is None or cut is None:
            einsums.append(e)
            continue
        pieces = [_first(e, rank, cut, ranks), _rest(e, rank, cut, ranks)]
        merged: Expr | None = None
        for n, (body, over) in enumerate(pieces):
            term = body
            if over:
                part = f"{e.out.tensor}_{n + 1}"
                own = tensors[e.out.tensor]
                tensors[part] = Tensor(part, own.shape, own.dtype)
                einsums.append(Einsum(Access(part, e.out.index), body, e.op, (over,)))
                term = ex.load(part, e.out.index, own.dtype)
            merged = term if merged is None else ex.binary(e.op, merged, term)
        assert merged is not None
        einsums.append(Einsum(e.out, merged))
    used = {str(r.attr) for e in einsums for r in e.reads} | {e.out.tensor for e in einsums}
    return settle(
        replace(
            c,
            ranks=tuple(ranks.values()),
            tensors=tuple(t for t in tensors.values() if t.name in used),
            einsums=tuple(einsums),
        )
    )


def _whole(c: Cascade) -> set[str]:
    """Ranks whose pieces are parts of one term: the last product reduces all of them, and each score is there for all.

    before   S[p,m] = QK[p,m] + where(m < 63, X[p,m], 0);  O[p,f] = Σ_m …·V[m,f]
    """
    last = c.producers[c.outputs[0]][-1].out.index
    ranks = {r for e in c.einsums if e.op is not None and e.out.index == last for r in e.over}
    return {r for r in ranks if not any(_in_pieces(c, e, r) for e in c.einsums)}


def _multiplies_inputs(c: Cascade, e: Einsum) -> bool:
    """A product of queries and keys reduces what both have, however it is laid out."""
    return e.op == "add" and not any(str(x.attr) in c.producers for x in e.reads)


def _in_pieces(c: Cascade, e: Einsum, rank: str) -> bool:
    """Does a term read, over the rank, what was made of another length or at another coordinate?"""
    made = _made(c)
    for x in e.reads:
        for i, size in zip(x.args, c.tensor[str(x.attr)].shape):
            if str(x.attr) in made and rank in i.ranks and (i is not ex.index(rank) or size != c.rank[rank].size):
                return True
    return False


def _made(c: Cascade) -> set[str]:
    """What is computed; which keys are named, of one part of them or of all, is a condition like any other."""
    return {name for name, all_of in c.producers.items() if membership(all_of[-1]) is None}


def _cut(c: Cascade, e: Einsum, rank: str) -> Size | None:
    """Where a rank is cut: `rank < cut` selects between pieces in the body, with the cut inside the rank.

    The outermost cut counts, and before others one that parts what is computed from what is not.
    """
    found: list[tuple[bool, Size]] = []
    made = _made(c)
    for t in reversed(list(ex.walk(e.body))):
        if joined_rank(t) != rank:
            continue
        if _at_least(c.rank[rank].size, cut := term_size(t.args[0].args[1]), 1):
            first, second = (any(str(x.attr) in made for x in ex.loads(side)) for side in t.args[1:])
            found.append((first == second, cut))
    return min(found, key=lambda x: x[0])[1] if found else None


def _at_least(a: Size, b: Size, n: int) -> bool:
    difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b) - n)
    return bool(difference.is_nonnegative)


def _inline(c: Cascade, whole: Collection[str]) -> Cascade:
    """Pointwise Einsums over a rank that joins pieces, and is not `whole`, are put where they are read."""
    bodies: dict[str, Einsum] = {}
    kept: list[Einsum] = []
    for e in c.einsums:
        e = replace(e, body=_expand(e.body, bodies))
        ranks = frozenset().union(*(i.ranks for i in e.out.index)) - frozenset(whole)
        if e.op is None and e.out.tensor not in c.outputs and any(_cut(c, e, r) is not None for r in ranks):
            bodies[e.out.tensor] = e
        else:
            kept.append(e)
    return replace(c, einsums=tuple(kept)) if bodies else c


def _expand(root: Expr, bodies: dict[str, Einsum]) -> Expr:
    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        producer = bodies.get(str(e.attr)) if e.op == "load" else None
        if producer is None:
            return None
        return ex.substitute(producer.body, dict(zip(producer.out.index, args)))

    return ex.rebuild(root, rule)


def _first(e: Einsum, rank: str, cut: Size, ranks: dict[str, Rank]) -> tuple[Expr, str]:
    body = ex.substitute(e.body, {ex.index(rank) < size_term(cut): ex.TRUE})
    return _over(e, body, rank, ex.const(0), cut, ranks)


def _rest(e: Einsum, rank: str, cut: Size, ranks: dict[str, Rank]) -> tuple[Expr, str]:
    body = ex.substitute(e.body, {ex.index(rank) < size_term(cut): ex.FALSE})
    left = sympy.expand(sympy.sympify(ranks[rank].size) - sympy.sympify(cut))
    return _over(e, body, rank, size_term(cut), as_size(left), ranks)


def _over(e: Einsum, body: Expr, rank: str, start: Expr, size: Size, ranks: dict[str, Rank]) -> tuple[Expr, str]:
    """The body over one piece: at its only coordinate, or over a rank of the piece's size."""
    if size == 1:
        return ex.substitute(body, {ex.index(rank): start}), ""
    taken = frozenset().union(*(i.ranks for i in e.out.index))
    name = next((r.name for r in ranks.values() if r.size == size and r.name not in taken and r.name != rank), "")
    if not name:
        name = f"{rank}_{len(ranks)}"
        ranks[name] = Rank(name, size)
    return ex.substitute(body, {ex.index(rank): start + ex.index(name)}), name


def settle(c: Cascade) -> Cascade:
    """Settle comparisons that the extents of ranks decide, and drop ranks and tensors that nobody uses."""
    table: dict[Expr, Expr] = {}
    last = {r.name: affine(size_term(r.size) - 1) for r in c.ranks}
    sizes = {str(s) for t in c.inputs for s in t.shape if isinstance(s, sympy.Symbol)}
    for e in c.einsums:
        for t in ex.walk(e.body):
            if (known := settled(t, last, sizes)) is not None:
                table[t] = ex.TRUE if known else ex.FALSE
            elif t.op in ("lt", "ge") and t.args[0].op == "index" and is_size(t.args[1]):
                size = c.rank[str(t.args[0].attr)].size
                if _at_least(term_size(t.args[1]), size, 0):
                    table[t] = ex.TRUE if t.op == "lt" else ex.FALSE
                elif t.args[1].is_const and t.args[1].value <= 0:
                    table[t] = ex.FALSE if t.op == "lt" else ex.TRUE
    einsums = tuple(replace(e, body=ex.substitute(e.body, table)) for e in c.einsums) if table else c.einsums
    live = set(c.outputs)
    for e in reversed(einsums):
        if e.out.tensor in live:
            live.update(str(r.attr) for r in e.reads)
    einsums = tuple(e for e in einsums if e.out.tensor in live)
    used = frozenset().union(*(e.ranks | set(e.over) for e in einsums))
    return replace(
        c,
        einsums=einsums,
        ranks=tuple(r for r in c.ranks if r.name in used),
        tensors=tuple(t for t in c.tensors if t.name in live),
    )


def is_size(e: Expr) -> bool:
    """Is a term made of sizes and numbers alone?"""
    return not e.ranks and all(x.op in ("const", "symbol", *OF_SIZES) for x in ex.walk(e))
