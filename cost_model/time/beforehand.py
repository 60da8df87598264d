"""What a CPU does around a kernel: products and sums computed before it, operands laid out anew, elements fetched singly.

    QK0[h,p,r] = Σ_e Q·X            a product of its own, as the model's code computes it
    K[b,e,m] for rows of e          copied: kernels read the elements of a key one after the other
    QK0[h,p,idx[p,m]]               fetched: its neighbour of the next key lies elsewhere
    QK0[h,p,m − p + 299]            streamed: its neighbour of the next key lies beside it
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from ...patterns import expr as ex
from ...patterns.cascade import Einsum
from ...patterns.expr import Expr
from ...patterns.terms.affine import affine
from ...patterns.terms.divisions import DIVISIONS
from ..count import eager
from ..count.eager import EagerOperator, beforehand, computed, strided
from ..count.subject import Shape, Subject
from ..devices.device import Device
from ..operations import WIDTH, contraction
from .cost import Cost, bound_of
from .host import Bill, Host


def with_prelude(cost: Cost, s: Subject, at: Shape, device: Device, without: str = "") -> Cost:
    """The cost of a kernel on a CPU with what is computed before it, but for one tensor."""
    ops = beforehand(s.attention, at.extent, without)
    return plus(cost, _priced(ops, device)) if ops else cost


def with_operands(cost: Cost, s: Subject, at: Shape, device: Device) -> Cost:
    """The cost of a kernel on a CPU with its operands laid out as it reads them."""
    ops = laid_out(s, at)
    return plus(cost, _priced(ops, device)) if ops else cost


def apart(einsums: Iterable[Einsum], extent: Mapping[str, int], device: Device) -> Cost:
    """The cost of Einsums that are computed one by one on a CPU."""
    return _priced(eager.apart(einsums, extent), device)


def plus(cost: Cost, other: Cost) -> Cost:
    """One after the other."""
    parts = dict(cost.parts)
    for name, seconds in other.parts.items():
        parts[name] = parts.get(name, 0.0) + seconds
    return replace(
        cost, seconds=cost.seconds + other.seconds, parts=parts, bound=bound_of(parts), flops=cost.flops + other.flops,
        bytes=cost.bytes + other.bytes, exps=cost.exps + other.exps, backward=cost.backward + other.backward,
    )


def _priced(ops: Iterable[EagerOperator], device: Device) -> Cost:
    host, bill = Host(device), Bill()
    for o in ops:
        host.operator(o, bill)
    return bill.cost(device, "beforehand", "f32")


def laid_out(s: Subject, at: Shape) -> tuple[EagerOperator, ...]:
    """Copies of operands: those whose elements do not lie side by side, and those that are computed or gathered."""
    a = s.attention
    sides = [(f, e.over[-1]) for e in a.products for f in contraction(e) or ()]
    return tuple(o for f, inner in (*sides, (a.values, a.value)) for o in _copy(f, inner, at.extent))


def _copy(f: Expr, inner: str, extent: Mapping[str, int]) -> tuple[EagerOperator, ...]:
    while f.op == "cast" and f.is_float and f.args[0].op in ("cast", "load"):
        f = f.args[0]
    if f.op != "load" or not strided(f):
        return computed(f, extent)
    if not f.args or f.args[-1] is ex.index(inner) or inner not in f.ranks:
        return ()
    points = math.prod(extent[r] for r in f.ranks)
    moved = points * WIDTH[f.dtype]
    return (EagerOperator("copy", "transpose", f.dtype, points, moved, moved),)


@lru_cache(maxsize=256)
def fetched(s: Subject) -> tuple[Expr, ...]:
    """What a score reads for each key at coordinates that no strides reach, beside its products."""
    a = s.attention
    made = {e.out.tensor for e in a.products}
    loads = dict.fromkeys(ex.loads(a.score))
    return tuple(x for x in loads if a.key in x.ranks and str(x.attr) not in made and not strided(x))


def streamed(x: Expr, key: str) -> bool:
    """Do the elements of consecutive keys lie at an equal distance?"""
    at = ex.index(key)
    moving = [affine(i) for i in x.args if key in i.ranks]
    return len(moving) == 1 and all(atom is at or key not in atom.ranks for atom in moving[0].atoms)


def divisions(s: Subject) -> int:
    """Divisions of integers for each pair."""
    a = s.attention
    terms = ex.walk(a.score)
    return sum(t.op in DIVISIONS and t.dtype in ex.INTEGERS and {a.query, a.key} <= t.ranks for t in terms)


def fetch_seconds(host: Host, s: Subject, at: Shape, pairs: float) -> float:
    """Seconds in which torch's operators fetch what so many pairs read: coordinates are tensors there."""
    a, extent = s.attention, at.extent
    tables = [x for x in fetched(s) if not _by_distance(x, a.query, a.key)]
    share = pairs / max(at.batch * at.queries * at.keys, 1)
    points = sum(math.prod(extent[r] for r in x.ranks) for x in tables) * share
    divided = divisions(s) * at.queries * at.keys * share if tables else 0.0
    return (points * host.h.gather_seconds + divided * host.h.division_seconds) / host.gain("element", points)


def _by_distance(x: Expr, query: str, key: str) -> bool:
    """Is it read by key − query alone? Such a table is cut once, not read for each pair."""
    distance = affine(ex.index(key) - ex.index(query))
    moving = [affine(i) for i in x.args if {query, key} & i.ranks]
    return all((f - distance).terms == () or (f + distance).terms == () for f in moving)


def fused_fetch_seconds(host: Host, s: Subject, pairs: float) -> float:
    """The same inside our fused loop."""
    apart = [x for x in fetched(s) if not streamed(x, s.attention.key)]
    return pairs * (len(apart) * host.h.fused_gather_seconds + divisions(s) * host.h.fused_division_seconds)
