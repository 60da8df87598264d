"""Learned parts of methods for the laboratory's models: captured layer by layer, fitted, kept as safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from laboratory.models import Model
from laboratory.tasks import TASKS, Size
from reattend.rewriter.approximate.feature_maps import FeatureMaps, Fitted, fit, identity, load, save

# Seeds of examples that maps are fitted on and watched on; what they are judged on has another one (rows.HELD).
FIT, WATCH = 2, 3
BATCHES, EXAMPLES = 16, 1


class Captured(TorchFunctionMode):
    """Queries and keys of every attention of a model, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            self.calls.append((args[0].contiguous(), args[1].contiguous()))
        return func(*args, **(kwargs or {}))


def captured(model: Model, task: str, size: Size, examples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys [B, H, N, E] of each layer, behind the rotation of positions."""
    with torch.no_grad(), Captured() as mode:
        model(TASKS[task].batch(size, examples, seed).words)
    return mode.calls


def unfitted(model: Model, count: int) -> list[FeatureMaps]:
    """The fixed map that fitting starts from: softmax(±x) itself."""
    shape = model.shape
    return [identity(shape.heads, shape.width // shape.heads, count) for _ in range(shape.layers)]


def hedgehog(
    model: Model, task: str, size: Size, count: int, path: Path, *, window: int, steps: int, rate: float, say: bool = False
) -> list[FeatureMaps]:
    """The maps of all layers: read, or fitted on examples of the task at this size."""
    if path.exists():
        kept = load(path)
        return [kept[f"blocks.{i}.attention"] for i in range(model.shape.layers)]
    batches = [captured(model, task, size, EXAMPLES, FIT + 1000 * i) for i in range(BATCHES)]
    watched = captured(model, task, size, 4, WATCH)
    allowed = torch.ones(size.tokens, size.tokens, dtype=torch.bool).tril()
    scale = (model.shape.width // model.shape.heads) ** -0.5
    made: dict[str, Fitted] = {}
    for i in range(model.shape.layers):
        layer = f"blocks.{i}.attention"
        made[layer] = fit(
            [b[i] for b in batches], watched[i], allowed, scale, count=count, window=window, steps=steps, rate=rate
        )
        if say:
            nats = ", ".join(f"{a:.3f} (even weights {b:.3f})" for a, b in zip(made[layer].held_out, made[layer].uniform))
            print(f"feature maps of {layer}, {task} {size}: KL of rows by head on other examples {nats}", flush=True)
    save(path, {n: x.maps for n, x in made.items()})
    return [x.maps for x in made.values()]
