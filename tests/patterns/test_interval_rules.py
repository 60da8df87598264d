"""Every rule of integer intervals against all values in all small intervals, in every kind of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
import torch

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Rank
from reattend.patterns.expr import Expr
from reattend.patterns.terms.arithmetic import INTEGER_RANGE, LIMIT, Arrays, clip_integer
from reattend.patterns.terms.interval_rules import BITWISE, LIMITS, PLAIN, Ends, bitwise, interval
from reattend.patterns.terms.overflow import HELD, passes

pytestmark = pytest.mark.thin(2)

X, Y = ex.index("x"), ex.index("y")
REACH = 6
NUMBERS = range(-REACH, REACH + 1)
INTERVALS = [(a, b) for a in NUMBERS for b in NUMBERS if a <= b]
PAIRS = list(itertools.product(INTERVALS, INTERVALS))
# What an infinite end stands for in a table that has to stop somewhere.
FAR = 40
OPEN = [
    *((-math.inf, b) for b in NUMBERS), *((a, math.inf) for a in NUMBERS), (-math.inf, math.inf),
    *((a, b) for a, b in INTERVALS if b - a in (0, 1, 5)),
]

UNARY: dict[str, Callable[[int], int]] = {
    "neg": lambda x: -x, "not": lambda x: ~x, "abs": abs, "relu": lambda x: max(x, 0),
    "sign": lambda x: (x > 0) - (x < 0), "floor": math.floor, "ceil": math.ceil, "round": round, "trunc": math.trunc,
}
BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "max": max, "min": min,
    "floordiv": lambda x, y: x // y, "mod": lambda x, y: x % y, **BITWISE,
}
# Their intervals are the smallest ones; those of the others may be wider.
SMALLEST = ("add", "sub", "mul", "max", "min", "floordiv")


def term(op: str) -> Expr:
    return ex.binary(op, X, Y) if op in BINARY else ex.unary(op, X)


def ruled(e: Expr, args: Sequence[Ends[float]]) -> Ends[float]:
    found = bitwise(e.op, args, PLAIN) if e.op in BITWISE else interval(e, args, PLAIN)
    assert found is not None
    return found


class Values:
    """All values of an operator on a square around 0; `hull` has the extremes over a box, None where there is no value."""

    def __init__(self, f: Callable[[int, int], int], far: int, without: bool) -> None:
        """`without`: the operator has no value for y = 0."""
        self.far = far
        rows = [[f(x, y) if y or not without else 0 for y in range(-far, far + 1)] for x in range(-far, far + 1)]
        known = np.array([[bool(y) or not without for y in range(-far, far + 1)]] * (2 * far + 1))
        self.low = np.where(known, np.array(rows, np.float64), math.inf)
        self.high = np.where(known, np.array(rows, np.float64), -math.inf)

    def hull(self, x: Ends[float], y: Ends[float]) -> Ends[float] | None:
        at = tuple(slice(max(int(a), 0), int(b) + 1) for a, b in (self._places(x), self._places(y)))
        low, high = self.low[at].min(), self.high[at].max()
        return (low, high) if low <= high else None

    def _places(self, x: Ends[float]) -> Ends[float]:
        return max(x[0], -self.far) + self.far, min(x[1], self.far) + self.far


def values(op: str, far: int = REACH) -> Values:
    return Values(BINARY[op], far, op in ("floordiv", "mod"))


# --- Python's numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", UNARY)
def test_one_operand(op: str) -> None:
    for a, b in INTERVALS:
        found = [UNARY[op](x) for x in range(a, b + 1)]
        assert ruled(term(op), [(a, b)]) == (min(found), max(found)), (op, a, b)


@pytest.mark.parametrize("op", BINARY)
def test_two_operands(op: str) -> None:
    table = values(op)
    for x, y in PAIRS:
        hull = table.hull(x, y)
        if hull is None:
            continue
        lo, hi = ruled(term(op), [x, y])
        assert lo <= hull[0] <= hull[1] <= hi, (op, x, y)
        if op in SMALLEST or (x[0] == x[1] and y[0] == y[1]):
            assert (lo, hi) == hull, (op, x, y)


@pytest.mark.parametrize("op", BINARY)
def test_infinite_ends(op: str) -> None:
    table = values(op, FAR)
    for x, y in itertools.product(OPEN, OPEN):
        hull = table.hull(x, y)
        if hull is not None:
            lo, hi = ruled(term(op), [x, y])
            assert lo <= hull[0] <= hull[1] <= hi, (op, x, y)


@pytest.mark.parametrize("op", [*UNARY, *BINARY])
def test_nothing_is_asked_of_an_empty_interval(op: str) -> None:
    """A rank of size 0 reaches from 0 to −1; a rule may answer anything, but it answers."""
    empty = (0, -1)
    for other in INTERVALS:
        for args in ([empty, other], [other, empty], [empty, empty]):
            assert len(ruled(term(op), args[: 1 if op in UNARY else 2])) == 2


def test_remainders_keep_to_the_sign_of_the_divisor_and_below_it() -> None:
    for x, (c, d) in PAIRS:
        lo, hi = ruled(term("mod"), [x, (c, d)])
        if c > 0:
            assert 0 <= lo <= hi <= d - 1, (x, c, d)
            assert x[0] < 0 or hi <= x[1], (x, c, d)
        if d < 0:
            assert c + 1 <= lo <= hi <= 0, (x, c, d)
            assert x[1] > 0 or lo >= x[0], (x, c, d)


def test_bits_keep_to_the_signs_of_their_operands() -> None:
    for x, y in PAIRS:
        natural = [v for v in (x, y) if v[0] >= 0]
        if natural:
            lo, hi = ruled(term("and"), [x, y])
            assert 0 <= lo <= hi <= min(b for _, b in natural), (x, y)
        if len(natural) == 2:
            assert max(x[0], y[0]) <= ruled(term("or"), [x, y])[0], (x, y)
            assert 0 <= ruled(term("xor"), [x, y])[0], (x, y)
        # six is 110: no bit beyond the third is set
        assert all(ruled(term(op), [x, y])[1] <= 7 for op in BITWISE), (x, y)


@pytest.mark.parametrize("k", [k for k in NUMBERS if k])
@pytest.mark.parametrize("op", ["mul", "floordiv", "mod"])
def test_a_constant_gives_the_smallest_interval(op: str, k: int) -> None:
    e = ex.make(op, (X, ex.const(k)))
    table = values(op)
    for x in INTERVALS:
        if e.op == op:
            assert ruled(e, [x, (k, k)]) == table.hull(x, (k, k)), (e, x)
        if op == "mul" and k != 1:
            assert ruled(ex.const(k) * X, [(k, k), x]) == table.hull(x, (k, k)), (e, x)


@pytest.mark.parametrize("op", ["floordiv", "mod"])
def test_no_rule_divides_by_0(op: str) -> None:
    assert interval(ex.make(op, (X, ex.const(0))), [(1, 2), (0, 0)], PLAIN) is None


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_powers(k: int) -> None:
    for a, b in INTERVALS:
        found = [x**k for x in range(a, b + 1)]
        assert ruled(ex.make("pow", (X, ex.const(k))), [(a, b), (k, k)]) == (min(found), max(found))
        if k == 2:
            assert ruled(X * X, [(a, b), (a, b)]) == (min(found), max(found))


def test_powers_that_leave_every_type_leave_it_on_the_right_side() -> None:
    for k in (63, 64, 65, 66, 1001):
        lo, hi = ruled(ex.make("pow", (X, ex.const(k))), [(-2, 3), (k, k)])
        assert hi > 2**63
        assert lo == 0 if k % 2 == 0 else lo <= -(2**63)


def test_unruled_powers_are_said_to_be() -> None:
    for exponent in (Y, ex.const(0), ex.const(-1)):
        assert interval(Expr("pow", (X, exponent), None, "i64"), [(1, 2), (0, 3)], PLAIN) is None


def test_a_choice_is_either() -> None:
    e = ex.where(X < Y, X, Y)
    for x, y in PAIRS:
        assert ruled(e, [(0, 1), x, y]) == (min(x[0], y[0]), max(x[1], y[1]))


def test_numbers_beyond_float64_stay_exact() -> None:
    big = 2**63 - 1
    assert ruled(term("add"), [(big, big), (1, 1)]) == (2**63, 2**63)
    assert ruled(term("mul"), [(big, big), (big, big)]) == (big * big, big * big)
    assert ruled(term("floordiv"), [(big, big), (2, 2)]) == (2**62 - 1, 2**62 - 1)
    assert ruled(term("xor"), [(big, big), (1, 1)]) == (big - 1, big - 1)


# --- arrays -----------------------------------------------------------------------------------------------------


def columns(pairs: Sequence[tuple[Ends[float], Ends[float]]]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(c, np.float64) for c in zip(*((*x, *y) for x, y in pairs), strict=True))


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("op", [*UNARY, *BINARY])
def test_arrays_say_what_python_says(op: str, xp: ModuleType) -> None:
    pairs = [(x, y) for x, y in PAIRS if op not in ("floordiv", "mod") or y != (0, 0)]
    a, b, c, d = (v if xp is np else torch.from_numpy(v) for v in columns(pairs))
    args = [(a, b), (c, d)][: 1 if op in UNARY else 2]
    with np.errstate(all="ignore"):
        found = bitwise(op, args, Arrays(xp)) if op in BITWISE else interval(term(op), args, Arrays(xp))
    assert found is not None
    expected = [ruled(term(op), [x, y][: len(args)]) for x, y in pairs]
    for end, wanted in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(end), np.array(wanted, np.float64))


@pytest.mark.parametrize("op", BINARY)
def test_infinite_ends_of_arrays(op: str) -> None:
    table = values(op, FAR)
    pairs = [(x, y) for x, y in itertools.product(OPEN, OPEN) if table.hull(x, y) is not None]
    a, b, c, d = columns(pairs)
    with np.errstate(all="ignore"):
        found = bitwise(op, [(a, b), (c, d)], Arrays(np)) if op in BITWISE else interval(term(op), [(a, b), (c, d)], Arrays(np))
    assert found is not None
    lo, hi = clip_integer(found, "i64", np)
    low, high = (np.array(v) for v in zip(*(table.hull(x, y) or (0, 0) for x, y in pairs), strict=True))
    assert (lo <= low).all()
    assert (hi >= high).all()


# --- types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u8", "i8"])
def test_what_leaves_its_type_wraps(dtype: str) -> None:
    least, most = LIMITS[dtype]
    wrap = {x: (x - least) % 256 + least for x in range(-700, 700)}
    pairs = [(a, b) for a in range(-600, 600) for b in (a, a + 1, a + 7, a + 90)]
    lo, hi = clip_integer((np.array([a for a, _ in pairs], np.float64), np.array([b for _, b in pairs], np.float64)), dtype, np)
    for (a, b), low, high in zip(pairs, lo, hi, strict=True):
        found = [wrap[x] for x in range(a, b + 1)]
        assert least <= low <= min(found) <= max(found) <= high <= most, (a, b)
        if a == b or (a >= least and b <= most):
            assert (low, high) == (min(found), max(found)), (a, b)


def test_the_types_are_those_of_torch() -> None:
    for name, dtype in {"u8": torch.uint8, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64}.items():
        assert LIMITS[name] == (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        assert INTEGER_RANGE[name] == (LIMITS[name] if name != "i64" else (-math.inf, math.inf))
    assert LIMIT < HELD["i64"]


@pytest.mark.parametrize("dtype", ["i32", "i64"])
def test_a_term_passes_its_type_where_its_largest_value_does(dtype: str) -> None:
    """Python's integers decide it: one more than the largest number passes, the largest number does not."""
    most = LIMITS[dtype][1]
    x = ex.cast(X, dtype)
    for extent in (1, 2, 7, 4096):
        ranks = {"x": Rank("x", extent)}
        for e in (x + ex.const(most - extent, dtype), x - ex.const(most, dtype), ex.const(most - extent, dtype) - -x):
            assert passes(e, ranks) is None, (e, extent)
        for e in (x + ex.const(most - extent + 1, dtype), -x - ex.const(most, dtype)):
            assert passes(e, ranks) is e, (e, extent)


def test_bits_of_a_type_stay_in_it() -> None:
    seen = ex.load("seen", (X,), "i32")
    for op in BITWISE:
        e = ex.binary(op, ex.binary(op, ex.binary(op, seen, ex.load("a", (X,), "i32")), ex.load("b", (X,), "i32")), ex.const(5, "i32"))
        assert passes(e, {"x": Rank("x", 8)}) is None
