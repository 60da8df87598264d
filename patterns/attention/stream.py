"""The tiled cascade: a row state written as one pass over tiles of keys, so that it is verified, counted and evaluated."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from .. import expr as ex
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, size_term, verify
from ..expr import Expr
from .attention import Attention
from .carried import OLD, Carried, RowState


def stream(a: Attention, state: RowState) -> Cascade:
    """One pass over tiles of M0 keys with carried state, as FuseMax's Cascade 5.

    before   R[p] = ⊕_m g(S[p,m]);  N[p,f] = Σ_m W[p,m]·V[m,f]
    after    m = m1·M0 + m0;  per m1 (iterative):  BS = S;  R[p,m1+1] = ⊕(R[p,m1], ⊕_m0 lift);  N[p,f,m1+1] = …

    Takes the inputs of `a.cascade` and gives its output under the same name. The tile's size is the symbol named as
    the inner rank in capitals (`M0` for a key rank `m`); the last tile may be ragged.
    """
    return _Stream(a, state).cascade()


class _Stream:
    """Builds the tiled cascade; `table` maps terms over the key to terms over its two halves."""

    def __init__(self, a: Attention, state: RowState) -> None:
        self.a, self.st, self.c = a, state, a.cascade
        self.outer = _unused(f"{a.key}1", self.c.rank)
        self.inner = _unused(f"{a.key}0", self.c.rank)
        width = sympy.Symbol(self.inner.upper(), integer=True, positive=True)
        size = self.c.rank[a.key].size
        self.width: Size = width
        self.tiles: Size = sympy.floor((size + width - 1) / width)
        key = ex.index(self.outer) * size_term(width) + ex.index(self.inner)
        self.valid = key < size_term(size)
        self.table: dict[Expr, Expr] = {ex.index(a.key): key}
        self.tensors: dict[str, Tensor] = {t.name: t for t in self.c.inputs}
        self.reserved = dict(self.c.tensor)
        self.einsums: list[Einsum] = []
        self.running: dict[str, str] = {}

    def cascade(self) -> Cascade:
        a, c = self.a, self.c
        for e in a.prelude:
            self.tensors[e.out.tensor] = c.tensor[e.out.tensor]
            self.einsums.append(e)
        total = a.contraction.out
        self.start(total.tensor, total.index, 0.0, c.tensor[total.tensor].dtype)
        for s in self.st.carried:
            load = self.example(s)
            self.start(s.name, load.args, s.identity, load.dtype)
        for p in a.products:
            at = p.out.index
            self.tile(f"B{p.out.tensor}", ex.load(p.out.tensor, at, c.tensor[p.out.tensor].dtype), p.body, p.op, p.over)
        if a.score.op != "load":
            self.tile("BS", a.score, a.score)
        roots = [*(s.lift for s in self.st.carried), self.st.weight]
        for i, s in enumerate(self.st.carried):
            self.share(s.lift, roots[i + 1 :])
            self.step(s.name, s.op, self.over_tile(s.lift), None, s.identity, s.correction)
        self.step(total.tensor, "add", self.over_tile(self.st.weight), a.values, 0.0, self.st.correction)
        self.end()
        return self.result()

    def result(self) -> Cascade:
        ranks = [*self.c.ranks, Rank(self.outer, self.tiles, iterative=True), Rank(self.inner, self.width)]
        used = frozenset().union(*(e.ranks | set(e.over) for e in self.einsums))
        read = {str(x.attr) for e in self.einsums for x in e.reads} | {e.out.tensor for e in self.einsums}
        return verify(
            Cascade(
                f"{self.c.name} in one pass",
                tuple(r for r in ranks if r.name in used),
                tuple(t for t in self.tensors.values() if t.name in read),
                tuple(self.einsums),
                self.c.outputs,
                self.c.accumulate,
            )
        )

    def over_tile(self, e: Expr) -> Expr:
        return ex.substitute(e, self.table)

    def example(self, s: Carried) -> Expr:
        """A load of a carried scalar, wherever one stands: its coordinates and its type."""
        terms = [*(t for k in self.st.carried for t in (k.lift, k.correction)), self.st.weight, self.st.finish]
        for t in terms:
            for x in ex.loads(t) if t is not None else ():
                if str(x.attr) == s.name:
                    return x
        raise AssertionError(f"nothing reads {s.name}")

    def declare(self, name: str, ranks: tuple[Expr, ...], more: tuple[Size, ...], dtype: str) -> str:
        name = _unused(name, self.reserved)
        shape = (*(self.c.rank[str(i.attr)].size for i in ranks), *more)
        self.tensors[name] = self.reserved[name] = Tensor(name, shape, dtype)
        return name

    def start(self, name: str, at: tuple[Expr, ...], identity: float, dtype: str) -> None:
        new = self.declare(f"R{name}", at, (self.tiles + 1,), dtype)
        self.running[name] = new
        here, step = ex.load(name, at, dtype), ex.index(self.outer)
        self.table[here] = ex.load(new, (*at, step + 1), dtype)
        self.table[ex.load(OLD + name, at, dtype)] = ex.load(new, (*at, step), dtype)
        self.einsums.append(Einsum(Access(new, (*at, ex.const(0))), ex.const(identity, dtype)))

    def tile(self, name: str, term: Expr, body: Expr, op: str | None = None, over: tuple[str, ...] = ()) -> None:
        """A tensor that holds one tile of `term`, and that stands for it from here on."""
        own = tuple(ex.index(r) for r in (*self.a.batch, self.a.query) if r in term.ranks)
        new = self.declare(name, own, (self.tiles, self.width), term.dtype)
        at = (*own, ex.index(self.outer), ex.index(self.inner))
        self.einsums.append(Einsum(Access(new, at), self.over_tile(body), op, over))
        self.table[term] = ex.load(new, at, term.dtype)

    def share(self, root: Expr, later: list[Expr]) -> None:
        """Give the largest terms with a transcendental function that later lifts hold as well a tensor of their own."""
        others = [set(ex.walk(r)) for r in later]

        def go(e: Expr) -> None:
            if e in self.table or self.a.key not in e.ranks or e.op == "load":
                return
            if any(e in o for o in others) and any(x.op in ex.FLOAT_UNARY for x in ex.walk(e)):
                self.tile("SL", e, e)
                return
            for x in e.args:
                go(x)

        go(root)

    def step(
        self, name: str, op: str, lift: Expr, values: Expr | None, identity: float, correction: Expr | None
    ) -> None:
        """R[m1+1] = op(R[m1]·correction, op_m0 lift)"""
        running = self.running[name]
        access = next(e.out for e in self.einsums if e.out.tensor == running)
        ranks, step = access.index[:-1], ex.index(self.outer)
        dtype = self.tensors[running].dtype
        body = ex.where(self.valid, lift, ex.const(identity, lift.dtype))
        body = body if values is None else body * self.over_tile(values)
        local = self.declare(f"L{name}", ranks, (self.tiles,), dtype)
        self.einsums.append(Einsum(Access(local, (*ranks, step)), body, op, (self.inner,)))
        old = ex.load(running, (*ranks, step), dtype)
        if correction is not None:
            old = old * self.corrected(correction)
        new = ex.binary(op, old, ex.load(local, (*ranks, step), dtype))
        self.einsums.append(Einsum(Access(running, (*ranks, step + 1)), new))

    def corrected(self, correction: Expr) -> Expr:
        if correction not in self.table:
            own = tuple(ex.index(r) for r in (*self.a.batch, self.a.query) if r in correction.ranks)
            new = self.declare("PR", own, (self.tiles,), correction.dtype)
            at = (*own, ex.index(self.outer))
            self.einsums.append(Einsum(Access(new, at), self.over_tile(correction)))
            self.table[correction] = ex.load(new, at, correction.dtype)
        return self.table[correction]

    def end(self) -> None:
        (name,) = self.c.outputs
        (e,) = self.c.producers[name]
        last = size_term(self.tiles)
        table = {}
        for x in ex.loads(self.st.finish):
            if str(x.attr) in self.running:
                table[x] = ex.load(self.running[str(x.attr)], (*x.args, last), x.dtype)
        self.tensors[name] = self.c.tensor[name]
        self.einsums.append(Einsum(Access(name, e.out.index), ex.substitute(self.st.finish, table)))


def _unused(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "_"
    return name
