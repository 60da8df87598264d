"""What the backward skeleton needs to know of an attention: its adjoint over the streaming form's terms, where gradients go.

    elements   the weight, then dX·factor of each product, over [BM, BN]
    scalars    of a row: what the forward saves, then sums over the values
    sides      one gradient a product's query side, a key side, the values: dense over the ranks that it varies over
    shared     heads (and batches) whose queries see one key: a key's program sums over them
    leaves     floats that are no operands: what reaches each, over [BM, BN] or, of a row's end, [BM, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ....patterns import expr as ex
from ....patterns.backward.adjoint import Adjoint, RowSum, adjoint
from ....patterns.backward.outside import outside, sum_of
from ....patterns.cascade import Cascade, Size, size_term
from ....patterns.expr import Expr
from ....patterns.masks.ranges import KeyRange, key_range
from ....patterns.terms.conditions import simplify_under
from ....patterns.verdict import Obstacle, Refusal
from ...forms.form import rows_keep_a_key
from ...forms.skip import idle_without_a_key, vanishes_backwards
from ..streaming import NAME, DotOperand, Streaming, read_rows


@dataclass(frozen=True)
class OperandGradient:
    """The gradient of one operand: `ranks` of its buffer in order, `sizes` of them; `load` is where the operand lies."""

    ranks: tuple[str, ...]
    sizes: tuple[Size, ...]
    load: Expr

    @property
    def tensor(self) -> str:
        return str(self.load.attr)


@dataclass(frozen=True)
class LeafGradient:
    """What reaches the tensor at `load`, of a partial tile and of a full one (of a row's end the same), kept over `ranks`.

    Without the key: a number for each row, of its end where `ends`. Without the query: one for each key of each head.
    """

    load: Expr
    partial: Expr
    full: Expr
    ranks: tuple[str, ...]
    ends: bool = False


@dataclass(frozen=True)
class StreamingBackward:
    """The backward of a streaming attention. Terms speak of the same coordinates and products as those of `s`."""

    s: Streaming
    out: Expr
    dout: Expr
    saved: tuple[Expr, ...]
    saved_terms: tuple[Expr, ...]
    row: tuple[RowSum, ...]
    dweight: Expr
    acc: Expr
    partial: tuple[Expr, ...]
    full: tuple[Expr, ...]
    skips: bool
    without: tuple[str, ...]
    leaves: tuple[LeafGradient, ...] = ()

    @property
    def keyed_bits(self) -> int:
        """Bits of the leaves that the kernel of keys adds up."""
        return sum(1 << i for i, x in enumerate(self.leaves) if self.s.attention.query not in x.ranks)

    @property
    def scalars(self) -> tuple[Expr, ...]:
        return (*self.saved, *(x.load for x in self.row))

    @cached_property
    def shared(self) -> Mapping[str, int | None]:
        """Of each rank of the grid, how many coordinates share a key: 1 where it is the key's own, None where all do."""
        return {r: _group(self.s, r) for r in self.s.grid}

    @cached_property
    def queries(self) -> tuple[OperandGradient, ...]:
        s = self.s
        return tuple(self._side((*s.grid, s.attention.query, p.embed), p.query) for p in s.products)

    @cached_property
    def keys(self) -> tuple[OperandGradient, ...]:
        """Of each product's keys, then of the values."""
        s = self.s
        near = [(p.embed, p.key) for p in s.products] + [(s.value, s.values)]
        own = tuple(r for r in s.grid if self.shared[r] is not None)
        return tuple(self._side((*own, s.key, r), side) for r, side in near)

    def _side(self, ranks: tuple[str, ...], side: DotOperand) -> OperandGradient:
        extent = self.s.extent
        of_key = self.s.key in ranks
        sizes = tuple(_divided(extent[r], self.shared[r] if of_key and r in self.shared else 1) for r in ranks)
        assert side.load is not None
        return OperandGradient(ranks, sizes, side.load)

    @cached_property
    def seen(self) -> KeyRange | None:
        """The queries that see a block of keys, in closed form; None where all are looked at."""
        s = self.s
        if not self.skips or s.mask.keep is ex.TRUE:
            return None
        query = s.attention.query
        found = key_range(s.mask.keep, s.key, query, size_term(s.extent[query]))
        of_program = {*s.grid, "$first", "$last"}
        return found if found is not None and all(e.ranks <= of_program for e in found.terms) else None


def _divided(size: Size, by: int | None) -> Size:
    if by is None or by == 1:
        return size
    return size // by if isinstance(size, int) else size / by


@lru_cache(maxsize=256)
def read_backward(c: Cascade) -> StreamingBackward | Refusal:
    """The backward of a cascade as the skeleton computes it, or why it cannot."""
    s = read_rows(c)
    if isinstance(s, Refusal):
        return s
    made = adjoint(s.attention)
    if isinstance(made, Obstacle):
        return Refusal(NAME, str(made))
    if no := _no(s, made):
        return Refusal(f"{NAME} backward", no)
    return _read(s, made)


def _no(s: Streaming, made: Adjoint) -> str:
    if made.passes:
        return f"the gradient needs another pass over the keys: {made.passes[0]}"
    if any(s.value in x.load.ranks for x in (*made.saved, *made.row)):
        return "the gradient needs what the forward sums, value by value: a row hands over scalars alone"
    sides = [(p.query, (s.attention.query, p.embed)) for p in s.products]
    sides += [(p.key, (s.key, p.embed)) for p in s.products] + [(s.values, (s.key, s.value))]
    for side, own in sides:
        if side.load is None:
            return f"an operand is computed in the kernel: {side.term}"
        if not _is_plain(s, side.load, own):
            return f"an operand is read at computed coordinates: {side.load}"
    narrow = s.cascade.tensor[s.cascade.outputs[0]].dtype in ("bf16", "f16")
    if made.row and narrow and any(side.dtype == "f32" for side, _ in sides):
        return "an output that is rounded to 16 bits tells too little of the gradients of wider operands"
    return ""


def _is_plain(s: Streaming, load: Expr, own: tuple[str, str]) -> bool:
    """Whole ranks, each once: the side's own two, ranks of the grid, heads of a group on the keys' side, or one place."""
    seen: list[str] = []
    for i, size in zip(load.args, s.cascade.tensor[str(load.attr)].shape, strict=True):
        if i.is_const:
            continue
        grouped = i.op == "floordiv" and i.args[0].op == "index" and i.args[1].is_const and own[0] == s.key
        rank = str(i.args[0].attr) if grouped else str(i.attr) if i.op == "index" else ""
        if rank not in (*own, *s.grid) or (grouped and rank in own):
            return False
        if not grouped and s.extent[rank] != size:
            return False
        seen.append(rank)
    return len(set(seen)) == len(seen) and set(own) <= set(seen)


def _group(s: Streaming, r: str) -> int | None:
    """How many coordinates of a rank share a key: keys and values read `r // G` alike, or none of them reads it."""
    found: set[int | None] = set()
    for side in (*(p.key for p in s.products), s.values):
        reads = [t for t in ex.walk(side.term) if ex.index(r) in t.args or t is ex.index(r)]
        if not reads:
            found.add(None)
            continue
        divided = [int(t.args[1].value) for t in reads if t.op == "floordiv"]
        found.add(divided[0] if divided else 1)
    if len(found) > 1:
        raise _Unequal(r)
    return found.pop()


class _Unequal(Exception):
    """Keys and values are shared by other heads each."""


def _read(s: Streaming, made: Adjoint) -> StreamingBackward | Refusal:
    ones = {ex.index(r): ex.const(0) for r in s.attention.batch if s.extent[r] == 1}
    table = {p.load: ex.cast(p.load * p.factor, p.load.dtype) for p in s.products}

    def plain(e: Expr) -> Expr:
        return ex.substitute(e, ones)

    def over_products(e: Expr) -> Expr:
        return ex.substitute(plain(e), table)

    gradients = {plain(g.load): g.term for g in made.scores}
    if any(p.load not in gradients for p in s.products):
        return Refusal(f"{NAME} backward", "no gradient reaches a product of queries and keys")
    elements = [over_products(made.weight)]
    for p in s.products:
        d = over_products(gradients[p.load])
        elements.append(d if p.factor.is_const and p.factor.value == 1 else d * ex.cast(p.factor, d.dtype))
    keep = s.mask.keep
    full = elements if keep is ex.TRUE else [simplify_under(e, {keep: True}) for e in elements]
    saved = tuple(plain(x.load) for x in made.saved)
    row = tuple(replace(x, load=plain(x.load), term=plain(x.term)) for x in made.row)
    leaves, skips = _leaves(s, made, plain, over_products), _skips(s, elements, saved)
    if skips:
        leaves = [x for x in leaves if x.ends or _skips(s, [*elements, x.partial], saved)]
    out = StreamingBackward(
        s, plain(made.out), plain(made.dout), saved, tuple(plain(x.term) for x in made.saved), row, plain(made.dweight),
        plain(made.acc), tuple(elements), tuple(full), skips, _without(s, made, plain, leaves), tuple(leaves),
    )
    try:
        _ = out.queries, out.keys
    except _Unequal as no:
        return Refusal(f"{NAME} backward", f"keys and values are shared by other coordinates of {no} each")
    return out


def _leaves(
    s: Streaming, made: Adjoint, plain: Callable[[Expr], Expr], over_products: Callable[[Expr], Expr]
) -> list[LeafGradient]:
    """The leaves whose gradients these kernels give: inputs of the cascade, exact enough."""
    a, inputs = s.attention, {t.name for t in s.cascade.inputs}
    narrow = bool(made.row) and s.cascade.tensor[s.cascade.outputs[0]].dtype in ("bf16", "f16")
    sums = {sum_of(p.load): p.load for p in s.products}
    of_tiles = [(g.load, over_products(g.term)) for g in made.leaves if a.key in g.space and s.value not in g.space]
    found = {plain(g.load): plain(g.term) for g in made.scores}
    multiplied = outside(((p.load, p.factor) for p in s.products), found)
    for load, term in () if isinstance(multiplied, Obstacle) else multiplied:
        of_tiles.append((load, ex.substitute(over_products(term), sums)))
    of_rows = [(g.load, plain(g.term)) for g in made.leaves if not {a.key, s.value} & set(g.space)]
    out = []
    for ends, pairs in ((False, of_tiles), (True, of_rows)):
        for load, term in pairs:
            at = plain(load)
            if str(load.attr) not in inputs or (narrow and load.dtype == "f32"):
                continue
            keyed = (a.key,) if a.key in at.ranks else ()
            own = (a.query, *keyed) if a.query in at.ranks or not keyed else keyed
            full = term if ends or s.mask.keep is ex.TRUE else simplify_under(term, {s.mask.keep: True})
            out.append(LeafGradient(at, term, full, (*s.grid, *own), ends))
    return out


def _skips(s: Streaming, elements: Sequence[Expr], saved: Sequence[Expr]) -> bool:
    """May tiles without a kept key be left out, in rows of which nothing else is known?"""
    if s.mask.keep is ex.TRUE or s.skipping == "never":
        return False
    if not vanishes_backwards(elements, s.mask.keep):
        return False
    return idle_without_a_key(elements, saved) or not rows_keep_a_key(s.attention, s.mask.keep)


def _without(
    s: Streaming, made: Adjoint, plain: Callable[[Expr], Expr], given: Sequence[LeafGradient]
) -> tuple[str, ...]:
    """Float inputs of leaves that are not among those given, also through the prelude."""
    loads = [*(plain(g.load) for g in made.leaves), *(x for p in s.products for x in ex.loads(p.factor))]
    known = {x.load for x in given}
    read = {str(x.attr) for x in loads if x not in known}
    sides = {str(x.attr) for p in s.products for side in (p.query, p.key) for x in ex.loads(side.term)}
    sides |= {str(x.attr) for x in ex.loads(s.values.term)}
    for e in reversed(s.attention.prelude):
        # what the prelude makes is read as it is: nothing flows back through it here
        if e.out.tensor in read | sides:
            read |= {str(x.attr) for x in e.reads}
    return tuple(t.name for t in s.cascade.inputs if t.name in read and t.dtype in ex.FLOATS)
