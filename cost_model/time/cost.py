"""The answer of a prediction: seconds, what bounds them, and the numbers behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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

    `backward`: of all these seconds, those of the gradients, where they are wanted.
    """

    seconds: float
    bound: str
    flops: int
    bytes: int
    exps: int
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    basis: str = "uncalibrated"
    band: float = 0.0
    backward: float = 0.0

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            raise ValueError(f"bound {self.bound!r}; one of {', '.join(BOUNDS)}")

    @property
    def forward(self) -> float:
        """The seconds without those of the gradients."""
        return self.seconds - self.backward

    def to_dict(self) -> dict[str, Json]:
        """Plain data."""
        return {
            "seconds": self.seconds, "bound": self.bound, "flops": self.flops, "bytes": self.bytes, "exps": self.exps,
            "parts": dict(self.parts), "basis": self.basis, "band": self.band, "backward": self.backward,
        }

    @staticmethod
    def from_dict(d: Read) -> Cost:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        return Cost(**{**d, "parts": dict(d["parts"])})


def bound_of(parts: Mapping[str, float]) -> str:
    """The resource that takes the largest part; element-wise work counts with the exponentials."""
    single = {k: v for k, v in parts.items() if k != TOTAL}
    name = max(single, key=lambda k: single[k]) if single else "launch"
    return {"vector": "exp", "element": "exp", "fault": "memory", "l2": "memory", "call": "launch"}.get(name, name)


# A backward that makes the scores again has five products where the forward has two: Q·K, dOut·V, W·dOut, dS·Q, dS·K. What
# is computed around them grows alike: SDPA and our bodies were 2.0 to 2.6 times their forward on shapes of 1024 keys.
BACK = 2.5


def differentiated(cost: Cost, again: Cost) -> Cost:
    """The cost of a kernel with that of its backward, which makes the scores again: one more call, five products for two.

    `again`: the forward at the rates at which the backward computes.
    """
    launch = again.parts.get("launch", 0.0)
    backward = launch + BACK * (again.seconds - launch)
    more = {name: x * (1.0 if name == "launch" else BACK) for name, x in again.parts.items()}
    parts = {name: cost.parts.get(name, 0.0) + more.get(name, 0.0) for name in {**cost.parts, **more}}
    return replace(
        cost, seconds=cost.seconds + backward, backward=backward, parts=parts, bound=bound_of(parts),
        flops=round((1 + BACK) * cost.flops), bytes=round((1 + BACK) * cost.bytes), exps=2 * cost.exps,
    )
