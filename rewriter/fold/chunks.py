"""A loop over chunks of tokens, read back as the recurrence over tokens that it computes.

    chunk   S' = e^G[C−1] S + Σ_m K_m e^(G[C−1]−G[m]) n_m,   n = (I + A)⁻¹ (X − W e^G S),   G the running sum of g in a chunk
            O_i = Q_i e^G[i] S + Σ_{m≤i} (Q_i · K_m) e^(G[i]−G[m]) n_m,   A_ij = (W_i · K_j) e^(G[i]−G[j]) for j < i
    token   S_t = e^g_t S_{t−1} + K_t (X_t − e^g_t W_tᵀ S_{t−1})ᵀ,         O_t = Q_tᵀ S_t

Multiplied out, a chunk is a sum of products of reads. K, X, W, Q and G are read off some of them; the others, and A, must
then be what these say, factor by factor. Where one differs the loop stays one over chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count, pairwise

import numpy as np
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, verify
from ...patterns.expr import Expr
from ...patterns.recurrence.expand import Expansion, StateProduct, product_of
from ...patterns.recurrence.powers import Powers
from ...patterns.recurrence.recurrence import Recurrence, recurrence
from ...patterns.verdict import Obstacle
from ..graph.aliases import Aliases
from ..graph.node import CannotLift, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.rules import RULES
from .recurrences import STEP, FoundScan
from .running import SUMS, place_sum
from .solutions import SOLVED, Solving
from .substitution import inverses
from .within import Within, table

SPLITS = frozenset(("view", "reshape", "unflatten", "_unsafe_view"))
# Coordinates in the products that are compared: the token that reads, the one whose n is read, the one behind the system;
# the rank of a product of rows, and the one by which the state is read.
READS, ADDS, SOLVES, DOT, INNER = "i'", "m'", "j'", "d'", "r'"
# In front of a token's place in its chunk: its coordinate among all tokens.
AT = "@"
# The solution of a triangular system, and where it is read.
Solved = tuple[str, tuple[Expr, ...]]


class Differs(Exception):
    """What a chunk computes is not what the tokens of a recurrence would."""


@dataclass(frozen=True)
class ChunkProduct:
    """One product of a chunk. `factors` read tokens at `@place`, exponents the running sum at (place, key).

    `spans`: the places between which sums were written, whose difference they are where the first is not before the other.
    """

    sign: int
    factors: Counter[Expr]
    exponents: Counter[tuple[Expr, Expr]]
    keeps: tuple[Expr, ...]
    solved: Solved | None
    reads_state: bool
    spans: frozenset[tuple[Expr, Expr]] = frozenset()


@dataclass(frozen=True)
class TokenParts:
    """What the tokens of a recurrence read and add, at the token `@` and the key `κ`."""

    keys: Counter[Expr]
    values: Counter[Expr]
    queries: Counter[Expr]
    taken: Counter[Expr] | None


def over_tokens(f: FoundScan, graph: fx.Graph, aliases: Aliases) -> FoundScan | Obstacle:
    """The recurrence over tokens of a loop over chunks, or where it differs from one."""
    if len(f.recurrence.states) != 1 or len(f.recurrence.outputs) != 1:
        return Obstacle("its chunks carry more than one state, or give more than one result")
    if not split(f.tensors.values(), f.steps)[0]:
        return Obstacle("nothing over all tokens is split into its chunks")
    try:
        return _Chunks(f, graph, aliases).found()
    except (Differs, CannotLift) as no:
        return Obstacle(str(no))


def split(inputs: Iterable[fx.Node], count: int) -> tuple[dict[fx.Node, int], set[fx.Node]]:
    """The tensors over all tokens that are split into `count` chunks on the way to the inputs of a loop, and that way.

    Each with its dimension of the tokens.
    """
    out: dict[fx.Node, int] = {}
    seen, stack = set[fx.Node](), list(inputs)
    while stack:
        n = stack.pop()
        if n in seen or n.op != "call_function":
            continue
        seen.add(n)
        source = n.args[0] if n.args else None
        if op_name(n) in SPLITS and isinstance(source, fx.Node):
            at = _splits(shape_of(tensor_of(source)), n, count)
            if at is not None:
                out[source] = at
                continue
        stack += n.all_input_nodes
    return out, seen


def _splits(before: tuple[object, ...], n: fx.Node, count: int) -> int | None:
    """The dimension that is split in two, of which the first has so many."""
    after = shape_of(tensor_of(n))
    at = next((d for d, (a, b) in enumerate(zip(before, after)) if a != b), len(before))
    cut = (*before[:at], *after[at : at + 2], *before[at + 1 :])
    whole = before[at] if at < len(before) else 0
    fits = len(after) == len(before) + 1 and cut == after and after[at] == count
    return at if fits and count * int(str(after[at + 1])) == whole else None


class _Chunks:
    def __init__(self, f: FoundScan, graph: fx.Graph, aliases: Aliases) -> None:
        self.f, self.c = f, f.recurrence.cascade
        (self.state,), (self.output,) = f.recurrence.states, f.recurrence.outputs
        self.sources, way = split(f.tensors.values(), f.steps)
        solved = {x.node: x for x in inverses(way, graph, aliases)}
        self.lifter = Within(graph, aliases, RULES, {*self.sources, *solved})
        self.lifter.ranks.update({r.name: r.size for r in self.c.ranks})
        self.normal = Solving(self._produced, self._opened, self.lifter, solved)
        self.size = 0
        self.key = self.value = ""
        self.decay: Expr | None = None
        self.alias: dict[str, str] = {}

    # terms

    def _produced(self, tensor: str) -> Einsum | None:
        made = self.c.producers.get(tensor, ())
        if made:
            return made[0] if len(made) == 1 else None
        return next((e for e in self.lifter.einsums if e.out.tensor == tensor), None)

    def _opened(self, e: Expr) -> Expr:
        """A term with what the loop reads, and operands of products, as what they are made of."""
        table: dict[Expr, Expr] = {}
        for x in ex.loads(e):
            node = self.f.tensors.get(str(x.attr))
            if node is not None:
                table[x] = self.lifter.value(node, x.args)
        return self.lifter.opened(ex.substitute(e, table) if table else e)

    def _expanded(self, e: Expr) -> list[StateProduct]:
        out = Expansion(self.c, self.state.name).of(e)
        if out is None:
            raise Differs("a chunk is not linear in its state")
        return out

    def _powers(self, p: StateProduct) -> Powers:
        out = self.normal.of(*p.factors)
        return replace(out, sign=out.sign * p.sign, over=out.over | p.over)

    # the comparison

    def found(self) -> FoundScan:
        own, plain, taken = self._sorted(self.state.step.body)
        read = self._expanded(self.output.body)
        if self.f.steps == 1:
            self.size = self._summed(own)
        self._ranks(plain, read)
        self.decay = self._decay(own)
        row = self._row()
        step = [self._form(p, "") for p in (plain, taken) if p is not None]
        given = [self._form(p, row) for p in read]
        roles = self._roles(step[0], step[1] if taken else None, given)
        self._agree(roles, step, given)
        return self._made(roles, row)

    def _sorted(self, e: Expr) -> tuple[StateProduct | None, StateProduct, StateProduct | None]:
        """The products of a step: with an element's own past, without the state, with others' past."""
        own, plain, taken = list[StateProduct](), list[StateProduct](), list[StateProduct]()
        before = (*self.state.step.out.index[:-1], ex.index(STEP))
        for p in self._expanded(e):
            x = p.state(self.state.name)
            (plain if x is None else own if x.args == before and not p.over else taken).append(p)
        if len(own) != 1 or len(plain) != 1 or len(taken) > 1:
            raise Differs("a chunk changes its state by more than one product")
        return own[0], plain[0], taken[0] if taken else None

    def _ranks(self, plain: StateProduct, read: list[StateProduct]) -> None:
        """The matrix's ranks: products with the state sum over its key."""
        keys: set[str] = set()
        for p in read:
            x = p.state(self.state.name)
            if x is not None:
                if x.args[-1] is not ex.index(STEP):
                    raise Differs("a chunk reads its state after it has changed it")
                own = [(a, b) for a, b in zip(x.args[:-1], self.state.step.out.index[:-1]) if a.op == b.op == "index"]
                keys |= {str(b.attr) for a, b in own if a.attr in p.over}
                # what a chunk gives may name the state's ranks otherwise
                self.alias |= {str(a.attr): str(b.attr) for a, b in own if a.attr not in p.over}
        if len(keys) != 1 or len(set(self.alias.values())) != len(self.alias):
            raise Differs("no single rank of the state is contracted")
        (self.key,) = keys
        made = self._powers(plain)
        for x in made.factors:
            if self.key in x.ranks:
                self.size = self.size or self._chunk(x, made)
        along = [r for r in self.state.ranks if r != self.key and any(r in x.ranks for x in made.factors)]
        apart = [r for r in along if not any(r in x.ranks and self.key in x.ranks for x in made.factors)]
        if not self.size or not apart:
            raise Differs("what a chunk adds is no product of its tokens' keys and values")
        self.value = apart[-1]

    def _chunk(self, x: Expr, p: Powers) -> int:
        """The tokens of a chunk, by the coordinate at which one is read: t · C + m."""
        for y in ex.walk(x):
            if y.op == "add" and y.args[0].op == "mul" and y.args[0].args[0] is ex.index(STEP):
                size, at = y.args[0].args[1], y.args[1]
                if size.op == "const" and at.op == "index" and at.attr in p.over:
                    return int(size.value)
        return 0

    def _decay(self, own: StateProduct | None) -> Expr | None:
        """The running sum at the end of a chunk, whose exponential is the decay of the whole."""
        assert own is not None
        p = self.normal.of(*own.without(own.state(self.state.name)))
        if p.sign * own.sign != 1 or p.factors or p.keeps or p.over or len(p.exponents) > 1:
            raise Differs("the decay of a chunk is no exponential of a running sum")
        return self._running(next(iter(p.exponents)))[0] if p.exponents else None

    def _summed(self, own: StateProduct | None) -> int:
        """The tokens of a single chunk, by what is summed up in it."""
        assert own is not None
        p = self.normal.of(*own.without(own.state(self.state.name)))
        sums = [place_sum(self.lifter, e, self._opened) for e in p.exponents]
        return next((x.size for x in sums if x is not None), 0)

    def _running(self, e: Expr) -> tuple[Expr, Expr, Expr, Expr | None]:
        """What is summed up in a chunk, at the token `@`, the place that is read, the key there, whose sum is left out."""
        found = place_sum(self.lifter, e, self._opened)
        if found is None or found.size != self.size:
            raise Differs("an exponent is no running sum over the tokens of a chunk")
        left = {str(i.attr) for i in found.others if i.op == "index"}
        keys = sorted(left & {self.key, DOT, INNER})
        key = ex.index(keys[0]) if keys else ex.const(0)
        names = {ex.index(AT + SUMS): ex.index(AT), **({key: ex.index("κ")} if keys else {})}
        return ex.substitute(self._token(found.term, {SUMS}), names), found.upto, key, found.behind

    def _token(self, e: Expr, places: Iterable[str]) -> Expr:
        """A term whose tokens are read by their coordinate among all."""
        out = ex.substitute(e, {self._of_chunk(x): ex.index(AT + x) for x in places})
        if {STEP, *places} & out.ranks:
            raise Differs("a token is read by its place in its chunk")
        return out

    def _form(self, p: StateProduct, row: str) -> ChunkProduct:
        """A product of a chunk with its coordinates named by what they are. `row`: the token that reads, of an output."""
        made, state = self._powers(p), p.state(self.state.name)
        names = {**self.alias, row: READS} if row else {}
        solved = [x for x in made.factors if x.op == "load" and str(x.attr).startswith(SOLVED)]
        if len(solved) > 1:
            raise Differs("a chunk is solved for twice")
        if solved:
            names |= {str(solved[0].args[-2].attr): ADDS, str(solved[0].args[-1].attr): SOLVES}
        if state is not None:
            names |= {str(i.attr): INNER for i in state.args if i.op == "index" and i.attr in p.over}
        tokens = {i for f in made.factors for x in ex.loads(f) if (i := self._coordinate(x)) is not None}
        for r in made.over - set(names):
            names[r] = ADDS if self._of_chunk(r) in tokens else DOT
        if len(set(names.values())) != len(names) or not made.over <= set(names):
            raise Differs("a chunk sums over more than its tokens and their keys")
        table = {ex.index(a): ex.index(b) for a, b in names.items()}
        at = None if not solved else (str(solved[0].attr), tuple(ex.substitute(i, table) for i in solved[0].args[:-2]))
        return self._named(made, names, {state, *solved}, at, state is not None)

    def _coordinate(self, x: Expr) -> Expr | None:
        """The coordinate of the token that is read, where a read is of a tensor over all tokens."""
        node = self.lifter.leaves.get(str(x.attr))
        return x.args[self.sources[node]] if node in self.sources else None

    def _of_chunk(self, place: str) -> Expr:
        """The coordinate of a chunk's token among all; of one chunk, it is its place."""
        within = ex.index(place)
        return within if self.f.steps == 1 else ex.index(STEP) * ex.const(self.size) + within

    def _named(
        self, made: Powers, names: dict[str, str], apart: set[Expr | None], solved: Solved | None, reads_state: bool
    ) -> ChunkProduct:
        table = {ex.index(a): ex.index(b) for a, b in names.items()}
        places = set(names.values()) & {READS, ADDS, SOLVES}
        factors: Counter[Expr] = Counter()
        for x, n in made.factors.items():
            if x not in apart:
                factors[self._token(ex.substitute(x, table), places)] += n
        exponents: Counter[tuple[Expr, Expr]] = Counter()
        spans: set[tuple[Expr, Expr]] = set()
        for x, n in made.exponents.items():
            running, place, key, behind = self._running(ex.substitute(x, table))
            if running is not self.decay:
                raise Differs("a product of a chunk fades otherwise than its state")
            exponents[place, key] += n
            if behind is not None:
                spans.add((place, behind))
                exponents[behind, key] -= n
        keeps = tuple(ex.substitute(x, table) for x in made.keeps)
        exponents = Counter({x: n for x, n in exponents.items() if n})
        return ChunkProduct(made.sign, factors, exponents, keeps, solved, reads_state, frozenset(spans))

    def _roles(self, added: ChunkProduct, taken: ChunkProduct | None, read: list[ChunkProduct]) -> TokenParts:
        keys = Counter({x: n for x, n in added.factors.items() if self.key in x.ranks})
        behind = SOLVES if added.solved else ADDS
        if taken is not None and keys - taken.factors:
            raise Differs("what a chunk takes off is no multiple of what it adds")
        if (added.solved is None) != (taken is None):
            raise Differs("what a chunk adds and what it takes off are not solved for together")
        inter = [x for x in read if x.reads_state and x.solved is None]
        if len(inter) != 1:
            raise Differs("a chunk reads the state before it more than once, or never")
        rest = None if taken is None else _at(taken.factors - keys, SOLVES, INNER)
        values, queries = _at(added.factors - keys, behind, ""), _at(inter[0].factors, READS, INNER)
        roles = TokenParts(_at(keys, ADDS, self.key), values, queries, rest)
        own = {AT, "κ", *self.state.ranks} - {self.key}
        rows = [*roles.keys, *queries, *(rest or ())]
        if any(x.ranks - own for x in (*rows, *values)):
            raise Differs("a factor of a chunk reads another token than its own")
        if any(self.value in x.ranks for x in rows):
            raise Differs("a row of a chunk varies along the values")
        return roles

    def _agree(self, roles: TokenParts, step: list[ChunkProduct], read: list[ChunkProduct]) -> None:
        """Whether all products of a chunk are what the roles say."""
        solved = step[0].solved
        end = ex.const(self.size - 1)
        add = _to(roles.values, SOLVES if solved else ADDS, "")
        keys, pairs = _to(roles.keys, ADDS, self.key), _to(roles.queries, READS, DOT) + _to(roles.keys, ADDS, DOT)
        fades = self._fades((end, self.key, 1), (ADDS, self.key, -1))
        pair = self._fades((READS, DOT, 1), (ADDS, DOT, -1))
        wanted = [ChunkProduct(1, keys + add, fades, (), solved, False)]
        out = [
            ChunkProduct(1, _to(roles.queries, READS, INNER), self._fades((READS, INNER, 1)), (), None, True),
            ChunkProduct(1, pairs + add, pair, (), solved, False),
        ]
        if roles.taken is not None:
            off, old = _to(roles.taken, SOLVES, INNER), self._fades((SOLVES, INNER, 1))
            wanted.append(ChunkProduct(-1, keys + off, _sum(fades, old), (), solved, True))
            out.append(ChunkProduct(-1, pairs + off, _sum(pair, old), (), solved, True))
        self._equal(step, wanted, pairs)
        self._equal(read, out, pairs)
        if solved is not None and roles.taken is not None:
            self._system(solved, _to(roles.taken, READS, DOT) + _to(roles.keys, ADDS, DOT), pair)

    def _fades(self, *at: tuple[str | Expr, str, int]) -> Counter[tuple[Expr, Expr]]:
        """Running sums of the decay at places, each so many times."""
        if self.decay is None:
            return Counter()
        each = "κ" in self.decay.ranks
        return Counter({
            (ex.index(x) if isinstance(x, str) else x, ex.index(key) if each else ex.const(0)): n for x, key, n in at
        })

    def _equal(self, got: list[ChunkProduct], wanted: list[ChunkProduct], pairs: Counter[Expr]) -> None:
        left = list(wanted)
        for x in got:
            same = [w for w in left if replace(x, keeps=(), spans=frozenset()) == w]
            if not same:
                raise Differs("a product of a chunk is not what its tokens would compute")
            left.remove(same[0])
            if pairs - x.factors:
                if x.keeps or any(upto is not ex.const(self.size - 1) for upto, _ in x.spans):
                    raise Differs("a chunk leaves tokens out")
            else:
                self._keeps(x.keeps, 0)
                self._ordered(x.spans)
        if left:
            raise Differs("a product of the tokens is missing in a chunk")

    def _system(self, solved: Solved, wanted: Counter[Expr], fades: Counter[tuple[Expr, Expr]]) -> None:
        """Whether the system's matrix is (W_i · K_j) e^(G[i]−G[j]) for j < i."""
        system = self.normal.systems[solved[0]]
        self.lifter.ranks.update({READS: self.size, ADDS: self.size})
        made = self.normal.of(self.lifter.value(system.node, (*solved[1], ex.index(READS), ex.index(ADDS))))
        names = dict.fromkeys(made.over, DOT) | {READS: READS, ADDS: ADDS}
        form = self._named(made, names, set(), None, False)
        if len(made.over) != 1 or (form.sign, form.factors, form.exponents) != (-1 if system.whole else 1, wanted, fades):
            raise Differs("the system of a chunk is not that of its tokens")
        # a solver reads the strictly lower triangle alone, an inverse row by row the whole matrix
        self._keeps(form.keeps, -1, upper=system.whole)
        self._ordered(form.spans)

    def _ordered(self, spans: frozenset[tuple[Expr, Expr]]) -> None:
        """Whether sums between two places are between a token and one before it."""
        if spans - {(ex.index(READS), ex.index(ADDS))}:
            raise Differs("a running sum ends before it begins")

    def _keeps(self, keeps: tuple[Expr, ...], diagonal: int, *, upper: bool = True) -> None:
        """Whether a matrix of pairs is kept up to a diagonal, and nowhere else; `upper`: whether somebody reads the rest."""
        kept = np.ones((self.size, self.size), bool)
        for k in keeps:
            values = table(k, READS, ADDS, self.size)
            if values is None:
                raise Differs("which tokens a token reads depends on data")
            kept &= values.astype(bool)
        read = kept if upper else np.tril(kept, diagonal)
        if (read != np.tril(np.ones_like(kept), diagonal)).any():
            raise Differs("a token of a chunk reads others than those up to itself")

    # the token form

    def _row(self) -> str:
        """The rank of the tokens of a chunk, in what a chunk gives."""
        index = self.output.out.index
        if self.f.steps == 1:
            ranks = [str(i.attr) for i in index if i.op == "index" and i.attr not in (STEP, *self.alias)]
            rows = [r for r in ranks if self.c.rank[r].size == self.size]
            if len(ranks) != 1 or not rows:
                raise Differs("a chunk does not give its tokens side by side")
            return rows[0]
        t = ex.index(STEP)
        beside = [b for a, b in pairwise(index) if a is t and b.op == "index"]
        whole = t * ex.const(self.size)
        within = [i.args[1] for i in index if i.op == "add" and i.args[0] is whole and i.args[1].op == "index"]
        rows = [str(x.attr) for x in (*beside, *within) if x.attr not in self.alias]
        if len(rows) != 1 or self.c.rank[rows[0]].size != self.size:
            raise Differs("a chunk does not give its tokens side by side")
        return rows[0]

    def _made(self, roles: TokenParts, row: str) -> FoundScan:
        s, t = self.state, ex.index(STEP)
        tokens = self.f.steps * self.size
        at, inner, dtype = s.step.out.index[:-1], f"{self.key}_", self.c.tensor[s.name].dtype
        first = next(e for e in self.c.producers[s.name] if e is not s.step)
        given = {x: n for x, n in self.f.tensors.items() if any(str(y.attr) == x for y in first.reads)}
        fresh = (name for k in count(1) if (name := f"X{k}") not in given)
        names: dict[str, str] = {}

        def term(factors: Counter[Expr], key: str, decayed: bool = False) -> Expr:
            each = [*factors.elements(), *([ex.exp(self.decay)] if decayed and self.decay is not None else [])]
            e = ex.substitute(product_of(tuple(each)), {ex.index(AT): t, ex.index("κ"): ex.index(key)})
            found = {x: names.get(str(x.attr)) or names.setdefault(str(x.attr), next(fresh)) for x in ex.loads(e)}
            return ex.substitute(e, {x: ex.load(n, x.args, x.dtype) for x, n in found.items()})

        def read(name: str, query: Expr, when: Expr) -> tuple[Einsum, Tensor, Expr]:
            other = ex.substitute(ex.load(s.name, (*at, when), dtype), {ex.index(self.key): ex.index(inner)})
            kept = [r for r in s.ranks if r != self.key]
            out = Access(name, (*map(ex.index, kept), t))
            shape = (*(self.c.rank[r].size for r in kept), tokens)
            return Einsum(out, other * query, "add", (inner,)), Tensor(name, shape, dtype), ex.load(name, out.index, dtype)

        einsums, made = [first], [replace(self.c.tensor[s.name], shape=(*self.c.tensor[s.name].shape[:-1], tokens + 1))]
        added = term(roles.values, "")
        if roles.taken is not None:
            e, tensor, off = read("R", term(roles.taken, inner, True), t)
            einsums, made, added = [*einsums, e], [*made, tensor], added - off
        own = ex.load(s.name, (*at, t), dtype) * term(Counter(), self.key, True)
        einsums.append(Einsum(s.step.out, own + term(roles.keys, self.key) * added))
        e, tensor, value = read("Q", term(roles.queries, inner), t + ex.const(1))
        index, shape = self._merged(row, tokens)
        name = self.output.out.tensor
        einsums += [e, Einsum(Access(name, index), value)]
        made += [tensor, Tensor(name, shape, self.c.tensor[name].dtype)]
        nodes = {**given, **{n: self.lifter.leaves[x] for x, n in names.items()}}
        made += [Tensor(x, shape_of(tensor_of(n)), dtype_of(n)) for x, n in nodes.items()]
        ranks = (
            Rank(STEP, tokens, True), *(self.c.rank[r] for r in s.ranks), Rank(inner, self.c.rank[self.key].size),
        )
        c = verify(Cascade("recurrence", ranks, tuple(made), tuple(einsums), self.c.outputs))
        seen = recurrence(c)
        assert isinstance(seen, Recurrence), seen
        return replace(self.f, recurrence=seen, tensors=nodes)

    def _merged(self, row: str, tokens: int) -> tuple[tuple[Expr, ...], tuple[int, ...]]:
        """Where a token's value stands in what the chunks give, chunks and their tokens in one dimension."""
        t, size = ex.index(STEP), ex.const(self.size)
        if self.f.steps == 1:
            table = {t: ex.const(0), ex.index(row): t, **{ex.index(a): ex.index(b) for a, b in self.alias.items()}}
            whole = tuple(int(str(n)) for n in self.c.tensor[self.output.out.tensor].shape)
            return tuple(ex.substitute(i, table) for i in self.output.out.index), whole
        index = [i for i in self.output.out.index if i is not ex.index(row)]
        shape = [tokens if i is t or i is t * size + ex.index(row) else s for i, s in zip(index, self._sizes(row))]
        table = {t * size + ex.index(row): t, **{ex.index(a): ex.index(b) for a, b in self.alias.items()}}
        return tuple(ex.substitute(i, table) for i in index), tuple(shape)

    def _sizes(self, row: str) -> list[int]:
        sizes = zip(self.output.out.index, self.c.tensor[self.output.out.tensor].shape)
        return [int(str(n)) for i, n in sizes if i is not ex.index(row)]


def _at(factors: Counter[Expr], place: str, key: str) -> Counter[Expr]:
    """Factors by the token `@` and the key `κ`."""
    return _to(factors, "", "κ", AT + place, key)


def _to(factors: Counter[Expr], place: str, key: str, token: str = AT, own: str = "κ") -> Counter[Expr]:
    """Factors at another token and key."""
    table = {ex.index(token): ex.index(AT + place), ex.index(own): ex.index(key)}
    return Counter({ex.substitute(x, table): n for x, n in factors.items()})


def _sum(a: Counter[tuple[Expr, Expr]], b: Counter[tuple[Expr, Expr]]) -> Counter[tuple[Expr, Expr]]:
    """Counts added up, negative ones among them."""
    out = Counter(a)
    out.update(b)
    return out
