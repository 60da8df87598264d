"""Memory: what a device holds under a sharding, whether it fits, and how many sequences it could serve.

    serving    weights + caches of all layers + one layer's inputs and output
    training   weights, gradients and optimizer + inputs and output of every layer, kept for the backward pass

A tenth of the memory is left to the allocator and the runtime. Mixed-precision Adam takes 16 bytes a parameter, of which
2 are the weight itself. Source: Rajbhandari et al., "ZeRO" (SC 2020), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .placement import Placed

RESERVE = 0.1
# Bytes a parameter in training, over the 2 of its bf16 weight.
TRAINING = 8


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. `per_key` of `cache` and `activations` grow with the number of keys, both with the batch."""

    weights: int
    cache: int
    activations: int
    per_key: bool

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations

    def room(self, dram_bytes: float) -> float:
        return (1 - RESERVE) * dram_bytes


def memory(parts: Sequence[tuple[Placed, int]], step: str, weights: int = 0) -> DeviceMemory:
    """The memory of a model: (one layer's part, how many layers) pairs, and the bytes of all its weights.

    Weights that stand in the cascades are held as derived; all others are divided between the devices that carry heads.
    """
    known = sum(n * p.whole_weights for p, n in parts)
    split = min((p.split for p, _ in parts), default=1)
    held = sum(n * sum(p.weights.values()) for p, n in parts) if weights else 0
    held += math.ceil(max(0, weights - known) / split)
    own = [sum(p.inputs.values()) + p.output for p, _ in parts]
    if step == "training":
        kept = sum(n * (a + p.cache_bytes) for a, (p, n) in zip(own, parts))
        return DeviceMemory(held * TRAINING, 0, kept, True)
    cache = sum(n * p.cache_bytes for p, n in parts)
    return DeviceMemory(held, cache, max(own, default=0), step == "prefill")


def largest_batch(m: DeviceMemory, dram_bytes: float, batch: int, keys: int, length: int) -> int:
    """Sequences of `length` keys that fit beside the weights, where `m` is the memory of `batch` of `keys` keys.

    0 where not even one fits, or where the weights alone do not.
    """
    longer = length / keys
    one = (m.cache * longer + m.activations * (longer if m.per_key else 1.0)) / batch
    left = m.room(dram_bytes) - m.weights
    return max(0, math.floor(left / one)) if one else 0
