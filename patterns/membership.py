"""Membership: the predicate that a coordinate is among indices which the model has selected, read off an Einsum.

    IN[b,p,m] = or_j (T[b,p,j] = m)        T: indices, in any order, each as often as it likes; beyond m is nobody

A selection never needs more than T: a mask of all pairs is what a model makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from . import expr as ex
from .cascade import Einsum
from .expr import Expr


@dataclass(frozen=True)
class Membership:
    """`rows` are the predicate's ranks but `place`, the coordinate that is looked for; `slots` is T's load over `slot`."""

    rows: tuple[str, ...]
    place: str
    slots: Expr
    slot: str


@lru_cache(maxsize=1024)
def membership(e: Einsum) -> Membership | None:
    """What an Einsum looks for, and where; None where it is no membership."""
    if e.op != "or" or len(e.over) != 1 or e.body.op != "eq" or not e.out.plain:
        return None
    (slot,) = e.over
    own = [str(i.attr) for i in e.out.index]
    for slots, at in (e.body.args, e.body.args[::-1]):
        if at.op == "index" and str(at.attr) in own and is_slots(slots, slot) and at.attr not in slots.ranks:
            return Membership(tuple(r for r in own if r != at.attr), str(at.attr), slots, slot)
    return None


def is_slots(e: Expr, slot: str) -> bool:
    """Indices read along one dimension, at coordinates that are plain ranks or numbers."""
    ranks = [i for i in e.args if i.op == "index"] if e.op == "load" else []
    plain = e.op == "load" and all(i.op == "index" or i.is_const for i in e.args)
    return plain and e.dtype in ex.INTEGERS and ranks.count(ex.index(slot)) == 1 and len(set(ranks)) == len(ranks)
