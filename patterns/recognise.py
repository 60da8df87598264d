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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from . import expr as ex
from .cascade import Access, Cascade, Einsum, Rank, Tensor, verify
from .expr import Expr


@dataclass(frozen=True)
class Miss:
    """Why something is not (this kind of) attention. A value; `depth` is how far the attempt got."""

    reason: str
    einsum: str = ""
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.reason} [{self.einsum}]" if self.einsum else self.reason


@dataclass(frozen=True)
class Refusal:
    """Why a candidate cannot compute an attention."""

    candidate: str
    reason: str

    def __str__(self) -> str:
        return f"{self.candidate}: {self.reason}"


@dataclass(frozen=True)
class Attention:
    """One attention, read off `cascade`.

    `cascade` computes the same outputs from the same inputs as the cascade that was asked about; it is that very one
    unless an index map or a clash of rank names had to be folded. `prelude` holds Einsums that `products`, `row`,
    `weight`, `values` or `finish` read as ordinary tensors (norms, projections, gathered scores): they are computed
    beforehand. In `products`, `row` and `contraction` all pointwise Einsums are inlined.
    """

    cascade: Cascade
    batch: tuple[str, ...]
    query: str
    key: str
    value: str
    prelude: tuple[Einsum, ...]
    products: tuple[Einsum, ...]
    score: Expr
    row: tuple[Einsum, ...]
    weight: Expr
    values: Expr
    finish: Expr
    contraction: Einsum

    @property
    def row_names(self) -> frozenset[str]:
        return frozenset(e.out.tensor for e in self.row)


class _Stop(Exception):
    """Carries a Miss to the one place that catches it."""

    def __init__(self, reason: str, einsum: object = "", depth: int = 0) -> None:
        super().__init__(reason)
        self.miss = Miss(reason, str(einsum) if einsum else "", depth)


@lru_cache(maxsize=512)
def attention(c: Cascade) -> Attention | Miss:
    """Read the attention whose output is the cascade's only output, or say why there is none."""
    if len(c.outputs) != 1:
        return Miss(f"the cascade has {len(c.outputs)} outputs; an attention is read off one")
    if any(r.iterative for r in c.ranks):
        return Miss("the cascade is already written with carried state")
    try:
        form = _Form(c)
        term, ranks = form.output()
    except _Stop as stop:
        return stop.miss
    found: list[Attention] = []
    best = Miss("no Einsum sums over a rank that the output lacks: there is no product with values")
    for load in ex.loads(term):
        if str(load.attr) not in form.reductions:
            continue
        try:
            found.append(_Reader(form, term, ranks, load).read())
        except _Stop as stop:
            best = max(best, stop.miss, key=lambda m: m.depth)
    if len(found) > 1:
        names = ", ".join(a.contraction.out.tensor for a in found)
        return Miss(f"the output joins {len(found)} products with values ({names}): several attentions", depth=9)
    return found[0] if found else best


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
            if len(c.producers[name]) > 1 or not _plain(e.out.index):
                raise _Stop(f"{name} is written in pieces", e.out)
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
            return ex.substitute(body, dict(zip(at, args, strict=True)))

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
        return Einsum(Access(name, out), ex.substitute(e.body, table), e.op, tuple(reduced))


def _plain(at: tuple[Expr, ...]) -> bool:
    return all(i.op == "index" for i in at) and len(set(at)) == len(at)


def _rank_order(e: Expr) -> list[str]:
    return [str(x.attr) for x in ex.walk(e) if x.op == "index"]


def factors(body: Expr) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """The factors above and below the line of a product."""
    above: list[Expr] = []
    below: list[Expr] = []

    def go(e: Expr, up: bool) -> None:
        if e.op == "mul" and e.is_float:
            go(e.args[0], up)
            go(e.args[1], up)
        elif e.op == "div":
            go(e.args[0], up)
            go(e.args[1], not up)
        else:
            (above if up else below).append(e)

    go(body, True)
    return tuple(above), tuple(below)


def _without(body: Expr, value: str) -> Expr | None:
    """The product without the factors that vary over the value rank, otherwise as the model wrote it."""
    if value not in body.ranks:
        return body
    if body.op == "mul":
        left, right = (_without(x, value) for x in body.args)
        return right if left is None else left if right is None else left * right
    if body.op == "div":
        above = _without(body.args[0], value)
        return (1.0 if above is None else above) / body.args[1]
    return None


def _only(body: Expr, value: str) -> Expr | None:
    """The product of the factors that vary over the value rank."""
    if value not in body.ranks:
        return None
    if body.op == "mul":
        left, right = (_only(x, value) for x in body.args)
        return right if left is None else left if right is None else left * right
    return _only(body.args[0], value) if body.op == "div" else body


class _Reader:
    """One attempt to read an attention around one contraction of the output term."""

    def __init__(self, form: _Form, term: Expr, ranks: tuple[str, ...], load: Expr) -> None:
        self.form, self.term, self.output, self.load = form, term, ranks, load
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
            raise _Stop(
                f"the weights of {whole.out.tensor} hold no product of two operands that varies over a rank of the "
                f"output and over {self.key}",
                whole,
                3,
            )
        query = self.query(weight, values)
        finish = self.settle(ex.substitute(self.term, {self.load: self.accumulator(whole)}))
        if self.key in finish.ranks:
            raise _Stop(f"the output varies over {self.key}, which its product reduces", whole, 5)
        for t in (values, *(e.body for e in self.products.values())):
            self.before(t)
        contraction = replace(whole, body=weight * values)
        score = _score(tuple(self.row.values()), weight, self.names, self.key)
        return self.finished(query, weight, values, finish, contraction, score)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.row)

    def contraction(self) -> Einsum:
        name = str(self.load.attr)
        e = self.form.reductions[name]
        if e.op != "add":
            raise _Stop(f"{name} reduces by {e.op}, not by a sum of products", e)
        whole = self.form.instance(name, self.load.args, frozenset(self.output))
        if len(whole.over) != 1:
            raise _Stop(f"{name} reduces {len(whole.over)} ranks ({', '.join(whole.over)}); a key rank is one", e)
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
            raise _Stop(f"{whole.out.tensor} is no product of weights and values over {self.key}", whole, 1)
        scored = [f for f in keyed if self.reductions(f)]
        if not scored:
            raise _Stop(f"{whole.out.tensor} multiplies inputs: no score comes before it", whole, 1)
        if len(scored) == len(keyed):
            # The values are themselves computed: the factor that is a bare tensor and rests on no other reduction.
            bare = [f for f in scored if _bare(f) and not self.rests_on_rows(f)]
            rest = [f for f in scored if f not in bare[-1:]]
            if not bare or not rest:
                raise _Stop(f"no factor of {whole.out.tensor} is a plain tensor of values", whole, 1)
            scored = rest
        mine = frozenset().union(*(f.ranks for f in (*scored, *below)))
        values = [f for f in above if (f.ranks & own) - mine]
        value = frozenset().union(*(f.ranks for f in values)) & own - mine if values else frozenset()
        if len(value) != 1:
            what = "no rank" if not value else f"{len(value)} ranks ({', '.join(sorted(value))})"
            raise _Stop(f"the values of {whole.out.tensor} have {what} of their own; a value rank is one", whole, 2)
        (self.value,) = value
        w, v = _without(whole.body, self.value), _only(whole.body, self.value)
        assert w is not None
        assert v is not None
        self.candidates = (w.ranks & own) - v.ranks
        if not self.candidates:
            raise _Stop(
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
        scored = [y for y in self.reductions(inst.body) if self.key in y.ranks and y.ranks & self.candidates]
        if scored:
            raise _Stop(
                f"{name} reduces scores over {', '.join(e.over)} ({e.op}), not over {self.key}, which the product with "
                "the values reduces",
                e,
                4,
            )
        own = frozenset(str(i.attr) for i in inst.out.index)
        if e.op != "add" or not own & self.candidates or not self.separates(inst):
            self.before(x)
            return x
        self.note(e, inst)
        return self.enter(self.products, inst, x)

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
            raise _Stop("every rank of the output that the queries have, the keys have too", depth=4)
        batch = [r for r in self.output if r not in (self.value, *left)]
        ones = any(i.is_const for s in sides for x in ex.loads(s) for i in x.args)
        if len(left) > 1 and not batch and not ones and not any(r in near for r in self.output if r != self.value):
            raise _Stop(
                f"keys and values are the same for all of {', '.join(left)}: a table that is looked up (a router), "
                "not scores between two token ranks",
                depth=4,
            )
        if len(left) == 1:
            return left[0]
        terms = list(ex.walk(weight, *(e.body for e in self.row.values())))

        def likely(r: str) -> tuple[bool, bool, int, int]:
            """A coordinate that is compared with the key's, then a symbolic size, then the longest, then the first."""
            size = self.form.ranks[r].size
            compared = any(x.op in ex.COMPARISONS and {r, self.key} <= x.ranks and not ex.loads(x) for x in terms)
            number = size if isinstance(size, int) else 0
            return compared, not isinstance(size, int), number, -self.output.index(r)

        return max(left, key=likely)

    def finished(
        self, query: str, weight: Expr, values: Expr, finish: Expr, contraction: Einsum, score: Expr
    ) -> Attention:
        c = self.form.c
        batch = tuple(r for r in self.output if r not in (query, self.value))
        groups = (tuple(self.prelude.values()), tuple(self.products.values()), tuple(self.row.values()))
        if self.changed:
            c = self.rewritten(finish, contraction, groups)
        return Attention(c, batch, query, self.key, self.value, *groups[:2], score, groups[2], weight, values, finish,
                         contraction)  # fmt: skip

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


# --- the score --------------------------------------------------------------------------------------------------


def elements(term: Expr, row_names: frozenset[str] | set[str], key: str) -> tuple[Expr, ...]:
    """The largest sub-terms that vary over the key and read no row tensor, each once, left to right."""
    rowed = _reading(term, row_names)
    out: dict[Expr, None] = {}
    seen: set[Expr] = set()

    def go(e: Expr) -> None:
        if e in seen or key not in e.ranks:
            return
        seen.add(e)
        if e not in rowed:
            out[e] = None
            return
        for a in e.args:
            go(a)

    go(term)
    return tuple(out)


def _reading(term: Expr, names: frozenset[str] | set[str]) -> set[Expr]:
    """The sub-terms that read one of the named tensors."""
    out: set[Expr] = set()
    for e in ex.walk(term):
        if (e.op == "load" and str(e.attr) in names) or any(a in out for a in e.args):
            out.add(e)
    return out


def _gates(term: Expr, key: str) -> list[Expr]:
    """Sub-terms through which all dependence on the key passes, the largest first (a chain)."""
    chain: list[Expr] = []
    keyed = [e for e in reversed(list(ex.walk(term))) if key in e.ranks]
    for e in keyed:
        if not _escapes(term, e, key):
            chain.append(e)
    return chain


def _escapes(root: Expr, gate: Expr, key: str) -> bool:
    """Is there a way from the root to the key's coordinate around `gate`?"""
    seen: set[Expr] = {gate}
    stack = [root]
    while stack:
        e = stack.pop()
        if e in seen or key not in e.ranks:
            continue
        if e.op == "index":
            return True
        seen.add(e)
        stack.extend(e.args)
    return False


def _score(row: tuple[Einsum, ...], weight: Expr, names: frozenset[str], key: str) -> Expr:
    """The largest term without row tensors that carries all key-dependence of row reductions and weight.

    Where the weight brings more of its own (a mask applied to probabilities), the reductions alone decide. Boolean
    reductions ("does the row have a key") do not count. A pointwise map of the row rule itself (`exp`, `relu`, a
    square) is taken off, so that masks and biases lie on the outside of the score.
    """
    terms = [r.body for r in row if key in r.body.ranks and r.op not in ("or", "and")]
    bounds = [r.body for r in row if r.op in ("max", "min")]
    for group in ([*terms, weight], terms, [weight]):
        if not group:
            continue
        shared = [_gates(t, key) for t in group]
        rowed = _reading(group[0], names)
        for g in shared[0]:
            if g not in rowed and all(g in s for s in shared[1:]):
                return g if g in bounds else _peel(g, key)
    parts = elements(terms[0] if terms else weight, names, key)
    return max(parts, key=lambda e: sum(1 for _ in ex.walk(e)))


_MAPS = frozenset(["exp", "exp2", "expm1", "sigmoid", "relu", "softplus", "abs", "tanh", "sqrt", "log1p", "sin", "cos"])


def _peel(top: Expr, key: str) -> Expr:
    e, peeled = top, None
    while True:
        own = list(dict.fromkeys(a for a in e.args if key in a.ranks))
        if len(own) != 1 or e.op == "load":
            break
        nonlinear = e.op in _MAPS or (e.op == "mul" and e.args[0] is e.args[1]) or e.op == "pow"
        linear = e.op in ("cast", "neg", "mul", "div") and not nonlinear
        if not nonlinear and (peeled is not None or not linear):
            break
        e = own[0]
        if nonlinear:
            peeled = e
    return peeled if peeled is not None else top


# --- rows without a key -----------------------------------------------------------------------------------------

_NUMPY: Mapping[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "floor": np.floor, "ceil": np.ceil, "round": np.round, "trunc": np.trunc,
    "sign": np.sign, "isnan": np.isnan, "isinf": np.isinf, "not": np.logical_not, "exp": np.exp, "exp2": np.exp2,
    "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p, "tanh": np.tanh, "sqrt": np.sqrt,
    "reciprocal": np.reciprocal, "sin": np.sin, "cos": np.cos, "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": np.divide, "floordiv": np.floor_divide, "mod": np.mod, "max": np.maximum, "min": np.minimum,
    "pow": np.power, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "eq": np.equal,
    "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x), "relu": lambda x: np.maximum(x, 0), "softplus": lambda x: np.logaddexp(0.0, x),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)), "erf": np.tanh,
}  # fmt: skip
_REDUCE: Mapping[str, Callable[..., Any]] = {"add": np.sum, "max": np.max, "min": np.min, "mul": np.prod, "or": np.any, "and": np.all}


def number(root: Expr, loads: Mapping[str, object], known: Mapping[Expr, object] | None = None) -> Any:
    """The value of a term in float64: tensors by name, coordinates 0 unless `known` says otherwise."""
    memo: dict[Expr, Any] = {e: np.asarray(v) for e, v in (known or {}).items()}
    with np.errstate(all="ignore"):
        for e in ex.walk(root):
            if e not in memo:
                memo[e] = _number(e, [memo[a] for a in e.args], loads)
    return memo[root]


def _number(e: Expr, args: list[Any], loads: Mapping[str, object]) -> Any:
    match e.op:
        case "const":
            return np.asarray(e.value, dtype=float if e.is_float else None)
        case "index":
            return np.asarray(0)
        case "symbol":
            return np.asarray(2)
        case "load":
            return np.asarray(loads.get(str(e.attr), 0.5 if e.is_float else 0))
        case "cast":
            return args[0].astype(float) if e.is_float else args[0]
        case "where":
            return np.where(args[0], args[1], args[2])
    return np.asarray(_NUMPY[e.op](*args))


def no_key_rule(a: Attention) -> str:
    """What the model computes for a row all of whose keys are masked, found by running its row program on one.

    "nan"; "uniform" (the mean over all keys); "zero"; "never" (no mask can empty a row); "unmasked" (an additive
    fill that is too small to drown the scores, or a fill the row rule shifts away: the row attends as if unmasked).
    Only masks that stand in the terms count: a float tensor that is added is a bias.
    """
    table = {e: _masked(e) for e in ex.walk(*(r.body for r in a.row), a.weight) if _is_mask(e, a.key)}
    if not table:
        return "never"
    keys = {n.out.tensor: np.array([0.3, -0.7]) for n in a.products}
    values: dict[str, object] = dict(keys)
    known: dict[Expr, object] = {ex.index(a.key): np.array([0, 1])}
    for r in a.row:
        body = np.broadcast_to(number(_drop(r.body, table), values, known), (2,))
        assert r.op is not None
        values[r.out.tensor] = _REDUCE[r.op](body)
    weight = np.broadcast_to(number(_drop(a.weight, table), values, known), (2,))
    with np.errstate(all="ignore"):
        values[a.contraction.out.tensor] = np.sum(weight * np.array([1.0, 3.0]))
    out = float(number(a.finish, values))
    if np.isnan(out):
        return "nan"
    if out == 0.0:
        return "zero"
    return "uniform" if weight[0] == weight[1] else "unmasked"


def _drop(term: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace masks from the inside out, so that nested masks all take their masked side."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e not in table:
            return None
        return args[1] if table[e] is e.args[1] else args[2]

    return ex.rebuild(term, rule)


def _is_mask(e: Expr, key: str) -> bool:
    return e.op == "where" and key in e.args[0].ranks and (e.args[1].is_const or e.args[2].is_const)


def _masked(e: Expr) -> Expr:
    """The side of a `where` that a masked key takes: the constant one, the smaller of two."""
    _, x, y = e.args
    if x.is_const and y.is_const:
        return x if x.value < y.value else y
    return x if x.is_const else y


# --- for display ------------------------------------------------------------------------------------------------


def kind(a: Attention) -> str:
    """A word for the row rule. For people to read; no code depends on it."""
    above = [e for e in ex.walk(a.weight) if a.key in e.ranks and e not in set(ex.walk(a.score))]
    ops = {e.op for e in above}
    sums = any(r.op == "add" for r in a.row)
    if ops & {"exp", "exp2"}:
        return "softmax" if sums else "exp"
    for op in ("sigmoid", "softplus", "relu", "tanh", "sin", "cos"):
        if op in ops:
            return op
    if "pow" in ops or any(e.op == "mul" and e.args[0] is e.args[1] for e in above):
        return "power"
    return "linear" if not ops - {"mul", "div", "cast", "neg", "where"} else "pointwise"


def traits(a: Attention) -> frozenset[str]:
    """Words for what stands in the terms. For people to read; no code depends on them."""
    out: set[str] = set()
    terms = list(ex.walk(a.score))
    products = {e.out.tensor for e in a.products}
    keyed = [f for e in a.products for f in factors(e.body)[0] if a.key in f.ranks]
    if any(i.op == "floordiv" for f in keyed for x in ex.loads(f) for i in x.args):
        out.add("gqa")
    bounds = {_side(e, a) for e in terms if e.op in ("lt", "le", "gt", "ge")}
    if bounds & {"upper", "lower"}:
        out.add("causal" if bounds & {"upper"} else "window")
    if {"upper", "lower"} <= bounds:
        out.add("window")
    for e in terms:
        if e.op == "tanh":
            out.add("softcap")
        if e.op == "load" and str(e.attr) not in products and a.key in e.ranks:
            out.add("mask" if e.dtype == "b1" else "bias" if e.is_float else "ids")
        if e.op == "mul" and _slope(e, a):
            out.add("alibi")
    if any(e.op == "load" and str(e.attr) not in products | a.row_names for e in _row_loads(a)):
        out.add("sink")
    if a.prelude:
        out.add("prelude")
    size = {n: a.cascade.rank[n].size for n in (a.query, a.key)}
    if size[a.query] == 1:
        out.add("decode")
    elif size[a.query] != size[a.key] and not bounds:
        out.add("cross")
    return frozenset(out)


def _row_loads(a: Attention) -> list[Expr]:
    """Loads without the key that meet row tensors, in row reductions, weight or epilogue."""
    out: list[Expr] = []
    for t in (*(r.body for r in a.row), a.weight, a.finish):
        for e in ex.walk(t):
            if e.op in ("max", "add") and a.key not in e.ranks and _reading(e, a.row_names):
                out += [x for x in ex.loads(e) if x.ranks.isdisjoint([a.value]) and x.is_float]
    return out


def _side(e: Expr, a: Attention) -> str:
    """Which side of the keys a comparison of key and query bounds, at a coordinate-only term."""
    if not {a.key, a.query} <= e.ranks or ex.loads(e):
        return ""
    small, large = e.args if e.op in ("lt", "le") else e.args[::-1]
    at = [number(small - large, {}, {ex.index(a.key): k, ex.index(a.query): q}) for k, q in ((0, 0), (9, 0), (0, 9))]
    return "upper" if at[1] > at[0] else "lower" if at[2] > at[0] else ""


def _slope(e: Expr, a: Attention) -> bool:
    """A product of the key's distance and something that varies over the batch ranks."""
    for x, y in (e.args, e.args[::-1]):
        if a.key in x.ranks and not ex.loads(x) and y.ranks <= set(a.batch) and not y.is_const:
            return True
    return False
