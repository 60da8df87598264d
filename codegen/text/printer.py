"""What the printers of all languages share: one walk over a term, names for what is used twice, spellings of operators.

    term  →  arguments first  →  leaf, choice, cast: the language's own rules
                              →  operator: its spelling, around the texts of its operands
A language is a dictionary `name → spelling` and the rules for what a spelling cannot say: types, loads, choices.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from ...patterns.expr import Expr

# How tightly a name, a literal or a call binds: no operator of any language does more.
ATOM = 10


class PrintError(ValueError):
    """A term that has no form in a language here; the text is a reason for the user."""


class Text(NamedTuple):
    """A term's text, how tightly it binds, and its type in languages whose variables have one."""

    code: str
    level: int
    kind: str = ""

    def within(self, least: int) -> str:
        """The text where at least this level is asked for."""
        return self.code if self.level >= least else f"({self.code})"


@dataclass(frozen=True)
class Spelling:
    """How a language writes an operator: `{}` for each operand, the level of the whole, the least of each operand.

    `helper`: a function that the emitted file has to hold; `plain`: the spelling on numbers that are no floats of the
    kernel (integers in Triton and C++, sizes in torch, where they are Python's).
    """

    text: str
    level: int = ATOM
    within: tuple[int, ...] = (0, 0)
    helper: str = ""
    plain: Spelling | None = None

    def of(self, operands: Iterable[Text], kind: str = "") -> Text:
        texts = (x.within(least) for x, least in zip(operands, self.within))
        return Text(self.text.format(*texts, kind=kind), self.level, kind)


def call(name: str, operands: int = 1, plain: Spelling | None = None) -> Spelling:
    return Spelling(f"{name}({', '.join(['{}'] * operands)})", plain=plain)


def infix(sign: str, level: int) -> Spelling:
    """A sign between two operands; equal ones group to the left."""
    return Spelling(f"{{}} {sign} {{}}", level, (level, level + 1))


def _compared(sign: str) -> Spelling:
    # Python chains comparisons, so an argument that is one always gets its parentheses.
    return replace(infix(sign, 1), within=(2, 2))


# Python's signs, which Triton has as well; a prefix binds at UNARY.
UNARY = 7
PYTHON: Mapping[str, Spelling] = {
    "eq": _compared("=="),
    "ne": _compared("!="),
    "lt": _compared("<"),
    "le": _compared("<="),
    "gt": _compared(">"),
    "ge": _compared(">="),
    "or": infix("|", 2),
    "xor": infix("^", 3),
    "and": infix("&", 4),
    "add": infix("+", 5),
    "sub": infix("-", 5),
    "mul": infix("*", 6),
    "div": infix("/", 6),
    "floordiv": infix("//", 6),
    "mod": infix("%", 6),
    "neg": Spelling("-{}", UNARY, (UNARY,)),
    "not": Spelling("~{}", UNARY, (UNARY,)),
}


def word(text: str) -> str:
    """A name made of what a name may hold."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "x"


def distinct(name: str, taken: Container[str]) -> str:
    """The name, or with a number where it is taken."""
    out, n = name, 1
    while out in taken:
        out, n = f"{name}_{n}", n + 1
    return out


class Writer(ABC):
    """The lines of one function. `term` answers text for a term, after writing what it shares with others."""

    spellings: ClassVar[Mapping[str, Spelling]]

    def __init__(self, names: Mapping[Expr, str], roots: Iterable[Expr], taken: set[str], indent: str = "") -> None:
        self.taken, self.indent = taken, indent
        self.lines: list[str] = []
        self.helpers: set[str] = set()
        self.memo: dict[Expr, Text] = {e: Text(t, ATOM, self.kind(e)) for e, t in names.items()}
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

    # names

    def line(self, text: str) -> None:
        self.lines.append(f"{self.indent}{text}" if text else "")

    def fresh(self, stem: str) -> str:
        name = self.identifier(stem)
        self.taken.add(name)
        return name

    def bind(self, e: Expr, name: str) -> None:
        self.memo[e] = Text(name, ATOM, self.kind(e))
        self.taken.add(name)

    def let(self, stem: str, e: Expr) -> str:
        """Give a term a name of its own, unless it has one, and answer it."""
        self.uses[e] = 1
        text = self._real(e, stem) if e.is_float else self._put(e, stem)
        if not text.code.isidentifier():
            text = self.memo[e] = self._keep(stem, e, text)
        return text.code

    def _keep(self, stem: str, e: Expr, text: Text) -> Text:
        name = self.fresh(stem)
        self.line(self.declared(name, text, e))
        return Text(name, ATOM, self.kind(e))

    # the walk

    def term(self, root: Expr) -> str:
        return self._put(root).code

    def real(self, root: Expr) -> str:
        """The term in the type that floats are computed in."""
        return self._real(root).code

    def _put(self, root: Expr, stem: str = "t") -> Text:
        for e in self._unwritten(root):
            self.memo[e] = self._settled(e, self._step(e), stem if e is root else "t")
        return self._leaf(root)

    def _unwritten(self, root: Expr) -> Iterator[Expr]:
        """Sub-terms without text yet, arguments first, without recursion; what is named or lies elsewhere is not entered."""
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if e in self.memo or e.op == "const":
                continue
            if ready:
                yield e
            elif (text := self.elsewhere(e)) is not None:
                self.memo[e] = text
            else:
                stack.append((e, True))
                stack.extend((a, False) for a in reversed(self.below(e)))

    def _settled(self, e: Expr, text: Text, stem: str) -> Text:
        """The text, or the name that it gets because others read it as well."""
        if text.code.isidentifier() or not self.shares(e, text):
            return text
        return self._keep(self.load_stem(e) if e.op == "load" else stem, e, text)

    def _leaf(self, e: Expr) -> Text:
        return self.memo[e] if e in self.memo else self.constant(e)

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
        return self._operator(e)

    def _spelled(self, spelling: Spelling, operands: Iterable[Text], kind: str = "") -> Text:
        if spelling.helper:
            self.helpers.add(spelling.helper)
        return spelling.of(operands, kind)

    # what a language may change

    def kind(self, e: Expr) -> str:
        """The type of the variable that holds a term."""
        return ""

    def declared(self, name: str, text: Text, e: Expr) -> str:
        """A line that gives a text a name."""
        return f"{name} = {text.code}"

    def shares(self, e: Expr, text: Text) -> bool:
        """Does the term get a name?"""
        return self.uses.get(e, 1) > 1

    def below(self, e: Expr) -> tuple[Expr, ...]:
        """What is written before the term."""
        return e.args

    def elsewhere(self, e: Expr) -> Text | None:
        """The text of a term that is computed somewhere else."""
        return None

    # what a language says

    @abstractmethod
    def identifier(self, stem: str) -> str:
        """A name close to `stem` that is not taken."""

    @abstractmethod
    def load_stem(self, e: Expr) -> str:
        """What the name of a load begins with."""

    @abstractmethod
    def constant(self, e: Expr) -> Text:
        """A literal."""

    @abstractmethod
    def _real(self, e: Expr, stem: str = "t") -> Text:
        """A term as a float."""

    @abstractmethod
    def _load(self, e: Expr) -> Text: ...

    @abstractmethod
    def _cast(self, e: Expr) -> Text: ...

    @abstractmethod
    def _where(self, e: Expr) -> Text: ...

    @abstractmethod
    def _operator(self, e: Expr) -> Text:
        """An operator of the table, around its operands."""
