"""Small models of the architectures that the tests cover: built from their configs, random weights, seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

VOCAB = 128
_DECODER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
# One layer where every layer is the same, two where they differ or share something; several equal ones are Llama's case.
_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_PAIR = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}
_IMAGE = {**_ENCODER, "image_size": 32, "patch_size": 8}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=256, **_SPECIAL),
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "mistral": lambda: transformers.MistralConfig(**_DECODER, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**_DECODER, head_dim=16, sliding_window=8),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=VOCAB, **_SPECIAL),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_DECODER | {"intermediate_size": 64}, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    ),
    "bert": lambda: transformers.BertConfig(**_ENCODER, vocab_size=VOCAB),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_ENCODER | {"num_hidden_layers": 2}, vocab_size=VOCAB, global_attn_every_n_layers=2, local_attention=32, cls_token_id=1, sep_token_id=2, **_SPECIAL
    ),
    "t5": lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0, dropout_rate=0.0
    ),
    "bart": lambda: transformers.BartConfig(**_PAIR),
    "whisper": lambda: transformers.WhisperConfig(
        **_PAIR, max_source_positions=32, num_mel_bins=16, suppress_tokens=None, begin_suppress_tokens=None
    ),
    "vit": lambda: transformers.ViTConfig(**_IMAGE),
    "clip": lambda: transformers.CLIPConfig(
        text_config={**_ENCODER, "vocab_size": VOCAB, **_SPECIAL}, vision_config=_IMAGE, projection_dim=32
    ),
}
CAUSAL = ("gpt2", "llama", "mistral", "gemma2", "bloom", "gpt_oss")
PAIRS = ("t5", "bart", "whisper")
IMAGES = ("vit", "clip")
WITHOUT_SDPA = ("gemma2", "bloom", "gpt_oss")
# Every architecture as it is written out, and through SDPA where it has that: the second ones are left to the long run.
CASES = [
    *((n, "eager") for n in CONFIGS),
    *(pytest.param(n, "sdpa", marks=pytest.mark.slow) for n in CONFIGS if n not in WITHOUT_SDPA),
]


def build(name: str, attn: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 0) -> Any:
    """The base model of an architecture, in evaluation mode, with `layers` instead of its own number."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if layers:
        config.num_hidden_layers = layers
    if dtype == torch.float64:
        # the grouped product of experts takes no float64
        config._experts_implementation = "eager"
    return transformers.AutoModel.from_config(config, attn_implementation=attn).eval().to(dtype)


def build_generating(name: str, attn: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """The model with its language head, for `generate`."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = {
        "whisper": transformers.AutoModelForSpeechSeq2Seq, "t5": transformers.AutoModelForSeq2SeqLM,
        "bart": transformers.AutoModelForSeq2SeqLM,
    }.get(name, transformers.AutoModelForCausalLM)
    return auto.from_config(config, attn_implementation=attn).eval().to(dtype)


def inputs(name: str, *, batch: int = 2, length: int = 24, pad: str = "right", dtype: torch.dtype = torch.float32,
           seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs with five padded tokens in the first row (`pad`: "left", "right" or "none"); images and audio have none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    if pad == "left":
        mask[0, :5] = 0
    elif pad == "right":
        mask[0, -5:] = 0
    pixels = torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if name == "whisper":
        audio = torch.randn(batch, 16, 64, generator=generator).to(dtype)
        return {"input_features": audio, "decoder_input_ids": ids[:, :7]}
    if name in PAIRS:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}
    return {"input_ids": ids, "attention_mask": mask}


def output_of(result: Any) -> torch.Tensor:
    """The main output of a model: hidden states, or both embeddings of CLIP."""
    if hasattr(result, "image_embeds"):
        return torch.cat([result.image_embeds, result.text_embeds])
    out: torch.Tensor = result.last_hidden_state
    return out


def valid(name: str, given: dict[str, torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """The rows of an output that belong to tokens, not to padding."""
    mask = given.get("attention_mask")
    if mask is None or out.dim() != 3 or out.shape[:2] != mask.shape:
        return out
    return out[mask.bool()]
