"""A sharding plan as plain data: every way on a mesh, best first; as a table, and to and from JSON's dictionaries."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..json import Json, Read
from .scheme import Exchange, Scheme
from .table import mesh_table

SCHEMA = 1


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
        head = f"sharded over {self.mesh} ({self.devices} {self.device}), {self.step}"
        return mesh_table(self.schemes, head, self.note)

    def to_dict(self) -> dict[str, Json]:
        """Nested plain data; infinite seconds become null."""
        rows = []
        for s in self.schemes:
            row = vars(s) | {
                "parts": dict(s.parts), "exchanges": [dict(vars(x)) for x in s.exchanges],
                "seconds": s.seconds if s.feasible or s.parts else None,
                "batches": {str(n): b for n, b in s.batches.items()},
                "held_bytes": s.held_bytes, "sent_bytes": s.sent_bytes,
            }
            rows.append(row)
        return vars(self) | {"schema": SCHEMA, "schemes": rows}

    @staticmethod
    def from_dict(d: Read) -> MeshPlan:
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
