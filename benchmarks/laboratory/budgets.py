"""Every registered method at a budget: which of its parameters make it keep about a share of the causal pairs.

How much a method keeps that looks at queries and keys is known when it ran: it has a sweep of its own parameter instead, and
the table's densities say what that kept. A method without a line here runs at its own defaults, once, and says so by its
parameters in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from laboratory import fitted
from laboratory.laws import Law
from laboratory.models import Model
from laboratory.selections import TILE
from laboratory.tasks import Size
from reattend.patterns.methods.linear.based import TaylorWindow
from reattend.patterns.methods.linear.hedgehog import Hedgehog
from reattend.patterns.methods.method import Method
from reattend.patterns.methods.registry import MethodFacts, methods
from reattend.patterns.methods.selected.flexprefill import FlexPrefill
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selected.xattention import XAttention
from reattend.patterns.methods.static.sink_window import SinkWindow

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


def laws(
    model: Model, name: str, task: str, size: Size, budgets: Sequence[float], cache: Path, key: str
) -> Iterator[Law | str]:
    """Every method at every budget it has; a sentence for one that needs what the laboratory has not."""
    for facts in methods():
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
