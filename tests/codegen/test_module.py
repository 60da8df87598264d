"""The emitted file: what is printed (golden), that it stands alone, and that nothing needs Triton to print it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reattend.codegen.files import cache, library, native
from reattend.codegen.triton import kernel as triton_kernel
from reattend.codegen.triton.kernel import TritonKernel, build
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

from .. import strategies
from ..strategies import INF, LOWEST, H, M, P, attention

ROOT = Path(__file__).resolve().parents[2]

CAUSAL = M <= P
Golden = Callable[[str, str], None]


def llama() -> Cascade:
    keep = CAUSAL & strategies.MASKS["padding"]
    return attention(
        lambda s: ex.where(keep, s, LOWEST), strategies.ROWS["softmax"], b=2, h=8, group=2, e=64, f=64, dtype="bf16"
    ).cascade


def sinks() -> Cascade:
    return attention(lambda s: ex.where(CAUSAL, s, -INF), strategies.ROWS["sink"], h=8, e=80, f=40, dtype="f16").cascade


def decode() -> Cascade:
    p = attention(lambda s: s, strategies.ROWS["softmax"], b=2, h=8, group=4, p=1, m=41, e=64, f=64, dtype="bf16")
    return p.cascade.with_sizes({"s": 1})


def checkerboard() -> Cascade:
    keep = ex.equal((P + M + H) % 2, 0)
    return attention(lambda s: ex.where(keep, s * s, 0.0), strategies.ROWS["square"], h=4, e=32, f=32).cascade


CASES = {"llama": llama, "sinks": sinks, "decode": decode, "checkerboard": checkerboard}


def source(name: str) -> str:
    made = build(CASES[name](), TileMapping(64, 32))
    assert isinstance(made, TritonKernel), made
    return made.source


def without_skeleton(text: str) -> str:
    """The header and the printed functions: what differs from one attention to the next."""
    for skeleton in ("stream", "lists", "host", "host_lists", "scalar"):
        for function in library.functions(skeleton).values():
            text = text.replace(function + "\n\n\n", "")
    return text


@pytest.mark.parametrize("name", CASES)
def test_printed_functions(name: str, golden: Golden) -> None:
    golden(f"{name}.py.txt", without_skeleton(source(name)))


@pytest.mark.parametrize("name", CASES)
def test_the_file_imports_torch_and_triton_alone(name: str) -> None:
    tree = ast.parse(source(name))
    found = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert found <= {"torch", "triton", "collections", "functools", "typing"}


@pytest.mark.skipif(shutil.which("ruff") is None and not Path(sys.executable).with_name("ruff").exists(), reason="no ruff")
@pytest.mark.parametrize("name", CASES)
def test_the_file_is_lint_clean(name: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(source(name), encoding="utf-8")
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    rules = "--select=E4,E7,E9,F,W,I,UP,B,PIE,C4,SIM"
    done = subprocess.run(
        [ruff, "check", "--isolated", rules, "--ignore=B905,E741", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_header_says_what_it_is() -> None:
    head = ast.get_docstring(ast.parse(source("llama")))
    assert head is not None
    assert "This file is yours" in head
    assert "QK[b,h,p,m] = Σ_e" in head
    assert "64×32, 4 warps, 2 stages" in head
    assert "whose rows keep a key" in head


def test_the_skeleton_is_the_librarys_own_text() -> None:
    text = source("decode")
    for function in ("stream", "tile"):
        assert library.functions("stream")[function] in text


def test_only_called_scalar_functions_are_printed() -> None:
    assert library.called(["softplus"]) == [library.functions("scalar")[n] for n in ("log1p", "softplus")]
    assert "def tanh" not in source("llama")


def test_equal_text_is_one_file_and_one_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    first = cache.load("X = 1\n")
    assert cache.load("X = 1\n") is first
    assert first.X == 1
    path = cache.write("X = 1\n")
    path.write_text("X = 2\n")
    assert cache.write("X = 1\n").read_text() == "X = 1\n"
    assert re.fullmatch(r"[0-9a-f]{24}\.py", path.name)
    with pytest.raises(ZeroDivisionError):
        cache.load("1 / 0\n")


def test_an_unwritable_cache_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    cache.directory.cache_clear()
    try:
        assert cache.directory().name.startswith("reattend-")
    finally:
        cache.directory.cache_clear()


def test_without_triton_the_source_is_still_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "available", lambda: False)
    made = build(llama(), TileMapping(64, 32))
    assert isinstance(made, TritonKernel)
    with pytest.raises(ImportError, match=r"pip install 'reattend\[triton\]'"):
        _ = made.module


def test_refusals_say_why() -> None:
    p = attention(lambda s: s, strategies.ROWS["softmax"], dtype="f64")
    out = build(p.cascade, TileMapping(64, 32))
    assert isinstance(out, Refusal)
    assert out.reason == "Q, K, V, O is float64; the kernel computes in float32"


@pytest.mark.slow
def test_the_interpreter_tier_runs() -> None:
    """A few interpreted kernels from a plain `pytest`: the tier has a process of its own, which `./run tests` starts too."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(here.with_name("test_triton_interpreter.py")), "-k", "causal_padding or decode_packs or uniform"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=here.parents[2],
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def skeletons_named() -> set[str]:
    """Files of codegen/skeletons that other files read the text of, by the names they call them."""
    found = {f"{name}.hpp" for name in native.SKELETON}
    for path in (ROOT / "codegen").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("functions", "library.functions"):
                found |= {f"{x.value}.py" for x in call.args if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    return found


def test_every_skeleton_that_is_named_exists() -> None:
    """Texts join them, which no contract of imports sees."""
    named = skeletons_named()
    assert {"stream.py", "scalar.py", "lists.py", "fused.hpp"} <= named
    room = ROOT / "codegen" / "skeletons"
    there = {p.relative_to(room).as_posix() for p in room.rglob("*.*")}
    assert named <= there
    # what no name leads to is imported
    assert {p for p in there - named if p.endswith(".hpp")} == set()
