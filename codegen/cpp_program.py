"""Prints `struct Program`: the holes of the fused CPU loop, from an attention's score, mask and row state.

    row       what belongs to a row alone: coordinates, biases and bounds that no key changes, pointers to the row's data
    step      one row of a tile: its score, the carried scalars in order, its weights; a loop over keys for each scalar that
              reads one before it
    finish    the end of a row, a loop over its values
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..patterns import expr as ex
from ..patterns.cascade import Size, size_term
from ..patterns.conditions import simplify_under
from ..patterns.expr import TRUE, Expr
from ..patterns.rowstate import OLD, Carried, RowState
from .base2 import Terms
from .cpu_form import Form
from .print_cpp import STORED, At, Body, Operand, Scope, identifier, kind, number
from .print_torch import PrintError
from .skip import mapped_state
from .tile_terms import relative

# Names that the printed text and the loop around it use.
RESERVED = frozenset([
    "x", "w", "n", "m0", "i", "state", "acc", "out", "row", "at_z", "at_h", "at_p", "tensors", "sizes", "Row",
    "Program", "T", "OUT", "E", "F", "TILE_P", "TILE_M", "PRODUCTS", "CARRIED", "PARTIAL", "least", "top", "start",
    "step", "finish", "load", "self", "bits", "std", "INF", "NAN", "INFINITY", "INLINE", "max_", "min_", "row_max",
    "row_sum", "floor_div", "floor_mod", "exp_", "exp2_", "log_", "log1p_", "log2_", "tanh_", "sigmoid_", "softplus_",
    "sqrt_", "rsqrt_", "abs_", "floor_", "erf_", "sin_", "cos_", "pow_", "bf16", "f16", "int8_t", "int16_t",
    "int32_t", "int64_t", "uint8_t",
])  # fmt: skip
SCORE = "score of the tile"
# How a loop over keys reduces: the clause's operator, the first value, one more element.
REDUCE = {
    "add": ("+", "0.0f", "{0} += {1}"),
    "max": ("top", "-INFINITY", "{0} = max_({0}, {1})"),
    "min": ("least", "INFINITY", "{0} = min_({0}, {1})"),
}
DECLARED = {
    "top": "// the largest, where a NaN stays one\n#pragma omp declare reduction(top : float : omp_out = "
    "max_(omp_out, omp_in)) initializer(omp_priv = -INFINITY)",
    "least": "// the least, where a NaN stays one\n#pragma omp declare reduction(least : float : omp_out = "
    "min_(omp_out, omp_in)) initializer(omp_priv = INFINITY)",
}


@dataclass(frozen=True)
class Tile:
    """The score and the row state of a tile: as the model wrote them, or where every key is known to be kept."""

    score: Expr
    state: RowState


def tiles(t: Terms) -> tuple[Tile, Tile]:
    """Partial and full tiles; equal where the mask changes nothing."""
    partial = Tile(t.score, t.state)
    if t.mask.keep is TRUE:
        return partial, partial
    facts = {t.mask.keep: True}

    def kept(e: Expr) -> Expr:
        return simplify_under(ex.substitute(e, {t.score: t.mask.full}), facts)

    return partial, Tile(t.mask.full, mapped_state(t.state, kept))


@dataclass(frozen=True)
class Diagonal:
    """A term over m − p, tabulated: element [P − 1 − p, m] of a view in which both dimensions have stride 1."""

    name: str
    part: Expr
    shape: tuple[Size, Size]
    dtype: str

    def load(self, query: str, key: str) -> Expr:
        at = (size_term(self.shape[0]) - 1 - ex.index(query), ex.index(key))
        return ex.cast(ex.load(self.name, at, self.dtype), self.part.dtype)


# What takes longer to compute than to read.
COSTLY = frozenset(["pow", "floordiv", "mod", *ex.FLOAT_UNARY])


def costly(root: Expr, query: str, key: str) -> list[Expr]:
    """The largest sub-terms over m − p and sizes alone that are not quickly computed."""
    out: dict[Expr, None] = {}
    seen: set[Expr] = set()
    stack = [root]
    while stack:
        e = stack.pop()
        if e in seen or not {query, key} <= e.ranks:
            continue
        seen.add(e)
        if e.ranks == {query, key} and not ex.loads(e) and relative(e, query, key):
            if any(x.op in COSTLY and x.ranks for x in ex.walk(e)):
                out[e] = None
        else:
            stack.extend(reversed(e.args))
    return list(out)


class Program:
    """The text of the holes, and which tensors and sizes `load` reads, in order."""

    def __init__(self, f: Form, t: Terms, given: Iterable[str]) -> None:
        """`t`: the terms to print for the form; `given`: the tensors that exist when the kernel is called."""
        self.f, self.a, c = f, f.attention, f.cascade
        self.state = t.state
        self.key = self.a.key
        taken = set(RESERVED)

        def take(stem: str) -> str:
            name = identifier(stem, taken)
            taken.add(name)
            return name

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
            self.ending = _reciprocals(self.ending, self.a.value)
        own = self._tensors(set(given))
        self.tensors = [*own, *(d.name for d in self.diagonals.values())]
        operands = {}
        for tensor in own:
            name, shape = take(tensor), c.tensor[tensor].shape
            strides = tuple(take(f"{name}_{d}") for d in range(len(shape)))
            operands[tensor] = Operand(name, strides, shape, stored(f, tensor))
        for d in self.diagonals.values():
            name = take(d.name)
            operands[d.name] = Operand(name, (take(f"{name}_0"), take(f"{name}_1")), d.shape, d.dtype)
        self.symbols = c.free_symbols
        symbols = {n: take(n) for n in self.symbols}
        self.ranks = {r.name: take(r.name) for r in c.ranks}
        self.carried = {x.name: take(x.name.lower()) for x in t.state.carried}
        self.old = {n: take(f"{v}_old") for n, v in self.carried.items()}
        self.inputs = [take(f"x{i}") for i in range(len(self.products))]
        self.taken = taken
        names = {ex.symbol(n): t for n, t in symbols.items()}
        self.scope = Scope(names, operands, {r.name: r.size for r in c.ranks})
        self.fields = _Fields(self)
        self.reductions: set[str] = set()
        # tensor → the dimension along which its elements have to lie next to one another
        self.unit: dict[str, int] = {}

    def _outer(self, t: Tile) -> Tile:
        """What multiplies a product outside of its sum belongs to the score; what the host tabulates is read."""
        here = ex.load(SCORE, (ex.index(self.key),), t.score.dtype)
        table = self.outer | {part: d.load(self.a.query, self.key) for part, d in self.diagonals.items()}
        state = mapped_state(t.state, lambda e: ex.substitute(ex.substitute(e, {t.score: here}), table))
        return Tile(ex.substitute(t.score, table), state)

    def _diagonals(self, written: Iterable[Tile]) -> dict[Expr, Diagonal]:
        """Costly terms over m − p alone, by which the host makes a table of each."""
        extent = {r.name: r.size for r in self.f.cascade.ranks}
        shape = (extent[self.a.query], extent[self.key])
        found: dict[Expr, Diagonal] = {}
        for t in written:
            for e in (t.score, t.state.weight, *(c.lift for c in t.state.carried)):
                for part in costly(e, self.a.query, self.key):
                    dtype = {"int32_t": "i32", "int64_t": "i64"}.get(kind(part, extent), "f32" if part.is_float else "b1")
                    found.setdefault(part, Diagonal(f"diagonal {len(found)}", part, shape, dtype))
        return found

    def terms(self) -> list[Expr]:
        out = [self.ending]
        for t in self.tiles:
            out += [t.score, t.state.weight, *(c.lift for c in t.state.carried), *corrections(t.state)]
        return out

    def _tensors(self, given: set[str]) -> list[str]:
        found = {str(x.attr): None for e in self.terms() for x in ex.loads(e)}
        return [t for t in found if t in given]

    def text(self) -> str:
        """The struct, and what it needs before it."""
        partial, full = self.tiles
        if partial == full:
            steps = self._step(["    " + x for x in _Step(self, partial).lines()])
        else:
            inner = [
                "    if constexpr (PARTIAL) {", *("      " + x for x in _Step(self, partial).lines()),
                "    } else {", *("      " + x for x in _Step(self, full).lines()), "    }",
            ]  # fmt: skip
            steps = self._step(inner)
        finish = self._finish()
        row = self.fields.text()
        code = "\n".join(["", *steps, *finish, *row])
        parts = [DECLARED[r] for r in sorted(self.reductions)]
        members, load = self._load(set(re.findall(r"[^\W\d]\w*", code)))
        first = " ".join(f"state[{i}] = {_identity(c)};" for i, c in enumerate(self.state.carried))
        parts.append("\n".join([
            "struct Program {", *("  " + x for x in members), *([""] if members else []),
            *("  " + x for x in load), "",
            *("  " + x if x else "" for x in row), "",
            f"  static void start(float* state) {{ {first} }}".replace("{  }", "{}"), "",
            *("  " + x for x in steps), "",
            *("  " + x for x in finish), "};",
        ]))  # fmt: skip
        return "\n\n".join(parts)

    @staticmethod
    def _step(inner: Sequence[str]) -> list[str]:
        head = "INLINE float step(const Row& row, float* const* x, float* w, float* state, int64_t m0, int n) const {"
        doc = "// n scores of a row from key m0 on: its weights, its new state, and the factor of what was summed before"
        return [doc, "template <bool PARTIAL>", head, *(x[2:] for x in inner), "}"]

    def _load(self, used: set[str]) -> tuple[list[str], list[str]]:
        """Members, and the function that fills them: tensors in order, their strides one after the other, then sizes."""
        members, lines, at = [], [], 0
        for i, t in enumerate(self.tensors):
            x = self.scope.tensors[t]
            members.append(f"const {STORED[x.dtype]}* {x.name};")
            lines.append(f"self.{x.name} = static_cast<const {STORED[x.dtype]}*>(tensors[{i}]);")
            wanted = [(s, at + d) for d, s in enumerate(x.strides) if s in used]
            if wanted:
                members.append(f"int64_t {', '.join(s for s, _ in wanted)};")
            lines += [f"self.{s} = sizes[{d}];" for s, d in wanted]
            at += len(x.strides)
        for i, n in enumerate(self.symbols):
            name = self.scope.names[ex.symbol(n)]
            if name in used:
                members.append(f"int32_t {name};")
                lines.append(f"self.{name} = int32_t(sizes[{at + i}]);")
        head = "static Program load(const void* const* tensors, const int64_t* sizes) {"
        return members, [head, "  Program self;", *(f"  {x}" for x in lines), "  return self;", "}"]

    def _finish(self) -> list[str]:
        a = self.a
        body = Body(self.scope, [self.ending], set(self.taken), self.fields)
        value = ex.index(a.value)
        names = dict(self.scope.names) | {value: self.ranks[a.value]}
        loop = Body(replace(self.scope, names=names), [self.ending], body.taken, _Around(self, body, a.value), value)
        for x in ex.loads(self.ending):
            if str(x.attr) in self.carried:
                _read_state(self, body, x)
            elif str(x.attr) == a.contraction.out.tensor:
                loop.bind(x, "acc[i]")
        result = loop.real(self.ending)
        inner = [*loop.lines, f"out[i] = OUT({result});"]
        if _mentions(self.ranks[a.value], inner):
            inner.insert(0, f"const int32_t {self.ranks[a.value]} = i;")
        head = "INLINE void finish(const Row& row, const float* acc, const float* state, OUT* out) const {"
        return [
            "// the end of a row", head, *(f"  {x}" for x in [*self.fields.unpacked([*body.lines, *inner]), *body.lines]),
            "  #pragma omp simd", "  for (int i = 0; i < F; i++) {", *(f"    {x}" for x in inner), "  }", "}",
        ]  # fmt: skip


def stored(f: Form, tensor: str) -> str:
    """The type that a tensor's elements have in memory; what is computed beforehand holds floats as float32."""
    dtype = f.cascade.tensor[tensor].dtype
    before = any(e.out.tensor == tensor for e in f.attention.prelude)
    if dtype not in STORED:
        raise PrintError(f"{tensor} is {dtype}; the kernel computes in float32")
    return "f32" if before and dtype in ex.FLOATS else dtype


def _reciprocals(root: Expr, value: str) -> Expr:
    """Quotients by what no value changes as products: one division a row."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op != "div" or value not in args[0].ranks or value in args[1].ranks:
            return None
        return args[0] * ex.unary("reciprocal", ex.cast(args[1], "f32"))

    return ex.rebuild(root, rule)


def corrections(state: RowState) -> list[Expr]:
    return [e for e in (state.correction, *(c.correction for c in state.carried)) if e is not None]


def _identity(c: Carried) -> str:
    return "-INFINITY" if c.identity == -float("inf") else "INFINITY" if c.identity == float("inf") else f"{c.identity!r}f"


def _mentions(name: str, lines: Sequence[str]) -> bool:
    return any(re.search(rf"\b{name}\b", x) for x in lines)


def _read_state(p: Program, body: Body, x: Expr) -> None:
    """Bind a carried scalar to its final value."""
    if x not in body.memo:
        name = str(x.attr)
        body.lines.append(f"const float {p.carried[name]} = state[{list(p.carried).index(name)}];")
        body.bind(x, p.carried[name])


class _Fields:
    """What is computed once a row: printed into `row`, kept as fields of Row, read by name in the other functions."""

    def __init__(self, p: Program) -> None:
        self.p = p
        self.ranks = {*p.f.heads.order, p.a.query}
        names = dict(p.scope.names) | {ex.index(r): p.ranks[r] for r in self.ranks}
        self.body = Body(replace(p.scope, names=names), p.terms(), p.taken)
        self.known: dict[Expr, bool] = {}
        self.types: dict[str, str] = {}
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
        return self._field(text, kind(e, self.p.scope.extent), taken)

    def pointer(self, tensor: str, at: At, taken: set[str]) -> str:
        self.body.taken |= taken
        t = self.p.scope.tensors[tensor]
        return self._field(self.body.pointer(tensor, at), f"const {STORED[t.dtype]}*", taken)

    def unit(self, tensor: str, d: int) -> bool:
        return False

    def _field(self, name: str, ctype: str, taken: set[str]) -> str:
        self.types[name] = ctype
        taken.add(name)
        return name

    def unpacked(self, lines: Sequence[str]) -> list[str]:
        """Lines that give the fields which others use their names."""
        used = [n for n in self.types if _mentions(n, lines)]
        return [f"{self.types[n] if self.types[n].endswith('*') else f'const {self.types[n]}'} {n} = row.{n};" for n in used]

    def text(self) -> list[str]:
        """`Row` and `row`."""
        p, at = self.p, self.p.f.heads
        fields = list(self.types)
        lines = list(self.body.lines)
        head = []
        places = [(r, self._lead(i)) for i, r in enumerate(at.lead)] + [(at.head, "at_h"), (p.a.query, "at_p")]
        for r, place in places:
            if r and (p.ranks[r] in fields or _mentions(p.ranks[r], lines)):
                head.append(f"const {kind(ex.index(r), p.scope.extent)} {p.ranks[r]} = {place};")
        listed = ", ".join(fields)
        return [
            "// what belongs to a row",
            "struct Row {", *(f"  {t} {n};" for n, t in self.types.items()), "};", "",
            "Row row(int64_t at_z, int64_t at_h, int64_t at_p) const {", *(f"  {x}" for x in [*head, *lines]),
            f"  return {{{listed}}};", "}",
        ]  # fmt: skip

    def _lead(self, i: int) -> str:
        """The coordinate of a leading rank: they lie in one dimension, the last one fastest."""
        p, lead = self.p, self.p.f.heads.lead
        size = Body(p.scope, (), set())
        inner = [size.term(size_term(p.f.cascade.rank[r].size)) for r in lead[i + 1 :]]
        text = f"at_z / ({' * '.join(f'int64_t({s})' for s in inner)})" if inner else "at_z"
        if i:
            own = size.term(size_term(p.f.cascade.rank[lead[i]].size))
            text = f"{text} % ({own})"
        return text


class _Around:
    """What lies around a loop over keys or values: the function that it stands in."""

    def __init__(self, p: Program, body: Body, rank: str) -> None:
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


class _Step:
    """The body of `step` on one kind of tile: loops over the keys, and the row's scalars between them."""

    def __init__(self, p: Program, tile: Tile) -> None:
        self.p, self.score, self.state = p, tile.score, tile.state
        self.here = ex.load(SCORE, (ex.index(p.key),), tile.score.dtype)
        self.body = Body(p.scope, corrections(tile.state), set(p.taken), p.fields)
        self.around = _Around(p, self.body, p.key)
        self.phases, self.last = self._order()
        # a product times a positive number is computed again by each loop; its largest is that of the products
        self.scale = self._scale()
        # products whose memory may hold another score: no term reads them beside it
        self.free = [i for x, i in p.products.items() if all(x not in ex.loads(t) for t in self._all())]
        # which one does
        self.buffer: int | None = None
        # what a scalar's elements come to, by its name
        self.rows: dict[str, str] = {}

    def _order(self) -> tuple[list[int], int]:
        """In which loop each scalar is reduced: after all that it reads. The weights are written by the last loop."""
        phase: dict[str, int] = {}

        def after(*terms: Expr | None) -> int:
            reads = {str(x.attr) for t in terms if t is not None for x in ex.loads(t)}
            return max((phase[n] + 1 for n in reads if n in phase), default=0)

        for c in self.state.carried:
            phase[c.name] = after(c.lift, c.correction)
        return list(phase.values()), max([after(self.state.weight, self.state.correction), *phase.values()])

    def _scale(self) -> tuple[int, float] | None:
        if self.score.op != "mul":
            return None
        for x, c in (self.score.args, self.score.args[::-1]):
            if x in self.p.products and c.is_const and 0 < float(c.value) < math.inf:
                return self.p.products[x], float(c.value)
        return None

    def lines(self) -> list[str]:
        p, body = self.p, self.body
        body.lines += [f"float* const {x} = x[{i}];" for i, x in enumerate(p.inputs)]
        for i, c in enumerate(self.state.carried):
            body.lines.append(f"const float {p.old[c.name]} = state[{i}];")
        for e in {x for t in corrections(self.state) for x in ex.loads(t) if str(x.attr).startswith(OLD)}:
            body.bind(e, p.old[str(e.attr).removeprefix(OLD)])
        for phase in range(self.last + 1):
            self._loop(phase)
            self._update(phase)
        correction = self.state.correction
        factor = "1.0f" if correction is None else body.let("c", correction)
        body.lines += [f"state[{i}] = {p.carried[c.name]};" for i, c in enumerate(self.state.carried)]
        return [*p.fields.unpacked(body.lines), *body.lines, f"return {factor};"]

    def _terms(self, phase: int) -> list[Expr]:
        out = [c.lift for c, n in zip(self.state.carried, self.phases) if n == phase]
        return [*out, self.state.weight] if phase == self.last else out

    def _loop(self, phase: int) -> None:
        p, body = self.p, self.body
        terms = self._terms(phase)
        if not terms:
            return
        key = ex.index(p.key)
        scores = any(self.here in ex.loads(t) for t in terms)
        again = scores and (self.scale is not None or not self.free)
        first = scores and self.buffer is None and not again
        roots = [*terms, *([self.score] if first or again else [])]
        names = dict(p.scope.names) | {key: p.ranks[p.key]}
        loop = Body(replace(p.scope, names=names), roots, body.taken, self.around, key)
        self._products(loop, roots)
        if again:
            loop.bind(self.here, loop.let("s", self.score))
        elif first:
            self._first(loop, phase)
        elif scores:
            name = loop.fresh("s")
            loop.lines.append(f"const float {name} = {p.inputs[self.buffer or 0]}[i];")
            loop.bind(self.here, name)
        loop.count(terms)
        clauses = self._reduce(loop, phase)
        if phase == self.last:
            loop.lines.append(f"w[i] = {loop.real(self.state.weight)};")
        if all(" = " in x and x.startswith("const ") for x in loop.lines):
            # nothing but names: what is reduced lies there already
            return
        name = p.ranks[p.key]
        where = [f"const int32_t {name} = int32_t(m0) + i;"] if _mentions(name, loop.lines) else []
        body.lines += [
            f"#pragma omp simd{clauses}", "for (int i = 0; i < n; i++) {", *(f"  {x}" for x in [*where, *loop.lines]), "}",
        ]  # fmt: skip

    def _products(self, loop: Body, roots: Sequence[Expr]) -> None:
        read = {x for t in roots for x in ex.loads(t)}
        for x, i in self.p.products.items():
            if x in read:
                name = loop.fresh(str(x.attr).lower())
                loop.lines.append(f"const float {name} = {self.p.inputs[i]}[i];")
                loop.bind(x, name)

    def _first(self, loop: Body, phase: int) -> None:
        """Compute the score, and keep it for the loops after this one."""
        p = self.p
        later = [t for n in range(phase + 1, self.last + 1) for t in self._terms(n)]
        name = loop.let("s", self.score)
        loop.bind(self.here, name)
        if self.score in p.products:
            self.buffer = p.products[self.score]
        elif any(self.here in ex.loads(t) for t in later):
            self.buffer = self.free[0]
            loop.lines.append(f"{p.inputs[self.buffer]}[i] = {name};")

    def _reduce(self, loop: Body, phase: int) -> str:
        """One more element for each scalar of this loop; answers the loop's clauses."""
        p = self.p
        clauses: dict[str, list[str]] = {}
        for c, n in zip(self.state.carried, self.phases):
            if n != phase:
                continue
            if c.op not in REDUCE:
                raise PrintError(f"the row scalar {c.name} reduces {c.lift} by {c.op}")
            if row := self._whole_row(c, phase):
                self.rows[c.name] = row
                continue
            sign, first, rule = REDUCE[c.op]
            name = self.body.fresh(f"{p.carried[c.name]}_tile")
            self.body.lines.append(f"float {name} = {first};")
            loop.lines.append(rule.format(name, loop.real(c.lift)) + ";")
            clauses.setdefault(sign, []).append(name)
            if sign in DECLARED:
                p.reductions.add(sign)
            self.rows[c.name] = name
        return "".join(f" reduction({sign} : {', '.join(names)})" for sign, names in clauses.items())

    def _whole_row(self, c: Carried, phase: int) -> str:
        """The reduction of numbers that lie in memory as they are: scores by now, or weights. Else nothing."""
        old = self.p.old[c.name]
        if c.op == "max" and c.lift is self.here and self.scale is not None:
            product, factor = self.scale
            return f"max_({old}, row_max({self.p.inputs[product]}, n, -INFINITY) * {number(factor)})"
        if c.op == "max" and c.lift is self.here and self.buffer is not None:
            return f"row_max({self.p.inputs[self.buffer]}, n, {old})"
        return "row_sum(w, n)" if c.op == "add" and c.lift is self.state.weight and phase == self.last else ""

    def _update(self, phase: int) -> None:
        """The scalars of a loop, brought up to date."""
        p, body = self.p, self.body
        for c, n in zip(self.state.carried, self.phases):
            if n != phase:
                continue
            new, old, row = p.carried[c.name], p.old[c.name], self.rows[c.name]
            if c.op == "add":
                before = old if c.correction is None else f"{old} * {body.let('c', c.correction)}"
                row = f"{before} + {row}"
            elif row.isidentifier():
                row = f"{c.op}_({old}, {row})"
            body.lines.append(f"const float {new} = {row};")
            for t in (*self._all(), *corrections(self.state)):
                for x in ex.loads(t):
                    if str(x.attr) == c.name:
                        body.bind(x, new)

    def _all(self) -> list[Expr]:
        return [self.state.weight, *(c.lift for c in self.state.carried)]
