"""How good predictions are: their error, whether they rank as the clock does, and what the choice that follows loses.

    error     |predicted / measured − 1|                 MAPE is its mean, p95 its 95th percentile
    Spearman  Pearson's correlation of the ranks, ties at their mean
    regret    measured[argmin predicted] / min measured − 1, of a cell with several candidates
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """A cell: seconds by candidate, measured and predicted; the same names in both."""

    measured: Mapping[str, float]
    predicted: Mapping[str, float]

    @property
    def chosen(self) -> str:
        return min(self.predicted, key=lambda n: self.predicted[n])

    @property
    def best(self) -> str:
        return min(self.measured, key=lambda n: self.measured[n])

    @property
    def regret(self) -> float:
        return self.measured[self.chosen] / self.measured[self.best] - 1


@dataclass(frozen=True)
class Accuracy:
    """Figures over cells. `timings` counts candidates, `regret_geometric` is the geometric mean of 1 + regret, less 1."""

    timings: int
    cells: int
    mape: float
    p95: float
    spearman: float
    regret: float
    regret_p95: float
    regret_worst: float
    regret_geometric: float

    def __str__(self) -> str:
        return (
            f"{self.timings} timings in {self.cells} cells: MAPE {self.mape:.1%}, p95 {self.p95:.1%}, Spearman "
            f"{self.spearman:.3f}, regret {self.regret:.1%} mean ({self.regret_geometric:.1%} geometric), "
            f"{self.regret_p95:.1%} p95, {self.regret_worst:.1%} worst"
        )


def accuracy(cells: Sequence[Outcome]) -> Accuracy:
    """The figures of some cells. Raises ValueError where there is none."""
    if not cells:
        raise ValueError("no cell was measured: there is nothing to compare")
    pairs = [(c.measured[n], c.predicted[n]) for c in cells for n in c.measured]
    errors = [error(p, m) for m, p in pairs]
    regrets = [c.regret for c in cells]
    mean = sum(regrets) / len(regrets)
    geometric = math.exp(sum(math.log1p(r) for r in regrets) / len(regrets)) - 1
    return Accuracy(
        len(pairs), len(cells), sum(errors) / len(errors), percentile(errors, 0.95),
        spearman([m for m, _ in pairs], [p for _, p in pairs]), mean, percentile(regrets, 0.95), max(regrets), geometric,
    )


def error(predicted: float, measured: float) -> float:
    """|predicted / measured − 1|."""
    return abs(predicted / measured - 1)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed."""
    order = sorted(values)
    return order[max(0, math.ceil(share * len(order)) - 1)]


def ranks(values: Sequence[float]) -> list[float]:
    """Places from 0 on; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = [0.0] * len(values)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for i in order[start:end]:
                out[i] = (start + end - 1) / 2
            start = end
    return out


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The rank correlation of two rows of numbers; NaN where one of them is constant or has one entry."""
    x, y = ranks(a), ranks(b)
    mean = (len(x) - 1) / 2
    spread = math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))
    return sum((i - mean) * (j - mean) for i, j in zip(x, y)) / spread if spread else math.nan


def within(predicted: float, measured: float, band: float) -> bool:
    """Does a prediction hold within its band: at most 1 + band times too high or too low?"""
    return 1 / (1 + band) <= predicted / measured <= 1 + band
