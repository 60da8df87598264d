"""A rewritten site beside the model's own code on the clock, where predictions cannot tell which is faster.

    calls 2, 4     own, kernel, own, kernel, own, kernel       afterwards the one whose least time is shorter, for good

Own code stands in the graph beside each call, and is known to run again without a trace. What is not known beforehand (a
processor that the rates are not of, what a call takes beside next to no work) shows on the machine itself. Where gradients
are wanted, both are timed with their backward (`trained`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...cost_model.time.cost import Cost
from ...cost_model.words import seconds_text
from ..graph.torch_private import tree_leaves, tree_map

# Rounds of a race, of which so many are run at a call that is timed.
ROUNDS, AT_A_CALL = 6, 3
# What the own code of an attention may hold at once to be timed.
TIMED_BYTES = 64 << 20
# Times that differ by less are the same.
NEAR = 0.03


def undecided(kernel: Cost | None, own: Cost | None) -> bool:
    """May either be the faster one, by the bands of their predictions?"""
    if kernel is None or own is None:
        return True
    return own.seconds / (1 + own.band) < kernel.seconds * (1 + kernel.band)


@dataclass
class Race:
    """Times of one site's kernel and of its own code, and how they ended: `lost` says that the kernel was slower.

    `note` takes the sentence, by the site's name. `barred`: one of the site's calls is run again by a checkpoint, which
    counts what is saved: no call may go back to its own code between the two.
    """

    site: str
    note: dict[str, str] = field(default_factory=dict)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    lost: str = ""
    barred: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def over(self) -> bool:
        return len(self.rounds) >= ROUNDS

    def run(self, kernel: Callable[[], object], own: Callable[[], object]) -> None:
        """Some rounds, each of both in turn; the code of either is in the caches by then."""
        own()
        for _ in range(AT_A_CALL):
            took = (seconds(own), seconds(kernel))
            with self.lock:
                self.rounds.append(took)
        with self.lock:
            if self.over and not self.lost:
                self._end()

    def _end(self) -> None:
        own, kernel = (min(r[i] for r in self.rounds) for i in (0, 1))
        if kernel > (1 + NEAR) * own:
            self.lost = f"{seconds_text(kernel)} against {seconds_text(own)} of the model's own code, which runs instead"
            self.note[self.site] = self.lost


def trained(run: Callable[[Any], Any], given: Any) -> Callable[[], object]:
    """`run(given)` and the gradients of all that wants one, on a tape of its own; 1 flows back to each element."""
    leaves = {id(x): x.detach().requires_grad_() for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad}
    own = tree_map(lambda x: leaves.get(id(x), x), given)

    def step() -> object:
        out = run(own)
        outs = [x for x in ((out,) if isinstance(out, Tensor) else out) if x.requires_grad]
        if not outs:
            return out  # what wants a gradient is only compared with
        return torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(x) for x in outs], allow_unused=True)

    return step


def seconds(run: Callable[[], object]) -> float:
    """One thread is timed by what it ran: other programs then disturb little."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start
