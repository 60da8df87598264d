"""The answer of a prediction: seconds, what bounds them, and the numbers behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..json import Json, Read

# A part that is made of others: the units' time until the last program ends.
TOTAL = "makespan"
BOUNDS = ("matrix", "exp", "memory", "launch", "link")


@dataclass(frozen=True)
class Cost:
    """`parts` are seconds by resource; they overlap on a GPU and add up on a CPU.

    `basis`: where the seconds come from, "measured", "calibrated" (the device's constants were measured on a machine) or
    "uncalibrated" (they are data sheets and assumptions). `band`: a measured time from seconds / (1 + band) to
    seconds · (1 + band) is as predicted; 0 where none is stated.

    `flops` counts two a multiply-add of the products that run; `bytes` what crosses the memory's edge; `exps` the
    exponential-class calls.
    """

    seconds: float
    bound: str
    flops: int
    bytes: int
    exps: int
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    basis: str = "uncalibrated"
    band: float = 0.0

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise ValueError(f"bound {self.bound!r}; one of {', '.join(BOUNDS)}")

    def to_dict(self) -> dict[str, Json]:
        return {
            "seconds": self.seconds, "bound": self.bound, "flops": self.flops, "bytes": self.bytes, "exps": self.exps,
            "parts": dict(self.parts), "basis": self.basis, "band": self.band,
        }

    @staticmethod
    def from_dict(d: Read) -> Cost:
        return Cost(**{**d, "parts": dict(d["parts"])})


def bound_of(parts: Mapping[str, float]) -> str:
    """The resource that takes the largest part; element-wise work counts with the exponentials."""
    single = {k: v for k, v in parts.items() if k != TOTAL}
    name = max(single, key=lambda k: single[k]) if single else "launch"
    return {"vector": "exp", "element": "exp", "fault": "memory", "l2": "memory", "call": "launch"}.get(name, name)
