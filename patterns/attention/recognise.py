"""What counts as attention: an `Attention` is a view read off a cascade, by structure and never by name.

    QK[b,h,p,m] = Σ_e Q·K          products: contractions whose output varies over a query and a key rank
    R1[b,h,p]   = ⊕_m g1(QK, …)    row: reductions over the key rank, each may use the ones before it
    N[b,h,p,f]  = Σ_m weight·V     contraction: sums over the key rank; V alone varies over the value rank
    O[b,h,p,f]  = finish(N, R1, …)

The key is the rank that the contraction reduces; the value rank is the output's rank that only V has; the query is
an output rank that neither V nor the key operand of a product has; all other ranks of the output are batch. Pointwise
Einsums are inlined (with the cast to their tensor's dtype), and a reduction that is read through an index map (a
reshape of heads) is rewritten over the reader's ranks, so that every term speaks of the output's ranks and the key.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .. import expr as ex
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ..expr import Expr
from ..terms.divisions import read_at
from ..terms.overflow import passes
from ..verdict import Obstacle
from .attention import Attention
from .score import factors, only, score, without


class _NoAttention(Exception):
    """Carries an Obstacle to the one place that catches it."""

    def __init__(self, reason: str, einsum: object = "", depth: int = 0) -> None:
        super().__init__(reason)
        self.obstacle = Obstacle(reason, str(einsum) if einsum else "", depth)


@lru_cache(maxsize=512)
def attention(c: Cascade) -> Attention | Obstacle:
    """Read the attention whose output is the cascade's only output, or say why there is none."""
    if len(c.outputs) != 1:
        return Obstacle(f"the cascade has {len(c.outputs)} outputs; an attention is read off one")
    if any(r.iterative for r in c.ranks):
        return Obstacle("the cascade is already written with carried state")
    try:
        form = _Form(c)
        term, ranks = form.output()
    except _NoAttention as stop:
        return stop.obstacle
    found: list[Attention] = []
    missed: list[Obstacle] = []
    for load in ex.loads(term):
        if str(load.attr) not in form.reductions:
            continue
        try:
            found.append(_Reader(form, term, ranks, load).read())
        except _NoAttention as stop:
            missed.append(stop.obstacle)
    if len(found) > 1:
        names = ", ".join(a.contraction.out.tensor for a in found)
        return Obstacle(f"the output joins {len(found)} products with values ({names}): several attentions", depth=9)
    if not found and not missed:
        return Obstacle("no Einsum sums over a rank that the output lacks: there is no product with values")
    return _integers_fit(found[0]) if found else max(missed, key=lambda m: m.depth)


def _integers_fit(a: Attention) -> Attention | Obstacle:
    terms = (a.score, a.weight, a.values, a.finish, *(e.body for e in (*a.prelude, *a.products, *a.row)))
    large = next((found for e in terms if (found := passes(e, a.cascade.rank)) is not None), None)
    if large is None:
        return a
    return Obstacle(f"{large} may be too large for {large.dtype}, where tensors wrap around", depth=9)


class _Form:
    """The cascade with pointwise Einsums inlined: reductions over reductions and inputs are what is left."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.reductions: dict[str, Einsum] = {}
        self._pointwise: dict[str, tuple[tuple[Expr, ...], Expr]] = {}
        self._fresh = 0
        self.ranks: dict[str, Rank] = dict(c.rank)
        for e in c.einsums:
            name = e.out.tensor
            if len(c.producers[name]) > 1 or not e.out.plain:
                raise _NoAttention(f"{name} is written in pieces", e.out)
            body = self.inline(e.body)
            if e.op is None:
                self._pointwise[name] = (e.out.index, ex.cast(body, c.tensor[name].dtype))
            else:
                self.reductions[name] = replace(e, body=body)

    def inline(self, root: Expr) -> Expr:
        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e.op != "load" or str(e.attr) not in self._pointwise:
                return None
            at, body = self._pointwise[str(e.attr)]
            return read_at(body, dict(zip(at, args, strict=True)), self.extent)

        return ex.rebuild(root, rule)

    def output(self) -> tuple[Expr, tuple[str, ...]]:
        (name,) = self.c.outputs
        (e,) = self.c.producers[name]
        at = e.out.index
        term = self.inline(ex.load(name, at, self.c.tensor[name].dtype))
        return term, tuple(str(i.attr) for i in at)

    def fresh(self, like: str) -> str:
        """A new rank of the size of `like`."""
        name = f"{like}_"
        while name in self.ranks:
            name += "_"
        self.ranks[name] = replace(self.ranks[like], name=name)
        return name

    def instance(self, name: str, at: tuple[Expr, ...], avoid: frozenset[str], over: str | None = None) -> Einsum:
        """The reduction over the reader's ranks: its output's ranks replaced by the index terms of the access.

            before   T[k,g,p] = Σ_e …k…g…, read as T[h//2, h%2, p]        after   T[h,p] = Σ_e …(h//2)…(h%2)…

        Reduced ranks that are in `avoid` get a new name; `over` names the only reduced rank.
        """
        e = self.reductions[name]
        own = frozenset().union(*(i.ranks for i in at))
        table = dict(zip(e.out.index, at, strict=True))
        reduced = []
        for r in e.over:
            new = over if over is not None else self.fresh(r) if r in own | avoid else r
            reduced.append(new)
            if new != r:
                table[ex.index(r)] = ex.index(new)
        order = [r for i in at for r in _rank_order(i)]
        out = tuple(ex.index(r) for r in dict.fromkeys(order))
        return Einsum(Access(name, out), read_at(e.body, table, self.extent), e.op, tuple(reduced))

    @property
    def extent(self) -> dict[str, Size]:
        return {name: r.size for name, r in self.ranks.items()}


def _rank_order(e: Expr) -> list[str]:
    return [str(x.attr) for x in ex.walk(e) if x.op == "index"]


class _Reader:
    """One attempt to read an attention around one contraction of the output term."""

    def __init__(
        self, form: _Form, term: Expr, ranks: tuple[str, ...], load: Expr, biases: frozenset[str] = frozenset()
    ) -> None:
        self.form, self.term, self.output, self.load, self.biases = form, term, ranks, load, biases
        self.product_of: dict[str, str] = {}
        self.products: dict[str, Einsum] = {}
        self.row: dict[str, Einsum] = {}
        self.prelude: dict[str, Einsum] = {}
        self.renamed: dict[Expr, Expr] = {}
        self.changed = False
        self.key = ""
        self.candidates: frozenset[str] = frozenset()

    def read(self) -> Attention:
        whole = self.contraction()
        weight, values = self.split(whole)
        weight = self.settle(weight)
        if not self.products:
            raise _NoAttention(
                f"the weights of {whole.out.tensor} hold no product of an operand with {self.key} and one without that "
                "brings a rank of the output",
                whole,
                3,
            )
        if biases := self.of_queries_themselves():
            return _Reader(self.form, self.term, self.output, self.load, self.biases | biases).read()
        query = self.query(weight, values)
        finish = self.settle(ex.substitute(self.term, {self.load: self.accumulator(whole)}))
        if self.key in finish.ranks:
            raise _NoAttention(f"the output varies over {self.key}, which its product reduces", whole, 5)
        for t in (values, *(e.body for e in self.products.values())):
            self.before(t)
        contraction = replace(whole, body=weight * values)
        top = score(tuple(self.row.values()), weight, self.names, frozenset(self.products), self.key)
        return self.finished(query, weight, values, finish, contraction, top)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.row)

    def contraction(self) -> Einsum:
        name = str(self.load.attr)
        e = self.form.reductions[name]
        if e.op != "add":
            raise _NoAttention(f"{name} reduces by {e.op}, not by a sum of products", e)
        whole = self.form.instance(name, self.load.args, frozenset(self.output))
        if len(whole.over) != 1:
            raise _NoAttention(
                f"{name} reduces {len(whole.over)} ranks ({', '.join(whole.over)}); a key rank is one", e
            )
        self.key = whole.over[0]
        self.note(e, whole)
        return whole

    def note(self, before: Einsum, after: Einsum) -> None:
        self.changed |= before.out != after.out or before.over != after.over

    def accumulator(self, whole: Einsum) -> Expr:
        return ex.load(whole.out.tensor, whole.out.index, self.load.dtype)

    def split(self, whole: Einsum) -> tuple[Expr, Expr]:
        """Divide the contraction's factors into the weight and the values, and find value rank and query candidates."""
        above, below = factors(whole.body)
        own = {str(i.attr) for i in whole.out.index}
        keyed = [f for f in above if self.key in f.ranks]
        if len(keyed) < 2:
            raise _NoAttention(f"{whole.out.tensor} is no product of weights and values over {self.key}", whole, 1)
        scored = [f for f in keyed if self.reductions(f)]
        if not scored:
            raise _NoAttention(f"{whole.out.tensor} multiplies inputs: no score comes before it", whole, 1)
        if len(scored) == len(keyed):
            # The values are themselves computed: the factor that is a bare tensor and rests on no other reduction.
            bare = [f for f in scored if _bare(f) and not self.rests_on_rows(f)]
            rest = [f for f in scored if f not in bare[-1:]]
            if not bare or not rest:
                raise _NoAttention(f"no factor of {whole.out.tensor} is a plain tensor of values", whole, 1)
            scored = rest
        mine = frozenset().union(*(f.ranks for f in (*scored, *below)))
        values = [f for f in above if (f.ranks & own) - mine]
        value = frozenset().union(*(f.ranks for f in values)) & own - mine if values else frozenset()
        if len(value) != 1:
            what = "no rank" if not value else f"{len(value)} ranks ({', '.join(sorted(value))})"
            raise _NoAttention(
                f"the values of {whole.out.tensor} have {what} of their own; a value rank is one", whole, 2
            )
        (self.value,) = value
        w, v = without(whole.body, self.value), only(whole.body, self.value)
        assert w is not None
        assert v is not None
        self.candidates = (w.ranks & own) - v.ranks
        if not self.candidates:
            raise _NoAttention(
                f"the weights of {whole.out.tensor} vary over no rank of the output that the values lack: pooling over "
                f"{self.key} with one token rank",
                whole,
                3,
            )
        return w, v

    def reductions(self, e: Expr) -> list[Expr]:
        return [x for x in ex.loads(e) if str(x.attr) in self.form.reductions]

    def rests_on_rows(self, e: Expr) -> bool:
        """Does a term use a reduction that is not a plain sum?"""
        for x in self.reductions(e):
            r = self.form.reductions[str(x.attr)]
            if r.op != "add" or self.reductions(r.body):
                return True
        return False

    def settle(self, term: Expr) -> Expr:
        """Classify every reduction that a term reads and rewrite the term over what they become."""
        table: dict[Expr, Expr] = {}
        for x in self.reductions(term):
            if str(x.attr) != str(self.load.attr):
                table[x] = self.place(x)
        return ex.substitute(term, table)

    def place(self, x: Expr) -> Expr:
        if x in self.renamed:
            return self.renamed[x]
        name = str(x.attr)
        e = self.form.reductions[name]
        if self.key in x.ranks:
            out = self.keyed(x, e)
        elif self.is_row(x, e):
            out = self.reduction(x, e)
        else:
            self.before(x)
            out = x
        self.renamed[x] = out
        return out

    def keyed(self, x: Expr, e: Expr | Einsum) -> Expr:
        """A reduction that varies over the key: a product, or a tensor computed beforehand, or no attention."""
        assert isinstance(e, Einsum)
        name = e.out.tensor
        inst = self.form.instance(name, x.args, frozenset(self.output) | {self.key})
        # The rank it reduces may be the query's under another name: then the sizes agree.
        sizes = {self.form.ranks[r].size for r in self.candidates}
        rows = self.candidates | {r for r in inst.over if self.form.ranks[r].size in sizes}
        scored = [y for y in self.reductions(inst.body) if self.key in y.ranks and y.ranks & rows]
        if scored:
            raise _NoAttention(
                f"{name} reduces scores over {', '.join(e.over)} ({e.op}), not over {self.key}, which the product with "
                "the values reduces",
                e,
                4,
            )
        own = frozenset(str(i.attr) for i in inst.out.index)
        if e.op != "add" or name in self.biases or not own & self.candidates or not self.separates(inst):
            self.before(x)
            return x
        self.note(e, inst)
        out = self.enter(self.products, inst, x)
        self.product_of[str(out.attr)] = name
        return out

    def of_queries_themselves(self) -> frozenset[str]:
        """Products whose keys are those of a part of the queries, where no other rank is left for the query.

            before   QK[y,x,m] = Σ_e Q·K[m,e];  R[y,x,u] = Σ_e Q·H[y,u,e];  C[y,x,v] = Σ_e Q·W[x,v,e]
            after    R and C come before the score, which reads R[y,x,m // V] and C[y,x,m % V]
        """
        near = {n: self.near(e) & self.candidates for n, e in self.products.items()}
        all_have = frozenset.intersection(*near.values())
        if self.candidates - frozenset().union(*near.values()) or all_have not in near.values():
            return frozenset()
        return frozenset(self.product_of[n] for n, own in near.items() if own != all_have)

    def near(self, product: Einsum) -> frozenset[str]:
        """The ranks of a product's operand along the key."""
        return frozenset().union(*(f.ranks for f in factors(product.body)[0] if self.key in f.ranks))

    def separates(self, inst: Einsum) -> bool:
        """Is the body a product in which the key and some query rank sit in different factors?"""
        above, below = factors(inst.body)
        keyed = [f for f in above if self.key in f.ranks]
        free = [f for f in above if self.key not in f.ranks]
        if any(self.key in f.ranks for f in below) or not keyed:
            return False
        near = frozenset().union(*(f.ranks for f in keyed))
        far = frozenset().union(*(f.ranks for f in free)) if free else frozenset()
        return bool((far & self.candidates) - near)

    def is_row(self, x: Expr, e: Einsum) -> bool:
        if len(e.over) != 1:
            return False
        (r,) = e.over
        if r == self.key:
            return True
        if self.form.ranks[r].size != self.form.ranks[self.key].size:
            return False
        return any(r in y.ranks for y in self.reductions(e.body)) and bool(x.ranks & self.candidates)

    def reduction(self, x: Expr, e: Einsum) -> Expr:
        inst = self.form.instance(e.out.tensor, x.args, frozenset(), over=self.key)
        inst = replace(inst, body=self.settle(inst.body))
        for other in self.row.values():
            if (other.op, other.body) == (inst.op, inst.body) and x.dtype == self.dtype(other.out.tensor):
                return ex.load(other.out.tensor, other.out.index, x.dtype)
        self.note(e, inst)
        return self.enter(self.row, inst, x)

    def enter(self, table: dict[str, Einsum], inst: Einsum, x: Expr) -> Expr:
        """File an instance under its tensor's name, or a new one when the tensor is read in two ways."""
        name = inst.out.tensor
        for n, other in table.items():
            if other.body is inst.body and other.op == inst.op and other.out.index == inst.out.index:
                return ex.load(n, inst.out.index, x.dtype)
        while name in table:
            name += "_"
            self.changed = True
        table[name] = replace(inst, out=Access(name, inst.out.index))
        return ex.load(name, inst.out.index, x.dtype)

    def dtype(self, name: str) -> str:
        while name not in self.form.c.tensor:
            name = name.removesuffix("_")
        return self.form.c.tensor[name].dtype

    def before(self, term: Expr) -> None:
        """Enter every reduction under a term into the prelude."""
        for y in self.reductions(term):
            name = str(y.attr)
            if name in self.prelude or name in self.products or name in self.row or name == str(self.load.attr):
                continue
            self.before(self.form.reductions[name].body)
            self.prelude[name] = self.form.reductions[name]

    def query(self, weight: Expr, values: Expr) -> str:
        near: frozenset[str] = values.ranks
        sides: list[Expr] = [values]
        far: frozenset[str] = frozenset()
        for e in self.products.values():
            for f in factors(e.body)[0]:
                if self.key in f.ranks:
                    near |= f.ranks
                    sides.append(f)
                else:
                    far |= f.ranks
        left = [r for r in self.output if r in self.candidates and r not in near and r in far]
        if not left:
            raise _NoAttention("every rank of the output that the queries have, the keys have too", depth=4)
        batch = [r for r in self.output if r not in (self.value, *left)]
        ones = any(i.is_const for s in sides for x in ex.loads(s) for i in x.args)
        if len(left) > 1 and not batch and not ones and not any(r in near for r in self.output if r != self.value):
            raise _NoAttention(
                f"keys and values are the same for all of {', '.join(left)}: a table that is looked up (a router), "
                "not scores between two token ranks",
                depth=4,
            )
        if len(left) == 1:
            return left[0]
        terms = list(ex.walk(weight, *(e.body for e in self.row.values())))

        def likely(r: str) -> tuple[bool, bool, int, int]:
            """A coordinate that is compared with the key's, then a symbolic size, then the longest, then the last."""
            size = self.form.ranks[r].size
            compared = any(x.op in ex.COMPARISONS and {r, self.key} <= x.ranks and not ex.loads(x) for x in terms)
            number = size if isinstance(size, int) else 0
            return compared, not isinstance(size, int), number, self.output.index(r)

        return max(left, key=likely)

    def finished(
        self, query: str, weight: Expr, values: Expr, finish: Expr, contraction: Einsum, score: Expr
    ) -> Attention:
        c = self.form.c
        batch = tuple(r for r in self.output if r not in (query, self.value))
        groups = (tuple(self.prelude.values()), tuple(self.products.values()), tuple(self.row.values()))
        twice = self.prelude.keys() & (self.products.keys() | self.row.keys())
        if twice:
            raise _NoAttention(
                f"{min(twice)} is read over {self.key} and over another rank of the same size", contraction, 5
            )
        self.check_order(groups, contraction)
        if self.changed:
            c = self.rewritten(finish, contraction, groups)
        return Attention(c, batch, query, self.key, self.value, *groups[:2], score, groups[2], weight, values, finish,
                         contraction)

    def check_order(self, groups: tuple[tuple[Einsum, ...], ...], contraction: Einsum) -> None:
        """What comes first reads nothing that comes later: a row that also sees other keys than these has no such order."""
        made: set[str] = set()
        for e in (*(e for g in groups for e in g), contraction):
            if apart := [str(y.attr) for y in self.reductions(e.body) if str(y.attr) not in made]:
                raise _NoAttention(f"{e.out.tensor} reads {apart[0]}, which would come after it", contraction, 5)
            made.add(e.out.tensor)

    def rewritten(self, finish: Expr, contraction: Einsum, groups: tuple[tuple[Einsum, ...], ...]) -> Cascade:
        """The cascade over the reader's ranks; needed only when a reduction was read through an index map."""
        c = self.form.c
        (name,) = c.outputs
        at = tuple(ex.index(r) for r in self.output)
        einsums = [*(e for g in groups for e in g), contraction]
        if name == contraction.out.tensor:
            assert finish.op == "load"
        else:
            einsums.append(Einsum(Access(name, at), finish))
        made = {e.out.tensor: e for e in einsums}
        tensors = list(c.inputs)
        for e in einsums:
            shape = tuple(self.form.ranks[str(i.attr)].size for i in e.out.index)
            tensors.append(Tensor(e.out.tensor, shape, self.dtype(e.out.tensor)))
        used = frozenset().union(*(e.ranks | set(e.over) for e in made.values()))
        tensors = [t for t in tensors if t.name in made or any(str(x.attr) == t.name for e in einsums for x in e.reads)]
        ranks = tuple(r for n, r in self.form.ranks.items() if n in used)
        return verify(Cascade(c.name, ranks, tuple(tensors), tuple(einsums), c.outputs, c.accumulate, c.note))


def _bare(e: Expr) -> bool:
    while e.op == "cast":
        e = e.args[0]
    return e.op == "load"
