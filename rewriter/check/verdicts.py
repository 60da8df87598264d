"""Verdicts: what a check found, and those that are kept on disk beside the generated code.

    <cache>/reattend/verdicts/<key>.json      key: own code, kernel, sizes, types, versions and our own sources
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ...codegen.files import cache as files

Verdict = Literal["same", "differs", "raised", "unchecked"]
DISK = "by the verdict on disk"
_ROOMS = ("patterns", "cost_model", "codegen", "rewriter")
_lock = threading.Lock()
# Verdicts that this process made: the next site of the same kind is looked at itself.
_own: set[str] = set()


@dataclass(frozen=True)
class Check:
    """One site held against the model's own code.

    `how`: in full, which share of the rows, or by the verdict on disk; `error` and `own_error` are RMS errors against
    float64 relative to each row's largest value; `gradients`: were derivatives compared as well?
    """

    site: str
    kernel: str
    verdict: Verdict
    how: str = ""
    error: float | None = None
    own_error: float | None = None
    seconds: float = 0.0
    gradients: bool = False
    why: str = ""

    @property
    def ok(self) -> bool:
        """Was it compared, and is it the same?"""
        return self.verdict == "same"


@cache
def sources() -> str:
    """A hash of all that decides what a kernel computes: our code, torch, the interpreter and the machine."""
    base = Path(__file__).parents[2]
    digest = hashlib.sha256(f"{torch.__version__} {platform.python_version()} {platform.machine()}".encode())
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    for room in _ROOMS:
        for path in sorted((base / room).resolve().rglob("*")):
            if path.suffix in (".py", ".hpp", ".toml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def key(*parts: str) -> str:
    return files.key("\n".join((*parts, sources())))


def recall(at: str) -> Check | None:
    """The verdict of an earlier process; None where there is none that can be read."""
    with _lock:
        if at in _own:
            return None
    try:
        return Check(**json.loads(_path(at).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep(at: str, check: Check) -> None:
    """Keep a verdict for later processes; a folder that cannot be written keeps none."""
    with _lock:
        _own.add(at)
    try:
        _path(at).parent.mkdir(mode=0o700, exist_ok=True)
        files.replace_text(_path(at), json.dumps(asdict(replace(check, site="", seconds=0.0))))
    except OSError:
        return


def _path(at: str) -> Path:
    return files.directory() / "verdicts" / f"{at}.json"
