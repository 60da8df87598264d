"""What the streaming skeleton needs to know of an attention: operands, row ranks, tile variants. Read off the cascade.

    product   QK[…] = factor · Σ_e query(…, e) · key(…, e)      each side a term of its own, e cut into powers of two
    rows      the ranks that one row block runs over: the query, and in decode the heads that share a key head
    grid      the ranks that a program has one coordinate of
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...cost_model.count.subject import FEW_ROWS, SHARED_ROWS
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.rowstate import RowState, derive
from ...patterns.attention.score import factors
from ...patterns.cascade import Cascade, Einsum, Size, size_term
from ...patterns.expr import Expr
from ...patterns.masks.ranges import FIRST, LAST, KeyRange, key_range
from ...patterns.masks.split import Mask, split
from ...patterns.passes.further import with_numbers
from ...patterns.terms.conditions import simplify_under
from ...patterns.verdict import Obstacle, Refusal
from ..forms.skip import fits_half, predicate, rule
from ..forms.terms import mapped_state, uncast

NAME = "triton"
WIDEST = 1024


@dataclass(frozen=True)
class DotOperand:
    """One operand of a product on the tensor cores: `term` in type `dtype`; `load` where it is a tensor as it lies."""

    term: Expr
    dtype: str

    @property
    def load(self) -> Expr | None:
        return self.term if self.term.op == "load" and self.term.dtype == self.dtype else None


@dataclass(frozen=True)
class Dot:
    """`load` reads the product in the score; it equals `factor · Σ_embed query · key`."""

    load: Expr
    embed: str
    size: int
    query: DotOperand
    key: DotOperand
    factor: Expr

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """(start, width) of the pieces of the embed rank, each a power of two of at least 16; the last may be padded."""
        return chunks(self.size)


@dataclass(frozen=True)
class Streaming:
    """An attention in the form in which the skeleton computes it. Terms speak of `grid`, `rows` and the key."""

    cascade: Cascade
    attention: Attention
    extent: Mapping[str, Size]
    grid: tuple[str, ...]
    rows: tuple[str, ...]
    products: tuple[Dot, ...]
    values: DotOperand
    score: Expr
    mask: Mask
    state: RowState
    output: tuple[Expr, ...]

    @property
    def key(self) -> str:
        return self.attention.key

    @property
    def value(self) -> str:
        return self.attention.value

    @property
    def accumulator(self) -> str:
        return self.attention.contraction.out.tensor

    @property
    def skipping(self) -> str:
        """Which tiles without a kept key may be left out: "always", "guarded" or "never" (see `skip.rule`)."""
        return rule(self.state, self.score, self.mask, self.key)

    @cached_property
    def span(self) -> KeyRange | None:
        """The keys of a row block in closed form, for a program to compute by itself; None where tiles have to be listed."""
        if self.mask.keep is ex.TRUE or self.attention.query not in (*self.rows, *self._alone):
            return None
        found = key_range(self.mask.keep, self.attention.query, self.key, size_term(self.extent[self.key]))
        if found is None or (self.skipping == "guarded" and found.alive is ex.FALSE):
            return None
        of_program = {*self.grid, *FIRST.ranks, *LAST.ranks}
        return found if all(e.ranks <= of_program for e in found.terms) else None

    @cached_property
    def eights(self) -> tuple[int, ...]:
        """Places among the inputs of operands whose strides are likely to be multiples of 8, not of 16: heads of 40 or 72.

        Triton looks for 16 alone, and reads two bytes at a time where it finds nothing.
        """
        widths = [*(p.size for p in self.products), int(self.extent[self.value])]
        if all(n % 16 == 0 for n in widths) or any(n % 8 for n in widths):
            return ()
        sides = [x for p in self.products for x in (p.query, p.key)] + [self.values]
        read = {str(x.load.attr) for x in sides if x.load is not None}
        return tuple(i for i, t in enumerate(self.inputs) if t in read)

    @property
    def _alone(self) -> tuple[str, ...]:
        """The query rank where it has one coordinate, which no term names."""
        return (self.attention.query,) if self.extent[self.attention.query] == 1 else ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Tensors that the kernel reads, in the order of its arguments: the cascade's inputs, then the prelude's."""
        return (*(t.name for t in self.cascade.inputs), *(e.out.tensor for e in self.attention.prelude))

    @property
    def value_width(self) -> int:
        """The value rank's size, padded to a power of two of at least 16."""
        return power_of_two(int(self.extent[self.value]))


def power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def chunks(size: int) -> tuple[tuple[int, int], ...]:
    """192 → 128 + 64, 80 → 64 + 16, 112 → 128 (padded): two pieces where they are smaller than one."""
    whole = power_of_two(size)
    if whole == size or size < 16:
        return ((0, whole),)
    first = whole // 2
    rest = power_of_two(size - first)
    return ((0, first), (first, rest)) if first + rest < whole else ((0, whole),)


class _No(Exception):
    """Carries the reason of a refusal to the one place that catches it."""


@lru_cache(maxsize=256)
def read(c: Cascade) -> Streaming | Refusal:
    """The attention of a cascade as the streaming skeleton computes it, or why it cannot."""
    s = read_rows(c)
    return s if isinstance(s, Refusal) else _grouped(s)


@lru_cache(maxsize=256)
def read_rows(c: Cascade) -> Streaming | Refusal:
    """The same with row blocks of queries alone, however few there are."""
    a = with_numbers(c)
    if isinstance(a, Obstacle):
        return Refusal(NAME, str(a))
    state = derive(a)
    if isinstance(state, Obstacle):
        return Refusal(NAME, str(state))
    try:
        return _read(a, state)
    except _No as no:
        return Refusal(NAME, str(no))


def _read(a: Attention, state: RowState) -> Streaming:
    c = a.cascade
    extent: dict[str, Size] = {r.name: r.size for r in c.ranks}
    # A float64 without dimensions is a number that the model keeps beside it; it is rounded once.
    if wide := [t.name for t in c.tensors if t.dtype == "f64" and t.shape]:
        raise _No(f"{', '.join(wide)} is float64; the kernel computes in float32")
    if odd := [k.name for k in state.carried if k.op not in ("add", "max", "min")]:
        raise _No(f"the row scalar {odd[0]} reduces by another operator than add, max and min")
    for r in (a.value, *(r for e in a.products for r in e.over)):
        if not isinstance(extent[r], int):
            raise _No(f"the size of rank {r} must be a number, it is {extent[r]}")
    products = tuple(_product(a, e, extent) for e in a.products)
    values = _side(a.values)
    if values.dtype == "f16" and not fits_half(state, a.score, a.key):
        values = DotOperand(values.term, "f32")
    if a.query in values.term.ranks:
        raise _No(f"the values vary over the query rank {a.query}")
    (output,) = c.producers[c.outputs[0]]
    out = Streaming(
        cascade=c, attention=a, extent=extent, grid=a.batch, rows=(a.query,), products=products, values=values,
        score=a.score, mask=_mask(a, state), state=state, output=output.out.index,
    )
    widths = [sum(w for _, w in p.chunks) for p in products] + [out.value_width]
    if max(widths) > WIDEST:
        raise _No(f"a head size of {max(widths)} does not fit on chip; {WIDEST} is the largest")
    return _factored(out)


def _mask(a: Attention, state: RowState) -> Mask:
    """The mask inside the score, or else the one that the row rule applies to what it makes of the score."""
    mask = split(a.score, a.key)
    if mask.keep is not ex.TRUE:
        return mask
    keep = predicate(state, a.score, a.key)
    return Mask(keep, simplify_under(a.score, {keep: True}), ()) if keep is not ex.TRUE else mask


# --- operands ---------------------------------------------------------------------------------------------------


def _factors(body: Expr) -> tuple[list[Expr], list[Expr]]:
    """Factors above and below the line, looked for inside casts as well: a kernel computes in fp32."""
    above, below = factors(uncast(body))
    up: list[Expr] = []
    down = list(below)
    for f in above:
        g = uncast(f)
        if g is f or g.op not in ("mul", "div"):
            up.append(g)
            continue
        inner, under = _factors(g)
        up += inner
        down += under
    return up, down


def _product(a: Attention, e: Einsum, extent: dict[str, Size]) -> Dot:
    """Sort the factors of a contraction: those without its rank leave the sum, the others belong to one side."""
    body, embed = e.body, e.over[0]
    if len(e.over) > 1:
        body, embed = _flattened(e, extent)
    above, below = _factors(body)
    factor, query, key = ex.const(1.0), None, None
    for f, up in [(f, True) for f in above] + [(f, False) for f in below]:
        if embed not in f.ranks:
            factor = factor * f if up else factor / f
        elif a.key in f.ranks:
            if a.query in f.ranks:
                raise _No(f"{e.out.tensor} is no product of a query side and a key side: {f}")
            key = _times(key, f, up)
        else:
            query = _times(query, f, up)
    if query is None or key is None:
        raise _No(f"{e.out.tensor} has no {'query' if query is None else 'key'} operand")
    q, k = _side(query), _side(key)
    if q.dtype != k.dtype:
        q, k = replace(q, dtype="f32"), replace(k, dtype="f32")
    load = ex.load(e.out.tensor, e.out.index, a.cascade.tensor[e.out.tensor].dtype)
    return Dot(load, embed, int(extent[embed]), q, k, factor)


def _times(side: Expr | None, f: Expr, up: bool) -> Expr:
    if side is None:
        return f if up else 1.0 / f
    return side * f if up else side / f


def _side(term: Expr) -> DotOperand:
    """An operand in its tensor's type when it is one as it lies, else in the type that the model computes it in."""
    bare = uncast(term)
    if bare.op == "load" and bare.is_float:
        return DotOperand(bare, bare.dtype)
    return DotOperand(term, term.dtype if term.dtype in ("f16", "bf16") else "f32")


def _flattened(e: Einsum, extent: dict[str, Size]) -> tuple[Expr, str]:
    """Several summed ranks as one:  Σ_{r,s} x[r,s] = Σ_t x[t // S, t % S]."""
    name = "_".join(e.over)
    rest = ex.index(name)
    table: dict[Expr, Expr] = {}
    total = 1
    for i, r in enumerate(reversed(e.over)):
        n = int(extent[r])
        table[ex.index(r)] = rest % n if i < len(e.over) - 1 else rest
        rest, total = rest // n, total * n
    extent[name] = total
    return ex.substitute(e.body, table), name


# --- terms over the raw products --------------------------------------------------------------------------------


def mapped(s: Streaming, f: Callable[[Expr], Expr]) -> Streaming:
    """Every term of the element-wise program rewritten by `f`."""
    mask = replace(s.mask, keep=f(s.mask.keep), full=f(s.mask.full))
    return replace(s, score=f(s.score), mask=mask, state=mapped_state(s.state, f))


def _factored(s: Streaming) -> Streaming:
    """Terms read the plain sum: `QK` becomes `factor · QK`; the coordinate of a batch rank of size 1 becomes 0."""
    table = {p.load: ex.cast(p.load * p.factor, p.load.dtype) for p in s.products}
    out = mapped(s, lambda e: ex.substitute(e, table))
    ones = {ex.index(r): ex.const(0) for r in s.grid if s.extent[r] == 1}
    out = everywhere(out, lambda e: ex.substitute(e, ones))
    return replace(out, grid=tuple(r for r in out.grid if s.extent[r] != 1))


def everywhere(s: Streaming, f: Callable[[Expr], Expr]) -> Streaming:
    """Every term of the attention rewritten by `f`, the operands' and the output's included."""
    products = tuple(
        replace(
            p,
            load=f(p.load),
            factor=f(p.factor),
            query=replace(p.query, term=f(p.query.term)),
            key=replace(p.key, term=f(p.key.term)),
        )
        for p in s.products
    )
    values = replace(s.values, term=f(s.values.term))
    return replace(mapped(s, f), products=products, values=values, output=tuple(f(i) for i in s.output))


def variant(s: Streaming, full: bool) -> tuple[Expr, RowState]:
    """The score and the row state on a tile: as the model wrote it, or where every key is known to be kept."""
    if not full or s.mask.keep is ex.TRUE:
        return s.score, s.state
    facts = {s.mask.keep: True}

    def kept(e: Expr) -> Expr:
        return simplify_under(ex.substitute(e, {s.score: s.mask.full}), facts)

    return s.mask.full, mapped(s, kept).state


# --- heads that share keys --------------------------------------------------------------------------------------


def _grouped(s: Streaming) -> Streaming:
    """With a few query rows, put the heads of a group into one row block:  h = k·G + g, keys and values read h // G.

    before   grid (b, h), rows (p)        after   grid (b, k), rows (g, p)
    """
    queries = s.extent[s.attention.query]
    if not isinstance(queries, int) or queries >= FEW_ROWS:
        return s
    for r in reversed(s.grid):
        group = _group(s, r)
        if group is not None and 1 < group * queries <= SHARED_ROWS:
            return _regrouped(s, r, group)
    return s


def _group(s: Streaming, r: str) -> int | None:
    """G when keys and values see the rank only as `r // G`; its whole size when they do not see it at all."""
    size = s.extent[r]
    if any(r not in p.query.term.ranks for p in s.products):
        return None
    found: set[Expr] = set()
    for side in (*(p.key for p in s.products), s.values):
        inner = {ex.index(r)}
        for t in ex.walk(side.term):
            if t.op == "floordiv" and t.args[0] in inner and t.args[1].is_const:
                found.add(t.args[1])
            elif ex.index(r) in t.args:
                return None
    if not found:
        return size if isinstance(size, int) else None
    if len(found) > 1:
        return None
    group = int(found.pop().value)
    return group if not isinstance(size, int) or size % group == 0 else None


def _regrouped(s: Streaming, r: str, group: int) -> Streaming:
    shared, own = f"{r}_shared", f"{r}_own"
    size = s.extent[r]
    count: Size = size // group if isinstance(size, int) else size / group
    high = ex.const(0) if count == 1 else ex.index(shared)
    low = ex.index(own)
    whole = high * group + low

    def f(root: Expr) -> Expr:
        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e is ex.index(r):
                return whole
            if e.op in ("floordiv", "mod") and args[0] is whole and args[1].is_const and args[1].value == group:
                return high if e.op == "floordiv" else low
            return None

        return ex.rebuild(root, rule)

    out = everywhere(s, f)
    rows = (own, s.attention.query)
    if size_one := s.extent[s.attention.query] == 1:
        zero = {ex.index(s.attention.query): ex.const(0)}
        out = everywhere(out, lambda e: ex.substitute(e, zero))
    grid = tuple(x for g in s.grid for x in (((shared,) if count != 1 else ()) if g == r else (g,)))
    return replace(
        out, grid=grid, rows=rows[:1] if size_one else rows, extent={**s.extent, shared: count, own: group}
    )
