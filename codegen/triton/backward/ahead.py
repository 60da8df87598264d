"""The kernels that are trained, compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

from typing import Any

from .. import aot
from ..interpret import interpreting
from .kernel import TritonTraining


def compile(kernel: TritonTraining, arch: str) -> tuple[aot.AotReport, aot.AotReport, aot.AotReport]:
    """The forward that hands row scalars over, the gradients of queries, and those of keys and values.

    Raises ImportError without Triton, RuntimeError in a process that interprets, UnknownArchitecture.
    """
    first, second, third = (aot.compile_request(r, arch) for r in requests(kernel))
    return first, second, third


def requests(kernel: TritonTraining) -> tuple[aot.CompileRequest, ...]:
    """What launches of the three ask Triton's compiler for. Raises as `compile` does."""
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1: this process interprets kernels and cannot compile them")
    made, s = kernel.module, kernel.b.s
    types = s.cascade.tensor
    grads = tuple(aot.POINTER[types[side.tensor].dtype] for side in (*kernel.b.queries, *kernel.b.keys))
    more = {
        **dict.fromkeys(("n_p", "n_blocks", "n_m", "n_sharing"), "i32"), "p_saved": "*fp32", "p_sums": "*fp32",
        "grads": grads, "parts": (), "leaves": ("*fp32",) * len(kernel.b.leaves),
    }
    asked = []
    for function, given in (
        (made.stream, {**made.CONSTANTS, "EIGHTS": False}), (made.rows_backward, made.ROWS_BACKWARD),
        (made.keys_backward, made.KEYS_BACKWARD),
    ):
        constants: dict[str, Any] = dict(given)
        keyed = kernel.b.keyed_bits
        if function is not made.stream:
            constants["LEAVES"] = keyed if function is made.keys_backward else (1 << len(kernel.b.leaves)) - 1 & ~keyed
        options: dict[str, int] = {n: constants.pop(n) for n in ("num_warps", "num_stages")}
        if not kernel.b.skips and function is made.rows_backward:
            constants["LISTED"] = False
        signature, literals, attributes = aot.arguments(
            s, function.arg_names, constants, more, saved=function is made.stream
        )
        if constants.get("LISTED") is False and "tiles" in signature:
            signature["tiles"] = ()
            attributes = {k: v for k, v in attributes.items() if k[0] != function.arg_names.index("tiles")}
        asked.append(aot.CompileRequest(function, signature, literals, attributes, options, kernel.mapping.stages))
    return tuple(asked)
