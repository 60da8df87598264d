"""The operator `reattend::cascade`: tensors, sizes and a program's text in, the cascade's output out.

    cascade(Tensor[] tensors, SymInt[] sizes, str program) -> Tensor
        tensors    the cascade's inputs, in its order        sizes    what no input has as a dimension, in `loose` order
        program    cascade and mapping as canonical text, so that an exported graph holds all it needs

One operator for all attentions: what is computed stands in its text. It has no backward and says so; that of `trained` has.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cost_model.devices.device import Device
from ..patterns.cascade import Cascade
from ..patterns.evaluate import DTYPE, infer_sizes
from ..patterns.mapping import TileMapping
from ..patterns.verdict import Refusal
from .cpu import kernel as cpu
from .forms.program import Program, memory_order, output_shape, program_text, read_program
from .triton import kernel as triton_kernel

__all__ = ["NO_GRADIENT", "build", "call", "program_text"]

NO_GRADIENT = (
    "reattend::cascade has no backward: run it under torch.no_grad(), or on tensors that need no gradient. "
    "reattend.optimize chooses a kernel with a backward where gradients are wanted"
)

Runner = Callable[[Sequence[Tensor], Sequence[int]], Tensor]

library = torch.library.Library("reattend", "DEF")  # type: ignore[no-untyped-call]
library.define(  # type: ignore[no-untyped-call]
    "cascade(Tensor[] tensors, SymInt[] sizes, str program) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)

_lock = threading.Lock()
_runners: dict[tuple[str, str], Runner] = {}


def build(
    c: Cascade, mapping: TileMapping, target: Device | str | None = None
) -> cpu.CpuKernel | triton_kernel.TritonKernel | Refusal:
    """The kernel for a device, an architecture or a torch device type (None: the CPU), or why there is none."""
    if target is None or target == "cpu" or (isinstance(target, Device) and target.kind == "cpu"):
        return cpu.build(c, mapping)
    return triton_kernel.build(c, mapping, None if target in ("cuda", "hip") else target)


def call(c: Cascade, mapping: TileMapping, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Run the operator on tensors and sizes by name."""
    p = Program(c, mapping)
    out: Tensor = torch.ops.reattend.cascade.default(
        [tensors[t.name] for t in c.inputs], [sizes[n] for n in p.loose], program_text(c, mapping)
    )
    return out


def allocate(p: Program, tensors: Sequence[Tensor], sizes: Sequence[Any]) -> Tensor:
    """The output, not yet written: every kernel and the fake one give it these strides."""
    c = p.cascade
    shape = output_shape(c, {t.name: x.shape for t, x in zip(c.inputs, tensors)}, dict(zip(p.loose, sizes)))
    order = memory_order(c)
    made = tensors[0].new_empty([shape[d] for d in order], dtype=DTYPE[c.tensor[c.outputs[0]].dtype])
    return made.permute([order.index(d) for d in range(len(order))])


def _runner(program: str, device: str) -> Runner:
    """The kernel of a program, built once in a process and shared by all threads."""
    with _lock:
        found = _runners.get((program, device))
        if found is None:
            found = _runners[program, device] = _bind(read_program(program), device)
        return found


def _bind(p: Program, device: str) -> Runner:
    made = build(p.cascade, p.mapping, device)
    if isinstance(made, Refusal):
        raise RuntimeError(f"reattend::cascade cannot run on {device}: {made}")
    names, loose = tuple(t.name for t in p.cascade.inputs), p.loose
    if isinstance(made, triton_kernel.TritonKernel):
        launch = made.run

        def on_gpu(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
            return launch(dict(zip(names, tensors)), dict(zip(loose, sizes)), allocate(p, tensors, sizes))

        return on_gpu
    current, order = made, memory_order(p.cascade)

    def on_cpu(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        nonlocal current
        given, known = dict(zip(names, tensors)), dict(zip(loose, sizes))
        try:
            out = current.run(given, known)
        except current.failures as no:
            current = _uncompiled(p, tensors, known, no)
            out = current.run(given, known)
        return out if _laid_out(out, order) else allocate(p, tensors, sizes).copy_(out)

    return on_cpu


def _uncompiled(p: Program, tensors: Sequence[Tensor], sizes: Mapping[str, int], no: Exception) -> cpu.CpuKernel:
    """The kernel of another body, which needs no compiler, in the place of one that could not be compiled."""
    c = p.cascade
    mapping = cpu.default_mapping(c, infer_sizes(c, {t.name: x for t, x in zip(c.inputs, tensors)}, sizes))
    made = cpu.build(c, mapping)
    if isinstance(made, Refusal):
        raise RuntimeError(f"{no}; another body cannot take its place: {made}") from no
    warnings.warn(f"reattend: a kernel runs as {mapping} instead of {p.mapping}: {no}", stacklevel=2)
    return made


def _laid_out(t: Tensor, order: Sequence[int]) -> bool:
    """Without gaps, dimensions from the outermost inwards as in `order`; those of one element do not matter."""
    step = 1
    for d in reversed(order):
        n = t.shape[d]
        if n != 1 and t.stride(d) != step:
            return False
        step *= n
    return True


def _run(device: str) -> Callable[[Sequence[Tensor], Sequence[int], str], Tensor]:
    def run(tensors: Sequence[Tensor], sizes: Sequence[int], program: str) -> Tensor:
        _refuse_gradients(tensors)
        runner = _runners.get((program, device)) or _runner(program, device)
        if torch.is_autocast_enabled(device):
            # The program says in which type each step is computed.
            with torch.autocast(device, enabled=False):
                return runner(tensors, sizes)
        return runner(tensors, sizes)

    return run


def _refuse_gradients(tensors: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(NO_GRADIENT)


library.impl("cascade", _run("cpu"), "CPU")  # type: ignore[no-untyped-call]
library.impl("cascade", _run("cuda"), "CUDA")  # type: ignore[no-untyped-call]


@torch.library.register_fake("reattend::cascade", lib=library)  # type: ignore[untyped-decorator]
def _fake(tensors: Sequence[Tensor], sizes: Sequence[Any], program: str) -> Tensor:
    _refuse_gradients(tensors)
    return allocate(read_program(program), tensors, sizes)
