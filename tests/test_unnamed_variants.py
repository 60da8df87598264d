"""The proof that there is one representation: attentions that no file of ours names are found, planned, emitted and right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from reattend.patterns.evaluate import evaluate
from reattend.rewriter import detect

from . import programs
from .rewriter.helpers import error_of, graph_of, values_of


def found_in(fn: object, args: tuple[Tensor, ...]) -> tuple[detect.Found, torch.fx.GraphModule]:
    gm = graph_of(fn, args)  # type: ignore[arg-type]
    found, missed = detect.find(gm)
    assert len(found) == 1, [m.reason for m in missed]
    return found[0], gm


@settings(max_examples=60)
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
