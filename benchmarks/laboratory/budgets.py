"""Every registered method at a budget: which of its parameters make it keep about a share of the causal pairs.

How much a method keeps that looks at queries and keys is known when it ran: it has a sweep of its own parameter instead, and
the table's densities say what that kept. A method without a line here runs at its own defaults, once, and says so by its
parameters in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from laboratory import fitted
from laboratory.attend import Under
from laboratory.by_head import ByHead, Cost, Levels, search
from laboratory.laws import Law
from laboratory.models import Model
from laboratory.rows import logits, parts
from laboratory.selections import TILE
from laboratory.tasks import TASKS, Size
from reattend.patterns.methods.linear.based import TaylorWindow
from reattend.patterns.methods.linear.hedgehog import Hedgehog
from reattend.patterns.methods.method import Method
from reattend.patterns.methods.registry import MethodFacts, methods
from reattend.patterns.methods.selected.flexprefill import FlexPrefill
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selected.xattention import XAttention
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.rewriter.approximate.quality import answer_quality

# Directions of a learned map a head, and steps of its fitting.
FEATURES, WINDOW, STEPS, RATE = 64, 16, 300, 2e-2


def band(n: int, w: int) -> int:
    """Pairs of n rows in which row p has min(p + 1, w) keys."""
    w = min(n, w)
    return w * (w + 1) // 2 + (n - w) * w


def pairs(n: int, sink: int, window: int) -> int:
    """Causal pairs of n tokens that a sink and a window keep: the sink counts from where the window has left it."""
    return band(n, window) + band(max(0, n - window), sink)


def window_for(n: int, share: float, sink: int) -> int:
    """The largest window that keeps at most this share of the causal pairs, one key at least."""
    most = share * n * (n + 1) / 2
    return max((w for w in range(1, n + 1) if pairs(n, sink, w) <= most), default=1)


# By a method's name: the method at this share of the pairs of n tokens.
AT: Mapping[str, Callable[[int, float], Method]] = {
    SinkWindow.name: lambda n, share: SinkWindow(TILE, window_for(n, share, TILE)),
    TaylorWindow.name: lambda n, share: TaylorWindow(window_for(n, share, 0)),
}

# By a method's name: the method from little to much, on tiles of the laboratory's size.
SWEPT: Mapping[str, Sequence[Method]] = {
    XAttention.name: [XAttention(mass=m, stride=2, block=TILE) for m in (0.5, 0.6, 0.7, 0.8, 0.9)],
    FlexPrefill.name: [FlexPrefill(mass=m, block=TILE, least=TILE) for m in (0.5, 0.6, 0.7, 0.8, 0.9)],
    MoBA.name: [MoBA(count=c, block=TILE) for c in (5, 9, 20)],
}


# By a method's name: its levels of a head, from little to much. A head at less than these sees a sink and a window.
LEVELS: Mapping[str, Sequence[Method]] = {
    XAttention.name: [XAttention(mass=m, stride=2, block=TILE) for m in (0.5, 0.65, 0.8, 0.9, 0.95, 0.98)],
    FlexPrefill.name: [FlexPrefill(mass=m, block=TILE, least=TILE) for m in (0.5, 0.65, 0.8, 0.9, 0.95, 0.98)],
    MoBA.name: [MoBA(count=c, block=TILE) for c in (2, 3, 5, 9, 14, 20, 32)],
}
STREAMING = SinkWindow(TILE, 2 * TILE)
# Of the pairs that all heads together keep, and examples that the levels are found on.
SHARE, EXAMPLES = 0.25, 8


def laws(
    model: Model, name: str, task: str, size: Size, budgets: Sequence[float], cache: Path, key: str,
    wanted: Callable[[str], bool] = lambda family: True,
) -> Iterator[Law | ByHead | str]:
    """Every wanted method at every budget it has, and by head; a sentence for one that needs what the laboratory has not."""
    for facts in methods():
        if wanted(facts.name):
            yield from _alone(facts, model, name, task, size, budgets, cache, key)
        if facts.name in LEVELS and wanted(f"{facts.name} by head"):
            yield by_head(model, task, size, facts.name)


def _alone(
    facts: MethodFacts, model: Model, name: str, task: str, size: Size, budgets: Sequence[float], cache: Path, key: str
) -> Iterator[Law | str]:
    """A method, the same for all heads."""
    if facts.name == Hedgehog.name:
        yield from _hedgehog(model, name, task, size, cache, key)
    elif facts.name in AT:
        for share in budgets:
            yield Law(AT[facts.name](size.tokens, share), budget=share)
    elif facts.name in SWEPT:
        yield from map(Law, SWEPT[facts.name])
    else:
        yield at_defaults(facts)


def at_defaults(facts: MethodFacts) -> Law | str:
    """The method at its defaults, or which parameters have none."""
    missing = [n for n, v in facts.parameters.items() if v is ...]
    if missing:
        return f"{facts.name}: it has no default for {', '.join(missing)}"
    return Law(facts.make())


def by_head(model: Model, task: str, size: Size, name: str) -> ByHead:
    """A method with a level for every head, within `SHARE` of the pairs, found on examples that nothing is measured on."""
    levels = [Law(STREAMING), *map(Law, LEVELS[name])]
    batch = TASKS[task].batch(size, EXAMPLES, fitted.FIT)
    exact = logits(model, batch)
    known: dict[str, Cost] = {}

    def made(chosen: Levels, label: str = "") -> ByHead:
        return ByHead([[levels[i] if i < len(levels) else None for i in row] for row in chosen], SHARE, label)

    def cost(chosen: Levels) -> Cost:
        if str(chosen) not in known:
            mode, said = Under(made(chosen)), []
            with torch.no_grad():
                for words in parts(batch, 8):
                    with mode.batch():
                        said.append(model(words))
            nats = answer_quality(exact, batch.finish(torch.cat(said)), batch.labels).kl.value
            known[str(chosen)] = Cost(nats, sum(x.pairs for x in mode.layers) / sum(x.pairs_allowed for x in mode.layers))
        return known[str(chosen)]

    chosen = search(model.shape.layers, model.shape.heads, len(levels), cost, SHARE, say=True)
    text = "; ".join(", ".join("exact" if i == len(levels) else str(levels[i]) for i in row) for row in chosen)
    return made(chosen, f"{name} by head: {text}")


def _hedgehog(model: Model, name: str, task: str, size: Size, cache: Path, key: str) -> Iterator[Law]:
    """The fixed map that fitting starts from, alone and beside a window, and both fitted."""
    for window in (0, WINDOW):
        path = cache / f"{name}-{key}-{task}-{size.tokens}-hedgehog-{FEATURES}-{window}-{STEPS}.safetensors"
        made = fitted.hedgehog(
            model, task, size, FEATURES, path, window=window, steps=STEPS, rate=RATE, say=True
        )
        for how, maps in (("as it starts", fitted.unfitted(model, FEATURES)), ("fitted", made)):
            learned = [{"WQ": m.query, "WK": m.key} | ({"GAIN": m.gain} if window else {}) for m in maps]
            label = f"{Hedgehog.name}(features={FEATURES},window={window}), {how}"
            yield Law(Hedgehog(path.name, FEATURES, window), learned, label=label)
