"""A matrix that is carried under a decay and changed by one outer product a step, and what is read of it.

    S[k,v,t + 1] = f[k,t] · S[k,v,t] + u[k,t] · (x[v,t] − Σ_k w[k,t] · S[k,v,t])
    R[v,t]       = Σ_k q[k,t] · S[k,v,t or t + 1]

Linear attention, retention, gated linear attention, lightning and SSD have no w; delta rules have. Several steps of such a
state are products of matrices, however many there are: what each step adds follows from one triangular system.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .. import expr as ex
from ..cascade import Cascade, Einsum
from ..expr import Expr
from ..verdict import Obstacle
from .expand import Expansion, StateProduct, product_of
from .recurrence import Recurrence, State


@dataclass(frozen=True)
class Read:
    """What a step reads of the state into `einsum`'s tensor: Σ_key query · S, `after` the step or before it.

    `ranks`: the batch's and the value's ranks, as `einsum` names them.
    """

    einsum: Einsum
    query: Expr
    after: bool
    ranks: tuple[str, ...]


@dataclass(frozen=True)
class LowRank:
    """A state with its two matrix ranks; terms use the ranks of the state's step.

    `read` is None where nothing is taken off; with `read_faded` it reads the state under the step's own decay.
    """

    state: State
    batch: tuple[str, ...]
    key: str
    value: str
    factor: Expr
    write: Expr
    added: Expr
    read: Expr | None
    reads: tuple[Read, ...]
    read_faded: bool = False

    @property
    def ranks(self) -> tuple[str, ...]:
        return (*self.batch, self.key, self.value)


def low_rank(r: Recurrence, s: State) -> LowRank | Obstacle:
    """The matrix form of a state, or why it has none."""
    c, ranks = r.cascade, s.ranks
    if len(ranks) < 2:
        return Obstacle(f"{s.name} is no matrix")
    reads: list[Read] = []
    keys: set[int] = set()
    for e in _readers(r, s):
        found = _read(c, s, e, r.rank)
        if isinstance(found, Obstacle):
            return found
        reads.append(found[0])
        keys.add(found[1])
    terms = Expansion(c, s.name).of(s.step.body)
    if terms is None:
        return Obstacle(f"a step is not linear in {s.name}", str(s.step.out))
    own, plain, taken = _sorted(s, terms, r.rank)
    keys |= {_summed(s, p) for p in taken}
    if len(keys) != 1 or -1 in keys:
        return Obstacle(f"no single rank of {s.name} is contracted", str(s.step.out))
    if len(plain) != 1 or len(taken) > 1 or len(own) > 1:
        return Obstacle(f"a step adds more than one outer product to {s.name}", str(s.step.out))
    return _form(s, keys.pop(), own, plain[0], taken, tuple(reads))


def _form(
    s: State, at: int, own: list[StateProduct], plain: StateProduct, taken: list[StateProduct], reads: tuple[Read, ...]
) -> LowRank | Obstacle:
    key = str(s.step.out.index[at].attr)
    value = next((x for x in reversed(s.ranks) if x != key and _apart(plain, key, x)), None)
    if value is None:
        return Obstacle(f"what is added to {s.name} is no outer product", str(s.step.out))
    fades = own[0].without(own[0].state(s.name)) if own else ()
    factor = product_of(fades, own[0].sign) if own else ex.const(0.0)
    if any(r.query.ranks & {value} for r in reads):
        return Obstacle(f"a row that reads {s.name} varies along its values", str(s.step.out))
    if value in factor.ranks:
        return Obstacle(f"the decay of {s.name} differs along both ranks of the matrix", str(s.step.out))
    write = tuple(f for f in plain.factors if key in f.ranks)
    added = product_of(tuple(f for f in plain.factors if key not in f.ranks), plain.sign)
    read, faded = None, False
    if taken:
        found = _taken_off(s, key, value, write, taken[0])
        if isinstance(found, Obstacle):
            return found
        faded = bool(own) and own[0].sign == 1 and not Counter(fades) - Counter(found)
        left = tuple((Counter(found) - Counter(fades)).elements()) if faded else found
        read = product_of(left, -taken[0].sign)
    batch = tuple(x for x in s.ranks if x not in (key, value))
    return LowRank(s, batch, key, value, factor, product_of(write), added, read, reads, faded)


def _apart(plain: StateProduct, key: str, value: str) -> bool:
    """Whether no factor varies along both ranks, and each rank has one."""
    along = [(key in f.ranks, value in f.ranks) for f in plain.factors]
    return not any(a and b for a, b in along) and any(a for a, _ in along) and any(b for _, b in along)


def _taken_off(
    s: State, key: str, value: str, write: tuple[Expr, ...], p: StateProduct
) -> tuple[Expr, ...] | Obstacle:
    """The factors of w but for its sign, where u · Σ w · S is what a step takes off."""
    (inner,) = p.over
    left = list(p.without(p.state(s.name)))
    for f in write:
        if f not in left:
            return Obstacle(f"what a step takes off {s.name} is no multiple of what it adds", str(s.step.out))
        left.remove(f)
    if any(f.ranks & {key, value} for f in left):
        return Obstacle(f"what a step takes off {s.name} is not one row of it", str(s.step.out))
    return tuple(ex.substitute(f, {ex.index(inner): ex.index(key)}) for f in left)


def _sorted(
    s: State, terms: list[StateProduct], rank: str
) -> tuple[list[StateProduct], list[StateProduct], list[StateProduct]]:
    """The products with an element's own past, with none, and with others'."""
    own_read = ex.load(s.name, (*s.step.out.index[:-1], ex.index(rank)), s.step.body.dtype)
    own: list[StateProduct] = []
    plain: list[StateProduct] = []
    taken: list[StateProduct] = []
    for p in terms:
        x = p.state(s.name)
        (plain if x is None else own if x.args == own_read.args and not p.over else taken).append(p)
    return own, plain, taken


def _summed(s: State, p: StateProduct) -> int:
    """The place of the one rank that is summed in a read of the whole state; -1 where it is not so."""
    x = p.state(s.name)
    assert x is not None
    if len(p.over) != 1:
        return -1
    (inner,) = p.over
    differs = [i for i, (a, b) in enumerate(zip(x.args[:-1], s.step.out.index[:-1])) if a is not b]
    return differs[0] if len(differs) == 1 and x.args[differs[0]] is ex.index(inner) else -1


def _readers(r: Recurrence, s: State) -> list[Einsum]:
    """The Einsums by which outputs and other states read the state."""
    c, out = r.cascade, list[Einsum]()
    others = [x.step for x in r.states if x is not s]
    stack, seen = [*r.outputs, *others], set[str]()
    while stack:
        e = stack.pop()
        names = {str(x.attr) for x in e.reads}
        if s.name in names:
            out.append(e)
            continue
        new = {n for n in names if n not in seen and len(c.producers.get(n, ())) == 1}
        seen |= new
        stack += [c.producers[n][0] for n in sorted(new)]
    return list({id(e): e for e in out}.values())


def _read(c: Cascade, s: State, e: Einsum, rank: str) -> tuple[Read, int] | Obstacle:
    """A read of the state as a row times the matrix, and the place of the rank that is summed."""
    no = Obstacle(f"{s.name} is read other than as a product with a row", str(e.out))
    terms = Expansion(c, s.name).of(e.body)
    if e.op != "add" or len(e.over) != 1 or terms is None or len(terms) != 1 or terms[0].over:
        return no
    x = terms[0].state(s.name)
    plain = [i.op == "index" or i is ex.const(0) for i in x.args[:-1]] if x is not None else [False]
    if x is None or not all(plain) or len(set(x.args)) < len([i for i in x.args if i.op == "index"]):
        return no
    after = x.args[-1] is ex.index(rank) + ex.const(1)
    table = {a: b for a, b in zip(x.args[:-1], s.step.out.index[:-1]) if a.op == "index" and b.op == "index"}
    at = next((i for i, a in enumerate(x.args[:-1]) if a is ex.index(e.over[0])), -1)
    left = terms[0].without(x)
    value = [a for i, a in enumerate(x.args[:-1]) if i != at and a.op == "index"]
    if at < 0 or not (after or x.args[-1] is ex.index(rank)):
        return no
    own = tuple(str(i.attr) for i in e.out.index if i.op == "index" and i.attr != rank)
    if Counter(own) != Counter(str(a.attr) for a in value):
        return no
    query = product_of(left, terms[0].sign, table)
    named = {str(a.attr): str(b.attr) for a, b in table.items()}
    return Read(e, query, after, tuple(named[x] for x in own)), at

