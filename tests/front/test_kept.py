"""Plans on disk: what an earlier process left alone is not captured again, and nothing but a plan of that graph is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.codegen.files import cache
from reattend.rewriter.capture import capture
from reattend.rewriter.run import kept

# Other tests read no plans.
RECALL = kept.recall


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 0.25) -> Tensor:
        made: Tensor = x + (self.q(x) @ self.k(x).mT * scale).softmax(-1) @ self.v(x)
        return made


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    monkeypatch.setattr(kept, "_own", set())
    monkeypatch.setattr(kept, "recall", RECALL)
    torch.manual_seed(0)
    return tmp_path / "plans"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for every graph that was captured."""
    seen: list[int] = []
    before = capture.from_dynamo

    def counted(*args: Any, **kwargs: Any) -> capture.Captured:
        seen.append(1)
        return before(*args, **kwargs)

    monkeypatch.setattr(capture, "from_dynamo", counted)
    return seen


def run(model: nn.Module, *args: Any, **policy: Any) -> tuple[Tensor, reattend.Report]:
    """A call in a process that starts anew, as far as plans know."""
    torch._dynamo.reset()
    kept._own.clear()
    ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(**policy))
    with torch.no_grad():
        out: Tensor = ours(*args)
    return out, reattend.report(ours)


LEAVE: dict[str, Any] = {"allow": ("sdpa",), "deny": ("sdpa",)}


def said(report: reattend.Report) -> list[tuple[str, str, str, str]]:
    return [(s.name, s.site.where, s.kernel, s.site.chosen.why) for s in report.sites]


def test_what_was_left_alone_is_not_captured_again(captured: list[int]) -> None:
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(2, 9, 16)
    first, before = run(model, x, **LEAVE)
    again, after = run(model, x, **LEAVE)
    assert len(captured) == 1
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(again, model(x), rtol=0, atol=0)
    assert said(after) == said(before)
    assert len(said(after)) == 2
    assert [p.close for p in after.pieces] == [p.close for p in before.pieces]
    assert [p.plan.note for p in after.pieces if p.plan is not None] == [kept.NOTE]


def test_what_was_replaced_is_captured_again(captured: list[int], folder: Path) -> None:
    for _ in range(2):
        _, report = run(Layer(), torch.randn(2, 9, 16), deny=("original",))
        assert [s.kernel != "original" for s in report.sites] == [True]
    assert len(captured) == 2
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["", "{", '{"schema": 3}', '{"schema": 99}', "[]", "\x00"])
def test_a_damaged_plan_is_made_again(captured: list[int], folder: Path, damage: str) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    run(model, x, **LEAVE)
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    run(model, x, **LEAVE)
    assert len(captured) == 2
    assert path.read_text() == whole
    path.write_bytes(b"\xff\xfe")
    run(model, x, **LEAVE)
    assert len(captured) == 3


def test_a_plan_that_replaces_something_is_not_taken(captured: list[int], folder: Path) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    run(model, x, **LEAVE)
    (path,) = folder.iterdir()
    path.write_text(path.read_text().replace('"choice": "original"', '"choice": "reattend"'))
    _, report = run(model, x, **LEAVE)
    assert len(captured) == 2
    assert [s.kernel for s in report.sites] == ["original"]


def test_a_process_looks_at_its_own_graphs_itself(captured: list[int]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        reattend.optimize(Layer(), policy=reattend.Policy(**LEAVE))(torch.randn(2, 9, 16))
    assert len(captured) == 2


class Other(Layer):
    """The same, on other lines."""

    def forward(self, x: Tensor, scale: float = 0.25) -> Tensor:
        made: Tensor = x + (self.q(x) @ self.k(x).mT * scale).softmax(-1) @ self.v(x)
        return made


def test_another_graph_is_captured(captured: list[int]) -> None:
    x = torch.randn(2, 9, 16)
    with_grad = {**LEAVE, "tune": False}
    for model, args, policy in (
        (Layer(), (x,), LEAVE), (Layer(), (x[:1],), LEAVE), (Layer(), (x, 0.5), LEAVE), (Layer().double(), (x.double(),), LEAVE),
        (Other(), (x,), LEAVE), (nn.Sequential(Layer()), (x,), LEAVE), (Layer(), (x,), with_grad),
        (Layer().requires_grad_(False), (x,), LEAVE),
    ):
        run(model, *args, **policy)
    assert len(captured) == 8
    torch._dynamo.reset()
    reattend.optimize(Layer(), policy=reattend.Policy(**LEAVE))(x)
    assert len(captured) == 9, "gradients are wanted"


def test_open_sizes_are_part_of_it(captured: list[int]) -> None:
    model = Layer()
    for _ in range(2):
        torch._dynamo.reset()
        kept._own.clear()
        ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(**LEAVE))
        with torch.no_grad():
            for n in (9, 12, 31):
                x = torch.randn(2, n, 16)
                torch.testing.assert_close(ours(x), model(x))
        report = reattend.report(ours)
        assert [p.close for p in report.pieces] == [True, False]
    assert len(captured) == 2


def test_a_graph_that_holds_a_tensor_is_captured(captured: list[int]) -> None:
    class Held(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            made: Tensor = (q @ q.mT + torch.tensor([0.0] * 9)).softmax(-1) @ q
            return made

    for _ in range(2):
        out, _ = run(Held(), x := torch.randn(2, 9, 16), **LEAVE)
        torch.testing.assert_close(out, Held()(x))
    assert captured
