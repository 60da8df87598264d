"""A walk through the field: tiny random models of many architectures, found by data flow alone, and the same outputs.

No architecture is known to the compiler; this list only says what is tried. Configurations are shrunk by the names of their
own settings.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import reattend

from .count import CountAttention

pytestmark = pytest.mark.slow

FIELD = (
    "qwen2", "qwen3", "phi", "phi3", "gemma3_text", "falcon", "opt", "gpt_neox", "gptj", "codegen", "mpt", "stablelm", "cohere2",
    "olmo2", "olmo3", "deberta", "deberta-v2", "xlnet", "roformer", "albert", "distilbert", "mpnet", "diffllama", "gpt_neo",
    "granite", "glm4", "smollm3", "llama4_text", "minimax_m2", "exaone4", "lfm2", "layoutlm", "squeezebert", "xlm", "ctrl",
    "biogpt", "mobilebert", "rembert", "moshi", "mixtral", "mbart", "pegasus_x", "prophetnet", "cpmant",
)
# Attentions whose result nobody reads: the last layer's global tokens.
UNREAD = {"pegasus_x": 1}
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "vocab_size": 128, "num_key_value_heads": 2, "hidden_dim": 96, "head_dim": 16, "rotary_dim": 8, "sliding_window": 8,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}


def build(name: str) -> Any:
    config = transformers.AutoConfig.for_model(name)
    for key, value in SETTINGS.items():
        derived = isinstance(getattr(type(config), key, None), property)
        if not derived and getattr(config, key, None) is not None:
            setattr(config, key, value)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:2] if len(set(kinds[:2])) > 1 else [kinds[0], kinds[-1]]
    torch.manual_seed(0)
    try:
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    except ValueError:
        model = transformers.AutoModel.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.08)
    return model.eval().requires_grad_(False)


def inputs(model: Any, padded: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    given = {"input_ids": torch.randint(3, 120, (2, 24)), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
    if padded:
        given["attention_mask"][1, slice(17, None) if padded == "right" else slice(7)] = 0
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 120, (2, 9))
    return given


@pytest.mark.parametrize("name", FIELD)
def test_outputs_stay_and_attentions_are_found(name: str) -> None:
    torch._dynamo.reset()
    model = build(name)
    run = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(allow="reattend", deny="original"))
    for padded in ("", "right", "left"):
        given = inputs(model, padded)
        with CountAttention() as seen:
            want = model(**given)[0]
        got = run(**given)[0]
        # what a model computes of padding is nobody's concern, and arbitrary where a row has no key
        whole = model.config.is_encoder_decoder or want.shape[1] != 24
        valid = torch.ones(want.shape[:2], dtype=torch.bool) if whole else given["attention_mask"].bool()
        error = (got - want)[valid].abs().max() / want[valid].abs().max()
        assert error <= 1e-5, (padded, float(error))
    report = reattend.report(run)
    assert not [p.error for p in report.pieces if p.error]
    found = sum(s.ran for s in report.sites) // 3
    # what is left alone is said
    assert found == seen.count - UNREAD.get(name, 0) or report.misses, (found, seen.count)
