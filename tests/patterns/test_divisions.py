"""Divisions that ranges carry out: every rewritten term has the value of the term at every point."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sympy

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, term_size
from reattend.patterns.expr import Expr
from reattend.patterns.terms.constant import number
from reattend.patterns.terms.divisions import divided

P, M = ex.index("p"), ex.index("m")
S = sympy.Symbol("s", integer=True, positive=True)


def through(at: Expr, p: Size, m: Size, size: Size = 1 << 20) -> Expr:
    """A coordinate after the rewrite, over p and m of these sizes; what a mask makes of it is in the mask."""
    ranks = (Rank("p", p), Rank("m", m))
    body = ex.load("X", (at,), "f32")
    c = Cascade("one", ranks, (Tensor("X", (size,)), Tensor("O", (p, m))), (Einsum(Access("O", (P, M)), body),), ("O",))
    (e,) = divided(c).einsums
    return e.body.args[0]


def condition(keep: Expr, p: int, m: int) -> Expr:
    body = ex.where(keep, ex.const(1.0, "f32"), ex.const(0.0, "f32"))
    c = Cascade("one", (Rank("p", p), Rank("m", m)), (Tensor("O", (p, m)),), (Einsum(Access("O", (P, M)), body),), ("O",))
    (e,) = divided(c).einsums
    return e.body


def shifted(x: Expr, n: Expr | int) -> Expr:
    """What padding by one column, a view the other way round and a cut of the first row make of an offset."""
    return (x // n + 1) * n + x % n


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_a_shifted_row_of_relative_positions_is_a_difference(n: int) -> None:
    x = shifted(P * (2 * n - 1) + M, n)
    assert through(x // (2 * n), n, n) is P or n == 1
    assert str(through(x % (2 * n) - 1, n, n)) in (f"m - p + {n - 1}", f"m − p + {n - 1}") or n == 1
    assert condition(x % (2 * n) - 1 >= 0, n, n) is ex.const(1.0, "f32")


def test_so_it_is_for_sizes_without_a_number() -> None:
    n = ex.symbol("s")
    x = shifted(P * (2 * n - 1) + M, n)
    assert through(x // (2 * n), S, S) is P
    found = through(x % (2 * n) - 1, S, S)
    assert found.op != "mod"
    assert sympy.expand(term_size(ex.substitute(found, {P: ex.const(2), M: ex.const(3)})) - S) == 0


def test_what_depends_on_the_position_stays() -> None:
    """Transformer-XL without more positions than queries: what lies above the diagonal is read from the next row."""
    x = (P + 1) * 8 + M
    assert any(t.op == "floordiv" for t in ex.walk(through(x // 9, 8, 8)))
    assert condition(x % 9 - 1 >= 0, 8, 8).op == "where"


def test_a_condition_that_never_holds_is_false() -> None:
    assert condition((P * 4 + M) // 4 > 3, 4, 4) is ex.const(0.0, "f32")
    assert condition((P * 4 + M) // 4 > 2, 4, 4).op == "where"


def terms(rng: np.random.Generator, count: int) -> list[Expr]:
    """Sums, products with numbers, quotients and remainders of two coordinates, at random."""
    pool = [P, M, ex.const(3)]
    for _ in range(count):
        a, b = (pool[i] for i in rng.integers(0, len(pool), 2))
        n = int(rng.integers(1, 9))
        made = (a + b, a - b, a * n, a // n, a % n, (a // n) * n + a % n, a + n)
        pool.append(made[int(rng.integers(0, len(made)))])
    return pool


@pytest.mark.parametrize("seed", range(40))
def test_the_value_is_the_same_at_every_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, m = (int(x) for x in rng.integers(1, 8, 2))
    for at in terms(rng, 12):
        new = through(at, p, m)
        for i, j in itertools.product(range(p), range(m)):
            place = {P: i, M: j}
            assert number(new, {}, place) == number(at, {}, place), (at, new, place)
