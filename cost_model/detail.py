"""What stands behind one attention's costs, for reading: passes before and after, bytes by tensor, operations by kind.

Counted from the cascade as lifted, from its one-pass form and from a mapping; made when somebody asks, then plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..patterns.cascade import Cascade, bind
from ..patterns.mapping import Mapping as Tiling
from ..patterns.recognise import Miss
from .passes import families, report
from .predict import tiles_of
from .subject import shape, subject, work
from .work import count, size_int


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
class Detail:
    """`before`: the cascade as lifted, Einsum by Einsum; `after`: its one-pass form under `mapping`, where it has one."""

    passes_before: tuple[PassCount, ...] = ()
    passes_after: tuple[PassCount, ...] = ()
    bytes_before: tuple[TensorBytes, ...] = ()
    bytes_after: tuple[TensorBytes, ...] = ()
    flops: Mapping[str, int] = field(default_factory=dict, hash=False)
    operations: Mapping[str, int] = field(default_factory=dict, hash=False)
    mapping: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Detail:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        passes = {k: tuple(PassCount(**{**p, "ranks": tuple(p["ranks"])}) for p in d[k]) for k in _PASSES}
        moved = {k: tuple(TensorBytes(**t) for t in d[k]) for k in _BYTES}
        return Detail(**{**d, **passes, **moved})


_PASSES = ("passes_before", "passes_after")
_BYTES = ("bytes_before", "bytes_after")


def detail(c: Cascade, one_pass: Cascade | None, mapping: str, sizes: Mapping[str, int]) -> Detail:
    """The detail of a lifted cascade at these sizes. `mapping` is the text of how its one-pass form is tiled, or ""."""
    written = count(c, None, sizes)
    before = Detail(_passes(c, sizes), bytes_before=_bytes(written.traffic))
    s = subject(c)
    if isinstance(s, Miss) or not mapping or one_pass is None:
        flops, operations = _counts(written.matrix), _counts(written.ops)
        return Detail(before.passes_before, (), before.bytes_before, (), flops, operations)
    tiling = Tiling.parse(mapping)
    at = shape(s.cascade, s.attention, sizes)
    jobs = tiles_of(c, tiling, sizes)
    assert not isinstance(jobs, Miss), jobs
    tiled = work(s, at, tiling, sizes, jobs)
    known = {**sizes, **_tile(one_pass, tiling)}
    return Detail(
        before.passes_before, _passes(one_pass, known), before.bytes_before, _bytes(tiled.traffic),
        _counts(tiled.matrix), _counts(tiled.ops), mapping,
    )  # fmt: skip


def _tile(one_pass: Cascade, tiling: Tiling) -> dict[str, int]:
    """The key tile's open size, which the mapping binds."""
    from .work import key_tile

    inner = key_tile(one_pass)
    size = one_pass.rank[inner].size if inner is not None else 1
    return {} if isinstance(size, int) else {str(s): tiling.tile_m for s in size.free_symbols if str(size) == str(s)}


def _passes(c: Cascade, sizes: Mapping[str, int]) -> tuple[PassCount, ...]:
    found = (report(c, f) for f in families(c))
    return tuple(PassCount(p.family, p.count, str(bind(p.footprint, sizes)), p.inputs) for p in found if p.count)


def _bytes(traffic: Any) -> tuple[TensorBytes, ...]:
    return tuple(TensorBytes(t.tensor, size_int(t.moved), size_int(t.once), t.written) for t in traffic)


def _counts(values: Mapping[str, Any]) -> dict[str, int]:
    return {k: size_int(n) for k, n in values.items()}
