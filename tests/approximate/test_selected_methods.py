"""Methods that choose tiles, end to end: a Llama whose attention runs one within the allowed error, and says so."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import reattend
from reattend.patterns.methods.selected.flexprefill import FlexPrefill
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selected.xattention import XAttention
from reattend.rewriter.approximate import calibrate

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


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y: Tensor = ((q @ k.mT) * 0.3).masked_fill(later, float("-inf")).softmax(-1) @ v
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_a_selection_runs_at_lengths_between_those_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second length that a model meets makes its sizes open: the table's are computed from them."""
    moves = calibrate._Calibration._moves
    # which is faster is not the question here
    monkeypatch.setattr(calibrate._Calibration, "_moves", lambda self: [replace(m, saved=1e-3) for m in moves(self)])
    torch.manual_seed(0)
    torch._dynamo.reset()
    method, data = MoBA(count=2, block=32), [torch.randn(1, n, 16) for n in (96, 128, 160, 192)]
    plain = Causal().eval()
    model = Causal().eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        reattend.optimize(
            model, policy=reattend.Policy(approximate=True, methods=(method,), max_error=0.9, calibration=data)
        )
        for n, exact in ((192, False), (160, False), (133, False), (200, True)):
            x = torch.randn(1, n, 16)
            assert torch.allclose(model(x), plain(x), atol=1e-5) == exact
    report = reattend.report(model)
    assert {s.kernel for s in report.sites} == {str(method)}
    assert {c.verdict for c in report.checks} == {"same"}
