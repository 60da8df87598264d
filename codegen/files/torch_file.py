"""Prints a file of torch code: the functions that differ from one attention to the next, the skeleton's definitions that
they use, and the entry, which takes the cascade's inputs under their names.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

from ...cost_model.time import cpu_tiles
from ...patterns import expr as ex
from ...patterns.cascade import show
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ..forms.form import Form
from ..forms.operands import Names, element_type, joined, operand
from ..forms.program import bindings, loose
from ..text.print_torch import TYPES, TorchBody, TorchScope, identifier
from .beforehand import einsum

_SEES_ALL = "# Calls with fewer scores a head see every key: to find out which to skip would cost more."
CONSTANTS = {
    "FEW": f"{_SEES_ALL}\nFEW = {cpu_tiles.FEW}",
    "LOG2E": "LOG2E = 1.4426950408889634",
}
LICENCE = "This file may be used, changed and licensed freely by whoever had it printed; it needs nothing but torch."
# Names that the printed text uses for itself.
RESERVED = (
    "q", "k", "v", "z", "z0", "z1", "out", "rows", "plan", "near", "some", "every", "alive", "added", "finish",
    "score", "full", "step", "bias", "kept", "part", "keys", "queries", "o", "lse", "p0", "p1", "m0", "m1", "TILE_P",
    "TILE_M", "FEW", "LOG2E", "y0", "y1", "pn", "mn", "i", "j", "acc", "x", "at", "state", "scores", "row", "SCALE",
    "Tensor", "sdpa", "stream", "attention", "inf", "nan",
)


@cache
def parts(module: ModuleType) -> Mapping[str, tuple[str, frozenset[str]]]:
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
        used = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        written = "\n".join(lines[start:before])
        for name in _defined(node):
            # a printed file imports nothing of ours: a number of the cost model is printed as it is written there
            out[name] = (written.replace(f"cpu_tiles.{name}", _numbers().get(name, "")), used)
    return out


@cache
def _numbers() -> Mapping[str, str]:
    """The cost model's numbers of the CPU's tiles, as they are written."""
    nodes = ast.parse(inspect.getsource(cpu_tiles)).body
    return {name: ast.unparse(n.value) for n in nodes if isinstance(n, ast.Assign) for name in _defined(n)}


def _defined(node: ast.stmt) -> list[str]:
    """The names that a top-level statement gives a value."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def skeleton(modules: Sequence[ModuleType], wanted: Iterable[str]) -> list[str]:
    """The text of the named definitions and of all that they use, in the skeletons' order."""
    known = {name: part for m in modules for name, part in parts(m).items()}
    taken: set[str] = set()
    todo = [w for w in wanted if w in known]
    while todo:
        name = todo.pop()
        if name not in taken:
            taken.add(name)
            todo.extend(u for u in known[name][1] if u in known)
    return list(dict.fromkeys(text for name, (text, _) in known.items() if name in taken))


def used_names(text: str) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name))


@dataclass(frozen=True)
class PrintedFunction:
    """A printed function: its parameters by name, and its text."""

    name: str
    params: tuple[str, ...]
    text: str

    def call(self, given: Mapping[str, str]) -> str:
        return f"{self.name}({', '.join(given.get(p, p) for p in self.params)})"


class Printer:
    """Names of one kernel's tensors, sizes and coordinates, and functions printed from terms over them."""

    def __init__(self, f: Form, cached: bool = True, reserved: Iterable[str] = ()) -> None:
        self.f = f
        c = f.cascade
        taken = {*RESERVED, *reserved}

        def take(stem: str) -> str:
            name = identifier(stem, taken)
            taken.add(name)
            return name

        tensors = {t.name: take(t.name) for t in c.inputs}
        tensors |= {e.out.tensor: take(e.out.tensor) for e in f.attention.prelude}
        ranks = {r.name: take(r.name) for r in c.ranks}
        symbols = {s: take(s) for s in c.free_symbols}
        self.ranks, self.taken = ranks, taken
        self.names = Names(c, tensors, symbols, "" if cached else f"{tensors[c.inputs[0].name]}.device")
        self.loose = loose(c)
        self.order = (*f.heads.order, f.attention.query, f.attention.key)

    def coordinate(self, rank: str) -> str:
        """A rank's coordinates along their dimension of [batch, head, query, key]; several batch ranks share the first."""
        f, n = self.f, self.names
        if rank not in f.heads.lead:
            place = {f.heads.head: 2, f.attention.query: 1, f.attention.key: 0, f.attention.value: 0}
            return n.axis(n.rank(rank), place[rank])
        if len(f.heads.lead) == 1:
            return n.axis(n.rank(rank), 3)
        inner = f.heads.lead[f.heads.lead.index(rank) + 1 :]
        text = n.axis(self.batch, 3)
        if inner:
            text += f" // ({' * '.join(f'({n.rank(r)})' for r in inner)})"
        return f"{text} % ({n.rank(rank)})"

    @property
    def batch(self) -> str:
        """How many elements the batch dimension has."""
        sizes = [self.names.rank(r) for r in self.f.heads.lead]
        return sizes[0] if len(sizes) == 1 else " * ".join(f"({s})" for s in sizes) or "1"

    def scope(
        self, names: Mapping[Expr, str], tensors: Mapping[str, str] | None = None, views: bool = True, reuse: bool = False
    ) -> TorchScope:
        leaves = {ex.index(r): t for r, t in self.ranks.items()}
        views = views and len(self.f.heads.lead) < 2
        scope = self.names.scope({**leaves, **names}, self.f.real, views)
        return replace(scope, tensors={**scope.tensors, **(tensors or {})}, reuse=reuse)

    def function(
        self, name: str, doc: str, results: Sequence[Expr], first: Sequence[str] = (),
        named: Mapping[Expr, str] | None = None, reuse: bool = False,
    ) -> PrintedFunction:
        """Print a function that answers the terms; `first` are its first parameters, the rest is what it uses."""
        body = TorchBody(self.scope(named or {}, reuse=reuse), results)
        texts = [body.real(e) if e.is_float else body.term(e) for e in results]
        return self.define(name, doc, [*body.lines, f"    return {', '.join(texts)}"], first, body.scope)

    def define(self, name: str, doc: str, lines: Sequence[str], first: Sequence[str], scope: TorchScope) -> PrintedFunction:
        """A function of printed lines; its parameters are `first` and the names of the scope that the lines use."""
        code = "\n".join(lines)
        own = used_names(textwrap.dedent(code))
        known = list(dict.fromkeys([*scope.names.values(), *scope.tensors.values()]))
        params = (*first, *(n for n in known if n in own and n not in first))
        text = f'def {name}({", ".join(params)}):\n    """{doc}"""\n{code}'
        return PrintedFunction(name, params, text)


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


def query_operand(p: Printer, e: Expr, over: Sequence[str]) -> str:
    """Text of the queries as [batch, head, row, column], an element for every head: their number is taken from here."""
    text, share = operands(p, p.f.attention.query, e, over)
    return spread(p, text, share) if p.f.heads.head else text


def spread(p: Printer, text: str, share: int) -> str:
    """An operand of which `share` heads share one (0: all) with an element for every head."""
    if share == 0:
        return f"{text}.expand(-1, {p.names.rank(p.f.heads.head)}, -1, -1)"
    return text if share == 1 else f"{text}.repeat_interleave({share}, 1)"


def common(kinds: Sequence[str]) -> str:
    """The type that torch computes in with operands of these types."""
    out = kinds[0]
    for x in kinds[1:]:
        out = ex.promote(out, x)
    return out


def operand_type(terms: Sequence[Expr], real: str) -> str:
    """The type in which torch's kernels get operands: their common one, and no wider than anything is computed in.

    What is read in float64 and cast at once is cast: beside operands in float64 torch's CPU kernel takes what the scores get
    added for float64, whatever it is.
    """
    kinds = [element_type(t, real) for t in terms]
    return real if "f64" in kinds else common(kinds)


def common_type(p: Printer, terms: Sequence[Expr], texts: Sequence[str]) -> str:
    """The operands in that type."""
    kinds, wanted = [element_type(t, p.f.real) for t in terms], operand_type(terms, p.f.real)
    return ", ".join(t if x == wanted else f"{t}.to({TYPES[wanted]})" for t, x in zip(texts, kinds))


def shared_alike(p: Printer, k: tuple[str, int], v: tuple[str, int]) -> tuple[str, str]:
    """Keys and values, brought to one element a head where the heads share them differently."""
    if k[1] == v[1]:
        return k[0], v[0]
    return spread(p, *k), spread(p, *v)


def near_names(near: Sequence[Expr]) -> list[tuple[str, str]]:
    """For each part that varies with key minus query alone: what its tile is called, and its function."""
    if len(near) == 1:
        return [("near", "relative")]
    return [(f"near_{i}", f"relative_{i}") for i in range(len(near))]


def relatives(p: Printer, near: Sequence[Expr]) -> list[PrintedFunction]:
    a = p.f.attention
    doc = f"What varies with {p.ranks[a.key]} - {p.ranks[a.query]} alone."
    return [p.function(made, doc, [part]) for part, (_, made) in zip(near, near_names(near))]


def make_near(p: Printer, made: Sequence[tuple[str, PrintedFunction]], batch: Mapping[str, str]) -> list[str]:
    """Lines that compute those parts once for a plan."""
    a = p.f.attention
    query, key = p.ranks[a.query], p.ranks[a.key]
    lines = []
    for name, f in made:
        make = f.name if f.params == (query, key) else f"lambda i, j: {f.call({**batch, query: 'i', key: 'j'})}"
        lines.append(f"{name} = Near(plan, {make})")
    return lines


MODULES = (
    "ctypes", "hashlib", "math", "os", "platform", "shlex", "shutil", "signal", "subprocess", "sys", "tempfile",
    "threading", "warnings",
)
NAMES = {
    "collections.abc": ("Callable", "Iterator", "Sequence"), "functools": ("cache", "lru_cache"), "pathlib": ("Path",),
    "typing": ("Any", "NamedTuple"),
}


def imports(code: str) -> str:
    """The import lines that a text needs."""
    used = used_names(code)
    lines = ["from __future__ import annotations", ""]
    lines += [f"import {n}" for n in MODULES if n in used]
    for module, names in NAMES.items():
        if found := [n for n in names if n in used]:
            lines.append(f"from {module} import {', '.join(found)}")
    if lines[-1]:
        lines.append("")
    lines.append("import torch")
    if "Tensor" in used:
        lines.append("from torch import Tensor")
    if used & {"inf", "nan"}:
        lines += ["", 'inf, nan = float("inf"), float("nan")']
    return "\n".join(lines)


def file(
    p: Printer, m: TileMapping, printed: Sequence[str], modules: Sequence[ModuleType], constants: Sequence[str], body: str,
    version: str, walk: Sequence[str] = (),
) -> str:
    """The whole file: what it computes, what varies, the loops, and `attention`. `walk` says which keys a row sees."""
    text = "\n\n\n".join(printed)
    rule = p.f.rule if "planned" in text or "classes" in text else "never"
    loops = skeleton(modules, used_names(text))
    decision = [
        f"Tiles of {m.tile_p} queries and {m.tile_m} keys; {body}.",
        {"always": "Tiles without a kept key are skipped.", "never": "Every query sees every key.",
         "guarded": "Tiles without a kept key are skipped where all rows of a tile keep some key.",
         "bounded": "Tiles without a kept key are skipped where scores are small enough for the fill to drown them."}[rule],
    ]
    numbers = [f"TILE_P, TILE_M = {m.tile_p}, {m.tile_m}", *constants]
    numbers += [line for name, line in CONSTANTS.items() if name in used_names(text)]
    head = header(p.f, walk or decision, version)
    out = [head, imports("\n".join([*numbers, text, *loops])), "\n".join(numbers), *loops, text]
    return "\n\n\n".join(out) + "\n"


def header(f: Form, decision: Sequence[str], version: str) -> str:
    """The file's docstring: what it computes, in the papers' notation, and how that was decided."""
    lines = [f"Attention on the CPU, printed by reattend {version}.", "", LICENCE, "", *show(f.cascade).splitlines(), ""]
    body = "\n".join([*lines, *decision])
    return f'"""{body}\n"""'


def indented(lines: Iterable[str]) -> list[str]:
    return [f"    {x}" if x else "" for x in lines]


def entry(
    p: Printer, lines: Sequence[str], setup: Sequence[str] = (), checks: Sequence[str] = (), answer: str = "out",
    without: str = "",
) -> str:
    """The text of `attention`: sizes, what is computed beforehand, coordinates, the output's memory, then `lines`."""
    before = [*sizes(p), *checks, *prelude(p, without), *setup, *coordinates(p, "\n".join(lines)), *allocation(p)]
    body = [*before, *lines, f"return {answer}"]
    head = f'def attention({signature(p)}):\n    """The output {p.f.cascade.outputs[0]}."""\n'
    return head + "\n".join(indented(body))


def prelude(p: Printer, without: str = "") -> list[str]:
    """Lines that compute what is read as an ordinary tensor beforehand, but for one."""
    names, wanted = p.names, [e for e in p.f.attention.prelude if e.out.tensor != without]
    return [f"{names.tensors[e.out.tensor]} = {einsum(names, p.f.real, e)}" for e in wanted]


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
    used = used_names(text)
    return [f"{p.ranks[r]} = {p.coordinate(r)}" for r in (*at.order, a.query, a.key, a.value) if p.ranks[r] in used]


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
