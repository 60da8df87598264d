"""transformers' door against the models' own eager attention: outputs, padding, types, gradients, generation, caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reattend

from . import zoo

NAMES = ("llama", "mistral", "gemma2", "gpt_oss", "t5")
OTHERS = ("gpt2", "bert", "modernbert", "bart", "whisper", "vit", "clip")
OURS = reattend.Policy(allow=("reattend",), deny=("original",))


def pair(name: str, policy: reattend.Policy | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model with its own eager attention, and one with the same weights that goes through the door."""
    reattend.register(policy=policy)
    own = zoo.build(name).to(dtype)
    torch.manual_seed(3)
    for p in own.parameters():
        p.requires_grad_(True)
        # no parameter near zero: nothing hides behind a bias or a gain that does nothing
        small = p.detach().abs() < 0.02
        p.data[small] = torch.empty_like(p)[small].uniform_(0.02, 0.1)
    door = copy.deepcopy(own)
    door.set_attn_implementation("reattend")
    return own.eval(), door.eval()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("policy", [OURS, None], ids=["ours", "cheapest"])
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_outputs_on_valid_tokens(name: str, policy: reattend.Policy | None) -> None:
    own, door = pair(name, policy)
    for pad in ("right", "left", "none"):
        given = zoo.inputs(name, pad=pad)
        with torch.no_grad():
            want, got = zoo.output_of(own(**given)), zoo.output_of(door(**given))
        assert relative(zoo.valid(name, given, got), zoo.valid(name, given, want)) <= 2e-5, pad
    report = reattend.report(door)
    assert all(c.ok for c in report.checks), str(report)
    assert not report.misses, str(report)
    assert not report.notes, str(report)
    if policy is OURS:
        assert report.checks
        assert set(report.kernels) == {"reattend"}, str(report)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    """Whole models against the same code in float64: no farther from it than their own code is."""
    own, door = pair(name, OURS, dtype)
    with torch.no_grad():
        # rows without a key; the net holds them, as float64 in the model's code makes them NaN
        door(**zoo.inputs(name, pad="left", dtype=dtype))
    given = zoo.inputs(name, pad="right", dtype=dtype)
    wide = copy.deepcopy(own).double()
    if name == "gpt_oss":
        # the grouped product of experts takes no float64
        wide.config._experts_implementation = "eager"
    with torch.no_grad():
        exact, want, got = (zoo.valid(name, given, zoo.output_of(m(**given))) for m in (wide, own, door))
    assert got.dtype == dtype
    assert error(got, exact) <= 1.2 * error(want, exact) + torch.finfo(dtype).eps
    assert all(c.ok for c in reattend.report(door).checks)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    own, door = pair(name)
    given = zoo.inputs(name, pad="left")
    for m in (own, door):
        m.train()
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        out = zoo.valid(name, given, zoo.output_of(m(**given)))
        torch.autograd.backward((out * torch.arange(out.numel()).reshape(out.shape).sin()).sum())
    for (path, p), (_, q) in zip(door.named_parameters(), own.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None and q.grad is not None and q.grad.abs().max() > 1e-5:
            assert relative(p.grad, q.grad) <= 1e-3, path
    assert all(c.ok for c in reattend.report(door).checks)


def generating(name: str, policy: reattend.Policy | None = None) -> tuple[Any, Any]:
    reattend.register(policy=policy)
    own = zoo.build_generating(name)
    for p in own.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    door = copy.deepcopy(own)
    door.set_attn_implementation("reattend")
    return own, door


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pad", ["left", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_generation(name: str, pad: str, cache: str) -> None:
    """The same tokens and the same logits, window caches included: the models with windows slide."""
    own, door = generating(name, OURS)
    given = {k: v for k, v in zoo.inputs(name, pad=pad, length=11).items() if not k.startswith("decoder")}
    said = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = own.generate(**given, **said, cache_implementation=cache)
    got = door.generate(**given, **said, cache_implementation=cache)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert relative(a, b) <= 2e-5
    report = reattend.report(door)
    assert set(report.kernels) == {"reattend"}, str(report)
    assert not report.notes, str(report)
