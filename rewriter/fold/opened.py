"""What a recurrence reads, opened into what that is made of, so that its scan makes it for a chunk of steps.

    X[b,t,e,n] = exp(A[e,n] · Δ[b,t,e])       its elements are never there at once
    X[b,t,h,n] = k[b,t,h // R,n]              h = R · g + r: heads of a group read what lies there once
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from ...patterns.expr import Expr
from ...patterns.recurrence.low_rank import LowRank, low_rank
from ...patterns.recurrence.recurrence import Recurrence, recurrence
from ..graph.aliases import Aliases
from ..graph.inside import between
from ..graph.node import FOLDED, dtype_of, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift import operators_view
from ..lift.rules import RULES
from .recurrences import FoundScan
from .within import Within

# What costs no more where it is needed than it takes to read it.
CHEAP = frozenset(("mul", "add", "sub", "neg", "exp"))
# Of a term that is opened: how many operators it may have.
LONGEST = 24


def opened(f: FoundScan, graph: fx.Graph, aliases: Aliases) -> FoundScan:
    """The same recurrence over what its inputs are made of, where nobody else reads these."""
    out = _read_through(f, graph, aliases)
    return _grouped(out if out is not None else f)


def _read_through(f: FoundScan, graph: fx.Graph, aliases: Aliases) -> FoundScan | None:
    c = f.recurrence.cascade
    lifter = Within(graph, aliases, RULES, _stops(f, aliases))
    lifter.ranks.update({r.name: r.size for r in c.ranks})
    table: dict[Expr, Expr] = {}
    for x in {x for e in c.einsums for x in ex.loads(e.body)}:
        node = f.tensors.get(str(x.attr))
        term = lifter.value(node, x.args) if node is not None else x
        if node is not None and not lifter.einsums and sum(1 for _ in ex.walk(term)) <= LONGEST:
            table[x] = term
    kept = {str(x.attr) for e in c.einsums for x in ex.loads(e.body) if x not in table and str(x.attr) in f.tensors}
    fresh = (name for k in range(len(f.tensors) + len(lifter.leaves)) if (name := f"X{k}") not in kept)
    tensors = {n: x for n, x in f.tensors.items() if n in kept}
    names: dict[str, str] = {}
    for term in table.values():
        for x in ex.loads(term):
            if str(x.attr) in lifter.leaves and str(x.attr) not in names:
                names[str(x.attr)] = next(fresh)
                tensors[names[str(x.attr)]] = lifter.leaves[str(x.attr)]
    renamed = {
        x: ex.substitute(term, {y: ex.load(names[str(y.attr)], y.args, y.dtype) for y in ex.loads(term)})
        for x, term in table.items() if str(x.attr) in f.tensors
    }
    einsums = tuple(replace(e, body=ex.substitute(e.body, renamed)) for e in c.einsums)
    made = (t for t in c.tensors if t.name not in f.tensors)
    given = (Tensor(n, shape_of(tensor_of(x)), dtype_of(x)) for n, x in tensors.items())
    return _checked(f, Cascade(c.name, c.ranks, (*given, *made), einsums, c.outputs), tensors)


def _checked(f: FoundScan, c: Cascade, tensors: dict[str, fx.Node] | None = None) -> FoundScan | None:
    """With another cascade, where it is as good a recurrence."""
    seen = recurrence(verify(c))
    if not isinstance(seen, Recurrence):
        return None

    def forms(r: Recurrence) -> list[bool]:
        return [isinstance(low_rank(r, s), LowRank) for s in r.states]

    same = [s.law for s in seen.states] == [s.law for s in f.recurrence.states] and forms(seen) == forms(f.recurrence)
    return replace(f, recurrence=seen, tensors=f.tensors if tensors is None else tensors) if same else None


def _stops(f: FoundScan, aliases: Aliases) -> set[fx.Node]:
    """The nodes upstream that are read as they are: others read them, too, or they are more than cheap."""
    region = set(f.nodes) | between(set(f.tensors.values()), f.output)
    stops: set[fx.Node] = set()
    waiting = set(f.tensors.values())
    while waiting:
        n = max(waiting, key=aliases.position.__getitem__)
        waiting.remove(n)
        view = op_name(n) in operators_view.RULES
        apart = n.op != "call_function" or FOLDED in n.meta
        if apart or (not view and (op_name(n) not in CHEAP or any(u not in region for u in n.users))):
            stops.add(n)
            continue
        region.add(n)
        waiting |= {i for i in n.all_input_nodes if i not in region}
    return stops


# --- heads of a group ---------------------------------------------------------------------------------------------


def _grouped(f: FoundScan) -> FoundScan:
    """With a rank of the state as two where some inputs have one element for several of its indices."""
    for rank in dict.fromkeys(r for s in f.recurrence.states for r in s.ranks):
        size = f.recurrence.cascade.rank[rank].size
        by = {int(d.args[1].value) for d in _quotients(f.recurrence.cascade, rank)}
        if len(by) == 1 and isinstance(size, int) and size % min(by) == 0 and 1 < min(by) < size:
            made = _checked(f, _split(f.recurrence.cascade, rank, size // min(by), min(by)))
            f = f if made is None else made
    return f


def _quotients(c: Cascade, rank: str) -> Iterator[Expr]:
    for e in c.einsums:
        for x in ex.walk(e.body):
            if x.op == "floordiv" and x.args[0] is ex.index(rank) and x.args[1].is_const:
                yield x


def _split(c: Cascade, rank: str, groups: int, each: int) -> Cascade:
    """h as g · R + r; a tensor that is read by h in a dimension of its own has two for it."""
    h, g, r = ex.index(rank), ex.index(f"{rank}g"), ex.index(f"{rank}r")
    whole = g * ex.const(each) + r
    along = {t.name: {d for d, n in enumerate(t.shape) if n == groups * each} for t in c.tensors}
    reads = [x for e in c.einsums for x in (*ex.loads(e.body), ex.load(e.out.tensor, e.out.index, "f32"))]
    for x in reads:
        along[str(x.attr)] &= {d for d, i in enumerate(x.args) if i is h}

    def index(tensor: str, at: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(y for d, i in enumerate(at) for y in ((g, r) if d in along[tensor] else (_plain(i),)))

    def _plain(i: Expr) -> Expr:
        return ex.substitute(i, {h // ex.const(each): g, h: whole})

    def term(e: Expr) -> Expr:
        loads = {x: ex.load(str(x.attr), index(str(x.attr), x.args), x.dtype) for x in ex.loads(e)}
        return _plain(ex.substitute(e, loads))

    def shape(t: Tensor) -> tuple[Size, ...]:
        return tuple(y for d, n in enumerate(t.shape) for y in ((groups, each) if d in along[t.name] else (n,)))

    parts = {rank: (Rank(str(g.attr), groups), Rank(str(r.attr), each))}
    return Cascade(
        c.name, tuple(y for x in c.ranks for y in parts.get(x.name, (x,))),
        tuple(replace(t, shape=shape(t)) for t in c.tensors),
        tuple(Einsum(Access(e.out.tensor, index(e.out.tensor, e.out.index)), term(e.body), e.op, e.over) for e in c.einsums),
        c.outputs,
    )
