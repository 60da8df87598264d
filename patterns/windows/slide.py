"""Windows that move with their row: keys named by how far they are from it become the keys themselves.

    before   QK[i,j] = Σ_e Q[i,e]·K[i + j,e];  GM[i] = max_j S[i,j];                    O[i,f] = Σ_j A[i,j]·V[i + j,f]
    after    QK[i,m] = Σ_e Q[i,e]·K[m,e];      GM[i] = max_m where(0 ≤ m − i < W, S[i,m], −∞);   O[i,f] = Σ_m A[i,m]·V[m,f]

The key is m = i + j; a bias by distance B[j] is B[m − i], and rows reduce only what lies in their window, so that what is
left is an attention under a mask, whose tiles are counted and skipped like any other's. A score that a row takes the
maximum of is −∞ outside of the window, and so are the exponentials of it 0; what else is reduced is what its reduction
yields over nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import sympy

from .. import expr as ex
from ..cascade import IDENTITY, Access, Cascade, Einsum, Rank, as_size, size_term
from ..expr import Expr
from ..terms.divisions import collected


class _NoWindows(Exception):
    """These are no windows of one rank."""


def slide(c: Cascade, key: str) -> Cascade:
    """The cascade over keys in the place of distances; itself where its values are not read at row + distance."""
    try:
        return _Slide(c, key).cascade()
    except _NoWindows:
        return c


class _Slide:
    """One cascade, whose last Einsum reads values at `row + window`; `key` is the rank of their sums."""

    def __init__(self, c: Cascade, window: str) -> None:
        self.c, self.window = c, window
        last = c.producers[c.outputs[0]][-1]
        final = next((e for e in c.einsums if e.over == (window,) and e.out.index == last.out.index), None)
        if final is None:
            raise _NoWindows
        rows = {r for x in final.reads for i in x.args for r in self.rows(i) if ex.index(r) in final.out.index}
        if len(rows) != 1:
            raise _NoWindows
        (self.row,) = rows
        self.key = fresh("u", c)
        size = sympy.sympify(c.rank[self.row].size) + sympy.sympify(c.rank[window].size) - 1
        self.rank = Rank(self.key, as_size(sympy.expand(size)))
        self.extent = {r.name: r.size for r in (*c.ranks, self.rank)}
        distance = ex.index(self.key) - ex.index(self.row)
        self.inside = (distance >= 0) & (distance < size_term(c.rank[window].size))
        self.moved: dict[str, Einsum] = {}
        # scores that are bounded by their row's maximum: masked where they are defined, a bare product behind it
        tops = [_uncast(e.body) for e in c.einsums if e.op == "max" and window in e.over]
        bounded = {str(x.attr) for x in tops if x.op == "load"}
        self.scores = bounded & {e.out.tensor for e in c.einsums if e.op is None and e.body.is_float}
        self.behind = {
            e.out.tensor: f"{e.out.tensor}_in" for e in c.einsums
            if e.out.tensor in bounded and e.op == "add" and {window, self.row} <= {str(i.attr) for i in e.out.index}
        }
        if not c.tensor.keys().isdisjoint(self.behind.values()):
            raise _NoWindows
        self.scores |= set(self.behind.values())
        self.pointwise: dict[str, Einsum] = {}

    def rows(self, i: Expr) -> frozenset[str]:
        """The rank that is added to the window in a coordinate."""
        for x in ex.walk(i):
            if x.op == "add" and ex.index(self.window) in x.args:
                return x.ranks - {self.window} if len(x.ranks) == 2 else frozenset()
        return frozenset()

    def cascade(self) -> Cascade:
        einsums = []
        for e in self.c.einsums:
            made = self.einsum(e)
            einsums += [made] if made is not None else []
            einsums += [self.bounded(made)] if made is not None and e.out.tensor in self.behind else []
        used = {r for e in einsums for r in (*e.ranks, *e.over)}
        ranks = tuple(r for r in (*self.c.ranks, self.rank) if r.name in used)
        read = {str(x.attr) for e in einsums for x in e.reads} | {e.out.tensor for e in einsums}
        tensors = tuple(
            replace(t, shape=tuple(self.size(i) for i in self.moved[t.name].out.index)) if t.name in self.moved else t
            for t in (*self.c.tensors, *(replace(self.c.tensor[n], name=new) for n, new in self.behind.items()))
            if t.name in read
        )
        return replace(self.c, ranks=ranks, tensors=tensors, einsums=tuple(einsums))

    def bounded(self, product: Einsum) -> Einsum:
        """What rows read of a bare product: −∞ outside of the window."""
        name, at = product.out.tensor, product.out.index
        load = ex.load(name, at, self.c.tensor[name].dtype)
        new = self.behind[name]
        self.moved[new] = Einsum(Access(new, at), ex.where(self.inside, load, ex.const(-math.inf, load.dtype)))
        return self.moved[new]

    def size(self, i: Expr) -> int | sympy.Expr:
        return self.extent[str(i.attr)]

    def einsum(self, e: Einsum) -> Einsum | None:
        """An Einsum over keys; None for a pointwise one, which its readers take in."""
        own = {str(i.attr) for i in e.out.index}
        if self.window in e.over:
            if self.row not in own or e.op is None:
                raise _NoWindows
            zero, body = ex.const(IDENTITY[e.op], e.body.dtype), self.term(e.body)
            masked = e.op == "max" if _uncast(e.body).op == "load" else e.op == "add" and self.vanishes(body)
            over = tuple(self.key if r == self.window else r for r in e.over)
            return replace(e, body=body if masked and self.scored(body) else _within(self.inside, body, zero), over=over)
        if not {self.window, self.row} <= own:
            return e if self.window in own else replace(e, body=self.term(e.body))
        if e.op is None and e.out.tensor not in self.scores:
            self.pointwise[e.out.tensor] = e
            return None
        at = tuple(ex.index(self.key) if i is ex.index(self.window) else i for i in e.out.index)
        body = self.term(e.body)
        if e.op is None:
            body = ex.where(self.inside, body, ex.const(-math.inf, body.dtype))
        self.moved[e.out.tensor] = replace(e, out=Access(e.out.tensor, at), body=body)
        return self.moved[e.out.tensor]

    def scored(self, e: Expr) -> bool:
        return any(str(x.attr) in self.scores for x in ex.loads(e))

    def vanishes(self, e: Expr) -> bool:
        """Is a term 0 where the score in it is −∞? A row whose maximum is −∞ as well is NaN with and without these keys."""
        match e.op:
            case "cast":
                return self.vanishes(e.args[0])
            case "mul":
                return any(self.vanishes(x) and (y.op in ("load", "cast") or self.constant(y)) for x, y in _both(e))
            case "div":
                return self.vanishes(e.args[0]) and self.constant(e.args[1])
            case "where":
                return self.vanishes(e.args[1]) and self.vanishes(e.args[2])
            case "const":
                return e.attr == 0.0
            case "exp" | "exp2":
                x = e.args[0]
                return x.op == "sub" and _uncast(x.args[0]).op == "load" and self.scored(x.args[0]) and (
                    self.constant(x.args[1])
                )
        return False

    def constant(self, e: Expr) -> bool:
        """Is a term the same for all keys of a row?"""
        return not e.ranks & {self.key, self.window}

    def term(self, root: Expr) -> Expr:
        distance = ex.index(self.key) - ex.index(self.row)

        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e.op == "index" and str(e.attr) == self.window:
                return distance
            if e.op == "load":
                return self.read(e, tuple(collected(a, self.extent) for a in args))
            if e.op in ex.COMPARISONS and all(a.dtype == "i64" for a in args):
                return ex.make(e.op, tuple(collected(a, self.extent) for a in args), e.attr, e.dtype)
            return None

        return ex.rebuild(root, rule)

    def read(self, e: Expr, args: tuple[Expr, ...]) -> Expr:
        name = str(e.attr)
        made = self.pointwise.get(name) or self.moved.get(name)
        if made is None:
            return ex.load(name, args, e.dtype)
        distance = collected(ex.index(self.key) - ex.index(self.row), self.extent)
        # what is defined over rows and distances is read at its own row, and at its own distance
        for own, i in zip(made.out.index, args):
            wanted = {ex.index(self.row): ex.index(self.row), ex.index(self.window): distance, ex.index(self.key): distance}
            if own in wanted and i is not wanted[own]:
                raise _NoWindows
        if name in self.moved:
            at = tuple(ex.index(self.key) if own is ex.index(self.key) else i for own, i in zip(made.out.index, args))
            return ex.load(self.behind.get(name, name), at, e.dtype)
        table = {own: i for own, i in zip(made.out.index, args) if own is not ex.index(self.window)}
        return ex.cast(ex.substitute(self.term(made.body), table), self.c.tensor[name].dtype)


def _within(inside: Expr, body: Expr, zero: Expr) -> Expr:
    """The factor that holds the weights is what is 0 outside, so that values stay a factor of their own."""
    if body.op == "mul" and zero.attr == 0.0:
        weight, value = body.args
        if value.op in ("load", "cast"):
            return ex.where(inside, weight, ex.const(0.0, weight.dtype)) * value
    return ex.where(inside, body, zero)


def _uncast(e: Expr) -> Expr:
    return _uncast(e.args[0]) if e.op == "cast" else e


def _both(e: Expr) -> tuple[tuple[Expr, Expr], tuple[Expr, Expr]]:
    return (e.args[0], e.args[1]), (e.args[1], e.args[0])


def fresh(stem: str, c: Cascade) -> str:
    name, k = stem, 0
    while name in c.rank:
        name, k = f"{stem}{k}", k + 1
    return name
