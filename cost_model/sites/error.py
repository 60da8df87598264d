"""The error of a candidate that is not exact: what was measured, on which data, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..json import Json, Read


@dataclass(frozen=True)
class KeptMass:
    """How much of its weight a row keeps under a method, over the rows of the head that keeps least by that number.

    Exact, from the sums of the weights of the keys that are kept and of all. `rows` were looked at, of `of`.
    """

    mean: float
    p1: float
    least: float
    rows: int
    of: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} of the weight kept (1st percentile {self.p1:.4f}, least {self.least:.4f})"


@dataclass(frozen=True)
class MeasuredError:
    """What a method changes at one attention, relative to the attention's own output (L2), on `examples` held out.

    `mean` with its 95 % interval `low` to `high` over the examples, `worst` of them, and `worst_head` the largest of any
    head of any example. `queries` and `keys` of the shortest and of the longest attention that was measured. `kept`: the
    share of its cells that a selection kept, on average, of tiles of 32 where cells are smaller; None where positions alone
    decide.
    """

    mean: float
    low: float
    high: float
    worst: float
    worst_head: float
    mass: KeptMass | None
    examples: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    data: str = ""
    kept: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2e} ({self.low:.1e} to {self.high:.1e}; {self.examples} examples held out)"

    def covers(self, queries: int, keys: int) -> bool:
        """Was it measured at such lengths, or between those that it was?"""
        return self.queries[0] <= queries <= self.queries[1] and self.keys[0] <= keys <= self.keys[1]

    def to_dict(self) -> dict[str, Json]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(d: Read) -> MeasuredError:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        mass = KeptMass(**d["mass"]) if d["mass"] is not None else None
        return MeasuredError(**{**d, "mass": mass, "queries": tuple(d["queries"]), "keys": tuple(d["keys"])})
