"""Prints terms as Triton source: the text inside the functions that fill a skeleton's holes.

    coordinates   a query-side rank is a [BM, 1] vector, the key rank [1, BN], a batch rank a scalar: all broadcast
    floats        are computed in fp32: loads widen at once, the model's narrowing casts inside a term are dropped
    integers      are int32, or int64 where a bound says that 31 bits may not do; // and % round towards −∞
    loads         are masked by the guards of the ranks they run over; coordinates that may leave the tensor are clamped
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from ...patterns.terms.affine import affine
from .integers import INT32, in_range, span_of
from .printer import ATOM, PYTHON, UNARY, PrintError, Spelling, Text, Writer, call, distinct, word

TYPES: Mapping[str, str] = {
    "b1": "tl.int1", "u8": "tl.uint8", "i8": "tl.int8", "i16": "tl.int16", "i32": "tl.int32", "i64": "tl.int64",
    "f16": "tl.float16", "bf16": "tl.bfloat16", "f32": "tl.float32",
}


@dataclass(frozen=True)
class TritonOperand:
    """A tensor argument as the printed text names it: pointer, one stride name and one size a dimension."""

    name: str
    strides: tuple[str, ...]
    shape: tuple[Size, ...]
    dtype: str


@dataclass
class TritonScope:
    """What the leaves of a function's terms are called.

    `names` holds text for coordinates, sizes and terms computed before; `guards[rank]` is the condition under which a
    coordinate of that rank is real (none: always); `extent[rank]` its size. `moving[rank]`: where a loop is, and the
    coordinates beside it, whose sum is the coordinate: what a loop need not compute again stands first in an address.
    """

    names: dict[Expr, str]
    tensors: Mapping[str, TritonOperand]
    extent: Mapping[str, Size]
    guards: Mapping[str, str] = field(default_factory=dict)
    moving: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def identifier(text: str, taken: Iterable[str] = ()) -> str:
    """A Python name close to `text`, different from every name in `taken`."""
    name = word(text)
    if name[0].isdigit() or keyword.iskeyword(name) or name in ("tl", "triton", "torch"):
        name = f"x_{name}"
    return distinct(name, set(taken))


def number(value: ex.Scalar, dtype: str) -> str:
    """A literal, as the kernel's type holds it."""
    if dtype not in ex.FLOATS:
        return repr(value)
    x = float(value)
    if math.isnan(x) or math.isinf(x):
        return f'float("{x}")'
    if abs(x) > 3.4028235677973366e38:
        raise PrintError(f"the constant {x:g} is beyond float32")
    return repr(x)


def _signed(text: str) -> Text:
    return Text(text, UNARY if text.startswith("-") else ATOM)


def _exact(e: Expr, extent: Mapping[str, Size]) -> bool:
    """Is every value of an integer term a float32?"""
    return max(map(abs, span_of(e, extent))) <= 2**24


# --- printing ---------------------------------------------------------------------------------------------------


def _device(name: str, operands: int = 1, plain: Spelling | None = None) -> Spelling:
    """A device function of skeletons/scalar.py."""
    return replace(call(name, operands, plain), helper=name)


SPELLINGS: Mapping[str, Spelling] = {
    **PYTHON,
    "floordiv": Spelling("tl.floor({} / {})", within=(6, 7), plain=PYTHON["floordiv"]),
    "mod": _device("remainder", 2, PYTHON["mod"]),
    "max": call("tl.maximum", 2),
    "min": call("tl.minimum", 2),
    "pow": _device("power", 2),
    "draw": _device("draw", 2),
    "abs": call("tl.abs"),
    "relu": Spelling("tl.maximum({}, 0.0)", plain=Spelling("tl.maximum({}, 0)")),
    "floor": call("tl.floor"),
    "ceil": call("tl.ceil"),
    "round": _device("round_even"),
    "trunc": _device("truncate"),
    "sign": _device("sign", plain=Spelling("tl.where({0} > 0, 1, tl.where({0} < 0, -1, 0))")),
    "isnan": Spelling("{0} != {0}", 1, (2,)),
    "isinf": Spelling('tl.abs({}) == float("inf")', 1),
    "exp": call("tl.exp"),
    "exp2": call("tl.exp2"),
    "expm1": _device("expm1"),
    "log": call("tl.log"),
    "log2": call("tl.log2"),
    "log10": Spelling("tl.log2({}) * 0.30102999566398119", 6),
    "log1p": _device("log1p"),
    "asinh": _device("asinh"),
    "atan": _device("atan"),
    "softplus": _device("softplus"),
    "tanh": _device("tanh"),
    "sigmoid": call("tl.sigmoid"),
    "erf": call("tl.erf"),
    "sin": call("tl.sin"),
    "cos": call("tl.cos"),
    "sqrt": call("tl.sqrt"),
    "rsqrt": call("tl.rsqrt"),
    "reciprocal": Spelling("1.0 / {}", 6, (7,)),
}
# Device functions for integers of which one may be negative.
FLOORED: Mapping[str, Spelling] = {"floordiv": _device("floor_div", 2), "mod": _device("floor_mod", 2)}
HELPERS = frozenset(s.helper for s in (*SPELLINGS.values(), *FLOORED.values()) if s.helper)


class TritonBody(Writer):
    """The lines of one function of blocks."""

    spellings = SPELLINGS

    def __init__(self, scope: TritonScope, roots: Iterable[Expr], indent: str = "    ") -> None:
        self.scope = scope
        taken = set(scope.names.values()) | {s for t in scope.tensors.values() for s in (t.name, *t.strides)}
        super().__init__(scope.names, roots, taken, indent)

    def count(self, roots: Iterable[Expr]) -> None:
        """From here on, name what these terms share, and these alone."""
        self.uses.clear()
        super().count(roots)

    def identifier(self, stem: str) -> str:
        return identifier(stem, self.taken)

    def load_stem(self, e: Expr) -> str:
        return f"b_{e.attr}"

    def constant(self, e: Expr) -> Text:
        return _signed(number(e.value, e.dtype))

    def shares(self, e: Expr, text: Text) -> bool:
        return e.op == "load" or super().shares(e, text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """An indented block; what is named inside is not known after it."""
        self.line(head)
        memo, indent = dict(self.memo), self.indent
        self.indent += "    "
        yield
        self.memo, self.indent = memo, indent

    # operators

    def _where(self, e: Expr) -> Text:
        yes, no = (self._as(a, e.dtype).code for a in e.args[1:])
        return Text(f"tl.where({self._as(e.args[0], 'b1').code}, {yes}, {no})", ATOM)

    def _operator(self, e: Expr) -> Text:
        spelling = self.spellings[e.op]
        if e.op in ("isnan", "isinf"):
            return self._spelled(spelling, [self._real(e.args[0])])
        if e.op in ex.COMPARISONS:
            common = ex.promote(e.args[0].dtype, e.args[1].dtype)
            return self._spelled(spelling, [self._as(a, common) for a in e.args])
        if not e.is_float:
            return self._integral(e)
        args = [self._real(a) for a in e.args]
        return self._power(e, args) if e.op == "pow" else self._spelled(spelling, args)

    def _integral(self, e: Expr) -> Text:
        args = [self._as(a, e.dtype) for a in e.args]
        extent, spelling = self.scope.extent, self.spellings[e.op]
        lo, hi = span_of(e, extent)
        if (lo < -INT32 or hi > INT32) and e.dtype == "i64" and e.op in ("add", "sub", "mul", "neg", "abs"):
            args = [self._wide(a, text) for a, text in zip(e.args, args)]
        match e.op:
            case "floor" | "ceil" | "round" | "trunc":
                return args[0]
            case "floordiv" | "mod":
                (low, _), (least, _) = (span_of(a, extent) for a in e.args)
                if low < 0 or least < 0:
                    return self._spelled(FLOORED[e.op], args)
            case "pow":
                exponent = e.args[1]
                if exponent.is_const and 1 <= exponent.value <= 4:
                    return Text(" * ".join([args[0].within(7)] * int(exponent.value)), 6)
                raise PrintError(f"an integer power with exponent {exponent}")
        return self._spelled(spelling.plain or spelling, args)

    def _power(self, e: Expr, args: list[Text]) -> Text:
        exponent = e.args[1]
        if exponent.is_const:
            y = float(exponent.value)
            if y in (2.0, 3.0, 4.0):
                base = args[0].code if args[0].code.isidentifier() else self.let("t", e.args[0])
                return Text(" * ".join([base] * int(y)), 6)
            if y == 0.5:
                return self._spelled(self.spellings["sqrt"], args)
            if y == -1.0:
                return self._spelled(self.spellings["reciprocal"], args)
        return self._spelled(self.spellings["pow"], args)

    # types

    def _as(self, e: Expr, dtype: str) -> Text:
        if dtype in ex.FLOATS:
            return self._real(e)
        if dtype == "b1" and e.dtype != "b1":
            return Text(f"{self._put(e).within(2)} != 0", 1)
        return self._put(e)

    def _real(self, e: Expr, stem: str = "t") -> Text:
        if e.is_const:
            return _signed(number(float(e.value), "f32"))
        if not e.is_float and (apart := self._apart(e)) is not None:
            return apart
        text = self._put(e, stem)
        if e.is_float:
            return text
        if self._is_size(e):
            return Text(f"{text.within(6)} * 1.0", 6)
        return Text(f"{text.within(8)}.to(tl.float32)", ATOM)

    def below(self, e: Expr) -> tuple[Expr, ...]:
        """A distance that is converted is written by what it is converted to."""
        return () if e.op == "cast" and e.is_float and self._distance(e.args[0]) is not None else e.args

    def _distance(self, e: Expr) -> tuple[str, int, Expr] | None:
        """(rank, ±1, rest) where an integer term is rest ± a moving coordinate, and all of it is exact in float32."""
        if e.op == "abs":
            return self._distance(e.args[0])
        form = affine(e) if e.dtype == "i64" and self.scope.moving else None
        for atom, c in form.terms if form else ():
            if form and atom.op == "index" and atom.attr in self.scope.moving and abs(c) == 1:
                rest = (form - affine(atom).scaled(c)).term()
                exact = not atom.ranks <= rest.ranks and all(_exact(x, self.scope.extent) for x in (e, rest))
                return (str(atom.attr), c, rest) if exact and rest.ranks else None
        return None

    def _apart(self, e: Expr) -> Text | None:
        """A distance as a float: what moves is converted once for a row, and what does not before the loop.

            f32(m − p) = f32(base − p) + f32(lane)        exact while integers stay below 2²⁴
        """
        found = self._distance(e)
        if found is None:
            return None
        rank, c, rest = found
        base, lane = self.scope.moving[rank]
        sign = "+" if c > 0 else "-"
        text = f"({self._put(rest).within(5)} {sign} {base}).to(tl.float32) {sign} {lane}.to(tl.float32)"
        return Text(f"tl.abs({text})", ATOM) if e.op == "abs" else Text(text, 5)

    def _wide(self, e: Expr, text: Text) -> Text:
        if e.is_const or self._is_size(e):
            return text
        return Text(f"{text.within(8)}.to(tl.int64)", ATOM)

    @staticmethod
    def _is_size(e: Expr) -> bool:
        """Made of sizes alone: a plain number in Python's sense, which has no `.to`."""
        return not e.ranks and all(x.op != "load" for x in ex.walk(e))

    def _cast(self, e: Expr) -> Text:
        source = e.args[0]
        if e.is_float:
            return self._real(source)
        if e.dtype == "b1":
            return self._as(source, "b1")
        given = self._put(source)
        if source.is_float:
            text = f"{given.within(8)}.to(tl.{'int64' if e.dtype == 'i64' else 'int32'})"
            return Text(text if e.dtype in ("i64", "i32") else f"{text}.to({TYPES[e.dtype]}).to(tl.int32)", ATOM)
        if source.dtype == "b1":
            return Text(f"{given.within(8)}.to(tl.int32)", ATOM)
        lo, hi = span_of(source, self.scope.extent)
        least, most = span_of(Expr("load", (), "", e.dtype), {}) if e.dtype != "i64" else (-math.inf, math.inf)
        if (least <= lo and hi <= most) or self._is_size(source):
            return given
        text = f"{given.within(8)}.to({TYPES[e.dtype]})"
        return Text(text if e.dtype == "i32" else f"{text}.to(tl.int32)", ATOM)

    # loads

    def address(self, name: str, index: tuple[Expr, ...], clamp: bool = True) -> tuple[str, tuple[str, ...]]:
        """Pointer text of an element and the guards under which it may be read."""
        t = self.scope.tensors[name]
        parts, last, guards = [t.name], [], []
        for i, stride, size in zip(index, t.strides, t.shape):
            if i.is_const:
                if int(i.value) != 0:
                    parts.append(f"{int(i.value)} * {stride}")
                continue
            text, outside = self._put(i), clamp and not in_range(i, size, self.scope.extent)
            if not outside or i.op == "index":
                guards += [self.scope.guards[r] for r in sorted(i.ranks) if r in self.scope.guards]
            if outside:
                limit = TritonBody(self.scope, ()).term(size_term(size) - 1)
                parts.append(f"tl.minimum(tl.maximum({text.code}, 0), {limit}) * {stride}")
            elif i.op == "index" and i.attr in self.scope.moving:
                base, lane = self.scope.moving[str(i.attr)]
                parts.append(f"{lane} * {stride}")
                last.append(f"{base} * {stride}")
            else:
                parts.append(f"{text.within(6)} * {stride}")
        return " + ".join([*parts, *last]), tuple(dict.fromkeys(guards))

    def _load(self, e: Expr) -> Text:
        text = self.load_text(e)
        return Text(f"{text}.to(tl.float32)" if e.dtype in ("f16", "bf16", "f64") else text, ATOM)

    def load_text(self, e: Expr) -> str:
        """The load in the tensor's own type."""
        if e.dtype == "f64" and e.args:
            raise PrintError(f"{e.attr} is float64; the kernel computes in float32")
        at, guards = self.address(str(e.attr), e.args)
        if not guards:
            return f"tl.load({at})"
        mask = guards[0] if len(guards) == 1 else " & ".join(f"({g})" for g in guards)
        return f"tl.load({at}, mask={mask}, other={'0.0' if e.is_float else '0'})"


def rewrite_size_one(e: Expr, extent: Mapping[str, Size]) -> Expr:
    """The coordinate of a rank of size 1 is 0."""
    table = {ex.index(r): ex.const(0) for r in e.ranks if extent.get(r) == 1}
    return ex.substitute(e, table) if table else e
