"""The proof that there is one representation: attentions that no file of ours names are found, planned, emitted and right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.triton import kernel as triton_kernel
from reattend.cost_model.devices.device import device
from reattend.cost_model.time.predict import best_mapping
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.rewriter.find import detect
from tests.tiers import examples

from . import programs
from .rewriter.helpers import error_of, graph_of, values_of


def found_in(fn: object, args: tuple[Tensor, ...]) -> tuple[detect.Found, torch.fx.GraphModule]:
    gm = graph_of(fn, args)  # type: ignore[arg-type]
    found, missed = detect.find(gm)
    assert len(found) == 1, [m.reason for m in missed]
    return found[0], gm


@examples(60)
@given(programs.programs())
def test_drawn_programs_are_lifted_exactly(program: programs.Program) -> None:
    args = programs.inputs(dtype=torch.float64)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found, gm = found_in(program, args)
        values = values_of(gm, args)
    finally:
        torch.set_default_dtype(default)
    want = values[found.output]
    if not bool(want.isfinite().all()):
        got = evaluate(found.cascade, {k: values[v] for k, v in found.tensors.items()})[found.cascade.outputs[0]]
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-12, atol=1e-12, equal_nan=True)
        return
    assert error_of(found, values) <= 1e-12


def cosine_in_a_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A factor that depends on the distance, inside a cap."""
    i = torch.arange(q.shape[2])
    s = q @ k.transpose(-2, -1) * 0.25
    return (30.0 * torch.tanh(s * torch.cos((i[:, None] - i) * 0.2) / 30.0)).softmax(-1) @ v


def checkerboard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A checkerboard that is shifted in every head."""
    i = torch.arange(q.shape[2])
    h = torch.arange(q.shape[1])[:, None, None]
    keep = (i[:, None] + i + h) % 2 == 0
    return (q @ k.transpose(-2, -1) * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def squares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows normalised by x² / Σ x²."""
    s = (q @ k.transpose(-2, -1) * 0.25) ** 2
    return s / s.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("variant", [cosine_in_a_cap, checkerboard, squares])
def test_researchers_variants_are_found(variant: object) -> None:
    args = programs.inputs(dtype=torch.float64)[:3]
    found, gm = found_in(variant, args)
    assert error_of(found, values_of(gm, args)) <= 1e-7


def is_right(got: Tensor, args: tuple[Tensor, ...], program: object) -> None:
    """Against the user's own code in float64: RMS within 1.2 times, maximum within 2.5 times of the code in fp32, or an ulp."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide = [a.double() if a.is_floating_point() else a for a in args]
        exact = program(*wide)  # type: ignore[operator]
    finally:
        torch.set_default_dtype(default)
    eager = program(*args)  # type: ignore[operator]
    got = got.reshape(exact.shape).double()
    assert torch.equal(got.isnan(), eager.isnan())
    keep = exact.isfinite() & eager.isfinite()
    if not bool(keep.any()):
        return
    ours, theirs = (got - exact)[keep], (eager.double() - exact)[keep]
    ulp = float(exact[keep].abs().max()) * 2.0**-23
    assert float(ours.square().mean().sqrt()) <= max(1.2 * float(theirs.square().mean().sqrt()), ulp)
    assert float(ours.abs().max()) <= max(2.5 * float(theirs.abs().max()), 4 * ulp)


@pytest.mark.slow
@examples(200)
@given(programs.programs())
def test_drawn_programs_run_on_the_cpu_and_are_emitted_for_the_gpu(program: programs.Program) -> None:
    """Found, planned, printed for both, and right on the CPU under the default tiling and under small tiles."""
    args = programs.inputs()
    found, gm = found_in(program, args)
    values = values_of(gm, args)
    tensors = {k: values[v] for k, v in found.tensors.items()}
    default = cpu.default_mapping(found.cascade, {})
    for mapping in (default, TileMapping(16, 16, body=default.body)):
        kernel = cpu.build(found.cascade, mapping)
        assert isinstance(kernel, cpu.CpuKernel), kernel
        is_right(kernel.run(tensors, {}), args, program)
    planned = best_mapping(found.cascade, device("h100"), {})
    assert isinstance(planned, tuple), planned
    emitted = triton_kernel.build(found.cascade, planned[0], device("h100"))
    assert isinstance(emitted, triton_kernel.TritonKernel), emitted
    assert "@triton.jit" in emitted.source


@pytest.mark.interpreter
@pytest.mark.slow
@examples(40)
@given(programs.programs())
def test_drawn_programs_are_right_in_triton(program: programs.Program) -> None:
    args = programs.inputs(20, 20)
    found, gm = found_in(program, args)
    values = values_of(gm, args)
    kernel = triton_kernel.build(found.cascade, TileMapping(16, 16))
    assert isinstance(kernel, triton_kernel.TritonKernel), kernel
    is_right(kernel.run({k: values[v] for k, v in found.tensors.items()}, {}), args, program)
