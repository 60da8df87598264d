"""The interval of an integer operator from the intervals of its operands: one set of rules over any kind of numbers.

    x in [a, b], y in [c, d]      x + y in [a + c, b + d]      x % 8 in [a % 8, b % 8] where a // 8 = b // 8, else in [0, 7]

Who asks says what a number is (`Numbers`) and what the leaves can be; None says that no rule knows.

    who                             asks                                                   numbers
    terms/intervals.py              what can a term be over each of many boxes?            arrays of float64, to 2^50
    terms/overflow.py               may a term pass its 64 bits?                           Python integers, exact
    codegen/text/integers.py        does it need 64 bits, or a clamp?                      Python numbers and ±∞
    cost_model/count/work.py        how many elements can one tile read?                   Python numbers and ±∞
    codegen/text/tile_terms.py      which terms are a mask's ends over a printed tile?     terms

Integers are whole numbers here: what leaves its type is for the caller to say. A division by 0 has no value, so that
a divisor whose interval holds 0 counts without it. Conditions are proofs: where one fails, what holds anyhow is taken.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeAlias, TypeVar

from ..expr import Expr
from ..operators import facts

# The least and greatest number of each type.
LIMITS: Mapping[str, tuple[int, int]] = {
    "b1": (0, 1), "u8": (0, 2**8 - 1), "i8": (-(2**7), 2**7 - 1), "i16": (-(2**15), 2**15 - 1),
    "i32": (-(2**31), 2**31 - 1), "i64": (-(2**63), 2**63 - 1),
}
BITWISE: Mapping[str, Callable[[int, int], int]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


class Number(Protocol):
    def __add__(self, other: Self | int, /) -> Self: ...
    def __sub__(self, other: Self | int, /) -> Self: ...
    def __mul__(self, other: Self | int, /) -> Self: ...
    def __neg__(self) -> Self: ...


class TruthValue(Protocol):
    def __and__(self, other: Self, /) -> Self: ...
    def __or__(self, other: Self, /) -> Self: ...


N = TypeVar("N", bound=Number)
C = TypeVar("C", bound=TruthValue)
Ends: TypeAlias = tuple[N, N]


class Numbers(Protocol[N, C]):
    """What the rules do with ends beside adding and subtracting them. Whole numbers of the rules come second."""

    def least(self, x: N, y: N | int, /) -> N: ...
    def most(self, x: N, y: N | int, /) -> N: ...
    def times(self, x: N, y: N, /) -> N:
        """The product of two ends, in which 0 · ∞ is 0."""

    def quotient(self, x: N, y: N | int, /) -> N:
        """⌊x / y⌋, and any number for y = 0."""

    def rest(self, x: N, turn: N, y: N | int, /) -> N:
        """x − turn · y, which is x % y for turn = x // y."""

    def natural(self, x: N, /) -> C:
        """Is an end known to be no less than 0?"""

    def same(self, x: N, y: N, /) -> C: ...
    def choose(self, proved: C, tight: N | int, safe: N | int, /) -> N: ...


class Binary(Numbers[N, C], Protocol[N, C]):
    """Numbers whose bits can be read."""

    def ones(self, x: N, /) -> N:
        """The least 2^k − 1 that a number does not exceed; 0 for what is negative."""

    def bits(self, op: str, x: N, y: N, /) -> N:
        """A bitwise operator on two finite numbers, and any number for others."""


# --- one operand ------------------------------------------------------------------------------------------------


def interval(e: Expr, args: Sequence[Ends[N]], n: Numbers[N, C]) -> Ends[N] | None:
    """The interval of an arithmetic operator, or of a choice between its last two operands."""
    if len(args) == 1:
        return _unary(e.op, *args[0], n)
    (a, b), (c, d) = args[-2:]
    match e.op:
        case "add":
            return a + c, b + d
        case "sub":
            return a - d, b - c
        case "mul":
            return _product(e, (a, b), (c, d), n)
        case "max":
            return n.most(a, c), n.most(b, d)
        case "min":
            return n.least(a, c), n.least(b, d)
        case "where":
            return n.least(a, c), n.most(b, d)
        case "floordiv" | "mod" if e.args[1].is_const and not e.args[1].value:
            return None
        case "floordiv":
            return _quotient(e.args[1], (a, b), (c, d), n)
        case "mod":
            return _remainder(e.args[1], (a, b), (c, d), n)
        case "pow":
            return _power(e.args[1], (a, b), n)
        case "draw":
            low, high = map(int, facts(e.op).range)
            return n.most(n.least(a, low), low), n.least(n.most(b, high), high)
    return None


def _unary(op: str, a: N, b: N, n: Numbers[N, C]) -> Ends[N] | None:
    match op:
        case "neg":
            return -b, -a
        case "not":
            return -b - 1, -a - 1
        case "abs":
            return n.most(n.most(a, -b), 0), n.most(b, -a)
        case "relu":
            return n.most(a, 0), n.most(b, 0)
        case "sign":
            return n.most(n.least(a, 1), -1), n.most(n.least(b, 1), -1)
        case "floor" | "ceil" | "trunc" | "round":
            return a, b
    return None


# --- products and powers ----------------------------------------------------------------------------------------


def _product(e: Expr, x: Ends[N], y: Ends[N], n: Numbers[N, C]) -> Ends[N]:
    left, right = e.args
    if left is right:
        return _raised(x, 2, n)
    if left.is_const and not right.is_const:
        x, y, right = y, x, left
    if right.is_const and right.value:
        (a, b), factor = x if right.value > 0 else x[::-1], y[0]
        return a * factor, b * factor
    return _corners(n.times, x, y, n)


def _corners(f: Callable[[N, N], N], x: Ends[N], y: Ends[N], n: Numbers[N, C]) -> Ends[N]:
    """Extremes of an operation that is monotone in each argument while the other stays."""
    p, q, r, s = f(x[0], y[0]), f(x[0], y[1]), f(x[1], y[0]), f(x[1], y[1])
    return n.least(n.least(p, q), n.least(r, s)), n.most(n.most(p, q), n.most(r, s))


def _power(exponent: Expr, x: Ends[N], n: Numbers[N, C]) -> Ends[N] | None:
    return _raised(x, int(exponent.value), n) if exponent.is_const and exponent.value >= 1 else None


def _raised(x: Ends[N], exponent: int, n: Numbers[N, C]) -> Ends[N]:
    """An odd power rises everywhere, an even one away from 0."""
    a, b = x
    if exponent % 2 == 0:
        a, b = n.most(n.most(a, -b), 0), n.most(b, -a)
    lo, hi = a, b
    # the power of a number of 2^64 or more has left every type long before
    for _ in range(min(exponent, 64 + exponent % 2) - 1):
        lo, hi = lo * a, hi * b
    return lo, hi


# --- divisions --------------------------------------------------------------------------------------------------


def _quotient(divisor: Expr, x: Ends[N], y: Ends[N], n: Numbers[N, C]) -> Ends[N]:
    c, d = y
    if divisor.is_const:
        a, b = x if divisor.value > 0 else x[::-1]
        return n.quotient(a, c), n.quotient(b, c)
    # by what lies above 0, and by what lies below
    above = _corners(n.quotient, x, (n.most(c, 1), d), n)
    below = _corners(n.quotient, x, (c, n.least(d, -1)), n)
    lo = n.choose(n.natural(-c - 1), n.least(above[0], below[0]), above[0])
    hi = n.choose(n.natural(-c - 1), n.most(above[1], below[1]), above[1])
    some = n.natural(d - 1)
    return n.choose(some, lo, below[0]), n.choose(some, hi, below[1])


def _remainder(divisor: Expr, x: Ends[N], y: Ends[N], n: Numbers[N, C]) -> Ends[N]:
    """A remainder lies between 0 and its divisor, and has the divisor's sign."""
    (a, b), (c, d) = x, y
    if divisor.is_const and divisor.value > 0:
        k = int(divisor.value)
        first, last = n.quotient(a, k), n.quotient(b, k)
        # else there is a multiple in between, with k − 1 before it
        inside = n.same(first, last)
        return n.choose(inside, n.rest(a, first, k), 0), n.choose(inside, n.rest(b, last, k), k - 1)
    # what is natural is no less than its remainder
    low, high = n.least(c + 1, 0), n.most(d - 1, 0)
    low, high = n.choose(n.natural(-b), n.most(low, a), low), n.choose(n.natural(a), n.least(high, b), high)
    first, last = n.quotient(a, c), n.quotient(b, c)
    # between two neighbouring multiples of one divisor it rises with its argument
    inside = n.same(c, d) & n.same(first, last)
    return n.choose(inside, n.rest(a, first, c), low), n.choose(inside, n.rest(b, last, c), high)


# --- bits -------------------------------------------------------------------------------------------------------


def bitwise(op: str, args: Sequence[Ends[N]], n: Binary[N, C]) -> Ends[N]:
    """`and`, `or`, `xor` in two's complement: exact for single numbers, else by signs and the number of bits."""
    (a, b), (c, d) = args
    top = n.ones(n.most(n.most(b, -a - 1), n.most(d, -c - 1)))
    left, right = n.natural(a), n.natural(c)
    match op:
        case "and":
            one = n.choose(left, b, n.choose(right, d, n.most(b, d)))
            lo, hi = n.choose(left | right, 0, -top - 1), n.choose(left & right, n.least(b, d), one)
        case "or":
            # bits are only added, and those of a negative number raise it
            lo, hi = n.choose(left & right, n.most(a, c), n.least(a, c)), top
        case _:
            lo, hi = n.choose(left & right, 0, -top - 1), top
    single, exact = n.same(a, b) & n.same(c, d), n.bits(op, a, c)
    return n.choose(single, exact, lo), n.choose(single, exact, hi)


# --- Python's numbers -------------------------------------------------------------------------------------------


class Plain:
    """Python's integers, which are exact, and ±∞."""

    def least(self, x: float, y: float) -> float:
        return min(x, y)

    def most(self, x: float, y: float) -> float:
        return max(x, y)

    def times(self, x: float, y: float) -> float:
        return x * y if x and y else 0

    def quotient(self, x: float, y: float) -> float:
        if abs(x) == math.inf:
            return x if y > 0 else -x
        return x // y if y else 0

    def rest(self, x: float, turn: float, y: float) -> float:
        return x - self.times(turn, y) if abs(x) != math.inf else x

    def natural(self, x: float) -> bool:
        return x >= 0

    def same(self, x: float, y: float) -> bool:
        return x == y

    def choose(self, proved: bool, tight: float, safe: float) -> float:
        return tight if proved else safe

    def ones(self, x: float) -> float:
        return (1 << max(int(x), 0).bit_length()) - 1 if x != math.inf else x

    def bits(self, op: str, x: float, y: float) -> float:
        return BITWISE[op](int(x), int(y)) if math.inf not in (abs(x), abs(y)) else 0


PLAIN = Plain()
