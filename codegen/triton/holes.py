"""Prints the functions that fill the streaming skeleton's holes, a few lines each, from the attention's terms.

    batch, rows    which coordinates a program and a row have       products    the score-shaped contractions of a tile
    span           the keys that a row block visits                 values      the tile that is summed
    queries        the tiles that a row block keeps                 row_holes   has those of the row state
    finish         the epilogue, and the store
"""

from __future__ import annotations

from ...cost_model.count.subject import FEW_ROWS
from ...patterns import expr as ex
from ...patterns.expr import Expr
from ...patterns.masks.ranges import FIRST, LAST
from ..text.print_triton import TYPES
from . import row_holes
from .device_function import DeviceFunction, KernelNames, Printed, atom, coordinates, ragged
from .streaming import Dot, DotOperand, Streaming


def printed(s: Streaming, tile_m: int, split: bool = False, saved: tuple[Expr, ...] | None = None) -> tuple[Printed, ...]:
    """All holes of a streaming attention for key tiles of `tile_m`, with those for split keys.

    `saved`: row scalars that are handed over beside the output, over what a row carries at its end.
    """
    names = KernelNames(s, trained=saved is not None)
    walk = (_span(names),) if s.span is not None else (_lists(names), _kept(names)) if needs_lists(s) else ()
    before = (_batch(names), _rows(names), *walk, _queries(names), _products(names, tile_m))
    if s.eights and saved is None:
        before = (_strides(names), *before)
    return (*before, *row_holes.printed(names, tile_m, split), _values(names, tile_m), _finish(names, saved or ()))


def _strides(names: KernelNames) -> Printed:
    """What the host has looked at, said so that Triton sees it: all strides but the innermost are multiples of 8."""
    s = names.s
    doc = '    """The same, with strides that are multiples of 8 written as such."""'
    lines = ["@triton.jit", "def strides(out, inputs):", doc]
    results = ["out", *(f"inputs[{i}]" for i in range(len(s.inputs)))]
    outer = {0: s.cascade.outputs[0]} | {i + 1: s.inputs[i] for i in s.eights}
    for i, t in outer.items():
        o = names.operands[t]
        lines.append(f"    {', '.join((o.name, *o.strides))} = {results[i]}")
        results[i] = f"({', '.join((o.name, *(f'{x} // 8 * 8' for x in o.strides[:-1]), o.strides[-1]))})"
    lines.append(f"    return {results[0]}, ({', '.join(results[1:])},)")
    return Printed("strides", "\n".join(lines), frozenset())


def needs_lists(s: Streaming) -> bool:
    """May a mask say which key tiles a row block visits, in a list? Not for a few query rows: they visit all."""
    queries = s.extent[s.attention.query]
    listed = s.mask.keep is not ex.TRUE and s.span is None
    return listed and not (isinstance(queries, int) and queries < FEW_ROWS)


# --- coordinates ------------------------------------------------------------------------------------------------


def mask_ranks(s: Streaming) -> tuple[str, ...]:
    """Ranks of the grid along which tile lists differ."""
    return tuple(r for r in s.grid if r in s.mask.keep.ranks)


def _batch(names: KernelNames) -> Printed:
    """The program's number, last rank fastest, and the number of its tile list."""
    s = names.s
    f = DeviceFunction(names, "batch", "i, sizes", ())
    for r in reversed(s.grid):
        if r == s.grid[0]:
            f.body.line(f"{names.ranks[r]} = i")
            continue
        f.body.line(f"{names.ranks[r]} = i % {atom(f.size(r))}")
        f.body.line(f"i = i // {atom(f.size(r))}")
    listed = "0"
    for r in mask_ranks(s):
        listed = names.ranks[r] if listed == "0" else f"({listed}) * {atom(f.size(r))} + {names.ranks[r]}"
    at = "".join(f"{names.ranks[r]}.to(tl.int64), " for r in s.grid)
    f.body.line(f"return ({at.strip() if len(s.grid) == 1 else at.rstrip(', ')}), {listed}")
    return f.printed("Coordinates of a program, and the number of the tile list that it walks.")


def _rows(names: KernelNames) -> Printed:
    """Row r as coordinates, last rank fastest; rows past the end repeat the last one and are not stored."""
    s = names.s
    f = DeviceFunction(names, "rows", "r, batch, sizes", ())
    own = s.rows
    total = " * ".join(atom(f.size(r)) for r in own) or "1"
    f.body.line(f"inside = r < {total}")
    if own:
        f.body.line(f"r = tl.minimum(r, {total} - 1)")
    for r in reversed(own[1:]):
        f.body.line(f"{names.ranks[r]} = r % {atom(f.size(r))}")
        f.body.line(f"r = r // {atom(f.size(r))}")
    if own:
        f.body.line(f"{names.ranks[own[0]]} = r")
    at = ", ".join(names.ranks[r] for r in coordinates(s))
    f.body.line(f"return ({at}{',' if len(coordinates(s)) == 1 else ''}), inside")
    return f.printed("Coordinates of the block's rows, and which of them exist.")


def _lists(names: KernelNames) -> Printed:
    """The coordinates of a tile list's number: those of `_batch`, 0 for what the mask does not read."""
    s = names.s
    f = DeviceFunction(names, "lists", "i, sizes", ())
    over = mask_ranks(s)
    for r in reversed(over):
        size = atom(f.size(r))
        f.body.line(f"{names.ranks[r]} = {'i' if r == over[0] else f'i % {size}'}")
        if r != over[0]:
            f.body.line(f"i = i // {size}")
    at = "".join(f"{names.ranks[r]}.to(tl.int64), " if r in over else "0, " for r in s.grid)
    f.body.line(f"return ({at.strip() if len(s.grid) == 1 else at.rstrip(', ')})")
    return f.printed("Coordinates of the batch entry that a tile list stands for.")


def _kept(names: KernelNames) -> Printed:
    """The mask of a tile; keys past the end are not read."""
    s = names.s
    m = names.ranks[s.key]
    f = DeviceFunction(names, "kept", f"at, {m}, inputs, sizes", (*coordinates(s), s.key), [s.mask.keep])
    f.body.scope.guards = {s.key: f"{m} < {f.size(s.key)}"}
    f.body.line(f"return {f.body.term(s.mask.keep)}")
    return f.printed("Which keys the rows of a block keep.")


def _span(names: KernelNames) -> Printed:
    """The key range of a row block; rows without a key see every key where a masked one counts beside no other."""
    s = names.s
    span = s.span
    assert span is not None
    f = DeviceFunction(names, "span", "first, batch, inputs, sizes, BM: tl.constexpr", s.grid, span.terms)
    body, size = f.body, f.size(s.attention.query)
    if s.rows == (s.attention.query,):
        body.line(f"last = tl.minimum(first + BM, {size}) - 1")
    else:
        # a block of several heads has all queries
        body.line("first = 0")
        body.line(f"last = {size} - 1")
    body.bind(FIRST, "first")
    body.bind(LAST, "last")
    low, high = (body.term(e) for e in (span.low, span.high))
    if s.skipping == "guarded":
        body.line(f"alive = {body.term(span.alive)}")
        low, high = f"tl.where(alive, {low}, 0)", f"tl.where(alive, {high}, {f.size(s.key)})"
    elif s.skipping == "never":
        low, high = "0", f.size(s.key)
    body.line(f"return {low}, {high}, {body.term(span.full_low)}, {body.term(span.full_high)}")
    return f.printed("Keys that some row of a block keeps, from and to, and those that all of them keep.")


# --- operands ---------------------------------------------------------------------------------------------------


def operand(f: DeviceFunction, side: DotOperand, stem: str, tile_m: int = 0) -> str:
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


def _operand_text(f: DeviceFunction, side: DotOperand) -> str:
    if side.load is not None:
        return f.body.load_text(side.load)
    text = f.body.real(side.term)
    return text if side.dtype == "f32" else f"({text}).to({TYPES[side.dtype]})"


def embed(f: DeviceFunction, p: Dot, piece: tuple[int, int], axis: str) -> None:
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


def _queries(names: KernelNames) -> Printed:
    s = names.s
    f = DeviceFunction(names, "queries", "at, inputs, sizes", coordinates(s), [p.query.term for p in s.products])
    tiles = []
    for p in s.products:
        for piece in p.chunks:
            embed(f, p, piece, "[None, :]")
            tiles.append(operand(f, p.query, "q"))
    f.body.line(f"return ({', '.join(tiles)},)")
    shapes = ", ".join(f"[BM, {w}]" for p in s.products for _, w in p.chunks)
    return f.printed(f"The query operands of a row block: {shapes}.")


def _products(names: KernelNames, tile_m: int) -> Printed:
    s = names.s
    ranks = (*coordinates(s), s.key)
    f = DeviceFunction(
        names, "products", f"q, at, {names.ranks[s.key]}, base, lane, inputs, sizes, PARTIAL: tl.constexpr", ranks,
        [p.key.term for p in s.products],
    )
    out, n = [], 0
    for p in s.products:
        name = names.products[p.load]
        for i, piece in enumerate(p.chunks):
            embed(f, p, piece, "[:, None]")
            k = operand(f, p.key, "k", tile_m)
            so_far = f", {name}" if i else ""
            f.body.line(f'{name} = tl.dot(q[{n}], {k}{so_far}, input_precision="ieee")')
            n += 1
        out.append(name)
    f.body.line(f"return ({', '.join(out)},)")
    return f.printed("Scores of a tile, [BM, BN]: the contractions over the embed ranks.")


def _values(names: KernelNames, tile_m: int) -> Printed:
    s = names.s
    m, v = names.ranks[s.key], names.ranks[s.value]
    guards = {}
    if s.value_width != s.extent[s.value]:
        guards[s.value] = f"{v} < {s.extent[s.value]}"
    f = DeviceFunction(
        names, "values", f"at, {m}, base, lane, {v}, inputs, sizes, PARTIAL: tl.constexpr",
        (*coordinates(s), s.key, s.value), [s.values.term], guards,
    )
    name = operand(f, s.values, "v", tile_m)
    f.body.line(f"return {name}")
    return f.printed("The values of a key tile, [BN, BF].")


def row_number(f: DeviceFunction) -> str:
    """The number of a row among those of all programs, from its coordinates."""
    s, names = f.names.s, f.names
    text = ""
    for r in coordinates(s):
        text = names.ranks[r] if not text else f"({text}) * {atom(f.size(r))} + {names.ranks[r]}"
    return text or "0"


# --- the end ----------------------------------------------------------------------------------------------------------


def _finish(names: KernelNames, saved: tuple[Expr, ...]) -> Printed:
    s = names.s
    v = names.ranks[s.value]
    ends = [s.state.finish, *saved]
    f = DeviceFunction(
        names, "finish", f"out, acc, state, at, {v}, inside, inputs, sizes", (*coordinates(s), s.value), ends
    )
    order = [c.name for c in s.state.carried]
    for x in dict.fromkeys(x for e in ends for x in ex.loads(e)):
        if str(x.attr) == s.accumulator:
            f.body.bind(x, "acc")
        elif str(x.attr) in order:
            name = names.carried[str(x.attr)]
            if x not in f.body.memo:
                f.body.line(f"{name} = state[{order.index(str(x.attr))}]")
            f.body.bind(x, name)
    o = f.body.fresh("o")
    f.body.line(f"{o} = {f.body.real(s.state.finish)}")
    target = names.operands[s.cascade.outputs[0]]
    at, _ = f.body.address(s.cascade.outputs[0], s.output, clamp=False)
    mask = ["inside"]
    if s.value_width != s.extent[s.value]:
        mask.append(f"({v} < {s.extent[s.value]})")
    f.body.line(f"p_out = {at}")
    f.body.line(f"tl.store(p_out, {o}.to({target.name}.dtype.element_ty), mask={' & '.join(mask)})")
    if saved:
        number = f.body.fresh("o")
        f.body.line(f"{number} = {row_number(f)}")
    for i, e in enumerate(saved):
        f.body.line(f"tl.store(p_saved + {number} * {len(saved)} + {i}, {f.body.real(e)}, mask=inside)")
    return f.printed("The output of a row block from its sum and its row state.")
