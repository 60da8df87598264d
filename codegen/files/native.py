"""C++ text → a loaded library: compiled once for this machine with its own compiler, kept beside the generated files.

    <cache>/reattend/<sha256 of text, compiler, flags and processor>.so

A second process finds the library there. No compiler, or one that fails, is one sentence that says what to do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .cache import directory
from .library import SKELETONS

SKELETON = ("fused_scalar", "fused_micro", "fused_memory", "fused", "fused_backward", "fused_decode")
COMPILERS = ("g++", "clang++", "c++")
# Infinities and NaN are values of the scores: nothing that assumes their absence. Products may be fused with sums. Integers
# that may wrap around do not come here at all: -fwrapv would make biases half as dear again.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w",
)
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): a process asks once for the registers of AMX.
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
# Longest compiler message to show.
SHOWN = 600
# Seconds after which a compiler is taken to be stuck; a kernel takes a few, on a busy machine some tens.
PATIENCE = 180

_lock = threading.Lock()
_libraries: dict[Path, ctypes.CDLL] = {}
_turns: dict[Path, threading.Lock] = {}


class CompilerError(RuntimeError):
    """No C++ compiler, or one that could not compile the kernel."""


def source(program: str, loop: str = "fused") -> str:
    """The whole text of a kernel: number types and scalar functions, the printed program, the loop around it."""
    folder = files(SKELETONS)
    text = {n: folder.joinpath(f"{n}.hpp").read_text(encoding="utf-8") for n in SKELETON}
    scalar, micro, memory = (text[f"fused_{x}"] for x in ("scalar", "micro", "memory"))
    return f"{scalar}\n{program}\n{micro}\n{memory}\n{text[loop]}"


def attention(text: str, flags: Sequence[str] | None = None) -> Callable[..., int]:
    """The compiled entry of a kernel's text: takes a pointer to a filled `call_type` and returns an error number."""
    entry: Any = load(text, flags).attention
    entry.restype, entry.argtypes = ctypes.c_int, [ctypes.c_void_p]
    return entry  # type: ignore[no-any-return]


class Operand(ctypes.Structure):
    """A tensor [Z, H, n, ·] by address and strides in elements; the last dimension is contiguous."""

    _fields_ = (("data", ctypes.c_void_p), ("z", ctypes.c_int64), ("h", ctypes.c_int64), ("n", ctypes.c_int64))


class Kept(ctypes.Structure):
    """Where the gradient of a leaf gathers: an address, and strides as `struct Kept` of the backward's loop says."""

    _fields_ = (("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("segment", "div", "mod", "z", "h", "p")))


@cache
def call_type(products: int, saved: bool = False) -> type[ctypes.Structure]:
    """`struct Call` of the loop, for a score of so many products; `saved`: it hands over row scalars."""
    one, size, address = Operand * products, ctypes.c_int64, ctypes.c_void_p
    fields = [("q", one), ("k", one), ("v", Operand), ("out", address)]
    fields += [(n, size) for n in ("out_z", "out_h", "out_p", "Z", "H", "HKV", "P", "M")]
    fields += [
        ("classes", address),
        ("class_z", size),
        ("class_h", size),
        ("class_p", size),
        ("threads", ctypes.c_int32),
    ]
    fields += [("tensors", address), ("sizes", address), *([("saved", address)] if saved else [])]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


@cache
def backward_type(products: int) -> type[ctypes.Structure]:
    """`struct Call` of the backward's loop."""
    one, size, address = Operand * products, ctypes.c_int64, ctypes.c_void_p
    fields = [("q", one), ("k", one), ("v", Operand), ("out", Operand), ("grad", Operand)]
    fields += [("dq", one), ("dk", one), ("dv", Operand)]
    fields += [("saved", address), ("sums", address), *((n, size) for n in ("segments", "Z", "H", "HKV", "P", "M"))]
    fields += [("classes", address), ("class_z", size), ("class_h", size), ("class_p", size)]
    fields += [("threads", ctypes.c_int32), ("wanted", ctypes.c_int32), ("tensors", address), ("sizes", address)]
    fields += [("kept", address), ("row_sums", address), ("row_ends", address)]
    return type("BackwardCall", (ctypes.Structure,), {"_fields_": fields})


def load(text: str, flags: Sequence[str] | None = None) -> ctypes.CDLL:
    """The library of a text, compiled where the cache has none; the same object for the same text."""
    path = library(text, flags)
    with _lock:
        turn = _turns.setdefault(path, threading.Lock())
    # each text once, different ones at the same time
    with turn:
        if path not in _libraries:
            if not is_whole(path):
                build(text, path, tuple(flags if flags is not None else target_flags()))
            _libraries[path] = ctypes.CDLL(str(path))
        return _libraries[path]


def library(text: str, flags: Sequence[str] | None = None) -> Path:
    """Where the library of a text lies on this machine, compiled or not."""
    chosen = tuple(flags if flags is not None else target_flags())
    parts = (text, *identity(compiler()), *FLAGS, *chosen, *(processor() if flags is None else ()))
    return directory() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"


def build(text: str, path: Path, flags: Sequence[str]) -> None:
    """Compile a text into `path`. Raises CompilerError with the compiler's first complaint."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        written, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        written.write_text(text, encoding="utf-8")
        complaint = run_compiler([*compiler(), *FLAGS, *flags, str(written), "-o", str(made)])
        if complaint is not None:
            said = next((s for s in complaint.splitlines() if "error" in s), complaint.strip())[:SHOWN]
            name = compiler()[0]
            raise CompilerError(f"{name} could not compile the kernel; set CXX to a C++17 compiler: {said}")
        written.write_text(hashlib.sha256(made.read_bytes()).hexdigest(), encoding="ascii")
        # Renaming is atomic: another process sees the whole library or none.
        os.replace(made, path)
        os.replace(written, path.with_suffix(".sha256"))


def is_whole(path: Path) -> bool:
    """Does a library lie there as it was written? A full disk or a copied cache may hold a damaged one."""
    try:
        return path.with_suffix(".sha256").read_bytes().decode() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def run_compiler(command: Sequence[str]) -> str | None:
    """What the compiler said where it failed. Raises CompilerError where it does not end; what it started ends with it."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise CompilerError(f"{command[0]} did not compile the kernel within {PATIENCE} s; set CXX to another") from None
    return said if process.returncode else None


@cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler's command: CXX, or the first that is installed. Raises CompilerError where there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and shutil.which(chosen[0]):
        return tuple(chosen)
    found = next((n for n in COMPILERS if shutil.which(n)), None)
    if found is None:
        raise CompilerError("the fused CPU kernel needs a C++ compiler: install g++ or clang++, or set CXX to one")
    return (found,)


def identity(command: Sequence[str]) -> tuple[str, ...]:
    """What changes when another compiler is installed under the same name."""
    path = os.path.realpath(shutil.which(command[0]) or command[0])
    at = os.stat(path)
    return (*command, path, str(at.st_size), str(at.st_mtime_ns))


@cache
def target_flags() -> tuple[str, ...]:
    """Flags for this processor, without AMX where the kernel does not grant its registers."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ("-mcpu=native",)
    plain = () if tiles_granted() else ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
    return ("-march=native", "-mprefer-vector-width=512", *plain)


@cache
def tiles_granted() -> bool:
    """Does the operating system let this process use AMX?"""
    if sys.platform != "linux":
        return False
    return not ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)


@cache
def processor() -> tuple[str, ...]:
    """What a library compiled for this machine depends on: a cache may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return (platform.machine(), platform.processor())
    return (platform.machine(), *(s for s in dict.fromkeys(lines) if s.startswith(("flags", "Features", "model name"))))
