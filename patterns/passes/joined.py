"""Keys from several places under one row: products laid end to end are one product over joined keys.

    before   A[p,i] = Σ_e Q[p,e]·K[i,e];  B[p,j] = Σ_e Q[p,e]·X[j,e];  S[p,m] = where(m < M, A[p,m], B[p,m − M])
    after    Z[p,m] = Σ_e Q[p,e]·where(m < M, K[m,e], X[m − M,e]);     S[p,m] = Z[p,m]

Where the pieces have queries of their own (words and entities), they are joined along e, each beside zeros. What else
differs between the pieces, a mask or a bias, stays a term over the joined coordinate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from .. import expr as ex
from ..attention.concat import Segment, joined_rank, laid, pieces
from ..attention.score import factors, only, without
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, as_size, size_term
from ..expr import Expr


def join(c: Cascade) -> Cascade:
    """The cascade with products that lie end to end under one row as one; the cascade itself where there are none."""
    joining = _Joining(c)
    einsums: list[Einsum] = []
    for e in c.einsums:
        body = joining.rewritten(e.body)
        einsums += [*joining.made, replace(e, body=body)]
        joining.made.clear()
    if not joining.tensors.keys() - c.tensor.keys():
        return c
    return replace(c, ranks=tuple(joining.ranks.values()), tensors=tuple(joining.tensors.values()), einsums=tuple(einsums))


def merged(cond: Expr, a: Expr, b: Expr) -> Expr:
    """`where(cond, a, b)` with the choice as far inside as both are alike, so that a joined mask stays a mask.

    before   where(c, where(k, x, −∞), where(l, x, −∞))        after   where(where(c, k, l), x, −∞)
    """
    if a is b:
        return a
    if a.op == b.op and a.attr == b.attr and a.dtype == b.dtype and a.args and a.op != "load":
        return ex.make(a.op, tuple(merged(cond, x, y) for x, y in zip(a.args, b.args)), a.attr, a.dtype)
    if cond.dtype == a.dtype == b.dtype:
        return (cond & a) | (~cond & b)
    return ex.where(cond, a, b)


@dataclass(frozen=True)
class _Sides:
    """One product of a run: its operands over the run's coordinates, kept while `inside` holds; `rank` is reduced."""

    near: Expr
    far: Expr
    rank: str
    inside: Expr


class _Apart(Exception):
    """These products do not make one."""


class _Joining:
    """A cascade's tensors and ranks while its products are joined; `made` are the new Einsums that nobody has taken yet."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.ranks: dict[str, Rank] = dict(c.rank)
        self.tensors: dict[str, Tensor] = {t.name: t for t in c.tensors}
        self.made: list[Einsum] = []
        self.producers = {name: es[0] for name, es in c.producers.items() if len(es) == 1}
        last = c.producers[c.outputs[0]][-1].out.index
        self.rows = {str(i.attr) for i in last}
        self.keys = {r for e in c.einsums if e.op is not None and e.out.index == last for r in e.over}
        self._memo: dict[Expr, Expr] = {}

    def rewritten(self, e: Expr) -> Expr:
        """The outermost joins first, for an inner one lies at its place in the outer one; but keys before queries."""
        if e not in self._memo:
            out = self.chain(e)
            if out is None:
                args = tuple(self.rewritten(a) for a in e.args)
                out = e if args == e.args else ex.make(e.op, args, e.attr, e.dtype)
            self._memo[e] = out
        return self._memo[e]

    def chain(self, e: Expr) -> Expr | None:
        """A term that is joined of pieces with products in them, over one product."""
        rank = joined_rank(e)
        if rank is None:
            return None
        if rank in self.rows:
            e = ex.where(e.args[0], *map(self.rewritten, e.args[1:]))
        if joined_rank(e) != rank:
            return e
        found = pieces(e, rank, self.ranks[rank].size)
        for run in _runs([bool(self.products(p, rank)) for p in found]):
            size = sympy.sympify(found[run.stop - 1].hi) - sympy.sympify(found[run.start].lo)
            # a longer row may end by columns without a key
            whole = any(sympy.sympify(self.ranks[k].size) == size for k in self.keys)
            if whole or rank in self.keys | self.rows:
                try:
                    whole_run = self.run(found[run], rank)
                except _Apart:
                    continue
                found[run] = [Segment(rank, _merged(whole_run), whole_run[0].lo, whole_run[-1].hi)]
                return laid([ex.index(rank) < size_term(p.hi) for p in found], [p.term for p in found])
        return e if rank in self.rows else None

    def products(self, piece: Segment, rank: str) -> list[Expr]:
        """The products that a piece reads at its own coordinate."""
        at = {ex.index(rank) - size_term(piece.lo)} if piece.size != 1 else set()
        found = []
        for x in ex.loads(piece.term):
            made = self.producers.get(str(x.attr))
            if made is None or made.op != "add" or any(str(y.attr) in self.c.producers for y in made.reads):
                continue
            if {i for i in x.args if rank in i.ranks} == at:
                found.append(x)
        return found

    def run(self, run: Sequence[Segment], rank: str) -> list[Segment]:
        """Pieces side by side, over the products that they have in common."""
        read = [self.products(p, rank) for p in run]
        if len({len(x) for x in read}) > 1:
            raise _Apart
        tables: list[dict[Expr, Expr]] = [{} for _ in run]
        for loads in zip(*read):
            for table, x, z in zip(tables, loads, self.product(run, loads, rank)):
                table[x] = z
        terms = [ex.substitute(p.term, t) for p, t in zip(run, tables)]
        return [replace(p, term=t) for p, t in zip(run, terms)]

    def product(self, run: Sequence[Segment], loads: Sequence[Expr], rank: str) -> list[Expr]:
        """One product in the place of each piece's, over coordinates of its own where it is read through index terms."""
        others = [tuple(i for i in x.args if rank not in i.ranks) for x in loads]
        if len({x.dtype for x in loads}) > 1 or len(set(others)) > 1:
            raise _Apart
        start, end = run[0].lo, run[-1].hi
        size = as_size(sympy.expand(sympy.sympify(end) - sympy.sympify(start)))
        whole = start == 0 and sympy.sympify(size) == sympy.sympify(self.ranks[rank].size)
        at = ex.index(rank if whole else self.fresh(rank, size))
        table = self.local(loads[0], rank)
        shown = next((self.part(p, x, at, start, table, None) for p, x in zip(run, loads) if p.size != 1), None)
        parts = [self.part(p, x, at, start, table, shown) for p, x in zip(run, loads)]
        body, over = self.alike(parts) if _alike(parts, self.ranks) else self.beside(parts)
        index = (*(table[i] for i in others[0]), at)
        name = _fresh(str(loads[0].attr).rstrip("0123456789"), self.tensors)
        self.tensors[name] = Tensor(name, tuple(self.ranks[str(i.attr)].size for i in index), loads[0].dtype)
        self.producers[name] = Einsum(Access(name, index), body, "add", (over,))
        self.made.append(self.producers[name])
        return [ex.load(name, (*others[0], ex.index(rank) - size_term(start)), loads[0].dtype)] * len(run)

    def local(self, x: Expr, rank: str) -> dict[Expr, Expr]:
        """The coordinates over which a product is defined, for those at which it is read."""
        table: dict[Expr, Expr] = {}
        for i, size in zip(x.args, self.tensors[str(x.attr)].shape):
            if rank not in i.ranks and i not in table:
                plain = i.op == "index" and sympy.sympify(self.ranks[str(i.attr)].size) == sympy.sympify(size)
                table[i] = i if plain else ex.index(self.fresh("r", size))
            elif i in table:
                raise _Apart
        return table

    def part(
        self, p: Segment, x: Expr, at: Expr, start: Size, table: Mapping[Expr, Expr], shown: _Sides | None
    ) -> _Sides:
        """The operands of one product, over the coordinates of `table` and `at` for the key's."""
        e = self.producers[str(x.attr)]
        if len(e.over) != 1:
            raise _Apart
        here = at - size_term(as_size(sympy.expand(sympy.sympify(p.lo) - sympy.sympify(start))))
        args = [here if p.rank in i.ranks else table[i] for i in x.args]
        over = self.fresh("e", self.ranks[e.over[0]].size)
        body = ex.substitute(e.body, {**dict(zip(e.out.index, args)), ex.index(e.over[0]): ex.index(over)})
        inside = at < size_term(as_size(sympy.expand(sympy.sympify(p.hi) - sympy.sympify(start))))
        if p.size != 1:
            return _two_sides(without(body, str(at.attr)), only(body, str(at.attr)), over, at, inside)
        # one key has no coordinate: it is what lacks the query's
        queries = shown.near.ranks - shown.far.ranks - {shown.rank} if shown is not None else frozenset()
        for q in sorted(queries):
            return _two_sides(only(body, q), without(body, q), over, at, inside)
        # nor has one query: it is what the other pieces have as well
        near = ex.substitute(shown.near, {ex.index(shown.rank): ex.index(over)}) if shown is not None else None
        above, below = factors(body)
        if near not in above or below or len(above) != 2:
            raise _Apart
        return _two_sides(near, next(f for f in above if f is not near), over, at, inside)

    def alike(self, parts: Sequence[_Sides]) -> tuple[Expr, str]:
        """The same queries for all: keys end to end."""
        first = parts[0]
        far = [ex.substitute(p.far, {ex.index(p.rank): ex.index(first.rank)}) for p in parts]
        return first.near * laid([p.inside for p in parts], far), first.rank

    def beside(self, parts: Sequence[_Sides]) -> tuple[Expr, str]:
        """Queries of their own: both sides end to end along e, keys beside zeros where other queries are.

            Σ_e where(e < E, Q[p,e], R[p,e − E]) · where(e < E, where(m < M, K[m,e], 0), where(m < M, 0, X[m − M,e − E]))
        """
        sizes = [self.ranks[p.rank].size for p in parts]
        over = self.fresh("e", as_size(sympy.expand(sum(map(sympy.sympify, sizes)))))
        near, far, ends = [], [], []
        before: Size = 0
        for n, (p, size) in enumerate(zip(parts, sizes)):
            table = {ex.index(p.rank): ex.index(over) - size_term(before)}
            before = as_size(sympy.sympify(before) + size)
            near.append(ex.substitute(p.near, table))
            own = ex.substitute(p.far, table)
            zero = ex.const(0.0, own.dtype)
            far.append(laid([q.inside for q in parts], [own if k == n else zero for k in range(len(parts))]))
            ends.append(ex.index(over) < size_term(before))
        return laid(ends, near) * laid(ends, far), over

    def fresh(self, like: str, size: Size) -> str:
        name = _fresh(like, self.ranks)
        self.ranks[name] = Rank(name, size)
        return name


def _runs(wanted: Sequence[bool]) -> list[slice]:
    """Stretches of at least two pieces that are wanted."""
    out, start = [], 0
    for n, yes in enumerate([*wanted, False]):
        if not yes:
            out += [slice(start, n)] if n - start > 1 else []
            start = n + 1
    return out


def _merged(run: Sequence[Segment]) -> Expr:
    """Pieces over one product as one term; equal ones side by side are one."""
    out, after = run[-1].term, run[-1].term
    for p in reversed(run[:-1]):
        if p.term is not after:
            out = merged(ex.index(p.rank) < size_term(p.hi), p.term, out)
        after = p.term
    return out


def _two_sides(near: Expr | None, far: Expr | None, rank: str, at: Expr, inside: Expr) -> _Sides:
    if near is None or far is None or str(at.attr) in near.ranks or not {rank} <= near.ranks & far.ranks:
        raise _Apart
    return _Sides(near, far, rank, inside)


def _alike(parts: Sequence[_Sides], ranks: Mapping[str, Rank]) -> bool:
    """Do all pieces have the same queries?"""
    first = parts[0]
    return all(
        ex.substitute(p.near, {ex.index(p.rank): ex.index(first.rank)}) is first.near
        and sympy.sympify(ranks[p.rank].size) == sympy.sympify(ranks[first.rank].size)
        for p in parts
    )


def _fresh(stem: str, taken: Mapping[str, object]) -> str:
    name, k = stem, 0
    while name in taken:
        name, k = f"{stem}{k}", k + 1
    return name
