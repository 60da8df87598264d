"""Start-up, counted: identical layers cost no work of their own, whichever graph they stand in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.rewriter.capture import backward
from reattend.rewriter.check import own
from reattend.rewriter.choose import candidates
from reattend.rewriter.find import detect
from reattend.rewriter.graph.aliases import Aliases
from tests.tiers import few


class Layer(nn.Module):
    """A layer whose keys are joined to those of a cache, which is empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([torch.tensor([], dtype=x.dtype), t], -2) for t in (k, v))
        made: Tensor = x + self.o(((q @ k.mT * 0.25).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


def model(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(layers))).eval()


def work(layers: int, monkeypatch: pytest.MonkeyPatch, **policy: Any) -> tuple[Counter[str], reattend.Report]:
    """How often each step is done for two lengths of a model of so many layers."""
    torch._dynamo.reset()
    candidates.answer.cache_clear()
    own._known.clear()
    counts: Counter[str] = Counter()
    steps: list[tuple[Any, str]] = [
        (detect, "_attempt"), (Aliases, "__init__"), (backward.GradientWatch, "call"), (candidates, "_candidates"),
        (torch.fx.GraphModule, "__init__"),
    ]
    with monkeypatch.context() as patch:
        for owner, name in steps:
            patch.setattr(owner, name, _counted(counts, f"{owner.__name__}.{name}", getattr(owner, name)))
        m = reattend.optimize(model(layers), policy=reattend.Policy(deny=("original",), **policy))
        with torch.no_grad():
            for n in (24, 40):
                torch.testing.assert_close(m(torch.randn(1, n, 32)).isfinite().all(), torch.tensor(True))
    return counts, reattend.report(m)


def _counted(counts: Counter[str], name: str, run: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return run(*args, **kwargs)

    return counted


@pytest.mark.parametrize("check", few(["never", "first"], "first"))
def test_more_layers_are_no_more_work(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, said = work(2, monkeypatch, check=check)
    many, more = work(5, monkeypatch, check=check)
    assert few == many
    assert [len(r.sites) for r in (said, more)] == [4, 10]
    assert {s.choice for p in more.pieces if p.plan is not None for s in p.plan.sites}.isdisjoint({"original"})
    assert sum(c.ok for c in more.checks) == (10 if check == "first" else 0)
