"""Operations of Einsums over extents: sizes bound once, products by dtype, element operations by operator. No traffic.

    points(term)   = product of the sizes of the ranks that the term depends on      (loop invariants move out)
    matrix         = 2 FLOP a point of a sum of products whose factors have different ranks

Sizes may be symbolic; with all sizes given, everything is an integer. `Work` is what is counted, whoever counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import TypeAlias

import sympy

from ..patterns import expr as ex
from ..patterns.cascade import Cascade, Einsum, Size, bind, given
from ..patterns.expr import Expr
from ..patterns.operators import OPERATORS, named

WIDTH: Mapping[str, int] = {
    "b1": 1, "u8": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8,
}
# Calls of the special-function unit that one operator takes on a GPU; a division's reciprocal is counted apart.
EXPONENTIALS: Mapping[str, int] = {o.name: o.effort.calls for o in OPERATORS.values() if o.effort.unit == "special"}
ROOTS = named(lambda o: o.effort.unit == "root")
DIVISIONS = named(lambda o: o.effort.unit == "division")
MAXIMA = named(lambda o: o.effort.unit == "maximum")
MASKING = (*named(lambda o: o.effort.unit == "mask"), "where")
INDEX = "index"


@dataclass(frozen=True)
class Traffic:
    """Bytes of one tensor over the chip's edge: `moved` with no cache, `once` if every element crosses once."""

    tensor: str
    moved: Size
    once: Size
    written: bool = False


@dataclass(frozen=True)
class Tiles:
    """Key tiles over all programs: `visited` = `full` + `partial` (the mask is evaluated in partial ones)."""

    total: Size
    visited: Size
    full: Size
    partial: Size

    @property
    def density(self) -> float:
        return float(self.visited / self.total) if self.total else 0.0


@dataclass(frozen=True)
class Work:
    """Operations by kind and bytes by tensor. `matrix`: FLOP by dtype; `ops`: element operations by operator.

    A streaming cascade also says what one full tile, one partial tile and the rest of one program take, and how many
    programs there are.
    """

    matrix: Mapping[str, Size]
    ops: Mapping[str, Size]
    traffic: tuple[Traffic, ...] = ()
    tiles: Tiles | None = None
    programs: Size = 1
    full_tile: Work | None = None
    partial_tile: Work | None = None
    program: Work | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((frozenset(self.matrix.items()), frozenset(self.ops.items()), self.traffic))

    @property
    def flops(self) -> Size:
        """FLOP of the products, two a multiply-add."""
        return sum(self.matrix.values(), 0)

    @property
    def exps(self) -> Size:
        """Exponential-class calls (exp, tanh, log, …)."""
        return sum((self.ops.get(op, 0) * n for op, n in EXPONENTIALS.items()), 0)

    @property
    def divisions(self) -> Size:
        return sum((self.ops.get(op, 0) for op in DIVISIONS), 0)

    @property
    def maxima(self) -> Size:
        return sum((self.ops.get(op, 0) for op in MAXIMA), 0)

    @property
    def elementwise(self) -> Size:
        """All element operations but the exponential class."""
        return sum((n for op, n in self.ops.items() if op not in EXPONENTIALS), 0)

    @property
    def bytes(self) -> Size:
        """Bytes moved with no cache in between."""
        return sum((t.moved for t in self.traffic), 0)

    @property
    def unique_bytes(self) -> Size:
        return sum((t.once for t in self.traffic), 0)


# --- sizes ------------------------------------------------------------------------------------------------------


Shapes: TypeAlias = "tuple[tuple[str, tuple[Size, ...]], ...]"


@lru_cache(maxsize=1024)
def _fixed_sizes(
    c: Cascade,
) -> tuple[dict[str, Size], dict[str, tuple[Size, ...]], tuple[tuple[str, Size], ...], Shapes]:
    """Sizes of ranks and tensors; and which of them are to be bound."""
    ranks, shapes = {r.name: r.size for r in c.ranks}, {t.name: t.shape for t in c.tensors}
    open_ranks = tuple((name, n) for name, n in ranks.items() if not isinstance(n, int))
    return ranks, shapes, open_ranks, tuple((t, s) for t, s in shapes.items() if not all(isinstance(n, int) for n in s))


class _Shapes(dict[str, tuple[Size, ...]]):
    """Shapes of tensors, of which those with open sizes are bound where they are asked for."""

    def __init__(
        self, shapes: Mapping[str, tuple[Size, ...]], open_shapes: Mapping[str, tuple[Size, ...]],
        of: Callable[[Size], Size],
    ) -> None:
        super().__init__({name: s for name, s in shapes.items() if name not in open_shapes})
        self._open, self._of = open_shapes, of

    def __missing__(self, name: str) -> tuple[Size, ...]:
        made = self[name] = tuple(map(self._of, self._open[name]))
        return made


class Sizes:
    """Sizes of ranks and tensors, bound once; `of` a size is an integer when all its symbols are."""

    def __init__(self, c: Cascade, known: Mapping[str, int] | None = None) -> None:
        self.known = dict(known or {})
        ranks, shapes, open_ranks, open_shapes = _fixed_sizes(c)
        self.rank = {**ranks, **{name: self.of(n) for name, n in open_ranks}}
        self.shape: Mapping[str, tuple[Size, ...]] = _Shapes(shapes, dict(open_shapes), self.of)

    def of(self, size: Size) -> Size:
        return bound_size(size, self.known)


def bound_size(size: Size, known: Mapping[str, int]) -> Size:
    """A size where symbols have these values: an integer when all of them do."""
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Symbol):
        return known.get(size.name, size)
    return _value(size, given(size, known))


@lru_cache(maxsize=16384)
def _value(size: sympy.Expr, known: tuple[tuple[str, int], ...]) -> Size:
    value = _number(size, dict(known))
    return int(value) if value is not None and value.denominator == 1 else bind(size, dict(known))


def _number(size: sympy.Expr, known: Mapping[str, int]) -> Fraction | None:
    """The value of a size without symbols left, by plain arithmetic: sympy's substitution takes milliseconds."""
    if isinstance(size, sympy.Symbol):
        n = known.get(size.name)
        return Fraction(n) if n is not None else None
    if size.is_Rational:
        return Fraction(int(size.p), int(size.q))
    args = [_number(a, known) for a in size.args]
    values = [a for a in args if a is not None]
    if len(values) < len(args):
        return None
    if isinstance(size, sympy.Add):
        return sum(values, Fraction(0))
    if isinstance(size, sympy.Mul):
        return math.prod(values, start=Fraction(1))
    if isinstance(size, sympy.floor):
        return Fraction(math.floor(values[0]))
    if isinstance(size, sympy.Mod) and values[1]:
        return values[0] % values[1]
    if isinstance(size, sympy.Pow) and values[0] and values[1].denominator == 1:
        return values[0] ** int(values[1])
    return None


def size_int(x: Size | float) -> int:
    """An integer of a bound count. Raises ValueError when a symbol is left."""
    if isinstance(x, sympy.Expr) and x.free_symbols:
        names = ", ".join(sorted(map(str, x.free_symbols)))
        raise ValueError(f"no value for size {names}: give sizes to predict seconds")
    return math.ceil(float(x)) if not isinstance(x, int) else x


def ceiling(a: Size, b: Size) -> Size:
    """⌈a / b⌉"""
    if isinstance(a, int) and isinstance(b, int):
        return -(-a // b)
    return sympy.floor((a + b - 1) / b)


def product(sizes: Iterable[Size]) -> Size:
    out: Size = 1
    for s in sizes:
        out = out * s
    return out


def least(a: Size, b: Size) -> Size:
    """The smaller of two sizes; the first where that cannot be known."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else a


def elements(extent: Mapping[str, Size], ranks: Iterable[str]) -> Size:
    return product(extent[r] for r in sorted(ranks))


# --- operations -------------------------------------------------------------------------------------------------


def factors(e: Expr) -> tuple[Expr, ...]:
    """The factors of a product in one float dtype, left to right."""
    if e.op == "mul" and e.is_float:
        return tuple(f for a in e.args for f in (factors(a) if a.dtype == e.dtype else (a,)))
    return (e,)


@lru_cache(maxsize=4096)
def is_view(e: Einsum) -> bool:
    """An Einsum that only renames coordinates: a bare load, or a cast of one to its own dtype."""
    return e.op is None and e.body.op == "load"


@lru_cache(maxsize=4096)
def contraction(e: Einsum) -> tuple[Expr, ...] | None:
    """The factors of a sum of products for the matrix unit: at least two with different ranks; else None."""
    if e.op != "add":
        return None
    parts = tuple(f for f in factors(e.body) if f.ranks)
    if len(parts) < 2 or not e.body.is_float:
        return None
    return parts if len({f.ranks for f in parts}) > 1 and any(set(e.over) & f.ranks for f in parts) else None


def _stored_dtype(e: Expr) -> str:
    """The dtype in which a factor reaches the matrix unit: widening casts happen inside it."""
    while e.op == "cast" and e.args[0].is_float and WIDTH[e.args[0].dtype] < WIDTH[e.dtype]:
        e = e.args[0]
    return e.dtype


@lru_cache(maxsize=8192)
def _sites(e: Einsum) -> tuple[tuple[str, frozenset[str]], ...]:
    """(operator, ranks) of everything the body computes, the products of a contraction left out; once an Einsum."""
    parts = contraction(e)
    roots = parts if parts is not None else (e.body,)
    found: list[tuple[str, frozenset[str]]] = []
    for t in ex.walk(*roots, *e.out.index):
        if not t.ranks or t.op in ("const", "index", "symbol", "load"):
            continue
        arithmetic = t.dtype in ex.INTEGERS and t.op not in MASKING
        found.append((INDEX if arithmetic else t.op, t.ranks))
    if parts is not None and len(parts) < len(factors(e.body)):
        # a scalar factor is applied once to each result
        found.append(("mul", e.ranks - set(e.over)))
    return tuple(found)


def operations(einsums: Sequence[Einsum], extent: Mapping[str, Size]) -> Work:
    """Operations of some Einsums over these extents, without traffic."""
    matrix: dict[str, Size] = {}
    ops: dict[str, Size] = {}
    for e in einsums:
        if is_view(e):
            continue
        for op, ranks in _sites(e):
            ops[op] = ops.get(op, 0) + elements(extent, ranks)
        parts = contraction(e)
        points = elements(extent, e.ranks)
        if parts is not None:
            dtype = max((_stored_dtype(f) for f in parts), key=lambda d: WIDTH[d])
            matrix[dtype] = matrix.get(dtype, 0) + 2 * points
        elif e.op is not None:
            ops[e.op] = ops.get(e.op, 0) + points
    return Work(matrix, ops)


def term_operations(e: Expr, extent: Mapping[str, Size]) -> Mapping[str, Size]:
    """Element operations of a term by operator, each over its own ranks."""
    ops: dict[str, Size] = {}
    for t in ex.walk(e):
        if t.ranks and t.op not in ("const", "index", "symbol", "load"):
            op = INDEX if t.dtype in ex.INTEGERS and t.op not in MASKING else t.op
            ops[op] = ops.get(op, 0) + elements(extent, t.ranks)
    return ops


def scaled(w: Work, factor: Size) -> Work:
    return Work({d: n * factor for d, n in w.matrix.items()}, {o: n * factor for o, n in w.ops.items()})


def plus(*works: Work) -> Work:
    """Operations added up."""
    matrix: dict[str, Size] = {}
    ops: dict[str, Size] = {}
    for w in works:
        for d, n in w.matrix.items():
            matrix[d] = matrix.get(d, 0) + n
        for o, n in w.ops.items():
            ops[o] = ops.get(o, 0) + n
    return Work(matrix, ops)


def minus(w: Work, ops: Mapping[str, Size]) -> Work:
    return Work(w.matrix, {o: n - ops.get(o, 0) for o, n in w.ops.items()})
