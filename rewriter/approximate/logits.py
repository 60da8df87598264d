"""What a configuration does to a language model's answers, end to end: divergence and first choices on examples held out.

Logits are what the output calls so ("logits"), or a single tensor [batch, tokens, n] where n is the number of rows of the
model's own table of tokens. Of other outputs nothing is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .quality import Sample, divergence, mean, quantile


def logits_of(model: nn.Module, out: Any) -> Tensor | None:
    """[batch, tokens, n], or None where an output is not known to be logits."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(named, Tensor):
        return named if named.dim() == 3 and named.is_floating_point() else None
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(out, Tensor) and out.dim() == 3 and out.is_floating_point() and out.shape[-1] in tables:
        return out
    return None


def answers(exact: Sequence[Tensor], made: Sequence[Tensor]) -> str:
    """Of all tokens of the examples: KL(model ‖ approximate) in nats, its mean and 99th percentile, and equal first choices,
    each with its 95 % interval by example.
    """
    kl = torch.cat([divergence(a, b).flatten().cpu() for a, b in zip(exact, made, strict=True)])
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten().double().cpu() for a, b in zip(exact, made, strict=True)])
    example = torch.cat([torch.full((a.shape[0] * a.shape[1],), i) for i, a in enumerate(exact)])
    if not bool(kl.isfinite().all()):
        return "its logits are not finite on examples held out"
    nats, first = Sample(kl, example, len(exact)), Sample(same, example, len(exact))
    return (
        f"answers on examples held out, {len(kl)} tokens: KL {mean(nats)} nats, 99th percentile {quantile(nats, 0.99)}; "
        f"the first choice is the model's in {mean(first)}"
    )
