"""Passes: how often every element of a rank must be visited, for any mapping, because a dependency forces it.

    heavy(i)    Einsum i walks the whole family (m), or (m1, m0) where m is cut into tiles
    j → i       streams, if i reads what j wrote at r, r + 1 or r − 1 of the family's outer rank r;
                is a barrier, if i walks r and the read has lost it (reduced away, or read at its end)
    passes      heavy Einsums on the longest path, where a step costs 1 if a barrier was crossed since the last one
An Einsum of one pass can be fused with the others of that pass, tile by tile; between passes one full fiber has to stay
on chip, be written and read again, or be computed again.
Source: Nayak et al., "FuseMax" (MICRO 2024), section III; the algorithm is ours and reproduces all of its counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from ...patterns import expr as ex
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, Einsum, Size
from ...patterns.expr import Expr
from ...patterns.verdict import Obstacle
from ..operations import is_view


@dataclass(frozen=True)
class Passes:
    """Passes over a rank family, in all and per input; `footprint` is the length of the fiber that must live between
    passes (0 with one pass)."""

    family: tuple[str, ...]
    count: int
    inputs: Mapping[str, int]
    footprint: Size

    def __str__(self) -> str:
        live = f", {self.footprint} live between them" if self.count > 1 else ""
        return f"{self.count} over {'·'.join(self.family)}{live}"


def report(c: Cascade, family: tuple[str, ...]) -> Passes:
    """The passes over one family of ranks, outer rank first. Raises KeyError for a rank that the cascade lacks."""
    level = levels(c, family)
    count = max(level.values(), default=0)
    length: Size = sympy.Integer(1)
    for r in family:
        length = length * c.rank[r].size
    return Passes(family, count, _per_input(c, family, level), length if count > 1 else 0)


def passes(c: Cascade, family: tuple[str, ...]) -> int:
    """The number of passes over a rank family (0 if nothing walks it)."""
    return max(levels(c, family).values(), default=0)


def key_passes(c: Cascade) -> int:
    """Passes over the key rank of an attention: as lifted, or cut into tiles with carried state."""
    return passes(c, key_family(c))


def key_family(c: Cascade) -> tuple[str, ...]:
    """The ranks that are the key's coordinate. Raises ValueError for a cascade that holds no attention."""
    iterative = {r.name for r in c.ranks if r.iterative}
    for family in families(c):
        if family[0] in iterative:
            return family
    view = attention(c)
    if isinstance(view, Obstacle):
        raise ValueError(f"cascade {c.name!r} has no key rank: {view}")
    return (view.key,)


def families(c: Cascade) -> tuple[tuple[str, ...], ...]:
    """Every rank that is reduced or iterative; two ranks that make up one coordinate (m1·M0 + m0) are one family."""
    pairs: dict[tuple[str, ...], None] = {}
    for e in c.einsums:
        for i in ex.walk(*(i for read in e.reads for i in read.args), *e.out.index, e.body):
            if i.op == "add" and i.args[0].op == "mul" and i.args[1].op == "index" and i.args[0].args[0].op == "index":
                pairs[(str(i.args[0].args[0].attr), str(i.args[1].attr))] = None
    paired = {r for p in pairs for r in p}
    walked = {r for e in c.einsums for r in e.over} | {r.name for r in c.ranks if r.iterative}
    return (*pairs, *((r.name,) for r in c.ranks if r.name in walked - paired))


def levels(c: Cascade, family: tuple[str, ...]) -> dict[int, int]:
    """For each Einsum that walks the whole family (by position): in which pass it runs, from 1."""
    for r in family:
        c.rank[r]
    outer, whole = family[0], frozenset(family)
    walks = [e.ranks | frozenset(e.over) for e in c.einsums]
    writers: dict[str, list[int]] = {}
    for i, e in enumerate(c.einsums):
        writers.setdefault(e.out.tensor, []).append(i)
    # (passes so far, was a barrier crossed since the last heavy Einsum)
    state = [(0, True)] * len(c.einsums)
    for _ in range(2 * len(c.einsums) + 2):
        before = list(state)
        for i, e in enumerate(c.einsums):
            reached = [
                (state[j][0], state[j][1] or (outer in walks[i] and not _streams(read, e, outer)))
                for read in e.reads
                for j in writers.get(str(read.attr), ())
                if state[j][0] > 0
            ]
            best = max(reached, default=(0, True))
            if whole <= walks[i]:
                state[i] = (max(1, best[0] + best[1]) if best[0] else 1, False)
            elif reached:
                state[i] = best
        if state == before:
            return {i: h for i, (h, _) in enumerate(state) if whole <= walks[i]}
    raise ValueError(f"cascade {c.name!r}: each round over {outer} needs one more pass; it is no cascade over {outer}")


def _streams(read: Expr, e: Einsum, outer: str) -> bool:
    """Does a read follow the rank: at r, r ± 1, or at all coordinates up to r (a prefix filter)?"""
    if any(outer in i.ranks and not ex.loads(i) for i in read.args):
        return True
    if e.body.op != "where" or not _holds(e.body.args[1], read):
        return False
    return any(
        x.op in ("le", "lt") and x.args[0].op == "index" and x.args[0] in read.args and x.args[1] is ex.index(outer)
        for x in ex.walk(e.body.args[0])
    )


def _holds(term: Expr, part: Expr) -> bool:
    return any(x is part for x in ex.walk(term))


def _per_input(c: Cascade, family: tuple[str, ...], level: Mapping[int, int]) -> dict[str, int]:
    """How many passes visit each input, itself or through what is derived from it point by point of the family."""
    outer = family[0]
    sources: dict[str, frozenset[str]] = {t.name: frozenset([t.name]) for t in c.inputs}
    seen: dict[str, set[int]] = {t.name: set() for t in c.inputs}
    for _ in range(2):
        for i, e in enumerate(c.einsums):
            if i not in level:
                continue
            if is_view(e):
                # renaming coordinates visits nothing: whoever reads the view visits its source
                sources[e.out.tensor] = sources.get(str(e.body.attr), frozenset())
                continue
            followed = [r for r in e.reads if any(outer in x.ranks for x in r.args)]
            origin = frozenset().union(*(sources.get(str(r.attr), frozenset()) for r in followed))
            for name in origin:
                seen[name].add(level[i])
            if outer in frozenset().union(*(x.ranks for x in e.out.index)) and set(family).isdisjoint(e.over):
                sources[e.out.tensor] = sources.get(e.out.tensor, frozenset()) | origin
    return {name: len(s) for name, s in seen.items() if s}
