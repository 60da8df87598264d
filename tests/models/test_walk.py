"""The walk of benchmarks/coverage.py tells a wrong result from a right one, and from a choice that rounding alone turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.loading import benchmark


@pytest.fixture(scope="module")
def walk() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        # benchmarks find one another beside themselves
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield benchmark("coverage_one")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / 4
        out: Tensor = scores.softmax(-1) @ self.v(x)
        return out


class Choice(nn.Module):
    """Each row is of one of two experts, and one row lies between them."""

    between: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(16, 1), nn.Linear(16, 16)
        self.register_buffer("between", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        at = self.router(x)
        return torch.where(at > self.between, self.expert(x), -self.expert(x))


def case(walk: ModuleType, model: type[nn.Module]) -> Any:
    models = walk.Case.__module__
    made = __import__(models)
    return made.Case(
        "", "", (lambda: made.drawn(model()),), lambda _, call: iter([((made.numbers(2, 24 + 8 * call, 16),), {})])
    )


def rows(walk: ModuleType, model: type[nn.Module], **wishes: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"runs": {}}
    with pytest.MonkeyPatch.context() as patch:
        # the kernel's own check would put the original in its place
        unchecked = {name: walk.reattend.Policy(allow=p.allow, deny=p.deny) for name, p in walk.POLICIES.items()}
        patch.setattr(walk, "POLICIES", unchecked)

        def say(part: dict[str, Any]) -> None:
            out["runs"].update(part.pop("runs", {}))
            out.update(part)

        walk.one(case(walk, model), say, **wishes)
    return out


@pytest.mark.slow
def test_a_right_model_is_right(walk: ModuleType) -> None:
    row = rows(walk, Attention, dtypes=["float32", "bfloat16"], thorough=True)
    assert row["attentions"] == 1
    assert row["backward"] == "right"
    assert {run["verdict"] for run in row["runs"].values()} == {"right"}
    assert row["runs"]["bfloat16 forced"]["kernels"] == {"reattend": 1}
    assert row["runs"]["bfloat16 forced"]["graphs"] == 2


@pytest.mark.slow
def test_a_wrong_kernel_is_wrong(walk: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = walk.outputs

    def off(model: nn.Module, call: Any) -> list[Tensor]:
        """One row in sixteen is off by half where the model is optimised."""
        made: list[Tensor] = whole(model, call)
        if walk.reattend.report(model).installed:
            made[0][:, ::16] *= 1.5
        return made

    monkeypatch.setattr(walk, "outputs", off)
    row = rows(walk, Attention, dtypes=["float32", "bfloat16"], thorough=False)
    assert {run["verdict"] for run in row["runs"].values()} == {"wrong"}


def test_a_choice_that_rounding_turns_is_told_apart(walk: ModuleType) -> None:
    model, calls, _ = walk.first_call(case(walk, Choice))
    at = model.router(calls[0][0][0])
    model.between.copy_(at.median())
    own = walk.outputs(model, calls[0])
    exact = walk.outputs(walk.in_type(model, torch.float64), walk.cast(calls[0], torch.float64))
    between, other = (torch.where(at == x, -own[0], own[0]) for x in (at.median(), at.max()))
    said = [walk.compared(model, calls[0], [x], own, exact, torch.float32) for x in (own[0], between, other)]
    assert [x.split(":")[0] for x in said] == ["", "moved", "wrong"], said
