"""Repair: reductions over tiles that run from tile to tile, and are mended when what they used moves.

    LS[m1] = Σ_m0 exp(s − R)    →   RR[m1+1] = max(RR[m1], LR[m1]);   LS[m1] = Σ_m0 exp(s − RR[m1+1])
    S = Σ_m1 LS[m1]                 RS[m1+1] = RS[m1]·exp(RR[m1] − RR[m1+1]) + LS[m1];   S = RS[M1]
A sum that uses a value that is still running is mended when that value moves: by exp(d_old − d_new) for a running bound,
by h_new/h_old for a factor that is provably positive (FuseMax's Cascade 3). A reduction that neither law reaches reads the
final values: it starts the next sweep over the tiles. Sources: FuseMax, Cascades 3 and 5; the repair term of Neptune.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .. import expr as ex
from ..attention.carried import OLD, Bound, Carried
from ..attention.separate import SplitContext, Splitter, Stop, Summand
from ..cascade import IDENTITY, Access, Cascade, Einsum, Tensor, size_term
from ..expr import Expr
from ..operators import facts
from ..terms.constant import number, tries
from ..verdict import Refusal
from .chain import Reading, empty_rows, exposed, products, rebuilt, unused
from .rewrites import Family, Rewritten

# Stages of one sweep over the tiles: what its loop reads, the loop, the values at its end, and what follows from them.
BEFORE, LOOP, END, AFTER = range(4)


@dataclass(frozen=True)
class _Pair:
    """A reduction in two steps: `body` under the inner one (without the fill of a ragged tile), everything inlined."""

    within: Einsum
    over: Einsum
    body: Expr
    valid: Expr

    @property
    def name(self) -> str:
        return self.over.out.tensor


@dataclass(frozen=True)
class _Running:
    """A reduction that runs in one sweep; `lost`: the condition of rows that end as NaN, as the model has them."""

    pair: _Pair
    carried: Carried
    lost: Expr = ex.FALSE


def repair(c: Cascade, family: Family) -> Rewritten | Refusal:
    """Carry every reduction over the tiles, and mend sums whose row scalars are still running.

    before   GM = max_m1 LGM; LSD[m1] = Σ_m0 exp(S − GM);  SD = Σ_m1 LSD
    after    RGM[m1+1] = max(RGM[m1], LGM[m1]);  RSD[m1+1] = RSD[m1]·exp(RGM[m1] − RGM[m1+1]) + Σ_m0 exp(S − RGM[m1+1])
    """
    if len(family) != 2:
        return Refusal("repair", "the rank is not cut into tiles")
    if any(r.iterative for r in c.ranks):
        return Refusal("repair", "the cascade carries state already")
    return _Repair(c, *family).rewritten()


class _Repair(Splitter):
    """Finds the sweep of every reduction; `ops` holds those that run in the present one."""

    def __init__(self, c: Cascade, outer: str, inner: str) -> None:
        self.c, self.outer, self.inner = c, outer, inner
        self.reading = Reading(c)
        self.pairs = {p.name: p for p in _pairs(c, self.reading, outer, inner)}
        self.scores = exposed(c, {n: p.body for n, p in self.pairs.items()}, inner)
        made, rows = products(c, inner), frozenset(self.pairs)
        length = size_term(c.rank[inner].size)
        super().__init__(SplitContext(inner, length, self.scores, made, rows, (), c.accumulate))
        self.stops: list[Stop] = []
        self.sweeps: list[list[_Running]] = []
        self.extra: list[_Running] = []
        # reductions that stand behind a tensor which no term can look into (a sum over another rank)
        self.behind: dict[str, frozenset[str]] = {}
        for e in c.einsums:
            found = (self.behind.get(n, frozenset()) | {n} & set(self.pairs) for n in (str(x.attr) for x in e.reads))
            self.behind[e.out.tensor] = frozenset().union(*found)

    def rewritten(self) -> Rewritten | Refusal:
        pending = list(self.pairs.values())
        while pending:
            for state in (self.ops, self.carried, self.memo):
                state.clear()
            sweep: list[_Running] = []
            for p in pending:
                left = {q.name for q in pending}
                names = {str(x.attr) for x in ex.loads(p.body)}
                hidden = frozenset[str]().union(*(self.behind.get(n, frozenset()) for n in names - set(self.pairs)))
                waits = names & left - set(self.ops) | hidden & left
                found = None if waits else self.running(p)
                if found is not None:
                    sweep.append(found)
                    self.ops[p.name] = str(p.over.op)
                    self.carried.append(found.carried)
                    self.bodies[p.name] = p.body
            new = [x for x in self.extra if x.pair.name not in self.pairs]
            self.pairs |= {x.pair.name: x.pair for x in new}
            self.sweeps.append([*new, *sweep])
            pending = [p for p in pending if p.name not in self.ops]
        if not any(r.carried.correction is not None for s in self.sweeps for r in s):
            law = self.stops[-1].law if self.stops else "no reduction uses a row scalar of the same sweep"
            return Refusal("repair", law)
        return _Loop(self).rewritten()

    def running(self, p: _Pair) -> _Running | None:
        """The reduction as it runs in the present sweep; None where it has to wait for final values."""
        op, name = str(p.over.op), p.name
        if not self.rows(p.body):
            return _Running(p, Carried(name, op, float(IDENTITY[op]), p.body))
        try:
            part = self.part(p.body, op)
            factor = self.correction(part.bounds, part.lift)
            for a in part.after:
                ratio = self.ratio(a.how, a.term)
                factor = ratio if factor is None else factor * ratio
            lost = self.lost(p, part.lift, tuple(b for b, _ in part.bounds))
        except Stop as stop:
            self.stops.append(stop)
            return None
        return _Running(p, Carried(name, op, 0.0, part.done(part.lift), factor), lost)

    def part(self, body: Expr, op: str) -> Summand:
        if op != "add":
            raise Stop(body, f"{op} of a term with a running row scalar has no correction")
        parts = self.split(body)
        if len(parts) != 1:
            raise Stop(body, f"a sum of {len(parts)} terms that scale apart: one accumulator holds one")
        return parts[0]

    def ratio(self, how: str, h: Expr) -> Expr:
        """h_new/h_old, or its inverse: FuseMax's Cascade 3. Nothing is lost only where h is never 0 once it has begun."""
        if how == "zero" or not self.strictly(h):
            raise Stop(h, "a factor that may be 0 loses what was summed under it")
        new, old = h, self.before(h)
        if how == "div":
            new, old = old, new
            return new / old
        return ex.where(ex.equal(old, 0.0), ex.const(0.0, h.dtype), new / old)

    def strictly(self, h: Expr) -> bool:
        """Is a row scalar more than 0 as soon as one key was seen?"""
        match h.op:
            case "const":
                return float(h.value) > 0
            case "cast":
                return self.strictly(h.args[0])
            case "add":
                return any(self.strictly(x) and self.nonnegative(y) for x, y in (h.args, h.args[::-1]))
            case "mul":
                return all(self.strictly(x) for x in h.args)
            case "load" if self.ops.get(str(h.attr)) == "add":
                return self.strictly(self.bodies[str(h.attr)])
        return facts(h.op).positive

    def lost(self, p: _Pair, lift: Expr, bounds: tuple[Bound, ...]) -> Expr:
        """Where the model's own sum is NaN because a bound is −∞, and the guarded one is 0.

        A mask on the exponentials themselves selects 0 for a row that it empties, whatever the bound is: then such rows
        are told apart by whether that mask kept a key.
        """
        if not bounds or not self.can_empty:
            return ex.FALSE
        low = {x: -math.inf for b in bounds for x in ex.loads(b.d) if x.is_float}
        rows = empty_rows([*self.scores, p.body], self.scores, self.inner, self.context.products, self.context.rows)
        ends = [self.sum_of({**k, **low}, p.body) for k in rows]
        # a sum that is neither 0 nor NaN is no row whose bound could be −∞
        rows = [k for k, end in zip(rows, ends) if end]
        nan = [end == "NaN" for end in ends if end]
        if not any(nan):
            return ex.FALSE
        empty: Expr = ex.FALSE
        for b in bounds:
            empty = empty | ex.equal(b.d, -math.inf)
        if all(nan):
            return empty
        keep = _outer_mask(lift)
        if keep is ex.FALSE or any(self.keeps({**k, **low}, keep) != {v} for k, v in zip(rows, nan)):
            raise Stop(p.body, "a row without a key ends in two ways: masked, and with scores of −∞")
        return empty & (self.kept_by(keep, p) > 0.0)

    def sum_of(self, known: dict[Expr, object], body: Expr) -> str:
        """What a term sums up to over a row of two keys, whatever is not known: "0", "NaN", or "" for all else."""
        rows = [number(body, {}, row) for row in tries((body,), known, spread=self.inner)]
        ends = {"NaN" if np.isnan(x).any() else "" if np.any(x) else "0" for x in rows}
        if len(ends) > 1:
            raise Stop(body, "how a row without a key ends depends on data")
        return ends.pop()

    def keeps(self, known: dict[Expr, object], keep: Expr) -> set[bool]:
        """Does a mask keep a key of the row? Every answer that it may have."""
        return {bool(np.any(number(keep, {}, row))) for row in tries((keep,), known, spread=self.inner)}

    def kept_by(self, keep: Expr, p: _Pair) -> Expr:
        """Carry whether a mask kept a key of the row."""
        at = tuple(ex.index(r.name) for r in self.c.ranks if r.name in keep.ranks - {self.outer, self.inner})
        dtype = self.c.accumulate
        body = ex.where(keep, ex.const(1.0, dtype), ex.const(0.0, dtype))
        for x in self.extra:
            if x.pair.body is body:
                return ex.load(x.pair.name, at, dtype)
        name = unused("KEPT", {*self.c.tensor, *(x.pair.name for x in self.extra)})
        local = Einsum(Access(f"L{name}", (*at, ex.index(self.outer))), body, "max", (self.inner,))
        whole = Einsum(Access(name, at), ex.load(f"L{name}", local.out.index, dtype), "max", (self.outer,))
        pair = _Pair(local, whole, body, p.valid)
        self.extra.append(_Running(pair, Carried(name, "max", -math.inf, body)))
        return ex.load(name, at, dtype)


def _outer_mask(lift: Expr) -> Expr:
    """The condition of the mask around a lift, or around a factor of it."""
    if lift.op == "where" and lift.args[2].is_const and lift.args[2].value == 0.0:
        return lift.args[0]
    if lift.op in ("mul", "cast", "neg", "div"):
        return next((k for k in map(_outer_mask, lift.args) if k is not ex.FALSE), ex.FALSE)
    return ex.FALSE


def _pairs(c: Cascade, reading: Reading, outer: str, inner: str) -> list[_Pair]:
    out = []
    for e in c.einsums:
        if e.over != (outer,) or e.body.op != "load":
            continue
        local = c.producers.get(str(e.body.attr), ())
        if len(local) == 1 and local[0].op == e.op and inner in local[0].over:
            body, valid = _unfilled(reading.inline(local[0].body), outer, inner)
            out.append(_Pair(local[0], e, body, valid))
    return out


def _unfilled(body: Expr, outer: str, inner: str) -> tuple[Expr, Expr]:
    """The body without the fill of a ragged tile, and the condition of that fill."""
    if body.op == "where" and body.args[0].op == "lt" and not ex.loads(body.args[0]):
        cond = body.args[0]
        if cond.args[0].ranks == {outer, inner} and not cond.args[1].ranks and body.args[2].is_const:
            return body.args[1], cond
    if body.op == "mul":
        for i, x in enumerate(body.args):
            inside, valid = _unfilled(x, outer, inner)
            if valid is not ex.TRUE:
                other = body.args[1 - i]
                return (inside * other if i == 0 else other * inside), valid
    return body, ex.TRUE


class _Loop:
    """Writes the sweeps: initial values, one Einsum each for what is shared, local sums, corrections, running values."""

    def __init__(self, r: _Repair) -> None:
        self.r, self.c = r, r.c
        self.tensors = dict(self.c.tensor)
        for x in r.extra:
            self.declare_row(x)
        self.rows: list[tuple[int, int, int, Einsum]] = []
        self.step = ex.index(r.outer)
        self.tiles = self.c.rank[r.outer].size
        self.sweep = {x.pair.name: k for k, s in enumerate(r.sweeps, 1) for x in s}
        self.place = {e.out.tensor: i for i, e in enumerate(self.c.einsums)}
        self.running = {n: unused(f"R{n}", self.tensors) for n in self.sweep}
        # keyed tensors whose terms read row scalars hold final values: a sweep never reads them
        self.final = frozenset(self.sweep)

    def rewritten(self) -> Rewritten:
        r = self.r
        for k, sweep in enumerate(r.sweeps, 1):
            self.write(k, sweep)
        self.others()
        einsums = [e for *_, e in sorted(self.rows, key=lambda row: row[:3])]
        ranks = tuple(replace(x, iterative=True) if x.name == r.outer else x for x in self.c.ranks)
        family = (r.outer, r.inner)
        mended = [x for s in r.sweeps for x in s if x.carried.correction is not None]
        conditions = tuple(f"{x.pair.name} is mended by {x.carried.correction}" for x in mended)
        if r.can_empty:
            conditions += ("a running bound of −∞ is guarded: exp(−∞ − (−∞)) would be NaN in a tile without a key",)
        made = rebuilt(replace(self.c, ranks=ranks), einsums, self.tensors)
        return Rewritten("repair", made, family, conditions)

    def add(self, sweep: int, stage: int, e: Einsum) -> None:
        self.rows.append((sweep, stage, len(self.rows), e))

    def declare(self, name: str, at: tuple[Expr, ...], tiles: int, dtype: str) -> str:
        """A tensor over these ranks, one element a tile, or one more: the initial value."""
        shape = (*(self.c.rank[str(i.attr)].size for i in at), self.tiles + tiles)
        name = unused(name, self.tensors)
        self.tensors[name] = Tensor(name, shape, dtype)
        return name

    def declare_row(self, x: _Running) -> None:
        over, local = x.pair.over.out, x.pair.within.out.tensor
        shape = tuple(self.c.rank[str(i.attr)].size for i in over.index)
        tiles = self.c.rank[self.r.outer].size
        self.tensors[over.tensor] = Tensor(over.tensor, shape, self.c.accumulate)
        self.tensors[local] = Tensor(local, (*shape, tiles), self.c.accumulate)

    def now(self, root: Expr) -> Expr:
        """Row scalars of a term as they run: new values at m1 + 1, values before this tile at m1."""

        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            name = str(e.attr)
            old = name.startswith(OLD)
            if e.op != "load" or name.removeprefix(OLD) not in self.here:
                return None
            at = self.step if old else self.step + 1
            return ex.load(self.running[name.removeprefix(OLD)], (*args, at), e.dtype)

        return ex.rebuild(root, rule)

    def write(self, k: int, sweep: list[_Running]) -> None:
        self.here = {x.pair.name for x in sweep}
        self.shared: dict[Expr, Expr] = {}
        self.factors: dict[Expr, Expr] = {}
        for x in sweep:
            self.begin(k, x)
        lifts = [self.r.reading.refold(x.carried.lift, self.final) for x in sweep]
        for i, x in enumerate(sweep):
            self.share(k, lifts[i], lifts[i + 1 :])
            self.turn(k, x, ex.substitute(lifts[i], self.shared))
            self.end(k, x)

    def begin(self, k: int, x: _Running) -> None:
        over = x.pair.over
        shape = (*(self.c.rank[str(i.attr)].size for i in over.out.index), self.tiles + 1)
        dtype = self.tensors[over.out.tensor].dtype
        name = self.running[x.pair.name]
        self.tensors[name] = Tensor(name, shape, dtype)
        start = ex.const(IDENTITY[str(over.op)], dtype)
        self.add(k, BEFORE, Einsum(Access(name, (*over.out.index, ex.const(0))), start))

    def share(self, k: int, root: Expr, later: list[Expr]) -> None:
        """A tensor for each of the largest terms over rows and keys, with a transcendental function, that recur."""
        others = [set(ex.walk(t)) for t in later]

        def go(e: Expr) -> None:
            if e in self.shared or self.r.inner not in e.ranks or e.op == "load":
                return
            if any(e in o for o in others) and any(t.op in ex.FLOAT_UNARY for t in ex.walk(e)):
                own = tuple(ex.index(r.name) for r in self.c.ranks if r.name in e.ranks - {self.r.outer, self.r.inner})
                name = unused("SL", self.tensors)
                shape = (*(self.c.rank[str(i.attr)].size for i in own), self.tiles, self.c.rank[self.r.inner].size)
                self.tensors[name] = Tensor(name, shape, e.dtype)
                at = (*own, self.step, ex.index(self.r.inner))
                self.add(k, LOOP, Einsum(Access(name, at), self.now(e)))
                self.shared[e] = ex.load(name, at, e.dtype)
                return
            for a in e.args:
                go(a)

        go(root)

    def turn(self, k: int, x: _Running, lift: Expr) -> None:
        """LX[m1] = ⊕_m0 lift;  RX[m1+1] = RX[m1]·correction ⊕ LX[m1]"""
        within, over, op = x.pair.within, x.pair.over, str(x.pair.over.op)
        lift = self.now(lift)
        body = ex.where(x.pair.valid, lift, ex.const(IDENTITY[op], lift.dtype))
        if op == "add" and lift.op == "mul":
            left, right = lift.args
            side = left if self.r.inner in left.ranks else right
            full = ex.where(x.pair.valid, side, ex.const(0.0, side.dtype))
            body = full * right if side is left else left * full
        local = within.out.tensor
        self.add(k, LOOP, replace(within, body=body))
        name, dtype = self.running[x.pair.name], self.tensors[over.out.tensor].dtype
        old = ex.load(name, (*over.out.index, self.step), dtype)
        if x.carried.correction is not None:
            old = old * self.factor(k, x.carried.correction)
        new = ex.binary(op, old, ex.load(local, within.out.index, dtype))
        self.add(k, LOOP, Einsum(Access(name, (*over.out.index, self.step + 1)), new))

    def factor(self, k: int, correction: Expr) -> Expr:
        if correction not in self.factors:
            own = tuple(ex.index(r.name) for r in self.c.ranks if r.name in correction.ranks - {self.r.outer})
            name = self.declare("PR", own, 0, correction.dtype)
            self.add(k, LOOP, Einsum(Access(name, (*own, self.step)), self.now(correction)))
            self.factors[correction] = ex.load(name, (*own, self.step), correction.dtype)
        return self.factors[correction]

    def end(self, k: int, x: _Running) -> None:
        over = x.pair.over
        dtype = self.tensors[over.out.tensor].dtype
        last = ex.load(self.running[x.pair.name], (*over.out.index, size_term(self.tiles)), dtype)
        last = ex.where(x.lost, ex.const(math.nan, dtype), last)
        self.add(k, END, Einsum(over.out, last))

    def others(self) -> None:
        """Every other Einsum, before the loop of the first sweep that comes after all that it reads."""
        done = {p.within.out.tensor for p in self.r.pairs.values()} | set(self.sweep)
        when: dict[str, tuple[int, int]] = {n: (k, END) for n, k in self.sweep.items()}
        for p in self.r.pairs.values():
            when[p.within.out.tensor] = (self.sweep[p.name], LOOP)
        for e in self.c.einsums:
            if e.out.tensor in done:
                continue
            latest = max((when.get(str(x.attr), (0, BEFORE)) for x in e.reads), default=(0, BEFORE))
            keyed = self.r.outer in e.ranks
            if keyed and latest[1] != BEFORE:
                latest = (latest[0] + 1, BEFORE)
            elif keyed:
                latest = max(latest, (1, BEFORE))
            elif latest[1] != BEFORE:
                latest = (latest[0], AFTER)
            when[e.out.tensor] = latest
            self.add(*latest, e)
