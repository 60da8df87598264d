"""What a plan compares with: the model's own call of SDPA as it runs, where a trace sees a mask that it then leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import reattend
from reattend.rewriter.run.called import masks_passed
from tests.tiers import few


def llama(**settings: Any) -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=4096, **settings)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval().bfloat16()


IDS = torch.zeros(1, 4096, dtype=torch.long)


@pytest.mark.parametrize("dynamic", few([False, True], True))
def test_a_speed_up_is_over_the_call_that_runs(dynamic: bool) -> None:
    """Llama hands a trace a mask; run by itself it passes none, and torch's kernel leaves the triangle's other half out."""
    plan = reattend.plan(llama(), (), {"input_ids": IDS.to("meta")}, target="h200", dynamic=dynamic)
    assert len(plan.sites) == 2
    for s in plan.sites:
        assert s.eager is not None
        assert s.original is not None
        assert s.original.cost is not None
        assert s.eager.seconds < s.original.cost.seconds
        assert s.chosen.cost is not None
        assert s.speedup == s.eager.seconds / s.chosen.cost.seconds
    assert reattend.Plan.from_json(plan.to_json()) == plan
    if dynamic:
        at = plan.at(seq=8192).sites[0]
        assert at.eager is not None
        assert at.eager.seconds > plan.sites[0].eager.seconds  # type: ignore[union-attr]


@pytest.mark.parametrize(("padding", "masked"), [(None, False), ("kept", False), ("padded", True)])
def test_data_of_the_call_decides(padding: str | None, masked: bool) -> None:
    given: dict[str, Tensor] = {"input_ids": IDS}
    if padding is not None:
        given["attention_mask"] = torch.ones_like(IDS)
        given["attention_mask"][0, : 5 if padding == "padded" else 0] = 0
    assert masks_passed(llama(), (), given) == (masked, masked)
    meta = {n: t.to("meta") for n, t in given.items()}
    assert masks_passed(llama(), (), meta) == (None if padding else (False, False))


class Asks(nn.Module):
    """Attention whose mask hangs on data: on positions alone, or on positions that a value was written into."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[-2], device=x.device)
        view = at[:3]
        if self.written:
            view[0] = x.sum().long()
        mask = None if bool((at[1:] > at[:-1]).all()) else torch.ones(x.shape[-2], x.shape[-2], device=x.device).bool()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=mask is None)


def test_what_is_written_over_is_no_longer_known() -> None:
    x = torch.randn(1, 2, 16, 8)
    assert masks_passed(Asks(written=False), (x.to("meta"),), {}) == (False,)
    assert masks_passed(Asks(written=True), (x.to("meta"),), {}) is None


class Keeps(nn.Module):
    """Attention that keeps its mask on itself after the first call, and counts its calls in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        self.project, self.calls = nn.Linear(8, 8), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(x.shape[-2], x.shape[-2], device=x.device, dtype=torch.bool).tril()
        self.calls.append(1)
        return F.scaled_dot_product_attention(self.project(x), x, x, attn_mask=self.kept)


def test_a_model_is_left_as_it_was() -> None:
    model, x = Keeps(), torch.randn(1, 2, 16, 8)
    assert masks_passed(model, (x,), {}) == (True,)
    assert (model.kept, model.calls) == (None, [])
    assert model.project.weight.device.type == "cpu"
    assert model(x).device.type == "cpu"


def test_a_plan_says_what_it_compares_with() -> None:
    given = {"input_ids": IDS.to("meta"), "attention_mask": IDS.to("meta")}
    assert "is not known" in reattend.plan(llama(), (), given, target="h200").note
    assert "passes no mask to its calls of SDPA" in reattend.plan(llama(), (), {"input_ids": IDS.to("meta")}, target="h200").note
