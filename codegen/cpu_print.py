"""Prints a CPU kernel's file: the functions that differ from one attention to the next, the loops they go into, and
`attention`, which takes the cascade's inputs under their names.
"""  # fmt: skip

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from ..patterns import expr as ex
from ..patterns.cascade import Einsum, show
from ..patterns.expr import Expr
from ..patterns.mapping import Mapping as Tiling
from .cpu_form import Form
from .operands import Names, joined, operand
from .print_torch import TYPES, Body, Scope, identifier
from .program import bindings, loose

LICENCE = "This file may be used, changed and licensed freely by whoever had it printed; it needs nothing but torch."
# Names that the printed text uses for itself.
RESERVED = (
    "q", "k", "v", "z", "z0", "z1", "out", "rows", "plan", "near", "some", "every", "alive", "added", "finish", "score",
    "full", "step", "bias", "kept", "part", "keys", "queries", "o", "lse", "p0", "p1", "m0", "m1", "TILE_P", "TILE_M",
    "pn", "mn", "row", "SCALE", "Tensor", "sdpa", "stream", "attention", "inf", "nan",
)  # fmt: skip


@cache
def _parts(module: ModuleType) -> Mapping[str, tuple[str, frozenset[str]]]:
    """Top-level definitions of a skeleton: name → (text, names that it uses)."""
    text = inspect.getsource(module)
    lines = text.splitlines()
    out: dict[str, tuple[str, frozenset[str]]] = {}
    before = 0
    for node in ast.parse(text).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        start = first - 1
        while start > before and lines[start - 1].startswith("#"):
            start -= 1
        before = node.end_lineno or first
        name = node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        if name:
            used = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            out[name] = "\n".join(lines[start:before]), used
    return out


def skeleton(module: ModuleType, wanted: Iterable[str]) -> list[str]:
    """The text of the named definitions and of all that they use, in the skeleton's order."""
    parts = _parts(module)
    taken: set[str] = set()
    todo = [w for w in wanted if w in parts]
    while todo:
        name = todo.pop()
        if name not in taken:
            taken.add(name)
            todo.extend(u for u in parts[name][1] if u in parts)
    return [text.replace("  # fmt: skip", "") for name, (text, _) in parts.items() if name in taken]


def used_names(text: str) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name))


@dataclass(frozen=True)
class Function:
    """A printed function: its parameters by name, and its text."""

    name: str
    params: tuple[str, ...]
    text: str

    def call(self, given: Mapping[str, str]) -> str:
        return f"{self.name}({', '.join(given.get(p, p) for p in self.params)})"


class Printer:
    """Names of one kernel's tensors, sizes and coordinates, and functions printed from terms over them."""

    def __init__(self, f: Form) -> None:
        self.f = f
        c = f.cascade
        taken = set(RESERVED)

        def take(stem: str) -> str:
            name = identifier(stem, taken)
            taken.add(name)
            return name

        tensors = {t.name: take(t.name) for t in c.inputs}
        tensors |= {e.out.tensor: take(e.out.tensor) for e in f.attention.prelude}
        ranks = {r.name: take(r.name) for r in c.ranks}
        symbols = {s: take(s) for s in c.free_symbols}
        self.ranks, self.taken = ranks, taken
        self.names = Names(c, tensors, symbols)
        self.loose = loose(c)
        self.order = (*f.heads.lead, f.heads.head, f.attention.query, f.attention.key)

    def coordinate(self, rank: str) -> str:
        """A rank's coordinates along their dimension of [batch, head, query, key]; several batch ranks share the first."""
        f, n = self.f, self.names
        if rank not in f.heads.lead:
            place = {f.heads.head: 2, f.attention.query: 1, f.attention.key: 0, f.attention.value: 0}
            return f"axis({n.rank(rank)}, {place[rank]})"
        if len(f.heads.lead) == 1:
            return f"axis({n.rank(rank)}, 3)"
        inner = f.heads.lead[f.heads.lead.index(rank) + 1 :]
        text = f"axis({self.batch}, 3)"
        if inner:
            text += f" // ({' * '.join(f'({n.rank(r)})' for r in inner)})"
        return f"{text} % ({n.rank(rank)})"

    @property
    def batch(self) -> str:
        """How many elements the batch dimension has."""
        sizes = [self.names.rank(r) for r in self.f.heads.lead]
        return sizes[0] if len(sizes) == 1 else " * ".join(f"({s})" for s in sizes) or "1"

    def scope(self, names: Mapping[Expr, str], tensors: Mapping[str, str] | None = None, views: bool = True) -> Scope:
        leaves = {ex.index(r): t for r, t in self.ranks.items()}
        views = views and len(self.f.heads.lead) < 2
        scope = self.names.scope({**leaves, **names}, self.f.real, views)
        return scope if tensors is None else Scope(
            scope.names, {**scope.tensors, **tensors}, scope.shapes, scope.extent, scope.real, scope.views
        )  # fmt: skip

    def function(
        self, name: str, doc: str, results: Sequence[tuple[str, Expr]], first: Sequence[str] = (),
        scope: Scope | None = None, named: Mapping[Expr, str] | None = None,
    ) -> Function:  # fmt: skip
        """Print a function that answers the terms; `first` are its first parameters, the rest is what it uses."""
        scope = scope or self.scope(named or {})
        body = Body(scope, [e for _, e in results])
        texts = [body.real(e) if e.is_float else body.term(e) for _, e in results]
        lines = [*body.lines, f"    return {', '.join(texts)}"]
        code = "\n".join(lines)
        own = used_names(textwrap.dedent(code))
        known = list(dict.fromkeys([*scope.names.values(), *scope.tensors.values()]))
        params = (*first, *(n for n in known if n in own and n not in first))
        text = f'def {name}({", ".join(params)}):\n    """{doc}"""\n{code}'
        return Function(name, params, text)


def operands(p: Printer, rank: str, e: Expr, over: Sequence[str]) -> tuple[str, int]:
    """Text of an operand as [batch, head, row, column], and how many heads share one of its heads (0: all)."""
    f = p.f
    order = [*f.heads.lead, *([f.heads.head] if f.heads.head else []), rank, *over]
    text, share, _ = operand(e, order, f.heads, p.names, f.real)
    if len(over) > 1:
        text += f".flatten(-{len(over)})"
    if not f.heads.head:
        return f"{text}[None, None]", 0
    return joined(text, f.heads.lead, e.ranks, p.names), share


def einsum(p: Printer, e: Einsum) -> str:
    """A contraction that is computed beforehand, whole, over all its coordinates."""
    order = [*(str(i.attr) for i in e.out.index), *e.over]
    at = {ex.index(r): f"axis({p.names.rank(r)}, {len(order) - 1 - d})" for d, r in enumerate(order)}
    text = Body(p.names.scope(at, p.f.real), []).real(e.body)
    if e.op is None:
        return f"({text}).expand({', '.join(p.names.rank(r) for r in order)})"
    dims = tuple(range(len(order) - len(e.over), len(order)))
    shape = ", ".join(p.names.rank(r) for r in order)
    pick = {"add": "sum", "max": "amax", "min": "amin"}.get(e.op)
    if pick is None or len(order) == 0:
        raise NotImplementedError(e.op)
    return f"({text}).expand({shape}).{pick}({dims})"


def header(f: Form, decision: Sequence[str], version: str) -> str:
    """The file's docstring: what it computes, in the papers' notation, and how that was decided."""
    lines = [f"Attention on the CPU, printed by reattend {version}.", "", LICENCE, "", *show(f.cascade).splitlines(), ""]
    body = "\n".join([*lines, *decision])
    return f'"""{body}\n"""'


def sizes(p: Printer) -> list[str]:
    """Lines that read sizes off the inputs."""
    names = p.names
    return [f"{names.symbols[s]} = {names.tensors[t]}.shape[{d}]" for s, t, d in bindings(p.f.cascade)]


def signature(p: Printer) -> str:
    tensors = [p.names.tensors[t.name] for t in p.f.cascade.inputs]
    extra = [p.names.symbols[s] for s in p.loose]
    return ", ".join([*tensors, *(["*", *extra] if extra else [])])


def coordinates(p: Printer, text: str) -> list[str]:
    """Lines that make the coordinates that a text uses: sliced along batch, query and key, else whole."""
    a, at = p.f.attention, p.f.heads
    sliced = [r for r in (*at.lead, a.query, a.key) if re.search(rf"\b{p.ranks[r]}\[", text)]
    used = used_names(text)
    plain = [r for r in (at.head, a.value) if r and p.ranks[r] in used]
    return [f"{p.ranks[r]} = {p.coordinate(r)}" for r in (*sliced, *plain)]


def allocation(p: Printer) -> list[str]:
    """Lines that make `out`, the output as declared, and `rows`, the same memory as [batch, head, query, value]."""
    c, f = p.f.cascade, p.f
    (e,) = c.producers[c.outputs[0]]
    declared = [str(i.attr) for i in e.out.index]
    at = f.heads
    memory = [*at.lead, f.attention.query, *([at.head] if at.head else []), f.attention.value]
    device = p.names.tensors[c.inputs[0].name]
    dtype = TYPES[c.tensor[c.outputs[0]].dtype]
    lines = [f"out = torch.empty({', '.join(p.names.rank(r) for r in memory)}, dtype={dtype}, device={device}.device)"]
    rows = "out"
    if len(at.lead) > 1:
        rows += f".flatten(0, {len(at.lead) - 1})"
    elif not at.lead:
        rows += ".unsqueeze(0)"
    lines.append(f"rows = {rows}{'.transpose(1, 2)' if at.head else '.unsqueeze(1)'}")
    if declared != memory:
        lines.append(f"out = out.permute({', '.join(str(memory.index(r)) for r in declared)})")
    return lines


def tiling(m: Tiling) -> str:
    return f"TILE_P, TILE_M = {m.tile_p}, {m.tile_m}"
