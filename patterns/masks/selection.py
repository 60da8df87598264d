"""Selection: rows that name their keys, read off a mask. What a mask of all pairs hides in P·M elements stands in P·J slots.

    ⊕_m φ(where(IN[p,m] ∧ rest, s(p,m), fill))·V[m]   =   ⊕_j φ(where(rest, s(p,T[p,j]), fill))·V[T[p,j]]

The change of variable m := T[p,j] is exact where fill is neutral and each slot's key counts once: what names a key again,
or no key, counts as nothing. Blocks of keys by `m // ρ`: m := ρ·T[p,j] + o for all o < ρ. Of two key sets that lie end
to end the second may be named, `m < W ∨ IN[p,m − W]`: then a row reads all W of the first, and W + T[p,j].
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import expr as ex
from ..attention import concat
from ..attention.attention import Attention
from ..cascade import Size, size_term, term_size
from ..expr import Expr
from ..membership import membership
from ..terms.conditions import conjuncts, simplify_under


@dataclass(frozen=True)
class Selection:
    """`member`: the predicate as the mask reads it; `slots`: the indices over the attention's ranks and `slot`.

    An index stands for `block` keys, of `places` such blocks in all (a place behind the last key is never read). `rest`
    is what else a key needs. The keys before `first` need no name: every row reads them, and places count from there.
    """

    member: Expr
    slots: Expr
    slot: str
    block: int
    places: Size
    rest: Expr
    first: Size = 0


def selection(a: Attention, keep: Expr) -> Selection | None:
    """The selection that a mask is, together with a mask that holds besides; None where rows name no keys."""
    made = {e.out.tensor: e for e in a.prelude}
    for asked in conjuncts(keep):
        first, member = _second(asked, a.key)
        e = made.get(str(member.attr)) if member.op == "load" else None
        found = membership(e) if e is not None else None
        if e is None or found is None:
            continue
        at = dict(zip((str(i.attr) for i in e.out.index), member.args, strict=True))
        block = _block(_behind(at.pop(found.place), a.key, first), a.key)
        if block == 0 or any(a.key in i.ranks or ex.loads(i) for i in at.values()):
            continue
        slots = ex.substitute(found.slots, {ex.index(r): i for r, i in at.items()})
        rest = simplify_under(keep, {asked: True})
        if not any(x.attr == member.attr for x in ex.loads(rest)):
            return Selection(member, slots, found.slot, block, a.cascade.rank[found.place].size, rest, first)
    return None


def _second(e: Expr, key: str) -> tuple[Size, Expr]:
    """What `m < W ∨ member` asks of the keys from W on, and W; 0 and the term itself where it is something else."""
    for before, member in (e.args, e.args[::-1]) if e.op == "or" and e.dtype == "b1" else ():
        if before.op == "lt" and before.args[0] is ex.index(key) and concat.is_size(before.args[1]) and member.op == "load":
            return term_size(before.args[1]), member
    return 0, e


def _behind(i: Expr, key: str, first: Size) -> Expr:
    """An index over the keys from `first` on, as one over keys that are counted from there; FALSE where it is none."""
    m, mark = ex.index(key), ex.index(f"{key} from there")
    if first == 0:
        return i
    moved = ex.substitute(i, {m - size_term(first): mark})
    return ex.FALSE if key in moved.ranks else ex.substitute(moved, {mark: m})


def _block(i: Expr, key: str) -> int:
    """How many keys one index stands for: `m` one, `m // ρ` so many; 0 where it is something else."""
    if i is ex.index(key):
        return 1
    cut = i.op == "floordiv" and i.args[0] is ex.index(key) and i.args[1].is_const
    return int(i.args[1].value) if cut else 0
