"""Prints the functions that fill the streaming skeleton's holes, a few lines each, from the attention's terms.

    batch, rows    which coordinates a program and a row have          start, step    the row state
    queries        the tiles a row block keeps                         values         the tile that is summed
    products       the score-shaped contractions of one tile           finish         the epilogue, and the store
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..patterns import expr as ex
from ..patterns.cascade import size_term
from ..patterns.expr import Expr
from ..patterns.rowstate import OLD, Carried, RowState
from .print_triton import TYPES, Body, Operand, Scope, identifier, number
from .skip import null
from .streaming import Product, Side, Streaming, variant

HOLES = ("batch", "rows", "queries", "start", "products", "step", "values", "finish")
# Names that the emitted module uses for itself.
RESERVED = (
    *HOLES, "stream", "tile", "attention", "sizes_of", "plan_of", "kept", "walk_of", "tile_classes", "tile_lists",
    "index_type", "launch", "choose", "out", "inputs", "sizes", "tiles", "at", "acc", "state", "x", "q", "r", "w", "c", "i",
    "inside", "shape", "programs", "row_blocks", "walk", "device", "name", "tensor", "PARTIAL", "BM", "BN", "BF", "INDEX",
    "CONSTANTS", "CHUNK", "tl", "triton", "torch", "math", "Any", "Callable", "Mapping", "Tensor", "lru_cache", "float",
    "range", "floor_div", "floor_mod", "truncate", "round_even", "sign", "tanh", "expm1", "log1p", "softplus", "power",
    "remainder",
)  # fmt: skip


@dataclass(frozen=True)
class Printed:
    """One function's text and the device functions that it calls."""

    name: str
    text: str
    helpers: frozenset[str]


class Names:
    """Python names for the ranks, sizes and tensors of one attention, all different."""

    def __init__(self, s: Streaming) -> None:
        self.s = s
        taken = set(RESERVED)

        def take(stem: str) -> str:
            name = identifier(stem, taken)
            taken.add(name)
            return name

        tensors = s.attention.cascade.tensor
        self.operands: dict[str, Operand] = {}
        for t in (*s.inputs, s.cascade.outputs[0]):
            name = take(t)
            strides = tuple(take(f"{name}_{d}") for d in range(len(tensors[t].shape)))
            self.operands[t] = Operand(name, strides, tensors[t].shape, tensors[t].dtype)
        self.symbols = {n: take(n) for n in s.cascade.free_symbols}
        self.ranks = {r: take(r) for r in s.extent}
        self.carried = {c.name: take(c.name.lower()) for c in s.state.carried}
        self.old = {n: take(f"{v}_old") for n, v in self.carried.items()}
        self.products = {p.load: take(str(p.load.attr).lower()) for p in s.products}

    def leaves(self, ranks: Iterable[str]) -> dict[Expr, str]:
        """Texts of coordinates and sizes."""
        out = {ex.index(r): self.ranks[r] for r in ranks}
        return out | {ex.symbol(n): v for n, v in self.symbols.items()}


class _Function:
    """A function under construction: its body, and lines that unpack what the body turned out to use."""

    def __init__(self, names: Names, name: str, params: str, ranks: Iterable[str], roots: Iterable[Expr] = (),
                 guards: dict[str, str] | None = None) -> None:  # fmt: skip
        self.names, self.name, self.params = names, name, params
        s = names.s
        scope = Scope(names.leaves(ranks), names.operands, s.extent, guards or {})
        self.body = Body(scope, roots)
        self.body.taken |= {*HOLES, *re.findall(r"\w+", params), "stream", "tile", "tl", "out", "inside"}
        for own in (names.ranks, names.carried, names.old, names.products):
            self.body.taken |= set(own.values())

    def size(self, rank: str) -> str:
        return self.body.term(size_term(self.names.s.extent[rank]))

    def printed(self, doc: str) -> Printed:
        text = "\n".join(self.body.lines)
        words = set(re.findall(r"[^\W\d]\w*", text))
        head = ["@triton.jit", f"def {self.name}({self.params}):", f'    """{doc}"""']
        head += self._unpacked(words)
        return Printed(self.name, "\n".join([*head, text]), frozenset(self.body.helpers))

    def _unpacked(self, words: set[str]) -> Iterable[str]:
        s, names = self.names.s, self.names
        for i, t in enumerate(s.inputs):
            yield from _unpack(names.operands[t], f"inputs[{i}]", words)
        yield from _unpack(names.operands[s.cascade.outputs[0]], "out", words)
        for i, n in enumerate(s.cascade.free_symbols):
            if names.symbols[n] in words:
                yield f"    {names.symbols[n]} = sizes[{i}]"
        source = "batch" if self.name == "rows" else "at"
        for i, r in enumerate(coordinates(s) if source == "at" else s.grid):
            if names.ranks[r] in words and self.name != "batch":
                yield f"    {names.ranks[r]} = {source}[{i}]"


def _unpack(t: Operand, source: str, words: set[str]) -> Iterable[str]:
    if t.name in words:
        parts = [n if n in words else "_" for n in (t.name, *t.strides)]
        yield f"    {', '.join(parts)} = {source}" if len(parts) > 1 else f"    {t.name} = {source}[0]"


def coordinates(s: Streaming) -> tuple[str, ...]:
    """The ranks of `at`, in order: scalars of the program, then vectors over the block's rows."""
    return (*s.grid, *s.rows)


def printed(s: Streaming, tile_m: int) -> tuple[Printed, ...]:
    """All holes of a streaming attention for key tiles of `tile_m`."""
    names = Names(s)
    return (
        _batch(names), _rows(names), _queries(names), _start(names), _products(names, tile_m), _step(names, tile_m),
        _values(names, tile_m), _finish(names),
    )  # fmt: skip


# --- coordinates ------------------------------------------------------------------------------------------------


def mask_ranks(s: Streaming) -> tuple[str, ...]:
    """Ranks of the grid along which tile lists differ."""
    return tuple(r for r in s.grid if r in s.mask.keep.ranks)


def _batch(names: Names) -> Printed:
    """The program's number, last rank fastest, and the number of its tile list."""
    s = names.s
    f = _Function(names, "batch", "i, sizes", ())
    for r in reversed(s.grid):
        if r == s.grid[0]:
            f.body.line(f"{names.ranks[r]} = i")
            continue
        f.body.line(f"{names.ranks[r]} = i % {_atom(f.size(r))}")
        f.body.line(f"i = i // {_atom(f.size(r))}")
    listed = "0"
    for r in mask_ranks(s):
        listed = names.ranks[r] if listed == "0" else f"({listed}) * {_atom(f.size(r))} + {names.ranks[r]}"
    at = "".join(f"{names.ranks[r]}.to(tl.int64), " for r in s.grid)
    f.body.line(f"return ({at.strip() if len(s.grid) == 1 else at.rstrip(', ')}), {listed}")
    return f.printed("Coordinates of a program, and the number of the tile list that it walks.")


def _rows(names: Names) -> Printed:
    """Row r as coordinates, last rank fastest; rows past the end repeat the last one and are not stored."""
    s = names.s
    f = _Function(names, "rows", "r, batch, sizes", ())
    own = s.rows
    total = " * ".join(_atom(f.size(r)) for r in own) or "1"
    f.body.line(f"inside = r < {total}")
    if own:
        f.body.line(f"r = tl.minimum(r, {total} - 1)")
    for r in reversed(own[1:]):
        f.body.line(f"{names.ranks[r]} = r % {_atom(f.size(r))}")
        f.body.line(f"r = r // {_atom(f.size(r))}")
    if own:
        f.body.line(f"{names.ranks[own[0]]} = r")
    at = ", ".join(names.ranks[r] for r in coordinates(s))
    f.body.line(f"return ({at}{',' if len(coordinates(s)) == 1 else ''}), inside")
    return f.printed("Coordinates of the block's rows, and which of them exist.")


def _atom(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"


# --- operands ---------------------------------------------------------------------------------------------------


def _operand(f: _Function, side: Side, stem: str, tile_m: int = 0) -> str:
    """The tile of an operand in the type in which it enters the tensor cores; `tile_m`: it is a tile of keys."""
    name = f.body.fresh(stem)
    if not (tile_m and ragged(f.names.s, tile_m)):
        f.body.line(f"{name} = {_operand_text(f, side)}")
        return name
    m = f.names.ranks[f.names.s.key]
    with f.body.block("if PARTIAL:"):
        # Keys past the end are not read: NaN in memory would survive a weight of 0.
        others = f.body.scope.guards
        f.body.scope.guards = {f.names.s.key: f"{m} < {f.size(f.names.s.key)}", **others}
        f.body.line(f"{name} = {_operand_text(f, side)}")
        f.body.scope.guards = others
    with f.body.block("else:"):
        f.body.line(f"{name} = {_operand_text(f, side)}")
    return name


def _operand_text(f: _Function, side: Side) -> str:
    if side.load is not None:
        return f.body.load_text(side.load)
    text = f.body.number_text(side.term)
    return text if side.dtype == "f32" else f"({text}).to({TYPES[side.dtype]})"


def ragged(s: Streaming, tile_m: int) -> bool:
    """May the last key tile reach past the end?"""
    size = s.extent[s.key]
    return not (isinstance(size, int) and size % tile_m == 0)


def _embed(f: _Function, p: Product, piece: tuple[int, int], axis: str) -> None:
    """Name the embed coordinates of one piece, and guard them where the piece is padded."""
    start, width = piece
    e = f.names.ranks[p.embed]
    span = f"tl.arange(0, {width}){axis}"
    f.body.line(f"{e} = {span}" if start == 0 else f"{e} = {start} + {span}")
    f.body.bind(ex.index(p.embed), e)
    f.body.scope.guards = {r: g for r, g in f.body.scope.guards.items() if r != p.embed}
    if start + width > p.size:
        f.body.scope.guards[p.embed] = f"{e} < {p.size}"
    # A term over other embed coordinates is another term.
    f.body.memo = {t: v for t, v in f.body.memo.items() if p.embed not in t.ranks or t.op == "index"}
    f.body.count([p.query.term, p.key.term])


def _queries(names: Names) -> Printed:
    s = names.s
    f = _Function(names, "queries", "at, inputs, sizes", coordinates(s), [p.query.term for p in s.products])
    tiles = []
    for p in s.products:
        for piece in p.chunks:
            _embed(f, p, piece, "[None, :]")
            tiles.append(_operand(f, p.query, "q"))
    f.body.line(f"return ({', '.join(tiles)},)")
    shapes = ", ".join(f"[BM, {w}]" for p in s.products for _, w in p.chunks)
    return f.printed(f"The query operands of a row block: {shapes}.")


def _products(names: Names, tile_m: int) -> Printed:
    s = names.s
    ranks = (*coordinates(s), s.key)
    f = _Function(
        names, "products", f"q, at, {names.ranks[s.key]}, inputs, sizes, PARTIAL: tl.constexpr", ranks,
        [p.key.term for p in s.products],
    )  # fmt: skip
    out, n = [], 0
    for p in s.products:
        name = names.products[p.load]
        for i, piece in enumerate(p.chunks):
            _embed(f, p, piece, "[:, None]")
            k = _operand(f, p.key, "k", tile_m)
            so_far = f", {name}" if i else ""
            f.body.line(f'{name} = tl.dot(q[{n}], {k}{so_far}, input_precision="ieee")')
            n += 1
        out.append(name)
    f.body.line(f"return ({', '.join(out)},)")
    return f.printed("Scores of a tile, [BM, BN]: the contractions over the embed ranks.")


def _values(names: Names, tile_m: int) -> Printed:
    s = names.s
    m, v = names.ranks[s.key], names.ranks[s.value]
    guards = {}
    if s.value_width != s.extent[s.value]:
        guards[s.value] = f"{v} < {s.extent[s.value]}"
    f = _Function(
        names, "values", f"at, {m}, {v}, inputs, sizes, PARTIAL: tl.constexpr", (*coordinates(s), s.key, s.value),
        [s.values.term], guards,
    )  # fmt: skip
    name = _operand(f, s.values, "v", tile_m)
    f.body.line(f"return {name}")
    return f.printed("The values of a key tile, [BN, BF].")


# --- the row program --------------------------------------------------------------------------------------------


def _start(names: Names) -> Printed:
    f = _Function(names, "start", "BM: tl.constexpr", ())
    parts = [f"tl.full([BM, 1], {number(c.identity, 'f32')}, tl.float32)" for c in names.s.state.carried]
    f.body.line(f"return ({', '.join(parts)}{',' if len(parts) == 1 else ''})")
    return f.printed("The row state before the first key.")


def _step(names: Names, tile_m: int) -> Printed:
    s = names.s
    m = names.ranks[s.key]
    f = _Function(names, "step", f"state, x, at, {m}, inputs, sizes, PARTIAL: tl.constexpr", (*coordinates(s), s.key))
    for i, c in enumerate(s.state.carried):
        f.body.line(f"{names.old[c.name]} = state[{i}]")
    for i, p in enumerate(s.products):
        f.body.line(f"{names.products[p.load]} = x[{i}]")
        f.body.bind(p.load, names.products[p.load])
    _StepWriter(f, tile_m).write()
    return f.printed("Take a tile of scores into the row state: new state, weights, factor of what was summed before.")


class _StepWriter:
    """The body of `step`: score, carried scalars in order, weight, correction of the accumulator."""

    def __init__(self, f: _Function, tile_m: int) -> None:
        self.f, self.body, self.names, self.s = f, f.body, f.names, f.names.s
        self.partial, self.full = self.s.state, variant(self.s, True)[1]
        self.ragged = ragged(self.s, tile_m)
        self.null = null(self.s.state, self.s.score, self.s.key) if self.ragged else None
        self.exists = f"{self.names.ranks[self.s.key]} < {self.f.size(self.s.key)}"
        if self.ragged:
            self.body.scope.guards = {self.s.key: self.exists}

    def write(self) -> None:
        self.score()
        self.body.count(_terms(self.partial))
        new = [self.carried(c, full) for c, full in zip(self.partial.carried, self.full.carried)]
        weight = self.element(self.partial.weight, self.full.weight, "w", 0.0)
        factor = self.partial.correction
        c = "1.0" if factor is None else self.body.let("c", factor)
        self.body.line(f"return ({', '.join(new)}{',' if len(new) == 1 else ''}), {weight}, {c}")

    def score(self) -> None:
        """Print the score under the name `s`, on partial tiles as the model wrote it."""
        s, body = self.s, self.body
        if s.score in body.memo and self.null is None:
            return
        name = body.fresh("s")
        # On full tiles every key exists, so that loads there need no mask.
        apart = s.mask.full is not s.score or (self.ragged and any(s.key in x.ranks for x in _tensors(s)))
        if not apart:
            body.count([s.score])
            body.line(f"{name} = {body.number_text(s.score)}")
        if apart or self.null is not None:
            with body.block("if PARTIAL:"):
                if apart:
                    body.count([s.score])
                    body.line(f"{name} = {body.number_text(s.score)}")
                if self.null is not None:
                    body.line(self.guard(name, self.null, name))
        if apart:
            with self.full_tile():
                body.count([s.mask.full])
                body.line(f"{name} = {body.number_text(s.mask.full)}")
        body.bind(s.score, name)

    @contextmanager
    def full_tile(self) -> Iterator[None]:
        guards, self.body.scope.guards = self.body.scope.guards, {}
        with self.body.block("else:"):
            yield
        self.body.scope.guards = guards

    def guard(self, name: str, value: float, source: str) -> str:
        return f"{name} = tl.where({self.exists}, {source}, {number(value, 'f32')})"

    def element(self, partial: Expr, full: Expr, stem: str, idle: float) -> str:
        """A term over the tile, with keys past the end idle where the score itself does not make them so."""
        body = self.body
        if ex.substitute(partial, {self.s.score: self.s.mask.full}) is full:
            name = body.let(stem, partial)
        else:
            name = body.fresh(stem)
            with body.block("if PARTIAL:"):
                body.line(f"{name} = {body.number_text(partial)}")
            with self.full_tile():
                if self.s.score in body.memo:
                    body.bind(self.s.mask.full, body.term(self.s.score))
                body.line(f"{name} = {body.number_text(full)}")
        if self.ragged and self.null is None:
            source, name = name, body.fresh(stem)
            body.line(f"{name} = {source}")
            with body.block("if PARTIAL:"):
                body.line(self.guard(name, idle, source))
        return name

    def carried(self, c: Carried, full: Carried) -> str:
        body, names = self.body, self.names
        new, old = names.carried[c.name], names.old[c.name]
        for e in {x for t in _terms(self.partial) + _terms(self.full) for x in ex.loads(t)}:
            if str(e.attr).removeprefix(OLD) == c.name:
                body.bind(e, old if str(e.attr).startswith(OLD) else new)
        element = self.element(c.lift, full.lift, "w" if c.lift is self.partial.weight else "t", c.identity)
        if self.s.key not in c.lift.ranks:
            element = f"tl.where({names.ranks[self.s.key]} >= 0, {element}, 0.0)"
        if c.op == "add":
            before = old if c.correction is None else f"{old} * {body.let('c', c.correction)}"
            body.line(f"{new} = {before} + tl.sum({element}, 1, keep_dims=True)")
        else:
            body.line(f"{new} = tl.{c.op}imum({old}, tl.{c.op}({element}, 1, keep_dims=True))")
        return new


def _tensors(s: Streaming) -> list[Expr]:
    """Loads of the score that are no product."""
    products = {p.load for p in s.products}
    return [x for x in ex.loads(s.score) if x not in products]


def _terms(state: RowState) -> list[Expr]:
    out = [state.weight, *(c.lift for c in state.carried)]
    return out + [e for e in (state.correction, *(c.correction for c in state.carried)) if e is not None]


def _finish(names: Names) -> Printed:
    s = names.s
    v = names.ranks[s.value]
    f = _Function(
        names, "finish", f"out, acc, state, at, {v}, inside, inputs, sizes", (*coordinates(s), s.value), [s.state.finish]
    )  # fmt: skip
    order = [c.name for c in s.state.carried]
    for x in ex.loads(s.state.finish):
        if str(x.attr) == s.accumulator:
            f.body.bind(x, "acc")
        elif str(x.attr) in order:
            name = names.carried[str(x.attr)]
            if x not in f.body.memo:
                f.body.line(f"{name} = state[{order.index(str(x.attr))}]")
            f.body.bind(x, name)
    o = f.body.fresh("o")
    f.body.line(f"{o} = {f.body.number_text(s.state.finish)}")
    target = names.operands[s.cascade.outputs[0]]
    at, _ = f.body.address(s.cascade.outputs[0], s.output, clamp=False)
    mask = ["inside"]
    if s.value_width != s.extent[s.value]:
        mask.append(f"({v} < {s.extent[s.value]})")
    f.body.line(f"p_out = {at}")
    f.body.line(f"tl.store(p_out, {o}.to({target.name}.dtype.element_ty), mask={' & '.join(mask)})")
    return f.printed("The output of a row block from its sum and its row state.")
