"""The one-pass form of a row program: which state a row carries over tiles of keys, derived from its reductions.

A row program is a chain of reductions over the key rank, each of which may use the results of those before it:
    r_1 = ⊕_m g_1(s_m)      r_2 = ⊕_m g_2(s_m, r_1)      …      out = finish(Σ_m w(s_m, r)·V_m, r)
Three laws turn it into one pass. s stands for what varies over the key (an element), r for earlier row scalars.
    defer    Σ f(s)·h(r) = h(r)·Σ f(s);   max f(s) + h(r) = h(r) + max f(s)      h moves behind the reduction
    repair   Σ exp(s − d), d a running bound:  state ← state·exp(d_old − d_new) + Σ_tile exp(s − d_new)
    expand   Σ (f(s) + g(s))·h = h·Σ f(s) + h·Σ g(s);   Σ h(r) = M·h(r)
A chain that none of them splits has no such form, and the Obstacle states the law that failed.

What a code generator does with a `RowState` (both generators follow this, to the letter):
    start        every `Carried` holds `identity`; the accumulator of the contraction holds 0
    each tile    for each Carried in order, with T = reduce `op` over the tile's keys of `lift`:
                     new = op(old, T)                  when `correction` is None
                     new = old · correction + T        op "add"        (op "max" and "min" never have a correction)
                 accumulator = accumulator · correction + Σ_tile weight·V       (factor 1 when it is None)
    after        the output is `finish`
In `lift` and `weight` a load of a carried name is its NEW value; a Carried reads only Carried before it. In a
`correction` a load of NAME is the new value and a load of `old:NAME` the value before this tile. In `finish` a load of
a carried name, or of the contraction's tensor, is the final value. All of them are loaded at the row's coordinates.
Keys beyond the end of a ragged tile, and keys of tiles that are skipped, take no part: they contribute `identity` to
a carried value and 0 to the accumulator (select, do not multiply: their lift may be NaN).

Two states A and B of one row over disjoint keys (split keys, ring steps) merge by the same terms, in order: op(A, B)
without a correction; else A·c + B·c', where c is the correction with `old:` read from A and NAME from the merged
values, and c' the same with `old:` read from B. The accumulator merges as a Carried of op "add".

Rows whose bound d is −∞, because every key so far is masked with −∞: `s − d` would be NaN and would stay NaN. So the
bound is guarded where it is subtracted, d̂ = where(d = −∞, 0, d), in lifts and on the new side of corrections:
`exp(s − d̂)` is then 0 and `exp(d_old − d̂_new)` is 0 as long as d_old = −∞, whatever d_new is; both are at most 1
otherwise. If the bound is −∞ at the end, the guarded state holds 0 where the model's own arithmetic gives
exp(−∞ − (−∞)) = NaN: `finish` restores that NaN by where(d = −∞, NaN, …), unless its result is the same without
(0/0 is NaN as well; a rule that selects 0 for such rows selects it). A mask that is applied to the weights themselves
gives 0 for a row without a key even if its normaliser is NaN: then a Carried of op "max" holds whether a key was kept.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .. import expr as ex
from ..cascade import IDENTITY, size_term
from ..expr import Expr
from ..terms.constant import REDUCE, number
from ..verdict import Obstacle
from .attention import Attention
from .carried import OLD, Bound, Carried, RowState
from .reductions import Reducer
from .score import elements, reading
from .separate import SplitContext, Stop
from .stream import stream
from .traits import VALUES, made_up, masked_row, run_row

__all__ = ["OLD", "Carried", "RowState", "derive", "stream"]


@lru_cache(maxsize=512)
def derive(a: Attention) -> RowState | Obstacle:
    """The one-pass form of an attention's row program, or the law that fails."""
    d = _Derivation(a)
    where: object = ""
    try:
        for r in a.row:
            where = r.out
            d.reduction(r, a.cascade.tensor[r.out.tensor].dtype)
        where = a.contraction.out
        return d.state()
    except Stop as stop:
        return Obstacle(f"no one-pass form: {stop.law}, in {_short(stop.term)}", str(where), depth=6)


def _short(e: Expr) -> str:
    text = str(e)
    return text if len(text) <= 160 else text[:157] + "…"


class _Derivation(Reducer):
    """Walks the chain of reductions of an attention and carries each over tiles of keys."""

    def __init__(self, a: Attention) -> None:
        length = size_term(a.cascade.rank[a.key].size)
        products = frozenset(e.out.tensor for e in a.products)
        exposed = (*(r.body for r in a.row), a.weight)
        super().__init__(
            SplitContext(a.key, length, exposed, products, a.row_names, (*a.batch, a.query), a.cascade.accumulate)
        )
        self.a = a
        self.bounds: dict[str, tuple[tuple[Bound, float], ...]] = {}

    def carry(self, name: str, op: str, lift: Expr, here: Expr, bounds: tuple[tuple[Bound, float], ...]) -> Expr:
        """Carry a reduction and answer its load; one that is carried already is not carried twice."""
        correction = self.correction(bounds, lift)
        for c in self.carried:
            if (c.op, c.lift, c.correction) == (op, lift, correction):
                return ex.load(c.name, here.args, here.dtype)
        taken = {c.name for c in self.carried}
        while name in taken:
            name += "_"
        self.carried.append(Carried(name, op, float(IDENTITY[op]), lift, correction))
        self.ops[name] = op
        self.bounds[name] = bounds
        return ex.load(name, here.args, here.dtype)

    def state(self) -> RowState:
        a = self.a
        weight = ex.substitute(a.weight, self.final)
        parts = self.split(weight)
        if len(parts) != 1:
            raise Stop(weight, f"the weight is a sum of {len(parts)} terms that scale apart: one accumulator holds one")
        (part,) = parts
        at = a.contraction.out
        total = next((x for x in ex.loads(a.finish) if str(x.attr) == at.tensor), None)
        assert total is not None
        self.bounds[at.tensor] = part.bounds
        correction = self.correction(part.bounds, part.lift)
        finish = ex.substitute(a.finish, {total: part.done(total), **self.final})
        finish = self.restored(part.lift, finish)
        further = tuple(self.number_of_row(part.lift, t) for t in a.further)
        carried = self.used(part.lift, correction, finish, *further)
        sums = {at.tensor, *(c.name for c in carried)}
        bounds = tuple((n, b, k) for n, bs in self.bounds.items() if n in sums for b, k in bs)
        return RowState(carried, part.lift, correction, finish, bounds, further)

    def number_of_row(self, weight: Expr, term: Expr) -> Expr:
        """A number of the row that leaves, over what is carried: also of a row whose bound is −∞ as the model has it."""
        out = ex.substitute(term, self.final)
        if not self.can_empty or self.ends_alike(weight, out, term):
            return out
        empty: Expr = ex.FALSE
        for d in dict.fromkeys(b.d for bs in self.bounds.values() for b, _ in bs):
            empty = empty | ex.equal(d, -math.inf)
        ended = ex.where(empty, ex.const(math.nan, out.dtype), out)
        if not self.ends_alike(weight, ended, term):
            raise Stop(term, "what a row without a key hands out depends on data")
        return ended

    def used(self, *roots: Expr | None) -> tuple[Carried, ...]:
        """The carried scalars that something reads, in order."""
        names: set[str] = set()
        todo = [t for t in roots if t is not None]
        while todo:
            for x in ex.loads(todo.pop()):
                name = str(x.attr).removeprefix(OLD)
                if name not in self.ops or name in names:
                    continue
                names.add(name)
                c = next(c for c in self.carried if c.name == name)
                todo += [c.lift] if c.correction is None else [c.lift, c.correction]
        return tuple(c for c in self.carried if c.name in names)

    def restored(self, weight: Expr, finish: Expr) -> Expr:
        """The epilogue with the model's NaN for rows whose bound is −∞, where it is not there by itself."""
        repaired = {n: tuple(b for b, _ in bs) for n, bs in self.bounds.items() if bs}
        if not repaired or not self.can_empty or self.ends_alike(weight, finish):
            return finish
        table = {}
        for x in ex.loads(finish):
            if str(x.attr) in repaired:
                empty: Expr = ex.FALSE
                for b in repaired[str(x.attr)]:
                    empty = empty | ex.equal(b.d, -math.inf)
                table[x] = ex.where(empty, ex.const(math.nan, x.dtype), x)
        ended = ex.substitute(finish, table)
        if not self.ends_alike(weight, ended):
            raise Stop(finish, "how a row without a key ends depends on data")
        return ended

    def empty_rows(self) -> list[dict[Expr, object]]:
        """Rows whose scores are all −∞, as far as the terms tell: by their masks, or because a tensor holds −∞."""
        masked = masked_row(self.a)
        terms = (*(r.body for r in self.a.row), self.a.weight)
        products = frozenset(e.out.tensor for e in self.a.products)
        scores: dict[Expr, object] = {}
        for e in (e for t in terms for e in elements(t, self.a.row_names, self.key)):
            if e.dtype == "b1":
                scores[e] = np.full(2, True)
            elif e in reading(e, products):
                scores[e] = np.full(2, -np.inf)
        return [scores] if masked is None else [masked, scores]

    def ends_alike(self, weight: Expr, finish: Expr, own: Expr | None = None) -> bool:
        """Does the guarded state end rows without a key as the model's own arithmetic does, whatever the rest holds?

        `own`: what the model's arithmetic is, if not the row's end.
        """
        # With every bound at −∞, all that a bound holds is −∞: a sink is.
        bounds = [b.d for bs in self.bounds.values() for b, _ in bs]
        low = {x: -math.inf for d in bounds for x in ex.loads(d) if x.is_float and str(x.attr) not in self.ops}
        terms = (weight, finish, *(c.lift for c in self.carried), *((own,) if own is not None else ()))
        return all(
            self.ends_so(known, weight, finish, self.a.finish if own is None else own)
            for row in self.empty_rows()
            for known in made_up(self.a, {**low, **row}, terms, self.ops)
        )

    def ends_so(self, known: dict[Expr, object], weight: Expr, finish: Expr, own: Expr) -> bool:
        model = number(own, run_row(self.a, known), known)
        values: dict[str, object] = {}
        with np.errstate(all="ignore"):
            for c in self.carried:
                values[c.name] = REDUCE[c.op](np.broadcast_to(number(c.lift, values, known), (2,)))
            total = np.sum(np.broadcast_to(number(weight, values, known), (2,)) * VALUES)
        values[self.a.contraction.out.tensor] = total
        return bool(np.isclose(number(finish, values, known), model, equal_nan=True))
