"""Cuts: one device's part of a cascade, as a cascade; and the merge of what the parts of a row hold.

    cut      O[h,p,f], h on 4 devices            →   O[h,p,f], h < H/4, every coordinate h read as 2·H/4 + h
    pieces   R = ⊕_m g(S);  N = Σ_m w·V          →   the row's state over this device's keys: R, N, not yet finished
    merge    the states of all devices [w, …]    →   the output, by the terms of the row state (see `rowstate`)

A device reads inputs at global coordinates, so that the part of a tensor that it needs is the footprint of its own
cascade: 2 heads that share a key head need one key head, whatever the group. What it computes it stores locally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.carried import OLD, RowState
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ..expr import Expr
from ..terms.intervals import spans

# Prefix of a state tensor that holds the parts of all devices, and the rank over devices.
PART = "part:"
DEVICE = "w"


class CutError(ValueError):
    """A rank that cannot be cut as asked; the message says why."""


@dataclass(frozen=True)
class Cut:
    """Part `part` of a rank in `parts`.

    `block` coordinates at a time are dealt to the devices in turn (None: one block each, the rank is contiguous; 1:
    interleaved). `zigzag`: 2·parts blocks, device d holds blocks d and 2·parts − 1 − d, so that causal rows are even.
    """

    rank: str
    parts: int
    part: int = 0
    block: int | None = None
    zigzag: bool = False

    def width(self, n: int) -> int:
        """Coordinates in one block."""
        if self.zigzag:
            return n // (2 * self.parts)
        return self.block or math.ceil(n / self.parts)

    def size(self, n: int) -> int:
        """How many of n coordinates this part holds. Raises CutError where a zigzag has no equal blocks."""
        if self.zigzag:
            if n % (2 * self.parts):
                raise CutError(f"{n} coordinates of {self.rank} do not divide into {2 * self.parts} zigzag blocks")
            return n // self.parts
        k = self.width(n)
        rounds, rest = divmod(n, k * self.parts)
        return rounds * k + min(max(rest - self.part * k, 0), k)

    def position(self, n: int) -> Expr:
        """The global coordinate of local coordinate `rank`."""
        i, k = ex.index(self.rank), self.width(n)
        if self.parts == 1:
            return i
        if self.zigzag:
            return ex.where(i < k, i + self.part * k, i + (2 * self.parts - 2 - self.part) * k)
        if k * self.parts >= n:
            return i + self.part * k
        if k == 1:
            return i * self.parts + self.part
        return (i // k) * (k * self.parts) + (i % k + self.part * k)


def cut(c: Cascade, cuts: Sequence[Cut]) -> Cascade:
    """One device's part of a cascade with integer sizes. Raises CutError where a rank cannot be cut.

        before                     S[h,p,m] = where(m ≤ p, …K[h // 4,m,e]…)
        after (m in 2, part 1)     S[h,p,m] = where(m + M/2 ≤ p, …K[h // 4,m + M/2,e]…)

    Inputs keep their shape and are read where the device's coordinates lie; every other tensor shrinks to the part.
    """
    by = {k.rank: k for k in cuts if k.parts > 1}
    whole = {r.name: _integer(r.size, r.name) for r in c.ranks}
    here = {n: by[n].size(s) if n in by else s for n, s in whole.items()}
    place = {ex.index(r): k.position(whole[r]) for r, k in by.items() if r in whole}
    stored = {t: _stored(es, set(by)) for t, es in c.producers.items()}

    def moved(root: Expr) -> Expr:
        new: dict[Expr, Expr] = {}
        for e in ex.walk(root):
            new[e] = _moved(e, tuple(new[a] for a in e.args), place, stored, here)
        return new[root]

    def shape(t: Tensor) -> Tensor:
        if t.name not in stored:
            return t
        return replace(t, shape=tuple(here[r] if r else s for r, s in zip(stored[t.name], t.shape)))

    return verify(
        replace(
            c,
            ranks=tuple(replace(r, size=here[r.name]) for r in c.ranks),
            tensors=tuple(shape(t) for t in c.tensors),
            einsums=tuple(replace(e, body=moved(e.body)) for e in c.einsums),
        )
    )


def _integer(size: Size, rank: str) -> int:
    if not isinstance(size, int):
        raise CutError(f"rank {rank} has no value for its size {size}: give sizes to cut it")
    return size


def _stored(writers: tuple[Einsum, ...], cut_ranks: set[str]) -> tuple[str, ...]:
    """For each dimension of a produced tensor: the cut rank that it is stored over, or ""."""
    out = writers[-1].out
    found = []
    for i in out.index:
        if i.ranks & cut_ranks and i.op != "index":
            raise CutError(f"{out} carries state along {i}: its rank is not cut like others")
        found.append(str(i.attr) if i.op == "index" and str(i.attr) in cut_ranks else "")
    return tuple(found)


def _moved(
    e: Expr, args: tuple[Expr, ...], place: dict[Expr, Expr], stored: dict[str, tuple[str, ...]], here: dict[str, int]
) -> Expr:
    if e.op == "index":
        return place.get(e, e)
    if e.op == "load" and str(e.attr) in stored:
        dims = stored[str(e.attr)]
        for rank, at in zip(dims, e.args):
            if rank and at is not ex.index(rank):
                raise CutError(f"{e} is read at {at}, which lies on another device when {rank} is cut")
        return ex.load(str(e.attr), tuple(old if r else new for r, old, new in zip(dims, e.args, args)), e.dtype)
    out = e if args == e.args else ex.make(e.op, args, e.attr, e.dtype)
    return _folded(out, here) if out.op == "floordiv" else out


def _folded(e: Expr, here: dict[str, int]) -> Expr:
    """A quotient that is one number on this device: h // 4 for the two heads it holds."""
    if ex.loads(e) or ex.symbols(e) or any(here[r] == 0 for r in e.ranks):
        return e
    lo, hi = spans(e, {r: (np.asarray(0), np.asarray(here[r] - 1)) for r in e.ranks})
    return ex.const(int(lo)) if int(lo) == int(hi) else e


# --- row states ---------------------------------------------------------------------------------------------------


def pieces(a: Attention, state: RowState) -> Cascade:
    """The state of every row over the keys of `a.cascade`: each carried scalar, then the unfinished product."""
    c = a.cascade
    at = a.contraction.out
    loads = {s.name: _state_load(s.name, state) for s in state.carried}
    einsums = [*a.prelude, *a.products]
    einsums += [Einsum(Access(s.name, loads[s.name].args), s.lift, s.op, (a.key,)) for s in state.carried]
    einsums.append(Einsum(at, state.weight * a.values, "add", (a.key,)))
    declared = {t.name: t for t in c.tensors} | {n: _tensor(c, x) for n, x in loads.items()}
    return _gathered(c, f"{c.name}: state of a part", einsums, declared, (*loads, at.tensor))


def merge(a: Attention, state: RowState, parts: int) -> Cascade:
    """The output from the states of all parts: inputs `part:NAME[w, …]`, the rank `w` over devices.

        R = ⊕_w R_w;   L = Σ_w L_w·c(old := R_w, new := R);   O = finish(Σ_w N_w·c, R, L)
    """
    c = a.cascade
    total = a.contraction.out
    loads = {s.name: _state_load(s.name, state) for s in state.carried}
    declared = {n: _tensor(c, x) for n, x in loads.items()}
    declared[total.tensor] = c.tensor[total.tensor]
    dtype = {n: t.dtype for n, t in declared.items()}

    def part(name: str, at: tuple[Expr, ...]) -> Expr:
        return ex.load(PART + name, (ex.index(DEVICE), *at), dtype[name])

    def merged(name: str, at: tuple[Expr, ...], op: str, correction: Expr | None) -> Einsum:
        body = part(name, at)
        if correction is not None:
            old = {
                x: part(str(x.attr).removeprefix(OLD), x.args)
                for x in ex.loads(correction) if str(x.attr).startswith(OLD)
            }
            body = body * ex.substitute(correction, old)
        return Einsum(Access(name, at), body, op, (DEVICE,))

    einsums = [merged(s.name, loads[s.name].args, s.op, s.correction) for s in state.carried]
    einsums.append(merged(total.tensor, total.index, "add", state.correction))
    (name,) = c.outputs
    if name != total.tensor:
        einsums.append(Einsum(c.producers[name][-1].out, state.finish))
    elif state.finish.op != "load":
        # the product is the output itself: its sum over devices needs a name of its own
        table = {ex.load(name, total.index, dtype[name]): ex.load(f"{name}:sum", total.index, dtype[name])}
        einsums[-1] = replace(einsums[-1], out=Access(f"{name}:sum", total.index))
        declared[f"{name}:sum"] = replace(declared[name], name=f"{name}:sum")
        einsums.append(Einsum(total, ex.substitute(state.finish, table)))
    inputs = {PART + n: Tensor(PART + n, (parts, *declared[n].shape), dtype[n]) for n in (*loads, total.tensor)}
    everything = {t.name: t for t in c.tensors} | declared | inputs
    whole = replace(c, ranks=(*c.ranks, Rank(DEVICE, parts)))
    return _gathered(whole, f"{c.name}: merge of {parts} parts", einsums, everything, c.outputs)


def _state_load(name: str, state: RowState) -> Expr:
    """A load of a carried scalar, wherever one stands: its coordinates and its type."""
    terms = [*(t for k in state.carried for t in (k.lift, k.correction)), state.weight, state.finish]
    return next(x for t in terms if t is not None for x in ex.loads(t) if str(x.attr) == name)


def _tensor(c: Cascade, load: Expr) -> Tensor:
    return Tensor(str(load.attr), tuple(c.rank[str(i.attr)].size for i in load.args), load.dtype)


def _gathered(
    c: Cascade, name: str, einsums: Sequence[Einsum], tensors: dict[str, Tensor], outputs: tuple[str, ...]
) -> Cascade:
    used = frozenset().union(*(e.ranks | set(e.over) for e in einsums))
    names = {str(x.attr) for e in einsums for x in e.reads} | {e.out.tensor for e in einsums}
    kept = tuple(t for t in tensors.values() if t.name in names)
    return verify(
        Cascade(name, tuple(r for r in c.ranks if r.name in used), kept, tuple(einsums), outputs, c.accumulate)
    )
