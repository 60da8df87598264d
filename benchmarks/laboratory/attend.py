"""Every attention of a model under a selection or a method, while the model runs: its output, and what it lost.

A mode catches each `scaled_dot_product_attention` of PyTorch and the projection behind it (the next `linear`), so that a
model is measured as it is written. What later layers see is what the approximation made of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from laboratory.by_head import ByHead
from laboratory.laws import Law
from laboratory.selections import TILE, Selection, by_tile
from reattend.rewriter.approximate.quality import kept_mass


@dataclass
class Layer:
    """What one attention of a model lost, over all the batches it ran: tensors by batch, sums of kept and allowed."""

    mass: list[Tensor] = field(default_factory=list)
    off: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)
    pairs: int = 0
    pairs_allowed: int = 0
    tiles: int = 0
    tiles_allowed: int = 0

    def count(self, keep: Tensor, mass: Tensor, allowed: Tensor) -> None:
        """One batch more: pairs [B, H, N, N], the mass of its rows, the model's own mask [N, N]."""
        number = keep.shape[0] * keep.shape[1]
        self.mass.append(mass)
        self.pairs += int(keep.sum())
        self.pairs_allowed += int(allowed.sum()) * number
        self.tiles += int(by_tile(keep).sum())
        self.tiles_allowed += int(by_tile(allowed).sum()) * number


@dataclass(frozen=True)
class Attended:
    """Output [B, H, N, F]; kept pairs [B or 1, H or 1, N, N] and kept mass of rows [B, H, N], where there are such."""

    out: Tensor
    keep: Tensor | None = None
    mass: Tensor | None = None


def attended(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, under: Selection | Law | ByHead, layer: int = 0
) -> Attended:
    """An attention under a selection or a method."""
    if isinstance(under, (Law, ByHead)):
        out, keep = under(q, k, v, not bool(allowed.all()), scale, layer)
        if keep is None:
            return Attended(out)
    else:
        tiles = under.tiles(q, k, scale, allowed) & by_tile(allowed)
        keep = tiles.repeat_interleave(TILE, -1).repeat_interleave(TILE, -2) & allowed
        out = None
    scores = q @ k.mT * scale
    full = scores.masked_fill(~allowed, float("-inf")).logsumexp(-1)
    scores = scores.masked_fill(~keep, float("-inf"))
    return Attended(scores.softmax(-1) @ v if out is None else out, keep, kept_mass(scores.logsumexp(-1), full))


class Under(TorchFunctionMode):
    """A model's attentions under a selection or a method; `layers` has what each of them lost, in the order of the calls."""

    def __init__(self, under: Selection | Law | ByHead) -> None:
        super().__init__()
        self.under = under
        self.layers: list[Layer] = []
        self.at = 0
        self.pending: tuple[Tensor, Tensor] | None = None

    def batch(self) -> Under:
        """The next call is the first attention again."""
        self.at = 0
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            return self._attention(*args, **given)
        if func is linear and self.pending is not None:
            self._projected(args[1] if len(args) > 1 else given["weight"])
        return func(*args, **given)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p or enable_gqa or q.shape[-2] != k.shape[-2]:
            raise ValueError("The laboratory measures self-attention without dropout and grouped heads")
        n = q.shape[-2]
        allowed = torch.ones(n, n, dtype=torch.bool)
        if is_causal:
            allowed = allowed.tril()
        elif attn_mask is not None:
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
            if not bool(keep.all()):
                raise ValueError("The laboratory measures attention without padding")
        if self.at == len(self.layers):
            self.layers.append(Layer())
        into, scale = self.layers[self.at], scale or q.shape[-1] ** -0.5
        made = attended(q, k, v, allowed, scale, self.under, self.at)
        self.at += 1
        exact = scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
        if made.keep is not None and made.mass is not None:
            into.count(made.keep.expand(*q.shape[:2], n, n), made.mass, allowed)
        self.pending = (exact - made.out, exact)
        return made.out

    def _projected(self, weight: Tensor) -> None:
        """Squared norms per example and head of (o - õ) W and o W, with the head's columns of W."""
        assert self.pending is not None
        (off, exact), into = self.pending, self.layers[self.at - 1]
        self.pending = None
        heads, width = off.shape[1], off.shape[-1]
        if weight.shape[1] != heads * width:
            shape = f"{heads} heads of {width}"
            raise ValueError(f"The linear layer behind an attention of {shape} reads {weight.shape[1]} features")
        by_head = weight.unflatten(1, (heads, width))
        for x, to in ((off, into.off), (exact, into.size)):
            to.append(torch.einsum("bhnf,dhf->bhnd", x, by_head).double().square().sum((-1, -2)))
