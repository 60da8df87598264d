"""Generated source as real files: content-addressed, written once, imported once in a process.

    <cache>/reattend/<sha256 of the text>.py        <cache> is $XDG_CACHE_HOME or ~/.cache

Triton reads a kernel's source from its file, debuggers and profilers show it, and a second process finds it there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


@cache
def directory() -> Path:
    """Where generated files are kept.

    A folder of this process alone, with a warning, when the user's cache cannot be written, or belongs to somebody else,
    whose files would be run.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    wanted = Path(base) / "reattend"
    try:
        wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=wanted):
            why = "" if _is_mine(wanted) else "it belongs to another user"
    except OSError as error:
        why = error.strerror or "it cannot be written"
    if not why:
        return wanted
    own = Path(tempfile.mkdtemp(prefix="reattend-"))
    warnings.warn(f"reattend: the cache folder {wanted} is not used ({why}): code is compiled anew in {own}", stacklevel=2)
    return own


def _is_mine(path: Path) -> bool:
    return not hasattr(os, "geteuid") or path.stat().st_uid == os.geteuid()


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def write(text: str) -> Path:
    """The file that holds `text`. A file that was changed by hand is written anew."""
    path = directory() / f"{key(text)}.py"
    try:
        if path.read_text(encoding="utf-8") == text:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    replace_text(path, text)
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: another process sees all of it or none. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(name, path)


def load(text: str) -> ModuleType:
    """The module of generated source text; the same object for the same text."""
    name = f"reattend_generated_{key(text)}"
    with _lock:
        if name in _modules:
            return _modules[name]
        path = write(text)
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import generated code from {path}")
        module = importlib.util.module_from_spec(spec)
        # Pickle and inspect look modules up by name.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        _modules[name] = module
        return module
