"""The backward of an attention as a cascade of Einsums, which the oracle evaluates: one gradient an input that is a float.

    forward, one pass    products, row state, output          saved = terms over the row state
    δ = Σ_f dOut·out     dW = Σ_f acc·V                       dV = Σ_p weight·acc
    dX = its term        dQ = Σ_m dX·K, dK = Σ_p dX·Q         one pair for each product X
    what the prelude made passes its gradient on to what it was made of
A tensor that is read at computed coordinates (a table, heads in groups) gathers its gradient over all that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.recognise import attention
from ..attention.rowstate import derive
from ..attention.score import factors
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ..expr import Expr
from ..verdict import Obstacle
from .adjoint import Adjoint, adjoint
from .derivative import NoGradient, pullback


def gradient(c: Cascade) -> Cascade | Obstacle:
    """The cascade that takes the inputs of `c` and `dOut`, and gives the gradient `dT` of each input T that has one.

    The gradient of the output is the input named by `Adjoint.dout`; an input that nothing reaches has no output.
    """
    a = attention(c)
    if isinstance(a, Obstacle):
        return a
    found = adjoint(a)
    if isinstance(found, Obstacle):
        return found
    try:
        return _Gradient(found).cascade()
    except NoGradient as stop:
        return Obstacle(f"no gradient: {stop}", str(a.contraction.out), depth=7)


@dataclass
class _Ranks:
    """The ranks of the new cascade; the ones that gather gradients are made here."""

    ranks: dict[str, Rank]

    def fresh(self, like: str, size: Size) -> str:
        name = f"{like}_"
        while name in self.ranks:
            name += "_"
        self.ranks[name] = Rank(name, size)
        return name


@dataclass
class _Gradient:
    """Builds the cascade; `reached` holds the parts of each tensor's gradient until all of them are known."""

    found: Adjoint
    einsums: list[Einsum] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reached: dict[str, list[Expr]] = field(default_factory=dict)

    @property
    def a(self) -> Attention:
        return self.found.attention

    def cascade(self) -> Cascade:
        a, c = self.a, self.a.cascade
        self.ranks = _Ranks(dict(c.rank))
        self.tensors = {t.name: t for t in c.inputs}
        self.declare(str(self.found.dout.attr), self.found.dout.args, self.found.dout.dtype)
        self.forward()
        f = self.found
        for s in f.saved:
            self.put(s.load, s.term)
        for r in (*f.row, *f.passes):
            self.put(r.load, r.term, "add", (r.over,))
        self.put(f.dweight, f.acc * a.values, "add", (a.value,))
        self.of_values()
        for g in (*f.scores, *f.leaves):
            self.gather(g.load, g.term, g.space)
        for p in a.products:
            self.of_product(p)
        for e in reversed(a.prelude):
            self.of_einsum(e)
        outputs = [name for t in c.inputs if t.name in self.reached for name in (self.total(t.name),)]
        used = frozenset().union(*(e.ranks | set(e.over) for e in self.einsums))
        read = {str(x.attr) for e in self.einsums for x in e.reads} | {e.out.tensor for e in self.einsums}
        return verify(
            Cascade(
                f"{c.name}, backward",
                tuple(r for r in self.ranks.ranks.values() if r.name in used),
                tuple(t for t in self.tensors.values() if t.name in read),
                tuple(self.einsums),
                tuple(outputs),
                c.accumulate,
            )
        )

    # writing

    def declare(self, name: str, at: tuple[Expr, ...], dtype: str) -> None:
        shape = tuple(self.ranks.ranks[str(i.attr)].size for i in at)
        self.tensors[name] = Tensor(name, shape, dtype)

    def put(self, load: Expr, body: Expr, op: str | None = None, over: tuple[str, ...] = ()) -> Expr:
        """Write a tensor where `load` reads it."""
        self.declare(str(load.attr), load.args, load.dtype)
        self.einsums.append(Einsum(Access(str(load.attr), load.args), body, op, over))
        return load

    def fresh(self, name: str) -> str:
        while name in self.tensors or name in self.a.cascade.tensor:
            name += "_"
        return name

    # the parts

    def forward(self) -> None:
        """Prelude, products, what the row carries, the contraction and the output."""
        a, c = self.a, self.a.cascade
        for e in (*a.prelude, *a.products):
            self.tensors[e.out.tensor] = c.tensor[e.out.tensor]
            self.einsums.append(e)
        state = derive(a)
        assert not isinstance(state, Obstacle)
        known = [x for t in (state.weight, state.finish, *(k.lift for k in state.carried)) for x in ex.loads(t)]
        known += [x for s in self.found.saved for x in ex.loads(s.term)]
        for k in state.carried:
            load = next(x for x in known if str(x.attr) == k.name)
            self.put(load, k.lift, k.op, (a.key,))
        out = a.contraction.out
        self.put(ex.load(out.tensor, out.index, c.tensor[out.tensor].dtype), state.weight * a.values, "add", (a.key,))
        if self.found.out.attr != out.tensor:
            self.put(self.found.out, state.finish)
        elif state.finish is not self.found.out:
            # the contraction's own tensor is the output: what is summed has a name of its own
            raw = ex.load(self.fresh(f"N{out.tensor}"), out.index, self.found.out.dtype)
            summed = self.einsums.pop()
            self.put(raw, summed.body, "add", (a.key,))
            self.put(self.found.out, ex.substitute(state.finish, {self.found.out: raw}))

    def of_values(self) -> None:
        a, f = self.a, self.found
        own = tuple(ex.index(r) for r in (*a.batch, a.query, a.key, a.value) if r in a.values.ranks)
        dvalues = ex.load(self.fresh("dValues"), own, f.dweight.dtype)
        over = tuple(r for r in (*a.batch, a.query) if r not in a.values.ranks)
        self.put(dvalues, f.weight * f.acc, "add" if over else None, over)
        self.pull(a.values, dvalues, tuple(str(i.attr) for i in own))

    def of_product(self, p: Einsum) -> None:
        """dQ = Σ_m dX·K and dK = Σ_p dX·Q, then what each side was made of."""
        d = self.gradient_of(p.out.tensor, p.out.index)
        if d is None:
            return
        space = tuple(str(i.attr) for i in p.out.index)
        above, below = factors(p.body)
        near = [x for x in above if self.a.key in x.ranks]
        far = [x for x in above if self.a.key not in x.ranks]
        if below or not near or not far:
            self.pull(p.body, d, (*space, *p.over))
            return
        for mine, other in ((far, near), (near, far)):
            side, rest = _multiplied(mine), _multiplied(other)
            ranks = tuple(r for r in (*space, *p.over) if r in side.ranks)
            over = tuple(r for r in (*space, *p.over) if r not in ranks)
            load = ex.load(self.fresh(f"d{p.out.tensor}{self.a.key if mine is near else self.a.query}"),
                           tuple(map(ex.index, ranks)), d.dtype)
            self.put(load, d * rest, "add" if over else None, over)
            self.pull(side, load, ranks)

    def of_einsum(self, e: Einsum) -> None:
        d = self.gradient_of(e.out.tensor, e.out.index)
        if d is None:
            return
        if e.op not in (None, "add"):
            raise NoGradient(f"{e.out} is a reduction by {e.op}")
        self.pull(e.body, d, (*(str(i.attr) for i in e.out.index), *e.over))

    def pull(self, body: Expr, d: Expr, space: tuple[str, ...]) -> None:
        """What of the gradient of a term over a space reaches each tensor that it reads."""
        leaves = [x for x in ex.loads(body) if x.is_float]
        found = pullback({body: d}, leaves)
        if isinstance(found, Obstacle):
            raise NoGradient(found.reason)
        for x, part in found.items():
            self.gather(x, ex.cast(part, self.a.cascade.accumulate), space)

    # gathering

    def gather(self, load: Expr, term: Expr, space: tuple[str, ...]) -> None:
        """A part of the gradient of a tensor: the sum of a term over all of a space that reads one element.

            T[h,e], plain           dT[h,e]  = Σ_rest term
            T[h // 4,e], a group    dT[g,e]  = Σ_k,rest term at h = 4·g + k
            T[any(p,m)], a table    dT[j]    = Σ_p,m,rest where(any(p,m) = j, term, 0)
        """
        name, shape = str(load.attr), self.tensors[str(load.attr)].shape
        own: list[str] = []
        left = list(space)
        keep: Expr = ex.TRUE
        table: dict[Expr, Expr] = {}
        for i, size in zip(load.args, shape, strict=True):
            i = ex.substitute(i, table)
            rank = str(i.attr) if i.op == "index" else ""
            if rank in left and self.ranks.ranks[rank].size == size:
                left.remove(rank)
                own.append(rank)
            elif (group := self.group(i, size, left, load)) is not None:
                rank, count = group
                outer, inner = self.ranks.fresh(rank, size), self.ranks.fresh(f"{rank}g", count)
                table[ex.index(rank)] = ex.index(outer) * count + ex.index(inner)
                left[left.index(rank)] = inner
                own.append(outer)
            else:
                j = self.ranks.fresh("j", size)
                own.append(j)
                if size != 1:
                    keep = keep & ex.equal(i, ex.index(j))
        body = ex.substitute(term, table)
        if keep is not ex.TRUE:
            body = ex.where(ex.substitute(keep, table), body, ex.const(0.0, body.dtype))
        at = tuple(map(ex.index, own))
        part = ex.load(self.fresh(f"d{name}{len(self.reached.get(name, [])) or ''}"), at, self.a.cascade.accumulate)
        self.put(part, body, "add" if left else None, tuple(left))
        self.reached.setdefault(name, []).append(part)

    def group(self, i: Expr, size: Size, left: list[str], load: Expr) -> tuple[str, int] | None:
        """(h, 4) of h // 4, where nothing else of the access reads h and all groups are whole."""
        if i.op != "floordiv" or i.args[0].op != "index" or not i.args[1].is_const:
            return None
        rank, count = str(i.args[0].attr), int(i.args[1].value)
        alone = sum(rank in x.ranks for x in load.args) == 1
        return (rank, count) if rank in left and alone and self.ranks.ranks[rank].size == size * count else None

    def gradient_of(self, name: str, at: tuple[Expr, ...]) -> Expr | None:
        """The gradient of a tensor of the cascade, at its own coordinates."""
        if name not in self.reached:
            return None
        total = self.total(name)
        return ex.load(total, at, self.tensors[total].dtype)

    def total(self, name: str) -> str:
        """The sum of the parts of a tensor's gradient, in the tensor's own type."""
        parts, dtype = self.reached[name], self.tensors[name].dtype
        if len(parts) == 1 and parts[0].dtype == dtype:
            return str(parts[0].attr)
        at = tuple(ex.index(self.ranks.fresh("j", n)) for n in self.tensors[name].shape)
        body = ex.load(str(parts[0].attr), at, parts[0].dtype)
        for p in parts[1:]:
            body = body + ex.load(str(p.attr), at, p.dtype)
        return str(self.put(ex.load(self.fresh(f"d{name}"), at, dtype), body).attr)


def _multiplied(terms: list[Expr]) -> Expr:
    out = terms[0]
    for t in terms[1:]:
        out = out * t
    return out
