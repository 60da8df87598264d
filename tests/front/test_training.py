"""Training through the front door: live dropout and checkpointed layers, gradients as in the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reattend

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("error:reattend.*:UserWarning")

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
}
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 256, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2, "attention_dropout": 0.1}),
    "bert": ("BertModel", "BertConfig", SIZES),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}


def gradients(name: str, attention: str, checkpointed: bool, rewritten: bool) -> dict[str, Tensor]:
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options, attn_implementation=attention)
    model = getattr(transformers, model_class)(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if rewritten:
        reattend.optimize(model)
    ids = torch.randint(3, 256, (2, 24))
    keep = torch.ones_like(ids)
    keep[0, 17:] = 0
    given = {"input_ids": ids, "attention_mask": keep}
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(3, 256, (2, 9))
    torch.manual_seed(1)
    model(**given)[0].square().mean().backward()
    if rewritten:
        report = reattend.report(model)
        assert report.given_up == 0, str(report)
        assert not report.kernels["reattend"]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_original(name: str, attention: str, checkpointed: bool) -> None:
    before, after = (gradients(name, attention, checkpointed, rewritten) for rewritten in (False, True))
    assert before.keys() == after.keys()
    for n, g in before.items():
        torch.testing.assert_close(after[n], g, atol=1e-5 * g.abs().max().item() + 1e-9, rtol=1e-3, msg=n)
