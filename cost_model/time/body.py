"""Our tiled bodies on a CPU: which calls the emitted code makes, and what they take.

    block     consecutive query tiles whose key slices lie alike: several of them are folded into the batch of a call
    sdpa      the fused kernel on the slice of a block, with what the scores get added where a tile of it is partial
    product   product, score and row rule, product, for some heads and at most SLICE keys of a query tile at a time
    selected  the same for the keys that each row names, gathered, for some rows and heads at a time
Runs of the same calls are priced once. The code generator's skeleton (codegen/skeletons/cpu.py) is what this models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...patterns import expr as ex
from ...patterns.attention.score import bends
from ...patterns.cascade import bind
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.masks.selection import Selection
from ...patterns.masks.split import PARTIAL, TileRuns, conjuncts
from ...patterns.operators import facts
from ...patterns.terms.affine import affine, says_at_most_zero
from ..count.subject import Shape, Subject
from ..count.tiles import Jobs, expected, tile_map
from ..devices.device import Device
from ..operations import EXPONENTIALS, INDEX, WIDTH, term_operations
from .beforehand import fetch_seconds
from .cost import Cost
from .cpu_tiles import CALL_SCORES, FEW, GATHERED, GATHERED_ROWS, PIECE_ROWS, PIECES_PER_THREAD, SCORES, SLICE
from .host import Bill, Host, causal_pairs

# ATen calls around one call of the kernel: slices, views, the copy of the result; fewer where the tiles of a block were cut
# before. Around a whole attention: planning.
AROUND_CALL = 25
AROUND_NEXT = 13
AROUND_STEP = 12
AROUND_ALL = 12
# … and around the plan of a mask on run-time data: the extremes of its tiles, rows with a key, lists for Python.
AROUND_DATA = 40
# Around a turn of the selected body, and around the keys that its rows name; an index put in order, among dozens.
AROUND_TURN = 24
AROUND_NAMED = 20
SORT_SECONDS = 2e-8
# Torch's tape for an element of a gathered key, beside the backward's products: its gradient, and where that is added up.
TAPE_SECONDS = 2e-9
# torch.exp takes so much longer where the result underflows, as it does behind a mask.
UNDERFLOWING_EXP = 7.0


@dataclass(frozen=True)
class KernelCall:
    """One call of the inner kernel: `tiles` query tiles of `rows` rows, each on `keys` keys."""

    tiles: int
    rows: int
    keys: int
    masked: bool
    batch: int
    triangle: bool = False
    around: int = AROUND_CALL


def tiled(s: Subject, at: Shape, mapping: TileMapping, jobs: Jobs, device: Device) -> Cost:
    """Seconds of the tiled body over all its calls."""
    host, bill = Host(device), Bill()
    bill.add("launch", host.h.operator_call_seconds + AROUND_ALL * host.h.operator_seconds)
    pairs = 0
    found = blocks(s, jobs, mapping, at)
    if mapping.body == "product":
        _widened(host, bill, s, at)
        for b in tiles(s, found, at, mapping):
            pairs += b.tiles * at.batch * b.rows * b.keys
            if b.keys:
                _product(host, bill, s, at, b)
    else:
        for call, count in Counter(calls(found, s, at, mapping, host.threads)).items():
            pairs += count * call.batch * call.tiles * _pairs(call)
            one = Bill()
            _sdpa(host, one, s, at, call)
            for name, seconds in one.parts.items():
                bill.add(name, seconds * count)
    if s.mask.keep is not ex.TRUE:
        _added(host, bill, s, found, at, mapping)
    share = pairs / max(at.batch * at.queries * at.keys, 1)
    bill.add("memory", host.stream(bias_bytes(s, at, share)))
    bill.add("element", fetch_seconds(host, s, at, pairs))
    if mapping.body != "product":
        host.biases(biases(s, at, share), mapping.tile_p / at.queries, bill, chosen=s.mask.keep is not ex.TRUE)
    bill.flops, bill.exps = 2 * pairs * (at.embed + at.value), pairs
    bill.bytes = WIDTH[s.dtype] * (at.batch * at.queries + at.batch // at.group * at.keys) * (at.embed + at.value)
    bill.add("fault", host.fresh(WIDTH[s.dtype] * at.batch * at.queries * at.value))
    return bill.cost(device, f"our-{mapping.body}", s.dtype)


def selected(s: Subject, at: Shape, chosen: Selection, device: Device) -> Cost:
    """Seconds of the body that gathers the keys which each row names."""
    host, bill = Host(device), Bill()
    first, keyed = bind(chosen.first, at.symbols), at.batch // at.group
    named = at.extent[chosen.slot] * chosen.block + (first if isinstance(first, int) else at.keys)
    lists = math.prod(at.extent[r] for r in chosen.slots.ranks)
    room = GATHERED * host.threads // max(named * max(at.embed, at.value), 1)
    rows = max(1, min(GATHERED_ROWS, room, at.queries))
    tiles = -(-at.queries // rows) * (at.batch // _heads(s, at))
    together = max(1, min(room // rows, _heads(s, at) // at.group))
    turns = -(-at.queries // rows) * -(-keyed // together)
    moved = together * rows * named * WIDTH[s.dtype]
    points = together * at.group * rows * named
    one = Bill()
    one.add("matrix", host.product(together * rows, at.group, named, at.embed, "f32"))
    one.add("matrix", host.product(together * rows, at.group, at.value, named, "f32"))
    for width in (at.embed, at.value):
        # read where it lies in the cache, written beside what was there
        host.point("copy", s.dtype, together * rows * named * width, 2 * moved * width, one)
    ops = (*pointwise(s, True), "where")
    for op in ops:
        host.point(op, "f32", points, 0, one)
    one.add("launch", 2 * host.h.product_seconds + (len(ops) + AROUND_TURN) * host.h.operator_seconds)
    for name, seconds in one.parts.items():
        bill.add(name, seconds * turns)
    bill.add("element", lists * SORT_SECONDS / host.gain("element", lists))
    bill.add("launch", host.h.operator_call_seconds + tiles * AROUND_NAMED * host.h.operator_seconds)
    pairs = at.batch * at.queries * named
    bill.flops, bill.exps = 2 * pairs * (at.embed + at.value), pairs
    bill.bytes = WIDTH[s.dtype] * keyed * at.queries * named * (at.embed + at.value)
    bill.add("fault", host.fresh(WIDTH[s.dtype] * at.batch * at.queries * at.value))
    return bill.cost(device, "our-selected", s.dtype)


def scattered(s: Subject, at: Shape, chosen: Selection, device: Device) -> Cost:
    """Seconds of what the gathered body's gradients take beside the products: each key's is written, read and added."""
    host, bill = Host(device), Bill()
    first = bind(chosen.first, at.symbols)
    named = at.extent[chosen.slot] * chosen.block + (first if isinstance(first, int) else at.keys)
    elements = at.batch // at.group * at.queries * named * (at.embed + at.value)
    bill.add("element", elements * TAPE_SECONDS / host.gain("element", elements))
    # each is written, read, and added to what its key has by then
    bill.bytes = 3 * 4 * elements
    cost = bill.cost(device, "our-selected", s.dtype)
    return replace(cost, backward=cost.seconds)


def tiles(s: Subject, found: Sequence[QueryBlock], at: Shape, mapping: TileMapping) -> Iterator[QueryBlock]:
    """Blocks for the product body, which takes one query tile at a time."""
    if at.queries * at.keys <= FEW:
        yield QueryBlock(1, at.queries, at.keys, s.mask.keep is not ex.TRUE)
    elif s.mask.keep is ex.TRUE:
        yield from _strips(at, mapping)
    else:
        yield from found


def _strips(at: Shape, mapping: TileMapping) -> tuple[QueryBlock, ...]:
    """Query tiles that see every key."""
    whole, rest = divmod(at.queries, mapping.tile_p)
    strips = ((whole, mapping.tile_p), (1, rest))
    return tuple(QueryBlock(n, rows, at.keys, False) for n, rows in strips if n and rows)


def calls(found: Sequence[QueryBlock], s: Subject, at: Shape, mapping: TileMapping, threads: int) -> Iterator[KernelCall]:
    """The calls of one attention, block by block."""
    outer = at.batch // _heads(s, at)
    added = added_to_full(s)
    if at.queries * at.keys <= FEW or (s.mask.keep is ex.TRUE and not added):
        # nothing to skip: the whole at once
        yield KernelCall(1, at.queries, at.keys, added or s.mask.keep is not ex.TRUE, at.batch)
        return
    if s.mask.keep is ex.TRUE:
        found = _strips(at, mapping)
    for b in (replace(b, masked=b.masked or added) for b in found):
        if b.masked and not (shifted(s) and not added):
            # what a tile gets added is its own: no two of them go into one call
            yield from [KernelCall(1, b.rows, b.keys, b.masked, at.batch, b.triangle)] * b.tiles
            continue
        if b.tiles == 1 or b.triangle:
            yield KernelCall(1, b.rows, b.keys, b.masked, at.batch, b.triangle)
            continue
        most = folds(at.batch // outer, b.rows, b.keys, threads)
        for done in range(0, b.tiles, most):
            around = AROUND_NEXT if done else AROUND_CALL
            tiles = min(most, b.tiles - done)
            yield from [KernelCall(tiles, b.rows, b.keys, b.masked, at.batch // outer, around=around)] * outer


def folds(heads: int, rows: int, keys: int, threads: int) -> int:
    """How many query tiles go into one call."""
    pieces = PIECES_PER_THREAD * threads
    return max(1, -(-CALL_SCORES // max(heads * rows * keys, 1)), -(-pieces // (heads * -(-rows // PIECE_ROWS))))


def _heads(s: Subject, at: Shape) -> int:
    return at.extent[s.attention.batch[-1]] if s.attention.batch else 1


@dataclass(frozen=True)
class QueryBlock:
    """Consecutive query tiles whose slices lie alike, `rows` rows each; a triangle is one tile on its own keys.

    `cut` is about the share of the slices' pairs that the mask forbids.
    """

    tiles: int
    rows: int
    keys: int
    masked: bool
    triangle: bool = False
    cut: float = 0.0


def blocks(s: Subject, jobs: Jobs, mapping: TileMapping, at: Shape) -> tuple[QueryBlock, ...]:
    """The blocks of a tile map, in order; none where nothing is masked."""
    if jobs.map is None:
        # conditions on run-time data keep every tile, as far as is known
        whole, rest = divmod(at.queries, mapping.tile_p)
        strips = ((whole, mapping.tile_p), (1, rest)) if loaded(s) else ()
        return tuple(QueryBlock(n, rows, at.keys, True) for n, rows in strips if n and rows)
    # batch entries run together: a slice covers what any of them visits
    together = jobs.map.merged()
    count, open_ = together.counts(), together.counts(PARTIAL)
    first, last = together.ends
    bound = _bound(s, together, mapping, at)
    walk = _Walk(mapping.tile_p, mapping.tile_m, at.keys)
    rows = zip(count.tolist(), first.tolist(), last.tolist(), open_.tolist(), bound.tolist())
    for i, (k, a, b, p, bounded) in enumerate(rows):
        height = min(mapping.tile_p, at.queries - i * mapping.tile_p)
        walk.add(i, height, k, a, b, p, bounded)
    return tuple(walk.out)


class _Walk:
    """Joins query tiles to blocks: triangles along the diagonal, else tiles whose one slice lies alike."""

    def __init__(self, tile_p: int, tile_m: int, keys: int) -> None:
        self.tile_p, self.tile_m, self.keys = tile_p, tile_m, keys
        self.out: list[QueryBlock] = []
        self.place: tuple[int, int, bool] | None = None
        self.start = self.stop = 0

    def add(self, i: int, height: int, count: int, first: int, last: int, partial: int, bounded: bool) -> None:
        p0, width = i * self.tile_p, last - first
        diagonal = (last - 1) * self.tile_m < p0 + height <= last * self.tile_m
        if count and count == width and diagonal and not bounded and self._triangle(first * self.tile_m, p0, height):
            return
        # about half of a partial tile is forbidden
        cut = (width - count + 0.5 * partial) / max(width, 1)
        if 5 * count < 4 * width:
            self._alone(height, min(count * self.tile_m, self.keys), partial > 0, 0.5 * partial / max(count, 1))
            return
        m0, m1 = first * self.tile_m, min(last * self.tile_m, self.keys)
        place = (m0 - p0, m1 - p0, partial > 0 or count < width)
        if place == self.place and height == self.tile_p:
            self.out[-1] = replace(self.out[-1], tiles=self.out[-1].tiles + 1)
            return
        self._alone(height, m1 - m0, place[2], cut)
        self.place = place if height == self.tile_p else None

    def _alone(self, height: int, keys: int, masked: bool, cut: float) -> None:
        self.out.append(QueryBlock(1, height, keys, masked, cut=cut))
        self.place = None

    def _triangle(self, first: int, p0: int, height: int) -> bool:
        if first == p0:
            self.out.append(QueryBlock(1, height, height, False, True))
            self.start = p0
        elif self.out and self.out[-1].triangle and (self.start, self.stop) == (first, p0):
            self.out[-1] = QueryBlock(1, p0 + height - first, p0 + height - first, False, True)
        else:
            return False
        self.stop = p0 + height
        self.place = None
        return True


def _bound(s: Subject, together: TileRuns, mapping: TileMapping, at: Shape) -> NDArray[np.bool_]:
    """Query tiles that visit one in which the mask forbids more than keys after the query.

    In the others the fused kernel's own causal mode does it.
    """
    rest = without_causal(s)
    if rest is None or mapping.body != "sdpa" or added_to_full(s):
        return together.has_visited()
    if rest is ex.TRUE:
        return np.zeros(together.rows, np.bool_)
    a = s.attention
    mask = replace(s.mask, keep=rest)
    tiles = tile_map(mask, a.query, a.key, at.extent, at.symbols, mapping.tile_p, mapping.tile_m)
    assert tiles is not None
    return together.outside(tiles.merged())


def has_triangles(s: Subject) -> bool:
    """May a causal triangle be left to the fused kernel's own causal mode?"""
    return without_causal(s) is not None and not added_to_full(s)


@lru_cache(maxsize=256)
def without_causal(s: Subject) -> Expr | None:
    """The mask without its condition `key ≤ query`, or None where it has no such condition."""
    a = s.attention
    after = affine(ex.index(a.key) - ex.index(a.query))
    parts = conjuncts(expected(s.mask.keep))
    kept = [e for e in parts if not says_at_most_zero(e, after)]
    if len(kept) == len(parts):
        return None
    out = ex.TRUE
    for e in kept:
        out = out & e
    return out


@lru_cache(maxsize=256)
def added_to_full(s: Subject) -> bool:
    """Does a full tile get something added that varies with the key (a bias, slopes)?"""
    a = s.attention
    made = {e.out.tensor for e in a.products}
    holds: dict[Expr, bool] = {}
    for t in ex.walk(s.mask.full):
        holds[t] = (t.op == "load" and str(t.attr) in made) or any(holds[x] for x in t.args)
    return any(
        a.key in x.ranks and not holds[x] for t in ex.walk(s.mask.full) if t.op != "load" and holds[t] for x in t.args
    )


def bias_bytes(s: Subject, at: Shape, share: float = 1.0) -> int:
    """Bytes of biases with an element for each query and key, of which a kernel reads a share."""
    return sum(WIDTH[dtype] * n for dtype, n in biases(s, at, share))


def biases(s: Subject, at: Shape, share: float = 1.0) -> tuple[tuple[str, int], ...]:
    """(type, elements that are read) of each tensor in the score with an element for each query and key."""
    a = s.attention
    made = {e.out.tensor for e in a.products}
    loads = dict.fromkeys(ex.loads(s.mask.full))
    read = (x for x in loads if str(x.attr) not in made and _by_pairs(x, a.query, a.key))
    return tuple((x.dtype, round(share * math.prod(at.extent[r] for r in x.ranks))) for x in read)


def _by_pairs(x: Expr, query: str, key: str) -> bool:
    """Does a load have one coordinate for the query, and another one for the key?"""
    rows, columns = ([d for d, i in enumerate(x.args) if r in i.ranks] for r in (query, key))
    return any(d != k for d in rows for k in columns)


@lru_cache(maxsize=256)
def by_sdpa(s: Subject) -> bool:
    """Can SDPA's kernel do it: one product, linear in the score, a softmax? The code generator has the last word."""
    a = s.attention
    if len(a.products) != 1 or [e.op for e in a.row][:1] != ["max"]:
        return False
    exponential = any(facts(t.op).law == "exponential" for t in ex.walk(a.weight))
    return exponential and not bends(s.mask.full, {e.out.tensor for e in a.products})


def _pairs(c: KernelCall) -> int:
    return causal_pairs(c.rows, c.keys) if c.triangle else c.rows * c.keys


def _sdpa(host: Host, bill: Bill, s: Subject, at: Shape, c: KernelCall) -> None:
    batch = c.batch * c.tiles
    host.attention(
        batch, c.rows, c.keys, at.embed, at.value, s.dtype, bill, masked=c.masked, causal=c.triangle, group=at.group,
        mask_dtype="f32",
    )
    bill.add("launch", c.around * host.h.operator_seconds)
    host.point("copy", s.dtype, batch * c.rows * at.value, 0, bill)


def _product(host: Host, bill: Bill, s: Subject, at: Shape, b: QueryBlock) -> None:
    """The query tiles of a block, each for a few heads and at most SLICE keys at a time."""
    rows, keys, count = b.rows, b.keys, b.tiles
    slices = -(-keys // SLICE)
    room = max(1, SCORES * host.threads // max(rows * min(keys, SLICE), 1))
    heads = at.batch if room >= at.batch else max(at.group, min(_heads(s, at), room) // at.group * at.group)
    steps = -(-at.batch // heads) * slices
    points = heads * rows * -(-keys // slices)
    one = Bill()
    # heads that share keys lie below one another
    shared, below = heads // at.group, at.group * rows
    one.add("matrix", host.product(shared, below, keys // slices, at.embed, "f32"))
    one.add("matrix", host.product(shared, below, at.value, keys // slices, "f32"))
    # by the next query tile, the other heads' operands have passed through the cache
    moved = host.stream(at.batch // at.group * keys * (at.embed + at.value) * WIDTH["f32"])
    one.add("memory", moved * shared / (at.batch // at.group) / slices)
    ops = pointwise(s, b.masked)
    for op in ops:
        host.point(op, "f32", points, 0, one)
        if op == "exp":
            host.point(op, "f32", round(points * b.cut * UNDERFLOWING_EXP), 0, one)
    one.add("launch", 2 * host.h.product_seconds + (len(ops) + AROUND_STEP) * host.h.operator_seconds)
    for name, seconds in one.parts.items():
        bill.add(name, seconds * steps * count * (host.h.step_factor if name != "launch" else 1.0))
    bill.add("launch", AROUND_CALL * host.h.operator_seconds * -(-at.batch // heads) * count)


def _widened(host: Host, bill: Bill, s: Subject, at: Shape) -> None:
    """The product body computes in fp32: narrower operands are converted first."""
    if WIDTH[s.dtype] >= WIDTH["f32"]:
        return
    points = at.batch * at.queries * at.embed + at.batch // at.group * at.keys * (at.embed + at.value)
    # read, and written to lines that are fetched first
    host.point("cast", "f32", points, points * (WIDTH[s.dtype] + 2 * WIDTH["f32"]), bill)
    bill.add("launch", 3 * host.h.operator_seconds)


@lru_cache(maxsize=256)
def pointwise(s: Subject, masked: bool) -> tuple[str, ...]:
    """Operators over all elements of a block: the score, the row rule's reductions, the weight and its cast."""
    a = s.attention
    score = a.score if masked else s.mask.full
    grid: Mapping[str, int] = {r: 2 if r in (a.query, a.key) else 1 for r in s.cascade.rank}
    out = [op for op, n in term_operations(score, grid).items() if n == 4 and op not in (INDEX, "cast")]
    out += [str(e.op) for e in a.row]
    out += [t.op for t in ex.walk(a.weight) if t.op in EXPONENTIALS]
    return (*out, "sub")


def _added(host: Host, bill: Bill, s: Subject, found: Sequence[QueryBlock], at: Shape, mapping: TileMapping) -> None:
    """What the scores get added.

    Made once for the distances that any slice holds, and cut out for each block, where it follows from the distance of key
    and query; else made for each tile, with run-time data after the least and greatest element of every tile.
    """
    a = s.attention
    cut = [b for b in found if b.masked and not b.triangle]
    if at.queries * at.keys <= FEW:
        host.chosen(s.mask.keep, {**at.extent, a.query: at.queries, a.key: at.keys}, bill)
    elif not shifted(s):
        for rows, keys, count in _sizes(cut):
            one = Bill()
            host.chosen(s.mask.keep, {**at.extent, a.query: rows, a.key: keys}, one)
            for name, seconds in one.parts.items():
                bill.add(name, seconds * count)
        bill.add("launch", AROUND_DATA * host.h.operator_seconds * loaded(s))
    elif cut:
        rows = min(mapping.tile_p, at.queries)
        reach = max(b.keys for b in cut)
        host.chosen(s.mask.keep, {**at.extent, a.query: rows, a.key: reach + rows}, bill)


def _sizes(found: Sequence[QueryBlock]) -> Iterator[tuple[int, int, int]]:
    """(rows, keys, how many query tiles) of some blocks."""
    out: Counter[tuple[int, int]] = Counter()
    for b in found:
        out[b.rows, b.keys] += b.tiles
    yield from ((rows, keys, n) for (rows, keys), n in out.items())


@lru_cache(maxsize=256)
def shifted(s: Subject) -> bool:
    """Does the mask follow from the distance of key and query alone?"""
    a = s.attention
    compared = [t for t in ex.walk(s.mask.keep) if t.op in ex.COMPARISONS and t.ranks]
    forms = [affine(t.args[0]) - affine(t.args[1]) for t in compared if t.args[0].dtype in ex.INTEGERS]
    apart = all(f.coefficient(ex.index(a.key)) == -f.coefficient(ex.index(a.query)) for f in forms)
    plain = all(atom in (ex.index(a.key), ex.index(a.query)) or not atom.ranks for f in forms for atom in f.atoms)
    return len(forms) == len(compared) and apart and plain and not loaded(s)


@lru_cache(maxsize=256)
def loaded(s: Subject) -> bool:
    """Does the mask depend on run-time data?"""
    return bool(ex.loads(s.mask.keep))
