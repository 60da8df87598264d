"""What ran behind doors, by the modules that called them: kept for as long as these live, and nothing of it on them."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ...cost_model.plan.plan import Plan
from ..run.report import Entered, GraphPiece
from ..splice.sampling import Samples
from .site import SITE_NAME, BehindDoor

_layers: weakref.WeakKeyDictionary[nn.Module, BehindDoor] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def layer_of(module: nn.Module) -> BehindDoor:
    """The book's page for a module that called a door."""
    found = _layers.get(module)
    if found is None:
        with _lock:
            found = _layers.setdefault(module, BehindDoor())
    return found


@dataclass(frozen=True)
class Passed:
    """What ran behind doors in one model. `notes` are sentences for its report."""

    policy: str = ""
    entries: tuple[Entered, ...] = ()
    pieces: tuple[GraphPiece, ...] = ()
    notes: tuple[str, ...] = ()


def passed(model: nn.Module) -> Passed:
    """What ran behind doors in the modules of a model."""
    found = [(path, page) for path, m in model.named_modules() if (page := _layers.get(m)) is not None]
    pieces = [named(p, path) for path, page in found for p in page.pieces]
    entries = tuple(Entered(path, page.calls, sum(page.own.values())) for path, page in found)
    policies = dict.fromkeys(str(page.door.policy) for _, page in found if page.door is not None)
    return Passed("; ".join(policies), entries, tuple(pieces), tuple(_notes(found)))


def _notes(found: Iterable[tuple[str, BehindDoor]]) -> list[str]:
    own: Counter[str] = Counter()
    said: Counter[str] = Counter()
    for _, page in found:
        own.update(page.own)
        said.update(list(page.notes))
    left = [f"left to the library's own function: {n} calls: {why}" for why, n in own.items()]
    return left + [f"{why} (×{n})" if n > 1 else why for why, n in said.items()]


def named(p: GraphPiece, path: str) -> GraphPiece:
    """A layer's record under the path that the layer has in a model."""

    def name(old: str) -> str:
        return path + old.removeprefix(SITE_NAME) if old.startswith(SITE_NAME) else old

    plan = p.plan and Plan(tuple(replace(s, name=name(s.name)) for s in p.plan.sites), p.plan.misses, p.plan.device)
    samples = Samples({name(k): v for k, v in p.samples.seconds.items()})
    checks = [replace(c, site=path) for c in p.checks]
    fallbacks = Counter({name(k): n for k, n in p.fallbacks.items()})
    return replace(p, entry=path, plan=plan, samples=samples, checks=checks, fallbacks=fallbacks)
