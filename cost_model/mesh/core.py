"""The attention inside a cascade, for sharding: which Einsums are its products and its row, and what its ranks stand for.

    core     the view of the attention between projections            roles    batch, heads, tokens and key ranks
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade
from ...patterns.expr import Expr
from ..operations import factors


class Refused(ValueError):
    """An assignment that a cascade does not allow; the message says why."""


@dataclass(frozen=True)
class Roles:
    """What the ranks of a cascade stand for. `batch` are those that inputs and outputs share and no product contracts."""

    batch: tuple[str, ...]
    heads: str
    tokens: str
    key: str


@dataclass(frozen=True)
class Core:
    """The attention of a cascade: its view, and which Einsums (by position) are products and which are the row's."""

    view: Attention
    products: frozenset[int]
    unit: frozenset[int]
    output: str


@lru_cache(maxsize=256)
def core(c: Cascade, key: str = "") -> Core | None:
    """The attention over rank `key` inside a cascade, with projections before and after it; None where there is none.

    Of all tensors that read as one, the last with a row normaliser is meant, else the last. Without a key, any counts.
    """
    if any(r.iterative for r in c.ranks):
        return None
    best: tuple[bool, str, Attention] | None = None
    for e in c.einsums:
        if key and e.op is not None and key not in e.over:
            continue
        view = attention(_until(c, e.out.tensor))
        if isinstance(view, Attention) and key in ("", view.key) and (best is None or bool(view.row) >= best[0]):
            best = (bool(view.row), e.out.tensor, view)
    if best is None:
        return None
    _, name, view = best
    made = {e.out.tensor for e in view.products}
    products = frozenset(i for i, e in enumerate(c.einsums) if e.out.tensor in made)
    inside = {e.out.tensor for e in _until(c, name).einsums}
    unit: set[int] = set()
    for i, e in enumerate(c.einsums):
        read = {str(x.attr) for x in e.reads}
        if e.out.tensor in inside and i not in products and read & (made | {c.einsums[j].out.tensor for j in unit}):
            unit.add(i)
    return Core(view, products, frozenset(unit), name)


def _until(c: Cascade, name: str) -> Cascade:
    """The part of a cascade that computes one tensor."""
    wanted, kept = {name}, []
    for e in reversed(c.einsums):
        if e.out.tensor in wanted:
            kept.append(e)
            wanted |= {str(x.attr) for x in e.reads}
    tensors = tuple(t for t in c.tensors if t.name in wanted)
    used = frozenset().union(*(e.ranks | set(e.over) for e in kept))
    ranks = tuple(r for r in c.ranks if r.name in used)
    return replace(c, einsums=tuple(reversed(kept)), tensors=tensors, ranks=ranks, outputs=(name,))


def roles(c: Cascade) -> Roles:
    """What the ranks of an attention stand for. Raises Refused where there is none.

    Heads are the rank that key operands see divided (h // G) or not at all beside the tokens; else the last batch rank.
    """
    found = core(c)
    if found is None:
        raise Refused(f"cascade {c.name!r} holds no attention: name its ranks")
    a = found.view
    free = [*a.batch, a.query]
    keyed = [f for e in a.products for f in factors(e.body) if a.key in f.ranks]
    grouped = [r for r in free if any(divided(f, r) for f in keyed)]
    absent = [r for r in free if not any(r in f.ranks for f in keyed)]
    tokens = a.query
    if not grouped and len(absent) > 1:
        # one set of keys for all heads: neither heads nor tokens are in it, and one query is a rank of size 1
        tokens = next((r for r in absent if a.cascade.rank[r].size == 1), a.query)
    rest = [r for r in free if r != tokens]
    heads = next((r for r in (*grouped, *(r for r in absent if r != tokens)) if r in rest), rest[-1] if rest else "")
    return Roles(tuple(r for r in rest if r != heads), heads, tokens, a.key)


def divided(term: Expr, rank: str) -> bool:
    """Is a tensor in a term read at a quotient of this rank, as key heads are (h // G)?"""
    return any(t.op == "floordiv" and rank in t.ranks for x in ex.loads(term) for t in x.args)
