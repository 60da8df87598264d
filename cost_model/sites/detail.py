"""What stands behind one attention's costs, for reading: passes before and after, bytes by tensor, operations by kind.

Counted from the cascade as lifted, from its one-pass form and from a mapping; made when somebody asks, then plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, Size, bind
from ...patterns.mapping import TileMapping
from ...patterns.verdict import Obstacle
from ..count.describe import describe
from ..count.passes import families, report
from ..count.subject import shape, subject, work
from ..count.tiles import NOTHING, Data
from ..count.work import count
from ..json import Json, Read
from ..operations import Traffic, size_int
from ..time.predict import tiles_of


@dataclass(frozen=True)
class PassCount:
    """Passes over one rank family: in all, and of each input. `footprint`: elements that live between them, as text."""

    ranks: tuple[str, ...]
    count: int
    footprint: str
    inputs: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of a tensor over the memory's edge: `moved` with no cache, `once` if every element crosses once."""

    tensor: str
    moved: int
    once: int
    written: bool


@dataclass(frozen=True)
class Revisit:
    """A tensor that a later pass reads again, and one way to have it there: kept on chip, written and read, or recomputed.

    Numbers are for all query rows; text where a size is open.
    """

    tensor: str
    how: str
    held_bytes: int | str
    moved_bytes: int | str
    flops: int | str


@dataclass(frozen=True)
class PlannedForm:
    """The best form of the cascade with this many passes over the keys, and the rewrites that lead there."""

    passes: int
    rewrites: tuple[str, ...]
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """`before`: the cascade as lifted, Einsum by Einsum; `after`: its one-pass form under `mapping`, where it has one."""

    passes_before: tuple[PassCount, ...] = ()
    passes_after: tuple[PassCount, ...] = ()
    bytes_before: tuple[TensorBytes, ...] = ()
    bytes_after: tuple[TensorBytes, ...] = ()
    flops: Mapping[str, int] = field(default_factory=dict, hash=False)
    operations: Mapping[str, int] = field(default_factory=dict, hash=False)
    mapping: str = ""
    revisits: tuple[Revisit, ...] = ()
    forms: tuple[PlannedForm, ...] = ()

    def to_dict(self) -> dict[str, Json]:
        """Nested plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(d: Read) -> Detail:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        passes = {k: tuple(PassCount(**{**p, "ranks": tuple(p["ranks"])}) for p in d[k]) for k in _PASSES}
        moved = {k: tuple(TensorBytes(**t) for t in d[k]) for k in _BYTES}
        revisits = tuple(Revisit(**r) for r in d["revisits"])
        forms = tuple(PlannedForm(f["passes"], tuple(f["rewrites"]), tuple(f["conditions"])) for f in d["forms"])
        return Detail(**{**d, **passes, **moved, "revisits": revisits, "forms": forms})


_PASSES = ("passes_before", "passes_after")
_BYTES = ("bytes_before", "bytes_after")


def detail(
    c: Cascade, one_pass: Cascade | None, mapping: str, sizes: Mapping[str, int], data: Data = NOTHING
) -> Detail:
    """The detail of a lifted cascade at these sizes. `mapping` is the text of how its one-pass form is tiled, or ""."""
    written = count(c, None, sizes)
    before = Detail(_passes(c, sizes), bytes_before=_bytes(written.traffic))
    s = subject(c)
    if isinstance(s, Obstacle) or not mapping or one_pass is None:
        flops, operations = _counts(written.matrix), _counts(written.ops)
        return _described(replace(before, flops=flops, operations=operations), c, 1, sizes)
    tiling = TileMapping.parse(mapping)
    at = shape(s.cascade, s.attention, sizes)
    jobs = tiles_of(c, tiling, sizes, data)
    assert not isinstance(jobs, Obstacle), jobs
    tiled = work(s, at, tiling, sizes, jobs)
    known = {**sizes, **_tile(one_pass, tiling)}
    after = replace(
        before, passes_after=_passes(one_pass, known), bytes_after=_bytes(tiled.traffic), flops=_counts(tiled.matrix),
        operations=_counts(tiled.ops), mapping=mapping,
    )
    return _described(after, c, tiling.tile_p, sizes)


def _described(d: Detail, c: Cascade, rows: int, sizes: Mapping[str, int]) -> Detail:
    """What must live between the passes over the keys, with its choices for `rows` query rows, and the forms of fewer."""
    view = attention(c)
    if isinstance(view, Obstacle):
        return d
    found = describe(view.cascade, sizes, query=view.query, rows=rows, family=(view.key,))
    families = [f for f in found["families"] if f["ranks"] == [view.key]]
    revisits = tuple(
        Revisit(r["tensor"], x["how"], x["held_bytes"], x["moved_bytes"], x["flops"])
        for f in families for r in f["revisited"] for x in r["choices"]
    )
    forms = tuple(
        PlannedForm(
            f["passes"],
            tuple(r["name"] for r in f["rewrites"]),
            tuple(s for r in f["rewrites"] for s in r["conditions"]),
        )
        for f in found["forms"]
    )
    return replace(d, revisits=revisits, forms=forms)


def _tile(one_pass: Cascade, tiling: TileMapping) -> dict[str, int]:
    """The key tile's open size, which the mapping binds."""
    from ..count.work import key_tile

    inner = key_tile(one_pass)
    size = one_pass.rank[inner].size if inner is not None else 1
    return {} if isinstance(size, int) else {str(s): tiling.tile_m for s in size.free_symbols if str(size) == str(s)}


def _passes(c: Cascade, sizes: Mapping[str, int]) -> tuple[PassCount, ...]:
    found = (report(c, f) for f in families(c))
    return tuple(PassCount(p.family, p.count, str(bind(p.footprint, sizes)), p.inputs) for p in found if p.count)


def _bytes(traffic: Sequence[Traffic]) -> tuple[TensorBytes, ...]:
    return tuple(TensorBytes(t.tensor, size_int(t.moved), size_int(t.once), t.written) for t in traffic)


def _counts(values: Mapping[str, Size]) -> dict[str, int]:
    return {k: size_int(n) for k, n in values.items()}
