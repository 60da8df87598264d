"""The names of one printed C++ program, and what lies around its loops: the row's fields, and the function around a loop.

    LoopProgram   tensors, sizes, coordinates, products and carried scalars as the text calls them
    Fields        what belongs to a row alone: coordinates, biases, bounds that no key changes, pointers to the row's data
    Around        what does not vary in a loop over keys or values
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ....patterns import expr as ex
from ....patterns.cascade import size_term
from ....patterns.expr import Expr
from ...forms.form import Form
from ...forms.terms import Terms, mapped_elements
from ...text.print_cpp import CALLED, STORED, At, CppBody, CppOperand, CppScope, identifier, kind
from ...text.printer import PrintError
from .terms import Diagonal, Tile, costly, reciprocals, tiles

# Names that the printed text and the loop around it use.
RESERVED = frozenset([
    "x", "w", "n", "m0", "i", "state", "acc", "out", "row", "at_z", "at_h", "at_p", "tensors", "sizes", "Row",
    "Program", "T", "OUT", "E", "F", "TILE_P", "TILE_M", "PRODUCTS", "CARRIED", "PARTIAL", "least", "top", "start",
    "step", "finish", "load", "self", "bits", "std", "INF", "NAN", "INFINITY", "INLINE", "row_max", "row_sum", "abs_",
    "saved", "scalars", "grad", "kept", "summed", "ended", "to", "LEAVES", "KEPT", "SUMMED", "ENDS", "FOLD_Z", "FOLD_H",
    "dacc", "flow", "adjoint", "save", "SAVED", "SCALARS", "bf16", "f16", "int8_t", "int16_t",
    "int32_t", "int64_t", "uint8_t", *CALLED,
])
SCORE = "score of the tile"


class LoopProgram:
    """The text of the holes, and which tensors and sizes `load` reads, in order."""

    # what the names of its tables begin with
    mark = ""

    def __init__(self, f: Form, t: Terms, given: Iterable[str]) -> None:
        """`t`: the terms to print for the form; `given`: the tensors that exist when the kernel is called."""
        self.f, self.a, c = f, f.attention, f.cascade
        self.state = t.state
        self.key = self.a.key
        self.taken = set(RESERVED)
        take = self.take

        loads = (ex.load(e.out.tensor, e.out.index, c.tensor[e.out.tensor].dtype) for e in self.a.products)
        self.products = {x: i for i, x in enumerate(loads)}
        self.outer = {
            x: x * p.outside for x, p in zip(self.products, f.products) if not (p.outside.is_const and p.outside.value == 1)
        }
        written = tiles(t)
        self.diagonals = self._diagonals(written)
        self.tiles = tuple(self._outer(x) for x in written)
        self.ending = ex.substitute(t.state.finish, self.outer)
        if t.state.correction is not None:
            # the weights' largest is 1: their sum has a reciprocal
            self.ending = reciprocals(self.ending, self.a.value)
        self.saved = t.handed(lambda e: ex.substitute(e, self.outer))
        own = self._tensors(set(given))
        self.tensors = [*own, *(d.name for d in self.diagonals.values())]
        operands = {}
        for tensor in own:
            name, shape = take(tensor), c.tensor[tensor].shape
            strides = tuple(take(f"{name}_{d}") for d in range(len(shape)))
            operands[tensor] = CppOperand(name, strides, shape, stored(f, tensor))
        for d in self.diagonals.values():
            name = take(d.name)
            operands[d.name] = CppOperand(name, (take(f"{name}_0"), take(f"{name}_1")), d.shape, d.dtype)
        self.symbols = c.free_symbols
        symbols = {n: take(n) for n in self.symbols}
        self.ranks = {r.name: take(r.name) for r in c.ranks}
        self.carried = {x.name: take(x.name.lower()) for x in t.state.carried}
        self.old = {n: take(f"{v}_old") for n, v in self.carried.items()}
        self.inputs = [take(f"x{i}") for i in range(len(self.products))]
        names = {ex.symbol(n): t for n, t in symbols.items()}
        self.scope = CppScope(names, operands, {r.name: r.size for r in c.ranks})
        self.fields = Fields(self)
        self.reductions: set[str] = set()
        # tensor → the dimension along which its elements have to lie next to one another
        self.unit: dict[str, int] = {}

    def take(self, stem: str) -> str:
        """A name that nothing else has."""
        name = identifier(stem, self.taken)
        self.taken.add(name)
        return name

    def _outer(self, t: Tile) -> Tile:
        """What multiplies a product outside of its sum belongs to the score; what the host tabulates is read."""
        here, table = ex.load(SCORE, (ex.index(self.key),), t.score.dtype), self.table()
        state = mapped_elements(t.state, lambda e: ex.substitute(ex.substitute(e, {t.score: here}), table))
        return Tile(ex.substitute(t.score, table), state)

    def table(self) -> dict[Expr, Expr]:
        """What stands for terms as they are written: products with what multiplies them, reads of what is tabulated."""
        return self.outer | {part: d.load(self.a.query, self.key) for part, d in self.diagonals.items()}

    def _diagonals(self, written: Iterable[Tile]) -> dict[Expr, Diagonal]:
        """Costly terms over m − p alone, by which the host makes a table of each."""
        extent = {r.name: r.size for r in self.f.cascade.ranks}
        shape = (extent[self.a.query], extent[self.key])
        found: dict[Expr, Diagonal] = {}
        for t in written:
            for e in (t.score, t.state.weight, *(c.lift for c in t.state.carried)):
                for part in costly(e, self.a.query, self.key):
                    dtype = {"int32_t": "i32", "int64_t": "i64"}.get(kind(part, extent), "f32" if part.is_float else "b1")
                    found.setdefault(part, Diagonal(f"{self.mark}diagonal {len(found)}", part, shape, dtype))
        return found

    def terms(self) -> list[Expr]:
        out = [self.ending, *(self.saved or ())]
        for t in self.tiles:
            out += [t.score, t.state.weight, *(c.lift for c in t.state.carried), *t.state.corrections]
        return out

    def by_pairs(self, tensor: str) -> bool:
        """Has the tensor an element for each query and key?"""
        pair = {self.a.query, self.key}
        loads = (x for e in self.terms() for x in ex.loads(e) if str(x.attr) == tensor)
        return any(pair <= {str(i.attr) for i in x.args if i.op == "index"} for x in loads)

    def _tensors(self, given: set[str]) -> list[str]:
        found = {str(x.attr): None for e in self.terms() for x in ex.loads(e)}
        return [t for t in found if t in given]


def stored(f: Form, tensor: str) -> str:
    """The type that a tensor's elements have in memory; what is computed beforehand holds floats as float32."""
    dtype = f.cascade.tensor[tensor].dtype
    before = any(e.out.tensor == tensor for e in f.attention.prelude)
    if dtype not in STORED:
        raise PrintError(f"{tensor} is {dtype}; the kernel computes in float32")
    return "f32" if before and dtype in ex.FLOATS else dtype


def mentions(name: str, lines: Sequence[str]) -> bool:
    return any(re.search(rf"\b{name}\b", x) for x in lines)


class Fields:
    """What is computed once a row: printed into `row`, kept as fields of Row, read by name in the other functions."""

    def __init__(self, p: LoopProgram) -> None:
        self.p = p
        self.ranks = {*p.f.heads.order, p.a.query}
        names = dict(p.scope.names) | {ex.index(r): p.ranks[r] for r in self.ranks}
        self.body = CppBody(replace(p.scope, names=names), p.terms(), p.taken)
        self.known: dict[Expr, bool] = {}
        self.types: dict[str, str] = {}
        # name of a pointer → the tensor that it points into
        self.pointers: dict[str, str] = {}
        self.used: dict[int, set[str]] = {}

    def covers(self, e: Expr) -> bool:
        for t in ex.walk(e):
            if t not in self.known:
                own = t.op != "index" or str(t.attr) in self.ranks
                own = own and (t.op != "load" or str(t.attr) in self.p.scope.tensors)
                self.known[t] = own and all(self.known[a] for a in t.args)
        return self.known[e]

    def export(self, e: Expr, taken: set[str]) -> str:
        self.body.taken |= taken
        text = self.body.let("t", e)
        if text in self.p.scope.names.values():
            return text
        ctype = kind(e, self.p.scope.extent)
        if text in taken and text not in self.types:
            # a name inside of `row` is another's where this is read
            inner, text = text, self.body.fresh(text)
            self.body.lines.append(f"const {ctype} {text} = {inner};")
            self.body.bind(e, text)
        return self._field(text, ctype, taken)

    def pointer(self, tensor: str, at: At, taken: set[str]) -> str:
        self.body.taken |= taken
        t = self.p.scope.tensors[tensor]
        name = self._field(self.body.pointer(tensor, at), f"const {STORED[t.dtype]}*", taken)
        self.pointers[name] = tensor
        return name

    def unit(self, tensor: str, d: int) -> bool:
        return False

    def _field(self, name: str, ctype: str, taken: set[str]) -> str:
        self.types[name] = ctype
        taken.add(name)
        # … and in functions that are printed later
        self.p.taken.add(name)
        return name

    def unpacked(self, lines: Sequence[str]) -> list[str]:
        """Lines that give the fields which others use their names."""
        used = [n for n in self.types if mentions(n, lines)]
        return [f"{self.types[n] if self.types[n].endswith('*') else f'const {self.types[n]}'} {n} = row.{n};" for n in used]

    def text(self) -> list[str]:
        """`Row` and `row`."""
        p, at = self.p, self.p.f.heads
        fields = list(self.types)
        lines = list(self.body.lines)
        head = []
        places = [(r, self._lead(i)) for i, r in enumerate(at.lead)] + [(at.head, "at_h"), (p.a.query, "at_p")]
        for r, place in places:
            if r and (p.ranks[r] in fields or mentions(p.ranks[r], lines)):
                head.append(f"const {kind(ex.index(r), p.scope.extent)} {p.ranks[r]} = {place};")
        listed = ", ".join(fields)
        return [
            "// what belongs to a row",
            "struct Row {", *(f"  {t} {n};" for n, t in self.types.items()), "};", "",
            "Row row(int64_t at_z, int64_t at_h, int64_t at_p) const {", *(f"  {x}" for x in [*head, *lines]),
            f"  return {{{listed}}};", "}",
        ]

    def _lead(self, i: int) -> str:
        """The coordinate of a leading rank: they lie in one dimension, the last one fastest."""
        p, lead = self.p, self.p.f.heads.lead
        size = CppBody(p.scope, (), set())
        inner = [size.term(size_term(p.f.cascade.rank[r].size)) for r in lead[i + 1 :]]
        text = f"at_z / ({' * '.join(f'int64_t({s})' for s in inner)})" if inner else "at_z"
        if i:
            own = size.term(size_term(p.f.cascade.rank[lead[i]].size))
            text = f"{text} % ({own})"
        return text


class Around:
    """What lies around a loop over keys or values: the function that it stands in."""

    def __init__(self, p: LoopProgram, body: CppBody, rank: str) -> None:
        self.p, self.body, self.rank = p, body, rank

    def covers(self, e: Expr) -> bool:
        return self.rank not in e.ranks

    def export(self, e: Expr, taken: set[str]) -> str:
        return self.body.let("t", e)

    def pointer(self, tensor: str, at: At, taken: set[str]) -> str:
        return self.body.pointer(tensor, at)

    def unit(self, tensor: str, d: int) -> bool:
        """The host lays each tensor out along the first dimension that a loop runs along."""
        return self.p.unit.setdefault(tensor, d) == d
