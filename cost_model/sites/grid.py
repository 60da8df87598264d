"""Grids: one capture costed at every combination of sizes and devices, as columns that a table of any kind is made of.

    grid(plan, {"batch": (1, 8), "seq": (1024, 4096)}, devices)     a row a point, attention and device
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TypeAlias

from ..devices.device import Device
from ..layer.step import ModelStep, Types
from ..mesh.mesh import Mesh, linked
from .axes import bound_sizes, no_axis
from .course import SweepError
from .findings import Findings
from .site import PlanError, Site

Value: TypeAlias = int | float | str | None
# Beside the axes: seconds of the choice and of the model's own code for one attention, None where they are not known; the
# band of the choice's; bytes of its keys and values.
COLUMNS = ("attention", "layers", "device", "choice", "seconds", "original_seconds", "bound", "band", "cache_bytes")
# Of the whole model there, the same in all rows of a point: seconds of its step, their band, what a device holds and yields.
STEP = ("mesh", "step_seconds", "step_band", "tokens_per_s_device", "held_bytes", "fits", "largest_batch")


@dataclass(frozen=True)
class SizeGrid:
    """Rows over all combinations of `axes`, as named columns of equal length; `skipped`: values the capture does not admit.

    `points` is how many (sizes, device) were costed, `seconds` how long that took.
    """

    axes: tuple[str, ...]
    columns: Mapping[str, tuple[Value, ...]] = field(hash=False)
    points: int
    skipped: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def __len__(self) -> int:
        return len(self.columns["device"])

    def rows(self) -> Iterator[tuple[Value, ...]]:
        """Row by row, in the order of the columns."""
        return zip(*self.columns.values())

    def __str__(self) -> str:
        each = self.seconds / self.points * 1e3 if self.points else 0.0
        words = f"{self.points} points over {', '.join(self.axes)} and device, {self.seconds:.1f} s ({each:.2g} ms each)"
        return "\n".join([*self.skipped, words])

    def write(self, path: str | Path) -> Path:
        """Write the columns: Parquet where the name ends so (which needs pyarrow), else CSV. Raises PlanError."""
        where = Path(path)
        try:
            if where.suffix == ".parquet":
                _parquet(self.columns, where)
            else:
                with where.open("w", encoding="utf-8", newline="") as out:
                    lines = csv.writer(out, lineterminator="\n")
                    lines.writerow(self.columns)
                    lines.writerows(self.rows())
        except OSError as no:
            raise PlanError(f"{where} cannot be written: {no.strerror or no}") from None
        return where


def _parquet(columns: Mapping[str, Sequence[Value]], where: Path) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PlanError(f"{where.name} needs pyarrow: pip install pyarrow, or name a file that ends with .csv") from None
    parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), where)


def grid(
    plan: Findings, axes: Mapping[str, Sequence[int]], devices: Sequence[Device] = (),
    meshes: Sequence[Mesh | None] = (None,),
) -> SizeGrid:
    """Cost the distinct sites of a plan at every combination of these values, on its own device or on these, and the whole
    model's step on each of `meshes` (None: one device).

    What does not depend on the device is counted once for all of them, attentions once for all meshes: a mesh of a grid
    divides them evenly. Values that the graph was not captured for are left out and named. Raises SweepError where an axis
    is not open, has no value, or none that the capture admits, and MeshError for a device without links.
    """
    start = time.perf_counter()
    values, skipped = _values(plan, axes)
    assert plan.retake is not None
    groups, where = plan.groups, tuple(devices or (plan.device,))
    if any(m is not None for m in meshes):
        for d in where:
            linked(d)
    firsts = [g[0] for g in groups]
    names = [(plan.group_name(g), len(g)) for g in groups]
    found: list[tuple[Value, ...]] = []
    every = list(product(*values.values()))
    sizes = [bound_sizes(plan, dict(zip(values, at))) for at in every]
    layers = {i: n for n, g in enumerate(groups) for i in g}
    steps = plan.restep(sizes) if plan.restep is not None else None
    stored = Types(plan.step.weights, plan.step.cache) if plan.step is not None else Types()
    there: list[tuple[list[list[tuple[Value, ...]]], list[list[tuple[Value, ...]]]]] = []
    for d in where:
        sites = [plan.retake(d, x, firsts) for x in sizes]
        over = steps.on(d, [[some[layers[i]] for i in range(len(layers))] for some in sites]) if steps is not None else None
        whole = [[_step(m, x) for x in (over(m, stored) if over is not None else ("",) * len(every))] for m in meshes]
        there.append(([[(*name, d.name, *_row(s, d)) for name, s in zip(names, some)] for some in sites], whole))
    for i, at in enumerate(every):
        for rows, whole in there:
            found += ((*at, *row, *of[i]) for of in whole for row in rows[i])
    points = len(where) * len(meshes) * len(every)
    titles = (*values, *COLUMNS, *STEP)
    columns = tuple(zip(*found)) if found else tuple(() for _ in titles)
    return SizeGrid(tuple(values), dict(zip(titles, columns)), points, skipped, time.perf_counter() - start)


def _step(mesh: Mesh | None, made: ModelStep | str) -> tuple[Value, ...]:
    """The columns of the whole model's step; None where it has none."""
    name = str(mesh) if mesh is not None else ""
    if isinstance(made, str):
        return (name, *(None for _ in STEP[1:]))
    return (
        name, made.seconds, made.band, made.tokens_per_s_device, made.held_bytes, made.fits, made.largest_batch,
    )


def _values(plan: Findings, axes: Mapping[str, Sequence[int]]) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The values of each axis that the capture admits, and what is said of the others."""
    out: dict[str, tuple[int, ...]] = {}
    skipped: list[str] = []
    for axis, wanted in axes.items():
        if plan.retake is None or axis not in (*plan.axes, *(s.name for s in plan.symbols)):
            raise SweepError(no_axis(plan, axis))
        if not wanted or min(wanted) < 1:
            raise SweepError(f"a grid over {axis} needs values of at least 1")
        kept = []
        for v in sorted(set(wanted)):
            try:
                bound_sizes(plan, {axis: v})
            except SweepError as no:
                skipped.append(str(no))
            else:
                kept.append(v)
        if not kept:
            raise SweepError(skipped[-1])
        out[axis] = tuple(kept)
    if not out:
        raise SweepError("a grid needs an axis, such as seq=(1024, 4096)")
    return out, tuple(skipped)


def _row(s: Site, d: Device) -> tuple[Value, ...]:
    cost, before = s.chosen.cost, s.before
    return (
        s.choice, cost.seconds if cost is not None else None, before.seconds if before is not None else None,
        cost.bound if cost is not None else None, (cost.band or d.band) if cost is not None else None,
        s.memory.cache_bytes if s.memory is not None else None,
    )
