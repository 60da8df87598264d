"""Prints the functions that fill the backward skeleton's holes, from the adjoint's terms.

    flow      a row block's scalars, and what reaches its contraction     adjoint   weights, gradients of products
    keys      the key tiles of all products                               dots      products of tiles that are there
    keyed     one of the heads that share a key                           seen      the rows that see a block of keys
    start_*   accumulators, add_* what a tile adds to them, store_* where they go: of the queries, of the keys and values,
              of leaves by rows (_l) and by keys (_keyed)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ....patterns.cascade import Size, size_term
from ....patterns.masks.ranges import FIRST, LAST
from ...text.print_triton import TYPES
from .. import holes
from ..device_function import DeviceFunction, Printed, atom, coordinates, ragged
from ..streaming import Dot
from . import leaf_holes
from .form import OperandGradient, StreamingBackward
from .names import BackwardNames


def printed(b: StreamingBackward, tile_m: int) -> tuple[Printed, ...]:
    """The backward's own holes; those of the forward's rows and operands are printed with it."""
    n = BackwardNames(b)
    seen = (_seen(n),) if b.seen is not None else ()
    ends = (
        _start(n, "q"), _add(n, "q", "k", "{}", "tl.trans({})"), _store_q(n),
        _start(n, "k"), _add(n, "k", "q", "tl.trans({})", "{}"), _store_k(n),
    )
    own = (_keys(n, tile_m), _dots(n), _flow(n), _adjoint(n, tile_m), _keyed(n), *seen, *ends)
    return (*own, *leaf_holes.printed(n)) if b.leaves else own


# --- operands ---------------------------------------------------------------------------------------------------------


def _keys(names: BackwardNames, tile_m: int) -> Printed:
    s = names.s
    m = names.ranks[s.key]
    f = DeviceFunction(
        names, "keys", f"at, {m}, base, lane, inputs, sizes, PARTIAL: tl.constexpr", (*coordinates(s), s.key),
        [p.key.term for p in s.products],
    )
    tiles = []
    for p in s.products:
        for piece in p.chunks:
            holes.embed(f, p, piece, "[:, None]")
            tiles.append(holes.operand(f, p.key, "k", tile_m))
    f.body.line(f"return ({', '.join(tiles)},)")
    return f.printed(f"The key tiles of the products: {', '.join(f'[{w}, BN]' for p in s.products for _, w in p.chunks)}.")


def _dots(names: BackwardNames) -> Printed:
    f = DeviceFunction(names, "dots", "q, k", ())
    out, n = [], 0
    for p in names.s.products:
        name = names.products[p.load]
        for i, _ in enumerate(p.chunks):
            so_far = f", {name}" if i else ""
            f.body.line(f'{name} = tl.dot(q[{n}], k[{n}]{so_far}, input_precision="ieee")')
            n += 1
        out.append(name)
    f.body.line(f"return ({', '.join(out)},)")
    return f.printed("Scores of a tile, [BM, BN]: the contractions over the embed ranks.")


# --- the ends of a row ------------------------------------------------------------------------------------------------


def _flow(names: BackwardNames) -> Printed:
    s, b = names.s, names.b
    v = names.ranks[s.value]
    padded = s.value_width != s.extent[s.value]
    guards = {s.value: f"{v} < {s.extent[s.value]}"} if padded else {}
    f = DeviceFunction(
        names, "flow", f"at, {v}, o, inside, out, dout, p_saved, p_sums, inputs, sizes, FIRST: tl.constexpr",
        (*coordinates(s), s.value), (), guards,
    )
    body = f.body
    body.taken |= set(names.scalars.values())
    body.line(f"{', '.join((names.dout.name, *names.dout.strides))} = dout")
    for i, x in enumerate(b.saved):
        body.line(f"{names.scalars[x]} = tl.load(p_saved + o * {len(b.saved)} + {i})")
        body.bind(x, names.scalars[x])
    for i, r in enumerate(b.row):
        name, place = names.scalars[r.load], f"p_sums + o * {len(b.row)} + {i}"
        memo, uses = dict(body.memo), dict(body.uses)
        with body.block("if FIRST:"):
            body.count([r.term])
            text = body.real(r.term)
            text = f"tl.where({v} < {s.extent[s.value]}, {text}, 0.0)" if padded else text
            body.line(f"{name} = tl.sum({text}, 1, keep_dims=True)")
            body.line(f"tl.store({place}, {name}, mask=inside)")
        body.memo, body.uses = memo, uses
        with body.block("else:"):
            body.line(f"{name} = tl.load({place})")
        body.bind(r.load, name)
    scalars = [names.scalars[x] for x in b.scalars]
    body.count([b.acc])
    body.line(f"g = ({body.real(b.acc)}).to({TYPES[s.values.dtype]})")
    body.line(f"return g, ({', '.join(scalars)}{',' if len(scalars) == 1 else ''})")
    return f.printed("The gradient that reaches the sum of the values, [BM, BF], and the scalars of its rows, [BM, 1].")


def _adjoint(names: BackwardNames, tile_m: int) -> Printed:
    """Terms of a full tile and of a partial one; keys and rows past the end have none."""
    s, b = names.s, names.b
    m = names.ranks[s.key]
    f = DeviceFunction(
        names, "adjoint",
        f"x, dw, scalars, at, inside, {m}, base, lane, inputs, sizes, PARTIAL: tl.constexpr, LEAVES: tl.constexpr",
        (*coordinates(s), s.key),
    )
    body = f.body
    body.taken |= set(names.scalars.values())
    for i, x in enumerate(b.scalars):
        body.line(f"{names.scalars[x]} = scalars[{i}]")
        body.bind(x, names.scalars[x])
    for i, p in enumerate(s.products):
        body.line(f"{names.products[p.load]} = x[{i}]")
        body.bind(p.load, names.products[p.load])
    body.bind(b.dweight, "dw")
    exists = f"{m} < {f.size(s.key)}"
    results = [body.fresh("w"), *(body.fresh("dx") for _ in s.products)]
    leaves = [(i, body.fresh("dl")) for i, x in enumerate(b.leaves) if not x.ends]
    memo, uses = dict(body.memo), dict(body.uses)
    for head, terms in (("if PARTIAL:", b.partial), ("else:", b.full)):
        body.memo, body.uses = dict(memo), dict(uses)
        reached = [b.leaves[i].full if head == "else:" else b.leaves[i].partial for i, _ in leaves]
        body.count([*terms, *reached])
        with body.block(head):
            body.scope.guards = {s.key: exists} if head != "else:" and ragged(s, tile_m) else {}
            for name, e in zip(results, terms):
                text = body.real(e)
                body.line(f"{name} = tl.where(inside & ({exists}), {text}, 0.0)" if head != "else:" else f"{name} = {text}")
            for (i, name), e in zip(leaves, reached):
                text = body.real(e)
                whole = f"tl.where(inside & ({exists}), {text}, 0.0)" if head != "else:" else text
                # a tensor of the tile, whatever the term varies over; where nobody wants it, nobody reads it
                body.line(f"{name} = {results[0]}")
                with body.block(f"if LEAVES & {1 << i}:"):
                    body.line(f"{name} = tl.zeros_like({results[0]}) + {whole}")
    parts = ", ".join(name for _, name in leaves) or results[0]
    body.line(f"return {results[0]}, ({', '.join(results[1:])},), ({parts},)")
    return f.printed("Weights of a tile, the gradient of each product and what reaches leaves, [BM, BN].")


# --- who shares a key, and who sees it ----------------------------------------------------------------------------------


def sharing(b: StreamingBackward) -> list[Size]:
    """How many coordinates of each rank of the grid share a key."""
    return [b.s.extent[r] if n is None else n for r, n in b.shared.items()]


def _keyed(names: BackwardNames) -> Printed:
    """The coordinates of number `i_own` among those that share the keys of program `i`, and their program of rows."""
    s, b = names.s, names.b
    f = DeviceFunction(names, "keyed", "i, i_own, sizes", ())
    for r in reversed(s.grid):
        name, group = names.ranks[r], b.shared[r]
        total = atom(f.size(r))
        if group is None:
            f.body.line(f"{name} = i_own % {total}")
            f.body.line(f"i_own = i_own // {total}")
        elif group == 1:
            f.body.line(f"{name} = i % {total}")
            f.body.line(f"i = i // {total}")
        else:
            few = atom(f.body.term(size_term(s.extent[r]) // group))
            f.body.line(f"{name} = (i % {few}) * {group} + i_own % {group}")
            f.body.line(f"i = i // {few}")
            f.body.line(f"i_own = i_own // {group}")
    number = "0"
    for r in s.grid:
        number = names.ranks[r] if number == "0" else f"({number}) * {atom(f.size(r))} + {names.ranks[r]}"
    at = "".join(f"{names.ranks[r]}.to(tl.int64), " for r in s.grid)
    f.body.line(f"return ({at.strip() if len(s.grid) == 1 else at.rstrip(', ')}), i * 0 + i_own * 0 + {number}")
    return f.printed("Coordinates of one of those who share keys, and the number of its program of rows.")


def _seen(names: BackwardNames) -> Printed:
    s, span = names.s, names.b.seen
    assert span is not None
    f = DeviceFunction(names, "seen", "first, batch, inputs, sizes, BN: tl.constexpr", s.grid, span.terms)
    body = f.body
    body.line(f"last = tl.minimum(first + BN, {f.size(s.key)}) - 1")
    body.bind(FIRST, "first")
    body.bind(LAST, "last")
    body.line(f"return {', '.join(body.term(e) for e in (span.low, span.high, span.full_low, span.full_high))}")
    return f.printed("Rows that see some key of a block, from and to, and those that see all of them.")


# --- accumulators -------------------------------------------------------------------------------------------------------


def _start(names: BackwardNames, side: str) -> Printed:
    block = "BM" if side == "q" else "BN"
    f = DeviceFunction(names, f"start_{side}", f"{block}: tl.constexpr", ())
    parts = [f"tl.zeros([{block}, {w}], tl.float32)" for p in names.s.products for _, w in p.chunks]
    f.body.line(f"return ({', '.join(parts)},)")
    return f.printed("Accumulators of the gradients of " + ("queries." if side == "q" else "keys."))


def _pieces(products: Sequence[Dot]) -> Iterable[tuple[int, int]]:
    """(number of the product, number of the piece)"""
    n = 0
    for i, p in enumerate(products):
        for _ in p.chunks:
            yield i, n
            n += 1


def _add(names: BackwardNames, side: str, other: str, left: str, right: str) -> Printed:
    """What a tile adds to the accumulators of one side, from the other's operand."""
    f = DeviceFunction(names, f"add_{side}", f"d{side}, dx, {other}", ())
    parts = []
    for i, n in _pieces(names.s.products):
        operand = f"{other}[{n}]"
        dots = left.format(f"dx[{i}]"), right.format(operand)
        parts.append(f'tl.dot({dots[0]}.to({operand}.dtype), {dots[1]}, d{side}[{n}], input_precision="ieee")')
    f.body.line(f"return ({', '.join(parts)},)")
    return f.printed("dQ + dX·K." if side == "q" else "dK + dXᵀ·Q.")


def _store_q(names: BackwardNames) -> Printed:
    s = names.s
    f = DeviceFunction(names, "store_q", "grads, dq, at, inside, sizes", coordinates(s))
    _stored(f, names, names.b.queries, s.products, "dq", "inside", "[None, :]")
    return f.printed("The gradients of the queries of a row block.")


def _store_k(names: BackwardNames) -> Printed:
    s, m, v = names.s, names.ranks[names.s.key], names.ranks[names.s.value]
    f = DeviceFunction(names, "store_k", f"grads, dk, dv, at, {m}, {v}, sizes", (*s.grid, s.key, s.value))
    first = len(s.products)
    exists = f"({m} < {f.size(s.key)})"
    *keys, values = names.b.keys
    _stored(f, names, keys, s.products, "dk", exists, "[None, :]", first)
    mask = exists if s.value_width == s.extent[s.value] else f"{exists} & ({v} < {s.extent[s.value]})"
    target = f"grads[{2 * first}]"
    place = _offset(f, names, values, {s.value: v})
    f.body.line(f"tl.store({target} + {place}, dv.to({target}.dtype.element_ty), mask={mask})")
    return f.printed("The gradients of the keys and values of a block.")


def _stored(
    f: DeviceFunction, names: BackwardNames, sides: Sequence[OperandGradient], products: Sequence[Dot], source: str,
    exists: str, axis: str, first: int = 0,
) -> None:
    n = 0
    for i, (side, p) in enumerate(zip(sides, products, strict=True)):
        for start, width in p.chunks:
            e = f.body.fresh(names.ranks[p.embed])
            f.body.line(f"{e} = {start} + tl.arange(0, {width}){axis}")
            mask = exists if start + width <= p.size else f"{exists} & ({e} < {p.size})"
            target = f"grads[{first + i}]"
            place = _offset(f, names, side, {p.embed: e})
            f.body.line(f"tl.store({target} + {place}, {source}[{n}].to({target}.dtype.element_ty), mask={mask})")
            n += 1


def _offset(f: DeviceFunction, names: BackwardNames, side: OperandGradient, own: dict[str, str]) -> str:
    """The place in a dense buffer over the ranks of a side; heads of a group have one coordinate."""
    text = ""
    for r, size in zip(side.ranks, side.sizes):
        at = own.get(r, names.ranks[r])
        group = names.b.shared.get(r, 1) if names.s.key in side.ranks else 1
        at = f"{at} // {group}" if group not in (None, 1) else at
        text = at if not text else f"({text}) * {atom(f.body.term(size_term(size)))} + {at}"
    return f"({text})"
