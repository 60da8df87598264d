"""Rows of the laboratory: a model on a task under a method at a budget, on held-out examples, with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from laboratory.attend import Under
from laboratory.by_head import ByHead
from laboratory.laws import Law
from laboratory.selections import Selection
from laboratory.tasks import TASKS, Batch, Size
from reattend.rewriter.approximate.quality import AnswerQuality, HeadQuality, answer_quality, head_quality

# Seeds of held-out examples: those that a method is fitted on come from another one.
HELD = 1


@dataclass(frozen=True)
class Row:
    """One cell of the table.

    `density` is the share of the model's own pairs that are kept, `tiles` of its tiles of 8 (the work that is left of a
    kernel over tiles), both over all layers, None where no pair is read alone (linear methods); `seconds` the processor
    time of the method's attention and `dense` of the exact one, by our kernel at a longer length (laboratory/speed.py), None
    where none was timed.
    """

    model: str
    task: str
    size: str
    method: str
    kind: str
    budget: float
    density: float | None
    tiles: float | None
    answers: AnswerQuality
    heads: tuple[HeadQuality, ...]
    seconds: float | None = None
    dense: float | None = None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def parts(batch: Batch, size: int) -> Iterator[Tensor]:
    """Words of `size` examples at a time."""
    yield from batch.words.split(size)


def logits(model: nn.Module, batch: Batch, at_a_time: int = 8) -> Tensor:
    """What the model says, [B, N, V]."""
    with torch.no_grad():
        return batch.finish(torch.cat([model(words) for words in parts(batch, at_a_time)]))


def measured(
    model: nn.Module, name: str, task: str, size: Size, under: Selection | Law | ByHead, exact: Tensor, batch: Batch
) -> Row:
    """The row of a selection of the laboratory's own, or of a method; `exact` are the model's own logits on the batch."""
    mode = Under(under)
    said = []
    with torch.no_grad():
        for words in parts(batch, 8):
            with mode.batch():
                said.append(model(words))
    heads = [
        h for i, layer in enumerate(mode.layers)
        for h in head_quality(i, torch.cat(layer.mass) if layer.mass else None, torch.cat(layer.off), torch.cat(layer.size))
    ]
    pairs, tiles = (sum(getattr(x, f"{n}_allowed") for x in mode.layers) for n in ("pairs", "tiles"))
    is_law = isinstance(under, (Law, ByHead))
    return Row(
        name, task, str(size), str(under) if is_law else f"{type(under).__name__}({under.share:g})",
        "method" if is_law else "anchor", under.budget if is_law else under.share,
        sum(x.pairs for x in mode.layers) / pairs if pairs else None,
        sum(x.tiles for x in mode.layers) / tiles if tiles else None,
        answer_quality(exact, batch.finish(torch.cat(said)), batch.labels), tuple(heads),
    )


def held_out(task: str, size: Size, examples: int) -> Batch:
    return TASKS[task].batch(size, examples, HELD)
