"""Pages for users are true of the code: the reference is made from it, words that are explained stand in it, the site has all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from .test_layers import ROOT

LAYERS = ("patterns", "cost_model", "codegen", "rewriter", "reattend")
PAGE = ROOT / "docs" / "troubleshooting.md"
SITE = sorted((ROOT / "docs").rglob("*.md"))
VARIES = "…"


# --- words of warnings and refusals -------------------------------------------------------------------------------


@cache
def trees() -> tuple[ast.Module, ...]:
    """Every file of the package, parsed; links lead to the layers, which stand by themselves."""
    files = {p.resolve() for layer in LAYERS for p in (ROOT / layer).rglob("*.py")}
    return tuple(ast.parse(p.read_text(encoding="utf-8")) for p in sorted(files))


def words(node: ast.AST) -> Iterator[str]:
    """The texts below a node, each as its reader sees it: what is put into one varies."""
    inside: set[ast.AST] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.JoinedStr):
            inside |= set(ast.walk(n)) - {n}
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else VARIES for v in n.values)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and n not in inside:
            yield n.value


@cache
def said() -> str:
    return "\n".join(w for tree in trees() for w in words(tree))


def fragments(text: str) -> list[str]:
    """What stays the same in a text, between what varies."""
    return [f for part in text.split(VARIES) if len(f := part.strip(" :;,.()")) > 2]


def explained() -> list[str]:
    """The words of troubleshooting: what stands as code in the first column of a table, or before its explanation."""
    text = PAGE.read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and not line.startswith("| words")]
    quoted = [w for c in cells for w in re.findall(r"`([^`]+)`", c)]
    return quoted + re.findall(r"^(?:- )?`(reattend: [^`]+)`", text, re.MULTILINE)


@pytest.mark.parametrize("text", explained())
def test_words_that_are_explained_stand_in_the_code(text: str) -> None:
    assert [f for f in fragments(text) if f not in said()] == []


def test_there_are_words_to_be_explained() -> None:
    assert len(explained()) > 80
    assert fragments("reattend: … keeps the original code: …") == ["reattend", "keeps the original code"]


def test_every_warning_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    calls = [n for tree in trees() for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n.func) == "warn"]
    own = [f for n in calls for w in words(n) for f in fragments(w) if len(f) > 9]
    assert len(calls) > 8
    assert len(own) > 5
    assert sorted({f for f in own if f not in page}) == []


def _name(f: ast.expr) -> str:
    return f.attr if isinstance(f, ast.Attribute) else ""


# --- made, cited, built -------------------------------------------------------------------------------------------


def test_the_reference_is_that_of_the_code() -> None:
    done = subprocess.run([sys.executable, "docs/api.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reference_has_all_that_is_exported() -> None:
    import reattend

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [n for n in reattend.__all__ if f"### reattend.{n}\n" not in page and f".{n}` |" not in page]
    assert missing == []
    assert re.findall(r"^- \*\*`[^\n]*\n\n(?!    )", page, re.MULTILINE) == [], "a method says nothing"


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = dict(re.findall(r"^([a-z-]+): (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE))
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert cited["repository-code"] == project["urls"]["Repository"]


def test_every_page_stands_in_the_site() -> None:
    """A page that the navigation lacks is found by nobody."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE)
    there = {p.relative_to(ROOT / "docs").as_posix() for p in SITE}
    assert len(listed) == len(set(listed))
    assert set(listed) == there


@pytest.mark.parametrize("page", SITE, ids=lambda p: str(p.relative_to(ROOT)))
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """The site takes one that follows a line of text for more of that text; the repository does not."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    before = re.findall(r"^(.+)\n(?:- |\d+\. |\| )", text, re.MULTILINE)
    assert [x for x in before if not re.match(r"- |\d+\. |\||  ", x)] == []


@pytest.mark.parametrize("page", SITE, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_of_the_site_link_to_one_another_alone(page: Path) -> None:
    """A relative link that leaves docs/ holds in the repository and leads nowhere on the site."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = [x for x in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in x]
    assert [x for x in found if not (page.parent / x).resolve().is_relative_to(ROOT / "docs")] == []
