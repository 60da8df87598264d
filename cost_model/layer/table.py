"""A step as a few lines of text: how long, how many tokens a second, what of it is attention, what fits."""

from __future__ import annotations

from ..words import between, bytes_text, seconds_text, tokens_text
from .step import ModelStep

_TITLES = {
    "decode": "a token of each sequence", "prefill": "until the first token", "forward": "the whole model, once",
}
_NAMES = {"passes": "element-wise"}


def step_lines(s: ModelStep, device: str) -> list[str]:
    """What a step takes and holds."""
    many = f"{s.devices} {device} ({s.mesh})" if s.devices > 1 else device
    parts = ", ".join(f"{_NAMES.get(p, p)} {seconds_text(x)}" for p, x in s.parts.items() if x)
    each = f" ({s.tokens_per_s_device:,.0f} a device)" if s.devices > 1 else ""
    stored = " and ".join(f"{what} in {t}" for what, t in (("weights", s.weights), ("caches", s.cache)) if t)
    how = f"{', ' + stored if stored else ''}{', attention over cached latents' if s.latents else ''}"
    return [
        f"{_TITLES[s.phase]}: {seconds_text(s.seconds)} on {many}, coarsely {between(s.seconds, s.band)}: {_extent(s)}"
        f"{how}; {s.tokens_per_s:,.0f} tokens/s{each}",
        f"  of it {parts}",
        f"  a device holds {bytes_text(s.held_bytes)} of {bytes_text(s.room_bytes)}: weights {bytes_text(s.weight_bytes)}, "
        f"cache {bytes_text(s.cache_bytes)}, activations {bytes_text(s.activation_bytes)}; {_largest(s)}",
    ]


def _extent(s: ModelStep) -> str:
    what = f"batch {s.batch}"
    if s.phase == "decode":
        return f"{what}, {tokens_text(s.context)} keys"
    return f"{what}, {tokens_text(s.tokens)} tokens each"


def _largest(s: ModelStep) -> str:
    if s.weight_bytes > s.room_bytes:
        return "the weights alone do not fit"
    said = []
    if s.largest_batch is not None:
        said.append(f"batch {s.largest_batch:,} at {tokens_text(s.context)}")
    if s.largest_context is not None:
        said.append(f"context {s.largest_context:,} at batch {s.batch}")
    return f"the largest that fit: {', '.join(said)}"
