"""Comparisons that extents settle: against brute force, for numbers and for symbols."""

from __future__ import annotations

import itertools

import pytest
import sympy

from reattend.patterns import expr as ex
from reattend.patterns.attention.concat import settle
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, size_term
from reattend.patterns.expr import Expr

P, M = ex.index("p"), ex.index("m")
S = sympy.Symbol("s0", integer=True)


def left_of(condition: Expr, queries: Size, keys: Size) -> Expr:
    """What is left of a condition between so many queries and keys."""
    inputs = (Tensor("Q", (queries,), "f32"), Tensor("K", (keys,), "f32"))
    body = ex.where(condition, ex.load("Q", (P,), "f32") * ex.load("K", (M,), "f32"), ex.const(0.0, "f32"))
    out = Tensor("S", (queries, keys), "f32")
    made = Einsum(Access("S", (P, M)), body)
    c = Cascade("c", (Rank("p", queries), Rank("m", keys)), (*inputs, out), (made,), ("S",))
    (e,) = settle(c).einsums
    return e.body.args[0] if e.body.op == "where" else ex.const(bool(ex.loads(e.body)))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (5, 1), (3, 5)])
def test_numbers_against_brute_force(queries: int, keys: int) -> None:
    for a, b, c in itertools.product((-2, -1, 0, 1, 2), (-1, 0, 1), range(-6, 7)):
        condition = ex.index("p") * a + ex.index("m") * b <= ex.const(c)
        if not condition.ranks:
            continue
        points = {a * p + b * m <= c for p in range(queries) for m in range(keys)}
        got = left_of(condition, queries, keys)
        assert (got.value if got.is_const else None) == (points.pop() if len(points) == 1 else None), str(condition)


@pytest.mark.parametrize(
    ("condition", "keys", "answer"),
    [
        (M <= size_term(S) - 1, S, True),
        (M < size_term(S), S, True),
        (M <= size_term(S), S + 1, True),
        (M >= size_term(S), S, False),
        (M <= size_term(S) - 2, S, None),
        (M <= ex.symbol("offset"), S, None),
        (M - size_term(S) > ex.const(0), S, False),
        (M * 2 < size_term(S) * 2, S, True),
    ],
)
def test_symbols(condition: Expr, keys: Size, answer: bool | None) -> None:
    """A size is no less than 0; of a number that is no size nothing is known."""
    inputs = (Tensor("Q", (1,), "f32"), Tensor("K", (S,), "f32"))
    body = ex.where(condition, ex.load("Q", (P,), "f32"), ex.const(0.0, "f32"))
    made = Einsum(Access("S", (P, M)), body)
    c = Cascade("c", (Rank("p", 1), Rank("m", keys)), (*inputs, Tensor("S", (1, keys), "f32")), (made,), ("S",))
    (e,) = settle(c).einsums
    assert (bool(ex.loads(e.body)) if e.body.op != "where" else None) == answer
