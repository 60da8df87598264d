"""What else of an attention leaves a cascade: numbers of its rows, its weights, their sums over heads.

    O[b,h,p,f] = …                                        the attention, whose cascade this is
    L[b,h,p]   = GM[b,h,p] + log(SD[b,h,p])               of a row: a log-sum-exp
    W[b,h,p,m] = SN[b,h,p,m] / SD[b,h,p]                  of a pair: the weights as they are read elsewhere
    A[b,p,m]   = Σ_h W[b,h,p,m];  Y = A / H               the same, averaged over heads

What is lifted by itself is held against the attention's own reductions, term by term: it belongs to it where these are
the same sums and maxima of the same products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.recognise import attention
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, as_size, term_size, verify
from ..expr import Expr
from ..terms.divisions import read_at
from ..verdict import Obstacle


@dataclass(frozen=True)
class Further:
    """One more output: `after` of the sum of `term`, over groups of heads, `group` after one another.

    `term` speaks of the attention's products, row reductions and inputs, at the attention's ranks. `head`: the rank that is
    summed over ("": none), of which one in `group` is left (None: of all of it nothing). `after` reads the sum as `total`;
    it is `total` itself where nothing comes after. `index`: the output's ranks, a group's as the head's own.
    """

    name: str
    term: Expr
    head: str
    group: Expr | None
    total: Expr
    after: Expr
    index: tuple[str, ...]
    dtype: str

    def of_pairs(self, a: Attention) -> bool:
        """Is it a number of every query and key?"""
        return a.key in self.index


@dataclass(frozen=True)
class Several:
    """An attention with what else leaves its cascade."""

    attention: Attention
    further: tuple[Further, ...]


def main(c: Cascade) -> Cascade:
    """The cascade of the first output alone."""
    wanted, einsums = {c.outputs[0]}, list[Einsum]()
    for e in reversed(c.einsums):
        if e.out.tensor in wanted:
            wanted |= {str(x.attr) for x in e.reads}
            einsums.append(e)
    used = frozenset().union(*(e.ranks | set(e.over) for e in einsums))
    return replace(
        c, ranks=tuple(r for r in c.ranks if r.name in used), tensors=tuple(t for t in c.tensors if t.name in wanted),
        einsums=tuple(reversed(einsums)), outputs=c.outputs[:1],
    )


def several(c: Cascade) -> Several | Obstacle:
    """The attention of a cascade's first output, and its other outputs as `with_further` writes them."""
    a = attention(main(c))
    if isinstance(a, Obstacle):
        return a
    out = []
    for name in c.outputs[1:]:
        found = _read(c, a, name)
        if isinstance(found, Obstacle):
            return found
        out.append(found)
    return Several(a, tuple(out))


def with_numbers(c: Cascade) -> Attention | Obstacle:
    """The attention with the numbers of its rows that leave besides; an Obstacle where more leaves than these."""
    s = several(c) if len(c.outputs) > 1 else attention(c)
    if not isinstance(s, Several):
        return s
    if odd := [x.name for x in s.further if x.of_pairs(s.attention) or len(x.index) != len(s.attention.batch) + 1]:
        return Obstacle(f"{odd[0]} is no number of every row")
    return replace(s.attention, further=tuple(x.term for x in s.further))


def _read(c: Cascade, a: Attention, name: str) -> Further | Obstacle:
    (last,) = c.producers[name]
    ranks = tuple(str(i.attr) for i in last.out.index)
    sums = [x for x in ex.loads(last.body) if str(x.attr).startswith(f"{name}_sum")]
    dtype = c.tensor[name].dtype
    if not sums:
        if not {*ranks} <= {*a.batch, a.query, a.key}:
            return Obstacle(f"{name} is of no pair", name)
        total = ex.load(f"{name}_sum", last.out.index, last.body.dtype)
        return Further(name, last.body, "", None, total, total, ranks, dtype)
    (total,) = sums
    (summed,) = c.producers[str(total.attr)]
    (part,) = summed.reads
    (each,) = c.producers[str(part.attr)]
    at = dict(zip((str(i.attr) for i in each.out.index), part.args))
    head = next(r for r, i in at.items() if set(summed.over) & i.ranks)
    whole = at[head]
    group = None if whole.op == "index" else whole.args[0].args[1]
    own = {str(i.attr): r for r, i in at.items() if i.op == "index"} | {str(x.attr): head for x in _indices(whole)}
    return Further(name, each.body, head, group, total, last.body, tuple(own[r] for r in ranks), dtype)


def _indices(e: Expr) -> list[Expr]:
    return [x for x in ex.walk(e) if x.op == "index"]


def with_further(c: Cascade, others: Mapping[str, tuple[Cascade, Mapping[str, str]]]) -> Cascade | Obstacle:
    """The cascade of an attention with more outputs: each, by name, is lifted by itself, with its inputs' names in `c`."""
    a = attention(c)
    if isinstance(a, Obstacle):
        return a
    if a.cascade != c:
        return Obstacle("its heads are read through an index map")
    ranks, tensors, einsums = list(c.ranks), list(c.tensors), list(c.einsums)
    for name, (other, known) in others.items():
        found = _Match(a, other, known).found(name)
        if isinstance(found, Obstacle):
            return found
        more, made, written = found
        ranks += more
        tensors += made
        einsums += written
    return verify(replace(
        c, ranks=tuple(ranks), tensors=tuple(tensors), einsums=tuple(einsums), outputs=(*c.outputs, *others),
    ))


def _halves(e: Expr) -> tuple[Expr, Expr, Expr] | None:
    """i, n and j of a coordinate i·n + j, made of two ranks."""
    if e.op != "add" or e.args[0].op != "mul":
        return None
    (high, n), low = e.args[0].args, e.args[1]
    return (high, n, low) if high.op == low.op == "index" and not n.ranks and not ex.loads(n) else None


class _NoMatch(Exception):
    """Carries a reason to the one place that catches it."""


class _Match:
    """One cascade held against an attention."""

    def __init__(self, a: Attention, other: Cascade, known: Mapping[str, str]) -> None:
        self.a, self.c, self.known = a, other, known
        self.extent = {r.name: r.size for r in other.ranks}
        self.pointwise: dict[str, tuple[tuple[Expr, ...], Expr]] = {}
        # reductions that are the attention's: its Einsum, and its ranks as terms over the other's
        self.same: dict[str, tuple[Einsum, Mapping[str, Expr]]] = {}
        self.sums: dict[str, Einsum] = {}

    def found(self, name: str) -> tuple[list[Rank], list[Tensor], list[Einsum]] | Obstacle:
        try:
            return self.written(name)
        except _NoMatch as no:
            return Obstacle(str(no), name)

    def written(self, name: str) -> tuple[list[Rank], list[Tensor], list[Einsum]]:
        """Further ranks, tensors and Einsums, over the attention's own."""
        for e in self.c.einsums:
            if not e.out.plain:
                raise _NoMatch(f"{e.out.tensor} is written in pieces")
            body = self.own(e.body)
            if e.op is None:
                self.pointwise[e.out.tensor] = (e.out.index, ex.cast(body, self.c.tensor[e.out.tensor].dtype))
            elif (match := self.matched(replace(e, body=body))) is not None:
                self.same[e.out.tensor] = match
            else:
                self.sums[e.out.tensor] = replace(e, body=body)
        (last,) = self.c.producers[self.c.outputs[0]]
        at, term = last.out.index, self.own(ex.load(last.out.tensor, last.out.index, self.c.tensor[last.out.tensor].dtype))
        sums = [x for x in ex.loads(term) if str(x.attr) in self.sums]
        if not sums:
            place = self.place(term)
            own = self.renamed(term, place)
            index = tuple(self.rank_of(i, place) for i in at)
            return [], [self.tensor(name, index, term.dtype)], [Einsum(Access(name, index), own)]
        if len(sums) > 1 or sums[0].args != self.sums[str(sums[0].attr)].out.index:
            raise _NoMatch("it is made of several sums over the weights")
        return self.summed(name, at, term, sums[0])

    def summed(
        self, name: str, at: tuple[Expr, ...], term: Expr, load: Expr
    ) -> tuple[list[Rank], list[Tensor], list[Einsum]]:
        """A sum over heads: W[b,h,p,m] = …; S[b,p,m] = Σ_h W; Y = after(S)."""
        e = self.sums[str(load.attr)]
        place = self.place(e.body)
        if e.op != "add" or len(e.over) != 1:
            raise _NoMatch(f"{e.out.tensor} reduces weights by {e.op} over {', '.join(e.over)}")
        (over,) = e.over
        head = next((r for r, i in place.items() if over in i.ranks), "")
        if head not in self.a.batch:
            raise _NoMatch(f"{e.out.tensor} sums weights over {head or over}, which is no head")
        whole = place[head]
        ranks, tensors, einsums = list[Rank](), list[Tensor](), list[Einsum]()
        names = {i: r for r, i in place.items() if i.op == "index"}
        if whole.op != "index":
            halves = _halves(whole)
            if halves is None or halves[2] is not ex.index(over):
                raise _NoMatch(f"{e.out.tensor} sums over a part of {head}")
            for i in (halves[0], halves[2]):
                names[i] = f"{name}_{head}{len(ranks)}"
                ranks.append(Rank(names[i], self.extent[str(i.attr)]))
        table = {i: ex.index(r) for i, r in names.items()}
        each, total = f"{name}_each", f"{name}_sum"
        order = tuple(r for r in (*self.a.batch, self.a.query, self.a.key) if r in place)
        body = self.renamed(e.body, place)
        index = tuple(ex.index(r) for r in order)
        tensors.append(self.tensor(each, index, body.dtype))
        einsums.append(Einsum(Access(each, index), body))
        kept = tuple(table[i] for i in e.out.index)
        part = ex.load(each, tuple(ex.substitute(place[r], table) for r in order), body.dtype)
        tensors.append(Tensor(total, tuple(self.size(i, ranks) for i in kept), body.dtype))
        einsums.append(Einsum(Access(total, kept), part, "add", (str(table[ex.index(over)].attr),)))
        out = tuple(table[i] for i in at)
        sum_load = ex.load(total, kept, load.dtype)
        finish = ex.substitute(ex.substitute(term, {load: sum_load}), table)
        if any(str(x.attr) != total for x in ex.loads(finish)):
            raise _NoMatch("its sum over heads meets other tensors")
        tensors.append(Tensor(name, tuple(self.size(i, ranks) for i in out), term.dtype))
        einsums.append(Einsum(Access(name, out), finish))
        return ranks, tensors, einsums

    def size(self, i: Expr, more: list[Rank]) -> Size:
        known = {**self.a.cascade.rank, **{r.name: r for r in more}}
        return known[str(i.attr)].size

    def tensor(self, name: str, index: tuple[Expr, ...], dtype: str) -> Tensor:
        return Tensor(name, tuple(self.a.cascade.rank[str(i.attr)].size for i in index), dtype)

    # terms over the attention's reductions

    def own(self, root: Expr) -> Expr:
        """The term with pointwise Einsums inlined, and reductions of the attention as loads of its own."""

        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e.op != "load":
                return None
            name = str(e.attr)
            if name in self.pointwise:
                at, body = self.pointwise[name]
                return read_at(body, dict(zip(at, args, strict=True)), self.extent)
            if name in self.same:
                mine, ranks = self.same[name]
                (out,) = (x.out.index for x in self.c.producers[name])
                table = dict(zip(out, args, strict=True))
                at = tuple(ex.substitute(ranks[str(i.attr)], table) for i in mine.out.index)
                return ex.load(mine.out.tensor, at, self.a.cascade.tensor[mine.out.tensor].dtype)
            return ex.load(self.known[name], args, e.dtype) if name in self.known else None

        return ex.rebuild(root, rule)

    def matched(self, e: Einsum) -> tuple[Einsum, Mapping[str, Expr]] | None:
        """The product or reduction of the attention that an Einsum is, with the attention's ranks as terms over its own."""
        for mine in (*self.a.products, *self.a.row):
            table: dict[str, Expr] = {}
            if mine.op != e.op or len(mine.over) != len(e.over) or not self.alike(mine.body, e.body, table):
                continue
            reduced = [table.get(r) for r in mine.over]
            if set(reduced) != {ex.index(r) for r in e.over}:
                continue
            if all(str(i.attr) in table for i in mine.out.index) and self.sized(table):
                return mine, table
        return None

    def sized(self, table: Mapping[str, Expr]) -> bool:
        """Do ranks have the sizes of what stands for them?"""
        sizes = {r.name: r.size for r in self.a.cascade.ranks}
        for r, i in table.items():
            if i.op == "index" and self.extent[str(i.attr)] != sizes[r]:
                return False
            if i.is_const and (i.value != 0 or sizes[r] != 1):
                return False
            if i.op != "index" and not i.is_const:
                halves = _halves(i)
                if halves is None or self.extent[str(halves[2].attr)] != term_size(halves[1]):
                    return False
                if as_size(sympy.expand(sympy.sympify(self.extent[str(halves[0].attr)]) * term_size(halves[1]))) != sizes[r]:
                    return False
        return True

    def alike(self, mine: Expr, theirs: Expr, table: dict[str, Expr]) -> bool:
        """Are two terms the same, the ranks of the first taken for terms over the ranks of the second?"""
        if mine.op == "index":
            return table.setdefault(str(mine.attr), theirs) is theirs
        if (mine.op, mine.attr, mine.dtype, len(mine.args)) != (theirs.op, theirs.attr, theirs.dtype, len(theirs.args)):
            return False
        return all(self.alike(a, b, table) for a, b in zip(mine.args, theirs.args))

    # ranks

    def place(self, term: Expr) -> dict[str, Expr]:
        """The attention's ranks as terms over those of an output, read off the reductions that it reads."""
        made = {e.out.tensor: e for e in (*self.a.products, *self.a.row)}
        place: dict[str, Expr] = {}
        for x in ex.loads(term):
            if str(x.attr) in self.sums:
                raise _NoMatch(f"it reads {self.sums[str(x.attr)]}, which is none of the attention's own sums")
            if str(x.attr) in made:
                for i, there in zip(made[str(x.attr)].out.index, x.args, strict=True):
                    if place.setdefault(str(i.attr), there) is not there:
                        raise _NoMatch("it reads the attention's rows at several places")
        if not place:
            raise _NoMatch("it reads none of the attention's own sums")
        loose = term.ranks - frozenset().union(*(i.ranks for i in place.values()))
        if loose:
            raise _NoMatch(f"it varies over {min(loose)}, over which no row of the attention does")
        return place

    def renamed(self, term: Expr, place: Mapping[str, Expr]) -> Expr:
        """The term over the attention's ranks."""
        table: dict[Expr, Expr] = {}
        for r, i in place.items():
            mine = ex.index(r)
            if i.op == "index":
                table[i] = mine
            elif (halves := _halves(i)) is not None:
                high, n, low = halves
                table |= {i: mine, high: mine // n, low: mine % n}
            elif not i.is_const:
                raise _NoMatch(f"its {r} is read at {i}")
        # reductions are read at the attention's own coordinates
        made = {e.out.tensor: e for e in (*self.a.products, *self.a.row)}
        own = [x for x in ex.loads(term) if str(x.attr) in made]
        loads = {x: ex.load(str(x.attr), made[str(x.attr)].out.index, x.dtype) for x in own}
        held = {y: ex.load(f"held {n}", (), y.dtype) for n, y in enumerate(loads.values())}
        term = ex.substitute(term, {x: held[y] for x, y in loads.items()})
        return ex.substitute(ex.substitute(term, table), {h: y for y, h in held.items()})

    def rank_of(self, i: Expr, place: Mapping[str, Expr]) -> Expr:
        found = next((r for r, there in place.items() if there is i), "")
        if not found:
            raise _NoMatch(f"its {i} is none of the attention's ranks")
        return ex.index(found)
