"""A cascade read from the papers' notation: what `show` prints, and what a person types.

    attention   P=P, M=M, E=64, F=64
      inputs  Q: bf16[P,64], K: bf16[M,64], V: bf16[M,64]
      S[p,m] = sum_e Q[p,e] * K[m,e]             also Σ_e Q[p,e] · K[m,e]
      …
      outputs O

A rank is declared by its size in the first line (`M1=M1◇` or `M1=M1 iterative` where it is walked in order), and an input by
its type and sizes; a tensor that an Einsum writes is as its term is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from . import expr as ex
from .cascade import Access, Cascade, CascadeError, Einsum, Rank, Size, Tensor, bind, parse_size, verify
from .expr import Expr, Scalar
from .operators import OPERATORS

# What a keyboard has for a sign or a word of the notation.
TYPED: Mapping[str, str] = {
    "*": "·", "-": "−", "<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "and": "∧", "or": "∨", "not": "¬", "inf": "∞",
}
_SIGNS = {o.sign: o for o in OPERATORS.values() if o.sign}
_LEVELS = sorted({o.level for o in _SIGNS.values()})
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][-+−]?\d+)?)|([A-Za-z_](?:[\w:']|\.(?=\w))*)|(//|<=|>=|!=|==|.))", re.DOTALL)
_REDUCTIONS = {"Σ": "add", "sum": "add", "max": "max", "min": "min", "mul": "mul", "or": "or", "and": "and", "add": "add"}
_REDUCED = re.compile(r"(Σ|sum|max|min|mul|or|and|add)_([A-Za-z]\w*(?:,[A-Za-z]\w*)*)\s")
_DECLARED = re.compile(r"\s*(\w+)\s*:\s*(\w+)(?:\[([^\]]*)\])?\s*,?")


def read(text: str) -> Cascade:
    """The cascade. Raises CascadeError that names the line and what is wrong with it."""
    lines = [(n, x) for n, x in enumerate(text.splitlines(), 1) if x.strip() and not x.lstrip().startswith("#")]
    if not lines:
        raise CascadeError("there is no cascade: the first line is its name and its sizes, as in `attention   P=4096, M=M`")
    reader = _Text()
    for i, (n, line) in enumerate(lines):
        try:
            reader.head(line) if i == 0 else reader.line(line.strip())
        except (CascadeError, ValueError, TypeError, KeyError) as no:
            raise CascadeError(f"line {n}, {line.strip()!r}: {no}") from None
    return verify(reader.cascade())


@dataclass
class _Text:
    name: str = ""
    ranks: dict[str, Rank] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    written: dict[str, list[tuple[tuple[Expr, ...], str]]] = field(default_factory=dict)
    einsums: list[Einsum] = field(default_factory=list)
    outputs: tuple[str, ...] = ()

    def head(self, line: str) -> None:
        # a name of several words ends where two blanks stand
        self.name, *sizes = re.split(r"\s{2,}", line.strip(), maxsplit=1) if "  " in line.strip() else line.split(maxsplit=1)
        for part in _split("".join(sizes)):
            name, equals, size = part.partition("=")
            if not equals:
                raise CascadeError(f"{part!r} is no size: write P=4096, or P=P for one that is open")
            plain = size.strip().removesuffix("iterative").strip()
            walked = plain != size.strip() or plain.endswith("◇")
            rank = name.strip().lower()
            self.ranks[rank] = Rank(rank, parse_size(plain.removesuffix("◇").strip()), walked)

    def line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "inputs":
            self._inputs(rest)
        elif word == "outputs":
            self.outputs = tuple(x.strip() for x in rest.split(","))
        else:
            self._einsum(line)

    def _inputs(self, text: str) -> None:
        at = 0
        while at < len(text.rstrip()):
            m = _DECLARED.match(text, at)
            if m is None:
                raise CascadeError(f"{text[at:].strip()!r} is no input: write Q: bf16[B,P,64]")
            if m[2] not in ex.DTYPES:
                raise CascadeError(f"{m[2]} is no type: one of {', '.join(ex.DTYPES)}")
            self.inputs.append(Tensor(m[1], tuple(map(self._size, _split(m[3] or ""))), m[2]))
            at = m.end()

    def _size(self, text: str) -> Size:
        """A size, in which the name of a rank whose size is known stands for that."""
        known = {r.name.upper(): r.size for r in self.ranks.values()}
        return bind(parse_size(text), {n: size for n, size in known.items() if isinstance(size, int)})

    def _einsum(self, line: str) -> None:
        left, equals, right = line.partition(" = ")
        if not equals:
            raise CascadeError("an Einsum is `O[p,f] = sum_m A[p,m] * V[m,f]`, and the words are inputs and outputs")
        out = _Terms(left, self._named, self.ranks).access()
        reduced = _REDUCED.match(right.strip() + " ")
        op, over = None, tuple[str, ...]()
        if reduced:
            op, over = _REDUCTIONS[reduced[1]], tuple(reduced[2].split(","))
            right = right.strip()[reduced.end() - 1 :]
        body = _Terms(right, self._named, self.ranks).whole()
        # a number that is all that is written is one of the tensor's type
        body = ex.const(body.value, "f32") if body.is_const and body.dtype == "i64" else body
        self.einsums.append(Einsum(out, body, op, over))
        self.written.setdefault(out.tensor, []).append((out.index, body.dtype))

    def _named(self, tensor: str) -> str | None:
        """The type of a tensor that is known so far; one that a later step writes is read as float32."""
        given = next((t.dtype for t in self.inputs if t.name == tensor), None)
        return given or next((dtype for _, dtype in self.written.get(tensor, ())), None)

    def cascade(self) -> Cascade:
        made = tuple(Tensor(name, self._shape(name), found[0][1]) for name, found in self.written.items())
        known = {t.name for t in made}
        outputs = self.outputs or (self.einsums[-1].out.tensor,) if self.einsums else ()
        tensors = (*(t for t in self.inputs if t.name not in known), *made)
        return Cascade(self.name, tuple(self.ranks.values()), tensors, tuple(self.einsums), outputs)

    def _shape(self, name: str) -> tuple[Size, ...]:
        """As large as the coordinates at which it is written."""
        places = [index for index, _ in self.written[name]]
        if len({len(p) for p in places}) > 1:
            raise CascadeError(f"{name} is written with different numbers of coordinates")
        return tuple(self._extent(dim) for dim in zip(*places))

    def _extent(self, at: tuple[Expr, ...]) -> Size:
        """One more than the last coordinate: of a rank its size, of `m1 + 1` one more, of a constant one."""
        for i in at:
            base, more = (i.args[0], i.args[1]) if i.op == "add" else (i, ex.const(0))
            if base.op == "index" and more.is_const:
                return self.ranks[str(base.attr)].size + int(more.value)
        if all(i.is_const for i in at):
            return max(int(i.value) for i in at) + 1
        raise CascadeError(f"{at[0]} is no place to write at: a rank, a rank + 1, or a number")


class _Terms:
    """A term, by the levels at which the table's signs bind."""

    def __init__(self, text: str, dtype: Callable[[str], str | None], ranks: Mapping[str, Rank]) -> None:
        self.dtype, self.ranks = dtype, ranks
        found = [next(g for g in m.groups() if g is not None) for m in _TOKEN.finditer(text.rstrip())]
        self.tokens, self.at = [TYPED.get(t, t) for t in found], 0

    def whole(self) -> Expr:
        out = self._level(0)
        if self.at < len(self.tokens):
            raise CascadeError(f"{self.tokens[self.at]!r} stands where a term has ended")
        return _term(out)

    def access(self) -> Access:
        name = self._next()
        index = self._list("]") if self._peek() == "[" else ()
        return Access(name, tuple(map(_term, index)))

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _next(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise CascadeError(f"{wanted or 'a term'!r} is missing" + (f" before {token!r}" if token else " at the end"))
        self.at += 1
        return token

    def _level(self, n: int) -> Expr | Scalar:
        if n == len(_LEVELS):
            return self._unary()
        out = self._level(n + 1)
        while (o := _SIGNS.get(self._peek())) is not None and o.level == _LEVELS[n]:
            self.at += 1
            out = ex.binary(o.name, out, self._level(n + 1))
        return out

    def _unary(self) -> Expr | Scalar:
        if self._peek() in ("−", "¬"):
            sign, of = self._next(), self._unary()
            if sign == "−" and not isinstance(of, Expr):
                return -of
            return ex.unary("neg" if sign == "−" else "not", _term(of))
        return self._atom()

    def _atom(self) -> Expr | Scalar:
        token = self._next()
        if token == "(":
            out = self._level(0)
            self._next(")")
            return out
        if token[0].isdigit():
            return int(token) if token.isdigit() else float(token.replace("−", "-"))
        if token in ("true", "false"):
            return token == "true"
        if token in ("∞", "nan"):
            return math.inf if token == "∞" else math.nan
        if not (token[0].isalpha() or token[0] == "_"):
            raise CascadeError(f"{token!r} begins no term")
        if self._peek() == "(":
            return self._call(token, self._list(")"))
        return self._named(token)

    def _named(self, token: str) -> Expr:
        if self._peek() == "[":
            return ex.load(token, tuple(map(_term, self._list("]"))), self.dtype(token) or "f32")
        if self.dtype(token) is not None:
            return ex.load(token, (), self.dtype(token) or "f32")
        if token in self.ranks:
            return ex.index(token)
        size = self.ranks[token.lower()].size if token.lower() in self.ranks else None
        return ex.const(size) if isinstance(size, int) else ex.symbol(token)

    def _list(self, close: str) -> tuple[Expr | Scalar, ...]:
        self.at += 1
        out: list[Expr | Scalar] = []
        while self._peek() != close:
            out.append(self._level(0))
            if self._peek() != close:
                self._next(",")
        self.at += 1
        return tuple(out)

    def _call(self, name: str, args: tuple[Expr | Scalar, ...]) -> Expr:
        if name in ex.DTYPES and len(args) == 1:
            return ex.cast(_term(args[0]), name)
        if name == "where" and len(args) == 3:
            return ex.where(_term(args[0]), args[1], args[2])
        if name not in OPERATORS or OPERATORS[name].arity != len(args):
            raise CascadeError(f"no operator {name} takes {len(args)} terms")
        return ex.unary(name, _term(args[0])) if len(args) == 1 else ex.binary(name, args[0], args[1])


def _term(x: Expr | Scalar) -> Expr:
    return x if isinstance(x, Expr) else ex.const(x)


def _split(text: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth, word = list[str](), 0, ""
    for ch in text + ",":
        if ch == "," and not depth:
            parts.append(word.strip())
            word = ""
            continue
        depth += (ch in "([") - (ch in ")]")
        word += ch
    return [p for p in parts if p]
