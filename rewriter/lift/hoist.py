"""Hoisting: what does not vary over both queries and keys is computed once by the model's own graph, and loaded.

before   S[b,h,p,m] = QK + slope[h] · f32(ids[b,m] − 1) …      after   S[b,h,p,m] = QK + alibi[b,h,m]

Only terms with data in them are hoisted; coordinates stay, because tiles are classified from them. A gather whose index
is computed in floating point (a logarithmic bucket) is read as the tensor that the model computed: another rounding of
the index would be another function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...patterns import expr as ex
from ...patterns.cascade import Cascade
from ...patterns.expr import Expr
from ...patterns.operators import named
from .index import ZERO, is_simple
from .lift import Lifter

_INEXACT = frozenset((*named(lambda o: o.result == "float"), "pow"))


def hoist(lifter: Lifter, c: Cascade) -> Cascade:
    """The cascade with hoisted loads."""
    written = set(c.producers)
    queries = query_ranks(c)
    outer = frozenset().union(*(i.ranks for i in c.producers[c.outputs[0]][-1].out.index))

    def data(e: Expr) -> bool:
        own = ex.loads(e)
        return bool(own) and not any(str(x.attr) in written for x in own)

    def target(e: Expr) -> Expr | None:
        origin = lifter.origin.get(e)
        if origin is None or not is_simple(origin.at):
            return None
        # along other coordinates the node repeats its value, and they may be those of another reader
        others = {ex.index(r): ZERO for i in origin.at for r in i.ranks - e.ranks}
        at = tuple(ex.substitute(i, others) for i in origin.at)
        return lifter.leaf(origin.node, at, reader=origin.node)

    def dense(e: Expr) -> bool:
        return bool(e.ranks & queries) and bool(e.ranks - outer)

    def wanted(e: Expr) -> bool:
        if e.op in ("const", "index", "symbol") or not data(e):
            return False
        if e.op in ("and", "or", "where") and _keeps_structure(e, data):
            return False
        if e.op == "load":
            return any(_inexact(i) or ex.loads(i) for i in e.args) or (not dense(e) and not is_simple(e.args))
        return not dense(e) or (e.op in ex.COMPARISONS and _inexact(e))

    memo: dict[Expr, Expr] = {}
    hoisted: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e not in memo:
            hit = target(e) if wanted(e) else None
            if hit is None:
                args = tuple(go(a) for a in e.args)
                hit = e if args == e.args else ex.make(e.op, args, e.attr, e.dtype)
            elif hit is not e:
                hoisted[e] = hit
            memo[e] = hit
        return memo[e]

    # operands of products are read where peeling put them
    peeled = {*lifter.products, *c.outputs}
    rest = [e if e.out.tensor in peeled else replace(e, body=go(e.body)) for e in c.einsums]
    # but a term is rounded once: weights read what the reductions of their row read
    einsums = [replace(e, body=ex.substitute(e.body, hoisted)) if e.out.tensor in c.outputs else e for e in rest]
    tensors = {t.name: t for t in c.tensors}
    tensors.update({n: t for n, t in lifter.tensors.items() if n not in tensors})
    used = {str(r.attr) for e in einsums for r in e.reads} | {e.out.tensor for e in einsums}
    return replace(c, einsums=tuple(einsums), tensors=tuple(t for t in tensors.values() if t.name in used))


def query_ranks(c: Cascade) -> frozenset[str]:
    """Ranks of the output that reach the scores through one operand of a product and not through the other."""
    found: set[str] = set()
    for e in c.einsums:
        if e.op == "add" and len(e.reads) >= 2 and not any(str(r.attr) in c.producers for r in e.reads):
            sides = [r.ranks for r in e.reads]
            out = frozenset().union(*(i.ranks for i in e.out.index))
            found |= {r for r in out if sum(r in s for s in sides) == 1}
    return frozenset(found) & frozenset().union(*(i.ranks for i in c.producers[c.outputs[0]][-1].out.index))


def _keeps_structure(e: Expr, data: Callable[[Expr], bool]) -> bool:
    """A mask that selects between constants, or joins data with coordinates: tiles are classified from its parts."""
    if e.op == "where":
        return e.args[1].is_const and e.args[2].is_const
    return any(not a.is_const and not data(a) for a in e.args)


def _inexact(e: Expr) -> bool:
    """Whether an integer or boolean value comes out of floating-point arithmetic on coordinates or data."""
    return any(x.op in _INEXACT and x.is_float for x in ex.walk(e))
