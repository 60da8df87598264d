"""The search for forms with fewer passes: which rewrites, in which order, under which conditions.

    cascade ──expand, moments, defer, exchange, unbound──▶ … ──partition──▶ … ──repair──▶ form
After each rewrite the passes are counted again; nothing is tabulated. A form is better with fewer passes, then with fewer
operations, then with fewer rewrites. What a rewrite could not do is kept as its Refusal.
Source of the order: FuseMax (MICRO 2024), section III; the search is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy

from ...patterns.cascade import Cascade, Size
from ...patterns.passes.bounded import unbound
from ...patterns.passes.repair import repair
from ...patterns.passes.rewrites import Family, Rewrite, Rewritten, defer, exchange, expand, moments
from ...patterns.passes.tiling import partition
from ...patterns.verdict import Refusal
from ..operations import EXPONENTIALS, Sizes, elements, operations, size_int
from .passes import passes

# In the order in which they are tried: on a whole rank, and on one that is cut into tiles.
WHOLE: tuple[Rewrite, ...] = (expand, moments, defer, exchange, unbound, partition)
TILED: tuple[Rewrite, ...] = (repair,)
# Forms that are looked at before the search gives up, and the size of every symbol when operations are compared.
FORMS, TYPICAL, TILE = 64, 256, 32
# An exponential beside a multiply-add, when operations are compared (FuseMax: 6 multiply-adds and a subtraction).
EXP_SLOTS = 7


@dataclass(frozen=True)
class RewriteStep:
    """One rewrite: passes before and after it, and what must hold."""

    rewrite: str
    before: int
    after: int
    conditions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.rewrite}: {self.before} → {self.after}"


@dataclass(frozen=True)
class CascadeForm:
    """A form of the cascade: how it was reached, its passes over `family`, the elements that stay between elements."""

    cascade: Cascade
    family: Family
    passes: int
    state: Size
    steps: tuple[RewriteStep, ...] = ()

    def __str__(self) -> str:
        how = " · ".join(s.rewrite for s in self.steps) or "as written"
        return f"{self.passes} over {'·'.join(self.family)} ({how}), state {self.state}"


@dataclass(frozen=True)
class SearchResult:
    """The cascade as written, the best form, the best form for each number of passes, and the refusals met."""

    written: CascadeForm
    best: CascadeForm
    forms: tuple[CascadeForm, ...]
    refusals: tuple[Refusal, ...]


@lru_cache(maxsize=512)
def search(c: Cascade, family: Family) -> SearchResult:
    """Search the forms of a cascade over one rank family, breadth first. Raises KeyError for a rank that it lacks."""
    start = CascadeForm(c, family, passes(c, family), state(c, family))
    queue, seen, refusals = [start], {c}, dict[Refusal, None]()
    at = 0
    while at < len(queue) and len(queue) < FORMS:
        form = queue[at]
        at += 1
        if form.passes <= 1 and form.steps:
            continue
        for rewrite in _rewrites(form):
            out = rewrite(form.cascade, form.family)
            if isinstance(out, Refusal):
                refusals.setdefault(out)
            elif out.cascade not in seen:
                seen.add(out.cascade)
                queue.append(_next(form, out))
    least: dict[int, CascadeForm] = {}
    for form in sorted(queue, key=_rank):
        least.setdefault(form.passes, form)
    best = min(least.values(), key=_rank)
    if best.passes == start.passes:
        best = start
    return SearchResult(start, best, tuple(least[n] for n in sorted(least)), tuple(refusals))


def _rewrites(form: CascadeForm) -> tuple[Rewrite, ...]:
    if any(r.iterative for r in form.cascade.ranks):
        return ()
    return WHOLE if len(form.family) == 1 else TILED


def _next(form: CascadeForm, out: Rewritten) -> CascadeForm:
    after = passes(out.cascade, out.family)
    step = RewriteStep(out.rewrite, form.passes, after, out.conditions)
    return CascadeForm(out.cascade, out.family, after, state(out.cascade, out.family), (*form.steps, step))


def _rank(form: CascadeForm) -> tuple[int, int, int]:
    return form.passes, effort(form.cascade), len(form.steps)


def effort(c: Cascade) -> int:
    """Operations of a cascade in slots, with every free size set to a typical one: for comparing forms only."""
    inner = {str(r.size) for r in c.ranks if isinstance(r.size, sympy.Symbol) and r.name.endswith("0")}
    sizes = Sizes(c, {s: TILE if s in inner else TYPICAL for s in c.free_symbols})
    work = operations(c.einsums, sizes.rank)
    slots = sum((n * (EXP_SLOTS if op in EXPONENTIALS else 1) for op, n in work.ops.items()), 0)
    return size_int(slots + work.flops / 2)


def state(c: Cascade, family: Family) -> Size:
    """Elements that are carried along the family: results of its reductions and running values, one batch of each."""
    outer, whole = family[0], set(family)
    out: Size = 0
    counted: set[str] = set()
    extent = {r.name: r.size for r in c.ranks}
    for e in c.einsums:
        steps = [i for i in e.out.index if outer in i.ranks and i.op == "add" and i.args[1].is_const]
        reduced = bool(set(e.over) & whole) and not any(outer in i.ranks for i in e.out.index)
        if e.out.tensor in counted or not (steps or reduced):
            continue
        counted.add(e.out.tensor)
        out = out + elements(extent, {r for i in e.out.index for r in i.ranks} - whole)
    return out


__all__ = ["TILED", "WHOLE", "CascadeForm", "RewriteStep", "SearchResult", "effort", "search", "state"]
