"""Training of a laboratory model: deterministic by seed, resumable, kept in a folder as safetensors.

The batch of step t is drawn from the seed (seed, t) alone, and parameters, moments and the step are written every so many
steps, so that a training that was cut off goes on where it was and ends where it would have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from laboratory.models import Model, Shape
from laboratory.tasks import NOBODY, TASKS, Size, characters

KEEP_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """What a training depends on, all of it; `mix` are tasks with their sizes and batch sizes, taken in turn."""

    name: str
    shape: Shape
    mix: tuple[tuple[str, Size, int], ...]
    steps: int
    rate: float = 3e-3
    seed: int = 0

    def key(self) -> str:
        """Changes with anything that changes the weights: the recipe, and the text where text is learned."""
        h = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        if any(task == "text" for task, _, _ in self.mix):
            h.update(characters()[0].to(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:12]


def _state(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        for what, x in optimizer.state[p].items():
            state[f"{what}.{n}"] = x.contiguous()
    return state


def _written(path: Path, state: dict[str, Tensor], step: int) -> None:
    """Whole or not at all: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(state, part, {"step": str(step)})
    part.replace(path)


def _resumed(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    with safe_open(path, "pt") as f:
        kept = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (a safe_open is no dictionary)
        step = int(f.metadata()["step"])
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(kept[f"model.{n}"])
            own = {k.removesuffix(f".{n}"): x for k, x in kept.items() if k.endswith(f".{n}") and not k.startswith("model.")}
            if own:
                optimizer.state[p] = own
    return step


def rate(recipe: Recipe, step: int) -> float:
    """Fifty steps up, then a half cosine down to a hundredth."""
    t = min(1.0, (step + 1) / 50)
    return recipe.rate * t * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def trained(recipe: Recipe, folder: Path, *, until: int | None = None, say: bool = False) -> Model:
    """The trained model in evaluation mode: read from the folder, or trained from where the folder is at.

    `until`: stop after so many steps all the same (the state is kept). Raises nothing of its own.
    """
    torch.manual_seed(recipe.seed)
    model = Model(recipe.shape)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=0.01)
    path = folder / f"{recipe.name}-{recipe.key()}.safetensors"
    first, last, start = _resumed(path, model, optimizer), until or recipe.steps, time.process_time()
    for step in range(first, last):
        task, size, examples = recipe.mix[step % len(recipe.mix)]
        batch = TASKS[task].batch(size, examples, (recipe.seed << 24) + step, held_out=False)
        asked = batch.labels != NOBODY
        optimizer.param_groups[0]["lr"] = rate(recipe, step)
        loss = cross_entropy(model.head(model.features(batch.words)[asked]), batch.labels[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == last:
            _written(path, _state(model, optimizer), step + 1)
            if say:
                spent = (time.process_time() - start) / (step + 1 - first)
                at = f"step {step + 1} of {recipe.steps}, {task} {size}"
                print(f"{recipe.name}: {at}, loss {loss.item():.4f}, {spent:.3f} s of processor time a step", flush=True)
    return model.eval()


def accuracy(model: Model, task: str, size: Size, examples: int, seed: int = 0) -> float:
    """Share of right answers on held-out examples."""
    batch = TASKS[task].batch(size, examples, seed)
    asked = batch.labels != NOBODY
    with torch.no_grad():
        right = model(batch.words).argmax(-1)[asked] == batch.labels[asked]
    return float(right.double().mean())
