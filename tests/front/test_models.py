"""Real architectures through the front door: every attention by our kernel, outputs and generation unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reattend

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:reattend.*:UserWarning")]

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = {**SIZES, "num_key_value_heads": 2, **IDS}
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1,
    "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
# model class, config class, options, attentions
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, **IDS}, 2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, 2),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}, 2),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16, "sliding_window": 8}, 2),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, **IDS}, 2),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig",
                {**GROUPED, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}, 2),
    "bert": ("BertModel", "BertConfig", SIZES, 2),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**SIZES, "pad_token_id": 0, "local_attention": 8}, 2),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 256,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}, 6),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "eos_token_id": 2, "forced_eos_token_id": None}, 6),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**SEQ2SEQ, "max_source_positions": 50, "eos_token_id": 2}, 6),
    "vit": ("ViTModel", "ViTConfig", VISION, 2),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": SIZES, "vision_config": VISION}, 4),
}  # fmt: skip
GENERATING = ("gpt2", "llama", "mistral", "gemma2", "bloom", "gpt_oss", "t5", "bart", "whisper")
OURS = reattend.Policy(deny=("original", "sdpa", "flex"))


def build(name: str, attention: str) -> Any:
    model, config, options, _ = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**options, attn_implementation=attention)
    try:
        return getattr(transformers, model)(made).eval()
    except ValueError as no:
        # The model says that it has no such implementation.
        pytest.skip(str(no).splitlines()[0])


def inputs(name: str, side: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 256, (2, 24))
    keep = torch.ones_like(ids)
    keep[0, slice(0, 7) if side == "left" else slice(17, 24)] = 0
    given = {"input_ids": ids, "attention_mask": keep}
    if name in ("t5", "bart"):
        given["decoder_input_ids"] = torch.randint(3, 256, (2, 9))
    if name == "whisper":
        given = {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": torch.randint(3, 256, (2, 9))}
    if name == "vit":
        given = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "clip":
        given["pixel_values"] = torch.randn(2, 3, 32, 32)
    return given


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def valid(out: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The outputs of tokens that are no padding."""
    keep = given.get("attention_mask")
    return out[keep.bool()] if keep is not None and out.shape[:2] == keep.shape else out


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_by_our_kernel(name: str, attention: str, side: str) -> None:
    model, given = build(name, attention), inputs(name, side)
    expected = model(**given)[0]
    out = reattend.optimize(model, policy=OURS)(**given)[0]
    assert error(valid(out, given), valid(expected, given)) <= 1e-5
    report = reattend.report(model)
    assert report.kernels == {"reattend": MODELS[name][3]}, str(report)
    assert report.breaks == ()


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
def test_generation(name: str) -> None:
    model = build(name, "eager")
    given = {k: v for k, v in inputs(name, "left").items() if k != "decoder_input_ids"}
    options: dict[str, Any] = {
        "max_new_tokens": 32, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    expected = model.generate(**given, **options)
    got = reattend.optimize(model, policy=OURS).generate(**given, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert max(error(a, b) for a, b in zip(got.logits, expected.logits, strict=True)) <= 1e-5
    report = reattend.report(model)
    assert report.given_up == 0, str(report)
    assert set(report.kernels) == {"reattend"}


def gradients(name: str, rewritten: bool) -> dict[str, Tensor]:
    """Of a training step with dropout and checkpointed layers."""
    model = build(name, "eager").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if rewritten:
        reattend.optimize(model)
    given = inputs(name, "right")
    torch.manual_seed(1)
    model(**given)[0].square().mean().backward()
    if rewritten:
        assert reattend.report(model).given_up == 0, str(reattend.report(model))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_training_with_dropout_and_checkpointed_layers(name: str) -> None:
    before, after = gradients(name, False), gradients(name, True)
    assert before.keys() == after.keys()
    for n, g in before.items():
        torch.testing.assert_close(after[n], g, atol=1e-5 * g.abs().max().item() + 1e-9, rtol=1e-3, msg=n)
