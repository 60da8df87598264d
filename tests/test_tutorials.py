"""The tutorials are followed as a reader would: their code runs, and what they show is what it prints but for times."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from .test_layers import ROOT, blocks, obeyed

FOLDER = ROOT / "docs" / "tutorials"
TUTORIALS = sorted(p for p in FOLDER.glob("*.md") if p.name != "README.md")
# as docs/tutorials/README.md says
COLUMNS = 96
SHOWN = "```text\n"
MORE = "…"


def pieces(page: Path) -> list[str]:
    """A page cut at its blocks, which are pieces of their own."""
    return re.split(r"(^```\w*\n.*?^```$)", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(piece: str) -> str:
    """What a piece executes: nothing, where it is no block of Python."""
    return piece.removeprefix("```python\n").removesuffix("```") if piece.startswith("```python\n") else ""


def followed(page: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, str]]:
    """Execute a page as the file that it names, block by block: the place of each shown output, and what was printed."""
    module = ModuleType(f"tutorial_{page.stem.replace('-', '_')}")
    # Dynamo looks the module of a model's class up by its name.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = pieces(page)
    name = re.search(r"a file `(\w+\.py)`", page.read_text(encoding="utf-8"))
    assert name is not None, "a reader must know where the blocks go"
    lines = 0
    for i, piece in enumerate(found):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * lines + code(piece), name[1], "exec"), vars(module))
        lines += code(piece).count("\n")
        if code(piece) and len(found) > i + 2 and found[i + 2].startswith(SHOWN):
            yield i + 2, printed.getvalue().rstrip()


def plain(text: str) -> list[str]:
    """A text without what differs from machine to machine: amounts and their units, lines of files, widths of columns."""
    text = re.sub(r"\.py:\d+", ".py:#", text)
    return re.sub(r"(?<![\w=.])[±]?\d[\d.]*(e[+-]?\d+)?([×%]|\s?[nµm]?s\b)?", "#", text).split()


def same(shown: str, printed: str) -> tuple[list[str], list[str]]:
    """Both as they are compared: where a page leaves the rest out, as many lines as it shows."""
    left = shown.removeprefix(SHOWN).removesuffix("```").rstrip()
    lines = printed.splitlines()
    if left.endswith(MORE):
        left = left.removesuffix(MORE).rstrip()
        lines = lines[: left.count("\n") + 1]
    return plain(left), plain("\n".join(lines))


@pytest.mark.parametrize(
    ("shown", "printed", "alike"),
    [
        ("took 5.36 ms by 1.96×, ±19%", "took 1.2 s by 3.4×, ±7%", True),
        ("a b=4  c", "a   b=4 c", True),
        ("a b=4", "a b=5", False),
        ("variant.py:17 flex", "variant.py:9 flex", True),
        ("chosen flex", "chosen sdpa", False),
        ("one\n…", "one\ntwo", True),
        ("one", "one\ntwo", False),
        ("model.layers.0 4 of 4", "model.layers.1 4 of 4", False),
    ],
)
def test_only_amounts_may_differ(shown: str, printed: str, alike: bool) -> None:
    left, right = same(f"{SHOWN}{shown}\n```", printed)
    assert (left == right) is alike


def test_each_reader_has_a_tutorial() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    readers = design.split("## 1. Who it serves")[1].split("## 2.")[0]
    assert len(TUTORIALS) == len(re.findall(r"^\d\. ", readers, re.MULTILINE))
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({p.name})" in listed for p in TUTORIALS)
    assert f"{COLUMNS} columns" in listed


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_shows_what_it_prints(
    page: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    found = pieces(page)
    compared = 0
    for i, printed in followed(page, monkeypatch):
        shown, got = same(found[i], printed)
        if shown != got and request.config.getoption("--update-golden"):
            more = found[i].removesuffix("```").rstrip().endswith(MORE)
            found[i] = f"{SHOWN}{printed}\n{f'{MORE}{chr(10)}' if more else ''}```"
            page.write_text("".join(found), encoding="utf-8")
            continue
        assert got == shown, printed
        compared += 1
    assert compared > 2 or request.config.getoption("--update-golden")


COMMANDS = [
    pytest.param(line, id=f"{p.stem}: {line}")
    for p in TUTORIALS
    for b in blocks(p)
    if b.language == "sh"
    for line in b.text.splitlines()
    if line.startswith("reattend ")
]


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_tutorials_run(line: str, tmp_path: Path) -> None:
    code, said = obeyed(line, tmp_path)
    assert code == 0, said[-2000:]
