"""The plan as plain data: what was found, which candidates there are, what each costs, what was chosen and why.

Needs neither torch nor Triton, so that tables, JSON and reports can be made anywhere. JSON carries a schema number
(docs/plan-json.md): a plan of a newer schema is refused by name, one of an older schema is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from ..count.memory import AttentionMemory
from ..devices.device import Device, device, device_from_dict, device_to_dict
from ..mesh.plan import MeshPlan
from ..time.cost import Cost
from .detail import Detail
from .picture import Layer, Picture
from .sweep import Retake, Sweep, Symbol, bound_sizes, sweep

# 3 added: meshes over a sweep.
# 2 added: sizes that costs are for, tile pictures, memory, open sizes and sweeps, bytes of weights.
SCHEMA = 3
# The ways to spread a plan's attentions over its mesh, at sizes of its symbols, on a device.
Reshard: TypeAlias = Callable[[Device, Mapping[str, int]], MeshPlan | None]
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
    def is_original(self) -> bool:
        """Is it the model's own code?"""
        return self.name == ORIGINAL

    @property
    def is_tiled(self) -> bool:
        """Is it a kernel that runs by a mapping of ours?"""
        return bool(self.mapping)

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
    """A site's mask: its predicate as text, the share of tiles that it keeps, their counts, and their picture."""

    expr: str
    density: float
    tiles: TileCounts | None = None
    picture: Picture | None = field(default=None, compare=False)
    painter: Callable[[], Picture | None] | None = field(default=None, compare=False, repr=False)

    def drawn(self) -> Picture | None:
        """The picture: made when asked for; None where there is none to draw."""
        return self.picture if self.picture is not None or self.painter is None else self.painter()


@dataclass(frozen=True)
class SiteShape:
    """Sizes by rank (a number, or the text of a symbolic size) and the type of the values.

    `at` has the value of every symbolic one for which costs are predicted.
    """

    sizes: Mapping[str, int | str] = field(hash=False)
    dtype: str = ""
    at: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        sizes = (f"{r}={n}={self.at[r]}" if r in self.at else f"{r}={n}" for r, n in self.sizes.items())
        return " ".join([*sizes, self.dtype]).strip()

    def size(self, rank: str) -> int | None:
        """The number behind a rank; None for a rank that the site lacks, or whose size is not known."""
        n = self.at.get(rank, self.sizes.get(rank))
        return n if isinstance(n, int) else None


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
    memory: AttentionMemory | None = None
    detail: Detail | None = field(default=None, compare=False)
    detailer: Callable[[], Detail] | None = field(default=None, compare=False, repr=False)

    def details(self) -> Detail | None:
        """Passes, bytes by tensor and operations: counted when asked for; None for a plan that was written without."""
        return self.detail if self.detail is not None or self.detailer is None else self.detailer()

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
    def original(self) -> Candidate | None:
        """The model's own code, where it stands among the candidates."""
        return next((c for c in self.candidates if c.is_original), None)

    @property
    def speedup(self) -> float | None:
        """Predicted time of the original code over that of the chosen candidate."""
        before = self.original.cost if self.original is not None else None
        after = self.chosen.cost
        if before is None or after is None or after.seconds == 0:
            return None
        return before.seconds / after.seconds

    @property
    def alike(self) -> tuple[object, ...]:
        """Equal for sites that differ by their name only."""
        own = ("name", "shape", "detail", "detailer")
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

    A plan of a graph with open sizes has them in `symbols`, and in `axes` which of them move together as `seq`, `past` or
    `batch`; it can be costed again at other sizes (`at`) and over many (`over`) without a second capture, until it is
    written to a file. `sweeps` are kept for reports. `weight_bytes` are those of the model's parameters.
    `sharding` has the ways to spread them over a mesh of such devices, where one was asked for.
    """

    sites: tuple[Site, ...]
    misses: tuple[Miss, ...]
    device: Device
    model: str = ""
    note: str = ""
    weight_bytes: int = 0
    symbols: tuple[Symbol, ...] = ()
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    sweeps: tuple[Sweep, ...] = ()
    sharding: MeshPlan | None = None
    retake: Retake | None = field(default=None, compare=False, repr=False)
    reshard: Reshard | None = field(default=None, compare=False, repr=False)

    @property
    def seconds(self) -> float:
        """Predicted seconds of all chosen candidates together."""
        return sum(s.chosen.cost.seconds for s in self.sites if s.chosen.cost is not None)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of sites that differ by their name only, in order of appearance."""
        found: dict[tuple[object, ...], list[int]] = {}
        for i, s in enumerate(self.sites):
            found.setdefault(s.alike, []).append(i)
        return tuple(map(tuple, found.values()))

    def group_name(self, members: Sequence[int]) -> str:
        """One name for a group of sites."""
        from .table import group_name

        first = self.sites[members[0]]
        return group_name([self.sites[i].name for i in members]) or first.where

    def __str__(self) -> str:
        from .table import plan_table

        return plan_table(self) + (f"\n\n{self.sharding}" if self.sharding is not None else "")

    def at(self, target: str | Device | None = None, **sizes: int) -> Plan:
        """The plan at other sizes, by axis (`seq=8192`, `past=…`, `batch=…`) or by symbol, or on another device.

        Nothing is captured again. Raises SweepError (a ValueError) where sizes are fixed or the graph was not captured for
        them, and UnknownDevice.
        """
        values = bound_sizes(self, sizes)
        if self.retake is None:
            raise PlanError("this plan was read from a file: make it with reattend.plan(..., dynamic=True) to cost it again")
        where = device(target) if target is not None else self.device
        sites = self.retake(where, values, range(len(self.sites)))
        symbols = tuple(replace(s, value=values[s.name]) for s in self.symbols)
        sharding = self.reshard(where, values) if self.reshard is not None else None
        return replace(self, sites=sites, device=where, symbols=symbols, sweeps=(), sharding=sharding)

    def over(self, axis: str, values: Sequence[int], targets: Sequence[str | Device] = ()) -> Sweep:
        """Which candidate wins at each value of an axis, on this plan's device or on these. Raises as `at` does."""
        return sweep(self, axis, values, [device(t) for t in targets])

    def to_html(self, path: str | Path) -> Path:
        """Write the plan as one self-contained page; sizes that are open are swept first where no sweep is at hand.

        Raises PlanError where the path cannot be written.
        """
        from ..report.page import write_page

        return write_page([self], path)

    def to_json(self) -> str:
        """The plan as JSON; code is kept where its text is at hand."""
        body = {
            "schema": SCHEMA, "model": self.model, "note": self.note, "device": device_to_dict(self.device),
            "weight_bytes": self.weight_bytes, "symbols": [_plain(s) for s in self.symbols],
            "axes": {name: list(s) for name, s in self.axes.items()}, "sweeps": [s.to_dict() for s in self.sweeps],
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
        if not 1 <= body["schema"] <= SCHEMA:
            age = "newer" if body["schema"] > SCHEMA else "older"
            raise PlanError(
                f"the plan has schema {body['schema']}, {age} than schema {SCHEMA}, which this version reads: "
                + ("upgrade reattend, or make the plan again" if age == "newer" else "make the plan again")
            )
        try:
            return Plan(
                sites=tuple(_site_from_dict(s) for s in body["sites"]),
                misses=tuple(Miss(**m) for m in body["misses"]),
                device=device_from_dict(body["device"]), model=body["model"], note=body["note"],
                weight_bytes=body.get("weight_bytes", 0), symbols=tuple(Symbol(**s) for s in body.get("symbols", ())),
                axes={name: tuple(s) for name, s in body.get("axes", {}).items()},
                sweeps=tuple(Sweep.from_dict(s) for s in body.get("sweeps", ())),
                sharding=MeshPlan.from_dict(body["sharding"]) if body.get("sharding") else None,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
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
        drawn = s.mask.drawn()
        mask = {"expr": s.mask.expr, "density": s.mask.density, "tiles": tiles,
                "picture": asdict(drawn) if drawn is not None else None}  # fmt: skip
    details = s.details()
    out = _plain(s) | {
        "traits": sorted(s.traits), "mask": mask, "detail": details.to_dict() if details is not None else None,
        "shape": {"sizes": dict(s.shape.sizes), "dtype": s.shape.dtype, "at": dict(s.shape.at)},
        "memory": _plain(s.memory) if s.memory is not None else None,
        "candidates": [_candidate_to_dict(c) for c in s.candidates],
    }  # fmt: skip
    del out["detailer"]
    return out


def _candidate_to_dict(c: Candidate) -> dict[str, Any]:
    out = _plain(c) | {"cost": c.cost.to_dict() if c.cost is not None else None}
    del out["maker"]
    return out


def _site_from_dict(d: dict[str, Any]) -> Site:
    mask = d["mask"]
    if mask is not None:
        tiles = TileCounts(**mask["tiles"]) if mask["tiles"] else None
        mask = MaskView(mask["expr"], mask["density"], tiles, _picture(mask.get("picture")))
    candidates = tuple(
        Candidate(**{**c, "cost": Cost.from_dict(c["cost"]) if c["cost"] is not None else None}) for c in d["candidates"]
    )
    return Site(**{
        **d, "traits": frozenset(d["traits"]), "shape": SiteShape(**d["shape"]), "mask": mask, "candidates": candidates,
        "proofs": tuple(d["proofs"]), "guards": tuple(d["guards"]), "notes": tuple(d["notes"]),
        "memory": AttentionMemory(**d["memory"]) if d.get("memory") is not None else None,
        "detail": Detail.from_dict(d["detail"]) if d.get("detail") is not None else None,
    })  # fmt: skip


def _picture(d: Mapping[str, Any] | None) -> Picture | None:
    if d is None:
        return None
    layers = tuple(Layer(x["label"], tuple(x["rows"])) for x in d["layers"])
    return Picture(**{**d, "layers": layers})
