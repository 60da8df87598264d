"""The scoreboard of the walk: docs/coverage.md is made from its rows, and says of a row what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .loading import benchmark

ROOT = Path(__file__).resolve().parents[1]
page = benchmark("coverage_page")


def row(name: str, attentions: int, **run: Any) -> dict[str, Any]:
    """A model of which one run is known."""
    said = {"verdict": "right", "found": 0, "kernels": {}} | run
    return {"library": "some", "name": name, "attentions": attentions, "seconds": 1.0, "runs": {"float32 forced": said}}


def test_the_page_is_that_of_the_rows() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "coverage_cpu.json").read_text(encoding="utf-8"))
    made = page.page(kept)
    assert (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8") == made, (
        "python benchmarks/coverage.py --table docs/coverage.md"
    )


def test_the_rows_hold_no_paths_of_a_machine() -> None:
    text = (ROOT / "benchmarks" / "results" / "coverage_cpu.json").read_text(encoding="utf-8")
    assert not [x for x in ("site-packages", "/home/", "/root/", "/tmp/") if x in text]


@pytest.mark.parametrize(
    ("made", "found", "named", "silent"),
    [
        (row("all", 3, found=3), 3, 0, 0),
        (row("more than counted", 1, found=4), 1, 0, 0),
        (row("one by name", 3, found=2, left={"why": 1}), 2, 1, 0),
        (row("one without a word", 4, found=1, left={"why": 2}), 1, 2, 1),
        (row("places beyond the count", 1, found=1, left={"why": 5}), 1, 0, 0),
        (row("given up", 3, found=1, given_up=["an error"]), 1, 2, 0),
    ],
)
def test_every_attention_is_found_or_named_or_silent(made: dict[str, Any], found: int, named: int, silent: int) -> None:
    assert (page.found(made), page.named(made), page.silent(made)) == (found, named, silent)


def test_reasons_are_told_apart_by_their_words_alone() -> None:
    rows = [row("a", 1, left={"mul_1 has no term": 1, "mul_27 has no term": 2}), row("b", 1, left={"one key only": 1})]
    assert page.reasons(rows) == [("mul has no term", 3, ["a"]), ("one key only", 1, ["b"])]


def test_what_torch_fuses_is_never_more_than_there_is() -> None:
    made = row("a", 3, found=3) | {"matcher": {"written": 2, "hits": 2}}
    assert page.fused(made) == 3


def test_findings_stand_on_the_page() -> None:
    rows = [
        row("bad", 1, found=1, verdict="wrong", why="call 0: wrong: output 0"), row("long", 1) | {"stopped": "not done within 9 s"},
        row("turned", 1, found=1, verdict="moved", why="call 0: moved: output 0"),
    ]
    text = page.page({"models": rows, "versions": {"some": {"torch": "2"}}, "device": "a processor", "date": "a day"})
    assert "| some bad float32 forced | wrong: call 0: wrong: output 0 |" in text
    assert "| some long | not done within 9 s |" in text
    assert "turned float32" not in text
