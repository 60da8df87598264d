"""A step of a whole model: what it takes and holds, from attentions that are priced elsewhere and the work around them.

    seconds   attention + products + experts + passes + exchanges, one after the other, as in a captured graph of launches
    memory    weights + caches + what one product reads and writes, beside two copies of the tokens
    tokens    decode: one a sequence and step; prefill: the first one, after the whole prompt

What is said of a step; steps.py prices it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..json import Json, Read
from ..mesh.mesh import Mesh

# Bytes of an element of weights and of caches; int4 with a 16-bit scale for each 128 of them.
WEIGHT_TYPES: Mapping[str, float] = {"fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
CACHE_TYPES: Mapping[str, float] = {"fp8": 1.0, "int8": 1.0}
PARTS = ("attention", "products", "experts", "passes", "exchanges")


class StepError(ValueError):
    """A step that cannot be priced; the message is one sentence that says what can."""


@dataclass(frozen=True)
class Attended:
    """One attention of the step: seconds, of these the launch, and bytes of keys and values.

    `per_key`: these grow with the context; `held` are bytes that it holds while it runs. `heads` and `key_heads`: into how
    many parts its queries and its keys can be cut.
    """

    seconds: float
    launch: float
    band: float
    cache_bytes: int
    per_key: bool
    held: int = 0
    heads: int = 1
    key_heads: int = 1


@dataclass(frozen=True)
class Extent:
    """Tokens of a step: sequences, new tokens of each, keys of each; `generates`: the last token alone leads to the next."""

    batch: int
    tokens: int
    context: int
    generates: bool

    @property
    def phase(self) -> str:
        if not self.generates:
            return "forward"
        return "decode" if self.tokens == 1 else "prefill"


@dataclass(frozen=True)
class Types:
    """What weights of products and caches are stored in; "" as in the model. Raises StepError on an unknown type."""

    weights: str = ""
    cache: str = ""

    def __post_init__(self) -> None:
        for what, value, known in (("weights", self.weights, WEIGHT_TYPES), ("cache", self.cache, CACHE_TYPES)):
            if value and value not in known:
                raise StepError(f"{what} in {value!r} are not known: one of {', '.join(known)}, or none for the model's own")


@dataclass(frozen=True)
class ModelStep:
    """What one step takes and holds on each of `devices`. `parts` are seconds by part, which add up.

    `band`: from seconds / (1 + band) to seconds · (1 + band) is as predicted. `latents`: attention runs over
    what is cached of latents, and their keys and values are not made. `room_bytes`: what a device has for weights,
    caches and activations. The largest batch is that at this context, the largest context that at this batch: None where
    nothing grows with it.
    """

    phase: str
    batch: int
    tokens: int
    context: int
    parts: Mapping[str, float] = field(hash=False)
    band: float
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    room_bytes: int
    largest_batch: int | None
    largest_context: int | None
    devices: int = 1
    mesh: str = ""
    weights: str = ""
    cache: str = ""
    latents: bool = False

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences a second: new ones in decoding, else those of the prompts."""
        return self.batch * self.tokens / self.seconds

    @property
    def tokens_per_s_device(self) -> float:
        return self.tokens_per_s / self.devices

    @property
    def held_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.held_bytes <= self.room_bytes

    def to_dict(self) -> dict[str, Json]:
        """Plain data, with what follows from it."""
        return vars(self) | {
            "parts": dict(self.parts), "seconds": self.seconds, "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_device": self.tokens_per_s_device, "fits": self.fits,
        }

    @staticmethod
    def from_dict(d: Read) -> ModelStep:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        follows = ("seconds", "tokens_per_s", "tokens_per_s_device", "fits")
        return ModelStep(**{k: v for k, v in d.items() if k not in follows})


@dataclass(frozen=True)
class StepSpread:
    """How a step is divided: the mesh, bytes of caches on each device where they are known, seconds of exchanges of `cp`.

    `attention_seconds`: of all attentions on one device, where they run over latents as these are cached.
    """

    mesh: Mesh
    cache_bytes: int | None = None
    exchange_seconds: float = 0.0
    attention_seconds: float | None = None
