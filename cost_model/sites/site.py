"""One attention as plain data: where it is, its mask, its candidates with what each costs, which is chosen and why.

Needs neither torch nor Triton, so that tables, JSON and reports can be made anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from ..count.memory import AttentionMemory
from ..time.cost import Cost
from ..words import NUMBER, group_name
from .detail import Detail
from .error import MeasuredError
from .picture import Picture

ORIGINAL = "original"


class PlanError(ValueError):
    """A text that is no plan of this version, or a plan that cannot be used so; the message says what it is."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute an attention.

    `why` says why it is infeasible, or what speaks for or against it; `passes` counts those over the key rank (None where
    the kernel is not ours to count); `mapping` is the canonical text of how it is tiled, or "". One that is not `exact` has
    the `density` of what it visits (share of all tiles) and its `error` where that was measured: None is not 0.
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
    density: float | None = None
    error: MeasuredError | None = None

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
        sizes = (f"{r}={self.at.get(r, n)}" for r, n in self.sizes.items())
        free = f", open: {' '.join(self.at)}" if self.at else ""
        return " ".join([*sizes, self.dtype]).strip() + free

    def size(self, rank: str) -> int | None:
        """The number behind a rank; None for a rank that the site lacks, or whose size is not known."""
        n = self.at.get(rank, self.sizes.get(rank))
        return n if isinstance(n, int) else None


@dataclass(frozen=True)
class Site:
    """One attention of the model. `candidates` are best first; `choice` names the chosen one.

    `cascade` and `chosen_cascade` are texts in the papers' notation; `proofs` and `guards` are sentences; `notes` is what
    else a reader should know. `eager`: the model's own call as it runs, where that is cheaper than the captured one.
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
    eager: Cost | None = None
    detail: Detail | None = field(default=None, compare=False)
    detailer: Callable[[], Detail] | None = field(default=None, compare=False, repr=False)

    def details(self) -> Detail | None:
        """Passes, bytes by tensor and operations: counted when asked for; None for a plan that was written without."""
        return self.detail if self.detail is not None or self.detailer is None else self.detailer()

    @property
    def chosen(self) -> Candidate:
        """The candidate that runs."""
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
    def before(self) -> Cost | None:
        """Its cost as the model runs it: the original's, or that of the model's own call where nothing traces it."""
        return self.eager or (self.original.cost if self.original is not None else None)

    @property
    def speedup(self) -> float | None:
        """Predicted time of the model's own code as it runs over that of the chosen candidate."""
        before = self.before
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

    @property
    def alike(self) -> tuple[str, ...]:
        """What misses have in common that differ by the number of their layer, or of an operator in it."""
        return (self.where, NUMBER.sub("#", self.what), re.sub(r"_\d+\b", "", self.reason), self.hint)


def grouped(misses: Sequence[Miss]) -> list[tuple[Miss, int]]:
    """The same miss of many layers once, with how many there are."""
    groups: dict[tuple[str, ...], list[Miss]] = {}
    for m in misses:
        groups.setdefault(m.alike, []).append(m)
    return [(replace(same[0], what=group_name([m.what for m in same])), len(same)) for same in groups.values()]


def ranked(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Best first: feasible ones by predicted time, then the others as they came."""
    return tuple(sorted(candidates, key=lambda c: c.seconds))
