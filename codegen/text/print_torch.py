"""Prints terms as torch source: the text inside the functions of CPU kernels, FlexAttention and SDPA masks.

    coordinates   integer tensors that broadcast, each a range along a dimension of its own; sizes are Python integers
    floats        are computed in one type (float32 unless told): loads widen, the model's narrowing casts are dropped
    integers      keep their type; // and % round towards −∞, in Python as in torch
    loads         `t[b, m]` gathers; `tile(t, b, m)` is the same as a view where every coordinate is a plain range
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from .integers import in_range
from .printer import ATOM, PYTHON, UNARY, PrintError, Spelling, Text, Writer, call, distinct, infix, word

TYPES: Mapping[str, str] = {
    "b1": "torch.bool", "u8": "torch.uint8", "i8": "torch.int8", "i16": "torch.int16", "i32": "torch.int32",
    "i64": "torch.int64", "f16": "torch.float16", "bf16": "torch.bfloat16", "f32": "torch.float32",
    "f64": "torch.float64",
}
RESERVED = frozenset([
    "torch", "math", "inf", "nan", "choose", "draw", "tile", "F", "len", "min", "max", "abs", "int", "range",
])


@dataclass
class TorchScope:
    """What the leaves of a function's terms are called.

    `names` holds text for coordinates, sizes and terms computed before; `tensors[name]` the Python name of a tensor,
    `shapes[name]` its sizes, `extent[rank]` the size of a rank. `views`: coordinates are ranges, loads may be views.
    `reuse`: memory that the text itself made is written again, and exp is by base 2: what large tiles want on a CPU,
    where torch.exp takes ten times as long on arguments that it maps to 0, and torch.exp2 does not.
    """

    names: Mapping[Expr, str]
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[Size, ...]]
    extent: Mapping[str, Size]
    real: str = "f32"
    views: bool = True
    reuse: bool = False
    numbers: frozenset[Expr] = field(default_factory=frozenset)


def identifier(text: str, taken: Iterable[str] = ()) -> str:
    """A Python name close to `text`, different from every name in `taken`."""
    name = word(text)
    if name[0].isdigit():
        name = f"t_{name}"
    return distinct(name, RESERVED.union(taken, keyword.kwlist))


def literal(value: ex.Scalar) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
    return repr(value)


def _literal(value: ex.Scalar) -> Text:
    text = literal(value)
    return Text(text, UNARY if text.startswith("-") else ATOM)


def size_source(size: Size, names: Mapping[str, str]) -> str:
    """A size as Python text; `names[symbol]` is the text of a symbol."""
    term = size_term(size)
    scope = TorchScope({ex.symbol(n): t for n, t in names.items()}, {}, {}, {})
    # nothing is named: a text has no lines before it
    return TorchBody(scope, []).term(term)


def is_number(e: Expr, numbers: frozenset[Expr] = frozenset()) -> bool:
    """Made of sizes and constants alone: a plain Python number, which has no `.to`."""
    return not e.ranks and all(x.op != "load" or x in numbers for x in ex.walk(e))


# --- printing ---------------------------------------------------------------------------------------------------


def _sized(spelling: Spelling, text: str = "", level: int = UNARY, least: int = 0) -> Spelling:
    """With its form on Python's numbers: where an argument is made of sizes alone."""
    return replace(spelling, plain=Spelling(text, level, (least, least)) if text else spelling)


SPELLINGS: Mapping[str, Spelling] = {
    **{name: _sized(s) for name, s in PYTHON.items()},
    "not": _sized(PYTHON["not"], "not {}", 0, ATOM),
    "pow": _sized(replace(infix("**", 8), within=(9, 9))),
    "max": _sized(call("torch.maximum", 2), "max({}, {})", ATOM),
    "min": _sized(call("torch.minimum", 2), "min({}, {})", ATOM),
    "draw": _sized(call("draw", 2), "draw({}, {})", ATOM),
    "abs": _sized(call("torch.abs"), "abs({})"),
    "relu": _sized(call("torch.relu"), "max({}, 0)"),
    "floor": _sized(call("torch.floor"), "math.floor({})"),
    "ceil": _sized(call("torch.ceil"), "math.ceil({})"),
    "round": _sized(call("torch.round"), "round({})"),
    "trunc": _sized(call("torch.trunc"), "math.trunc({})"),
    "sign": call("torch.sign"),
    "isnan": call("torch.isnan"),
    "isinf": call("torch.isinf"),
    "exp": _sized(call("torch.exp"), "math.exp({})"),
    "exp2": _sized(call("torch.exp2"), "2.0 ** ({})"),
    "expm1": _sized(call("torch.expm1"), "math.expm1({})"),
    "log": _sized(call("torch.log"), "math.log({})"),
    "log2": _sized(call("torch.log2"), "math.log2({})"),
    "log10": _sized(call("torch.log10"), "math.log10({})"),
    "log1p": _sized(call("torch.log1p"), "math.log1p({})"),
    "asinh": _sized(call("torch.asinh"), "math.asinh({})"),
    "atan": _sized(call("torch.atan"), "math.atan({})"),
    "softplus": call("torch.nn.functional.softplus"),
    "tanh": _sized(call("torch.tanh"), "math.tanh({})"),
    "sigmoid": _sized(call("torch.sigmoid"), "1.0 / (1.0 + math.exp(-({})))"),
    "erf": _sized(call("torch.erf"), "math.erf({})"),
    "sin": _sized(call("torch.sin"), "math.sin({})"),
    "cos": _sized(call("torch.cos"), "math.cos({})"),
    "sqrt": _sized(call("torch.sqrt"), "math.sqrt({})"),
    "rsqrt": _sized(call("torch.rsqrt"), "1.0 / math.sqrt({})"),
    "reciprocal": _sized(call("torch.reciprocal"), "1.0 / ({})"),
}
# Functions that torch has no form of which writes into its argument.
NOT_IN_PLACE = frozenset(["isnan", "isinf", "not", "softplus"])


class TorchBody(Writer):
    """The lines of one function of tensors."""

    spellings = SPELLINGS

    def __init__(self, scope: TorchScope, roots: Iterable[Expr], indent: str = "    ") -> None:
        self.scope = scope
        self.made: set[Expr] = set()
        super().__init__(scope.names, roots, set(scope.names.values()) | set(scope.tensors.values()), indent)

    def identifier(self, stem: str) -> str:
        return identifier(stem, self.taken)

    def named(self, e: Expr) -> str:
        """Text of a term in the type of floats that can be called or multiplied: a name, or in parentheses."""
        return self._real(e).within(8)

    def load_stem(self, e: Expr) -> str:
        return self.scope.tensors[str(e.attr)] + "_"

    def constant(self, e: Expr) -> Text:
        return _literal(e.value)

    def shares(self, e: Expr, text: Text) -> bool:
        return super().shares(e, text) and not (text.level == ATOM and self._number(e))

    def _settled(self, e: Expr, text: Text, stem: str) -> Text:
        out = super()._settled(e, text, stem)
        if out is text and self._is_new(e):
            self.made.add(e)
        return out

    def _is_new(self, e: Expr) -> bool:
        """Does the text make a tensor of its own, which nothing else reads?"""
        passed_on = e.op in ("load", "cast") or (e.op == "where" and self._number(e.args[0]))
        return self.scope.reuse and e.is_float and not self._number(e) and not passed_on

    # one rule an operator

    def _operator(self, e: Expr) -> Text:
        # A comparison takes its arguments in their common type, everything else in the type of the result.
        dtype = ex.promote(e.args[0].dtype, e.args[-1].dtype) if e.dtype == "b1" else e.dtype
        args = [self._real(a) if dtype in ex.FLOATS else self._integer(a, dtype) for a in e.args]
        if self._number(e):
            plain = self.spellings[e.op].plain
            if plain is None:
                raise PrintError(f"the operator {e.op!r} on a size")
            return plain.of(args)
        if self.scope.reuse and e.is_float:
            found = self._reused(e, args)
            if found is not None:
                return found
        if e.op in ("max", "min") and any(self._number(a) for a in e.args):
            return self._clamped(e, args)
        return self._spelled(self.spellings[e.op], args)

    def _reused(self, e: Expr, args: list[Text]) -> Text | None:
        """The operator as one that writes into its argument, where the text has just made that."""
        own = args[0].within(8) if e.args[0] in self.made else ""
        if e.op == "exp" and self.scope.real == "f32":
            self.helpers.add("LOG2E")
            return Text(f"{f'{own}.mul_(LOG2E)' if own else f'({args[0].within(6)} * LOG2E)'}.exp2_()", ATOM)
        if own and len(args) == 1 and e.op not in NOT_IN_PLACE:
            return Text(f"{own}.{e.op}_()", ATOM)
        if own and e.op in ("add", "sub", "mul", "div") and self._number(e.args[1]):
            return Text(f"{own}.{e.op}_({args[1].code})", ATOM)
        return None

    def _clamped(self, e: Expr, args: list[Text]) -> Text:
        """`max` and `min` with a bound that is a number; NaN passes either way."""
        value, bound = args if self._number(e.args[1]) else args[::-1]
        return Text(f"{value.within(8)}.clamp({'min' if e.op == 'max' else 'max'}={bound.code})", ATOM)

    def _where(self, e: Expr) -> Text:
        cond, yes, no = e.args
        c = self._put(cond) if cond.dtype == "b1" else Text(f"{self._put(cond).within(2)} != 0", 1)
        a, b = (self._real(x) if e.is_float else self._integer(x, e.dtype) for x in (yes, no))
        if self._number(cond):
            a, b = self._alike(a, b, self._number(yes), self._number(no))
            return Text(f"{a.within(1)} if {c.code} else {b.within(1)}", 0)
        if e.is_float and self._number(yes) and self._number(no):
            # torch.where of two numbers takes torch's default type, whatever that is
            self.helpers.add("choose")
            kind = "" if self.scope.real == "f32" else f", {TYPES[self.scope.real]}"
            return Text(f"choose({c.code}, {a.code}, {b.code}{kind})", ATOM)
        return Text(f"torch.where({c.code}, {a.code}, {b.code})", ATOM)

    @staticmethod
    def _alike(a: Text, b: Text, plain_a: bool, plain_b: bool) -> tuple[Text, Text]:
        """Two branches of which Python takes one: both numbers or both tensors, since what follows may be a method."""
        if plain_a and not plain_b:
            return Text(f"torch.full_like({b.code}, {a.code})", ATOM), b
        if plain_b and not plain_a:
            return a, Text(f"torch.full_like({a.code}, {b.code})", ATOM)
        return a, b

    # types

    def _number(self, e: Expr) -> bool:
        return is_number(e, self.scope.numbers)

    def _real(self, e: Expr, stem: str = "t") -> Text:
        """A Python number where the term holds no tensor."""
        if e.is_const:
            return _literal(float(e.value))
        text = self._put(e, stem)
        if e.is_float or self._number(e):
            return text
        return Text(f"{text.within(8)}.to({TYPES[self.scope.real]})", ATOM)

    def _integer(self, e: Expr, dtype: str) -> Text:
        text = self._put(e)
        if e.dtype == dtype or self._number(e):
            return text
        return Text(f"{text.within(8)}.to({TYPES[dtype]})", ATOM)

    def _cast(self, e: Expr) -> Text:
        source = e.args[0]
        if e.is_float:
            return self._real(source)
        given = self._put(source)
        if e.dtype == "b1":
            return Text(f"{given.within(2)} != 0", 1)
        if self._number(source):
            return Text(f"int({given.code})", ATOM)
        return Text(f"{given.within(8)}.to({TYPES[e.dtype]})", ATOM)

    # loads

    def _load(self, e: Expr) -> Text:
        text = self.element(e)
        if e.is_float and e.dtype != self.scope.real:
            text = f"{text}.to({TYPES[self.scope.real]})"
        return Text(text, ATOM)

    def element(self, e: Expr) -> str:
        """A load in the type that its tensor has."""
        name = self.scope.tensors.get(str(e.attr))
        if name is None:
            raise PrintError(f"the tensor {e.attr} is not at hand in this function")
        shape = self.scope.shapes[str(e.attr)]
        at = [self._coordinate(i, d, name, size) for d, (i, size) in enumerate(zip(e.args, shape, strict=True))]
        text = f"{name}[{', '.join(at)}]" if at else name
        if self.scope.views and len(e.ranks) > 1 and self.is_plain(e, shape):
            self.helpers.add("tile")
            text = f"tile({name}, {', '.join(at)})"
        return text

    def is_plain(self, e: Expr, shape: tuple[Size, ...]) -> bool:
        """Whole ranks, each once, and nothing else but constants."""
        ranks = [str(i.attr) for i in e.args if i.op == "index"]
        plain = all(i.is_const or (i.op == "index" and in_range(i, n, self.scope.extent)) for i, n in zip(e.args, shape))
        return plain and len(set(ranks)) == len(ranks)

    def _coordinate(self, i: Expr, d: int, tensor: str, size: Size) -> str:
        text = self._put(i)
        if in_range(i, size, self.scope.extent) or (i.is_const and int(i.value) == 0):
            return text.code
        last = str(size - 1) if isinstance(size, int) else f"{tensor}.shape[{d}] - 1"
        if self._number(i):
            return f"min(max({text.code}, 0), {last})"
        return f"{text.within(8)}.clamp(0, {last})"
