"""A method that selects: its program makes a table of q and k before the kernel runs, at its site, counted and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import reattend
from reattend.patterns.attention.attention import Attention
from reattend.patterns.methods.masked import block_table, masked
from reattend.patterns.methods.method import Method, Replacement, SelectionWork
from reattend.patterns.verdict import Refusal
from tests.approximate.test_calibrate import N, Two, data, policy

SIDE = 32


@dataclass(frozen=True)
class NearTiles:
    """The table of each tile and the one before it; which it reads q for is the shape alone."""

    query: str
    late: int
    shape: tuple[int, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.query,)

    @property
    def keyed(self) -> bool:
        return self.late >= 0

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        q = tensors[self.query]
        n = -(-N // SIDE)
        i = torch.arange(n, device=q.device)
        near = (i[:, None] >= i) & (i[:, None] - i <= self.late)
        return near.expand(self.shape).contiguous()

    def share(self, table: Any, sizes: Mapping[str, int]) -> float:
        return float(table.sum()) / (int(table.numel()) * (1 + SIDE / N) / 2)

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        return SelectionWork(bytes=(N // SIDE) ** 2, kernels=2)


@dataclass(frozen=True)
class Near(Method):
    name: ClassVar[str] = "near-tiles"
    source: ClassVar[str] = "these tests"

    late: int = 1

    def replace(self, a: Attention) -> Replacement | Refusal:
        table, keep = block_table(a, SIDE, SIDE)
        made = masked(a, keep, str(self), (table,))
        if isinstance(made, Refusal):
            return made
        query = next(str(x.attr) for x in a.products[0].reads if a.query in x.ranks)
        return Replacement(made, table.name, NearTiles(query, self.late, tuple(int(n) for n in table.shape)), density=2 * SIDE / N)


@pytest.fixture(scope="module")
def report() -> reattend.Report:
    torch.manual_seed(0)
    model = Two().eval()
    reattend.optimize(model, policy=policy(methods=(Near(),)))
    with torch.no_grad():
        model(data()[0])
    return reattend.report(model)


def test_it_is_installed_where_its_error_allows_it(report: reattend.Report) -> None:
    kernels = {s.name: s.kernel for s in report.sites}
    assert kernels["near"] == "near-tiles(late=1)", str(report)
    assert kernels["far"] != "near-tiles(late=1)"
    (check,) = [c for c in report.checks if c.site == "near"]
    assert check.verdict == "same", check


def test_a_table_that_leaves_a_row_empty_is_never_installed() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    reattend.optimize(model, policy=policy(methods=(Near(late=-1),)))
    said = str(reattend.report(model))
    assert "nothing is installed: none can run" in said
    assert "it is not so that every row keeps a key" in said


def test_its_selection_is_in_its_time(report: reattend.Report) -> None:
    site = next(s.site for s in report.sites if s.name == "near")
    cost = site.chosen.cost
    assert cost is not None
    assert 0 < cost.parts["selection"] < cost.seconds
    assert site.chosen.error is not None
    assert site.chosen.error.mass is not None
    assert site.chosen.error.mass.least > 0.999
