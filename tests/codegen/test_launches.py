"""What real launches ask Triton for is what the ahead-of-time path compiles: recorded by a driver that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("plain", "causal", "causal, padded, grouped", "sinks", "decode, split")
pytestmark = [pytest.mark.aot, pytest.mark.slow]


@pytest.fixture(scope="module")
def recorded() -> Mapping[str, Any]:
    """The launches of every case, from a process of their own: the driver is replaced in the whole of it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.codegen.mocked_driver"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def test_every_case_was_launched(recorded: Mapping[str, Any]) -> None:
    assert tuple(recorded) == NAMES
    assert [len(case["launched"]) for case in recorded.values()] == [1, 1, 2, 1, 2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["function", "signature", "literals", "attributes"])
def test_a_launch_asks_for_what_was_compiled_ahead_of_time(recorded: Mapping[str, Any], name: str, part: str) -> None:
    case = recorded[name]
    assert [x[part] for x in case["launched"]] == [x[part] for x in case["ahead"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_has_a_program_for_every_row_block_and_part(recorded: Mapping[str, Any], name: str) -> None:
    case = recorded[name]
    assert case["grids"] == [[n, 1, 1] for n in case["programs"]]
