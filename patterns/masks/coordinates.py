"""A rank seen as coordinates of a plane:  m = y·W + x  where a predicate reads  m // W  and  m % W.

    places(keep, p, m)   keys whose every coordinate is the query's own, or a bound of it that the predicate has
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .. import expr as ex
from ..expr import Expr
from ..terms.affine import affine

# Keys that are worth testing; each costs a proof.
MOST = 12


@dataclass(frozen=True)
class Coordinate:
    """`rank // stride`, and where a size is given the remainder of it by that."""

    stride: int
    size: int | None

    def of(self, x: Expr) -> Expr:
        whole = x // self.stride if self.stride > 1 else x
        return whole % self.size if self.size is not None else whole


def coordinate(e: Expr, rank: Expr) -> Coordinate | None:
    """The coordinate of a rank that a term is, if it is one."""
    if e.op not in ("floordiv", "mod") or not e.args[1].is_const:
        return None
    inner, n = e.args[0], int(e.args[1].value)
    if inner is rank:
        return Coordinate(n, None) if e.op == "floordiv" else Coordinate(1, n)
    under = coordinate(inner, rank)
    if under is None:
        return None
    if e.op == "mod" and under.size is None:
        return Coordinate(under.stride, n)
    if e.op == "floordiv" and under.size is not None and under.size % n == 0:
        return Coordinate(under.stride * n, under.size // n)
    return None


def plane(keep: Expr, rank: Expr) -> tuple[Coordinate, ...]:
    """The coordinates by which a predicate reads a rank and those between them, slowest first; none where they overlap."""
    terms = {e: c for e in ex.walk(keep) if (c := coordinate(e, rank)) is not None}
    inner = {e.args[0] for e in terms}
    found = {c for e, c in terms.items() if e not in inner}
    out: list[Coordinate] = []
    stride = 1
    for c in sorted(found, key=lambda c: c.stride):
        if c.stride % stride or (out and out[-1].size is None):
            return ()
        if c.stride > stride:
            out.append(Coordinate(stride, c.stride // stride))
        out.append(c)
        stride = c.stride * c.size if c.size is not None else c.stride
    if out and out[-1].size is not None:
        out.append(Coordinate(stride, None))
    return tuple(reversed(out))


def places(keep: Expr, query: str, key: str) -> tuple[Expr, ...]:
    """Keys put together of coordinates: each the query's own, or one at which a comparison with it just holds."""
    p, m = ex.index(query), ex.index(key)
    axes = plane(keep, m)
    chosen = [(c.of(p), *_bounds(keep, c, m)) for c in axes]
    if not any(len(c) > 1 for c in chosen):
        return ()
    # the first is the diagonal; then bounds of one kind before bounds that are mixed
    order = sorted(itertools.product(*(range(len(c)) for c in chosen)), key=_mixed)
    return tuple(_joined(axes, [c[i] for c, i in zip(chosen, at)]) for at in order[1 : MOST + 1])


def _mixed(at: Sequence[int]) -> tuple[int, int]:
    """How many kinds of bounds are mixed, and how many there are."""
    return len({i for i in at if i}), sum(at)


def _joined(axes: Sequence[Coordinate], at: Sequence[Expr]) -> Expr:
    out = ex.const(0)
    for c, x in zip(axes, at, strict=True):
        out = out + x * c.stride
    return out


def _bounds(keep: Expr, c: Coordinate, m: Expr) -> tuple[Expr, ...]:
    """Where comparisons of one coordinate with what is no key hold at once, or next to it."""
    here = next((e for e in ex.walk(keep) if coordinate(e, m) == c), None)
    out: dict[Expr, None] = {}
    for e in ex.walk(keep):
        if here is None or e.op not in ex.COMPARISONS or not all(a.dtype in ex.INTEGERS for a in e.args):
            continue
        form = affine(e.args[0]) - affine(e.args[1])
        factor = form.coefficient(here)
        rest = (form - affine(here).scaled(factor)).scaled(-factor)
        if abs(factor) == 1 and not any(set(m.ranks) & set(a.ranks) or ex.loads(a) for a in rest.atoms):
            step = {"lt": -factor, "gt": factor}.get(e.op, 0)
            out[(rest + affine(ex.const(step))).term()] = None
            # |m − x| ≤ r holds at x as well, which no bound says
            if rest.constant and e.op in ("le", "lt", "ge", "gt"):
                out[(rest - affine(ex.const(rest.constant))).term()] = None
    return tuple(x for x in out if x.ranks)
