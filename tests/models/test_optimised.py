"""Optimised models against the originals: outputs on valid tokens, both kinds of padding, narrow types, autocast, training."""

from __future__ import annotations

import copy

import pytest
import torch

import reattend
from tests.tiers import few

from . import zoo
from .count import CountAttention

pytestmark = pytest.mark.thin(6)

CASES = zoo.CASES
# At these sizes the plan may well keep the original; our kernel is what is tested here.
OURS = reattend.Policy(allow=("reattend",), deny=("original",))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("name", "attn"), CASES)
def test_outputs_on_valid_tokens(name: str, attn: str) -> None:
    """fp32: ‖a − b‖∞ ≤ 1e-5 · ‖ref‖∞, right- and left-padded; every attention is a site, and ran in our kernel."""
    torch._dynamo.reset()
    model = zoo.build(name, attn)
    original = copy.deepcopy(model)
    assert reattend.optimize(model, policy=OURS) is model
    for pad in ("right", "left", "none"):
        given = zoo.inputs(name, pad=pad)
        with torch.no_grad():
            with CountAttention() as counted:
                want = zoo.output_of(original(**given))
            got = zoo.output_of(model(**given))
        assert relative(zoo.valid(name, given, got), zoo.valid(name, given, want)) <= 1e-5
    report = reattend.report(model)
    # Dynamo may cut a model into several graphs: what ran is counted over all of them
    assert report.kernels == {"reattend": 3 * counted.count}, str(report)
    assert not report.misses, str(report)
    assert report.given_up == 0
    reattend.restore(model)
    with torch.no_grad():
        assert torch.equal(zoo.output_of(model(**given)), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_the_cheapest_candidate_is_exact_too(name: str) -> None:
    torch._dynamo.reset()
    model = zoo.build(name)
    original = copy.deepcopy(model)
    reattend.optimize(model)
    given = zoo.inputs(name)
    with torch.no_grad():
        got, want = zoo.output_of(model(**given)), zoo.output_of(original(**given))
    assert relative(zoo.valid(name, given, got), zoo.valid(name, given, want)) <= 1e-5


@pytest.mark.parametrize("name", few(["llama", "gemma2", "t5", "bert"], "gemma2"))
def test_autocast(name: str) -> None:
    """Under autocast the products are narrow and the softmax is not, as in the original."""
    torch._dynamo.reset()
    model = zoo.build(name)
    original = copy.deepcopy(model)
    reattend.optimize(model, policy=OURS)
    given = zoo.inputs(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = zoo.output_of(model(**given)), zoo.output_of(original(**given))
    assert got.dtype == want.dtype
    assert relative(zoo.valid(name, given, got).float(), zoo.valid(name, given, want).float()) <= 3e-2
    assert set(reattend.report(model).kernels) == {"reattend"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "vit"])
def test_training_keeps_its_gradients(name: str) -> None:
    """A candidate with a backward is chosen where gradients are wanted; nothing is detached."""
    torch._dynamo.reset()
    model = zoo.build(name)
    original = copy.deepcopy(model)
    reattend.optimize(model)
    given = zoo.inputs(name)
    for m in (model, original):
        m.train()
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        out = zoo.output_of(m(**given))
        # no sum of squares: behind a layer norm that is a constant
        loss = (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum()
        torch.autograd.backward(loss)
    for (path, p), (_, q) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None and q.grad is not None and q.grad.abs().max() > 1e-5:
            assert relative(p.grad, q.grad) <= 1e-3, path


@pytest.mark.slow
def test_a_change_of_type_plans_again() -> None:
    torch._dynamo.reset()
    model = zoo.build("llama")
    reattend.optimize(model, policy=OURS)
    given = zoo.inputs("llama")
    with torch.no_grad():
        model(**given)
        model.to(torch.bfloat16)
        out = model(**given).last_hidden_state
    assert out.dtype == torch.bfloat16
    assert reattend.report(model).captures == 2
