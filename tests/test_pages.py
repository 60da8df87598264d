"""The documents beside the code: the map is drawn from it, links lead somewhere, words of the glossary are in use."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import networkx as nx
import pytest

from .loading import script

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
map_ = script("docs/map.py")
MOST_FILES = 12


# --- the map ------------------------------------------------------------------------------------------------------


def test_the_map_is_that_of_the_code() -> None:
    done = subprocess.run([sys.executable, "docs/map.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", map_.LAYERS)
def test_rooms_are_small_and_say_what_they_are_for(name: str) -> None:
    rooms = map_.layer(name).rooms
    assert len(rooms) > 4
    assert not [r.name for r in rooms if r.files > MOST_FILES]
    assert not [r.name for r in rooms if not r.sentence]


@pytest.mark.parametrize("name", map_.LAYERS)
@pytest.mark.parametrize("by", ["by_file", "by_room"])
def test_arrows_run_one_way(name: str, by: str) -> None:
    got = getattr(map_.layer(name), by)
    assert (got.upward, got.circles) == (0, 0), got


def test_the_design_names_every_room() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rooms = [f"{one.name}/{r.name}" for one in map_.layers() for r in one.rooms if not r.name.endswith(".py")]
    assert [r for r in rooms if f"`{r}`" not in design] == []


def graph(early: str, late: str = "") -> nx.DiGraph[str]:
    """Files by letters: "ab bc" are imports of b by a and of c by b."""
    made: nx.DiGraph[str] = nx.DiGraph()
    made.add_edges_from(((e[0], e[1]) for e in early.split()), late=False)
    made.add_edges_from(((e[0], e[1]) for e in late.split()), late=True)
    return made


@pytest.mark.parametrize(
    ("early", "late", "floors", "upward", "circles"),
    [
        ("ab bc ac", "", 3, 0, 0),
        ("ab bc", "ca", 1, 1, 1),
        ("ab bc", "ac", 3, 0, 0),
        ("ab ba cd", "", 2, 2, 1),
        ("ab cd", "ba dc", 1, 2, 2),
    ],
)
def test_floors_upward_arrows_and_circles_are_counted(early: str, late: str, floors: int, upward: int, circles: int) -> None:
    got = map_.figures(graph(early, late), 0, 0)
    assert (got.floors, got.upward, got.circles) == (floors, upward, circles)


def test_the_first_sentence_of_a_file_is_its_line(tmp_path: Path) -> None:
    page = tmp_path / "one.py"
    page.write_text('"""Tiles of\na mask. And more."""\n')
    assert map_.sentence(page) == "Tiles of a mask"


# --- links and words ----------------------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """Where a page's links lead: `[words](there)`, and `[words]: there` for links by name."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)


def repository() -> str:
    """Where the files of the repository are seen, as pyproject.toml has it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return str(urls["Repository"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_to_files(page: Path) -> None:
    lost = [x for x in links(page) if "://" not in x and not (page.parent / x).exists()]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    folders = "reattend|patterns|cost_model|codegen|rewriter|docs|tests|examples|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert not [n for n in named if not (ROOT / n).exists()]


def test_the_readme_links_to_the_repository_in_full() -> None:
    """The README is shown elsewhere too, where a relative link leads nowhere."""
    found = links(ROOT / "README.md")
    assert len(found) > 10
    assert not [x for x in found if "://" not in x]
    start = re.compile(re.escape(repository()) + "/(blob|tree)/main/")
    files = [start.sub("", x) for x in found if start.match(x)]
    assert len(files) == len([x for x in found if x.startswith(repository())])
    assert not [x for x in files if not (ROOT / x).exists()]


def text_without_the_glossary() -> str:
    """Code and documents as words: an underscore parts them as a space does."""
    code = [p for layer in ("reattend", "patterns", "cost_model", "codegen", "rewriter") for p in (ROOT / layer).rglob("*.py")]
    pages = [p for p in PAGES if p.name not in ("glossary.md", "CHANGELOG.md")]
    return "\n".join(p.read_text(encoding="utf-8") for p in [*code, *pages]).replace("_", " ").lower()


def test_words_of_the_glossary_are_in_use() -> None:
    words = set(re.findall(r"\*\*([^*]+)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")))
    assert len(words) > 40
    text = " ".join(text_without_the_glossary().split())
    assert not [w for w in words if not re.search(rf"\b{re.escape(w.lower())}s?\b", text)]


def test_names_of_links_in_the_readme_are_given() -> None:
    whole = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", whole, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))
    used = set(re.findall(r"\[([^\]]+)\](?![\[(:])", text))
    assert named == used


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    assert set(links(folder / "README.md")) == {p.name for p in folder.glob("[0-9]*.md")}
