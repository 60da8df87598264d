"""A sharding plan as plain data: every way on a mesh, best first; as a table, and to and from JSON's dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Exchange:
    """A collective of each of `layers` layers: bytes that a device sends in one, seconds if nothing hides it."""

    kind: str
    axis: str
    what: str
    parts: int
    layers: int
    sent_bytes: int
    seconds: float


@dataclass(frozen=True)
class Scheme:
    """One way over all attentions of a model; bytes, FLOP and seconds are those of one device in one step.

    `parts` are seconds by part: compute and memory (they overlap), exposed and latency of exchanges (they add up); matrix
    and exp are what computing is made of.
    `batches`: the most sequences of each context length that the mesh can hold. `even`: the most that a device has to do
    over the mean; `copies`: on how many devices each cached number lies. `token_bytes`: what a device caches of one token
    in one layer, on average.
    """

    name: str
    assignment: str
    exact: bool
    feasible: bool
    why: str
    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0
    traffic_bytes: int = 0
    exchanges: tuple[Exchange, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    seconds: float = float("inf")
    bound: str = ""
    batches: Mapping[int, int] = field(default_factory=dict, hash=False)
    even: float = 1.0
    copies: float = 1.0
    token_bytes: float = 0.0

    @property
    def held_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def sent_bytes(self) -> int:
        return sum(x.sent_bytes * x.layers for x in self.exchanges)

    def batch(self, keys: int) -> int:
        """The largest batch at this context length. Raises KeyError for a length that was not asked for."""
        return self.batches[keys]


@dataclass(frozen=True)
class MeshPlan:
    """The ways to run a model's attentions on a mesh: feasible ones first, fastest first; then why not the others."""

    mesh: str
    devices: int
    device: str
    step: str
    schemes: tuple[Scheme, ...]
    note: str = ""

    @property
    def best(self) -> Scheme | None:
        """The fastest way that fits; None where none does."""
        first = self.schemes[0] if self.schemes else None
        return first if first is not None and first.feasible else None

    def scheme(self, name: str) -> Scheme:
        """The way of this name. Raises KeyError naming those that there are."""
        for s in self.schemes:
            if s.name == name:
                return s
        raise KeyError(f"no way {name!r}; one of {', '.join(s.name for s in self.schemes)}")

    def __str__(self) -> str:
        from .table import mesh_table

        return mesh_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data; infinite seconds become null."""
        rows = []
        for s in self.schemes:
            row = {f.name: getattr(s, f.name) for f in fields(s)}
            row |= {
                "parts": dict(s.parts), "exchanges": [_plain(x) for x in s.exchanges],
                "seconds": s.seconds if s.feasible or s.parts else None,
                "batches": {str(n): b for n, b in s.batches.items()},
                "held_bytes": s.held_bytes, "sent_bytes": s.sent_bytes,
            }  # fmt: skip
            rows.append(row)
        return _plain(self) | {"schema": SCHEMA, "schemes": rows}

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> MeshPlan:
        """Read what `to_dict` wrote. Raises ValueError on a newer schema, KeyError or TypeError on other data."""
        if d["schema"] > SCHEMA:
            raise ValueError(f"the sharding plan has schema {d['schema']}, newer than {SCHEMA}, which this version reads")
        names = {f.name for f in fields(Scheme)}
        schemes = []
        for row in d["schemes"]:
            own = {k: v for k, v in row.items() if k in names}
            own["exchanges"] = tuple(Exchange(**x) for x in row["exchanges"])
            own["batches"] = {int(n): b for n, b in row["batches"].items()}
            own["seconds"] = row["seconds"] if row["seconds"] is not None else float("inf")
            schemes.append(Scheme(**own))
        own = {f.name: d[f.name] for f in fields(MeshPlan) if f.name != "schemes"}
        return MeshPlan(**own, schemes=tuple(schemes))


def _plain(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in fields(x)}
