"""Whole calls on the clock: as rewritten and as written, in turn, by what a call is given; the faster one goes on.

    calls 1 … 4      as rewritten: kernels compile, and each is timed beside its own code (splice/race.py)
    calls 5 … 20     as written, as rewritten, as written, …; fewer where one is far ahead
    afterwards       the one whose least time is shorter

A capture has a price of its own, which a small model pays at every call. Running the model as written is always right,
and is done where all of its attentions may be as fast so, and hold little memory (`GraphPiece.close`).
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Calls before the first that is timed, and calls of either kind that are; so many do where one is so far ahead.
WARM, ROUNDS = 4, 8
FEW, AHEAD = 3, 0.25
# Times that differ by less are the same: a call of either way is timed whole.
NEAR = 0.01
# Kinds of calls that are told apart; beyond them calls run as rewritten.
KEPT = 64


@dataclass
class Contest:
    """Calls of one kind: seconds `written` and `rewritten`."""

    calls: int = 0
    written: list[float] = field(default_factory=list)
    rewritten: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        least = min(len(self.written), len(self.rewritten))
        return least >= ROUNDS or (least >= FEW and self._apart() > AHEAD)

    def _apart(self) -> float:
        a, b = sorted((min(self.written), min(self.rewritten)))
        return b / a - 1

    @property
    def lost(self) -> bool:
        """Is the model faster as written?"""
        return self.over and min(self.rewritten) > (1 + NEAR) * min(self.written)

    def turn(self) -> list[float] | None:
        """Where the seconds of the next call belong; None where it runs as rewritten and is not timed."""
        self.calls += 1
        if self.calls <= WARM or self.over:
            return None
        return self.written if len(self.written) <= len(self.rewritten) else self.rewritten


class Contests:
    """Those of one module, by what its calls are given."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kinds: dict[Hashable, Contest] = {}
        self.any_lost = False

    def lost(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Is the model known to be faster as written at calls of this kind?"""
        if not self.any_lost:
            return False
        kind = kind_of(self.module, args, kwargs)
        return kind is not None and kind in self.kinds and self.kinds[kind].lost

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Contest | None:
        """The contest of a call; None where either way may be wanted for more than its time."""
        kind = kind_of(self.module, args, kwargs)
        if kind is None or (kind not in self.kinds and len(self.kinds) >= KEPT):
            return None
        return self.kinds.setdefault(kind, Contest())

    def note(self, into: list[float], seconds: float) -> None:
        into.append(seconds)
        self.any_lost = any(c.lost for c in self.kinds.values())


def kind_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """What tells a call on the CPU apart, from outside; None where gradients are wanted, or an argument has more to it.

    (A cache has lengths of its own.)
    """
    if torch.is_grad_enabled():
        return None
    out: list[Hashable] = [module.training, torch.is_autocast_enabled("cpu"), *kwargs]
    for x in (*args, *kwargs.values()):
        if type(x) is torch.Tensor and x.device.type == "cpu":
            out.append((x.shape, x.dtype))
        elif x is None or isinstance(x, (bool, int, float, str)):
            out.append(x)
        else:
            return None
    return tuple(out)


def now() -> float:
    """One thread is timed by what it ran: other programs then disturb little."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
