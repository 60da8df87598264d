"""Learned feature maps: a softmax attention imitated by a linear one, layer by layer on captured queries and keys.

    φ(x) = [softmax(x W); softmax(-x W)]              features sum to 2, none is negative
    A'[p,m] = w(p,m) / Σ_m' w(p,m')                   over the keys that the model's mask leaves
    w(p,m)  = exp(s - max of the window's s)          where the key is among the last `window` ones
              exp(gain) · φ(q_p)·φ(k_m)               elsewhere; window = 0: everywhere
    loss = - Σ_m A[p,m] · log A'[p,m]                 cross-entropy with the softmax's own rows; its floor: their entropy

Source: Zhang et al., "The Hedgehog & the Porcupine" (2024, arXiv 2402.04347), section 4; the window of LoLCATs (Zhang et al.
2024, arXiv 2410.10254, section 3.2), whose learned factor stands here at the far side. W begins as the identity. Layers are
independent: each is fitted on what the model itself gives it. Queries and keys are taken behind the rotation of positions;
before it the maps would know no positions.

Maps are kept as safetensors, never as pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Below this a weight counts as this in the loss, as in the published code: a logarithm of 0 teaches nothing.
LEAST = 1e-12
PARTS = ("query", "key", "gain")


@dataclass(frozen=True)
class FeatureMaps:
    """The maps of one attention: query and key [H, E, J] in float32, of which 2J features are made a head; gain [H], the
    logarithm of what far keys weigh beside those of a window.
    """

    query: Tensor
    key: Tensor
    gain: Tensor

    def __post_init__(self) -> None:
        if self.query.shape != self.key.shape or self.query.dim() != 3 or self.gain.shape != self.query.shape[:1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (self.query, self.key, self.gain))
            raise ValueError(f"Feature maps are two tensors [heads, width, features] and one [heads], not {shapes}")


@dataclass(frozen=True)
class Fitted:
    """Maps with the divergence KL(softmax row ‖ linear row) in nats: on what they were fitted on, before and after, and
    after on examples that they never saw, per head; `uniform` is what equal weights would have there, for comparison.
    """

    maps: FeatureMaps
    before: float
    after: float
    held_out: tuple[float, ...]
    uniform: tuple[float, ...]


def features(x: Tensor, w: Tensor) -> Tensor:
    """x [B, H, N, E] and w [H, E, J] → φ(x) [B, H, N, 2J]."""
    at = x @ w
    return torch.cat([at.softmax(-1), (-at).softmax(-1)], -1)


def rows(q: Tensor, k: Tensor, maps: FeatureMaps, allowed: Tensor, scale: float, window: int = 0) -> Tensor:
    """The weights under a mask [N, N], [B, H, N, N]; rows sum to 1."""
    weight = features(q, maps.query) @ features(k, maps.key).mT
    if window:
        at = torch.arange(len(allowed))
        near = allowed & (at[:, None] - at < window)
        s = (q @ k.mT * scale).masked_fill(~near, float("-inf"))
        # a row without a near key has no maximum, and no use for one
        top = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weight = torch.where(near, (s - top).exp(), maps.gain.exp()[:, None, None] * weight)
    weight = weight.masked_fill(~allowed, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def identity(heads: int, width: int, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> FeatureMaps:
    """The maps before they are fitted: the identity, and directions drawn at random beyond the width."""
    w = torch.eye(width, count, dtype=dtype)
    if count > width:
        g = torch.Generator().manual_seed(seed)
        w[:, width:] = torch.nn.functional.normalize(torch.randn(width, count - width, generator=g, dtype=dtype), dim=0)
    w = w.expand(heads, width, count)
    return FeatureMaps(w.clone(), w.clone(), torch.zeros(heads, dtype=dtype))


def _divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL of rows [B, H, N, N] in nats, the mean over rows and examples of each head, [H]."""
    kl = torch.xlogy(exact, exact) - exact * other.clamp(min=LEAST).log()
    return kl.sum(-1).mean((0, 2))


def fit(
    captured: Sequence[tuple[Tensor, Tensor]], held_out: tuple[Tensor, Tensor], allowed: Tensor, scale: float, *,
    count: int, window: int = 0, steps: int = 300, rate: float = 1e-2, seed: int = 0,
) -> Fitted:
    """Maps of `count` directions a head beside a window of so many keys, fitted on batches of queries and keys [B, H, N, E],
    taken in turn.

    `allowed` [N, N] is the model's mask, `scale` that of its scores. Deterministic by seed. Raises ValueError in one
    sentence where nothing was captured or it is not finite.
    """
    if not captured:
        raise ValueError("Feature maps are fitted on captured queries and keys, and none were given")
    if not all(bool(x.isfinite().all()) for pair in (*captured, held_out) for x in pair):
        raise ValueError("What was captured for feature maps is not finite: the model gives NaN or infinities on this data")
    heads, width = captured[0][0].shape[1], captured[0][0].shape[-1]
    start = identity(heads, width, count, seed=seed)
    w = [x.clone().requires_grad_() for x in (start.query, start.key, start.gain)]
    optimizer = torch.optim.AdamW(w, rate, weight_decay=0.0)
    teachers = [_softmax_rows(q, k, allowed, scale) for q, k in captured]
    before = float(_divergence(teachers[0], rows(*captured[0], start, allowed, scale, window)).mean())
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            q, k = captured[step % len(captured)]
            made = rows(q, k, FeatureMaps(*w), allowed, scale, window)
            loss = _divergence(teachers[step % len(captured)], made).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(w, 1.0)
            optimizer.step()
    maps = FeatureMaps(*(x.detach() for x in w))
    teacher = _softmax_rows(*held_out, allowed, scale)
    even = allowed.to(teacher.dtype) / allowed.sum(-1, keepdim=True)
    return Fitted(
        maps, before, float(_divergence(teachers[0], rows(*captured[0], maps, allowed, scale, window)).mean()),
        tuple(_divergence(teacher, rows(*held_out, maps, allowed, scale, window)).tolist()),
        tuple(_divergence(teacher, even.expand_as(teacher)).tolist()),
    )


def _softmax_rows(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    with torch.no_grad():
        return (q @ k.mT * scale).masked_fill(~allowed, float("-inf")).softmax(-1)


# --- kept on disk -----------------------------------------------------------------------------------------------------


def save(path: Path, maps: Mapping[str, FeatureMaps]) -> None:
    """Write the maps of attentions by name as one safetensors file, whole or not at all."""
    whole = path.with_name(path.name + ".part")
    tensors = {f"{n}.{part}": getattr(m, part).contiguous() for n, m in maps.items() for part in PARTS}
    _safetensors().save_file(tensors, whole, {"format": "reattend feature maps, 1"})
    whole.replace(path)


def load_parts(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file whose names are "attention.part", by attention and part."""
    out: dict[str, dict[str, Tensor]] = {}
    for name, x in _safetensors().load_file(path).items():
        site, _, part = name.rpartition(".")
        out.setdefault(site, {})[part] = x
    return out


def load(path: Path) -> dict[str, FeatureMaps]:
    """The maps of attentions by name. Raises ValueError where the file holds something else."""
    kept: dict[str, Tensor] = _safetensors().load_file(path)
    names = sorted({n.rpartition(".")[0] for n in kept})
    if sorted(kept) != sorted(f"{n}.{part}" for n in names for part in PARTS):
        raise ValueError(f"{path} holds no feature maps: {', '.join(PARTS)} of each attention are expected")
    return {n: FeatureMaps(*(kept[f"{n}.{part}"] for part in PARTS)) for n in names}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as no:
        raise ImportError("Learned feature maps are kept as safetensors: pip install safetensors") from no
    return safetensors.torch
