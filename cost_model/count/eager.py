"""The original code as a list of operators, read off the lifted cascade: one kernel each, every result written.

    Σ of products        → a batched product; a grouped operand (h // G) is copied out to all heads first
    max, exp, Σ, /       → one softmax
    any other operator   → one pointwise or reducing operator over its ranks
Terms without computed tensors (masks, biases of coordinates) were built before: an operand that is read, not work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.cascade import Cascade, Einsum
from ...patterns.expr import Expr
from ...patterns.membership import Membership, membership
from ..operations import EXPONENTIALS, WIDTH, Sizes, contraction, elements, is_view, size_int


@dataclass(frozen=True)
class EagerOperator:
    """One operator call. `kind`: product, softmax, point, reduce or copy; bytes are of its operands and its result.

    A product is `batch` products of `rows` × `inner` by `inner` × `columns`. `points` are the elements it computes over.
    """

    kind: str
    name: str
    dtype: str
    points: int
    read_bytes: int
    written_bytes: int
    batch: int = 1
    rows: int = 1
    columns: int = 1
    inner: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.points if self.kind == "product" else 0

    @property
    def exps(self) -> int:
        if self.kind == "softmax":
            return self.points
        return self.points * EXPONENTIALS.get(self.name, 0) if self.kind == "point" else 0


def backward(ops: Sequence[EagerOperator]) -> tuple[EagerOperator, ...]:
    """What autograd runs for the gradients of all that some operators computed, the last one first.

    A product has two, of the same size; a softmax reads its result beside what flows back; a sum, a difference and a
    reduction pass on what they get; a copy to several heads is summed up; any other operator has one of its size.
    """
    return tuple(x for o in reversed(ops) for x in _backward(o))


def compiled(ops: Sequence[EagerOperator]) -> tuple[EagerOperator, ...]:
    """What a compiler that fuses runs of some operators: between two products one pass, which reads once and writes once.

    A softmax stands for the pass it is in; else the largest of its operators does. Exponentials are computed all the same.
    """
    out: list[EagerOperator] = []
    for together, run in groupby(ops, lambda o: o.kind in ("point", "reduce", "softmax")):
        if not together:
            out += run
            continue
        parts = list(run)
        whole = max(parts, key=lambda o: (o.kind == "softmax", o.points))
        more = [o for o in parts if o is not whole and o.exps]
        out += [*(replace(o, read_bytes=0, written_bytes=0) for o in more), whole]
    return tuple(out)


PASSED_ON = ("add", "sub")


def _backward(o: EagerOperator) -> tuple[EagerOperator, ...]:
    width = WIDTH[o.dtype]
    if o.kind == "product":
        left, right, result = (o.batch * n * width for n in (o.rows * o.inner, o.inner * o.columns, o.rows * o.columns))
        return (
            replace(o, columns=o.inner, inner=o.columns, read_bytes=result + right, written_bytes=left),
            replace(o, rows=o.inner, inner=o.rows, read_bytes=result + left, written_bytes=right),
        )
    if o.kind == "copy":
        return (replace(o, kind="reduce", name="add", written_bytes=0),)
    if o.kind == "reduce" or o.name in PASSED_ON:
        return ()
    name = o.name if o.name in ("cast", "where", "gather") else "mul"
    size = o.points * width
    return (EagerOperator("point", name, o.dtype, o.points, (1 if name in ("cast", "where") else 2) * size, size),)


def learned(a: Attention, wanted: Iterable[str]) -> tuple[Expr, ...]:
    """Floats beside the operands that a score, a weight or a row's end reads and whose gradients are wanted."""
    reached = set(wanted)
    for e in a.prelude:
        if reached & {str(x.attr) for x in e.reads}:
            reached.add(e.out.tensor)
    made = {e.out.tensor for e in (*a.products, *a.row, a.contraction)}
    terms = (a.score, *(e.body for e in a.row), a.weight, a.finish)
    loads = dict.fromkeys(x for t in terms for x in ex.loads(t))
    return tuple(x for x in loads if x.is_float and str(x.attr) in reached - made)


def gathered_back(
    a: Attention, wanted: Iterable[str], extent: Mapping[str, int], share: float = 1.0
) -> tuple[EagerOperator, ...]:
    """The gradients of what is learned beside the operands: summed over what a tensor lacks, added up where looked up.

    `share`: of the pairs of queries and keys, those that are visited.
    """
    rows = frozenset((*a.batch, a.query))
    out: list[EagerOperator] = []
    for x in learned(a, wanted):
        space = x.ranks | rows | (frozenset((a.key,)) if a.key in x.ranks else frozenset())
        points, own = (round(share * _count(extent, r)) for r in (space, x.ranks))
        out.append(EagerOperator("reduce", "add", "f32", points, points * WIDTH["f32"], own * WIDTH["f32"]))
        if not strided(x):
            out.append(EagerOperator("point", "gather", "f32", own, own * WIDTH["f32"], 0))
    return tuple(out)


def beforehand(a: Attention, extent: Mapping[str, int], without: str = "") -> tuple[EagerOperator, ...]:
    """What a kernel's call computes before the kernel; `without`: a tensor of the prelude that nobody asks for."""
    return apart((e for e in a.prelude if e.out.tensor != without), extent)


def apart(einsums: Iterable[Einsum], extent: Mapping[str, int]) -> tuple[EagerOperator, ...]:
    """Einsums that are computed one by one: every operator of their terms, and their products and sums."""
    out: list[EagerOperator] = []
    for e in einsums:
        if (found := membership(e)) is not None:
            out.append(_members(found, extent))
            continue
        parts = contraction(e)
        for f in parts or (e.body,):
            out += computed(f, extent)
        if parts is not None:
            out.append(_product(e, parts, extent))
        elif e.op is not None:
            out.append(_reduction(e, extent))
    return tuple(out)


def computed(term: Expr, extent: Mapping[str, int]) -> tuple[EagerOperator, ...]:
    """The operators of a term that is computed from what lies in memory, gathers among them."""
    out: list[EagerOperator] = []
    for t in ex.walk(term):
        leaf = t.op in ("const", "index", "symbol") or (t.op == "load" and strided(t))
        if leaf or not t.ranks:
            continue
        points, width = _count(extent, t.ranks), WIDTH[t.dtype]
        name = "gather" if t.op == "load" else t.op
        read = points * width if t.op == "load" else sum(_count(extent, x.ranks) * WIDTH[x.dtype] for x in t.args if x.ranks)
        out.append(EagerOperator("point", name, t.dtype, points, read, points * width))
    return tuple(out)


def strided(x: Expr) -> bool:
    """Can strides address what a load reads: each rank once, by itself, from some element on, or divided (grouped heads)?"""
    ranks = [r for i in x.args for r in i.ranks]
    return len(set(ranks)) == len(ranks) and all(_plain(i) for i in x.args)


def _plain(i: Expr) -> bool:
    outer = i.args[0] if i.op == "add" else i
    if outer.op == "mul" and outer.args[0].op == "index" and outer.args[1].is_const:
        # a dimension that two ranks make: `h · 64 + (f + 32)`
        return i is outer or _plain(i.args[1])
    if i.op in ("add", "floordiv") and i.args[1].is_const:
        i = i.args[0]
    return i.op == "index" or not i.ranks


def operators(c: Cascade, sizes: Mapping[str, int]) -> tuple[EagerOperator, ...]:
    """Every operator that the original code runs, in order. Raises ValueError when a size has no value."""
    return _operators(c, tuple(sorted(sizes.items())))


@lru_cache(maxsize=1024)
def _operators(c: Cascade, sizes: tuple[tuple[str, int], ...]) -> tuple[EagerOperator, ...]:
    bound = Sizes(c, dict(sizes))
    extent = {r: size_int(n) for r, n in bound.rank.items()}
    chains = _softmaxes(c)
    out: list[EagerOperator] = []
    for i, e in enumerate(c.einsums):
        if is_view(e):
            continue
        if i in chains:
            if chains[i] is not None:
                out.append(_softmax(c, e, extent))
            continue
        out += _einsum(c, e, extent)
    return tuple(out)


@lru_cache(maxsize=256)
def _softmaxes(c: Cascade) -> Mapping[int, str | None]:
    """Einsums that belong to a softmax: the maximum stands for the whole (its source's name), the others for nothing."""
    out: dict[int, str | None] = {}
    for i, e in enumerate(c.einsums):
        chain = _chain(c, i, e)
        if chain:
            out.update(dict.fromkeys(chain))
            out[i] = str(e.body.attr)
    return out


def _chain(c: Cascade, i: int, top: Einsum) -> tuple[int, ...]:
    """Positions of  GM = max S;  SN = exp(S − GM);  SD = Σ SN;  A = SN / SD  from the maximum on; empty if not so."""
    if top.op != "max" or top.body.op != "load":
        return ()
    gm = top.out.tensor
    after = list(enumerate(c.einsums))[i + 1 :]
    for j, e in after:
        minus = e.body.args[0] if e.op is None and e.body.op == "exp" else None
        if minus is None or minus.op != "sub" or minus.args[0] is not top.body or minus.args[1].attr != gm:
            continue
        for k, total in after:
            if total.op == "add" and total.over == top.over and total.body.op == "load" and total.body.attr == e.out.tensor:
                for n, last in after:
                    if last.op is None and _divides(last.body, e.out.tensor, total.out.tensor):
                        return i, j, k, n
    return ()


def _divides(body: Expr, above: str, below: str) -> bool:
    return any(
        t.op == "div" and t.args[0].attr == above and t.args[1].attr == below and t.args[0].op == t.args[1].op == "load"
        for t in ex.walk(body)
    )


def _softmax(c: Cascade, e: Einsum, extent: Mapping[str, int]) -> EagerOperator:
    points = _count(extent, e.body.ranks)
    moved = points * WIDTH[e.body.dtype]
    return EagerOperator("softmax", "softmax", e.body.dtype, points, moved, moved)


def _count(extent: Mapping[str, int], ranks: frozenset[str]) -> int:
    return size_int(elements(extent, ranks))


def _einsum(c: Cascade, e: Einsum, extent: Mapping[str, int]) -> list[EagerOperator]:
    made = set(c.producers)
    if (found := membership(e)) is not None:
        return [_members(found, extent)]
    parts = contraction(e)
    if parts is None:
        out = _points(e.body, made, extent)
        if e.op is not None:
            out.append(_reduction(e, extent))
        return out
    out = [o for f in parts for o in (*_points(f, made, extent), *_copies(f, extent))]
    out.append(_product(e, parts, extent))
    return out


def _reduction(e: Einsum, extent: Mapping[str, int]) -> EagerOperator:
    points, width = _count(extent, e.ranks), WIDTH[e.body.dtype]
    result = _count(extent, e.ranks - set(e.over))
    return EagerOperator("reduce", str(e.op), e.body.dtype, points, points * width, result * width)


def _members(found: Membership, extent: Mapping[str, int]) -> EagerOperator:
    """A mask of all pairs, scattered from the indices."""
    points = _count(extent, frozenset((*found.rows, found.place)))
    read = _count(extent, found.slots.ranks) * WIDTH[found.slots.dtype]
    return EagerOperator("copy", "scatter", "b1", points, read, points * WIDTH["b1"])


def _computed(e: Expr, made: set[str]) -> bool:
    return any(str(x.attr) in made for x in ex.loads(e))


def _points(body: Expr, made: set[str], extent: Mapping[str, int]) -> list[EagerOperator]:
    """The pointwise operators of a term; what holds no computed tensor is an operand that lies in memory."""
    out = []
    for t in ex.walk(body):
        if t.op in ("const", "index", "symbol", "load") or not t.ranks or not _computed(t, made):
            continue
        points = _count(extent, t.ranks)
        read = sum(_count(extent, a.ranks) * WIDTH[a.dtype] for a in t.args if a.ranks)
        out.append(EagerOperator("point", t.op, t.dtype, points, read, points * WIDTH[t.dtype]))
    return out


def _copies(f: Expr, extent: Mapping[str, int]) -> list[EagerOperator]:
    """An operand that several heads share is copied out to each of them before the product."""
    grouped = any(t.op == "floordiv" and t.ranks for load in ex.loads(f) for i in load.args for t in ex.walk(i))
    if not grouped:
        return []
    points = _count(extent, f.ranks)
    width = WIDTH[f.dtype]
    return [EagerOperator("copy", "copy", f.dtype, points, points * width, points * width)]


def _product(e: Einsum, parts: Sequence[Expr], extent: Mapping[str, int]) -> EagerOperator:
    out = e.ranks - set(e.over)
    left, right = parts[0].ranks, parts[-1].ranks
    shared = {r for r in out if r in left and r in right}
    rows = _count(extent, frozenset(left & out - shared))
    columns = _count(extent, frozenset(right & out - shared))
    dtype = min((f.dtype for f in parts), key=lambda d: WIDTH[d])
    width = WIDTH[dtype]
    read = sum(_count(extent, f.ranks) * width for f in (parts[0], parts[-1]))
    return EagerOperator(
        "product", "matmul", dtype, _count(extent, e.ranks), read, _count(extent, frozenset(out)) * width,
        batch=_count(extent, frozenset(shared)), rows=rows, columns=columns, inner=_count(extent, frozenset(e.over)),
    )
