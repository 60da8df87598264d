"""Floats that are no operands, in the backward loop: what reaches each of them, and over which ranks the loop adds it up.

    rows        read at no key: a number for each row and segment of keys         keys    at a key, whatever the query
    distances   at a place that m − p tells                                       pairs   at both
    ends        of the row's end: a number for each row
What is left, sums over ranks that the tensor lacks and places that are looked up, is the host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....patterns import expr as ex
from ....patterns.backward.adjoint import Adjoint, Gradient
from ....patterns.backward.outside import outside as multiplied
from ....patterns.expr import Expr
from ....patterns.verdict import Obstacle
from ...forms.form import Form
from ...text.printer import PrintError
from ...text.tile_terms import relative

ROWS, KEYS, DISTANCES, PAIRS, ENDS = "rows", "keys", "distances", "pairs", "ends"


@dataclass(frozen=True)
class LeafTerm:
    """What stands at `load`, its gradient's term over [P, M] or, of a row's end, [P], and where that is added up."""

    load: Expr
    term: Expr
    kind: str


def leaves(f: Form, made: Adjoint) -> list[LeafTerm]:
    """All leaves of an attention whose gradients are terms of tiles or of rows."""
    found = [LeafTerm(g.load, g.term, _kind(f, g)) for g in made.leaves if f.attention.value not in g.space]
    return [*found, *(LeafTerm(y, term, _kind_of_load(f, y)) for y, term in outside(f, made))]


def _kind(f: Form, g: Gradient) -> str:
    return _kind_of_load(f, g.load) if f.attention.key in g.space else ENDS


def _kind_of_load(f: Form, load: Expr) -> str:
    query, key = f.attention.query, f.attention.key
    if key not in load.ranks:
        return ROWS
    if query not in load.ranks:
        return KEYS
    return DISTANCES if all(relative(i, query, key) for i in load.args) else PAIRS


def outside(f: Form, made: Adjoint) -> list[tuple[Expr, Expr]]:
    """Floats that multiply a product outside of its sum, each with its gradient, which reads the sum itself."""
    types = f.cascade.tensor
    outs = [e.out for e in f.attention.products]
    loads = [ex.load(x.tensor, x.index, types[x.tensor].dtype) for x in outs]
    found = multiplied(zip(loads, (x.outside for x in f.products)), {g.load: g.term for g in made.scores})
    if isinstance(found, Obstacle):
        raise PrintError(str(found))
    return found


def folds(f: Form, given: Sequence[LeafTerm]) -> tuple[int, int]:
    """Bits of the leaves over pairs that several batches, or several heads, read at one place: these take turns."""
    z = sum(1 << i for i, x in enumerate(given) if x.kind == PAIRS and len(own_lead(f, x)) < len(f.heads.lead))
    h = sum(1 << i for i, x in enumerate(given) if x.kind == PAIRS and f.heads.head and f.heads.head not in x.load.ranks)
    return z, h


def own_lead(f: Form, leaf: LeafTerm) -> tuple[str, ...]:
    """The leading ranks over which a leaf over pairs is kept: from the first to the last that it is read at."""
    at = [i for i, r in enumerate(f.heads.lead) if r in leaf.load.ranks]
    return f.heads.lead[at[0] : at[-1] + 1] if at else ()
