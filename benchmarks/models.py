"""Small real models with random weights, none near zero, and two calls each, for benchmarks/coverage.py.

A library's architectures are shrunk by the names of their own settings; no architecture is built by hand here. The tables of
benchmarks/model_tables.py add those libraries that have no such configurations.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
# The most parameters that a model may have: beyond them it is not tiny, and its walk takes minutes.
LARGEST = 40_000_000
TOKENS = (24, 37)
VOCAB = 128


@dataclass(frozen=True)
class Case:
    """One architecture: `builds` are ways to make its model, `calls` ways to call it, both likeliest
    first; the number is the call's (0 or 1)."""

    library: str
    name: str
    builds: tuple[Callable[[], nn.Module], ...]
    calls: Callable[[nn.Module, int], Iterator[Call]]


class TooLarge(Exception):
    """The settings that shrink a model left it too large to walk."""


def drawn(model: nn.Module) -> nn.Module:
    """The model with new parameters, seeded: none of them near zero, all of them exact in bfloat16.

    A matrix has magnitudes around 1/√(fan in),
    so that rows of attention are neither flat nor one-hot; scales lie around 1.
    """
    generator = torch.Generator().manual_seed(0)
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        raise TooLarge(f"{count / 1e6:.0f} million parameters")

    def fill(name: str, p: torch.Tensor) -> None:
        if not p.is_floating_point():
            return
        scale = p.dim() == 1 and any(w in name.rsplit(".", 1)[-1] for w in ("weight", "gamma", "scale", "gain", "var"))
        size = torch.rand(p.shape, generator=generator)
        if scale:
            value = 0.75 + 0.5 * size
        else:
            middle = max(0.05, 1.25 / math.sqrt(p[0].numel())) if p.dim() > 1 else 0.06
            sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            value = sign * middle * (0.4 + 1.2 * size)
        p.copy_(value.to(torch.bfloat16))

    with torch.no_grad():
        for name, p in model.named_parameters():
            fill(name, p)
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                fill(name, b)
    return model.eval().requires_grad_(False)


def wide(model: nn.Module) -> nn.Module:
    """The model in float64, as far as it runs there."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            # The grouped product of experts takes no float64.
            module.config._experts_implementation = "eager"
    return model.double()


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal numbers that bfloat16 holds exactly."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(torch.bfloat16).float()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB - 8, shape, generator=torch.Generator().manual_seed(seed))


def padding(batch: int, length: int, call: int) -> torch.Tensor:
    """A mask with the last row padded: on the right in the first call, on the left in the second."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, slice(length - 7, None) if call == 0 else slice(0, 7)] = 0
    return mask


# --- transformers ---

_LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
    "decoder_layers", "num_encoder_layers", "depth", "decoder_num_hidden_layers", "decoder_num_layers",
    "encoder_num_layers", "num_block_repeats", "num_encoder_blocks_per_stage"]
_WIDTHS = ["hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "encoder_hidden_size",
    "decoder_hidden_size", "out_hidden_size", "projection_dim", "encoder_hidden_dim", "text_hidden_size",
    "output_dim", "encoder_embed_dim", "decoder_embed_dim", "word_embed_proj_dim", "fpn_hidden_size",
    "memory_attention_hidden_size", "decoder_input_output_dim", "projector_hidden_size"]
_HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads", "decoder_num_attention_heads", "num_encoder_attention_heads",
    "num_decoder_attention_heads", "swa_num_attention_heads", "index_n_heads", "linear_num_value_heads",
    "linear_num_heads"]
_INNER = ["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim",
    "moe_intermediate_size", "mlp_dim", "shared_expert_intermediate_size", "decoder_intermediate_size",
    "encoder_intermediate_size", "ffn_hidden_size"]
_EXPERTS = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"]
# Words in the names of settings that make layers differ.
_UNLIKE = ("layer_types", "layers_block_type", "window", "pattern", "every", "period", "offset", "first_k",
    "sparse_step", "kv_shared")
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_LAYERS, 2), **dict.fromkeys(_WIDTHS, 64), **dict.fromkeys(_HEADS, 4), **dict.fromkeys(_INNER, 96),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "topk_group", "n_group"), 2),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions",
        "max_target_positions"), 256),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_d_head",
        "mamba_headdim"), 16),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "layerdrop", "attention_dropout", "hidden_dropout"),
        0.0),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "sliding_window", "sliding_window_size", "index_topk"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "num_queries": 10, "first_k_dense_replace": 1,
    "local_attention": 16,
    "num_frames": 4, "max_window_layers": 1, "num_position_embeddings": 64, "codebook_size": 64, "n_shared_experts": 1,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_chunk_size": 16, "chunk_size": 16, "num_nextn_predict_layers": 0,
    "attention_window": 16, "audio_vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
}


# Where the first settings do not fit together: heads as wide as rotary tables are by default, layers until each kind came.
_WIDE = {**dict.fromkeys(_WIDTHS, 512), "head_dim": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
    "v_head_dim": 128}
VARIANTS: tuple[dict[str, Any], ...] = (
    SETTINGS,
    {**SETTINGS, **_WIDE},
    {**SETTINGS, **dict.fromkeys(_LAYERS, 8)},
    {k: SETTINGS[k] for k in (*_LAYERS, *_EXPERTS, *_INNER, "vocab_size", "pad_token_id", "bos_token_id",
        "eos_token_id")},
)


def shrunk(kind: Any, settings: dict[str, Any]) -> Any:
    """A configuration of this class with every one of the settings that it has; its parts are shrunk likewise."""
    full = kind()
    defaults = {f.name: f.default for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    latent = "kv_lora_rank" in defaults
    # Layers that may differ from one another are two, others one.
    alike = not any(w in name for w in _UNLIKE for name in defaults or vars(full))
    staged = isinstance(defaults.get("depths"), list | tuple) or isinstance(vars(full).get("depths"), list | tuple)
    changed: dict[str, Any] = {}
    for name in defaults or vars(full):
        value = vars(full).get(name)
        given = value is not None if name == "head_dim" else defaults.get(name, value) is not None
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            changed[name] = shrunk(type(value), settings)
        elif name == "layer_types" and isinstance(defaults.get(name), list | tuple):
            kinds = list(dict.fromkeys(value))[:2]
            changed[name] = (kinds * settings[_LAYERS[0]])[: settings[_LAYERS[0]]]
        elif name == "depths" and isinstance(value, list | tuple):
            changed[name] = type(value)([1] * len(value))
        elif name not in settings or not given or not isinstance(value, int | float | list | tuple):
            continue
        elif isinstance(value, list | tuple):
            if name in ("image_size", "patch_size"):
                changed[name] = type(value)([settings[name]] * len(value))
        elif latent and name == "num_key_value_heads":
            changed[name] = settings["num_attention_heads"]
        elif staged and name == "image_size":
            changed[name] = 64
        elif name in _LAYERS and alike and settings is SETTINGS:
            changed[name] = 1
        elif not (staged and (name in _WIDTHS or name == "patch_size")):
            changed[name] = settings[name]
    return kind(**changed)


def _transformer(name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    config = shrunk(transformers.CONFIG_MAPPING[name], settings)
    with torch.device("meta"):
        # Most constructors need no memory; one that does is built at once.
        try:
            empty = transformers.AutoModel.from_config(config, attn_implementation="eager")
            count = sum(p.numel() for p in empty.parameters())
        except Exception:
            count = 0
    if count > LARGEST:
        raise TooLarge(f"{count / 1e6:.0f} million parameters")
    try:
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    except ValueError:
        model = transformers.AutoModel.from_config(config)
    return drawn(model)


def _setting(config: Any, *names: str, default: Any) -> Any:
    """The first of these settings, in the configuration or a part of it."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type") and hasattr(v, "to_dict"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, int | list | tuple):
                return value
    return default


def _transformer_calls(model: nn.Module, call: int) -> Iterator[Call]:
    """Ways to call a model: what its signature requires with padded text, then images, audio, and each with the others."""
    config: Any = model.config
    signature = inspect.signature(model.forward).parameters
    batch, length = 2, TOKENS[call]
    # stages halve an image again and again, and keys are to be left in the last
    size = _setting(config, "image_size", "input_size", default=64 if hasattr(config, "depths") else 32)
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    mels = _setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", default=16)
    frames = _setting(config, "num_frames", default=4)
    wide = _setting(config, "hidden_size", "d_model", default=64)
    many = batch + call
    audio = 2 * _setting(config, "max_source_positions", default=32)
    text = {"input_ids": tokens(batch, length), "attention_mask": padding(batch, length, call)}
    if getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in signature:
        text["decoder_input_ids"] = tokens(batch, 9 + 4 * call)
    if "bbox" in signature:
        left = torch.randint(0, 60, (batch, length, 2), generator=torch.Generator().manual_seed(2))
        text["bbox"] = torch.cat([left, left + 20], -1)
    seeing = {"pixel_values": [numbers(many, channels, height, width), numbers(many, frames, channels, height, width)]}
    hearing = {
        "input_features": [numbers(many, mels, audio), numbers(many, 96 + 32 * call, mels)],
        "input_values": [numbers(many, 1600 + 800 * call), numbers(many, 1, 1600), numbers(many, 96, mels)],
        "inputs_embeds": [numbers(many, length, wide)], "hidden_states": [numbers(many, length, wide)],
        "past_values": [numbers(many, _setting(config, "context_length", default=32)),
                        numbers(many, _setting(config, "context_length", default=32), channels)],
    }
    images = {"pixel_values_videos": [numbers(many, frames, channels, height, width)], **seeing}

    def known(given: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in given.items() if k in signature}

    if "input_ids" in signature:
        if "pixel_values" in signature and "image_embeds" not in signature:
            for x in seeing["pixel_values"]:
                yield (), known({**text, "pixel_values": x[:batch]})
        yield (), known(text)
        yield (), known({"input_ids": text["input_ids"]})
    for name, ways in {**images, **hearing}.items():
        for x in ways:
            if name in signature:
                extra = {k: v for k, v in text.items() if k == "decoder_input_ids"}
                yield (), known({name: x, **extra})
                if name == "inputs_embeds":
                    yield (), known({name: x, "attention_mask": padding(many, length, call)})
    # A tower that takes patches, and the grid that they came from.
    patch, side = _setting(config, "patch_size", default=8), 4 + 2 * call
    patch = patch if isinstance(patch, int) else patch[0]
    flat = channels * patch**2
    for depth in (_setting(config, "temporal_patch_size", default=1), 1):
        patches = numbers(side * side, flat * depth if isinstance(depth, int) else flat)
        grid = torch.tensor([[1, side, side]])
        for first in ("hidden_states", "pixel_values"):
            for second in ("grid_thw", "image_grid_thw"):
                if first in signature and second in signature:
                    yield (), {first: patches, second: grid}


def transformers_cases() -> list[Case]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [
        Case("transformers", name, tuple(partial(_transformer, name, v) for v in VARIANTS), _transformer_calls)
        for name in MODEL_MAPPING_NAMES
    ]
