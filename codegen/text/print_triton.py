"""Prints terms as Triton source: the text inside the functions that fill a skeleton's holes.

    coordinates   a query-side rank is a [BM, 1] vector, the key rank [1, BN], a batch rank a scalar: all broadcast
    floats        are computed in fp32: loads widen at once, the model's narrowing casts inside a term are dropped
    integers      are int32, or int64 where a bound says that 31 bits may not do; // and % round towards −∞
    loads         are masked by the guards of the ranks they run over; other coordinates are clamped into the tensor
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from .integers import INT32, bounds, in_range

TYPES: Mapping[str, str] = {
    "b1": "tl.int1", "u8": "tl.uint8", "i8": "tl.int8", "i16": "tl.int16", "i32": "tl.int32", "i64": "tl.int64",
    "f16": "tl.float16", "bf16": "tl.bfloat16", "f32": "tl.float32",
}  # fmt: skip


class PrintError(ValueError):
    """A term that has no form in Triton; the text is a reason for the user."""


@dataclass(frozen=True)
class Operand:
    """A tensor argument as the printed text names it: pointer, one stride name and one size a dimension."""

    name: str
    strides: tuple[str, ...]
    shape: tuple[Size, ...]
    dtype: str


@dataclass
class Scope:
    """What the leaves of a function's terms are called.

    `names` holds text for coordinates, sizes and terms computed before; `guards[rank]` is the condition under which a
    coordinate of that rank is real (none: always); `extent[rank]` its size.
    """

    names: dict[Expr, str]
    tensors: Mapping[str, Operand]
    extent: Mapping[str, Size]
    guards: Mapping[str, str] = field(default_factory=dict)


def identifier(text: str, taken: Iterable[str] = ()) -> str:
    """A Python name close to `text`, different from every name in `taken`."""
    word = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "x"
    if word[0].isdigit() or keyword.iskeyword(word) or word in ("tl", "triton", "torch"):
        word = f"x_{word}"
    used = set(taken)
    out, n = word, 1
    while out in used:
        out, n = f"{word}_{n}", n + 1
    return out


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


# --- printing ---------------------------------------------------------------------------------------------------

_LEVEL = {
    "eq": 1, "ne": 1, "lt": 1, "le": 1, "gt": 1, "ge": 1, "or": 2, "xor": 3, "and": 4, "add": 5, "sub": 5, "mul": 6,
    "div": 6, "floordiv": 6, "mod": 6,
}  # fmt: skip
_SIGN = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "or": "|", "xor": "^", "and": "&",
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%",
}  # fmt: skip
_CALL = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt",
    "sin": "tl.sin", "cos": "tl.cos", "erf": "tl.erf", "sigmoid": "tl.sigmoid", "abs": "tl.abs", "floor": "tl.floor",
    "ceil": "tl.ceil", "max": "tl.maximum", "min": "tl.minimum",
}  # fmt: skip
# Device functions of skeletons/scalar.py.
_HELPER = {
    "tanh": "tanh", "expm1": "expm1", "log1p": "log1p", "softplus": "softplus", "round": "round_even",
    "trunc": "truncate", "sign": "sign",
}  # fmt: skip
ATOM, UNARY = 9, 7


class Body:
    """The lines of one function. `term` answers text for a term, after printing what it shares with others."""

    def __init__(self, scope: Scope, roots: Iterable[Expr], indent: str = "    ") -> None:
        self.scope, self.indent = scope, indent
        self.lines: list[str] = []
        self.helpers: set[str] = set()
        self.memo: dict[Expr, tuple[str, int]] = {e: (t, ATOM) for e, t in scope.names.items()}
        self.taken = set(scope.names.values()) | {s for t in scope.tensors.values() for s in (t.name, *t.strides)}
        self.uses: dict[Expr, int] = {}
        self.count(roots)

    def count(self, roots: Iterable[Expr]) -> None:
        """From here on, name what these terms share. Arguments of what is already named are not printed again."""
        self.uses.clear()
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
        """Give a term a name of its own, unless it has one, and answer it."""
        self.uses[e] = 1
        text = self.number_text(e) if e.is_float else self.term(e)
        if text.isidentifier():
            return text
        name = self.fresh(stem)
        self.line(f"{name} = {text}")
        self.memo[e] = (name, ATOM)
        return name

    def bind(self, e: Expr, name: str) -> None:
        self.memo[e] = (name, ATOM)
        self.taken.add(name)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """An indented block; what is named inside is not known after it."""
        self.line(head)
        memo, indent = dict(self.memo), self.indent
        self.indent += "    "
        yield
        self.memo, self.indent = memo, indent

    def term(self, root: Expr) -> str:
        return self._put(root)[0]

    def number_text(self, root: Expr) -> str:
        """The term in fp32."""
        return self._float(root)[0]

    def _put(self, e: Expr) -> tuple[str, int]:
        for t in self._unprinted(e):
            text, level = self._step(t)
            if t.op == "load" or (self.uses.get(t, 1) > 1 and not text.isidentifier()):
                name = self.fresh(f"b_{t.attr}" if t.op == "load" else "t")
                self.line(f"{name} = {text}")
                text, level = name, ATOM
            self.memo[t] = (text, level)
        return self._leaf(e)

    def _unprinted(self, root: Expr) -> Iterator[Expr]:
        """Sub-terms without text yet, arguments first, without recursion; what is named is not entered."""
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if e in self.memo or e.op == "const":
                continue
            if ready:
                yield e
                continue
            stack.append((e, True))
            stack.extend((a, False) for a in reversed(e.args))

    def _leaf(self, e: Expr) -> tuple[str, int]:
        if e.op == "const":
            text = number(e.value, e.dtype)
            return text, UNARY if text.startswith("-") else ATOM
        return self.memo[e]

    # one rule an operator

    def _step(self, e: Expr) -> tuple[str, int]:
        match e.op:
            case "index" | "symbol":
                raise PrintError(f"{e} has no value in this function")
            case "load":
                return self._load(e), ATOM
            case "cast":
                return self._cast(e)
            case "where":
                yes, no = (self._as(a, e.dtype)[0] for a in e.args[1:])
                return f"tl.where({self._as(e.args[0], 'b1')[0]}, {yes}, {no})", ATOM
            case "not" if e.dtype == "b1":
                return f"~{self._wrap(self._as(e.args[0], 'b1'), UNARY)}", UNARY
            case "isnan":
                text = self._wrap(self._float(e.args[0]), 2)
                return f"{text} != {text}", 1
            case "isinf":
                return f'tl.abs({self._float(e.args[0])[0]}) == float("inf")', 1
        if e.op in ex.COMPARISONS:
            common = ex.promote(e.args[0].dtype, e.args[1].dtype)
            return self._infix(e.op, [self._as(a, common) for a in e.args])
        if e.is_float:
            return self._floating(e)
        return self._integral(e)

    def _floating(self, e: Expr) -> tuple[str, int]:
        args = [self._float(a) for a in e.args]
        match e.op:
            case "neg":
                return f"-{self._wrap(args[0], UNARY)}", UNARY
            case "relu":
                return f"tl.maximum({args[0][0]}, 0.0)", ATOM
            case "reciprocal":
                return f"1.0 / {self._wrap(args[0], 7)}", 6
            case "pow":
                return self._power(e, args)
            case "mod":
                return self._helper("remainder", args)
            case "floordiv":
                return f"tl.floor({self._infix('div', args)[0]})", ATOM
        if e.op in _HELPER:
            return self._helper(_HELPER[e.op], args)
        return self._plain(e, args)

    def _integral(self, e: Expr) -> tuple[str, int]:
        args = [self._as(a, e.dtype) for a in e.args]
        extent = self.scope.extent
        lo, hi = bounds(e, extent)
        if (lo < -INT32 or hi > INT32) and e.dtype == "i64" and e.op in ("add", "sub", "mul", "neg", "abs"):
            args = [self._wide(a, text) for a, text in zip(e.args, args)]
        match e.op:
            case "neg":
                return f"-{self._wrap(args[0], UNARY)}", UNARY
            case "not":
                return f"~{self._wrap(args[0], UNARY)}", UNARY
            case "relu":
                return f"tl.maximum({args[0][0]}, 0)", ATOM
            case "floor" | "ceil" | "round" | "trunc":
                return args[0]
            case "sign":
                x = args[0][0]
                return f"tl.where({x} > 0, 1, tl.where({x} < 0, -1, 0))", ATOM
            case "floordiv" | "mod":
                (low, _), (least, _) = (bounds(a, extent) for a in e.args)
                if low < 0 or least < 0:
                    return self._helper("floor_div" if e.op == "floordiv" else "floor_mod", args)
                return self._infix(e.op, args)
            case "pow":
                exponent = e.args[1]
                if exponent.is_const and 1 <= exponent.value <= 4:
                    x = self._wrap(args[0], 7)
                    return " * ".join([x] * int(exponent.value)), 6
                raise PrintError(f"an integer power with exponent {exponent}")
        return self._plain(e, args)

    def _plain(self, e: Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
        if e.op in _SIGN:
            return self._infix(e.op, args)
        if e.op in _CALL:
            return f"{_CALL[e.op]}({', '.join(t for t, _ in args)})", ATOM
        raise PrintError(f"the operator {e.op!r} on {e.dtype} has no form in Triton")

    def _helper(self, name: str, args: list[tuple[str, int]]) -> tuple[str, int]:
        self.helpers.add(name)
        return f"{name}({', '.join(t for t, _ in args)})", ATOM

    def _power(self, e: Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
        exponent = e.args[1]
        if exponent.is_const:
            y = float(exponent.value)
            if y in (2.0, 3.0, 4.0):
                base = args[0][0] if args[0][0].isidentifier() else self.let("t", e.args[0])
                return " * ".join([base] * int(y)), 6
            if y == 0.5:
                return f"tl.sqrt({args[0][0]})", ATOM
            if y == -1.0:
                return f"1.0 / {self._wrap(args[0], 7)}", 6
        return self._helper("power", args)

    def _infix(self, op: str, args: list[tuple[str, int]]) -> tuple[str, int]:
        level = _LEVEL[op]
        # Python chains comparisons, so an argument that is one always gets its parentheses.
        left = self._wrap(args[0], level + 1 if op in ex.COMPARISONS else level)
        return f"{left} {_SIGN[op]} {self._wrap(args[1], level + 1)}", level

    @staticmethod
    def _wrap(arg: tuple[str, int], least: int) -> str:
        return arg[0] if arg[1] >= least else f"({arg[0]})"

    # types

    def _as(self, e: Expr, dtype: str) -> tuple[str, int]:
        if dtype in ex.FLOATS:
            return self._float(e)
        if dtype == "b1" and e.dtype != "b1":
            return f"{self._wrap(self._put(e), 2)} != 0", 1
        return self._put(e)

    def _float(self, e: Expr) -> tuple[str, int]:
        if e.is_const:
            return self._number(e.value)
        text = self._put(e)
        if e.is_float:
            return text
        if self._is_size(e):
            return f"{self._wrap(text, 6)} * 1.0", 6
        return f"{self._wrap(text, 8)}.to(tl.float32)", ATOM

    @staticmethod
    def _number(value: ex.Scalar) -> tuple[str, int]:
        text = number(float(value), "f32")
        return text, UNARY if text.startswith("-") else ATOM

    def _wide(self, e: Expr, text: tuple[str, int]) -> tuple[str, int]:
        if e.is_const or self._is_size(e):
            return text
        return f"{self._wrap(text, 8)}.to(tl.int64)", ATOM

    @staticmethod
    def _is_size(e: Expr) -> bool:
        """Made of sizes alone: a plain number in Python's sense, which has no `.to`."""
        return not e.ranks and all(x.op != "load" for x in ex.walk(e))

    def _cast(self, e: Expr) -> tuple[str, int]:
        source = e.args[0]
        if e.is_float:
            return self._float(source)
        if e.dtype == "b1":
            return self._as(source, "b1")
        if source.is_float:
            text = f"{self._wrap(self._put(source), 8)}.to(tl.{'int64' if e.dtype == 'i64' else 'int32'})"
            if e.dtype in ("i64", "i32"):
                return text, ATOM
            return f"{text}.to({TYPES[e.dtype]}).to(tl.int32)", ATOM
        if source.dtype == "b1":
            return f"{self._wrap(self._put(source), 8)}.to(tl.int32)", ATOM
        lo, hi = bounds(source, self.scope.extent)
        least, most = bounds(Expr("load", (), "", e.dtype), {}) if e.dtype != "i64" else (-math.inf, math.inf)
        if (least <= lo and hi <= most) or self._is_size(source):
            return self._put(source)
        text = f"{self._wrap(self._put(source), 8)}.to({TYPES[e.dtype]})"
        return (text if e.dtype == "i32" else f"{text}.to(tl.int32)"), ATOM

    # loads

    def address(self, name: str, index: tuple[Expr, ...], clamp: bool = True) -> tuple[str, tuple[str, ...]]:
        """Pointer text of an element and the guards under which it may be read."""
        t = self.scope.tensors[name]
        parts, guards = [t.name], []
        for i, stride, size in zip(index, t.strides, t.shape):
            if i.is_const:
                if int(i.value) != 0:
                    parts.append(f"{int(i.value)} * {stride}")
                continue
            text = self._put(i)
            if clamp and not in_range(i, size, self.scope.extent):
                limit = Body(self.scope, ())._put(size_term(size) - 1)[0]
                text = (f"tl.minimum(tl.maximum({text[0]}, 0), {limit})", ATOM)
            else:
                guards += [self.scope.guards[r] for r in sorted(i.ranks) if r in self.scope.guards]
            parts.append(f"{self._wrap(text, 6)} * {stride}")
        return " + ".join(parts), tuple(dict.fromkeys(guards))

    def _load(self, e: Expr) -> str:
        text = self.load_text(e)
        return f"{text}.to(tl.float32)" if e.dtype in ("f16", "bf16", "f64") else text

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
