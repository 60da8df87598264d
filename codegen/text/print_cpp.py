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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from .integers import INT32, bounds, in_range
from .print_torch import PrintError

# What a tensor's elements are in memory.
STORED: Mapping[str, str] = {
    "b1": "uint8_t", "u8": "uint8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t",
    "f16": "f16", "bf16": "bf16", "f32": "float",
}  # fmt: skip
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
])  # fmt: skip

# Levels of C++'s operators: an argument below the level that is asked for gets parentheses.
CHOICE, ANY, SUM, PRODUCT, UNARY, ATOM = 0, 1, 7, 8, 9, 10
_LEVEL = {
    "or": 1, "xor": 2, "and": 3, "eq": 4, "ne": 4, "lt": 5, "le": 5, "gt": 5, "ge": 5, "add": SUM, "sub": SUM,
    "mul": PRODUCT, "div": PRODUCT, "floordiv": PRODUCT, "mod": PRODUCT,
}  # fmt: skip
_SIGN = {
    "or": "|", "xor": "^", "and": "&", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "add": "+",
    "sub": "-", "mul": "*", "div": "/", "floordiv": "/", "mod": "%",
}  # fmt: skip
# Functions of floats: the skeleton's, and what the processor does by itself. Integers have some of them, too.
_CALL = {
    "exp": "exp_", "exp2": "exp2_", "expm1": "std::expm1", "log": "log_", "log2": "log2_", "log1p": "log1p_",
    "tanh": "tanh_", "sigmoid": "sigmoid_", "softplus": "softplus_", "erf": "erf_", "sin": "sin_", "cos": "cos_",
    "rsqrt": "rsqrt_", "sqrt": "sqrt_", "abs": "std::abs", "floor": "floor_", "ceil": "std::ceil", "round": "std::rint",
    "trunc": "std::trunc", "max": "max_", "min": "min_", "mod": "floor_mod", "floordiv": "floor_div", "pow": "pow_",
}  # fmt: skip
# On predicates.
_LOGIC = {"add": "|", "max": "|", "mul": "&", "min": "&"}


@dataclass(frozen=True)
class Text:
    """A term's text, how tightly it binds, and the C++ type that it has."""

    code: str
    level: int
    kind: str

    def within(self, least: int) -> str:
        return self.code if self.level >= least else f"({self.code})"


@dataclass(frozen=True)
class Operand:
    """A tensor as the printed text names it: pointer, one stride name and one size a dimension, the type in memory."""

    name: str
    strides: tuple[str, ...]
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class Scope:
    """What the leaves of terms are called: texts of coordinates and sizes, tensors, and the size of every rank."""

    names: Mapping[Expr, str]
    tensors: Mapping[str, Operand]
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
    word = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "x"
    word = re.sub(r"__+", "_", word)
    if word[0].isdigit() or word in KEYWORDS:
        word = f"x_{word}"
    used = set(taken)
    out, n = word, 1
    while out in used:
        out, n = f"{word}_{n}", n + 1
    return out


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
    lo, hi = bounds(e, extent)
    return "int32_t" if lo >= -INT32 - 1 and hi <= INT32 else "int64_t"


class Body:
    """The lines of one block. `term` answers text for a term, after printing what it shares with others."""

    def __init__(
        self, scope: Scope, roots: Iterable[Expr], taken: set[str], outer: Outer | None = None, lane: Expr | None = None
    ) -> None:  # fmt: skip
        """`lane`: the coordinate that a loop runs along."""
        self.scope, self.outer, self.taken, self.lane = scope, outer, taken, lane
        self.lines: list[str] = []
        self.memo: dict[Expr, Text] = {e: Text(t, ATOM, kind(e, scope.extent)) for e, t in scope.names.items()}
        self.moved: dict[tuple[str, At], str] = {}
        self.uses: dict[Expr, int] = {}
        self.count(roots)

    def count(self, roots: Iterable[Expr]) -> None:
        """Name what these terms share. Arguments of what has a name already are not printed again."""
        pending = list(roots)
        while pending:
            e = pending.pop()
            self.uses[e] = self.uses.get(e, 0) + 1
            if self.uses[e] == 1 and e not in self.memo:
                pending.extend(e.args)

    def fresh(self, stem: str) -> str:
        name = identifier(stem, self.taken)
        self.taken.add(name)
        return name

    def bind(self, e: Expr, name: str) -> None:
        self.memo[e] = Text(name, ATOM, kind(e, self.scope.extent))
        self.taken.add(name)

    def let(self, stem: str, e: Expr) -> str:
        """Give a term a name of its own, unless it has one, and answer it."""
        text = self._real(e, stem) if e.is_float else self._put(e, stem)
        if text.code.isidentifier():
            return text.code
        wanted = kind(e, self.scope.extent)
        name = self.fresh(stem)
        self.lines.append(f"const {wanted} {name} = {text.code};")
        self.memo[e] = Text(name, ATOM, wanted)
        return name

    def term(self, e: Expr) -> str:
        return self._put(e).code

    def real(self, e: Expr) -> str:
        """The term as a float."""
        return self._real(e).code

    def _put(self, root: Expr, stem: str = "t") -> Text:
        for e in self._unprinted(root):
            text = self._step(e)
            branch = text.level == CHOICE
            if (self.uses.get(e, 1) > 1 or e.op == "load" or branch) and not text.code.isidentifier():
                wanted = kind(e, self.scope.extent)
                own = stem if e is root else "t"
                name = self.fresh(f"{self.scope.tensors[str(e.attr)].name}_x" if e.op == "load" else own)
                self.lines.append(f"const {wanted} {name} = {text.code};")
                text = Text(name, ATOM, wanted)
            self.memo[e] = text
        return self._leaf(root)

    def _unprinted(self, root: Expr) -> Iterator[Expr]:
        """Sub-terms without text yet, arguments first, without recursion; what is named or lies outside is not entered."""
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if e in self.memo or e.op == "const":
                continue
            if ready:
                yield e
            elif self.outer is not None and self.outer.covers(e):
                self.memo[e] = Text(self.outer.export(e, self.taken), ATOM, kind(e, self.scope.extent))
            else:
                stack.append((e, True))
                # the coordinates of a load are printed with its address, which may lie outside in part
                stack.extend((a, False) for a in reversed(e.args) if e.op != "load")

    def _leaf(self, e: Expr) -> Text:
        if e.op != "const":
            return self.memo[e]
        if e.dtype == "b1":
            return Text("true" if e.value else "false", ATOM, "bool")
        code = number(e.value) if e.is_float else str(int(e.value))
        wanted = kind(e, self.scope.extent)
        return Text(f"INT64_C({code})" if wanted == "int64_t" else code, UNARY if code.startswith("-") else ATOM, wanted)

    # one rule an operator

    def _step(self, e: Expr) -> Text:
        match e.op:
            case "index" | "symbol":
                raise PrintError(f"{e} has no value in this function")
            case "load":
                return self._load(e)
            case "cast":
                return self._cast(e)
            case "where":
                c, yes, no = self._truth(e.args[0]), *(self._chosen(a, e) for a in e.args[1:])
                return Text(f"{c.within(ANY)} ? {yes} : {no}", CHOICE, kind(e, self.scope.extent))
            case "not" if e.dtype == "b1":
                return Text(f"!{self._truth(e.args[0]).within(UNARY)}", UNARY, "bool")
            case "isnan":
                x = self.let("t", ex.cast(e.args[0], "f32"))
                return Text(f"{x} != {x}", _LEVEL["ne"], "bool")
            case "isinf":
                return Text(f"std::abs({self.real(e.args[0])}) == INFINITY", _LEVEL["eq"], "bool")
        if e.op in ex.COMPARISONS:
            return self._comparison(e)
        if e.dtype == "b1":
            return self._predicate(e)
        return self._floating(e) if e.is_float else self._integral(e)

    def _chosen(self, a: Expr, e: Expr) -> str:
        """A side of a choice: a name or a literal, so that nothing hangs on a branch."""
        if e.dtype == "b1":
            return self._truth(a).within(UNARY)
        text = self._real(a) if e.is_float else self._as(a, kind(e, self.scope.extent))
        if a.is_const or text.code.isidentifier():
            return text.code
        name = self.fresh("t")
        self.lines.append(f"const {kind(e, self.scope.extent)} {name} = {text.code};")
        return name

    def _comparison(self, e: Expr) -> Text:
        common = ex.promote(e.args[0].dtype, e.args[1].dtype)
        if common in ex.FLOATS:
            args = [self._real(a) for a in e.args]
        elif common == "b1":
            args = [self._truth(a) for a in e.args]
        else:
            args = self._alike(e.args)
        left, right = (t.within(SUM) for t in args)
        return Text(f"{left} {_SIGN[e.op]} {right}", _LEVEL[e.op], "bool")

    def _predicate(self, e: Expr) -> Text:
        sign = _LOGIC.get(e.op, _SIGN.get(e.op, ""))
        if sign not in ("&", "|", "^"):
            raise PrintError(f"the operator {e.op!r} on a predicate has no form in C++")
        left, right = (self._truth(a).within(SUM) for a in e.args)
        return Text(f"{left} {sign} {right}", ANY, "bool")

    def _floating(self, e: Expr) -> Text:
        args = [self._real(a) for a in e.args]
        match e.op:
            case "neg":
                return Text(f"-{args[0].within(ATOM)}", UNARY, "float")
            case "relu":
                return Text(f"max_({args[0].code}, 0.0f)", ATOM, "float")
            case "reciprocal":
                return Text(f"1.0f / {args[0].within(UNARY)}", PRODUCT, "float")
            case "sign":
                x = self.let("t", ex.cast(e.args[0], "f32"))
                return Text(f"(float)(({x} > 0.0f) - ({x} < 0.0f))", UNARY, "float")
            case "pow" if e.args[1].is_const and float(e.args[1].value) in (-1.0, 0.5, 2.0, 3.0, 4.0):
                return self._power(e.args[0], float(e.args[1].value))
        if e.op in _CALL:
            return Text(f"{_CALL[e.op]}({', '.join(t.code for t in args)})", ATOM, "float")
        if e.op in _SIGN:
            return self._infix(e.op, args, "float")
        raise PrintError(f"the operator {e.op!r} on {e.dtype} has no form in C++")

    def _power(self, base: Expr, exponent: float) -> Text:
        if exponent == 0.5:
            return Text(f"sqrt_({self.real(base)})", ATOM, "float")
        if exponent == -1.0:
            return Text(f"1.0f / {self._real(base).within(UNARY)}", PRODUCT, "float")
        return Text(" * ".join([self.let("t", ex.cast(base, "f32"))] * int(exponent)), PRODUCT, "float")

    def _integral(self, e: Expr) -> Text:
        own = kind(e, self.scope.extent)
        if e.op in ("floor", "ceil", "round", "trunc"):
            return self._as(e.args[0], own)
        args = self._alike(e.args, own)
        wide = args[0].kind
        text = self._operation(e, args, wide)
        if e.dtype in NARROW and e.op not in ("max", "min"):
            return Text(f"({NARROW[e.dtype]})({text.code})", UNARY, own)
        return text if wide == own else Text(f"({own})({text.code})", UNARY, own)

    def _operation(self, e: Expr, args: list[Text], wide: str) -> Text:
        listed = ", ".join(t.code for t in args)
        match e.op:
            case "neg" | "not":
                return Text(f"{'-' if e.op == 'neg' else '~'}{args[0].within(ATOM)}", UNARY, wide)
            case "relu":
                return Text(f"max_({args[0].code}, ({wide})0)", ATOM, wide)
            case "sign":
                return Text(f"({listed} > 0) - ({listed} < 0)", SUM, wide)
            case "abs" | "max" | "min":
                return Text(f"{_CALL[e.op]}({listed})", ATOM, wide)
            case "floordiv" | "mod":
                (low, _), (least, _) = (bounds(a, self.scope.extent) for a in e.args)
                # the functions also bear a divisor of 0, where a processor would end the process; sizes are none
                if low < 0 or (least < 1 and e.args[1].op != "symbol"):
                    return Text(f"{_CALL[e.op]}({listed})", ATOM, wide)
            case "pow":
                exponent = e.args[1]
                if exponent.is_const and 1 <= exponent.value <= 4:
                    return Text(" * ".join([args[0].within(UNARY)] * int(exponent.value)), PRODUCT, wide)
                raise PrintError(f"an integer power with exponent {exponent}")
        if e.op in _SIGN:
            return self._infix(e.op, args, wide)
        raise PrintError(f"the operator {e.op!r} on {e.dtype} has no form in C++")

    @staticmethod
    def _infix(op: str, args: list[Text], wanted: str) -> Text:
        level = _LEVEL[op]
        # compilers and readers alike want parentheses around comparisons under & and |
        least = level if level >= SUM else SUM
        return Text(f"{args[0].within(least)} {_SIGN[op]} {args[1].within(least + 1)}", level, wanted)

    # types

    def _alike(self, terms: Iterable[Expr], least: str = "int32_t") -> list[Text]:
        """Integers in one type, which holds each of them."""
        kinds = [kind(a, self.scope.extent) for a in terms]
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
        return Text(f"{self._put(e).within(SUM)} != 0", _LEVEL["ne"], "bool")

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
        own = kind(e, self.scope.extent)
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
    def element(t: Operand, code: str) -> Text:
        """An element in the type that is computed in."""
        match t.dtype:
            case "b1":
                return Text(f"{code} != 0", _LEVEL["ne"], "bool")
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

    def steps(self, t: Operand, at: At) -> str:
        """What a pointer moves by along some dimensions (None: not along this one)."""
        parts = []
        for d, (i, stride, size) in enumerate(zip(at, t.strides, t.shape, strict=True)):
            if i is None:
                continue
            text = self._put(i)
            if not i.is_const and not in_range(i, size, self.scope.extent):
                last = replace(self.scope, names=self.sizes())
                limit = Body(last, (), set())._as(size_term(size) - 1, text.kind)
                text = Text(f"min_(max_({text.code}, ({text.kind})0), ({text.kind}){limit.within(ATOM)})", ATOM, text.kind)
            alone = i is self.lane and self.outer is not None and self.outer.unit(t.name, d)
            parts.append(text.within(SUM) if alone else f"{text.within(PRODUCT)} * {stride}")
        return " + ".join(parts)

    def sizes(self) -> dict[Expr, str]:
        return {e: t for e, t in self.scope.names.items() if e.op == "symbol"}
