"""Scalar terms over rank coordinates: what an Einsum computes at one point of its iteration space.

    term  ::=  const | coordinate of a rank | size symbol | load tensor[term, ...] | op(term, ...) | cast(term)

Terms are hash-consed: equal terms are one object, so `is` compares them and dictionaries memoise walks over
the DAG. They hold indices, masks, biases, score functions and row rules alike. A term has a dtype; a cast that the
model wrote stays a `cast`. Nothing here imports torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar
from weakref import WeakValueDictionary

from .operators import OPERATORS, facts, named
from .operators import Scalar as Scalar

FLOATS = ("f16", "bf16", "f32", "f64")
INTEGERS = ("u8", "i8", "i16", "i32", "i64")
DTYPES = ("b1", *INTEGERS, *FLOATS)

COMPARISONS = named(lambda o: o.arity == 2 and o.result == "truth")
# Unary operators whose result is a float even when the argument is an integer.
FLOAT_UNARY = named(lambda o: o.arity == 1 and o.result == "float")
UNARY = named(lambda o: o.arity == 1)
BINARY = named(lambda o: o.arity == 2)


class Expr:
    """One term. Build terms with the functions below or with operators, never with this constructor."""

    __slots__ = ("__weakref__", "args", "attr", "below", "dtype", "op", "ranks")
    _table: ClassVar[WeakValueDictionary[tuple[object, ...], Expr]] = WeakValueDictionary()

    op: str
    args: tuple[Expr, ...]
    attr: object
    dtype: str
    ranks: frozenset[str]
    # what `walk` finds under the term, once it was walked
    below: tuple[Expr, ...] | None

    def __new__(cls, op: str, args: tuple[Expr, ...], attr: object, dtype: str) -> Expr:
        # repr keeps 0 and False, 0.0 and -0.0, and the NaNs apart
        key = (op, tuple(id(a) for a in args), type(attr).__name__, repr(attr), dtype)
        found = cls._table.get(key)
        if found is not None:
            return found
        self = super().__new__(cls)
        self.op, self.args, self.attr, self.dtype = op, args, attr, dtype
        own = frozenset([str(attr)]) if op == "index" else frozenset()
        self.ranks, self.below = own.union(*(a.ranks for a in args)), None
        return cls._table.setdefault(key, self)

    def __repr__(self) -> str:
        return show(self)

    def __reduce__(self) -> tuple[object, ...]:
        return (Expr, (self.op, self.args, self.attr, self.dtype))

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self

    def __add__(self, other: Expr | Scalar) -> Expr:
        return add(self, other)

    def __radd__(self, other: Scalar) -> Expr:
        return add(other, self)

    def __sub__(self, other: Expr | Scalar) -> Expr:
        return sub(self, other)

    def __rsub__(self, other: Scalar) -> Expr:
        return sub(other, self)

    def __mul__(self, other: Expr | Scalar) -> Expr:
        return mul(self, other)

    def __rmul__(self, other: Scalar) -> Expr:
        return mul(other, self)

    def __truediv__(self, other: Expr | Scalar) -> Expr:
        return binary("div", self, other)

    def __rtruediv__(self, other: Scalar) -> Expr:
        return binary("div", other, self)

    def __floordiv__(self, other: Expr | Scalar) -> Expr:
        return binary("floordiv", self, other)

    def __mod__(self, other: Expr | Scalar) -> Expr:
        return binary("mod", self, other)

    def __neg__(self) -> Expr:
        return unary("neg", self)

    def __and__(self, other: Expr | Scalar) -> Expr:
        return binary("and", self, other)

    def __or__(self, other: Expr | Scalar) -> Expr:
        return binary("or", self, other)

    def __invert__(self) -> Expr:
        return unary("not", self)

    def __lt__(self, other: Expr | Scalar) -> Expr:
        return binary("lt", self, other)

    def __le__(self, other: Expr | Scalar) -> Expr:
        return binary("le", self, other)

    def __gt__(self, other: Expr | Scalar) -> Expr:
        return binary("gt", self, other)

    def __ge__(self, other: Expr | Scalar) -> Expr:
        return binary("ge", self, other)

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    @property
    def value(self) -> Scalar:
        """The value of a constant."""
        if self.op != "const":
            raise TypeError(f"{self} is not a constant")
        assert isinstance(self.attr, (bool, int, float))
        return self.attr

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


# --- leaves -----------------------------------------------------------------------------------------------------


def const(value: Scalar, dtype: str | None = None) -> Expr:
    """A literal. Without a dtype: b1, i64 or f32 by the Python type."""
    if dtype is None:
        dtype = "b1" if isinstance(value, bool) else "i64" if isinstance(value, int) else "f32"
    if dtype in FLOATS:
        value = float(value)
    elif dtype == "b1":
        value = bool(value)
    else:
        value = int(value)
    return Expr("const", (), value, dtype)


TRUE = const(True)
FALSE = const(False)


def index(rank: str) -> Expr:
    """The coordinate of a rank at the current point."""
    return Expr("index", (), rank, "i64")


def symbol(name: str) -> Expr:
    """A size that is known when the cascade runs (a symbolic dimension)."""
    return Expr("symbol", (), name, "i64")


def load(tensor: str, indices: tuple[Expr | int, ...], dtype: str) -> Expr:
    """The element of a tensor at integer coordinates, which may themselves hold loads (a gather)."""
    return Expr("load", tuple(lift_scalar(i, "i64") for i in indices), tensor, dtype)


def lift_scalar(value: Expr | Scalar, dtype: str | None = None) -> Expr:
    if isinstance(value, Expr):
        return value
    if dtype is not None and isinstance(value, float) and dtype not in FLOATS:
        dtype = "f32"
    if dtype == "b1" and not isinstance(value, bool):
        dtype = None
    return const(value, dtype)


# --- dtypes -----------------------------------------------------------------------------------------------------


def promote(a: str, b: str) -> str:
    """The common dtype of two tensor operands, as torch has it."""
    if a == b:
        return a
    if {a, b} == {"f16", "bf16"}:
        return "f32"
    if a in FLOATS or b in FLOATS:
        if a in FLOATS and b in FLOATS:
            return max(a, b, key=lambda d: (8 if d == "f64" else 4 if d == "f32" else 2))
        return a if a in FLOATS else b
    if "u8" in (a, b) and "i8" in (a, b):
        return "i16"
    return max(a, b, key=DTYPES.index)


def result_dtype(op: str, args: tuple[Expr, ...]) -> str:
    if op == "where":
        return promote(args[1].dtype, args[2].dtype)
    common = args[0].dtype if len(args) == 1 else promote(args[0].dtype, args[1].dtype)
    match OPERATORS[op].result:
        case "truth":
            return "b1"
        case "float" if common not in FLOATS:
            return "f32"
    return common


# --- operators --------------------------------------------------------------------------------------------------


def _wrap(a: Expr | Scalar, b: Expr | Scalar) -> tuple[Expr, Expr]:
    """A Python scalar takes the dtype of the other operand, as in torch."""
    if isinstance(a, Expr):
        return a, lift_scalar(b, a.dtype)
    if isinstance(b, Expr):
        return lift_scalar(a, b.dtype), b
    return const(a), const(b)


def _fold(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    if not all(a.op == "const" for a in args):
        return None
    o, values = OPERATORS[op], [a.value for a in args]
    # on integers it turns bits
    if op == "not" and dtype != "b1":
        return None
    if o.result == "float":
        values = [float(v) for v in values]
    try:
        value = o.fold(*values)
    except (ArithmeticError, ValueError, TypeError):
        return None
    if isinstance(value, complex):
        return None
    if isinstance(value, float) and dtype in INTEGERS and not math.isfinite(value):
        return None
    # A literal in a narrow type is rounded by whoever evaluates it; folding there would skip that rounding.
    if dtype in ("f16", "bf16") and not o.narrow:
        return None
    return const(value, dtype)


def unary(op: str, a: Expr) -> Expr:
    args = (a,)
    dtype = result_dtype(op, args)
    folded = _fold(op, args, dtype)
    if folded is not None:
        return folded
    if op == "not" and a.op == "not":
        return a.args[0]
    if op == "neg" and a.op == "neg":
        return a.args[0]
    return Expr(op, args, None, dtype)


def binary(op: str, a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    x, y = _wrap(a, b)
    dtype = result_dtype(op, (x, y))
    folded = _fold(op, (x, y), dtype)
    if folded is not None:
        return folded
    kept = _identity(op, x, y)
    if kept is not None and kept.dtype == dtype:
        return kept
    return Expr(op, (x, y), None, dtype)


def _equals(e: Expr, value: Scalar) -> bool:
    return e.op == "const" and e.attr == value


def _identity(op: str, x: Expr, y: Expr) -> Expr | None:
    """Laws that hold for every value, NaN and infinity included; the law stands beside its rule."""
    integer = x.dtype not in FLOATS and y.dtype not in FLOATS
    match op:
        case "add":
            if _equals(y, 0):  # x + 0 = x
                return x
            if _equals(x, 0):  # 0 + y = y
                return y
            if integer and x.op == "sub" and x.args[1] is y:  # (x - y) + y = x over the integers
                return x.args[0]
            if integer and y.op == "sub" and y.args[1] is x:  # x + (y - x) = y
                return y.args[0]
        case "sub":
            if _equals(y, 0):  # x - 0 = x
                return x
            if integer and x.op == "add" and y in x.args:  # (x + y) - y = x over the integers
                return x.args[1] if x.args[0] is y else x.args[0]
            if integer and x is y:  # x - x = 0 over the integers
                return const(0, x.dtype)
        case "mul":
            if _equals(y, 1):  # x * 1 = x
                return x
            if _equals(x, 1):  # 1 * y = y
                return y
            if integer and (_equals(x, 0) or _equals(y, 0)):  # x * 0 = 0 over the integers
                return const(0, promote(x.dtype, y.dtype))
        case "div":
            if _equals(y, 1):  # x / 1 = x
                return x
        case "floordiv":
            if integer and _equals(y, 1):  # x // 1 = x
                return x
        case "mod":
            if integer and _equals(y, 1):  # x % 1 = 0
                return const(0, x.dtype)
        case "and":
            if x is y or (_equals(y, True) and y.dtype == "b1"):  # x & true = x
                return x
            if _equals(x, True) and x.dtype == "b1":
                return y
            if x is FALSE or y is FALSE:  # x & false = false
                return FALSE
        case "or":
            if x is y or y is FALSE:  # x | false = x
                return x
            if x is FALSE:
                return y
            if x is TRUE or y is TRUE:  # x | true = true
                return TRUE
        case "max" | "min":
            if x is y:
                return x
        case "eq" | "le" | "ge":
            if integer and x is y:  # i = i over the integers
                return TRUE
        case "ne" | "lt" | "gt":
            if integer and x is y:
                return FALSE
    return None


def add(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return binary("add", a, b)


def sub(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return binary("sub", a, b)


def mul(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return binary("mul", a, b)


def maximum(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return binary("max", a, b)


def minimum(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return binary("min", a, b)


def equal(a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    return binary("eq", a, b)


def exp(a: Expr) -> Expr:
    return unary("exp", a)


def where(cond: Expr, a: Expr | Scalar, b: Expr | Scalar) -> Expr:
    x, y = _wrap(a, b)
    dtype = promote(x.dtype, y.dtype)
    if cond is TRUE:
        return cast(x, dtype)
    if cond is FALSE:
        return cast(y, dtype)
    if x is y:
        return x
    if x is TRUE and y is FALSE:
        return cond
    if x is FALSE and y is TRUE:
        return unary("not", cond)
    return Expr("where", (cond, _stored(x), _stored(y)), None, dtype)


def _stored(e: Expr) -> Expr:
    """A literal as the type has it: what is selected is kept, not computed with, and a fill of 16 bits is a number."""
    if e.op == "cast" and e.args[0].is_const and e.dtype in ("f16", "bf16"):
        return const(_rounded(float(e.args[0].value), e.dtype), e.dtype)
    return e


def cast(a: Expr, dtype: str) -> Expr:
    """Conversion to another dtype. A literal is folded where the type has it; in 16 bits others stay casts, because a number
    beside a tensor is not rounded: `x * 0.3` computes in float32.
    """
    if a.dtype == dtype:
        return a
    if a.op != "const" or not (dtype in FLOATS or a.dtype not in FLOATS or math.isfinite(a.value)):
        return Expr("cast", (a,), None, dtype)
    has = dtype not in ("f16", "bf16") or not math.isfinite(a.value) or _rounded(float(a.value), dtype) == a.value
    return const(a.value, dtype) if has else Expr("cast", (a,), None, dtype)


def _rounded(value: float, dtype: str) -> float:
    """The nearest number of a type of 16 bits, by way of float32, as torch converts it."""
    try:
        single = struct.pack("<f", value)
        if dtype == "f16":
            return float(struct.unpack("<e", struct.pack("<e", struct.unpack("<f", single)[0]))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
    if math.isnan(value):
        return value
    (bits,) = struct.unpack("<I", single)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def make(op: str, args: tuple[Expr, ...], attr: object = None, dtype: str | None = None) -> Expr:
    """Rebuild a term of any kind through the smart constructors: what substitution and parsing use."""
    match op:
        case "const":
            assert isinstance(attr, (bool, int, float))
            return const(attr, dtype)
        case "index":
            return index(str(attr))
        case "symbol":
            return symbol(str(attr))
        case "load":
            assert dtype is not None
            return load(str(attr), args, dtype)
        case "cast":
            assert dtype is not None
            return cast(args[0], dtype)
        case "where":
            return where(*args)
    if op in BINARY:
        return binary(op, *args)
    if op in UNARY:
        return unary(op, *args)
    raise ValueError(f"unknown operator {op!r}")


# --- walks ------------------------------------------------------------------------------------------------------


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every distinct sub-term, arguments before the terms that use them."""
    if len(roots) != 1:
        return iter(_ordered(roots))
    (root,) = roots
    if root.below is not None:
        return iter((*root.below, root))
    found = _ordered(roots)
    # Terms are walked again and again; those of a long chain would hold one another's many times over.
    if len(found) <= 256:
        root.below = tuple(found[:-1])
    return iter(found)


def _ordered(roots: tuple[Expr, ...]) -> list[Expr]:
    found: list[Expr] = []
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        e, done = stack.pop()
        if done:
            found.append(e)
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            stack.extend((a, False) for a in reversed(e.args) if a not in seen)
    return found


def rebuild(root: Expr, rule: Callable[[Expr, tuple[Expr, ...]], Expr | None]) -> Expr:
    """Bottom-up rewriting: `rule(term, new arguments)` answers the new term, or None to keep the term."""
    new: dict[Expr, Expr] = {}
    for e in walk(root):
        args = tuple(new[a] for a in e.args)
        out = rule(e, args)
        if out is None:
            out = e if args == e.args else make(e.op, args, e.attr, e.dtype)
        new[e] = out
    return new[root]


def substitute(root: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """Replace whole sub-terms (outermost first), then rebuild what holds them."""
    new: dict[Expr, Expr] = {}
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        e, done = stack.pop()
        if e in new:
            continue
        hit = table.get(e)
        if hit is not None:
            new[e] = hit
        elif done:
            args = tuple(new[a] for a in e.args)
            new[e] = e if args == e.args else make(e.op, args, e.attr, e.dtype)
        else:
            stack.append((e, True))
            stack.extend((a, False) for a in e.args if a not in new)
    return new[root]


def loads(root: Expr) -> tuple[Expr, ...]:
    return tuple(e for e in walk(root) if e.op == "load")


def symbols(root: Expr) -> frozenset[str]:
    return frozenset(str(e.attr) for e in walk(root) if e.op == "symbol")


# --- text -------------------------------------------------------------------------------------------------------

def show_number(value: Scalar) -> str:
    if isinstance(value, (bool, int)):
        return str(value).lower()
    if value == math.inf:
        return "∞"
    if value == -math.inf:
        return "−∞"
    return f"{value:.6g}"


def show(root: Expr) -> str:
    """The term in the papers' notation: `QK[b,h,p,m]·0.25 + bias[m]`."""
    text: dict[Expr, tuple[str, int]] = {}
    for e in walk(root):
        parts = [text[a] for a in e.args]
        match e.op:
            case "const":
                text[e] = (show_number(e.value), 9)
            case "index" | "symbol":
                text[e] = (str(e.attr), 9)
            case "load":
                text[e] = (f"{e.attr}[{','.join(p for p, _ in parts)}]" if parts else str(e.attr), 9)
            case "cast":
                text[e] = (f"{e.dtype}({parts[0][0]})", 9)
            case "neg":
                text[e] = (f"−{parts[0][0] if parts[0][1] > 5 else '(' + parts[0][0] + ')'}", 6)
            case "not":
                text[e] = (f"¬{parts[0][0] if parts[0][1] > 5 else '(' + parts[0][0] + ')'}", 6)
            case "exp":
                text[e] = (f"exp({parts[0][0]})", 9)
            case op if facts(op).sign:
                level = facts(op).level
                left = parts[0][0] if parts[0][1] >= level else f"({parts[0][0]})"
                right = parts[1][0] if parts[1][1] > level else f"({parts[1][0]})"
                text[e] = (f"{left} {facts(op).sign} {right}", level)
            case op:
                text[e] = (f"{op}({', '.join(p for p, _ in parts)})", 9)
    return text[root][0]
