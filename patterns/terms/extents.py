"""Comparisons that the extents of their ranks settle: true, or false, at every point.

    m ≤ M − 1 with M keys, m one of them: true        p·2 − m > 2·P: false
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .. import expr as ex
from ..expr import Expr
from .affine import Affine, affine


def settled(e: Expr, last: Mapping[str, Affine], sizes: Collection[str]) -> bool | None:
    """Whether a comparison of integers holds everywhere, or nowhere; None where it may be either.

    `last` is the greatest coordinate of each rank; `sizes` are the symbols that are sizes, and so no less than 0.
    """
    if e.op not in ("lt", "le", "gt", "ge") or any(x.dtype not in ex.INTEGERS for x in e.args) or not e.ranks:
        return None
    x, y = e.args if e.op in ("lt", "le") else e.args[::-1]
    strict = Affine((), int(e.op in ("lt", "gt")))
    form = affine(x) - affine(y) + strict
    if _at_most_zero(_largest(form, last), sizes):
        return True
    return False if _at_most_zero(_largest(form.scaled(-1) + Affine((), 1), last), sizes) else None


def _largest(form: Affine, last: Mapping[str, Affine]) -> Affine:
    """The form with each rank at the end of its extent where the form is largest."""
    out = Affine((), form.constant)
    for a, n in form.terms:
        rank = str(a.attr) if a.op == "index" else ""
        if rank not in last:
            out = out + Affine(((a, n),), 0)
        elif n > 0:
            out = out + last[rank].scaled(n)
    return out


def _at_most_zero(form: Affine, sizes: Collection[str]) -> bool:
    """Of an atom that is no size nothing is known."""
    known = all(a.op == "symbol" and str(a.attr) in sizes and n < 0 for a, n in form.terms)
    return known and form.constant <= 0
