"""Conditions that the extents of their ranks decide: true, or false, at every point.

    before   where(m ≤ M − 1, 0, −∞)        M keys, m one of them
    after    0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import sympy

from .. import expr as ex
from ..cascade import Cascade, Size, size_term
from ..expr import Expr
from ..terms.affine import Affine, affine


def decide(c: Cascade) -> Cascade:
    """The cascade without conditions that hold, or fail, wherever they are read."""
    sizes = frozenset(str(s) for t in c.inputs for s in t.shape if isinstance(s, sympy.Symbol))
    extents = {r.name: affine(_last(r.size)) for r in c.ranks}

    def body(e: Expr) -> Expr:
        answers = {x: _decided(x, extents, sizes) for x in ex.walk(e)}
        return ex.substitute(e, {x: ex.const(yes) for x, yes in answers.items() if yes is not None})

    return replace(c, einsums=tuple(replace(e, body=body(e.body)) for e in c.einsums))


@lru_cache(maxsize=4096)
def _last(size: Size) -> Expr:
    return size_term(size) - 1


def _decided(e: Expr, extents: Mapping[str, Affine], sizes: frozenset[str]) -> bool | None:
    """Whether a comparison of integers is true everywhere, or false; None where it may be either."""
    if e.op not in ("lt", "le", "gt", "ge") or any(x.dtype not in ex.INTEGERS for x in e.args) or not e.ranks:
        return None
    x, y = e.args if e.op in ("lt", "le") else e.args[::-1]
    strict = Affine((), int(e.op in ("lt", "gt")))
    form = affine(x) - affine(y) + strict
    if _at_most_zero(_largest(form, extents), sizes):
        return True
    return False if _at_most_zero(_largest(form.scaled(-1) + Affine((), 1), extents), sizes) else None


def _largest(form: Affine, extents: Mapping[str, Affine]) -> Affine:
    """The form with each rank at the end of its extent where the form is largest."""
    out = Affine((), form.constant)
    for a, n in form.terms:
        rank = str(a.attr) if a.op == "index" else ""
        if rank not in extents:
            out = out + Affine(((a, n),), 0)
        elif n > 0:
            out = out + extents[rank].scaled(n)
    return out


def _at_most_zero(form: Affine, sizes: frozenset[str]) -> bool:
    """Sizes are at least 0; of any other atom nothing is known."""
    known = all(a.op == "symbol" and str(a.attr) in sizes and n < 0 for a, n in form.terms)
    return known and form.constant <= 0
