"""Work: what a cascade costs in operations and bytes, counted by walking its Einsums and their iteration spaces.

    moved(tensor)  = footprint of one program's tile · programs · tiles visited      (no cache)
    once(tensor)   = every element crosses once                                       (a perfect cache)

A cascade without a mapping runs Einsum by Einsum (or in `groups`), every intermediate written and read back. With a
mapping it runs as one streaming program per query tile: intermediates stay on chip. Seconds are somebody else's business.
Source of the traffic model: Nayak et al., "FuseMax" (MICRO 2024), section III, and its artifact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

import sympy

from ...patterns.cascade import Cascade, Einsum, Size
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.terms.interval_rules import PLAIN, interval
from ..operations import (
    WIDTH,
    Sizes,
    Tiles,
    Traffic,
    Work,
    ceiling,
    contraction,
    elements,
    is_view,
    least,
    minus,
    operations,
    plus,
    product,
    scaled,
    size_int,
)


class Counted(Protocol):
    """Tiles over some batch ranks: a map, its runs, or their tally."""

    @property
    def batch(self) -> tuple[str, ...]: ...
    @property
    def total(self) -> int: ...
    @property
    def visited(self) -> int: ...
    @property
    def full(self) -> int: ...
    @property
    def partial(self) -> int: ...


# --- traffic ----------------------------------------------------------------------------------------------------


ANYWHERE = (-math.inf, math.inf)


def span(term: Expr, extent: Mapping[str, Size]) -> tuple[float, float] | None:
    """The lowest and highest value of an index term over a tile of these extents at 0, so that their distance is right for
    a tile anywhere: a clamp is left out, since it narrows some tiles alone; None for symbolic sizes, (−∞, ∞) for a gather.
    """
    match term.op:
        case "const":
            return int(term.value), int(term.value)
        case "index":
            size = extent[str(term.attr)]
            return (0, size - 1) if isinstance(size, int) else None
        case "symbol":
            return None
        case "min" | "max":
            return span(term.args[0] if term.args[0].ranks else term.args[1], extent)
        case "mul" | "floordiv" | "mod" if not term.args[1].is_const:
            return ANYWHERE
        case "add" | "sub" | "mul" | "floordiv" | "mod":
            left, right = (span(x, extent) for x in term.args)
            return interval(term, (left, right), PLAIN) if left is not None and right is not None else None
    return ANYWHERE


def footprint(load: Expr, shape: Sequence[Size], extent: Mapping[str, Size]) -> Size:
    """How many elements of a tensor one load touches over these extents."""
    out: Size = 1
    for term, size in zip(load.args, shape):
        if not term.ranks:
            continue
        points = elements(extent, term.ranks)
        found = span(term, extent)
        if found is not None and isinstance(points, int):
            points = int(min(points, found[1] - found[0] + 1))
        out = out * least(points, size)
    return out


def _reads(einsums: Sequence[Einsum]) -> tuple[Expr, ...]:
    return tuple(dict.fromkeys(a for e in einsums for a in e.reads))


def _within(a: Expr, other: Expr, extent: Mapping[str, Size], walked: set[str]) -> bool:
    """Does a tile of another load hold all that this one reads? Values that are the first columns of the keys, for one.

    `walked`: ranks whose index names rows; the same rows are meant where the terms are the same.
    """
    if other.attr != a.attr:
        return False
    pairs = [(x, y) for x, y in zip(a.args, other.args) if x is not y]
    if any(t.op != "index" or t.attr in walked for pair in pairs for t in pair):
        return False
    sizes = [(extent[str(x.attr)], extent[str(y.attr)]) for x, y in pairs]
    return all(isinstance(n, int) and isinstance(w, int) and n <= w for n, w in sizes)


def _written(c: Cascade, sizes: Sizes, name: str) -> Size:
    return product(sizes.shape[name]) * WIDTH[c.tensor[name].dtype]


# --- counting ---------------------------------------------------------------------------------------------------


def count(
    c: Cascade, mapping: TileMapping | None = None, sizes: Mapping[str, int] | None = None, tiles: Counted | None = None, *,
    query: str | None = None, mask_ops: Mapping[str, Size] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
) -> Work:
    """The work of a cascade.

    Without a mapping: each Einsum (or each group, named by the tensors it writes) is a kernel of its own that reads its
    inputs and writes its result. With a mapping, `c` is a streaming cascade (it has an iterative rank): one program per
    `tile_p` rows of rank `query` walks the key tiles; `tiles` says which are visited, else all are; `mask_ops` are
    the element operations a tile saves when it is full. Raises ValueError when a mapping meets a cascade that does not
    stream, or a query rank is unknown.
    """
    bound = Sizes(c, _with_tile(c, mapping, sizes))
    if mapping is None:
        return _whole(c, bound, groups)
    return _streamed(c, mapping, bound, tiles, query, mask_ops or {})


def _with_tile(c: Cascade, mapping: TileMapping | None, sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Sizes with the key tile's symbol bound by the mapping."""
    known = dict(sizes or {})
    if mapping is not None:
        inner = key_tile(c)
        if inner is not None and isinstance(c.rank[inner].size, sympy.Symbol):
            known[str(c.rank[inner].size)] = mapping.tile_m
    return known


@lru_cache(maxsize=1024)
def key_tile(c: Cascade) -> str | None:
    """The rank inside a key tile (m0): reduced by Einsums that walk the iterative rank."""
    outer = [r.name for r in c.ranks if r.iterative]
    inner = [r for e in c.einsums for r in e.over if e.ranks & set(outer)]
    # the value or embed rank of a score product is reduced there as well, but never in a pure row reduction
    for e in reversed(c.einsums):
        if e.over and e.ranks & set(outer) and contraction(e) is None:
            return e.over[0]
    return inner[-1] if inner else None


def _whole(c: Cascade, sizes: Sizes, groups: Sequence[Sequence[str]] | None) -> Work:
    order = list(groups) if groups is not None else [[t] for t in c.producers]
    total = operations(c.einsums, sizes.rank)
    readers: dict[str, set[int]] = {}
    place = {t: i for i, g in enumerate(order) for t in g}
    real = [e for e in c.einsums if not is_view(e)]
    source = sources(c)
    traffic: list[Traffic] = []
    for i, g in enumerate(order):
        seen: set[str] = set()
        for e in (e for e in real if place[e.out.tensor] == i):
            for a in e.reads:
                name = source.get(str(a.attr), str(a.attr))
                if (name in place and place[name] == i) or name in seen:
                    continue
                seen.add(name)
                readers.setdefault(name, set()).add(i)
                n = _written(c, sizes, name)
                traffic.append(Traffic(name, n, n))
        for t in g:
            kept = t in c.outputs or any(
                source.get(str(a.attr), str(a.attr)) == t and place[e.out.tensor] != i for e in real for a in e.reads
            )
            if kept and t not in source:
                n = _written(c, sizes, t)
                traffic.append(Traffic(t, n, n, written=True))
    return replace(total, traffic=tuple(traffic))


def sources(c: Cascade) -> dict[str, str]:
    """Renaming Einsums resolved to the tensor they view."""
    out: dict[str, str] = {}
    for e in c.einsums:
        if is_view(e):
            name = str(e.body.attr)
            out[e.out.tensor] = out.get(name, name)
    return out


def _streamed(
    c: Cascade,
    mapping: TileMapping,
    sizes: Sizes,
    tiles: Counted | None,
    query: str | None,
    mask_ops: Mapping[str, Size],
) -> Work:
    k = _kernel(c, mapping, sizes, tiles, query, mask_ops)
    if tiles is None:
        total = operations(c.einsums, sizes.rank)
    else:
        parts = scaled(k.full, k.tiles.full), scaled(k.partial, k.tiles.partial), scaled(k.program, k.programs)
        total = plus(*parts)
    return replace(
        total, traffic=k.traffic, tiles=k.tiles, programs=k.programs, full_tile=k.full, partial_tile=k.partial,
        program=k.program,
    )


@dataclass(frozen=True)
class Streamed:
    """A streaming kernel under a mapping: one full tile, one partial tile, the rest of one program, and bytes by tensor."""

    full: Work
    partial: Work
    program: Work
    traffic: tuple[Traffic, ...]
    tiles: Tiles
    programs: Size

    @cached_property
    def bytes(self) -> tuple[int, int, int]:
        """Bytes read with no cache, read once, and written."""
        read, written = ([t for t in self.traffic if t.written == w] for w in (False, True))
        return (
            sum(size_int(t.moved) for t in read), sum(size_int(t.once) for t in read), sum(size_int(t.once) for t in written)
        )


def streamed(
    c: Cascade, mapping: TileMapping, sizes: Mapping[str, int], tiles: Counted | None, query: str,
    mask_ops: Mapping[str, Size],
) -> Streamed:
    """What `count` counts of a streaming kernel, without the sums over its programs. Raises ValueError as it does."""
    return _kernel(c, mapping, Sizes(c, _with_tile(c, mapping, sizes)), tiles, query, mask_ops)


def _kernel(
    c: Cascade, mapping: TileMapping, sizes: Sizes, tiles: Counted | None, query: str | None,
    mask_ops: Mapping[str, Size],
) -> Streamed:
    outer, inner, query, batch = _roles(c, query)
    extent = sizes.rank
    programs = ceiling(extent[query], mapping.tile_p) * elements(extent, batch)
    seen = _tiles(programs, extent, outer, tiles, batch, bool(mask_ops))
    one = {**extent, **dict.fromkeys(batch, 1), query: mapping.tile_p, outer: 1, inner: mapping.tile_m}
    full, partial, program = _one_tile(c, outer, tuple(one.items()), tuple(mask_ops.items()))
    traffic = _stream_traffic(c, sizes, one, extent, (outer, inner), query, batch, programs, seen, mapping)
    return Streamed(full, partial, program, traffic, seen, programs)


@lru_cache(maxsize=4096)
def _one_tile(
    c: Cascade, outer: str, one: tuple[tuple[str, Size], ...], mask_ops: tuple[tuple[str, Size], ...]
) -> tuple[Work, Work, Work]:
    """A full tile, a partial tile and the rest of a program: the same however long rows and batch are."""
    extent = dict(one)
    partial = operations([e for e in c.einsums if outer in e.ranks], extent)
    return minus(partial, dict(mask_ops)), partial, operations([e for e in c.einsums if outer not in e.ranks], extent)


@lru_cache(maxsize=1024)
def _roles(c: Cascade, query: str | None) -> tuple[str, str, str, list[str]]:
    """The ranks of a streaming cascade: key tiles, keys of a tile, query, batch."""
    outer = [r.name for r in c.ranks if r.iterative]
    inner = key_tile(c)
    if len(outer) != 1 or inner is None:
        raise ValueError(f"cascade {c.name!r} does not stream: a mapping needs one iterative rank with a tile inside")
    values = _value_ranks(c, inner)
    rows = [r for r in _output_ranks(c) if r not in values]
    if not rows or (query is not None and query not in rows):
        raise ValueError(f"cascade {c.name!r}: its output has no query rank {query or ''}")
    query = query or rows[-1]
    return outer[0], inner, query, [r for r in rows if r != query]


def _output_ranks(c: Cascade) -> list[str]:
    out = c.producers[c.outputs[0]][-1]
    return [str(i.attr) for i in out.out.index if i.op == "index"]


def _stored(e: Expr) -> Expr:
    """What a cast converts."""
    while e.op == "cast":
        e = e.args[0]
    return e


def _value_ranks(c: Cascade, inner: str) -> frozenset[str]:
    """Ranks of the output that only the values have: those of an input, or a view of one, summed over the key tile."""
    plain = {t.name for t in c.inputs} | set(sources(c))
    for e in c.einsums:
        parts = contraction(e)
        if parts is None or inner not in e.over:
            continue
        values = [f for f in parts if (x := _stored(f)).op == "load" and x.attr in plain]
        rest = frozenset[str]().union(*(f.ranks for f in parts if f not in values))
        if values and rest:
            return frozenset[str]().union(*(f.ranks for f in values)) - rest - {inner}
    return frozenset()


def _tiles(
    programs: Size, extent: Mapping[str, Size], outer: str, tiles: Counted | None, batch: list[str],
    masked: bool,
) -> Tiles:
    total = programs * extent[outer]
    if tiles is None:
        return Tiles(total, total, 0, total) if masked else Tiles(total, total, total, 0)
    # a mask that does not depend on some batch ranks is the same in all of them
    repeat = int(elements(extent, [r for r in batch if r not in tiles.batch]))
    return Tiles(tiles.total * repeat, tiles.visited * repeat, tiles.full * repeat, tiles.partial * repeat)


def _stream_traffic(
    c: Cascade, sizes: Sizes, one: Mapping[str, Size], extent: Mapping[str, Size], key: tuple[str, str], query: str,
    batch: list[str], programs: Size, seen: Tiles, mapping: TileMapping,
) -> tuple[Traffic, ...]:
    inputs = {t.name for t in c.inputs}
    row: list[Traffic] = []
    reads = [a for a in _reads(c.einsums) if str(a.attr) in inputs]
    walked = {*key, query, *batch}
    for i, a in enumerate(reads):
        name = str(a.attr)
        others = ((j, x) for j, x in enumerate(reads) if j != i and _within(a, x, one, walked))
        if any(j < i or not _within(x, a, one, walked) for j, x in others):
            continue
        width, shape = WIDTH[c.tensor[name].dtype], sizes.shape[name]
        if a.ranks & set(key):
            moved = seen.visited * footprint(a, shape, one)
        else:
            # a query tile's rows sum up to all rows, however many tiles there are
            rows = {**one, query: extent[query]} if query in a.ranks else one
            times = elements(extent, batch) if query in a.ranks else programs
            moved = times * footprint(a, shape, rows)
        row.append(Traffic(name, moved * width * mapping.split_m if not a.ranks & set(key) else moved * width,
                           least(product(shape) * width, moved * width)))
    for name in c.outputs:
        n = _written(c, sizes, name)
        row.append(Traffic(name, n, n, written=True))
    return tuple(row)

