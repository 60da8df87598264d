"""The plan as plain data: what was found, which candidates there are, what each costs, what was chosen and why.

Needs neither torch nor Triton, so that tables, JSON and reports can be made anywhere. JSON carries a schema number
(docs/plan-json.md): a plan of a newer schema is refused by name, one of an older schema is read.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path

from ..count.memory import AttentionMemory
from ..devices.device import Device, device, device_from_dict, device_to_dict
from ..json import Json, Read
from ..layer.step import ModelStep, StepError, Types
from ..mesh.mesh import mesh
from ..mesh.plan import MeshPlan
from ..report.page import Made, write_page
from ..sites.axes import bound_sizes
from ..sites.course import Symbol
from ..sites.detail import Detail
from ..sites.error import MeasuredError
from ..sites.findings import Findings
from ..sites.grid import SizeGrid, grid
from ..sites.picture import Layer, Picture
from ..sites.site import Candidate, MaskView, Miss, PlanError, Site, SiteShape, TileCounts
from ..sites.sweep import Sweep
from ..sites.sweeping import sweep
from ..time.cost import Cost
from .table import plan_table

# 6 added: a step over cached latents, and their bytes.
# 5 added: the step of the whole model.
# 4 added: density and measured error of candidates that are not exact.
# 3 added: meshes over a sweep.
# 2 added: sizes that costs are for, tile pictures, memory, open sizes and sweeps, bytes of weights.
SCHEMA = 6


@dataclass(frozen=True)
class Plan(Findings):
    """Every attention of one captured graph, on one device, with what was chosen; `str()` is a table.

    A plan of a graph with open sizes can be costed again at other sizes (`at`) and over many (`over`) without a second
    capture, until it is written to a file.
    """

    def __str__(self) -> str:
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
        moved = replace(self, sites=sites, device=where, symbols=symbols, sweeps=(), sharding=sharding)
        return moved.stored(self.step.weights, self.step.cache) if self.step is not None else moved.stored()

    def stored(self, weights: str = "", cache: str = "") -> Plan:
        """The plan with its step where weights of products and caches are stored so: "fp8", "int8", "int4" (weights alone),
        or "" as in the model. Raises StepError (a ValueError) on another type, and for a plan that was read from a file.
        """
        types = Types(weights, cache)
        if self.restep is None:
            if types == Types():
                return self
            raise StepError("a plan of a training step, or one that was read from a file, is not priced again: make it anew")
        there = self.restep([{s.name: s.value for s in self.symbols}])
        (made,) = there.on(self.device, [self.sites])(self.sharding, types)
        return replace(self, step=None, step_why=made) if isinstance(made, str) else replace(self, step=made, step_why="")

    def over(self, axis: str, values: Sequence[int], targets: Sequence[str | Device] = ()) -> Sweep:
        """Which candidate wins at each value of an axis, on this plan's device or on these. Raises as `at` does."""
        return sweep(self, axis, values, [device(t) for t in targets])

    def grid(
        self, targets: Sequence[str | Device] = (), *, meshes: Sequence[str] = (), **axes: Sequence[int]
    ) -> SizeGrid:
        """Every combination of sizes (`seq=(…)`, `past=(…)`, `batch=(…)`) and devices as columns; on GPUs the whole model's
        step as well, on each of `meshes` ("" one device, "tp=4", "tp=4,dp=2"). Raises as `at` does, and MeshError.
        """
        asked = [mesh(m) if m else None for m in meshes] or [None]
        return grid(self, axes, [device(t) for t in targets], asked)

    def to_html(self, path: str | Path) -> Path:
        """Write the plan as one self-contained page; sizes that are open are swept first where no sweep is at hand.

        Raises PlanError where the path cannot be written.
        """
        return write_page([self], path, made([self]))

    def to_json(self) -> str:
        """The plan as JSON; code is kept where its text is at hand."""
        body = {
            "schema": SCHEMA, "model": self.model, "note": self.note, "device": device_to_dict(self.device),
            "weight_bytes": self.weight_bytes, "symbols": [dict(vars(s)) for s in self.symbols],
            "axes": {name: list(s) for name, s in self.axes.items()}, "sweeps": [s.to_dict() for s in self.sweeps],
            "sites": [_site_to_dict(s) for s in self.sites], "misses": [dict(vars(m)) for m in self.misses],
            "sharding": self.sharding.to_dict() if self.sharding is not None else None,
            "step": self.step.to_dict() if self.step is not None else None, "step_why": self.step_why,
        }
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
                step=ModelStep.from_dict(body["step"]) if body.get("step") else None, step_why=body.get("step_why", ""),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan is damaged: {error}") from None


def made(plans: Sequence[Plan], command: str = "") -> Made:
    """What a page says of how these plans were made: the command, the versions and the day; and the plans themselves."""
    names = [n for n in ("reattend", "torch", "transformers") if importlib.util.find_spec(n) is not None]
    how = f"`{command}`, " if command else ""
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in names)
    return Made(f"Made by {how}{versions}, {date.today().isoformat()}.", tuple(p.to_json() for p in plans))


# --- plain data -------------------------------------------------------------------------------------------------


def _site_to_dict(s: Site) -> dict[str, Json]:
    mask = None
    if s.mask is not None:
        tiles = dict(vars(s.mask.tiles)) if s.mask.tiles is not None else None
        drawn = s.mask.drawn()
        mask = {"expr": s.mask.expr, "density": s.mask.density, "tiles": tiles,
                "picture": asdict(drawn) if drawn is not None else None}
    details = s.details()
    out = vars(s) | {
        "traits": sorted(s.traits), "mask": mask, "detail": details.to_dict() if details is not None else None,
        "shape": {"sizes": dict(s.shape.sizes), "dtype": s.shape.dtype, "at": dict(s.shape.at)},
        "memory": dict(vars(s.memory)) if s.memory is not None else None,
        "eager": s.eager.to_dict() if s.eager is not None else None,
        "candidates": [_candidate_to_dict(c) for c in s.candidates],
    }
    del out["detailer"]
    return out


def _candidate_to_dict(c: Candidate) -> dict[str, Json]:
    out = vars(c) | {
        "cost": c.cost.to_dict() if c.cost is not None else None,
        "error": c.error.to_dict() if c.error is not None else None,
    }
    del out["maker"]
    return out


def _candidate_from_dict(d: Read) -> Candidate:
    error = MeasuredError.from_dict(d["error"]) if d.get("error") is not None else None
    return Candidate(**{**d, "cost": Cost.from_dict(d["cost"]) if d["cost"] is not None else None, "error": error})


def _site_from_dict(d: Read) -> Site:
    mask = d["mask"]
    if mask is not None:
        tiles = TileCounts(**mask["tiles"]) if mask["tiles"] else None
        mask = MaskView(mask["expr"], mask["density"], tiles, _picture(mask.get("picture")))
    candidates = tuple(map(_candidate_from_dict, d["candidates"]))
    return Site(**{
        **d, "traits": frozenset(d["traits"]), "shape": SiteShape(**d["shape"]), "mask": mask, "candidates": candidates,
        "proofs": tuple(d["proofs"]), "guards": tuple(d["guards"]), "notes": tuple(d["notes"]),
        "memory": AttentionMemory(**d["memory"]) if d.get("memory") is not None else None,
        "eager": Cost.from_dict(d["eager"]) if d.get("eager") is not None else None,
        "detail": Detail.from_dict(d["detail"]) if d.get("detail") is not None else None,
    })


def _picture(d: Read | None) -> Picture | None:
    if d is None:
        return None
    layers = tuple(Layer(x["label"], tuple(x["rows"])) for x in d["layers"])
    return Picture(**{**d, "layers": layers})
