"""Collectives: bytes that each device sends, and seconds, from a payload and the links that an axis has.

    all-gather       each ends with all shards of n bytes        (P−1)·(α + n/β)
    reduce-scatter   each ends with its part of a sum of n       (P−1)·(α + n/(P·β))
    all-reduce       both, one after the other                   2(P−1)·(α + n/(P·β))
    all-to-all       each keeps 1/P of its n and sends the rest  (P−1)·α + (P−1)/P·n/β
    ring             P−1 steps of a shard of n to a neighbour    a step: α + n/β; it may hide behind computing

α is a message's latency, β bytes a second in one direction. Across nodes the gathers are hierarchical: every device of a
node talks to its like in other nodes at once, and the node's link spreads the rest. Source: the ring algorithms of
MPI and NCCL; Thakur et al., "Optimization of Collective Communication Operations in MPICH" (2005).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .mesh import Route

ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce-scatter"
ALL_TO_ALL, RING = "all-to-all", "ring"
KINDS = (ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, ALL_TO_ALL, RING)


@dataclass(frozen=True)
class Collective:
    """One exchange along a mesh axis. `payload` is what a device holds before: its shard (all-gather, ring) or its buffer.

    `what` says which tensor, and why it moves; `after`: behind the attention's output, not before it.
    """

    kind: str
    axis: str
    payload: int
    what: str
    after: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"collective {self.kind!r}; one of {', '.join(KINDS)}")

    def sent(self, parts: int) -> float:
        """Bytes that one device sends."""
        match self.kind:
            case "all-gather" | "ring":
                return (parts - 1) * self.payload
            case "all-reduce":
                return 2 * (parts - 1) / parts * self.payload
        return (parts - 1) / parts * self.payload

    def transfer(self, r: Route) -> float:
        """Seconds that the links carry the payload."""
        n, fast, slow = self.payload, r.fast.bytes_per_s, r.slow.bytes_per_s
        match self.kind:
            case "all-gather":
                return gathered(n, r)
            case "reduce-scatter":
                return (r.inner - 1) / r.inner * n / fast + (r.outer - 1) / r.outer * n / r.inner / slow
            case "all-reduce":
                return reduced(n, r)
            case "all-to-all":
                # links inside a node and the network work side by side
                return max((r.inner - 1) / r.parts * n / fast, (r.parts - r.inner) / r.parts * n / slow)
        return (r.parts - 1) * n / r.slowest.bytes_per_s

    def latency(self, r: Route) -> float:
        """Seconds of the messages' latency, one after the other."""
        near, far = r.fast.latency_seconds, r.slow.latency_seconds
        match self.kind:
            case "all-gather" | "reduce-scatter":
                return (r.inner - 1) * near + (r.outer - 1) * far
            case "all-reduce":
                return 2 * ((r.inner - 1) * near + (r.outer - 1) * far)
            case "all-to-all":
                return (r.inner - 1) * near + (r.parts - r.inner) * far
        return (r.parts - 1) * r.slowest.latency_seconds

    def exposed(self, r: Route, step_seconds: float = 0.0) -> float:
        """Seconds that computing waits: of a ring what a step of computing does not hide, of the others all of it."""
        if self.kind != RING:
            return self.transfer(r)
        step = r.slowest.seconds(self.payload)
        return max(0.0, (r.parts - 1) * (step - step_seconds) - self.latency(r))

    def waits(self, r: Route, step_seconds: float = 0.0) -> float:
        """Latency that computing waits for; in a ring it hides as well."""
        if self.kind != RING:
            return self.latency(r)
        step = r.slowest.seconds(self.payload)
        return min(self.latency(r), max(0.0, (r.parts - 1) * (step - step_seconds)))


Bytes = TypeVar("Bytes", float, NDArray[np.float64])


def gathered(n: Bytes, r: Route) -> Bytes:
    """Seconds in which the links carry shards of `n` bytes to everybody; of one payload, or of a column of them."""
    return (r.outer - 1) * n / r.slow.bytes_per_s + (r.inner - 1) * r.outer * n / r.fast.bytes_per_s


def reduced(n: Bytes, r: Route) -> Bytes:
    """Seconds in which the links carry a sum of `n` bytes and its parts back; of one payload, or of a column of them."""
    fast, slow = r.fast.bytes_per_s, r.slow.bytes_per_s
    return 2 * ((r.inner - 1) / r.inner * n / fast + (r.outer - 1) / r.outer * n / r.inner / slow)


def packed(exchanges: Iterable[Collective]) -> tuple[Collective, ...]:
    """Exchanges of one kind, on one axis and on one side of the attention as one message: [K|V], [q|q rotary], [o|lse]."""
    out: dict[tuple[str, str, bool], Collective] = {}
    for x in exchanges:
        key = (x.kind, x.axis, x.after)
        first = out.get(key)
        out[key] = x if first is None else replace(first, payload=first.payload + x.payload, what=f"{first.what}; {x.what}")
    return tuple(out.values())


def backward(x: Collective, parts: int) -> Collective:
    """What the gradient of an exchange sends: gathers become sums and sums gathers; a ring carries gradients along."""
    kind = {ALL_GATHER: REDUCE_SCATTER, REDUCE_SCATTER: ALL_GATHER}.get(x.kind, x.kind)
    payload = {ALL_GATHER: x.payload * parts, REDUCE_SCATTER: x.payload // parts, RING: 2 * x.payload}.get(x.kind, x.payload)
    return replace(x, kind=kind, payload=payload, what=f"backward of: {x.what}")
