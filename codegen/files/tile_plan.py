"""Prints which tiles are visited, from the mask's interval over a tile: `planned` as slices, `classes` tile by tile.

    low, high       tables of a load's least and greatest element over tiles; a table of blocks is read as it is
    some, every     is some point of a tile kept, are all?        alive     do all rows of a tile certainly keep a key?
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ...patterns import expr as ex
from ...patterns.cascade import Size
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.terms.affine import affine, says_at_most_zero
from ...patterns.terms.conditions import conjunction, conjuncts
from ..text.print_torch import TorchBody, TorchScope, identifier
from ..text.tile_terms import Corners, Table
from .torch_file import PrintedFunction, Printer, used_names


def planned(p: Printer, m: TileMapping, always: bool, triangles: bool) -> PrintedFunction:
    """The function; its answer is cached where no run-time data decides.

    `always`: full tiles get something added, too. `triangles`: a causal triangle may be one tile.
    """
    f, a, n = p.f, p.f.attention, p.names
    rest = without_causal(p) if triangles and not always else None
    read = rest if rest is not None and not rest.is_const else None
    lines = tile_lines(p, f.mask.keep, read, (m.tile_p, m.tile_m))
    if f.guarded:
        lines += _alive(p)
    given = "None" if rest is None else "p0 == p0" if rest.is_const else "free"
    size = f"({p.batch}, {n.rank(a.query)}, {n.rank(a.key)})"
    alive = "alive" if f.guarded else "None"
    lines.append(f"return plans(some, every, {alive}, {given}, {size}, (TILE_P, TILE_M), {always})")
    return _function(p, "planned", "Which slices of the keys every tile of queries visits.", lines)


def classes(p: Printer, m: TileMapping, bounded: bool) -> PrintedFunction:
    """The function `classes`: empty, partial and full tiles. Its answer is cached where no run-time data decides.

    `bounded`: it takes `drowned`, whether scores are small enough for the fill to hide keys entirely.
    """
    f, a, n = p.f, p.f.attention, p.names
    lines = tile_lines(p, f.mask.keep, None, (m.tile_p, m.tile_m))
    skip = "True" if f.skips or bounded else "False"
    if f.guarded and skip == "True":
        lines += _alive(p)
        skip = "alive"
    if bounded:
        skip = "drowned" if skip == "True" else f"{skip} if drowned else False"
    shape = ", ".join(f"-(-({n.rank(r)}) // {t})" for r, t in ((a.query, "TILE_P"), (a.key, "TILE_M")))
    lines.append(f"return tile_classes(some, every, {skip}, ({shape}))")
    doc = "Which tiles are empty (0), partial (1) and full (2)."
    return _function(p, "classes", doc, lines, ("drowned",) if bounded else ())


def _corners(p: Printer, lines: list[str]) -> list[str]:
    """Lines that make the coordinates that others use: of tiles, and of the batch."""
    a, n = p.f.attention, p.names
    used = used_names("\n".join(lines))
    return [
        f"{'pn' if 'pn' in used else '_'}, p0, p1 = corners({n.rank(a.query)}, TILE_P, 1)",
        f"{'mn' if 'mn' in used else '_'}, m0, m1 = corners({n.rank(a.key)}, TILE_M, 0)",
        *(f"{p.ranks[r]} = {p.coordinate(r)}" for r in p.f.heads.order if p.ranks[r] in used),
    ]


def tile_lines(
    p: Printer, keep: Expr, rest: Expr | None, tile: tuple[int, int], names: tuple[str, str] = ("TILE_P", "TILE_M")
) -> list[str]:
    """Lines that find `some` and `every` of a mask over tiles, and `free`, every of `rest`. `names`: of a tile's lengths.

    They use the tiles' numbers `pn`, `mn` and their first and last coordinates `p0`, `p1`, `m0`, `m1`.
    """
    a = p.f.attention
    corners = Corners.of(a.query, a.key, *tile)
    every, some = corners.predicate(keep)
    wanted = {"some": some, "every": every}
    if rest is not None:
        wanted["free"] = corners.predicate(rest)[0]
    tables = _Tables(p, {a.query: names[0], a.key: names[1]}, corners.tile)
    reading = [line for t in corners.tables.values() for line in tables.read(t)]
    body = TorchBody(_scope(p, corners, tables), wanted.values())
    texts = {name: body.term(e) for name, e in wanted.items()}
    return [*reading, *(x.strip() for x in body.lines), *(f"{name} = {_tensor(text)}" for name, text in texts.items())]


def _tensor(text: str) -> str:
    """A predicate that holds everywhere or nowhere, as a tensor."""
    return {"True": "p0 == p0", "False": "p0 != p0"}.get(text, text)


def without_causal(p: Printer) -> Expr | None:
    """The mask without its condition `key ≤ query`, or None where it has no such condition."""
    a = p.f.attention
    after = affine(ex.index(a.key) - ex.index(a.query))
    parts = conjuncts(p.f.mask.keep)
    kept = tuple(e for e in parts if not says_at_most_zero(e, after))
    return conjunction(kept) if len(kept) < len(parts) else None


def _function(p: Printer, name: str, doc: str, lines: list[str], given: tuple[str, ...] = ()) -> PrintedFunction:
    """The function of these lines: its parameters are what they use of tensors and sizes, then `given`."""
    lines = [*_corners(p, lines), *lines]
    used = used_names("\n".join(lines))
    data = [t for t in p.names.tensors.values() if t in used]
    params = (*data, *(x for x in p.names.symbols.values() if x in used), *given)
    head = f'def {name}({", ".join(params)}):\n    """{doc}"""'
    text = "\n".join([head, *(f"    {x}" for x in lines)])
    return PrintedFunction(name, params, text if data else f"@lru_cache(maxsize=256)\n{text}")


class _Tables:
    """Names and shapes of the tables of least and greatest elements."""

    def __init__(self, p: Printer, tile: Mapping[str, str], length: Mapping[str, int]) -> None:
        self.p, self.tile, self.length = p, tile, length
        self.names: dict[str, str] = {}
        self.shapes: dict[str, tuple[Size, ...]] = {}
        self.taken = set(p.taken)

    def read(self, t: Table) -> list[str]:
        """Lines that make one tensor's tables."""
        tensor = self.p.names.tensors[t.tensor]
        names = []
        for end in ("low", "high"):
            names.append(identifier(f"{tensor}_{end}", self.taken))
            self.taken.add(names[-1])
        low, high = names
        shape = list(self.p.names.c.tensor[t.tensor].shape)
        lines: list[str] = []
        source = (tensor, tensor)
        for d, rank, block in t.blocked:
            many = self.tile[rank] if block == 1 else str(self.length[rank] // block)
            lines.append(f"{low}, {high} = extremes({source[0]}, {source[1]}, {many}, {d})")
            source, shape[d] = (low, high), _count(rank)
        for d in t.whole:
            lines.append(f"{low}, {high} = {source[0]}.amin({d}, keepdim=True), {source[1]}.amax({d}, keepdim=True)")
            source, shape[d] = (low, high), 1
        for end, name in (("low", low), ("high", high)):
            self.names[f"{t.key}:{end}"] = name
            self.shapes[f"{t.key}:{end}"] = tuple(shape)
        return lines


def _count(rank: str) -> Size:
    """A symbol for the number of tiles of a rank."""
    return sympy.Symbol(f"tiles of {rank}", integer=True, positive=True)


def _scope(p: Printer, c: Corners, tables: _Tables) -> TorchScope:
    names: dict[Expr, str] = {}
    extent: dict[str, Size] = {}
    for r, letter in ((c.query, "p"), (c.key, "m")):
        names |= {c.low[r]: f"{letter}0", c.high[r]: f"{letter}1", c.number[r]: f"{letter}n"}
        extent[str(c.number[r].attr)] = _count(r)
        extent |= {str(end[r].attr): p.names.c.rank[r].size for end in (c.low, c.high)}
    scope = p.scope(names, tables.names, views=False)
    scope.shapes = {**scope.shapes, **tables.shapes}
    scope.extent = {**scope.extent, **extent}
    return scope


def _alive(p: Printer) -> list[str]:
    """Lines that find the tiles of queries all of whose rows are proved to keep a key."""
    query = p.f.attention.query
    proof = p.f.proof[0]
    for t in p.f.proof[1:]:
        proof = proof | t
    body = TorchBody(p.scope({ex.index(query): "row"}, views=False), [proof])
    text = body.term(proof)
    start = [f"row = axis({p.names.rank(query)}, 1)"]
    return [*start, *(x.strip() for x in body.lines), f"rows = ({text}).squeeze(-1)",
            "alive = extremes(rows, rows, TILE_P, -1)[0]"]
