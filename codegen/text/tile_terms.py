"""The interval of a mask over a tile, as terms over the tile's corners: what a printed kernel classifies its tiles by.

    keep = (m ≤ p) ∧ (p − m < W)        some = (m0 ≤ p1) ∧ (p0 − m1 < W)        every = (m1 ≤ p0) ∧ (p1 − m0 < W)

`p0`, `p1`, `m0`, `m1` are the first and last coordinates of a tile. Sound for every term; differences of coordinates
go through the affine normal form. A load over tiles reads a table of least and greatest elements per tile; one at
`p // B`, a table of blocks, is read where the tile lies, or reduced over the blocks that a tile holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...patterns import expr as ex
from ...patterns.expr import FALSE, TRUE, Expr
from ...patterns.terms.affine import Affine, affine
from ...patterns.terms.interval_rules import interval

Ends = tuple[Expr, Expr]


class TermNumbers:
    """Ends that a program will compute."""

    def least(self, x: Expr, y: Expr | int) -> Expr:
        return ex.minimum(x, y)

    def most(self, x: Expr, y: Expr | int) -> Expr:
        return ex.maximum(x, y)

    def times(self, x: Expr, y: Expr) -> Expr:
        return x * y

    def quotient(self, x: Expr, y: Expr | int) -> Expr:
        return x // y

    def rest(self, x: Expr, turn: Expr, y: Expr | int) -> Expr:
        return x % y

    def natural(self, x: Expr) -> Expr:
        return ex.binary("ge", x, 0)

    def same(self, x: Expr, y: Expr) -> Expr:
        return ex.equal(x, y)

    def choose(self, proved: Expr, tight: Expr | int, safe: Expr | int) -> Expr:
        return ex.where(proved, tight, safe)


TERMS = TermNumbers()


@dataclass(frozen=True)
class Table:
    """Least and greatest elements of a tensor: over tiles of the ranks in `blocked`, over all of the dimensions `whole`.

    `blocked`: dimension, rank, and how many keys or queries an element stands for.
    """

    tensor: str
    blocked: tuple[tuple[int, str, int], ...]
    whole: tuple[int, ...]

    @property
    def key(self) -> str:
        marks = [f"{d}{r}" + (f"/{n}" if n > 1 else "") for d, r, n in self.blocked] + [str(d) for d in self.whole]
        return f"{self.tensor}:{','.join(marks)}"

    def load(self, end: str, at: tuple[Expr, ...], dtype: str) -> Expr:
        return ex.load(f"{self.key}:{end}", at, dtype)


@dataclass
class Corners:
    """The corner terms of a mask. Tile numbers are coordinates of the ranks `number[rank]`; `tile`: how long a tile is."""

    query: str
    key: str
    low: Mapping[str, Expr]
    high: Mapping[str, Expr]
    number: Mapping[str, Expr]
    tile: Mapping[str, int]
    tables: dict[str, Table] = field(default_factory=dict)
    memo: dict[Expr, Ends | None] = field(default_factory=dict)

    @staticmethod
    def of(query: str, key: str, tile_p: int, tile_m: int) -> Corners:
        ranks = (query, key)
        return Corners(
            query, key, {r: ex.index(f"{r}0") for r in ranks}, {r: ex.index(f"{r}1") for r in ranks},
            {r: ex.index(f"{r}#") for r in ranks}, {query: tile_p, key: tile_m},
        )

    def predicate(self, e: Expr) -> tuple[Expr, Expr]:
        """`(every, some)` of a predicate over a tile."""
        found = self.ends(e)
        return found if found is not None else (FALSE, TRUE)

    def ends(self, root: Expr) -> Ends | None:
        """Least and greatest value of a term; None where nothing is known."""
        for e in ex.walk(root):
            if e not in self.memo:
                self.memo[e] = self._ends(e)
        return self.memo[root]

    def _ends(self, e: Expr) -> Ends | None:
        if not e.ranks & {self.query, self.key}:
            return e, e
        if e.op == "index":
            return self.low[str(e.attr)], self.high[str(e.attr)]
        if e.op == "load":
            return self._load(e)
        if e.dtype == "b1":
            return self._condition(e)
        if e.dtype == "i64":
            form = affine(e)
            if form.terms != ((e, 1),):
                return self._sum(form)
        return self._value(e)

    # predicates: (certainly, possibly)

    def _condition(self, e: Expr) -> Ends | None:
        if e.op in ex.COMPARISONS:
            return self._comparison(e)
        parts = [self.memo[a] if a.dtype == "b1" else None for a in e.args]
        known = [p if p is not None else (FALSE, TRUE) for p in parts]
        match e.op:
            case "and":
                return known[0][0] & known[1][0], known[0][1] & known[1][1]
            case "or":
                return known[0][0] | known[1][0], known[0][1] | known[1][1]
            case "not":
                return ~known[0][1], ~known[0][0]
            case "where":
                c, a, b = known
                return (c[0] & a[0]) | (~c[1] & b[0]) | (a[0] & b[0]), (c[1] & a[1]) | (~c[0] & b[1])
        return None

    def _comparison(self, e: Expr) -> Ends | None:
        a, b = e.args
        if a.dtype in ex.INTEGERS and b.dtype in ex.INTEGERS:
            form = affine(a) - affine(b)
            plus = Affine(tuple((t, c) for t, c in form.terms if c > 0), max(form.constant, 0))
            minus = Affine(tuple((t, -c) for t, c in form.terms if c < 0), max(-form.constant, 0))
            left, right = self._sum(plus), self._sum(minus)
        elif a.dtype == "b1" or b.dtype == "b1":
            return None
        else:
            left, right = self.memo[a], self.memo[b]
        if left is None or right is None:
            return None
        (a0, a1), (b0, b1) = left, right
        match e.op:
            case "lt" | "le":
                return ex.binary(e.op, a1, b0), ex.binary(e.op, a0, b1)
            case "gt" | "ge":
                return ex.binary(e.op, a0, b1), ex.binary(e.op, a1, b0)
        same = ex.binary("eq", a0, b1) & ex.binary("eq", a1, b0)
        meet = ex.binary("le", a0, b1) & ex.binary("ge", a1, b0)
        return (same, meet) if e.op == "eq" else (~meet, ~same)

    # integers

    def _sum(self, form: Affine) -> Ends | None:
        lo, hi = ex.const(form.constant), ex.const(form.constant)
        for t, c in reversed(form.terms):
            ends = self.ends(t)
            if ends is None:
                return None
            a, b = ends if c > 0 else ends[::-1]
            lo, hi = (ex.cast(x, "i64") * c + y for x, y in ((a, lo), (b, hi)))
        return lo, hi

    def _value(self, e: Expr) -> Ends | None:
        parts = [self.memo[a] for a in e.args]
        if any(p is None for p in parts):
            return None
        ends = [p for p in parts if p is not None]
        second = e.args[-1]
        match e.op:
            case "cast" if e.args[0].dtype in ("i64", "i32", "b1") and (e.dtype in ("i32", "i64") or e.is_float):
                return ex.cast(ends[0][0], e.dtype), ex.cast(ends[0][1], e.dtype)
            case "max" | "min" | "neg":
                return interval(e, ends, TERMS)
            case "where" | "abs" if e.dtype in ex.INTEGERS:
                return interval(e, ends, TERMS)
            case "floordiv" | "mod" if e.dtype in ex.INTEGERS and second.is_const and int(second.value) > 0:
                return interval(e, ends, TERMS)
        return None

    # loads

    def _load(self, e: Expr) -> Ends | None:
        if e.is_float:
            return None
        at: list[Expr] = []
        blocked: list[tuple[int, str, int]] = []
        over: list[int] = []
        for d, i in enumerate(e.args):
            rank, block = _block(i)
            if not i.ranks & {self.query, self.key}:
                at.append(i)
            elif block and block > 1 and block % self.tile[rank] == 0:
                # the tile lies in one block
                at.append(self.low[rank] // block)
            elif block and self.tile[rank] % block == 0:
                blocked.append((d, rank, block))
                at.append(self.number[rank])
            else:
                over.append(d)
                at.append(ex.const(0))
        if not blocked and not over:
            found = ex.load(str(e.attr), tuple(at), e.dtype)
            return found, found
        table = Table(str(e.attr), tuple(blocked), tuple(over))
        self.tables[table.key] = table
        return table.load("low", tuple(at), e.dtype), table.load("high", tuple(at), e.dtype)


def _block(i: Expr) -> tuple[str, int]:
    """The rank of an index and how many of its coordinates share an element: `m` one, `m // B` so many; 0 of another."""
    if i.op == "index":
        return str(i.attr), 1
    if i.op == "floordiv" and i.args[0].op == "index" and i.args[1].is_const:
        return str(i.args[0].attr), int(i.args[1].value)
    return "", 0


def relative(root: Expr, query: str, key: str) -> bool:
    """Does a term depend on query and key through their difference alone?        p − m, m ≤ p + s, table[p − m]"""
    p, m = ex.index(query), ex.index(key)
    memo: dict[Expr, bool] = {}

    def balanced(form: Affine) -> bool:
        return form.coefficient(p) == -form.coefficient(m) and all(holds(a) for a in form.atoms if a not in (p, m))

    def holds(t: Expr) -> bool:
        if t not in memo:
            memo[t] = decide(t)
        return memo[t]

    def decide(t: Expr) -> bool:
        if not t.ranks & {query, key}:
            return True
        if t.op in ex.COMPARISONS and all(a.dtype in ex.INTEGERS for a in t.args):
            return balanced(affine(t.args[0]) - affine(t.args[1]))
        if t.dtype == "i64":
            form = affine(t)
            if form.terms != ((t, 1),):
                return balanced(form)
        return t.op != "index" and all(holds(a) for a in t.args)

    for e in ex.walk(root):
        holds(e)
    return memo[root]


def relative_parts(root: Expr, query: str, key: str) -> tuple[Expr, ...]:
    """The largest sub-terms that vary over both query and key, and only with their difference."""
    return largest_parts(root, query, key, lambda e: relative(e, query, key))


def largest_parts(root: Expr, query: str, key: str, fits: Callable[[Expr], bool]) -> tuple[Expr, ...]:
    """The largest sub-terms that vary over both query and key and are as asked for, left to right."""
    out: dict[Expr, None] = {}
    seen: set[Expr] = set()
    stack = [root]
    while stack:
        e = stack.pop()
        if e in seen or not {query, key} <= e.ranks:
            continue
        seen.add(e)
        if fits(e):
            out[e] = None
        else:
            stack.extend(reversed(e.args))
    return tuple(out)
