"""The command for the first GPU, rehearsed in the interpreter: every part has an answer, and an answer is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from reattend.cost_model.devices.device import device
from tests.loading import benchmark

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        # benchmarks find one another beside themselves
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield benchmark("gpu_first")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["exact", "forward", "decode", "masks", "host"])
def test_every_part_answers(command: ModuleType, part: str) -> None:
    lab = command.Lab(device("h200"), "cpu", 128)
    row = command.answer(lab, next(getattr(command, part)(lab)))
    assert "failed" not in row, row
    assert row.get("right", True)
    assert list(command.said({"part": part, **row}))


def test_a_failure_is_an_answer_that_is_asked_again(command: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text(
        '{"part": "exact", "number": 0, "device": "a"}\n{"part": "exact", "number": 1, "device": "a", "failed": "why"}\n'
        '{"part": "exact", "number": 2, "device": "b"}\n'
    )
    assert set(command.written(out, "a")) == {("exact", 0)}
    lab = command.Lab(device("h200"), "cpu", 128)

    def fails() -> dict[str, object]:
        raise RuntimeError("no such kernel")

    assert command.answer(lab, fails) == {"failed": "RuntimeError: no such kernel"}


def test_parts_are_asked_in_turn(command: ModuleType) -> None:
    lab = command.Lab(device("h200"), "cpu", 128)
    parts = [p for p, _, _ in command.asked(lab, ("host", "masks", "exact"))]
    assert parts[:4] == ["host", "masks", "exact", "masks"]
