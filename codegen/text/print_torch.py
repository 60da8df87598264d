"""Prints terms as torch source: the text inside the functions of CPU kernels, FlexAttention and SDPA masks.

    coordinates   integer tensors that broadcast, each a range along a dimension of its own; sizes are Python integers
    floats        are computed in one type (float32 unless told): loads widen, the model's narrowing casts are dropped
    integers      keep their type; // and % round towards −∞, in Python as in torch
    loads         `t[b, m]` gathers; `tile(t, b, m)` is the same as a view where every coordinate is a plain range
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from .integers import in_range

TYPES: Mapping[str, str] = {
    "b1": "torch.bool", "u8": "torch.uint8", "i8": "torch.int8", "i16": "torch.int16", "i32": "torch.int32",
    "i64": "torch.int64", "f16": "torch.float16", "bf16": "torch.bfloat16", "f32": "torch.float32",
    "f64": "torch.float64",
}  # fmt: skip
RESERVED = frozenset(["torch", "math", "inf", "nan", "choose", "tile", "F", "len", "min", "max", "abs", "int", "range"])


class PrintError(ValueError):
    """A term that has no form in torch here; the text is a reason for the user."""


@dataclass
class Scope:
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
    word = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "x"
    if word[0].isdigit():
        word = f"t_{word}"
    used = set(taken) | RESERVED
    out, n = word, 1
    while out in used or keyword.iskeyword(out):
        out, n = f"{word}_{n}", n + 1
    return out


def literal(value: ex.Scalar) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
    return repr(value)


def size_source(size: Size, names: Mapping[str, str]) -> str:
    """A size as Python text; `names[symbol]` is the text of a symbol."""
    term = size_term(size)
    scope = Scope({ex.symbol(n): t for n, t in names.items()}, {}, {}, {})
    return Body(scope, [term]).term(term)


def is_number(e: Expr, numbers: frozenset[Expr] = frozenset()) -> bool:
    """Made of sizes and constants alone: a plain Python number, which has no `.to`."""
    return not e.ranks and all(x.op != "load" or x in numbers for x in ex.walk(e))


# --- printing ---------------------------------------------------------------------------------------------------

_LEVEL = {
    "eq": 1, "ne": 1, "lt": 1, "le": 1, "gt": 1, "ge": 1, "or": 2, "xor": 3, "and": 4, "add": 5, "sub": 5, "mul": 6,
    "div": 6, "floordiv": 6, "mod": 6, "pow": 8,
}  # fmt: skip
_SIGN = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "or": "|", "xor": "^", "and": "&",
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**",
}  # fmt: skip
_FUNCTION = frozenset([
    "exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sigmoid", "sqrt", "rsqrt", "reciprocal", "sin", "cos",
    "erf", "abs", "relu", "floor", "ceil", "round", "trunc", "sign", "isnan", "isinf",
])  # fmt: skip
# The functions of Python's numbers, where an argument is made of sizes alone.
_PLAIN = {
    "exp": "math.exp({})", "exp2": "2.0 ** ({})", "expm1": "math.expm1({})", "log": "math.log({})",
    "log2": "math.log2({})", "log1p": "math.log1p({})", "tanh": "math.tanh({})", "sqrt": "math.sqrt({})",
    "rsqrt": "1.0 / math.sqrt({})", "reciprocal": "1.0 / ({})", "sin": "math.sin({})", "cos": "math.cos({})",
    "erf": "math.erf({})", "abs": "abs({})", "relu": "max({}, 0)", "floor": "math.floor({})", "ceil": "math.ceil({})",
    "round": "round({})", "trunc": "math.trunc({})", "sigmoid": "1.0 / (1.0 + math.exp(-({})))",
}  # fmt: skip
ATOM, UNARY = 9, 7
Text = tuple[str, int]


class Body:
    """The lines of one function. `term` answers the text of a term, after printing what it shares with others."""

    def __init__(self, scope: Scope, roots: Iterable[Expr], indent: str = "    ") -> None:
        self.scope, self.indent = scope, indent
        self.lines: list[str] = []
        self.helpers: set[str] = set()
        self.memo: dict[Expr, Text] = {e: (t, ATOM) for e, t in scope.names.items()}
        self.taken = set(scope.names.values()) | set(scope.tensors.values())
        self.uses: dict[Expr, int] = {}
        self.made: set[Expr] = set()
        # The arguments of what has a name are not counted: they are not printed again.
        pending = list(roots)
        while pending:
            e = pending.pop()
            self.uses[e] = self.uses.get(e, 0) + 1
            if self.uses[e] == 1 and e not in self.memo:
                pending.extend(e.args)

    def line(self, text: str) -> None:
        self.lines.append(f"{self.indent}{text}" if text else "")

    def fresh(self, stem: str) -> str:
        name = identifier(stem, self.taken)
        self.taken.add(name)
        return name

    def let(self, stem: str, e: Expr) -> str:
        """Give a term a name of its own and answer it."""
        text = self.term(e)
        name = self.fresh(stem)
        self.line(f"{name} = {text}")
        self.memo[e] = (name, ATOM)
        return name

    def named(self, e: Expr) -> str:
        """Text of a term in the type of floats that can be called or multiplied: a name, or in parentheses."""
        text = self._real(e)
        return text[0] if text[1] >= 8 else f"({text[0]})"

    def bind(self, e: Expr, name: str) -> None:
        self.memo[e] = (name, ATOM)
        self.taken.add(name)

    def term(self, root: Expr) -> str:
        return self.put(root)[0]

    def real(self, root: Expr) -> str:
        """The term in the type that floats are computed in; a Python number where it holds no tensor."""
        return self._real(root)[0]

    def put(self, root: Expr) -> Text:
        # Terms are deep enough to exhaust Python's stack: arguments first, without recursion.
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if e in self.memo:
                continue
            if e.op == "const":
                text = literal(e.value)
                self.memo[e] = (text, UNARY if text.startswith("-") else ATOM)
            elif not ready:
                stack.append((e, True))
                stack.extend((a, False) for a in reversed(e.args))
            else:
                self.memo[e] = self._shared(e, self._step(e))
        return self.memo[root]

    def _shared(self, e: Expr, text: Text) -> Text:
        if self.uses.get(e, 1) < 2 or text[0].isidentifier() or (is_number(e, self.scope.numbers) and text[1] == ATOM):
            if self._is_new(e):
                self.made.add(e)
            return text
        name = self.fresh(self.scope.tensors[str(e.attr)] + "_" if e.op == "load" else "t")
        self.line(f"{name} = {text[0]}")
        return name, ATOM

    def _is_new(self, e: Expr) -> bool:
        """Does the text make a tensor of its own, which nothing else reads?"""
        passed_on = e.op in ("load", "cast") or (e.op == "where" and self._number(e.args[0]))
        return self.scope.reuse and e.is_float and not self._number(e) and not passed_on

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
                return self._where(e)
            case "not":
                if self._number(e):
                    return f"not {self._wrap(self.put(e.args[0]), ATOM)}", 0
                return f"~{self._wrap(self.put(e.args[0]), UNARY)}", UNARY
        # A comparison takes its arguments in their common type, everything else in the type of the result.
        dtype = ex.promote(e.args[0].dtype, e.args[-1].dtype) if e.dtype == "b1" else e.dtype
        args = [self._real(a) if dtype in ex.FLOATS else self._integer(a, dtype) for a in e.args]
        if self.scope.reuse and e.is_float and not self._number(e):
            found = self._reused(e, args)
            if found is not None:
                return found
        if e.op in _SIGN:
            return self._infix(e.op, args)
        if e.op in ("max", "min"):
            return self._extreme(e, args), ATOM
        return self._call(e, args[0])

    def _reused(self, e: Expr, args: list[Text]) -> Text | None:
        """The operator as one that writes into its argument, where the text has just made that."""
        own = self._wrap(args[0], 8) if e.args[0] in self.made else ""
        if e.op == "exp" and self.scope.real == "f32":
            self.helpers.add("LOG2E")
            return f"{f'{own}.mul_(LOG2E)' if own else f'({self._wrap(args[0], 6)} * LOG2E)'}.exp2_()", ATOM
        if own and len(args) == 1 and (e.op == "neg" or e.op in _FUNCTION - {"isnan", "isinf"}):
            return f"{own}.{e.op}_()", ATOM
        if own and e.op in ("add", "sub", "mul", "div") and self._number(e.args[1]):
            return f"{own}.{e.op}_({args[1][0]})", ATOM
        return None

    def _call(self, e: Expr, arg: Text) -> Text:
        if e.op == "neg":
            return f"-{self._wrap(arg, UNARY)}", UNARY
        if self._number(e):
            if e.op not in _PLAIN:
                raise PrintError(f"the operator {e.op!r} on a size")
            return _PLAIN[e.op].format(arg[0]), UNARY
        if e.op == "softplus":
            return f"torch.nn.functional.softplus({arg[0]})", ATOM
        if e.op not in _FUNCTION:
            raise PrintError(f"the operator {e.op!r} has no form in torch here")
        return f"torch.{e.op}({arg[0]})", ATOM

    def _extreme(self, e: Expr, args: list[Text]) -> str:
        """`max` and `min`; a bound that is a number clamps, and NaN passes either way."""
        plain = [self._number(a) for a in e.args]
        if all(plain):
            return f"{e.op}({args[0][0]}, {args[1][0]})"
        if not any(plain):
            return f"torch.{e.op}imum({args[0][0]}, {args[1][0]})"
        value, bound = args if plain[1] else args[::-1]
        return f"{self._wrap(value, 8)}.clamp({'min' if e.op == 'max' else 'max'}={bound[0]})"

    def _where(self, e: Expr) -> Text:
        cond, yes, no = e.args
        c = self.put(cond) if cond.dtype == "b1" else (f"{self._wrap(self.put(cond), 2)} != 0", 1)
        a, b = (self._real(x) if e.is_float else self._integer(x, e.dtype) for x in (yes, no))
        if self._number(cond):
            a, b = self._alike(a, b, self._number(yes), self._number(no))
            return f"{self._wrap(a, 1)} if {c[0]} else {self._wrap(b, 1)}", 0
        if e.is_float and self._number(yes) and self._number(no):
            # torch.where of two numbers takes torch's default type, whatever that is
            self.helpers.add("choose")
            kind = "" if self.scope.real == "f32" else f", {TYPES[self.scope.real]}"
            return f"choose({c[0]}, {a[0]}, {b[0]}{kind})", ATOM
        return f"torch.where({c[0]}, {a[0]}, {b[0]})", ATOM

    @staticmethod
    def _alike(a: Text, b: Text, plain_a: bool, plain_b: bool) -> tuple[Text, Text]:
        """Two branches of which Python takes one: both numbers or both tensors, since what follows may be a method."""
        if plain_a and not plain_b:
            return (f"torch.full_like({b[0]}, {a[0]})", ATOM), b
        if plain_b and not plain_a:
            return a, (f"torch.full_like({a[0]}, {b[0]})", ATOM)
        return a, b

    def _infix(self, op: str, args: list[Text]) -> Text:
        level = _LEVEL[op]
        # Python chains comparisons, so an argument that is one always gets its parentheses.
        left = self._wrap(args[0], level + 1 if op in ex.COMPARISONS or op == "pow" else level)
        return f"{left} {_SIGN[op]} {self._wrap(args[1], level + 1)}", level

    @staticmethod
    def _wrap(arg: Text, least: int) -> str:
        return arg[0] if arg[1] >= least else f"({arg[0]})"

    # types

    def _number(self, e: Expr) -> bool:
        return is_number(e, self.scope.numbers)

    def _real(self, e: Expr) -> Text:
        if e.is_const:
            number = literal(float(e.value))
            return number, UNARY if number.startswith("-") else ATOM
        text = self.put(e)
        if e.is_float or self._number(e):
            return text
        return f"{self._wrap(text, 8)}.to({TYPES[self.scope.real]})", ATOM

    def _integer(self, e: Expr, dtype: str) -> Text:
        text = self.put(e)
        if e.dtype == dtype or self._number(e):
            return text
        return f"{self._wrap(text, 8)}.to({TYPES[dtype]})", ATOM

    def _cast(self, e: Expr) -> Text:
        source = e.args[0]
        if e.is_float:
            return self._real(source)
        given = self.put(source)
        if e.dtype == "b1":
            return f"{self._wrap(given, 2)} != 0", 1
        if self._number(source):
            return f"int({given[0]})", ATOM
        return f"{self._wrap(given, 8)}.to({TYPES[e.dtype]})", ATOM

    # loads

    def _load(self, e: Expr) -> Text:
        text = self.element(e)
        if e.is_float and e.dtype != self.scope.real:
            text = f"{text}.to({TYPES[self.scope.real]})"
        return text, ATOM

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
        text = self.put(i)
        if in_range(i, size, self.scope.extent) or (i.is_const and int(i.value) == 0):
            return text[0]
        last = str(size - 1) if isinstance(size, int) else f"{tensor}.shape[{d}] - 1"
        if self._number(i):
            return f"min(max({text[0]}, 0), {last})"
        return f"{self._wrap(text, 8)}.clamp(0, {last})"
