"""Prints the CPU kernel in one pass: C++ around the printed program, compiled where it runs, and the Python that calls it.

    SOURCE         number types, constants, `struct LoopProgram`, the loop: one C++ text without dependencies
    classes        which tiles are empty, partial or full, from the mask's interval over a tile
    attention      lays the operands out as [Z, H, n, ·], allocates the output as models read it, calls the loop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from ...patterns import expr as ex
from ...patterns.expr import TRUE, Expr
from ...patterns.mapping import TileMapping
from ..files import cache, native
from ..files.tile_plan import classes
from ..files.torch_file import PrintedFunction, Printer, common, entry, file, operands, parts, query_operand, used_names
from ..forms.base2 import in_base2
from ..forms.form import Form, softmax
from ..forms.operands import element_type
from ..forms.terms import Terms, mapped_state
from ..skeletons import cpu, cpu_fused
from ..text.print_cpp import STORED
from ..text.print_torch import TYPES, TorchBody
from ..text.printer import PrintError
from .cpp import program as cpp_program
from .cpp.names import LoopProgram, stored
from .cpp.terms import Diagonal

BODY = "one pass in C++ around the score and the row's state"
FEW = "one read of keys and values in C++ around the score and the row's state"
# What the loop is made for: rows of its register blocks, columns of two vectors.
ROWS, COLUMNS = 16, 32
OPERANDS = ("f32", "bf16", "f16")
# Constants between this and its inverse have a reciprocal in float32, and products with one another.
SMALLEST = 1e-15
# More names that the printed Python uses for itself.
LOCALS = ("tiles", "drowned", "row", "column", "saved", *(f"{x}diagonal_{i}" for x in ("", "backward_") for i in range(16)))


def text(f: Form, m: TileMapping, version: str) -> str:
    """The kernel's file. Raises PrintError where the body does not fit the attention or the machine."""
    check_tiles(f, m)
    return FusedFile(f, m).text(version)


def check_tiles(f: Form, m: TileMapping) -> None:
    """Raises PrintError where a fused body does not fit the attention or the machine."""
    if m.tile_p % ROWS or m.tile_m % COLUMNS:
        raise PrintError(f"tiles of {m.tile_p} × {m.tile_m}: the fused body takes multiples of {ROWS} × {COLUMNS}")
    if any(t.dtype == "f64" for t in f.cascade.tensors):
        raise PrintError("an input or the output is float64; the fused body computes in float32")
    try:
        native.compiler()
    except native.CompilerError as no:
        raise PrintError(str(no)) from no


class FusedFile:
    """The parts of one kernel's file."""

    def __init__(self, f: Form, m: TileMapping, saved: tuple[Expr, ...] | None = None, reserved: Sequence[str] = ()) -> None:
        """`saved`: row scalars that are handed over; `reserved`: more names that the printed Python uses."""
        self.f, self.m = f, m
        self.loop = "fused_decode" if m.body == "decode" else "fused"
        self.p = Printer(f, reserved=[*parts(cpu_fused), *parts(native), *LOCALS, *reserved])
        a = f.attention
        given = [t.name for t in f.cascade.inputs] + [e.out.tensor for e in a.prelude]
        self.type = common([_kind(e) for x in f.products for e in (x.near, x.far)] + [_kind(f.values)])
        self.out = f.cascade.tensor[f.cascade.outputs[0]].dtype
        if self.type not in OPERANDS or self.out not in OPERANDS:
            kinds = ", ".join(OPERANDS)
            raise PrintError(f"operands are {self.type} and the output is {self.out}: the fused body has {kinds}")
        terms = Terms(a.score, f.mask, f.state, saved)
        if self.type != "f32":
            products = {str(e.out.tensor) for e in a.products}
            terms = in_base2(_multiplied(terms), a.key, frozenset(x for x in ex.loads(a.score) if str(x.attr) in products))
        self.program: LoopProgram = LoopProgram(f, terms, given)
        self.programs, self.given = [self.program], given

    def text(self, version: str) -> str:
        # what is printed first says how tensors have to lie
        constants = self.constants()
        printed = [*self.functions(), self.main()]
        body = FEW if self.m.body == "decode" else BODY
        return file(self.p, self.m, printed, (cache, native, cpu, cpu_fused), constants, body, version)

    def functions(self) -> list[str]:
        """What the entries call of what is printed."""
        tables = [self.table(d).text for x in self.programs for d in x.diagonals.values()]
        return [*tables, *([self.planned.text] if self.planned else [])]

    @cached_property
    def limit(self) -> tuple[float, str] | None:
        return self._limit()

    @cached_property
    def planned(self) -> PrintedFunction | None:
        return classes(self.p, self.m, self.limit is not None) if self.f.mask.keep is not TRUE else None

    def constants(self) -> list[str]:
        """The file's constants: the bound on scores, the C++."""
        limit = self.limit
        out = [f"# Scores below this leave masked weights at exactly 0.\nLIMIT = {limit[0]!r}"] if limit else []
        return [*out, f"SOURCE = r'''\n{native.source(self.holes(), self.loop).strip()}\n'''"]

    def holes(self) -> str:
        """What is printed of the C++: constants, types, `struct LoopProgram`."""
        program = self.program
        saved = [] if program.saved is None else [f"#define SAVED {len(program.saved)}"]
        return "\n".join([
            f"// ---- printed from {self.f.cascade.name}. What a row carries over the keys {self.f.attention.key}:", "//",
            *(f"//     {x}" for x in str(program.state).splitlines()), "", *saved,
            *self.types(f", CARRIED = {len(program.state.carried)}"), "", cpp_program.text(program),
        ])

    def types(self, more: str) -> list[str]:
        """Constants and types of the C++; `more` of the first."""
        f, m = self.f, self.m
        depths = [self._length(x.over) for x in f.products]
        return [
            f"constexpr int PRODUCTS = {len(depths)}, TILE_P = {m.tile_p}, TILE_M = {m.tile_m}{more};",
            f"constexpr int E[PRODUCTS] = {{{', '.join(map(str, depths))}}}, F = {self._length((f.attention.value,))};",
            f"using T = {STORED[self.type]};", f"using OUT = {STORED[self.out]};",
        ]

    def _length(self, ranks: Sequence[str]) -> int:
        out = 1
        for r in ranks:
            size = self.f.cascade.rank[r].size
            if not isinstance(size, int):
                raise PrintError(f"the head size {r} = {size} is no constant: the fused body is compiled for one")
            out *= size
        return out

    def _limit(self) -> tuple[float, str] | None:
        """Where a fill hides keys only beside small scores: the bound on them, and their scale."""
        if self.f.rule != "bounded":
            return None
        s = softmax(self.f)
        # a scale of a head or a query would belong to the operand
        if isinstance(s, str) or s.limit is None or s.product is not self.f.products[0]:
            return None
        return s.limit, TorchBody(self.p.scope({}), []).real(s.score.scale)

    def main(self) -> str:
        """The text of `attention`."""
        setup, _ = self.operands()
        lines, call = self.call(self.program)
        if self.program.saved is None:
            lines.append(f"run(SOURCE, {call[0]}, rows, {call[1]})")
            return entry(self.p, lines, setup, self.checks())
        shape = f"(*rows.shape[:3], {len(self.program.saved)})"
        lines.append(f'saved = torch.empty({shape}, dtype=torch.float32, device="cpu")')
        lines += [*self.ready(), f"run(SOURCE, {call[0]}, rows, {call[1]}, saved)"]
        return entry(self.p, lines, setup, self.checks(), "out, saved")

    def ready(self) -> list[str]:
        """What has to stand before a result is given whose gradient may be wanted."""
        return []

    def call(self, program: LoopProgram) -> tuple[list[str], tuple[str, str]]:
        """Lines before a loop is called, and what it takes: operands; sizes, tiles, tensors and sizes of its program."""
        f, a, p = self.f, self.f.attention, self.p
        n = p.names
        _, group = self.operands()
        queries, keys = n.rank(a.query), n.rank(a.key)
        heads = n.rank(f.heads.head) if f.heads.head else "1"
        shared = heads if group == 1 else f"{heads} // {group}" if group else "1"
        many = len(f.products)
        q, k = ([x] if many == 1 else [f"{x}_{i}" for i in range(many)] for x in "qk")
        tables = {_identifier(d.name): self.table(d) for d in program.diagonals.values()}
        tensors = [n.tensors.get(t, _identifier(t)) for t in program.tensors]
        sizes = [f"*{t}.stride()" for t in tensors] + [n.symbols[s] for s in program.symbols]
        lines = [f"{name} = {x.call({})}" for name, x in tables.items()]
        if self.planned is not None:
            lines.append(f"tiles = {self._classes(self.planned, self.limit, queries, keys)}")
        return lines, (
            f"[{', '.join(q)}], [{', '.join(k)}], v",
            f"({p.batch}, {heads}, {shared}, {queries}, {keys}), {'tiles' if self.planned else 'None'}, "
            f"[{', '.join(tensors)}], [{', '.join(sizes)}]",
        )

    def table(self, d: Diagonal) -> PrintedFunction:
        """The function that tabulates a term over m − p, once for its sizes."""
        p, a = self.p, self.f.attention
        queries, keys = (p.names.rank(r) for r in (a.query, a.key))
        body = TorchBody(p.scope({ex.index(a.query): "row", ex.index(a.key): "column"}, views=False), [d.part])
        value = body.real(d.part) if d.part.is_float else body.term(d.part)
        lines = [
            'row = torch.zeros(1, dtype=torch.int64, device="cpu")',
            f'column = torch.arange(1 - {queries}, {keys}, device="cpu")',
            *(x.strip() for x in body.lines),
            f"return ({value}).to({TYPES[d.dtype]}).as_strided(({queries}, {keys}), (1, 1))",
        ]
        used = used_names("\n".join(lines))
        params = tuple(x for x in p.names.symbols.values() if x in used)
        name, at = f"tabulated_{_identifier(d.name)}", f"[{queries} - 1 - {p.ranks[a.query]}, {p.ranks[a.key]}]"
        doc = f"{_shown(d.part)}: element {at} is that of {p.ranks[a.query]} and {p.ranks[a.key]}."
        head = f'@lru_cache(maxsize=64)\ndef {name}({", ".join(params)}):\n    """{doc}"""'
        return PrintedFunction(name, params, "\n".join([head, *(f"    {x}" for x in lines)]))

    def _classes(self, planned: PrintedFunction, limit: tuple[float, str] | None, queries: str, keys: str) -> str:
        given = {"drowned": f"reach(q, k, {limit[1]}) <= LIMIT"} if limit else {}
        call = planned.call(given)
        if planned.text.startswith("@"):
            return call
        # of few scores it costs more to find out which to skip
        every = f"all_partial(-(-({queries}) // TILE_P), -(-({keys}) // TILE_M))"
        return f"{every} if {queries} * {keys} <= FEW else {call}"

    def checks(self) -> list[str]:
        """Lines that refuse memory which is not laid out as the C++ reads it."""
        n = self.p.names
        out = []
        for t in self.f.cascade.inputs:
            shape = "".join(f"{n.size(s)}, " for s in t.shape)
            shape = shape.rstrip() if len(t.shape) == 1 else shape[:-2]
            out.append(f'expect("{t.name}", {n.tensors[t.name]}, {TYPES[t.dtype]}, ({shape}))')
        return out

    def operands(self) -> tuple[list[str], int]:
        """Lines that make the operands, and how many heads share the keys of one (0: all)."""
        f, p, a = self.f, self.p, self.f.attention
        values = operands(p, a.key, f.values, (a.value,))
        far = [operands(p, a.key, x.far, x.over) for x in f.products]
        shares = {share for _, share in (*far, values) if share}
        group = 0 if not shares else shares.pop() if len(shares) == 1 else 1
        lines = []
        for i, (x, k) in enumerate(zip(f.products, far)):
            suffix = "" if len(far) == 1 else f"_{i}"
            q = query_operand(p, x.near, x.over)
            lines.append(f"q{suffix} = dense({q}{self._as(x.near)})")
            lines.append(f"k{suffix} = dense({_spread(k, group)}{self._as(x.far)})")
        lines.append(f"v = dense({_spread(values, group)}{self._as(f.values)})")
        units = [f"{p.names.tensors[t]} = unit({p.names.tensors[t]}, {d})" for t, d in self.units().items()]
        return [*self._beforehand(), *units, *lines], group

    def units(self) -> dict[str, int]:
        """Tensors that are read along a dimension, by their names in the cascade."""
        out: dict[str, int] = {}
        for program in self.programs:
            tensors = {x.name: t for t, x in program.scope.tensors.items()}
            made = {d.name for d in program.diagonals.values()}
            out |= {tensors[name]: d for name, d in program.unit.items() if tensors[name] not in made}
        return out

    def _beforehand(self) -> list[str]:
        """What was computed beforehand, in the type in which the program reads it."""
        names = self.p.names.tensors
        read = {t for x in self.programs for t in x.tensors}
        made = [e.out.tensor for e in self.f.attention.prelude if e.out.tensor in read]
        return [f"{names[t]} = {names[t]}.to({TYPES[stored(self.f, t)]})" for t in made]

    def _as(self, e: Expr) -> str:
        return "" if element_type(e, self.f.real) == self.type else f".to({TYPES[self.type]})"


def _multiplied(t: Terms) -> Terms:
    """Quotients by a constant as products, and factors that follow one another as one.        x · 0.25 / 5 = x · 0.05"""

    def times(x: Expr, c: float) -> Expr:
        if x.op == "mul" and x.args[1].is_const:
            return x.args[0] * ex.const(float(x.args[1].value) * c, "f32")
        return x * ex.const(c, "f32")

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.dtype != "f32" or e.op not in ("mul", "div") or not args[1].is_const or args[0].dtype != "f32":
            return None
        c = abs(float(args[1].value))
        if not SMALLEST < c < 1 / SMALLEST:
            return None
        return times(args[0], float(args[1].value) if e.op == "mul" else 1.0 / float(args[1].value))

    def rewritten(e: Expr) -> Expr:
        return ex.rebuild(e, rule)

    mask = replace(t.mask, keep=rewritten(t.mask.keep), full=rewritten(t.mask.full))
    return Terms(rewritten(t.score), mask, mapped_state(t.state, rewritten), t.handed(rewritten))


def _identifier(name: str) -> str:
    return name.replace(" ", "_")


def _shown(e: Expr) -> str:
    text = str(e)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _kind(e: Expr) -> str:
    """The type of floats that holds an operand's elements."""
    return element_type(e, "f32") if e.is_float else "f32"


def _spread(k: tuple[str, int], group: int) -> str:
    """Keys or values, an element a head where others share them differently."""
    text, share = k
    return f"{text}.repeat_interleave({share}, 1)" if share > 1 and share != group else text
