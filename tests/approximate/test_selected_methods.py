"""Methods that choose tiles, end to end: a Llama whose attention runs one within the allowed error, and says so."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reattend
from reattend.patterns.methods.selected.flexprefill import FlexPrefill
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selected.xattention import XAttention

N = 1024


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=N,
    )).eval()


@pytest.mark.slow
@pytest.mark.parametrize("method", [
    FlexPrefill(mass=0.3, block=64, least=16), XAttention(mass=0.3, block=64), MoBA(count=1, block=64),
], ids=lambda x: getattr(x, "name", ""))
def test_a_llama_runs_a_selection_within_its_error(method: FlexPrefill | XAttention | MoBA) -> None:
    """What it keeps is seen in the calibration: nobody has to say how much."""
    rng = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(97, (1, N), generator=rng)} for _ in range(4)]
    plain, x = llama(), data[0]
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.5, calibration=data)
    model = reattend.optimize(llama(), policy=policy)
    with torch.no_grad():
        near, exact = model(**x).logits, plain(**x).logits
    report = reattend.report(model)
    (site,) = report.sites
    assert site.kernel == str(method), report
    assert 0 < (near - exact).norm() / exact.norm() < 0.5
    error = site.site.candidate(str(method)).error
    assert error is not None
    assert error.mass is not None
    assert 0 < error.mass.mean < 1
    assert error.kept is not None
    assert 0 < error.kept < 0.9
    candidate = site.site.candidate(str(method))
    assert candidate.density is not None
    assert candidate.density < 0.9
    (check,) = report.checks
    assert check.verdict == "same"
    cost = candidate.cost
    assert cost is not None
    assert "selection" in cost.parts
    assert ("depends on later tokens" in str(report)) == (not isinstance(method, MoBA))
    assert ("depends on later tokens" in " ".join(site.site.notes)) == (not isinstance(method, MoBA))
