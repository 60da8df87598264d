"""Predictions beside the clock, while a model runs: some calls of a graph run node by node, with the spliced kernels timed.

    calls    1, 3, 5, 6, 7, …  the graph as it is                  2, 4, 8, 16, …  node by node

The first call is left out, because kernels compile in it, and before a kernel's first time it runs once more, so that a
machine that was busy with something else has it at hand. A time counts only where the inputs have the sizes that the plan
was made for and no guard fell back. All other calls pay one comparison of an integer.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph.torch_private import tree_leaves
from .guards import Guarded
from .race import trained
from .splice import SITE, hint

# Times that are kept of a site; the newest ones count.
KEPT = 8


@dataclass
class Samples:
    """Seconds of the chosen kernels by site, of the last calls that were timed."""

    seconds: dict[str, deque[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, site: str, seconds: float) -> None:
        with self.lock:
            self.seconds.setdefault(site, deque(maxlen=KEPT)).append(seconds)

    def median(self, site: str) -> float | None:
        """The median of a site's times; None where none was taken."""
        with self.lock:
            taken = list(self.seconds.get(site, ()))
        return statistics.median(taken) if taken else None


def due(call: int) -> bool:
    """Is a graph's call of this number (from 1 on) timed: 2, 4, 8, …"""
    return call > 1 and call & (call - 1) == 0


def timed(graph: fx.GraphModule, samples: Samples, *args: Any) -> Any:
    """Run a graph node by node, with the times of its spliced kernels added to the samples."""
    return _Timed(graph, samples).run(*args)


class _Timed(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, samples: Samples) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.samples = samples

    def run_node(self, n: fx.Node) -> Any:
        site = n.meta.get(SITE)
        if site is None or not self._as_planned(n):
            return super().run_node(n)
        guard = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        before = guard.fallbacks[site] if isinstance(guard, Guarded) else 0
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves(self.map_nodes_to_values(n.args, n)))
        # a guarded call is warmed where it would not be guarded without its watch
        watched = isinstance(guard, Guarded) and guard.watch is not None and not guard.broken and not guard.conditions
        if (guard is None or watched) and self.samples.median(site) is None:
            # nothing is saved for a backward pass: who counts what is saved must find what the model saves
            with torch.no_grad():
                super().run_node(n)
        out, seconds = (_by_events if on_gpu else _by_clock)(lambda: super(_Timed, self).run_node(n))
        if not isinstance(guard, Guarded) or guard.fallbacks[site] == before:
            self.samples.add(site, seconds)
            if isinstance(guard, Guarded) and guard.race is not None and not guard.race.over and not on_gpu:
                self._race(n, guard)
        return out

    def _race(self, n: fx.Node, guard: Guarded) -> None:
        """The call beside its own code, both with their backward where a gradient is wanted."""
        given: Sequence[Any] = self.map_nodes_to_values(n.args, n)  # type: ignore[assignment]
        arguments, inputs = given[:2]
        wanted = any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(inputs))
        if guard.race is None or guard.race.barred:
            return
        # own code may draw random numbers, of which the model's state is to know nothing
        with torch.random.fork_rng(devices=()):
            if torch.is_grad_enabled() and wanted:
                guard.race.run(trained(guard.called, (arguments, inputs)), trained(guard.own, inputs))
                return
            with torch.no_grad():
                guard.race.run(lambda: super(_Timed, self).run_node(n), lambda: guard.own(inputs))

    def _as_planned(self, n: fx.Node) -> bool:
        """Have the tensors the sizes with which the graph was captured?"""
        given = tree_leaves(self.map_nodes_to_values(n.args, n))
        planned = tree_leaves(fx.map_arg(n.args, lambda x: x.meta["val"]))
        pairs = [(g, p) for g, p in zip(given, planned) if isinstance(p, torch.Tensor)]
        return all(list(g.shape) == [hint(s) for s in p.shape] for g, p in pairs)


def _by_clock(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    out = run()
    return out, time.perf_counter() - start


def _by_events(run: Callable[[], Any]) -> tuple[Any, float]:
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    start.record()
    out = run()
    end.record()
    end.synchronize()
    return out, start.elapsed_time(end) * 1e-3
