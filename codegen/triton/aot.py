"""Compile a kernel ahead of time for a GPU that is not there, and read back what it takes.

    compile(kernel, "sm_90")  →  registers, spilled bytes, shared memory, matrix instructions
    compile_merge(…)          →  the same of the kernel that merges the parts of split keys; list_request: that lists tiles
    request(kernel)           →  what a launch asks Triton's compiler for; compile_request takes any Triton function

The signature is that of contiguous inputs: unit innermost strides, everything else as 32-bit integers, pointers (and
strides known to be so) divisible by 16, as Triton specialises them at a launch. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ...cost_model.devices.architecture import architecture
from ...patterns.cascade import Size
from . import assembler
from .holes import needs_lists
from .interpret import interpreting
from .kernel import MISSING, TritonKernel, available
from .streaming import Streaming

POINTER: Mapping[str, str] = {
    "b1": "*u1", "u8": "*u8", "i8": "*i8", "i16": "*i16", "i32": "*i32", "i64": "*i64", "f16": "*fp16",
    "bf16": "*bf16", "f32": "*fp32", "f64": "*fp64",
}


@dataclass(frozen=True)
class AotReport:
    """What a compiled kernel takes: `registers` of one thread (AMD: vector registers), instructions in its text."""

    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    stages: int
    matrix_instructions: int
    exponentials: int
    assembly: str = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{self.arch}: {self.registers} registers, {self.spill_bytes} bytes spilled, {self.shared_bytes} bytes of "
            f"shared memory, {self.matrix_instructions} matrix instructions"
        )

    @property
    def loops(self) -> tuple[assembler.Loop, ...]:
        """The innermost loops that multiply matrices, full tiles first. NVIDIA's assembler only."""
        return assembler.loops(self.assembly)


@dataclass(frozen=True)
class CompileRequest:
    """A Triton function with the types, compile-time values and divisibility of its arguments, nested as they are."""

    function: Any
    signature: Mapping[str, Any]
    literals: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, int]
    stages: int


def compile(kernel: TritonKernel, arch: str) -> AotReport:
    """Compile for an architecture such as "sm_80" or "gfx942".

    Raises ImportError without Triton, RuntimeError in a process that interprets, UnknownArchitecture.
    """
    return compile_request(request(kernel), arch)


def compile_merge(kernel: TritonKernel, arch: str) -> AotReport:
    """Compile the second kernel of a mapping that splits keys. Raises ValueError for one that does not."""
    return compile_request(merge_request(kernel), arch)


def request(kernel: TritonKernel) -> CompileRequest:
    """What a launch of the kernel asks Triton's compiler for. Raises as `compile` does."""
    made = _module(kernel)
    return _request(kernel, made.stream, dict(made.CONSTANTS))


def merge_request(kernel: TritonKernel) -> CompileRequest:
    """The same of the kernel that merges. Raises ValueError for a mapping that does not split keys."""
    if kernel.mapping.split_m == 1:
        raise ValueError(f"{kernel.mapping} has no parts to merge")
    made = _module(kernel)
    return _request(kernel, made.merge, dict(made.MERGE))


def list_request(kernel: TritonKernel) -> CompileRequest:
    """The same of the kernel that lists tiles. Raises ValueError for a mask that needs no lists."""
    if not needs_lists(kernel.streaming):
        raise ValueError(f"{kernel} walks no lists of tiles")
    made = _module(kernel)
    return _request(kernel, made.list_tiles, dict(made.LISTING))


def _module(kernel: TritonKernel) -> ModuleType:
    if not available():
        raise ImportError(MISSING)
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1: this process interprets kernels and cannot compile them")
    return kernel.module


def _request(kernel: TritonKernel, function: Any, constants: dict[str, Any]) -> CompileRequest:
    options: dict[str, int] = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    parts = {"parts": ("*fp32", "*fp32") if kernel.mapping.split_m > 1 else ()}
    signature, literals, attributes = arguments(kernel.streaming, function.arg_names, constants, parts)
    return CompileRequest(function, signature, literals, attributes, options, kernel.mapping.stages)


def compile_request(asked: CompileRequest, arch: str) -> AotReport:
    """Compile any Triton function for an architecture and read back what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=asked.function, signature=asked.signature, constexprs=asked.literals, attrs=asked.attributes)
    known = architecture(arch)
    amd = known.kind == "hip"
    target = GPUTarget(known.kind, arch if amd else known.capability, known.threads_per_warp)
    compiled = triton.compile(source, target=target, options=dict(asked.options))
    usage = _amd_usage(compiled.asm["amdgcn"]) if amd else _cuda_usage(compiled.asm["cubin"])
    registers, spilled, assembly = usage
    names = re.findall(r"^\s*(v_\w+)" if amd else r"\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", assembly, re.M)
    return AotReport(
        arch=arch,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=int(compiled.metadata.shared),
        warps=int(compiled.metadata.num_warps),
        stages=asked.stages,
        matrix_instructions=sum(n.startswith(known.matrix_instructions) for n in names),
        exponentials=len(re.findall(r"MUFU\.EX2|v_exp_f32", assembly)),
        assembly=assembly,
    )


# --- the signature ----------------------------------------------------------------------------------------------


def arguments(
    s: Streaming, names: list[str], constants: Mapping[str, Any], more: Mapping[str, Any], saved: bool = False
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, compile-time values and divisibility of every argument, nested as the arguments are.

    `more`: types of arguments beside those of every kernel; `saved`: behind the output stands where row scalars go.
    """
    import triton.language as tl

    tensors = s.attention.cascade.tensor
    listed = needs_lists(s)
    signature: dict[str, Any] = dict.fromkeys(names, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes: dict[Any, Any] = {}
    kinds: dict[str, Any] = dict.fromkeys(("n_rows", "n_full", "n_all", "n_keys", "n_split"), "i32")
    kinds |= dict.fromkeys(("p_full", "p_all", "p_keys"), "*i32")
    kinds["sizes"] = ("i32",) * len(s.cascade.free_symbols)
    kinds["tiles"] = ("*i64", "*i32", "*i32", "*i32", "i32") if listed else ()
    kinds |= more
    for n in (n for n in kinds if n in names):
        signature[n], at = kinds[n], names.index(n)
        paths = {(at,): kinds[n]} if isinstance(kinds[n], str) else {(at, i): k for i, k in enumerate(kinds[n])}
        attributes |= {path: aligned for path, kind in paths.items() if kind.startswith("*")}
    given = {"INDEX": tl.int32, "LISTED": listed, "EIGHTS": bool(s.eights), **constants}
    literals: dict[Any, Any] = {(names.index(n),): v for n, v in given.items() if n in names}

    def tensor(path: tuple[int, ...], name: str) -> tuple[str, ...]:
        t = tensors[name]
        own = [POINTER[t.dtype]]
        attributes[(*path, 0)] = aligned
        for d in range(len(t.shape)):
            if d == len(t.shape) - 1:
                own.append("constexpr")
                literals[(*path, d + 1)] = 1
                continue
            own.append("i32")
            if _divisible(t.shape[d + 1 :]):
                attributes[(*path, d + 1)] = aligned
        return tuple(own)

    for n in ("out", "dout"):
        if n in names:
            signature[n] = tensor((names.index(n),), s.cascade.outputs[0])
    if saved:
        attributes[(names.index("out"), len(signature["out"]))] = aligned
        signature["out"] += ("*fp32",)
    at = names.index("inputs")
    signature["inputs"] = tuple(tensor((at, i), n) for i, n in enumerate(s.inputs))
    return signature, literals, attributes


def _divisible(sizes: tuple[Size, ...]) -> bool:
    return math.prod(n for n in sizes if isinstance(n, int)) % 16 == 0


# --- reading it back --------------------------------------------------------------------------------------------


def _cuda_usage(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack (spills: these kernels have no arrays of their own) and SASS."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = _tool(tool, "--dump-resource-usage", f.name)
        sass = _tool(tool, "--dump-sass", f.name)
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"], sass


def _tool(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _amd_usage(assembly: str) -> tuple[int, int, str]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return field("vgpr_count"), 4 * field("vgpr_spill_count"), assembly
