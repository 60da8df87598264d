"""The cascade: a DAG of Einsums over named ranks, the one representation between a graph and a kernel.

    cascade ::=  ranks, tensors, einsums in order of dependence, outputs
    einsum  ::=  out[index, ...] = reduce over ranks of body          (EDGE: populate, reduce, map)

An Einsum says what is computed, never in which order. Iterative ranks carry state (`RM[m1+1] = max(RM[m1], ...)`);
a partition of a rank (M into M1, M0) stands here with symbolic sizes, and a mapping binds them.
Source: Nayak et al., "FuseMax" (MICRO 2024), section II; the words are theirs.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, reduce
from typing import TypeAlias

import networkx as nx
import sympy

from . import expr as ex
from .expr import Expr

Size: TypeAlias = int | sympy.Expr

SCHEMA = 1
REDUCTIONS = ("add", "max", "min", "mul", "or", "and")
# The identity of each reduction: what it yields over no element.
IDENTITY: Mapping[str, ex.Scalar] = {
    "add": 0.0, "max": -float("inf"), "min": float("inf"), "mul": 1.0, "or": False, "and": True,
}


@dataclass(frozen=True)
class Rank:
    """A named dimension. `iterative` ranks are walked in order, because an Einsum reads what the step before wrote."""

    name: str
    size: Size
    iterative: bool = False


@dataclass(frozen=True)
class Tensor:
    """A tensor of the cascade: one size per dimension, outermost first.

    An iterative tensor has one more coordinate than steps along its iterative dimension (initial value at 0).
    """

    name: str
    shape: tuple[Size, ...]
    dtype: str = "f32"


@dataclass(frozen=True)
class Access:
    """Where an Einsum writes: a tensor at index terms: a rank's coordinate, `m1 + 1`, a constant, or a coordinate put
    together from the halves of a cut rank, `m1·M0 + m0` (what lies beyond the end, in a ragged tile, is not written)."""

    tensor: str
    index: tuple[Expr, ...]

    @property
    def plain(self) -> bool:
        """Distinct coordinates and nothing else: the access of a tensor that is written in one piece."""
        return all(i.op == "index" for i in self.index) and len(set(self.index)) == len(self.index)

    def __str__(self) -> str:
        return f"{self.tensor}[{','.join(map(str, self.index))}]" if self.index else self.tensor


@dataclass(frozen=True)
class Einsum:
    """`out = reduce(op, over) of body`. The iteration space is the free ranks of `out` and `body`."""

    out: Access
    body: Expr
    op: str | None = None
    over: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.op is None) != (not self.over):
            raise ValueError(f"{self.out}: a reduction needs an operator and ranks, or neither")
        if self.op is not None and self.op not in REDUCTIONS:
            raise ValueError(f"{self.out}: unknown reduction {self.op!r}; one of {', '.join(REDUCTIONS)}")

    @cached_property
    def ranks(self) -> frozenset[str]:
        """The ranks of the iteration space."""
        return self.body.ranks.union(*(i.ranks for i in self.out.index))

    @cached_property
    def reads(self) -> tuple[Expr, ...]:
        """Every load of the body and of the output's index terms."""
        return tuple(e for e in ex.walk(self.body, *self.out.index) if e.op == "load")

    def __str__(self) -> str:
        match self.op:
            case None:
                return f"{self.out} = {self.body}"
            case "add":
                return f"{self.out} = Σ_{','.join(self.over)} {_factor(self.body)}"
        return f"{self.out} = {self.op}_{','.join(self.over)} {_factor(self.body)}"


def _factor(body: Expr) -> str:
    return f"({body})" if body.op in ("add", "sub") or body.op in ex.COMPARISONS else str(body)


@dataclass(frozen=True)
class Cascade:
    """A DAG of Einsums, in an order in which every tensor is written before it is read.

    `outputs` are the tensors that leave the cascade, the main one first. A tensor that no Einsum writes is an input.
    """

    name: str
    ranks: tuple[Rank, ...]
    tensors: tuple[Tensor, ...]
    einsums: tuple[Einsum, ...]
    outputs: tuple[str, ...]
    accumulate: str = "f32"
    note: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # made once: cascades are what all that is derived from them is kept by
        return hash((self.name, self.ranks, self.tensors, self.einsums, self.outputs, self.accumulate))

    def __getstate__(self) -> dict[str, object]:
        # hashes of texts differ from process to process
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}

    @cached_property
    def rank(self) -> Mapping[str, Rank]:
        return {r.name: r for r in self.ranks}

    @cached_property
    def tensor(self) -> Mapping[str, Tensor]:
        return {t.name: t for t in self.tensors}

    @cached_property
    def producers(self) -> Mapping[str, tuple[Einsum, ...]]:
        """The Einsums that write each tensor; an iterative tensor has an initialisation and a step."""
        table: dict[str, list[Einsum]] = {}
        for e in self.einsums:
            table.setdefault(e.out.tensor, []).append(e)
        return {name: tuple(es) for name, es in table.items()}

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors that are read and never written, in order of first use."""
        order = dict.fromkeys(str(a.attr) for e in self.einsums for a in e.reads)
        return tuple(self.tensor[n] for n in order if n not in self.producers)

    @cached_property
    def free_symbols(self) -> tuple[str, ...]:
        """Names of symbolic sizes that appear anywhere, sorted."""
        names: set[str] = set()
        for size in [r.size for r in self.ranks] + [s for t in self.tensors for s in t.shape]:
            if isinstance(size, sympy.Expr):
                names.update(str(s) for s in size.free_symbols)
        for e in self.einsums:
            names.update(*(ex.symbols(x) for x in (e.body, *e.out.index)))
        return tuple(sorted(names))

    def graph(self) -> nx.DiGraph[int]:
        """Einsums (by position) and the edges `producer -> reader`."""
        g: nx.DiGraph[int] = nx.DiGraph()
        g.add_nodes_from(range(len(self.einsums)))
        where = {id(e): i for i, e in enumerate(self.einsums)}
        for i, e in enumerate(self.einsums):
            for read in e.reads:
                for p in self.producers.get(str(read.attr), ()):
                    g.add_edge(where[id(p)], i, tensor=str(read.attr))
        return g

    def __str__(self) -> str:
        return show(self)

    def with_sizes(self, sizes: Mapping[str, int]) -> Cascade:
        """The cascade with symbolic sizes bound to integers."""
        table = {ex.symbol(n): ex.const(v) for n, v in sizes.items()}
        return replace(
            self,
            ranks=tuple(replace(r, size=bind(r.size, sizes)) for r in self.ranks),
            tensors=tuple(replace(t, shape=tuple(bind(s, sizes) for s in t.shape)) for t in self.tensors),
            einsums=tuple(
                replace(
                    e,
                    out=Access(e.out.tensor, tuple(ex.substitute(i, table) for i in e.out.index)),
                    body=ex.substitute(e.body, table),
                )
                for e in self.einsums
            ),
        )


def as_size(e: sympy.Expr) -> Size:
    """An integer term as a size: an `int` when nothing symbolic is in it."""
    return int(e) if e.is_Integer else e


def bind(size: Size, sizes: Mapping[str, int]) -> Size:
    """A size with the symbols of `sizes` replaced; an `int` when nothing symbolic is left."""
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Symbol):
        return sizes.get(size.name, size)
    return _at(size, given(size, sizes))


def given(size: sympy.Expr, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The symbols of a size that have a value, with it."""
    return tuple((n, sizes[n]) for n in _symbols_of(size) if n in sizes)


@lru_cache(maxsize=4096)
def _symbols_of(size: sympy.Expr) -> tuple[str, ...]:
    return tuple(sorted(str(s) for s in size.free_symbols))


@lru_cache(maxsize=16384)
def _at(size: sympy.Expr, sizes: tuple[tuple[str, int], ...]) -> Size:
    known = dict(sizes)
    return as_size(size.subs({s: known[str(s)] for s in size.free_symbols if str(s) in known}))


def size_term(size: Size) -> Expr:
    """A size as a term: sums, products, extremes, floor division and remainder of symbols and integers."""
    if isinstance(size, int):
        return ex.const(size)
    if size.is_Integer:
        return ex.const(int(size))
    if isinstance(size, sympy.Symbol):
        return ex.symbol(str(size))
    if isinstance(size, sympy.Add):
        out: Expr = ex.const(0)
        for a in size.args:
            out = out + size_term(a)
        return out
    if isinstance(size, sympy.Mul):
        out = ex.const(1)
        for a in size.args:
            if not (a.is_Integer or not a.is_Number):
                break
            out = out * size_term(a)
        else:
            return out
        numerator, denominator = sympy.fraction(sympy.together(size))
        return size_term(numerator) // size_term(denominator)
    if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
        return size_term(size.base) * size_term(size.base ** (size.exp - 1))
    if isinstance(size, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(size.args[0]))
        return size_term(numerator) // size_term(denominator)
    if isinstance(size, sympy.Mod):
        return size_term(size.args[0]) % size_term(size.args[1])
    if isinstance(size, (sympy.Min, sympy.Max)):
        first, *rest = (size_term(a) for a in sorted(size.args, key=str))
        return reduce(ex.minimum if isinstance(size, sympy.Min) else ex.maximum, rest, first)
    raise ValueError(f"size {size} has no form as a term")


# The operators that sizes are made by, on sympy's terms.
OF_SIZES: Mapping[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": lambda a, b: sympy.floor(a / b),
    "mod": sympy.Mod, "min": sympy.Min, "max": sympy.Max,
}


def term_size(term: Expr) -> Size:
    """The inverse of `size_term`, for terms without coordinates or loads."""
    match term.op:
        case "const":
            return int(term.value)
        case "symbol":
            return sympy.Symbol(str(term.attr), integer=True, positive=True)
        case op if op in OF_SIZES:
            return as_size(OF_SIZES[op](*(sympy.sympify(term_size(x)) for x in term.args)))
    raise ValueError(f"{term} is no size")


# --- verifier ---------------------------------------------------------------------------------------------------


class CascadeError(ValueError):
    """A cascade that breaks a rule of the representation: a bug of whoever built it."""


def verify(c: Cascade) -> Cascade:
    """Check every rule of the representation and return the cascade unchanged.

    Names are declared once; each access has one term per dimension; reduced ranks do not index the output; a tensor is
    written before it is read, unless along an iterative rank; index terms are integers; outputs are written.
    """

    def fail(message: str) -> None:
        raise CascadeError(f"cascade {c.name!r}: {message}")

    for kind, names in (("rank", [r.name for r in c.ranks]), ("tensor", [t.name for t in c.tensors])):
        for n in names:
            if names.count(n) > 1:
                fail(f"{kind} {n} is declared twice")
    iterative = {r.name for r in c.ranks if r.iterative}
    written: set[str] = set()
    for e in c.einsums:
        for r in sorted(e.ranks | set(e.over)):
            if r not in c.rank:
                fail(f"{e.out}: rank {r} is not declared")
        bound = frozenset().union(*(i.ranks for i in e.out.index))
        if bound & set(e.over):
            fail(f"{e.out}: rank {min(bound & set(e.over))} is reduced and indexes the output")
        if loose := e.body.ranks - bound - set(e.over):
            fail(f"{e.out}: rank {min(loose)} of the body is neither reduced nor in the output")
        _check_access(c, e.out.tensor, e.out.index, str(e.out), fail)
        for a in e.reads:
            name = str(a.attr)
            _check_access(c, name, a.args, str(e.out), fail)
            if name in c.tensor and c.tensor[name].dtype != a.dtype:
                fail(f"{e.out}: {name} is {c.tensor[name].dtype} and is read as {a.dtype}")
            if name in c.producers and name not in written and not (a.args and any(i.ranks & iterative for i in a.args)):
                fail(f"{e.out}: {name} is read before it is written")
        written.add(e.out.tensor)
    for o in c.outputs:
        if o not in written:
            fail(f"output {o} is never written")
    return c


def _check_access(c: Cascade, name: str, at: tuple[Expr, ...], who: str, fail: object) -> None:
    assert callable(fail)
    if name not in c.tensor:
        fail(f"{who}: tensor {name} is not declared")
        return
    if len(at) != len(c.tensor[name].shape):
        fail(f"{who}: {name} has {len(c.tensor[name].shape)} dimensions and is accessed with {len(at)} terms")
    for i in at:
        if i.dtype not in ex.INTEGERS:
            fail(f"{who}: index {i} of {name} is {i.dtype}, not an integer")


# --- printer and canonical text ---------------------------------------------------------------------------------


def show(c: Cascade) -> str:
    """The cascade in the papers' notation: sizes, then one Einsum a line."""
    sizes = ", ".join(f"{r.name.upper()}={r.size}" + ("◇" if r.iterative else "") for r in c.ranks)
    inputs = ", ".join(f"{t.name}: {t.dtype}[{','.join(map(str, t.shape))}]" for t in c.inputs)
    lines = [f"{c.name}   {sizes}", f"  inputs  {inputs}", *(f"  {e}" for e in c.einsums)]
    return "\n".join([*lines, f"  outputs {', '.join(c.outputs)}"])


@lru_cache(maxsize=512)
def to_text(c: Cascade) -> str:
    """Canonical text: JSON with a schema number and one table of shared terms. Equal cascades give equal text."""
    table: dict[Expr, int] = {}
    rows: list[list[object]] = []

    def put(root: Expr) -> int:
        for e in ex.walk(root):
            if e in table:
                continue
            attr = e.attr if not isinstance(e.attr, float) else repr(e.attr)
            table[e] = len(rows)
            rows.append([e.op, [table[a] for a in e.args], attr, e.dtype])
        return table[root]

    body = {
        "schema": SCHEMA,
        "name": c.name,
        "ranks": [[r.name, str(r.size), r.iterative] for r in c.ranks],
        "tensors": [[t.name, [str(s) for s in t.shape], t.dtype] for t in c.tensors],
        "einsums": [
            [e.out.tensor, [put(i) for i in e.out.index], put(e.body), e.op, list(e.over)] for e in c.einsums
        ],
        "outputs": list(c.outputs),
        "accumulate": c.accumulate,
        "terms": rows,
    }
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


def parse(text: str) -> Cascade:
    """Read canonical text. Raises CascadeError on another schema, naming both numbers."""
    body = json.loads(text)
    if body.get("schema") != SCHEMA:
        raise CascadeError(f"cascade text has schema {body.get('schema')}; this version reads schema {SCHEMA}")
    terms: list[Expr] = []
    for op, args, attr, dtype in body["terms"]:
        value = float(attr) if op == "const" and dtype in ex.FLOATS else attr
        # Raw construction: the text holds terms that are already in normal form.
        terms.append(Expr(op, tuple(terms[a] for a in args), value, dtype))
    return Cascade(
        name=body["name"],
        ranks=tuple(Rank(n, parse_size(s), it) for n, s, it in body["ranks"]),
        tensors=tuple(Tensor(n, tuple(parse_size(s) for s in shape), d) for n, shape, d in body["tensors"]),
        einsums=tuple(
            Einsum(Access(t, tuple(terms[i] for i in idx)), terms[b], op, tuple(over))
            for t, idx, b, op, over in body["einsums"]
        ),
        outputs=tuple(body["outputs"]),
        accumulate=body["accumulate"],
    )


# Functions in the text of a size.
_FUNCTIONS = {"floor": sympy.floor, "Mod": sympy.Mod, "Min": sympy.Min, "Max": sympy.Max}


def parse_size(text: str) -> Size:
    if text.lstrip("-").isdigit():
        return int(text)
    names = {n: sympy.Symbol(n, integer=True, positive=True) for n in _names(text)}
    return sympy.sympify(text, locals={**names, **_FUNCTIONS})


def _names(text: str) -> Iterable[str]:
    word = ""
    for ch in text + " ":
        if ch.isalnum() or ch == "_":
            word += ch
        else:
            if word and not word[0].isdigit() and word not in _FUNCTIONS:
                yield word
            word = ""
