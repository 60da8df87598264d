"""Ways of running in several processes, and in one that may not write or compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .processes import WAYS
from .ways import WORKS, way

slow = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def together(name: str, folder: Path) -> None:
    """Two processes of one group, both of which have to end well."""
    command = [sys.executable, "-m", "tests.ways.processes", name]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    made = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "group")], cwd=ROOT, env=given, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=300)[0] for p in made]
    assert [p.returncode for p in made] == [0, 0], "\n".join(x[-3000:] for x in said)


@way("DDP, two processes", WORKS, slow)
def test_ddp(tmp_path: Path) -> None:
    together("ddp", tmp_path)


@way("FSDP2 (`fully_shard`), two processes", WORKS, slow)
def test_fsdp2(tmp_path: Path) -> None:
    together("fsdp2", tmp_path)


@way("tensor parallel by plan (DTensor weights), two processes", WORKS, slow)
def test_tensor_parallel(tmp_path: Path) -> None:
    together("tensor_parallel", tmp_path)


@way("pipeline stages, two processes", WORKS, slow)
def test_stages(tmp_path: Path) -> None:
    together("stages", tmp_path)


def test_all_of_them_are_tried() -> None:
    assert set(WAYS) == {"ddp", "fsdp2", "tensor_parallel", "stages"}


# --- one process ----------------------------------------------------------------------------------------------------------

ONE = """
import copy, os, sys
import torch, reattend
from tests.ways.ways import equal, numbers, optimised, ran, stack
torch.set_num_threads(1)
model = stack()
ours = optimised(model)
x = numbers(2, 24, 32)
"""
CALL = """
with torch.no_grad():
    equal(ours(x), model(x))
assert ran(ours)
"""


def alone(code: str, **environment: str) -> None:
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", ONE + code], cwd=ROOT, env=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@way("`fork` after the first call", WORKS, slow)
def test_fork() -> None:
    alone(CALL + "child = os.fork()\n" + CALL + "if child: assert os.waitpid(child, 0)[1] == 0\nelse: os._exit(0)")


@way("no C++ compiler", WORKS, slow)
def test_no_compiler() -> None:
    alone("ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(allow='reattend', deny='original'))" + CALL,
          CXX="/nonexistent", PATH="/nonexistent")


@way("a home that cannot be written", WORKS, slow)
def test_read_only_home(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    alone(CALL, HOME=str(file), XDG_CACHE_HOME=str(file / "cache"))


@way("one cache folder, two processes at once", WORKS, slow)
def test_shared_cache(tmp_path: Path) -> None:
    given = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    made = [
        subprocess.Popen([sys.executable, "-c", ONE + CALL], cwd=ROOT, env=given, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [p.communicate(timeout=300)[1] for p in made]
    assert [p.returncode for p in made] == [0, 0], said
