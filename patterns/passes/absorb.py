"""Absorbed latents: keys and values that are linear maps of a narrower tensor are never made.

    expanded   K[h,e,m] = Σ_c C[m,c]·W[h,e,c];   QK = Σ_e Q·K;      V[h,f,m] = Σ_k C[m,k]·U[h,f,k];   O = Σ_m A·V
    absorbed   QL[h,p,c] = Σ_e Q·W;   QK = Σ_c QL·C;                OL[h,p,k] = Σ_m A·C;   O[h,p,f] = Σ_k OL·U
    sliced     C in g slices: QK[g], A[g], OL[g] each of its own, O = Σ_g,k OL·U           another function: g softmaxes

Only sums of products are re-associated, so that the absorbed cascade computes what the expanded one does. Keys may join
several parts along e (a part that all heads share, such as rotated positions, stays as it is) and carry a bias; values
may be padded. Nothing is known here of models: what is a map is read off the Einsums.
Sources: DeepSeek-V2 (MLA); "Hardware-Efficient Attention for Fast Decoding" (GLA); "TPLA", equations 1 to 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from .. import expr as ex
from ..attention.score import factors
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ..expr import Expr
from ..verdict import Obstacle


@dataclass(frozen=True)
class Absorbed:
    """A cascade over latents. `keys` are the ranks of latent channels in scores, `values` the one in the output."""

    cascade: Cascade
    keys: tuple[str, ...]
    values: str


class _NotLinear(Exception):
    """Carries a reason to the one place that catches it."""


def absorb(c: Cascade, key: str, query: str, *, expand: bool = False) -> Absorbed | Obstacle:
    """The absorbed form of a cascade that makes keys or values of another tensor along rank `key`, or why there is none.

    What a map multiplies tokens with varies over neither `key` nor `query`. With `expand`, keys and values are made after
    all, each part of just the width that is read: what the model's own code computes from the latents.
    """
    try:
        return _Absorbing(c, key, query, expand).result()
    except _NotLinear as no:
        return Obstacle(str(no))


def weighted(c: Cascade, key: str, query: str) -> frozenset[str]:
    """The ranks that index the weights of a cascade's maps: heads and their groups, never sequences."""
    found = _Absorbing(c, key, query, False)
    sides = [f for e in found.maps.values() for f in factors(e.body)[0] if key not in f.ranks]
    return frozenset[str]().union(*(f.ranks for f in sides))


@dataclass(frozen=True)
class _Map:
    """Σ_rank tokens·weights: one factor has the key, the other has not."""

    tokens: Expr
    weights: Expr
    rank: str


class _Absorbing:
    def __init__(self, c: Cascade, key: str, query: str, expand: bool) -> None:
        self.c, self.key, self.query, self.expand = c, key, query, expand
        self.ranks: dict[str, Rank] = dict(c.rank)
        self.tensors: dict[str, Tensor] = dict(c.tensor)
        self.einsums: list[Einsum] = []
        self.maps = {e.out.tensor: e for e in c.einsums if self.is_map(e)}
        self.keys: list[str] = []
        self.values = ""

    def is_map(self, e: Einsum) -> bool:
        """Σ_c tokens·weights of two inputs, kept along the key."""
        above, below = factors(e.body)
        plain = e.op == "add" and len(e.over) == 1 and not below and all(i.op == "index" for i in e.out.index)
        if not plain or len(above) != 2 or self.key in e.over or any(str(x.attr) in self.c.producers for x in e.reads):
            return False
        return sum(self.key in f.ranks for f in above) == 1 and any(self.static(f) for f in above)

    def static(self, f: Expr) -> bool:
        return not f.ranks & {self.key, self.query}

    def result(self) -> Absorbed:
        for e in self.c.einsums:
            read = [f for f in factors(e.body)[0] if self.mapped(f)]
            if not read:
                if self.mapped(e.body):
                    made = ", ".join(sorted(self.mapped(e.body)))
                    raise _NotLinear(f"{e.out} reads {made} in other ways than as a factor")
                self.einsums.append(e)
            elif len(read) > 1 or e.op != "add":
                raise _NotLinear(f"{e.out} is no sum of products with one map of latents")
            elif self.key in e.over:
                self.contract(e, read[0])
            else:
                self.score(e, read[0])
        if not self.keys and not self.values:
            raise _NotLinear("no keys or values are linear maps of another tensor")
        return Absorbed(verify(_pruned(self.c, self.ranks, self.tensors, self.einsums)), tuple(self.keys), self.values)

    def mapped(self, term: Expr) -> set[str]:
        return {str(x.attr) for x in ex.loads(term)} & set(self.maps)

    # scores

    def score(self, e: Einsum, f: Expr) -> None:
        """QK = Σ_e Q·(X + R)   →   QL = Σ_e Q·W; QK1 = Σ_c QL·C; QR = Σ_r Q·R; QK = QK1 + QR"""
        if len(e.over) != 1:
            raise _NotLinear(f"{e.out} reduces {len(e.over)} ranks; the one of keys and queries is one")
        (rank,) = e.over
        rest = _others(e.body, f)
        dtype = self.tensors[e.out.tensor].dtype
        parts: list[Expr] = []
        for part in pieces(f, rank, self.ranks[rank].size):
            own = rank if part.whole else self.rank(rank, part.size)
            moved = {ex.index(rank): ex.index(own) + part.start}
            query = ex.substitute(rest, moved)
            for s in self.summands(_shifted(part.term, moved)):
                parts.append(self.product(e.out.tensor, query, s, own, dtype))
        if not parts:
            raise _NotLinear(f"{e.out} sums nothing")
        self.einsums.append(Einsum(e.out, reduce(lambda a, b: a + b, parts)))

    def product(self, name: str, query: Expr, s: Expr | _Map, rank: str, dtype: str) -> Expr:
        if isinstance(s, Expr):
            return self.put(name, query * s, rank, dtype)
        if rank in s.tokens.ranks:
            raise _NotLinear(f"{s.tokens} varies over {rank}, which {name} reduces: it is no latent")
        self.keys.append(s.rank)
        if self.expand:
            return self.put(name, query * self.put("K", s.tokens * s.weights, s.rank, dtype), rank, dtype)
        absorbed = self.put("QL", query * s.weights, rank, dtype)
        return self.put(name, absorbed * s.tokens, s.rank, dtype)

    # values

    def contract(self, e: Einsum, f: Expr) -> None:
        """O = Σ_m A·X   →   OL[k] = Σ_m A·C; O = Σ_k OL·U"""
        rest, dtype = _others(e.body, f), self.tensors[e.out.tensor].dtype
        free = [r for r in f.ranks if r not in rest.ranks and ex.index(r) in e.out.index]
        if len(free) != 1:
            raise _NotLinear(f"the values of {e.out} have {len(free)} ranks of their own; a value rank is one")
        found = [self.value(e, p) for p in pieces(f, free[0], self.ranks[free[0]].size)]
        maps = [m for _, m in found if m is not None]
        if not maps or any(m.tokens is not maps[0].tokens for m in maps):
            raise _NotLinear(f"the values of {e.out} are not made of one latent")
        tokens, rank = maps[0].tokens, maps[0].rank
        if free[0] in tokens.ranks:
            raise _NotLinear(f"{tokens} varies over {free[0]}: it is no latent")
        weights = found[-1][1].weights if found[-1][1] is not None else ex.const(0.0, tokens.dtype)
        for end, m in reversed(found[:-1]):
            own = m.weights if m is not None else ex.const(0.0, weights.dtype)
            weights = ex.where(ex.index(free[0]) < end, own, weights)
        self.values = rank
        if self.expand:
            made = self.put("V", tokens * weights, rank, dtype)
            self.einsums.append(Einsum(e.out, rest * made, "add", (self.key,)))
            return
        latent = self.put("OL", rest * tokens, self.key, dtype)
        self.einsums.append(Einsum(e.out, latent * weights, "add", (rank,)))

    def value(self, e: Einsum, p: Piece) -> tuple[int, _Map | None]:
        own = self.summands(p.term)
        if not own:
            return p.start + p.size, None
        (first, *more) = own
        if more or not isinstance(first, _Map):
            what = "a bias" if any(isinstance(s, Expr) and self.key not in s.ranks for s in own) else "a part of their own"
            raise _NotLinear(f"the values of {e.out} have {what} beside the map: their share is a sum of its own")
        return p.start + p.size, first

    # terms

    def summands(self, term: Expr) -> list[Expr | _Map]:
        """A sum of maps, other tensors and biases; casts are looked through."""
        match term.op:
            case "cast":
                return self.summands(term.args[0])
            case "add":
                return [s for a in term.args for s in self.summands(a)]
            case "const" if term.value == 0:
                return []
            case "load":
                e = self.maps.get(str(term.attr))
                return [term] if e is None else [self.instance(e, term)]
        if not self.mapped(term):
            return [term]
        if term.op == "where" and self.key in term.args[0].ranks:
            own = sorted(self.mapped(term))
            raise _NotLinear(f"a map ({', '.join(own)}) makes the last tokens' part only: earlier tokens are there expanded")
        raise _NotLinear(f"{term} is not linear in its latent")

    def instance(self, e: Einsum, load: Expr) -> _Map:
        (old,) = e.over
        # reading one map twice at the same coordinates is reading one latent
        name = "k" if self.value_reads(load) else "c"
        rank = self.rank(name, self.ranks[old].size)
        table = {**dict(zip(e.out.index, load.args)), ex.index(old): ex.index(rank)}
        sides = [ex.substitute(f, table) for f in factors(e.body)[0]]
        tokens, weights = sorted(sides, key=lambda f: self.key not in f.ranks)
        if self.key in weights.ranks:
            raise _NotLinear(f"{load} is no product of tokens with weights")
        return _Map(tokens, weights, rank)

    def value_reads(self, load: Expr) -> bool:
        return any(self.key in e.over and load in e.reads for e in self.c.einsums)

    # names

    def rank(self, stem: str, size: Size) -> str:
        """A rank of this size that is not there yet; latent channels of the same length share one."""
        if stem == "k" and self.values and self.ranks[self.values].size == size:
            return self.values
        name, k = stem, 2
        while name in self.ranks:
            name, k = f"{stem}{k}", k + 1
        self.ranks[name] = Rank(name, size)
        if stem == "k":
            self.values = name
        return name

    def put(self, stem: str, body: Expr, over: str, dtype: str) -> Expr:
        """A new tensor Σ_over body, loaded where it is written."""
        name, k = stem, 1
        while name in self.tensors:
            name, k = f"{stem}_{k}", k + 1
        order = [r for r in self.ranks if r in body.ranks and r != over]
        # keys last: a row is what is reduced
        order.sort(key=lambda r: r == self.key)
        index = tuple(ex.index(r) for r in order)
        self.tensors[name] = Tensor(name, tuple(self.ranks[r].size for r in order), dtype)
        self.einsums.append(Einsum(Access(name, index), body, "add", (over,)))
        return ex.load(name, index, dtype)


# --- pieces ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A term over `size` coordinates of a rank from `start` on, comparisons with its ends decided."""

    start: int
    size: int
    term: Expr
    whole: bool


def pieces(term: Expr, rank: str, size: Size) -> list[Piece]:
    """A term cut where it compares a rank with numbers:  where(e < 2, x, y) over 6  →  x over 0..1, y over 2..5."""
    i = ex.index(rank)
    tests = [t for t in ex.walk(term) if t.op in ("lt", "ge") and t.args[0] is i and t.args[1].is_const]
    if not tests:
        return [Piece(0, size if isinstance(size, int) else 0, term, True)]
    if not isinstance(size, int):
        raise _NotLinear(f"rank {rank} is cut, and its size {size} has no value")
    ends = sorted({size, *(int(t.args[1].value) for t in tests if 0 < int(t.args[1].value) < size)})
    out = []
    for start, end in zip([0, *ends], ends):
        table = {t: ex.const((end <= int(t.args[1].value)) == (t.op == "lt")) for t in tests}
        out.append(Piece(start, end - start, ex.substitute(term, table), len(ends) == 1))
    return out


def _shifted(term: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Coordinates moved, and (e + n) − n carried out."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        back = e.op == "sub" and args[0].op == "add" and args[0].args[1] is args[1] and e.dtype in ex.INTEGERS
        return args[0].args[0] if back else None

    return ex.rebuild(ex.substitute(term, table), rule)


def _others(body: Expr, f: Expr) -> Expr:
    """A product without one of its factors."""
    above, below = factors(body)
    rest = list(above)
    rest.remove(f)
    if not rest:
        raise _NotLinear(f"{f} stands alone: no product")
    out = reduce(lambda a, b: a * b, rest)
    return reduce(lambda a, b: a / b, below, out)


def _pruned(c: Cascade, ranks: dict[str, Rank], tensors: dict[str, Tensor], einsums: Sequence[Einsum]) -> Cascade:
    """Without Einsums, tensors and ranks that no output needs."""
    live, kept = set(c.outputs), list[Einsum]()
    for e in reversed(einsums):
        if e.out.tensor in live:
            live |= {str(x.attr) for x in e.reads}
            kept.append(e)
    used: frozenset[str] = frozenset().union(*(e.ranks | set(e.over) for e in kept))
    return replace(
        c, einsums=tuple(reversed(kept)), ranks=tuple(r for n, r in ranks.items() if n in used),
        tensors=tuple(t for n, t in tensors.items() if n in live),
    )


# --- slices ---------------------------------------------------------------------------------------------------------


def slices(a: Absorbed, parts: int, rank: str = "g") -> Cascade | Obstacle:
    """The absorbed cascade with a row of its own for each of `parts` slices of the latent, summed in the output.

        before   QK[h,p,m] = Σ_c QL·C[m,c];  …  O = Σ_k OL[h,p,k]·U                        one softmax
        after    QK[h,p,m,g] = Σ_c QL·C[m,g·C/G + c];  …  O = Σ_g,k OL[h,p,k,g]·U           G of them: another function

    Refused where latents belong to heads, or a latent does not divide.
    """
    c = a.cascade
    if not a.keys or not a.values:
        return Obstacle("only keys or only values are made of a latent: slices need both")
    latent = dict.fromkeys((*a.keys, a.values))
    sizes: dict[str, int] = {}
    for r in latent:
        size = c.rank[r].size
        if not isinstance(size, int) or size % parts:
            return Obstacle(f"a latent of {size} channels does not divide into {parts} slices")
        sizes[r] = size // parts
    while rank in c.rank:
        rank += "_"
    return verify(_Slicing(c, a.values, sizes, parts, rank).result())


class _Slicing:
    def __init__(self, c: Cascade, values: str, sizes: dict[str, int], parts: int, rank: str) -> None:
        self.c, self.values, self.sizes, self.parts, self.rank = c, values, sizes, parts, rank
        self.carried: set[str] = set()

    def result(self) -> Cascade:
        einsums = tuple(self.einsum(e) for e in self.c.einsums)
        ranks = [replace(r, size=self.sizes[r.name]) if r.name in self.sizes else r for r in self.c.ranks]
        return replace(
            self.c, einsums=einsums, ranks=(*ranks, Rank(self.rank, self.parts)),
            tensors=tuple(self.tensor(t) for t in self.c.tensors),
        )

    def einsum(self, e: Einsum) -> Einsum:
        """Whatever is made of a slice is there once a slice, up to the sum over the values' channels."""
        body = self.moved(e.body)
        g = ex.index(self.rank)
        if self.values in e.over:
            return replace(e, body=body, over=(self.rank, *e.over))
        if self.rank not in body.ranks:
            return e
        self.carried.add(e.out.tensor)
        return replace(e, out=Access(e.out.tensor, (*e.out.index, g)), body=body)

    def moved(self, root: Expr) -> Expr:
        g = ex.index(self.rank)

        def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
            if e.op != "load":
                return None
            if str(e.attr) in self.carried:
                return ex.load(str(e.attr), (*args, g), e.dtype)
            if str(e.attr) in self.c.producers:
                return None
            table = {ex.index(r): g * n + ex.index(r) for r, n in self.sizes.items()}
            return ex.load(str(e.attr), tuple(ex.substitute(i, table) for i in e.args), e.dtype)

        return ex.rebuild(root, rule)

    def tensor(self, t: Tensor) -> Tensor:
        if t.name not in self.carried:
            return t
        out = self.c.producers[t.name][-1].out.index
        shape = tuple(self.sizes.get(str(i.attr), s) for i, s in zip(out, t.shape))
        return replace(t, shape=(*shape, self.parts))


def shared(a: Absorbed, key: str, heads: str) -> bool:
    """Whether all heads read one latent."""
    channels = {*a.keys, a.values}
    inputs = {t.name for t in a.cascade.inputs}
    read = [x for e in a.cascade.einsums for x in e.reads if key in x.ranks and channels & x.ranks]
    return not any(heads in x.ranks for x in read if str(x.attr) in inputs)
