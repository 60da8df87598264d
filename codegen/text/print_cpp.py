"""Prints terms as scalar C++: the text inside the functions of a fused CPU kernel, a line a shared term.

    coordinates   int32 or int64 numbers; floats are computed in fp32: loads widen, the model's narrowing casts are dropped
    integers      are int32, or int64 where a bound says that 31 bits may not do; // and % round towards −∞
    choices       `c ? a : b` without a branch: both sides are computed, so that loops over keys become vectors
    loads         typed pointers with run-time strides; a coordinate that may lie outside is clamped into the tensor
    nesting       what does not vary in a loop is printed before it, what belongs to a row alone is computed once a row
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from .integers import INT32, in_range, span_of
from .printer import ATOM, PrintError, Spelling, Text, Writer, call, distinct, infix, word

# What a tensor's elements are in memory.
STORED: Mapping[str, str] = {
    "b1": "uint8_t", "u8": "uint8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t",
    "f16": "f16", "bf16": "bf16", "f32": "float",
}
NARROW: Mapping[str, str] = {"u8": "uint8_t", "i8": "int8_t", "i16": "int16_t"}
KEYWORDS = frozenset([
    "alignas", "alignof", "and", "and_eq", "asm", "auto", "bitand", "bitor", "bool", "break", "case", "catch", "char",
    "class", "compl", "const", "constexpr", "continue", "decltype", "default", "delete", "do", "double",
    "dynamic_cast", "else", "enum", "explicit", "export", "extern", "false", "float", "for", "friend", "goto", "if",
    "inline", "int", "long", "mutable", "namespace", "new", "noexcept", "not", "not_eq", "nullptr", "operator", "or",
    "or_eq", "private", "protected", "public", "register", "reinterpret_cast", "return", "short", "signed", "sizeof",
    "static", "static_assert", "static_cast", "struct", "switch", "template", "this", "throw", "true", "try",
    "typedef", "typeid", "typename", "union", "unsigned", "using", "virtual", "void", "volatile", "wchar_t", "while",
    "xor", "xor_eq", "unix", "linux",
])

# Levels of C++'s operators: an argument below the level that is asked for gets parentheses.
CHOICE, ANY, EQUAL, COMPARED, SUM, PRODUCT, UNARY = 0, 1, 4, 5, 7, 8, 9


def _sign(sign: str, level: int) -> Spelling:
    """Compilers and readers alike want parentheses around comparisons under & and |."""
    least = max(level, SUM)
    return replace(infix(sign, level), within=(least, least + 1))


def _compared(sign: str, level: int) -> Spelling:
    return Spelling(f"{{}} {sign} {{}}", level, (SUM, SUM))


# Functions are the skeleton's, and what the processor does by itself; `plain` is the spelling on integers.
SPELLINGS: Mapping[str, Spelling] = {
    "or": _sign("|", ANY),
    "xor": _sign("^", 2),
    "and": _sign("&", 3),
    "eq": _compared("==", EQUAL),
    "ne": _compared("!=", EQUAL),
    "lt": _compared("<", COMPARED),
    "le": _compared("<=", COMPARED),
    "gt": _compared(">", COMPARED),
    "ge": _compared(">=", COMPARED),
    "add": _sign("+", SUM),
    "sub": _sign("-", SUM),
    "mul": _sign("*", PRODUCT),
    "div": _sign("/", PRODUCT),
    "floordiv": call("floor_div", 2, _sign("/", PRODUCT)),
    "mod": call("floor_mod", 2, _sign("%", PRODUCT)),
    "max": call("max_", 2),
    "min": call("min_", 2),
    "pow": call("pow_", 2),
    "draw": call("draw", 2),
    "neg": Spelling("-{}", UNARY, (ATOM,)),
    "not": Spelling("!{}", UNARY, (UNARY,), plain=Spelling("~{}", UNARY, (ATOM,))),
    "abs": call("std::abs"),
    "relu": Spelling("max_({}, 0.0f)", plain=Spelling("max_({}, ({kind})0)")),
    "floor": call("floor_"),
    "ceil": call("std::ceil"),
    "round": call("std::rint"),
    "trunc": call("std::trunc"),
    "sign": Spelling("(float)(({0} > 0.0f) - ({0} < 0.0f))", UNARY, plain=Spelling("({0} > 0) - ({0} < 0)", SUM)),
    "isnan": Spelling("{0} != {0}", EQUAL),
    "isinf": Spelling("std::abs({}) == INFINITY", EQUAL),
    "exp": call("exp_"),
    "exp2": call("exp2_"),
    "expm1": call("std::expm1"),
    "log": call("log_"),
    "log2": call("log2_"),
    "log10": call("std::log10"),
    "log1p": call("log1p_"),
    "asinh": call("std::asinh"),
    "atan": call("std::atan"),
    "softplus": call("softplus_"),
    "tanh": call("tanh_"),
    "sigmoid": call("sigmoid_"),
    "erf": call("erf_"),
    "sin": call("sin_"),
    "cos": call("cos_"),
    "sqrt": call("sqrt_"),
    "rsqrt": call("rsqrt_"),
    "reciprocal": Spelling("1.0f / {}", PRODUCT, (UNARY,)),
}
# What they call of the skeleton's functions.
CALLED = frozenset(
    re.findall(r"(?<![\w:])[a-z]\w*(?=\()", " ".join(t.text for s in SPELLINGS.values() for t in (s, s.plain) if t))
)
# On predicates.
TRUTHS: Mapping[str, Spelling] = {
    name: Spelling(f"{{}} {sign} {{}}", ANY, (SUM, SUM))
    for name, sign in {"and": "&", "min": "&", "mul": "&", "or": "|", "max": "|", "add": "|", "xor": "^"}.items()
}


@dataclass(frozen=True)
class CppOperand:
    """A tensor as the printed text names it: pointer, one stride name and one size a dimension, the type in memory."""

    name: str
    strides: tuple[str, ...]
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class CppScope:
    """What the leaves of terms are called: texts of coordinates and sizes, tensors, and the size of every rank."""

    names: Mapping[Expr, str]
    tensors: Mapping[str, CppOperand]
    extent: Mapping[str, Size]


# A coordinate a dimension; None: not moved along this one.
At: TypeAlias = tuple[Expr | None, ...]


class Outer(Protocol):
    """What lies around a block: it holds the terms that do not vary inside."""

    def covers(self, e: Expr) -> bool:
        """Can the term be computed outside?"""

    def export(self, e: Expr, taken: set[str]) -> str:
        """Compute it there, and answer the name that it has inside; `taken` are the names in use."""

    def pointer(self, tensor: str, at: At, taken: set[str]) -> str:
        """The name of a pointer that was moved along some dimensions (None: not along this one)."""

    def unit(self, tensor: str, d: int) -> bool:
        """Do the elements along this dimension, which a loop runs along, lie next to one another?"""


def identifier(text: str, taken: Iterable[str] = ()) -> str:
    """A C++ name close to `text`, different from every name in `taken`."""
    name = re.sub(r"__+", "_", word(text))
    if name[0].isdigit() or name in KEYWORDS:
        name = f"x_{name}"
    return distinct(name, set(taken))


def number(value: ex.Scalar) -> str:
    """A literal of type float."""
    x = float(value)
    if math.isnan(x):
        return "NAN"
    if math.isinf(x):
        return "INFINITY" if x > 0 else "-INFINITY"
    if abs(x) > 3.4028235677973366e38:
        raise PrintError(f"the constant {x:g} is beyond float32")
    return f"{x!r}f"


def kind(e: Expr, extent: Mapping[str, Size]) -> str:
    """The C++ type that holds a term."""
    if e.dtype == "b1":
        return "bool"
    if e.is_float:
        return "float"
    lo, hi = span_of(e, extent)
    return "int32_t" if lo >= -INT32 - 1 and hi <= INT32 else "int64_t"


class CppBody(Writer):
    """The lines of one block of numbers."""

    spellings = SPELLINGS

    def __init__(
        self, scope: CppScope, roots: Iterable[Expr], taken: set[str], outer: Outer | None = None, lane: Expr | None = None
    ) -> None:
        """`lane`: the coordinate that a loop runs along."""
        self.scope, self.outer, self.lane = scope, outer, lane
        self.moved: dict[tuple[str, At], str] = {}
        super().__init__(scope.names, roots, taken)

    def identifier(self, stem: str) -> str:
        return identifier(stem, self.taken)

    def load_stem(self, e: Expr) -> str:
        return f"{self.scope.tensors[str(e.attr)].name}_x"

    def kind(self, e: Expr) -> str:
        return kind(e, self.scope.extent)

    def declared(self, name: str, text: Text, e: Expr) -> str:
        return f"const {self.kind(e)} {name} = {text.code};"

    def shares(self, e: Expr, text: Text) -> bool:
        return e.op == "load" or text.level == CHOICE or super().shares(e, text)

    def below(self, e: Expr) -> tuple[Expr, ...]:
        # the coordinates of a load are printed with its address, which may lie outside in part
        return () if e.op == "load" else e.args

    def elsewhere(self, e: Expr) -> Text | None:
        if self.outer is None or not self.outer.covers(e):
            return None
        return Text(self.outer.export(e, self.taken), ATOM, self.kind(e))

    def constant(self, e: Expr) -> Text:
        if e.dtype == "b1":
            return Text("true" if e.value else "false", ATOM, "bool")
        code = number(e.value) if e.is_float else str(int(e.value))
        wanted = self.kind(e)
        return Text(f"INT64_C({code})" if wanted == "int64_t" else code, UNARY if code.startswith("-") else ATOM, wanted)

    # operators

    def _where(self, e: Expr) -> Text:
        c, yes, no = self._truth(e.args[0]), *(self._chosen(a, e) for a in e.args[1:])
        return Text(f"{c.within(ANY)} ? {yes} : {no}", CHOICE, self.kind(e))

    def _operator(self, e: Expr) -> Text:
        spelling = self.spellings[e.op]
        if e.op == "isnan" or (e.op == "sign" and e.is_float):
            # the operand stands twice: it gets a name
            x = self.let("t", ex.cast(e.args[0], "f32"))
            return self._spelled(spelling, [Text(x, ATOM)], self.kind(e))
        if e.op == "isinf":
            return self._spelled(spelling, [self._real(e.args[0])], "bool")
        if e.op in ex.COMPARISONS:
            return self._comparison(e)
        if e.dtype == "b1":
            return self._predicate(e)
        return self._floating(e) if e.is_float else self._integral(e)

    def _chosen(self, a: Expr, e: Expr) -> str:
        """A side of a choice: a name or a literal, so that nothing hangs on a branch."""
        if e.dtype == "b1":
            return self._truth(a).within(UNARY)
        text = self._real(a) if e.is_float else self._as(a, self.kind(e))
        if a.is_const or text.code.isidentifier():
            return text.code
        return self._keep("t", e, text).code

    def _comparison(self, e: Expr) -> Text:
        common = ex.promote(e.args[0].dtype, e.args[1].dtype)
        if common in ex.FLOATS:
            args = [self._real(a) for a in e.args]
        elif common == "b1":
            args = [self._truth(a) for a in e.args]
        else:
            args = self._alike(e.args)
        return self._spelled(self.spellings[e.op], args, "bool")

    def _predicate(self, e: Expr) -> Text:
        args = [self._truth(a) for a in e.args]
        if e.op == "not":
            return self._spelled(self.spellings[e.op], args, "bool")
        if e.op not in TRUTHS:
            raise PrintError(f"the operator {e.op!r} on a predicate has no form in C++")
        return self._spelled(TRUTHS[e.op], args, "bool")

    def _floating(self, e: Expr) -> Text:
        if e.op == "pow" and e.args[1].is_const and float(e.args[1].value) in (-1.0, 0.5, 2.0, 3.0, 4.0):
            return self._power(e.args[0], float(e.args[1].value))
        return self._spelled(self.spellings[e.op], [self._real(a) for a in e.args], "float")

    def _power(self, base: Expr, exponent: float) -> Text:
        if exponent in (0.5, -1.0):
            return self._spelled(self.spellings["sqrt" if exponent == 0.5 else "reciprocal"], [self._real(base)], "float")
        return Text(" * ".join([self.let("t", ex.cast(base, "f32"))] * int(exponent)), PRODUCT, "float")

    def _integral(self, e: Expr) -> Text:
        own = self.kind(e)
        if e.op in ("floor", "ceil", "round", "trunc"):
            return self._as(e.args[0], own)
        if e.op == "draw":
            # the low 32 bits are all that counts
            low = [Text(f"(uint32_t){self._put(a).within(ATOM)}", UNARY) for a in e.args]
            return Text(f"draw({', '.join(x.code for x in low)})", ATOM, own)
        args = self._alike(e.args, own)
        wide = args[0].kind
        text = self._operation(e, args, wide)
        if e.dtype in NARROW and e.op not in ("max", "min"):
            return Text(f"({NARROW[e.dtype]})({text.code})", UNARY, own)
        return text if wide == own else Text(f"({own})({text.code})", UNARY, own)

    def _operation(self, e: Expr, args: list[Text], wide: str) -> Text:
        spelling = self.spellings[e.op]
        match e.op:
            case "floordiv" | "mod":
                (low, _), (least, _) = (span_of(a, self.scope.extent) for a in e.args)
                # the functions also bear a divisor of 0, where a processor would end the process; sizes are none
                if low < 0 or (least < 1 and e.args[1].op != "symbol"):
                    return self._spelled(spelling, args, wide)
            case "pow":
                exponent = e.args[1]
                if exponent.is_const and 1 <= exponent.value <= 4:
                    return Text(" * ".join([args[0].within(UNARY)] * int(exponent.value)), PRODUCT, wide)
                raise PrintError(f"an integer power with exponent {exponent}")
        return self._spelled(spelling.plain or spelling, args, wide)

    # types

    def _alike(self, terms: Iterable[Expr], least: str = "int32_t") -> list[Text]:
        """Integers in one type, which holds each of them."""
        kinds = [self.kind(a) for a in terms]
        wanted = "int64_t" if "int64_t" in (*kinds, least) else "int32_t"
        return [self._as(a, wanted) for a in terms]

    def _as(self, e: Expr, wanted: str) -> Text:
        """An integer in a type that holds it."""
        if e.is_const:
            code = str(int(e.value))
            if wanted == "int64_t":
                return Text(f"INT64_C({code})", ATOM, wanted)
            return Text(code, UNARY if code.startswith("-") else ATOM, wanted)
        text = self._put(e)
        return text if text.kind == wanted else Text(f"({wanted}){text.within(ATOM)}", UNARY, wanted)

    def _truth(self, e: Expr) -> Text:
        if e.dtype == "b1":
            return self._put(e)
        return Text(f"{self._put(e).within(SUM)} != 0", EQUAL, "bool")

    def _real(self, e: Expr, stem: str = "t") -> Text:
        if e.is_const:
            code = number(float(e.value))
            return Text(code, UNARY if code.startswith("-") else ATOM, "float")
        text = self._put(e, stem)
        return text if text.kind == "float" else Text(f"(float){text.within(ATOM)}", UNARY, "float")

    def _cast(self, e: Expr) -> Text:
        source = e.args[0]
        if e.is_float:
            return self._real(source)
        if e.dtype == "b1":
            return self._truth(source)
        own = self.kind(e)
        if e.dtype in NARROW and source.dtype != "b1":
            through = "int64_t" if source.is_float else NARROW[e.dtype]
            text = f"({through}){self._put(source).within(ATOM)}"
            return Text(f"({NARROW[e.dtype]}){text}" if source.is_float else text, UNARY, own)
        return self._as(source, own)

    # loads

    def _load(self, e: Expr) -> Text:
        t = self.scope.tensors.get(str(e.attr))
        if t is None:
            raise PrintError(f"the tensor {e.attr} is not at hand in this function")
        outside = tuple(self._outside(i) for i in e.args)
        inside = tuple(None if self._still(i) or o is not None else i for i, o in zip(e.args, outside))
        base = t.name
        if self.outer is not None and any(i is not None for i in outside):
            base = self.outer.pointer(str(e.attr), outside, self.taken)
        return self.element(t, f"{base}[{self.steps(t, inside) or '0'}]")

    def pointer(self, tensor: str, at: At) -> str:
        """The name of a pointer into a tensor, moved along the dimensions with a coordinate."""
        if (tensor, at) not in self.moved:
            t = self.scope.tensors[tensor]
            outside = tuple(None if i is None else self._outside(i) for i in at)
            inside = tuple(i if o is None else None for i, o in zip(at, outside))
            base = t.name
            if self.outer is not None and any(i is not None for i in outside):
                base = self.outer.pointer(tensor, outside, self.taken)
            steps = self.steps(t, inside)
            name = base
            if steps:
                name = self.fresh(f"{t.name}_at")
                self.lines.append(f"const {STORED[t.dtype]}* {name} = {base} + {steps};")
            self.moved[tensor, at] = name
        return self.moved[tensor, at]

    @staticmethod
    def element(t: CppOperand, code: str) -> Text:
        """An element in the type that is computed in."""
        match t.dtype:
            case "b1":
                return Text(f"{code} != 0", EQUAL, "bool")
            case "f32":
                return Text(code, ATOM, "float")
            case "f16" | "bf16":
                return Text(f"(float){code}", UNARY, "float")
            case "i64" | "i32":
                return Text(code, ATOM, STORED[t.dtype])
            case "u8" | "i8" | "i16":
                return Text(f"(int32_t){code}", UNARY, "int32_t")
        raise PrintError(f"{t.name} is {t.dtype}; the kernel computes in float32")

    def _outside(self, i: Expr) -> Expr | None:
        """The coordinate, where it does not vary here."""
        return i if self.outer is not None and not self._still(i) and self.outer.covers(i) else None

    @staticmethod
    def _still(i: Expr) -> bool:
        return i.is_const and int(i.value) == 0

    def steps(self, t: CppOperand, at: At) -> str:
        """What a pointer moves by along some dimensions (None: not along this one)."""
        parts = []
        for d, (i, stride, size) in enumerate(zip(at, t.strides, t.shape, strict=True)):
            if i is None:
                continue
            text = self._put(i)
            if not i.is_const and not in_range(i, size, self.scope.extent):
                last = replace(self.scope, names=self.sizes())
                limit = CppBody(last, (), set())._as(size_term(size) - 1, text.kind)
                text = Text(f"min_(max_({text.code}, ({text.kind})0), ({text.kind}){limit.within(ATOM)})", ATOM, text.kind)
            alone = i is self.lane and self.outer is not None and self.outer.unit(t.name, d)
            parts.append(text.within(SUM) if alone else f"{text.within(PRODUCT)} * {stride}")
        return " + ".join(parts)

    def sizes(self) -> dict[Expr, str]:
        return {e: t for e, t in self.scope.names.items() if e.op == "symbol"}
