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
from .axes import bound_sizes, no_axis
from .course import SweepError
from .findings import Findings
from .site import PlanError, Site

Value: TypeAlias = int | float | str | None
# Beside the axes: seconds of the choice and of the model's own code for one attention, None where they are not known; the
# band of the choice's; bytes of its keys and values.
COLUMNS = ("attention", "layers", "device", "choice", "seconds", "original_seconds", "bound", "band", "cache_bytes")


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


def grid(plan: Findings, axes: Mapping[str, Sequence[int]], devices: Sequence[Device] = ()) -> SizeGrid:
    """Cost the distinct sites of a plan at every combination of these values, on its own device or on these.

    What does not depend on the device is counted once for all of them. Values that the graph was not captured for are left
    out and named. Raises SweepError where an axis is not open, has no value, or none that the capture admits.
    """
    start = time.perf_counter()
    values, skipped = _values(plan, axes)
    assert plan.retake is not None
    groups, where = plan.groups, tuple(devices or (plan.device,))
    firsts = [g[0] for g in groups]
    names = [(plan.group_name(g), len(g)) for g in groups]
    found: list[tuple[Value, ...]] = []
    for at in product(*values.values()):
        sizes = bound_sizes(plan, dict(zip(values, at)))
        for d in where:
            sites = plan.retake(d, sizes, firsts)
            found += ((*at, *name, d.name, *_row(s, d)) for name, s in zip(names, sites))
    points = len(where)
    for v in values.values():
        points *= len(v)
    columns = tuple(zip(*found)) if found else tuple(() for _ in (*values, *COLUMNS))
    return SizeGrid(
        tuple(values), dict(zip((*values, *COLUMNS), columns)), points, skipped, time.perf_counter() - start,
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
