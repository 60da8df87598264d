"""The search: which method at which attention, cheapest within an error of the whole model. Numbers in, names out.

    moves in order of seconds saved per error made    →    the longest beginning within the budget, then others one by one

Deterministic: ties go by the order of the sites and of the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Configurations that are tried beyond the longest beginning.
MORE = 16

Choice = Mapping[str, str]


@dataclass(frozen=True)
class Move:
    """A method at a site: predicted seconds saved over the best exact candidate, and its error at the site alone."""

    site: str
    method: str
    saved: float
    error: float

    @property
    def worth(self) -> float:
        """Seconds saved per error; without an error, any saving comes first."""
        return self.saved / self.error if self.error > 0 else float("inf")


@dataclass(frozen=True)
class Tried:
    """A configuration with the predicted seconds that it saves, and the largest error of the whole model that it made."""

    choice: Choice
    saved: float
    error: float


def search(moves: Sequence[Move], error_of: Callable[[Choice], float], budget: float) -> tuple[list[Move], list[Tried]]:
    """The moves that are taken, in their order, and all that was tried.

    `error_of` measures a choice on the examples that configure.
    """
    order = sorted((m for m in moves if m.saved > 0), key=lambda m: -m.worth)
    tried: list[Tried] = []

    def within(taken: Sequence[Move]) -> bool:
        made = choice_of(taken)
        known = next((t for t in tried if t.choice == made), None)
        if known is None:
            known = Tried(made, saved_by(taken), error_of(made))
            tried.append(known)
        return known.error <= budget

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if within(order[:middle]) else (low, middle - 1)
    taken = order[:low]
    for move in order[low : low + MORE]:
        more = [*taken, move]
        if saved_by(more) > saved_by(taken) and within(more):
            taken = more
    return taken, tried


def confirm(
    taken: Sequence[Move], error_of: Callable[[Choice], float], budget: float
) -> tuple[list[Move], list[Tried]]:
    """The moves that stay within the budget on examples that had no part in the search: the last are taken back first."""
    left, tried = list(taken), list[Tried]()
    while left:
        made = choice_of(left)
        tried.append(Tried(made, saved_by(left), error_of(made)))
        if tried[-1].error <= budget:
            break
        left.pop()
    return left, tried


def _last(taken: Sequence[Move]) -> dict[str, Move]:
    """The move that counts at each site: the one that saves most."""
    out: dict[str, Move] = {}
    for m in taken:
        if m.site not in out or m.saved > out[m.site].saved:
            out[m.site] = m
    return out


def choice_of(taken: Sequence[Move]) -> Choice:
    """The method of each site."""
    return {site: m.method for site, m in _last(taken).items()}


def saved_by(taken: Sequence[Move]) -> float:
    """Predicted seconds saved."""
    return sum(m.saved for m in _last(taken).values())
