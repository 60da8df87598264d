"""Makes Triton's interpreter compute bf16 as a GPU does, and faster: it rounds bf16 down and multiplies its bit patterns.

    fp32 → bf16   round to nearest, ties to even (the interpreter truncates)
    dot           bf16 operands are widened first (the interpreter multiplies the 16-bit integers that hold them)

Arithmetic on bf16 values outside a dot stays wrong there, so emitted code widens every load before it computes.
Checked with Triton 3.6 and 3.9; only for processes with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def interpreting() -> bool:
    """Does this process run Triton kernels in the interpreter? Decided when a kernel is decorated, at import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def widen_bf16(bits: Any) -> Any:
    """The float32 values of bf16 bit patterns (uint16)."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow_bf16(values: Any) -> Any:
    """The bf16 bit patterns nearest to float32 values, ties to even; every NaN becomes the quiet one."""
    x = np.array(values, dtype=np.float32, order="C")
    bits = x.view(np.uint32)
    odd = (bits >> 16) & 1
    out = ((bits + (odd + 0x7FFF).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), out)


_repaired = False


def repair() -> None:
    """Mend the interpreter of this process; the second call does nothing. Raises ImportError without Triton."""
    global _repaired
    if _repaired:
        return
    import triton.language as tl
    from triton.runtime import interpreter as machine

    convert = machine._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return widen_bf16(data)
        if source == tl.float32 and target == tl.bfloat16:
            return narrow_bf16(data)
        return convert(data, source, target, rounding)

    def operand(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return widen_bf16(handle.data)
        return handle.data.astype(np.float32) if handle.data.dtype == np.float16 else handle.data

    product = machine.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if any(h.dtype.scalar.primitive_bitwidth == 8 for h in (a, b)):
            return product(self, a, b, acc, input_precision, max_num_imprecise_acc)
        value = np.matmul(operand(a), operand(b), dtype=acc.data.dtype) + acc.data
        return machine.TensorHandle(value, acc.dtype.scalar)

    machine._convert_float = convert_float
    machine.InterpreterBuilder.create_dot = create_dot
    _patch_once_a_launch(machine)
    _repaired = True


def _patch_once_a_launch(machine: Any) -> None:
    """The interpreter patches the language anew at every call of a device function; once a launch is enough."""
    patch, launch = machine._patch_lang, machine.GridExecutor.__call__
    done: set[tuple[int, ...]] = set()

    def patch_lang(fn: Any) -> Any:
        seen = tuple(sorted({id(v) for v in fn.__globals__.values() if v is machine.tl or v is machine.tl.core}))
        if seen in done:
            return None
        scope = patch(fn)
        done.add(seen)
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.clear()

    machine._patch_lang = patch_lang
    machine.GridExecutor.__call__ = call
