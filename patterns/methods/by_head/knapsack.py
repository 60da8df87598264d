"""One option for each item, the least loss within a budget of costs (a multiple-choice knapsack).

States (cost, loss) of which none is worse than another in both are carried from item to item: exact while they are few, and
beyond that within one part in `STATES` of the budget. No solution is ever above the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = 8192
# Sums of costs are compared with this much rounding.
SLACK = 1e-9


@dataclass(frozen=True)
class Item:
    """The costs and losses of an item's options."""

    costs: tuple[float, ...]
    losses: tuple[float, ...]


def choose(items: Sequence[Item], budget: float) -> tuple[int, ...] | None:
    """The option of each item; of equal losses the cheapest. None where nothing is within the budget."""
    cost, loss = np.zeros(1), np.zeros(1)
    trail = []
    # what the items behind cost at least
    rest = np.cumsum([0.0, *(min(x.costs) for x in reversed(items))])[::-1]
    for i, item in enumerate(items):
        c, x = (np.add.outer(a, np.array(b)) for a, b in ((cost, item.costs), (loss, item.losses)))
        flat_c, flat_x = c.ravel(), x.ravel()
        kept = np.flatnonzero(flat_c + rest[i + 1] <= budget * (1 + SLACK))
        if not len(kept):
            return None
        kept = kept[np.lexsort((flat_x[kept], flat_c[kept]))]
        # in order of cost, only what loses less than all before it
        before = np.minimum.accumulate(np.concatenate(([np.inf], flat_x[kept][:-1])))
        kept = kept[flat_x[kept] < before]
        if len(kept) > STATES:
            # of each small range of costs the one that loses least, which is its last
            part = np.floor(flat_c[kept] / budget * STATES)
            kept = kept[np.append(part[1:] != part[:-1], True)]
        cost, loss = flat_c[kept], flat_x[kept]
        trail.append((kept // len(item.costs), kept % len(item.costs)))
    at, out = len(loss) - 1, []
    for before_at, option in reversed(trail):
        out.append(int(option[at]))
        at = int(before_at[at])
    return tuple(reversed(out))
