"""The plan as plain data: what was found, which candidates there are, what each costs, what was chosen and why.

Needs neither torch nor Triton, so that tables, JSON and reports can be made anywhere. JSON carries a schema number: a plan
of a newer schema is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .cost import Cost
from .device import Device, device_from_dict, device_to_dict
from .mesh_plan import MeshPlan

SCHEMA = 1
ORIGINAL = "original"


class PlanError(ValueError):
    """A text that is no plan of this version; the message says what it is."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute an attention.

    `why` says why it is infeasible, or what speaks for or against it; `passes` counts those over the key rank (None where
    the kernel is not ours to count); `mapping` is the canonical text of how it is tiled, or "".
    """

    name: str
    exact: bool = True
    passes: int | None = None
    cost: Cost | None = None
    feasible: bool = True
    why: str = ""
    mapping: str = ""
    text: str = ""
    maker: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Predicted seconds; infinity where it cannot run."""
        return self.cost.seconds if self.cost is not None and self.feasible else float("inf")

    def source(self) -> str:
        """The emitted code. Raises ValueError where there is none: an infeasible candidate, or the original code."""
        if self.text:
            return self.text
        if self.maker is not None:
            return self.maker()
        raise ValueError(f"candidate {self.name!r} has no code of its own" + (f": {self.why}" if self.why else ""))


@dataclass(frozen=True)
class TileCounts:
    """Key tiles of `tile_p` × `tile_m` over the whole site."""

    tile_p: int
    tile_m: int
    total: int
    visited: int
    full: int
    partial: int

    def __str__(self) -> str:
        return f"{self.visited} of {self.total} tiles of {self.tile_p}×{self.tile_m} visited, {self.full} of them full"


@dataclass(frozen=True)
class MaskView:
    """A site's mask: its predicate as text, the share of tiles that it keeps, and their counts."""

    expr: str
    density: float
    tiles: TileCounts | None = None


@dataclass(frozen=True)
class SiteShape:
    """Sizes by rank (a number, or the text of a symbolic size) and the type of the values."""

    sizes: Mapping[str, int | str] = field(hash=False)
    dtype: str = ""

    def __str__(self) -> str:
        return " ".join([*(f"{r}={n}" for r, n in self.sizes.items()), self.dtype]).strip()


@dataclass(frozen=True)
class Site:
    """One attention of the model. `candidates` are best first; `choice` names the chosen one.

    `cascade` and `chosen_cascade` are texts in the papers' notation; `proofs` and `guards` are sentences; `notes` is what
    else a reader should know.
    """

    name: str
    where: str
    kind: str
    traits: frozenset[str]
    shape: SiteShape
    mask: MaskView | None
    proofs: tuple[str, ...]
    guards: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    choice: str
    cascade: str = ""
    chosen_cascade: str = ""
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        return self.candidate(self.choice)

    def candidate(self, name: str) -> Candidate:
        """The candidate of this name. Raises KeyError naming those that there are."""
        for c in self.candidates:
            if c.name == name:
                return c
        raise KeyError(f"no candidate {name!r}; one of {', '.join(c.name for c in self.candidates)}")

    @property
    def speedup(self) -> float | None:
        """Predicted time of the original code over that of the chosen candidate."""
        before = next((c.cost for c in self.candidates if c.name == ORIGINAL), None)
        after = self.chosen.cost
        if before is None or after is None or after.seconds == 0:
            return None
        return before.seconds / after.seconds

    @property
    def alike(self) -> tuple[object, ...]:
        """Equal for sites that differ by their name only."""
        own = ("name", "shape")
        return (str(self.shape), *(getattr(self, f.name) for f in fields(self) if f.name not in own))


@dataclass(frozen=True)
class Miss:
    """Something that looked like attention and is left alone: where, what it is, why, and what would help."""

    where: str
    what: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Plan:
    """Every attention of one captured graph, on one device. `note` says what the times rest on.

    `sharding` has the ways to spread them over a mesh of such devices, where one was asked for.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    device: Device
    model: str = ""
    note: str = ""
    sharding: MeshPlan | None = None

    @property
    def seconds(self) -> float:
        """Predicted seconds of all chosen candidates together."""
        return sum(s.chosen.cost.seconds for s in self.sites if s.chosen.cost is not None)

    def __str__(self) -> str:
        from .table import plan_table

        return plan_table(self) + (f"\n\n{self.sharding}" if self.sharding is not None else "")

    def to_json(self) -> str:
        """The plan as JSON; code is kept where its text is at hand."""
        body = {
            "schema": SCHEMA, "model": self.model, "note": self.note, "device": device_to_dict(self.device),
            "sites": [_site_to_dict(s) for s in self.sites], "misses": [_plain(m) for m in self.misses],
            "sharding": self.sharding.to_dict() if self.sharding is not None else None,
        }  # fmt: skip
        return json.dumps(body, indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan. Raises PlanError on a text that is no plan, or that has another schema than this version reads."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"this is no plan: {error}") from None
        if not isinstance(body, dict) or not isinstance(body.get("schema"), int):
            raise PlanError("this is no plan: it has no schema number")
        if body["schema"] != SCHEMA:
            age = "newer" if body["schema"] > SCHEMA else "older"
            raise PlanError(f"the plan has schema {body['schema']}, {age} than schema {SCHEMA}, which this version reads")
        try:
            return Plan(
                sites=tuple(_site_from_dict(s) for s in body["sites"]),
                misses=tuple(Miss(**m) for m in body["misses"]),
                device=device_from_dict(body["device"]), model=body["model"], note=body["note"],
                sharding=MeshPlan.from_dict(body["sharding"]) if body.get("sharding") else None,
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan is damaged: {error}") from None


def ranked(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Best first: feasible ones by predicted time, then the others as they came."""
    return tuple(sorted(candidates, key=lambda c: c.seconds))


# --- plain data -------------------------------------------------------------------------------------------------


def _plain(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in fields(x)}


def _site_to_dict(s: Site) -> dict[str, Any]:
    mask = None
    if s.mask is not None:
        tiles = _plain(s.mask.tiles) if s.mask.tiles is not None else None
        mask = {"expr": s.mask.expr, "density": s.mask.density, "tiles": tiles}
    return _plain(s) | {
        "traits": sorted(s.traits), "shape": {"sizes": dict(s.shape.sizes), "dtype": s.shape.dtype}, "mask": mask,
        "candidates": [_candidate_to_dict(c) for c in s.candidates],
    }  # fmt: skip


def _candidate_to_dict(c: Candidate) -> dict[str, Any]:
    out = _plain(c) | {"cost": c.cost.to_dict() if c.cost is not None else None}
    del out["maker"]
    return out


def _site_from_dict(d: dict[str, Any]) -> Site:
    mask = d["mask"]
    if mask is not None:
        mask = MaskView(mask["expr"], mask["density"], TileCounts(**mask["tiles"]) if mask["tiles"] else None)
    candidates = tuple(
        Candidate(**{**c, "cost": Cost.from_dict(c["cost"]) if c["cost"] is not None else None}) for c in d["candidates"]
    )
    return Site(**{
        **d, "traits": frozenset(d["traits"]), "shape": SiteShape(**d["shape"]), "mask": mask, "candidates": candidates,
        "proofs": tuple(d["proofs"]), "guards": tuple(d["guards"]), "notes": tuple(d["notes"]),
    })  # fmt: skip
