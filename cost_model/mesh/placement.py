"""Placement: what each device holds, computes and sends, derived from a cascade and an assignment of ranks to mesh axes.

    an Einsum walks 1/P of a rank that an axis of P devices carries; per axis a tensor is then
        cut      along the dimension that this rank indexes        (h // G: the part that these heads read)
        partial  where the rank was reduced: a sum, a maximum, or the state of a row
        whole    otherwise
    read cut where it is cut         nothing                read whole where it is cut        all-gather, or ring steps
    read cut where it is whole       nothing                read cut another way              all-to-all
    read whole where it is partial   all-reduce             read cut where it is partial      reduce-scatter
    a product with a partial sum is a partial sum: the exchange waits until something is not linear in it

The attention inside is one unit: its maximum, sum and product over a cut key rank do not travel one by one. They are the
row state (see `patterns.rowstate`), and its merge makes one exchange of it. A rank with carried state (linear attention
in chunks) sends the state of one coordinate, once, where the step is a sum or a scaled sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.attention.rowstate import RowState, derive, stream
from ...patterns.cascade import Cascade, Einsum, Size
from ...patterns.expr import Expr
from ...patterns.masks.split import split
from ...patterns.passes.cut import Cut, CutError, cut
from ...patterns.verdict import Obstacle
from ..count.tiles import NOTHING, Data, jobs, tile_map
from ..count.work import footprint
from ..operations import INDEX, MASKING, WIDTH, Work, contraction, factors, operations, plus, scaled, size_int
from .collectives import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, RING, Collective
from .core import Refused, Roles, core, divided

# Tiles over which a mask's share is counted.
TILE = 128


@dataclass(frozen=True)
class Assignment:
    """Rank → axis, the first that fits an Einsum or a tensor wins: `inside` the attention, `outside` of it and at rest.

    `order` deals the sequence out: contiguous, zigzag or interleaved. `ring`: operands that are gathered along the key
    rank travel in steps, each computed on as it comes.
    """

    inside: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, str], ...]
    order: str = "contiguous"
    ring: bool = False

    def __str__(self) -> str:
        within = "" if self.inside == self.outside else f"; inside the attention {_spelled(self.inside)}"
        return _spelled(self.outside) + within + ("" if self.order == "contiguous" else f", {self.order}")


@dataclass(frozen=True)
class Placed:
    """One device's part of one attention: bytes by tensor at rest, operations, bytes of memory traffic, exchanges.

    `cache` are the tensors kept for later queries, each number on `copies` devices. `weights` are those that all tokens
    share, of `whole_weights` bytes; `split` devices share any other weight of the layer. Where the devices' parts differ,
    this is the one with most to do; `even` is its work over the mean.
    """

    cache: Mapping[str, int]
    inputs: Mapping[str, int]
    output: int
    weights: Mapping[str, int]
    whole_weights: int
    split: int
    work: Work
    backward: Work
    traffic: int
    exchanges: tuple[Collective, ...]
    even: float
    copies: float

    @property
    def cache_bytes(self) -> int:
        return sum(self.cache.values())

    @property
    def flops(self) -> int:
        return size_int(self.work.flops)


# --- derivation -----------------------------------------------------------------------------------------------------


def place(c: Cascade, who: Roles, how: Assignment, parts: Mapping[str, int], data: Data = NOTHING) -> Placed:
    """One device's part of a cascade with integer sizes, under an assignment to axes of these sizes.

    `data` is what is known or expected of tensors that the mask reads.

    Raises Refused where a rank does not divide, a row state does not merge, or carried state does not combine.
    """
    return _Placement(c, who, how, parts, data).result()


@dataclass(frozen=True)
class _Held:
    """How a tensor lies along one axis: cut along `dim`, `partial` by an operator ("state" for rows), else whole."""

    dim: int | None = None
    partial: str = ""


class _Placement:
    def __init__(self, c: Cascade, who: Roles, how: Assignment, parts: Mapping[str, int], data: Data) -> None:
        self.c, self.who, self.how, self.data = c, who, how, data
        self.parts = {a: n for a, n in parts.items() if n > 1}
        self.whole = {r.name: size_int(r.size) for r in c.ranks}
        self.shape = {t.name: tuple(size_int(s) for s in t.shape) for t in c.tensors}
        self.core = core(c, who.key)
        self.state = derive(self.core.view) if self.core is not None else None
        self.have: dict[str, dict[str, set[_Held]]] = {}
        self.sent: dict[tuple[str, str, str], Collective] = {}
        # exchanges before the attention's output and after it are messages of their own
        self.after = False
        self.regions: dict[str, list[Expr]] = {}
        for x in dict.fromkeys(x for e in c.einsums for x in e.reads):
            self.regions.setdefault(self.region(x), []).append(x)
        self.refuse()

    # what an axis cuts

    def pairs(self, i: int) -> tuple[tuple[str, str], ...]:
        inside = self.core is not None and i in self.core.products | self.core.unit
        return self.how.inside if inside else self.how.outside

    def cuts(self, ranks: Iterable[str], pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
        """axis → rank: for each axis the first rank of the preference that is there."""
        out: dict[str, str] = {}
        there = set(ranks)
        for rank, axis in pairs:
            if rank in there and axis in self.parts:
                out.setdefault(axis, rank)
        return out

    def of(self, i: int) -> dict[str, str]:
        e = self.c.einsums[i]
        return self.cuts(e.ranks | set(e.over), self.pairs(i))

    def extent(self, cuts: Mapping[str, str]) -> dict[str, int]:
        out = dict(self.whole)
        for axis, rank in cuts.items():
            out[rank] = math.ceil(out[rank] / self.parts[axis])
        return out

    def refuse(self) -> None:
        carried: dict[str, int] = {}
        for rank, axis in dict.fromkeys((*self.how.inside, *self.how.outside)):
            carried[rank] = carried.get(rank, 1) * self.parts.get(axis, 1)
        for rank, parts in carried.items():
            size = self.whole.get(rank, 0)
            if rank in (self.who.tokens, self.who.key) and size >= parts:
                continue
            if size % parts:
                raise Refused(f"{_plural(size, self.word(rank))} {_do(size)} not divide over {parts} devices")
        key = [r for r, a in self.how.inside if r == self.who.key and a in self.parts]
        if key and self.core is not None and isinstance(self.state, Obstacle):
            raise Refused(f"the parts of a row do not merge: {self.state}")

    def word(self, rank: str) -> str:
        words = {self.who.heads: "query head", self.who.tokens: "query token", self.who.key: "key"}
        return words.get(rank, "sequence" if rank in self.who.batch else f"coordinate of rank {rank}")

    # bytes

    def bytes_of(self, load: Expr, cuts: Mapping[str, str]) -> int:
        """The bytes that one load touches on the device that touches most."""
        name, here = str(load.attr), self.extent(cuts)
        most = 0
        for shift in self.shifts(load, cuts):
            moved = ex.substitute(load, shift)
            most = max(most, size_int(footprint(moved, self.shape[name], here)))
        return most * WIDTH[self.c.tensor[name].dtype]

    def shifts(self, load: Expr, cuts: Mapping[str, str]) -> list[dict[Expr, Expr]]:
        """Where the devices of a rank stand whose coordinates are divided: two heads may straddle two key heads."""
        out: list[dict[Expr, Expr]] = [{}]
        for axis, rank in cuts.items():
            if divided(load, rank):
                n = math.ceil(self.whole[rank] / self.parts[axis])
                steps = range(min(self.parts[axis], self.whole[rank] // n))
                out = [{**s, ex.index(rank): ex.index(rank) + d * n} for s in out for d in steps]
        return out

    def static(self, name: str) -> bool:
        """A weight: an input that no token and no sequence indexes. Every device keeps the part that it needs."""
        own = {self.who.tokens, self.who.key, *self.who.batch}
        read = [x for e in self.c.einsums for x in e.reads if str(x.attr) == name]
        return name not in self.c.producers and not any(own & x.ranks for x in read)

    # the walk

    def result(self) -> Placed:
        for i, e in enumerate(self.c.einsums):
            cuts = self.of(i)
            for x in e.reads:
                if not self.static(str(x.attr)):
                    self.at_rest(x)
                    self.read(i, e, x, cuts)
            self.write(i, e, cuts)
            self.after |= self.core is not None and e.out.tensor == self.core.output
        self.carried()
        for name in self.c.outputs:
            self.leave(name)
        return self.summed()

    def region(self, x: Expr) -> str:
        """The part of a tensor that a load reads: Q, K and V stacked in one tensor are three."""
        name = str(x.attr)
        kinds = {_fixed(y) for e in self.c.einsums for y in e.reads if y.attr == name}
        return name if len(kinds) == 1 else f"{name}[{','.join(_fixed(x))}]"

    def loads(self, region: str) -> list[Expr]:
        return self.regions.get(region, [])

    def rest(self, load: Expr) -> dict[str, str]:
        return self.cuts(load.ranks, self.how.outside)

    def at_rest(self, x: Expr) -> None:
        """An input as it lies before anything runs: cut as its first reader has it outside."""
        region = self.region(x)
        if region in self.have or str(x.attr) in self.c.producers:
            return
        load = self.loads(region)[0]
        rest = self.rest(load)
        self.have[region] = {
            axis: {_Held(next(d for d, t in enumerate(load.args) if rank in t.ranks))} for axis, rank in rest.items()
        }

    def internal(self, i: int, name: str) -> bool:
        """A tensor between the products and the output of the attention: its parts stay where they are."""
        if self.core is None or i not in self.core.unit:
            return False
        return any(self.c.einsums[j].out.tensor == name for j in self.core.unit)

    def read(self, i: int, e: Einsum, x: Expr, cuts: Mapping[str, str]) -> None:
        name = self.region(x)
        if self.internal(i, str(x.attr)):
            return
        for axis in self.parts:
            held = self.have.get(name, {}).get(axis, {_Held()})
            rank = cuts.get(axis, "")
            dim = next((d for d, t in enumerate(x.args) if rank and rank in t.ranks), None)
            if _Held() in held or (dim is not None and _Held(dim) in held):
                continue
            if all(h.partial for h in held):
                if not rank and any(h.partial == "add" for h in held) and _linear(e, x):
                    continue
                self.combine(name, axis, dim, next(iter(held)))
            else:
                self.move(name, x, axis, dim, next(h for h in held if h.dim is not None))
            self.have.setdefault(name, {})[axis] = held | {_Held(dim)}

    def write(self, i: int, e: Einsum, cuts: Mapping[str, str]) -> None:
        state = self.have.setdefault(e.out.tensor, {})
        for axis in self.parts:
            rank = cuts.get(axis, "")
            dim = next((d for d, t in enumerate(e.out.index) if rank and rank in t.ranks), None)
            row = self.core is not None and i in self.core.unit
            if row and self.core is not None and e.out.tensor == self.core.output:
                # the unit ends here, whichever of its Einsums reduced the key
                keyed = self.how.inside and self.cuts({self.who.key}, self.how.inside).get(axis) == self.who.key
                state[axis] = {_Held(partial="state")} if keyed else {_Held(dim)}
            elif rank and dim is None:
                state[axis] = {_Held(partial=e.op or "")}
            elif dim is None and not rank and self.passed(e, axis):
                state[axis] = {_Held(partial="add")}
            else:
                state[axis] = {_Held(dim)}

    def passed(self, e: Einsum, axis: str) -> bool:
        """Is some operand a partial sum that this Einsum is linear in, and that nobody has combined?"""
        for x in e.reads:
            held = self.have.get(str(x.attr), {}).get(axis, set())
            if held == {_Held(partial="add")} and _linear(e, x):
                return True
        return False

    # exchanges

    def combine(self, name: str, axis: str, dim: int | None, held: _Held) -> None:
        kind = ALL_REDUCE if dim is None else ALL_TO_ALL if held.partial == "state" else REDUCE_SCATTER
        n = self.state_bytes(axis) if held.partial == "state" else self.produced_bytes(name)
        what = {"state": f"the row state of {name}, merged", "add": f"partial sums of {name}"}
        self.add(kind, axis, n, name, what.get(held.partial, f"partial {held.partial} of {name}"))

    def move(self, name: str, x: Expr, axis: str, dim: int | None, held: _Held) -> None:
        n = self.held_bytes(name)
        if dim is not None:
            size, parts = self.shape[str(x.attr)][dim], self.parts[axis]
            # a sequence may be ragged
            if size % parts and not {self.who.tokens, self.who.key} & x.args[dim].ranks:
                what = "key head" if divided(x, self.who.heads) else "head"
                sizes = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                count = f"{_plural(size, what)} of {name} {_do(size)}"
                raise Refused(f"{count} not divide over {parts} devices: an all-to-all takes {sizes}")
            there = self.along(name, _Held(dim))
            self.add(ALL_TO_ALL, axis, n, name, f"{name} from its {self.along(name, held)} to its {there}")
            return
        ring = self.how.ring and self.who.key in x.ranks
        self.add(RING if ring else ALL_GATHER, axis, n, name, f"{name}, cut along its {self.along(name, held)}")

    def along(self, name: str, held: _Held) -> str:
        """The word for the rank that a dimension is indexed by."""
        read = self.loads(name)
        at = read[0].args if read else self.c.producers[name][-1].out.index
        ranks = at[held.dim].ranks if held.dim is not None else frozenset()
        words = {self.who.heads: "heads", self.who.tokens: "tokens", self.who.key: "keys"}
        return next((words.get(r, r) for r in sorted(ranks)), "batch")

    def add(self, kind: str, axis: str, payload: int, name: str, what: str) -> None:
        self.sent.setdefault((name, axis, kind), Collective(kind, axis, payload, what, self.after))

    def held_bytes(self, name: str) -> int:
        """A device's part of a region as it lies: of an input at rest, or as it was made."""
        tensor = name.split("[")[0]
        if tensor in self.c.producers:
            return self.produced_bytes(tensor)
        return max(self.bytes_of(x, self.rest(x)) for x in self.loads(name))

    def produced_bytes(self, name: str) -> int:
        i = max(j for j, e in enumerate(self.c.einsums) if e.out.tensor == name)
        out, here = self.c.einsums[i].out, self.extent(self.of(i))
        n = 1
        for t in out.index:
            n *= here[str(t.attr)] if t.op == "index" else 1
        return n * WIDTH[self.c.tensor[name].dtype]

    def state_bytes(self, axis: str) -> int:
        """The state of a device's rows: the product in its own type, each carried scalar in the accumulator's.

        A bound and a sum that it repairs are one number (their logarithm of the sum): a row without its bound is scaled.
        """
        assert self.core is not None
        assert isinstance(self.state, RowState)
        name = self.core.output
        whole = self.produced_bytes(name)
        i = max(j for j, e in enumerate(self.c.einsums) if e.out.tensor == name)
        value = self.value_size(self.extent(self.of(i)))
        rows = whole // (WIDTH[self.c.tensor[name].dtype] * value)
        return whole + rows * scalars(self.state) * WIDTH[self.c.accumulate]

    def value_size(self, here: Mapping[str, int]) -> int:
        assert self.core is not None
        return here[self.core.view.value]

    def carried(self) -> None:
        """Carried state along a cut iterative rank: each device needs the states before its own, once."""
        for i, e in enumerate(self.c.einsums):
            for axis, rank in self.of(i).items():
                if not self.c.rank[rank].iterative or not any(t.op == "add" and rank in t.ranks for t in e.out.index):
                    continue
                old = next((x for x in e.reads if x.attr == e.out.tensor), None)
                if e.op is not None or old is None or not _combines(e.body, old):
                    raise Refused(f"the step of {e.out.tensor} is no sum and no scaled sum: devices would wait in turn")
                n = self.produced_bytes(e.out.tensor)
                what = f"the state {e.out.tensor}: each device sums those before its own"
                self.add(ALL_GATHER, axis, n, e.out.tensor, what)

    def leave(self, name: str) -> None:
        """The output goes on as the outside has it: whole, or cut along its own ranks."""
        out = self.c.producers[name][-1].out
        cuts = self.cuts(frozenset().union(*(t.ranks for t in out.index)), self.how.outside)
        for axis in self.parts:
            held = self.have[name].get(axis, {_Held()})
            rank = cuts.get(axis, "")
            dim = next((d for d, t in enumerate(out.index) if rank and rank in t.ranks), None)
            if _Held() in held or _Held(dim) in held:
                continue
            one = next(iter(held))
            if one.partial:
                self.combine(name, axis, dim, one)
            elif dim is not None:
                self.move(name, ex.load(name, out.index, self.c.tensor[name].dtype), axis, dim, one)

    # sums

    def summed(self) -> Placed:
        c = self.c
        inputs = [r for r, xs in self.regions.items() if str(xs[0].attr) not in c.producers]
        shared = [r for r in inputs if self.static(str(self.regions[r][0].attr))]
        rest = {r: self.held_bytes(r) for r in inputs if r not in shared}
        keyed = {r for r in rest if self.kept(r)}
        weights = {r: self.needed(r) for r in shared}
        cached = sum(self.entire(n) for n in keyed)
        copies = sum(rest[n] for n in keyed) * math.prod(self.parts.values()) / cached if cached else 1.0
        traffic = sum(self.needed(n) for n in inputs)
        traffic += sum(self.between(t) for t in c.producers) + sum(self.produced_bytes(n) for n in c.outputs)
        most, even = self.share()
        forward, backward = self.operations(most)
        return Placed(
            {n: b for n, b in rest.items() if n in keyed}, {n: b for n, b in rest.items() if n not in keyed},
            sum(self.produced_bytes(n) for n in c.outputs), weights, sum(self.entire(n) for n in weights), self.split(),
            forward, backward, traffic, tuple(self.sent.values()), even, copies,
        )

    def entire(self, region: str) -> int:
        return max(self.bytes_of(x, {}) for x in self.regions[region])

    def split(self) -> int:
        """Devices between which weights are divided: those of axes that carry more than sequences and their tokens."""
        flowing = {self.who.tokens, self.who.key, *self.who.batch}
        axes = {a for r, a in self.how.outside if r not in flowing}
        return math.prod(n for a, n in self.parts.items() if a in axes)

    def kept(self, region: str) -> bool:
        """A cache: what keys index and queries do not, and what is multiplied: a mask or a bias is made anew."""
        keyed = [x for x in self.loads(region) if self.who.key in x.ranks and self.who.tokens not in x.ranks]
        unit = self.core.unit if self.core is not None else frozenset()
        return any(
            i not in unit or any(x in ex.walk(f) for f in contraction(e) or ())
            for i, e in enumerate(self.c.einsums) for x in e.reads if x in keyed
        )

    def needed(self, name: str) -> int:
        """Bytes of a region of an input that one device reads, once."""
        read = self.regions[name]
        return max(self.bytes_of(x, self.of(i)) for i, e in enumerate(self.c.einsums) for x in e.reads if x in read)

    def between(self, name: str) -> int:
        """Bytes of an intermediate tensor outside the attention, written and read; the attention's own stay on chip."""
        ours = self.core.products | self.core.unit if self.core is not None else frozenset()
        made = [j for j, e in enumerate(self.c.einsums) if e.out.tensor == name]
        on_chip = all(j in ours for j in made) and (self.core is None or name != self.core.output)
        return 0 if on_chip or name in self.c.outputs else 2 * self.produced_bytes(name)

    def operations(self, most: float) -> tuple[Work, Work]:
        """Operations forward and backward; pairs that the mask leaves out are not counted, and nor is the mask.

        The attention is counted in its one-pass form, where it has one. Backward, each product becomes two; the
        attention's scores and weights are computed again before.
        """
        forward: list[Work] = []
        backward: list[Work] = []
        streamed = self.core is not None and isinstance(self.state, RowState)
        for i, e in enumerate(self.c.einsums):
            row = self.core is not None and i in self.core.unit
            again = self.core is not None and i in self.core.products
            w = self.counted(e, self.of(i), most)
            if not (streamed and (row or again)):
                forward.append(w)
            products = {d: n * (3 if again else 2) for d, n in w.matrix.items()}
            backward.append(Work(products, {} if streamed and row else w.ops))
        if streamed:
            one_pass = self.one_pass(most)
            forward.append(one_pass)
            backward.append(Work({}, one_pass.ops))
        return plus(*forward), plus(*backward)

    def counted(self, e: Einsum, cuts: Mapping[str, str], most: float) -> Work:
        pair = {self.who.tokens, self.who.key} <= e.ranks | set(e.over)
        w = operations([e], self.extent(cuts))
        return _without_mask(scaled(w, most)) if pair else w

    def one_pass(self, most: float) -> Work:
        """The attention's one-pass form over this device's part, in tiles of keys."""
        assert self.core is not None
        assert isinstance(self.state, RowState)
        a = self.core.view
        flow = _flow(a, self.state)
        (outer,) = [r.name for r in flow.ranks if r.iterative]
        inner = next(r.name for r in flow.ranks if r.name not in a.cascade.rank and r.name != outer)
        here = self.extent(self.cuts({r.name for r in a.cascade.ranks}, self.how.inside))
        keys = here[a.key]
        # ranks that the view renamed are as long as those they stand for
        extent: dict[str, Size] = {r.name: here.get(r.name, r.size) for r in flow.ranks}
        extent |= {outer: sympy.Rational(keys, min(TILE, keys)), inner: min(TILE, keys)}
        before = {e.out.tensor for e in a.prelude}
        ours = [e for e in flow.einsums if e.out.tensor not in before]
        walked = operations([e for e in ours if outer in e.ranks], extent)
        return plus(_without_mask(scaled(walked, most)), operations([e for e in ours if outer not in e.ranks], extent))

    def share(self) -> tuple[float, float]:
        """The share of pairs that the mask keeps on the device with most of them, and that over the mean."""
        if self.core is None:
            return 1.0, 1.0
        cuts = self.cuts(self.whole, self.how.inside)
        most = max(self.kept_share(d) for d in self.deals(cuts))
        mean = self.kept_share(())
        return most, most / mean if mean else 1.0

    def deals(self, cuts: Mapping[str, str]) -> list[tuple[Cut, ...]]:
        """The first and the last device of each cut sequence: between them lies the one with most pairs."""
        out: list[tuple[Cut, ...]] = [()]
        for axis, rank in cuts.items():
            if rank not in (self.who.tokens, self.who.key):
                continue
            n, zigzag = self.parts[axis], self.how.order == "zigzag" and rank == self.who.tokens
            block = 1 if self.how.order == "interleaved" else None
            ends = (0,) if zigzag else (0, n - 1)
            out = [(*d, Cut(rank, n, k, block, zigzag)) for d in out for k in ends]
        return out

    def kept_share(self, deal: tuple[Cut, ...]) -> float:
        assert self.core is not None
        return _kept(self.core.view, deal, self.data)


@lru_cache(maxsize=512)
def _kept(view: Attention, deal: tuple[Cut, ...], data: Data) -> float:
    """The share of tiles that the mask keeps on one device."""
    try:
        here = cut(view.cascade, deal)
    except CutError as no:
        raise Refused(str(no)) from None
    a = attention(here)
    if isinstance(a, Obstacle):
        raise Refused(f"a part of the attention reads as none: {a}")
    extents = {r.name: size_int(r.size) for r in a.cascade.ranks}
    mask, tile = split(a.score, a.key), (min(TILE, extents[a.query]), TILE)
    tiles = tile_map(mask, a.query, a.key, extents, {}, *tile, data)
    rows, keys = (-(-extents[r] // n) for r, n in zip((a.query, a.key), tile))
    found = jobs(tiles, 1, rows, keys, mask, data, tile)
    return float(found.visited.sum()) / max(found.visited.size * keys, 1)


@lru_cache(maxsize=256)
def _flow(a: Attention, state: RowState) -> Cascade:
    return stream(a, state)


def _without_mask(w: Work) -> Work:
    """Tiles that a mask keeps whole do not evaluate it, and the others are few."""
    return Work(w.matrix, {o: n for o, n in w.ops.items() if o not in (*MASKING, INDEX)})


def scalars(state: RowState) -> int:
    """Numbers a row sends beside its product: one fewer than it carries where a sum is repaired like the product."""
    alike = any(s.op == "add" and s.correction is not None and s.correction is state.correction for s in state.carried)
    return len(state.carried) - (1 if alike else 0)


def _linear(e: Einsum, x: Expr) -> bool:
    """Is an Einsum a sum of products with this load as one factor?"""
    if e.op not in (None, "add"):
        return False
    if e.op == "add" and contraction(e) is None and e.body is not x:
        return False
    return sum(1 for f in factors(e.body) if _bare(f) is x) == 1 and sum(y is x for y in e.reads) == 1


def _fixed(x: Expr) -> tuple[str, ...]:
    """The coordinates of a load that are numbers; "·" for the others."""
    return tuple(str(i.value) if i.is_const else "·" for i in x.args)


def _bare(e: Expr) -> Expr:
    while e.op == "cast":
        e = e.args[0]
    return e


def _combines(body: Expr, old: Expr) -> bool:
    """old + d, or old·g + d with g and d free of the state: such steps compose, whatever device they run on."""
    if body.op != "add":
        return False
    with_old = [t for t in body.args if old in ex.walk(t)]
    if len(with_old) != 1:
        return False
    (t,) = with_old
    if _bare(t) is old:
        return True
    return t.op == "mul" and sum(_bare(f) is old for f in factors(t)) == 1 and sum(y is old for y in ex.loads(t)) == 1


def _spelled(pairs: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"{r}→{a}" for r, a in pairs) or "nothing"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _do(n: int) -> str:
    return "does" if n == 1 else "do"

