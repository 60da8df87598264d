"""Rewrites of cascades, each cascade → cascade with its conditions, or a Refusal that names the law that fails.

    expand    Σ (f·h + g·k)  →  h·Σ f + k·Σ g
    moments   Σ (x − d)²     →  Σ x² − 2d·Σ x + n·d²                     a finite basis of moments of x
    defer     Σ f·h          →  h·Σ f         max (f + h)  →  h + max f
    exchange  Σ_m (Σ_x a·b)·c  →  Σ_x a·Σ_m b·c                          state grows by the rank x
m is the rank of the family, h, k, d are scalars of the row that an earlier reduction over m made. Each keeps what is
computed in exact arithmetic (`evaluate` in float64 is the proof in the tests) and changes the rounding only.
Sources: FuseMax (MICRO 2024) section III; the bases of moments and the exchange of sums are older than all of us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from .. import expr as ex
from ..attention.carried import Bound, Carried
from ..attention.reductions import Reducer
from ..attention.score import factors
from ..attention.separate import SplitContext, Stop, Summand
from ..cascade import IDENTITY, Access, Cascade, Einsum, Tensor, size_term
from ..expr import Expr
from ..verdict import Refusal
from .chain import Reading, exposed, products, rebuilt, unused

Family: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Rewritten:
    """A cascade after one rewrite: over which rank family it now runs, and what must hold for it to be the same."""

    rewrite: str
    cascade: Cascade
    family: Family
    conditions: tuple[str, ...] = ()


Rewrite: TypeAlias = Callable[[Cascade, Family], "Rewritten | Refusal"]


def expand(c: Cascade, family: Family) -> Rewritten | Refusal:
    """A sum of terms that scale apart becomes a sum of sums.

    before   O = Σ_m (A1 − λ·A2)·V,  A1 = N1/D1, A2 = N2/D2      after   O = (Σ N1·V)/D1 − λ·(Σ N2·V)/D2
    """
    return _moved("expand", c, family, lambda step: step.parts > 1 and not step.polynomial)


def moments(c: Cascade, family: Family) -> Rewritten | Refusal:
    """A power of an element and a row scalar becomes a polynomial over the moments of the element.

    before   V = Σ_m (x − d)²      after   V = Σ x² − 2·d·Σ x + M·d²
    """
    out = _moved("moments", c, family, lambda step: step.polynomial)
    if isinstance(out, Refusal):
        return out
    note = "the moments cancel where |mean| is much larger than the deviation: then Welford's update keeps the digits"
    return replace(out, conditions=(*out.conditions, note))


def defer(c: Cascade, family: Family) -> Rewritten | Refusal:
    """Scalars of the row move past the reduction; everything between is linear in them.

    before   A = SN/SD;  AV = Σ_m A·V                            after   SNV = Σ_m SN·V;  AV = SNV/SD
    """
    return _moved("defer", c, family, lambda step: step.parts == 1)


@dataclass(frozen=True)
class _Step:
    """What the laws make of one reduction: its value over what was newly carried."""

    value: Expr
    new: tuple[Carried, ...]
    parts: int
    polynomial: bool


class _Deferral(Reducer):
    """Applies the laws to every reduction over the key, and keeps those steps that `choose` admits."""

    def __init__(self, c: Cascade, key: str) -> None:
        self.c, self.reading = c, Reading(c)
        self.over_key = {e.out.tensor for e in c.einsums if e.over == (key,)}
        terms = {e.out.tensor: self.reading.inline(e.body) for e in c.einsums if e.out.tensor in self.over_key}
        rows, made = frozenset(self.over_key), products(c, key)
        length = size_term(c.rank[key].size)
        super().__init__(SplitContext(key, length, exposed(c, terms, key), made, rows, (), c.accumulate))
        self.at: dict[str, tuple[Expr, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.parts = 1
        self.stops: list[Stop] = []

    def guarded(self, d: Expr) -> Expr:
        # the bound is final here: exp(s − d) as the model has it
        return d

    def zeroed(self, p: Summand) -> bool:
        return bool(p.after)

    def row(self, keep: Expr) -> tuple[Expr, ...]:
        return tuple(ex.index(r.name) for r in self.c.ranks if r.name in keep.ranks - {self.key})

    def split(self, e: Expr) -> tuple[Summand, ...]:
        parts = super().split(e)
        self.parts = len(parts)
        return parts

    def carry(self, name: str, op: str, lift: Expr, here: Expr, bounds: tuple[tuple[Bound, float], ...]) -> Expr:
        for c in self.carried:
            if (c.op, c.lift) == (op, lift) and self.dtypes[c.name] == here.dtype:
                return ex.load(c.name, self.at[c.name], here.dtype)
        name = unused(f"{name}_{sum(c.name.startswith(f'{name}_') for c in self.carried) + 1}", {*self.c.tensor, *self.ops})
        self.carried.append(Carried(name, op, float(IDENTITY[op]), lift))
        self.ops[name], self.bodies[name] = op, lift
        self.at[name] = tuple(i for i in here.args if i.ranks & lift.ranks)
        self.dtypes[name] = here.dtype
        return ex.load(name, self.at[name], here.dtype)

    def as_it_is(self, e: Einsum, body: Expr) -> None:
        name = e.out.tensor
        self.ops[name], self.bodies[name], self.at[name] = str(e.op), body, e.out.index
        self.dtypes[name] = self.c.tensor[name].dtype
        self.carried.append(Carried(name, str(e.op), float(IDENTITY[str(e.op)]), body))

    def apply(self, e: Einsum) -> _Step | None:
        """What becomes of one reduction over the key; None where it stays as it is."""
        inlined = replace(e, body=self.reading.inline(e.body))
        body, mark, self.parts = ex.substitute(inlined.body, self.final), len(self.carried), 1
        try:
            value = self.reduction(inlined, self.c.tensor[e.out.tensor].dtype)
        except Stop as stop:
            self.stops.append(stop)
            return None
        polynomial = self.parts > 1 and any(self.mixed(b) for b in _powers(body))
        return _Step(value, tuple(self.carried[mark:]), self.parts, polynomial)

    def undo(self, e: Einsum, mark: int) -> None:
        for c in self.carried[mark:]:
            del self.ops[c.name], self.bodies[c.name], self.at[c.name], self.dtypes[c.name]
        del self.carried[mark:]
        self.final.pop(ex.load(e.out.tensor, e.out.index, self.c.tensor[e.out.tensor].dtype), None)
        self.memo.clear()
        self.as_it_is(e, ex.substitute(self.reading.inline(e.body), self.final))


def _powers(body: Expr) -> list[Expr]:
    """The bases of whole powers in a term."""
    out = [t.args[0] for t in ex.walk(body) if t.op == "mul" and t.args[0] is t.args[1]]
    return out + [t.args[0] for t in ex.walk(body) if t.op == "pow" and t.args[1].is_const and t.args[1].value in (2, 3, 4)]


def _moved(name: str, c: Cascade, family: Family, choose: Callable[[_Step], bool]) -> Rewritten | Refusal:
    if (no := _refused(name, c, family)) is not None:
        return no
    (key,) = family
    d = _Deferral(c, key)
    einsums: list[Einsum] = []
    tensors = dict(c.tensor)
    changed: list[str] = []
    for e in c.einsums:
        if e.over != (key,):
            if e.op is not None and d.rows(d.reading.inline(e.body)):
                d.ops[e.out.tensor] = "opaque"
            einsums.append(e)
            continue
        mark = len(d.carried)
        step = d.apply(e)
        if step is None or not choose(step) or not _moves(e, step, d):
            d.undo(e, mark)
            einsums.append(e)
            continue
        changed.append(e.out.tensor)
        for new in step.new:
            at = d.at[new.name]
            tensors[new.name] = Tensor(new.name, tuple(c.rank[str(i.attr)].size for i in at), d.dtypes[new.name])
            einsums.append(Einsum(Access(new.name, at), d.reading.refold(new.lift), new.op, (key,)))
        einsums.append(Einsum(e.out, step.value))
    if not changed:
        law = d.stops[-1].law if d.stops else "no reduction holds a row scalar that could move"
        return Refusal(name, law)
    return Rewritten(name, rebuilt(c, einsums, tensors), family, (f"linear in what moves: {', '.join(changed)}",))


def _moves(e: Einsum, step: _Step, d: _Deferral) -> bool:
    """Did something leave the reduction? A single sum that is the whole value has moved nothing, unless it shrank."""
    value = step.value
    while value.op == "cast":
        value = value.args[0]
    if value.op == "load" and str(value.attr) in {c.name for c in step.new}:
        (new,) = step.new
        return d.rows(new.lift) != d.rows(d.reading.inline(e.body)) and d.rows(d.reading.inline(e.body)) > d.rows(new.lift)
    return True


def exchange(c: Cascade, family: Family) -> Rewritten | Refusal:
    """A sum over another rank inside a factor moves out of the sum over the family, and takes what lacks it along.

    before   B[g,p,m] = Σ_h W[g,h]·A[h,p,m];  O[g,p,f] = Σ_m B[g,p,m]·V[g,m,f]
    after    U[h,g,p,f] = Σ_m A[h,p,m]·V[g,m,f];  O[g,p,f] = Σ_h W[g,h]·U[h,g,p,f]
    """
    if (no := _refused("exchange", c, family)) is not None:
        return no
    (key,) = family
    reading = Reading(c)
    for place, e in enumerate(c.einsums):
        if e.op != "add" or e.over != (key,):
            continue
        above, below = factors(reading.inline(e.body))
        for i, f in enumerate(above):
            inner = _inner_sum(c, f, key)
            if inner is not None:
                rest = (*above[:i], *above[i + 1 :])
                return _exchanged(c, reading, place, inner, _instance(c, inner, f, e), rest, below, key)
    return Refusal("exchange", f"no factor under a sum over {key} is itself a sum over another rank")


def _inner_sum(c: Cascade, f: Expr, key: str) -> Einsum | None:
    """The Einsum behind a factor that is a sum over other ranks and varies over the key."""
    if f.op != "load" or key not in f.ranks or len(c.producers.get(str(f.attr), ())) != 1:
        return None
    (e,) = c.producers[str(f.attr)]
    return e if e.op == "add" and key not in e.over and e.out.plain else None


def _instance(c: Cascade, inner: Einsum, f: Expr, outer: Einsum) -> tuple[Expr, tuple[str, ...]] | Refusal:
    """The body of an inner sum at the coordinates of its reader, and the ranks that it sums over."""
    if set(inner.over) & (outer.ranks | set(outer.over)):
        return Refusal("exchange", f"{inner.out.tensor} sums over a rank that {outer.out.tensor} has as well")
    return ex.substitute(inner.body, dict(zip(inner.out.index, f.args, strict=True))), inner.over


def _exchanged(
    c: Cascade, reading: Reading, place: int, inner: Einsum, found: tuple[Expr, tuple[str, ...]] | Refusal,
    rest: tuple[Expr, ...], below: tuple[Expr, ...], key: str,
) -> Rewritten | Refusal:
    if isinstance(found, Refusal):
        return found
    e = c.einsums[place]
    body, over = found
    up, down = factors(reading.inline(body))
    up, down = (*up, *rest), (*down, *below)
    state = _product([x for x in up if key in x.ranks], [x for x in down if key in x.ranks])
    row = _product([x for x in up if key not in x.ranks], [x for x in down if key not in x.ranks])
    order = (*(str(i.attr) for i in e.out.index), *over)
    at = tuple(ex.index(r) for r in order if r in state.ranks)
    name = unused(f"U{e.out.tensor}", c.tensor)
    dtype = c.tensor[e.out.tensor].dtype
    tensors = {**c.tensor, name: Tensor(name, tuple(c.rank[str(i.attr)].size for i in at), dtype)}
    made = Einsum(Access(name, at), reading.refold(state), "add", (key,))
    total = ex.load(name, at, dtype)
    out = Einsum(e.out, total * row, "add", over)
    einsums = (*c.einsums[:place], made, out, *c.einsums[place + 1 :])
    shape = "×".join(str(n) for n in tensors[name].shape)
    condition = f"{e.out.tensor} is linear in {inner.out.tensor}; {name} holds {shape} elements"
    return Rewritten("exchange", rebuilt(c, einsums, tensors), (key,), (condition,))


def _product(above: list[Expr], below: list[Expr]) -> Expr:
    out: Expr | None = None
    for x in above:
        out = x if out is None else out * x
    out = ex.const(1.0) if out is None else out
    for x in below:
        out = out / x
    return out


def _refused(name: str, c: Cascade, family: Family) -> Refusal | None:
    if len(family) != 1:
        return Refusal(name, f"{'·'.join(family)} is cut into tiles already")
    if any(r.iterative for r in c.ranks):
        return Refusal(name, "the cascade carries state already")
    return None
