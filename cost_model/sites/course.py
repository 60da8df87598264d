"""One group of identical attentions along an axis of sizes on one device: the choice at each value, and where it changes."""

from __future__ import annotations

from dataclasses import dataclass

from ..count.memory import AttentionMemory
from ..json import Read


class SweepError(ValueError):
    """A plan cannot be made at these sizes; the message is one sentence that says what can."""


@dataclass(frozen=True)
class Symbol:
    """A size that the graph leaves open: its value in the example, and the values for which the graph was captured.

    `high` is None where nothing bounds it. Capture takes 0 and 1 for special, so `low` is 2 for what may be 1 as well.
    """

    name: str
    value: int
    low: int = 0
    high: int | None = None

    def admits(self, value: int) -> bool:
        low = 1 if self.low <= 2 else self.low
        return low <= value and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Estimate:
    """A candidate that can run at a point: predicted seconds and what bounds them."""

    candidate: str
    seconds: float
    bound: str


@dataclass(frozen=True)
class Point:
    """One value of the axis: the choice, every candidate that can run, best first, and the memory of one attention."""

    value: int
    choice: str
    estimates: tuple[Estimate, ...]
    memory: AttentionMemory | None = None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of the choice."""
        return next((e.seconds for e in self.estimates if e.candidate == self.choice), None)


@dataclass(frozen=True)
class Change:
    """The choice is `before` at `low` and `after` at `high`."""

    low: int
    high: int
    before: str
    after: str


@dataclass(frozen=True)
class Course:
    """A group of `count` identical attentions along the axis on one device. `site` names them, `index` is the first's.

    `changes` are where neighbouring points differ in their choice, narrowed to within an eighth of the value.
    """

    site: str
    index: int
    count: int
    device: str
    points: tuple[Point, ...]
    changes: tuple[Change, ...] = ()


def course(d: Read) -> Course:
    """Read what `asdict` wrote. Raises KeyError or TypeError on other data."""
    points, changes = tuple(map(_point, d["points"])), tuple(Change(**c) for c in d["changes"])
    return Course(**{**d, "points": points, "changes": changes})


def _point(d: Read) -> Point:
    memory = AttentionMemory(**d["memory"]) if d["memory"] is not None else None
    return Point(d["value"], d["choice"], tuple(Estimate(**e) for e in d["estimates"]), memory)
