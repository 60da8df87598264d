"""One way to spread all attentions of a model over a mesh, as plain data: what a device holds, does and sends in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Exchange:
    """A collective of each of `layers` layers: bytes that a device sends in one, seconds if nothing hides it."""

    kind: str
    axis: str
    what: str
    parts: int
    layers: int
    sent_bytes: int
    seconds: float


@dataclass(frozen=True)
class Scheme:
    """One way over all attentions of a model; bytes, FLOP and seconds are those of one device in one step.

    `parts` are seconds by part: compute and memory (they overlap), exposed and latency of exchanges (they add up); matrix
    and exp are what computing is made of.
    `batches`: the most sequences of each context length that the mesh can hold. `even`: the most that a device has to do
    over the mean; `copies`: on how many devices each cached number lies. `token_bytes`: what a device caches of one token
    in one layer, on average.
    """

    name: str
    assignment: str
    exact: bool
    feasible: bool
    why: str
    weight_bytes: int = 0
    cache_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0
    traffic_bytes: int = 0
    exchanges: tuple[Exchange, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    seconds: float = float("inf")
    bound: str = ""
    batches: Mapping[int, int] = field(default_factory=dict, hash=False)
    even: float = 1.0
    copies: float = 1.0
    token_bytes: float = 0.0

    @property
    def held_bytes(self) -> int:
        """Bytes that a device holds: weights, cache and activations."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes that a device sends in a step, over all layers."""
        return sum(x.sent_bytes * x.layers for x in self.exchanges)

    def batch(self, keys: int) -> int:
        """The largest batch at this context length. Raises KeyError for a length that was not asked for."""
        return self.batches[keys]
