"""The shape of the whole: what each layer may import and load, that the types ship, that the documents' code runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after one statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(layer: str) -> list[str]:
    """Every module of a layer, whatever room it lies in."""
    files = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / layer).rglob("[a-z]*.py"))
    return ["reattend." + ".".join(f.parts) for f in files]


def test_the_layer_contracts_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_class_name_stands_in_one_file() -> None:
    """One word, one thing: who reads of a class need not ask which of two is meant."""
    files: dict[str, set[str]] = {}
    for layer in ("patterns", "cost_model", "codegen", "rewriter", "reattend"):
        for path in (ROOT / layer).rglob("*.py"):
            where = path.resolve().relative_to(ROOT).as_posix()
            for name in re.findall(r"^ *class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
                files.setdefault(name, set()).add(where)
    assert len(files) > 150
    assert {name: there for name, there in files.items() if len(there) > 1} == {}


def test_the_algebra_loads_neither_torch_nor_triton() -> None:
    modules = {m for n in ("patterns", "cost_model") for m in modules_of(n)}
    assert len(modules) > 80
    # the oracle, which is plain torch
    modules.remove("reattend.patterns.evaluate")
    assert not loaded_by(f"import reattend, reattend.cli, {', '.join(sorted(modules))}") & {"torch", "triton", "transformers"}


def test_help_loads_no_torch() -> None:
    statement = (
        "from reattend.cli import main\nsys.argv = ['reattend', '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code"
    )
    assert "torch" not in loaded_by(statement)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, finding it answers None
import torch, reattend, reattend.codegen.triton.aot, reattend.codegen.triton.kernel

class Causal(torch.nn.Module):
    def forward(self, q, k, v):
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v

x = torch.randn(1, 2, 300, 16)
for target in ("cpu", "h200"):
    (site,) = reattend.plan(Causal(), (x, x, x), target=target).sites
    print(site.chosen.name, len(site.candidate("reattend").source().splitlines()))
ours = reattend.optimize(Causal())(x, x, x)
assert torch.allclose(ours, Causal()(x, x, x), atol=1e-5)
"""


def test_planning_and_the_cpu_need_no_triton() -> None:
    done = run(sys.executable, "-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 2


def test_every_package_is_listed() -> None:
    """setuptools is given an explicit list: a folder left out of it would be missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {"reattend"}
    for layer in ("patterns", "cost_model", "codegen", "rewriter"):
        folders = {p.parent.relative_to(ROOT) for p in (ROOT / layer).rglob("__init__.py")}
        there |= {"reattend." + ".".join(f.parts) for f in folders}
    assert listed == there


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, with the language it names."""

    language: str
    text: str


def blocks(document: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


WITH_PYTHON = [d for d in DOCUMENTS if any(b.language == "python" for b in blocks(d))]


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda d: d.name)
def test_python_blocks_of_a_document_run(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one document run in order as one module; a ```text block after one is what it prints."""
    monkeypatch.chdir(ROOT)
    found = blocks(document)
    # Dynamo looks the module of a model's class up by its name.
    module = ModuleType(f"document_{document.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block, after in zip(found, [*found[1:], Block("", "")], strict=True):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, str(document), "exec"), vars(module))
        if after.language == "text":
            assert printed.getvalue().strip() == after.text.strip()


COMMANDS = [
    pytest.param(line, id=f"{d.name}: {line}")
    for d in DOCUMENTS
    for b in blocks(d)
    if b.language == "sh"
    for line in b.text.splitlines()
    if line.startswith("reattend ")
]


def obeyed(line: str, folder: Path) -> tuple[int, str]:
    """The exit code of a command line, obeyed in this process at the repository's root, and what it printed."""
    from reattend.cli import main

    # pages are written somewhere else
    command = [str(folder / w) if w.endswith(".html") else w for w in shlex.split(line, comments=True)]
    printed, code = io.StringIO(), 0
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(command[1:])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_documents_run(line: str, tmp_path: Path) -> None:
    code, said = obeyed(line, tmp_path)
    assert code == 0, said[-2000:]


def test_the_script_says_what_it_can_do() -> None:
    done = run("sh", "run")
    assert done.returncode == 2
    assert "usage: ./run demo | tests" in done.stderr


def test_the_script_refuses_an_old_python(tmp_path: Path) -> None:
    """On a machine without a new enough Python, one sentence says what to install."""
    (tmp_path / "run").write_text((ROOT / "run").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["sh", "run", "tests"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": str(old)},
    )
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
