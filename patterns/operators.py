"""The table of operators: what each one is, once, for everybody who computes, bounds, splits or counts terms.

    fold       on Python's numbers, as tensors compute it
    numpy, torch, algebra      a name in that library (algebra: sympy), or a formula over it; none of them is imported
    arity, result              operands, and the type: theirs, a float, a truth
    range, positive            all results lie in it (a zero has no sign here), and none is 0
    monotone, exact            1: never falls, −1: never rises, on a domain that is an interval; nothing is rounded
    pole, narrow               infinite at some number; rounding the operands first makes no difference
    law, of                    how it meets products and sums, with its base or exponent
    effort                     the unit of a processor that does it, and what it costs there; it cannot be left out

An operator that is added here is evaluated, folded, bounded, lifted, split and counted; each language adds a spelling.
What follows from the rest is a property: `bounded`, `curved`, `steep`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeAlias

Scalar: TypeAlias = bool | int | float
# Of a library's arrays or terms; no library is imported here, so its types are not known.
Function: TypeAlias = Callable[..., Any]
# A dotted name in a library's namespace, or a formula whose first argument is that namespace.
Meaning: TypeAlias = str | Function
Unit: TypeAlias = Literal["lane", "special", "root", "division", "maximum", "mask"]
# exponential  f(x + y) = f(x)·f(y)      power        f(x·y) = f(x)·f(y), f(x) = x^k
# logarithm    f(x·y) = f(x) + f(y)      homogeneous  f(h·x) = h·f(x) for h > 0
# affine       f(x + y, z) + f(0, z) = f(x, z) + f(y, z): a line in the first operand while the second stands
Law: TypeAlias = Literal["", "exponential", "logarithm", "power", "homogeneous", "affine"]
INF = math.inf
ANY, NATURAL, SIGNED, SHARE = (-INF, INF), (0.0, INF), (-1.0, 1.0), (0.0, 1.0)


@dataclass(frozen=True)
class Effort:
    """What one result costs.

    `calls` of a GPU's special-function unit; `exps`: the price on a host, in exponentials, where nobody timed it; `slots`
    in which a lane of a GPU issues it.
    """

    unit: Unit = "lane"
    calls: int = 0
    exps: float = 1.0
    slots: float = 1.0


LANE, ROOT, DIVISION, MAXIMUM, MASK = (Effort(u) for u in ("lane", "root", "division", "maximum", "mask"))
# Half of the multiplies and additions fuse; a sign goes with what reads it.
FUSES, FREE = Effort(slots=0.75), Effort(slots=0.0)
CALL = Effort("special", 1)


@dataclass(frozen=True)
class Operator:
    """One operator of one or two operands; the head of this file says what each field holds."""

    name: str
    fold: Callable[..., Scalar]
    # "" stands for the operator's own name
    numpy: Meaning = ""
    torch: Meaning = ""
    algebra: Meaning | None = None
    arity: Literal[1, 2] = 1
    result: Literal["same", "float", "truth"] = "same"
    range: tuple[float, float] = ANY
    positive: bool = False
    monotone: Literal[-1, 0, 1] = 0
    exact: bool = False
    pole: bool = False
    narrow: bool = False
    law: Law = ""
    of: float = 0.0
    effort: Effort = field(kw_only=True)
    # how terms are shown: the sign between the operands, and how tightly it binds
    sign: str = ""
    level: int = 0

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.range[0]) and math.isfinite(self.range[1])

    @property
    def curved(self) -> bool:
        """Is it a number that follows the operands along no line? Where it stands on a score, the row rule begins."""
        return self.law != "affine" and self.effort.unit != "mask"

    @property
    def steep(self) -> bool:
        """Does it pass all bounds at a modest number, as exponentials do?"""
        return self.arity == 1 and self.result == "float" and math.isinf(self.fold(1e4))

    def in_numpy(self, numpy: ModuleType) -> Function:
        return _meaning(self.numpy or self.name, numpy)

    def in_torch(self, torch: ModuleType) -> Function:
        return _meaning(self.torch or self.name, torch)

    @property
    def aten(self) -> str:
        """What a graph calls it."""
        return (self.torch if isinstance(self.torch, str) and self.torch else self.name).rpartition(".")[2]

    def in_algebra(self, sympy: object) -> Function | None:
        """Over sympy, or over whatever has functions of the same names."""
        return _meaning(self.algebra, sympy) if self.algebra is not None else None


def _meaning(of: Meaning, library: object) -> Function:
    """The function that a name or a formula stands for in a library."""
    if isinstance(of, str):
        found: Function = operator.attrgetter(of)(library)
        return found
    return partial(of, library)


# --- on Python's numbers ----------------------------------------------------------------------------------------


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _true_div(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


def _maximum(a: Scalar, b: Scalar) -> Scalar:
    return math.nan if a != a or b != b else max(a, b)


def _minimum(a: Scalar, b: Scalar) -> Scalar:
    return math.nan if a != a or b != b else min(a, b)


def _total(f: Callable[[float], float], pole: float = math.nan) -> Callable[[float], float]:
    """A function as tensors compute it: ∞ beyond all numbers, −∞ at its pole, NaN where it is not defined. Python raises."""

    def of(x: float) -> float:
        try:
            return f(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return -math.inf if x == pole else math.nan

    return of


def _rounding(f: Callable[[Scalar], int]) -> Callable[[Scalar], Scalar]:
    """∞ and NaN stay what they are, as in tensors."""
    return lambda x: f(x) if math.isfinite(x) else x


_LOW = 0xFFFFFFFF


def _draw(library: object, a: Any, b: Any) -> Any:
    """A number from 0 to 2³¹ − 1 that looks random: both operands' low 32 bits mixed until each bit depends on all.

    The finisher is `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018), which turns b·⌊2³²/φ⌋ ⊕ a about.
    """
    x = ((b & _LOW) * 0x9E3779B1 & _LOW) ^ (a & _LOW)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return (x ^ (x >> 16)) >> 1


# --- the table --------------------------------------------------------------------------------------------------

_real = partial(Operator, result="float")
_binary = partial(Operator, arity=2)
_test = partial(Operator, result="truth", effort=MASK)
_compare = partial(_test, arity=2, level=3)

_TABLE: tuple[Operator, ...] = (
    # signs, steps and selections
    Operator(
        "neg",
        operator.neg,
        "negative",
        algebra=lambda s, x: -x,
        monotone=-1,
        exact=True,
        narrow=True,
        law="affine",
        effort=FREE,
    ),
    Operator("abs", abs, algebra="Abs", range=NATURAL, exact=True, narrow=True, law="homogeneous", effort=LANE),
    Operator(
        "relu",
        lambda x: max(x, type(x)(0)),
        lambda np, x: np.maximum(x, 0),
        algebra=lambda s, x: s.Max(x, 0),
        range=NATURAL,
        monotone=1,
        exact=True,
        narrow=True,
        law="homogeneous",
        effort=LANE,
    ),
    Operator("floor", _rounding(math.floor), monotone=1, exact=True, effort=LANE),
    Operator("ceil", _rounding(math.ceil), monotone=1, exact=True, effort=LANE),
    Operator("round", _rounding(round), monotone=1, exact=True, effort=LANE),
    Operator("trunc", _rounding(math.trunc), monotone=1, exact=True, effort=LANE),
    # torch has it that NaN has no sign
    Operator(
        "sign",
        lambda x: (x > 0) - (x < 0),
        lambda np, x: np.where(x == x, np.sign(x), 0),
        range=SIGNED,
        monotone=1,
        exact=True,
        effort=LANE,
    ),
    _test("isnan", lambda x: x != x),
    _test("isinf", lambda x: isinstance(x, float) and math.isinf(x)),
    # exponentials and logarithms
    _real(
        "exp",
        _total(math.exp),
        algebra="exp",
        range=NATURAL,
        positive=True,
        monotone=1,
        law="exponential",
        of=math.e,
        effort=CALL,
    ),
    _real(
        "exp2",
        _total(lambda x: 2.0**x),
        algebra=lambda s, x: 2**x,
        range=NATURAL,
        positive=True,
        monotone=1,
        law="exponential",
        of=2.0,
        effort=CALL,
    ),
    _real(
        "expm1",
        _total(math.expm1),
        algebra=lambda s, x: s.exp(x) - 1,
        range=(-1.0, INF),
        monotone=1,
        effort=CALL,
    ),
    _real("log", _total(math.log, 0.0), algebra="log", monotone=1, pole=True, law="logarithm", of=math.e, effort=CALL),
    _real("log2", _total(math.log2, 0.0), monotone=1, pole=True, law="logarithm", of=2.0, effort=CALL),
    _real("log10", _total(math.log10, 0.0), monotone=1, pole=True, law="logarithm", of=10.0, effort=CALL),
    _real(
        "log1p",
        _total(math.log1p, -1.0),
        algebra=lambda s, x: s.log(1 + x),
        monotone=1,
        pole=True,
        effort=CALL,
    ),
    _real(
        "asinh",
        math.asinh,
        "arcsinh",
        algebra="asinh",
        monotone=1,
        effort=Effort("special", 2, 27.0),
    ),
    # torch makes it a line from 20 on, where it falls by 2·10⁻⁹: it is not monotone
    _real(
        "softplus",
        lambda x: x if x > 20 else math.log1p(math.exp(x)),
        lambda np, x: np.where(x > 20, x, np.logaddexp(0.0, x)),
        "nn.functional.softplus",
        lambda s, x: s.log(1 + s.exp(x)),
        range=NATURAL,
        positive=True,
        effort=Effort("special", 2, 3.0),
    ),
    # bounded curves
    _real("tanh", math.tanh, algebra="tanh", range=SIGNED, monotone=1, effort=Effort("special", 1, 3.0)),
    _real(
        "sigmoid",
        _sigmoid,
        lambda np, x: 1.0 / (1.0 + np.exp(-x)),
        algebra=lambda s, x: 1 / (1 + s.exp(-x)),
        range=SHARE,
        positive=True,
        monotone=1,
        effort=Effort("special", 1, 1.5),
    ),
    _real(
        "erf",
        math.erf,
        lambda np, x: np.vectorize(math.erf)(x),
        algebra="erf",
        range=SIGNED,
        monotone=1,
        effort=Effort("special", 1, 2.0),
    ),
    _real(
        "atan",
        math.atan,
        "arctan",
        algebra="atan",
        range=(-math.pi / 2, math.pi / 2),
        monotone=1,
        effort=Effort("special", 2, 3.0),
    ),
    _real("sin", _total(math.sin), algebra="sin", range=SIGNED, effort=Effort("special", 1, 2.0)),
    _real("cos", _total(math.cos), algebra="cos", range=SIGNED, effort=Effort("special", 1, 2.0)),
    # roots and reciprocals
    _real(
        "sqrt",
        _total(math.sqrt),
        algebra="sqrt",
        range=NATURAL,
        monotone=1,
        law="power",
        of=0.5,
        effort=ROOT,
    ),
    # −∞ at −0: no interval can be read off its ends
    _real(
        "rsqrt",
        _total(lambda x: _true_div(1.0, math.sqrt(x))),
        lambda np, x: 1.0 / np.sqrt(x),
        algebra=lambda s, x: 1 / s.sqrt(x),
        range=NATURAL,
        pole=True,
        law="power",
        of=-0.5,
        effort=ROOT,
    ),
    _real(
        "reciprocal",
        lambda x: _true_div(1.0, x),
        lambda np, x: 1.0 / x,
        algebra=lambda s, x: 1 / x,
        pole=True,
        law="power",
        of=-1.0,
        effort=DIVISION,
    ),
    # arithmetic
    _binary("add", operator.add, algebra=lambda s, x, y: x + y, law="affine", effort=FUSES, sign="+", level=4),
    _binary("sub", operator.sub, "subtract", algebra=lambda s, x, y: x - y, law="affine", effort=FUSES, sign="−", level=4),
    _binary("mul", operator.mul, "multiply", algebra=lambda s, x, y: x * y, law="affine", effort=FUSES, sign="·", level=5),
    _binary(
        "div",
        _true_div,
        "divide",
        algebra=lambda s, x, y: x / y,
        result="float",
        pole=True,
        law="affine",
        effort=DIVISION,
        sign="/",
        level=5,
    ),
    _binary("floordiv", operator.floordiv, "floor_divide", "floor_divide", effort=LANE, sign="//", level=5),
    _binary("mod", operator.mod, "mod", "remainder", effort=LANE, sign="%", level=5),
    _binary("max", _maximum, "maximum", "maximum", "Max", monotone=1, exact=True, narrow=True, effort=MAXIMUM),
    _binary("min", _minimum, "minimum", "minimum", "Min", monotone=1, exact=True, narrow=True, effort=MAXIMUM),
    _binary("pow", operator.pow, "power", algebra=lambda s, x, y: x**y, effort=Effort("special", 2, 3.0)),
    # of integers alone: a counter under a key
    _binary("draw", partial(_draw, None), _draw, _draw, range=(0, 2**31 - 1), effort=Effort(exps=1.0, slots=10.0)),
    # truths; on integers the first four act on bits, in numpy on truths alone
    Operator("not", lambda x: not x, "logical_not", "bitwise_not", effort=MASK),
    _binary("and", operator.and_, "logical_and", "bitwise_and", effort=MASK, sign="∧", level=2),
    _binary("or", operator.or_, "logical_or", "bitwise_or", effort=MASK, sign="∨", level=1),
    _binary("xor", operator.xor, "logical_xor", "bitwise_xor", effort=MASK, sign="⊕", level=1),
    _compare("eq", operator.eq, "equal", sign="="),
    _compare("ne", operator.ne, "not_equal", sign="≠"),
    _compare("lt", operator.lt, "less", sign="<"),
    _compare("le", operator.le, "less_equal", sign="≤"),
    _compare("gt", operator.gt, "greater", sign=">"),
    _compare("ge", operator.ge, "greater_equal", sign="≥"),
)
OPERATORS: Mapping[str, Operator] = {o.name: o for o in _TABLE}


def named(keep: Callable[[Operator], bool]) -> tuple[str, ...]:
    """The names of the operators that a condition keeps, in the table's order."""
    return tuple(o.name for o in _TABLE if keep(o))


def logarithm(op: str) -> str:
    """The logarithm to an exponential's base, or "" where the table has none."""
    return next((o.name for o in _TABLE if o.law == "logarithm" and o.of == facts(op).of), "")


# What is said of leaves, choices and casts: nothing.
_OTHER = Operator("", lambda: math.nan, effort=LANE)


def facts(op: str) -> Operator:
    """What is known of a term's operator."""
    return OPERATORS.get(op, _OTHER)
