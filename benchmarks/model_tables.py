"""Architectures of libraries that have no configurations to shrink: timm, diffusers, vit-pytorch,
x-transformers, as tables of their own settings.

A row that no version here builds or calls is said in the table of the walk, as what eager PyTorch raises.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from models import TOKENS, VOCAB, Call, Case, drawn, numbers, padding, tokens
from torch import nn

Inputs = Callable[[int], Call]


def _once(inputs: Inputs) -> Callable[[nn.Module, int], Iterator[Call]]:
    return lambda model, call: iter([inputs(call)])


def _images(size: int, frames: int = 0) -> Inputs:
    shape = (3, frames, size, size) if frames else (3, size, size)
    return lambda call: ((numbers(2 + call, *shape),), {})


# --- timm: the smallest of each family, and of what differs inside one ---

_TIMM = (
    "beit_base_patch16_224", "beitv2_base_patch16_224", "cait_xxs24_224", "coat_tiny", "coat_lite_tiny", "convit_tiny",
    "crossvit_tiny_240", "davit_tiny", "deit_tiny_patch16_224", "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fastvit_sa12", "gcvit_xxtiny", "hiera_tiny_224", "levit_128s", "maxvit_rmlp_pico_rw_256", "maxvit_tiny_tf_224",
    "coatnet_pico_rw_224", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "pit_ti_224", "pvt_v2_b0",
    "repvit_m0_9", "sequencer2d_s", "shvit_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224", "swin_s3_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_pcpvt_small",
    "twins_svt_small",
    "visformer_tiny", "vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "vit_relpos_small_patch16_rpn_224",
    "vit_srelpos_small_patch16_224",
    "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_tiny_r_s16_p8_224",
    "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224", "samvit_base_patch16_224", "vitamin_small_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224", "poolformer_s12", "caformer_s18", "mobilenetv4_hybrid_medium", "halonet26t",
    "botnet26t_256",
    "lambda_resnet26t", "sebotnet33ts_256", "eva_giant_patch14_224", "vit_wee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256", "hieradet_small", "sam2_hiera_tiny", "naflexvit_base_patch16_gap",
    "convnext_atto", "resnet10t",
)
# Settings by which their constructors make them smaller; those that a model does not take are left out, last first.
_SMALLER: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64},
    {"depth": 2, "embed_dim": 64, "num_heads": 4},
    {"depths": (1, 1, 1, 1), "img_size": 128},
    {"depths": (1, 1, 1, 1)},
    {"img_size": 128},
    {},
)


def _timm(name: str, settings: Mapping[str, Any]) -> nn.Module:
    import timm

    return drawn(timm.create_model(name, pretrained=False, num_classes=10, **settings))


def _timm_calls(model: nn.Module, call: int) -> Iterator[Call]:
    settings: Any = model
    given = getattr(settings, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    size = getattr(getattr(settings, "patch_embed", None), "img_size", None)
    for side in dict.fromkeys((*(tuple(size) if size is not None else ()), 64, 128, given[-1])):
        yield (numbers(2 + call, 3, side, side),), {}


def timm_cases() -> list[Case]:
    import timm

    known = set(timm.list_models())
    return [
        Case("timm", name, tuple(partial(_timm, name, s) for s in _SMALLER),
            _timm_calls) for name in _TIMM if name in known
    ]


# --- vit-pytorch ---

_VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 96,
    "dim_head": 16,
    "channels": 3, "dropout": 0.0, "emb_dropout": 0.0, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2,
    "spatial_depth": 1, "temporal_depth": 1, "cls_depth": 1, "seq_len": 64, "num_patches": 16, "window_size": 4,
    "max_tokens_per_depth": (16, 8), "img_size": 32, "kernel_size": 3, "n_input_channels": 3, "n_conv_layers": 1,
    "embedding_dim": 64,
    "num_layers": 2, "num_heads": 4, "mlp_ratio": 2.0, "sm_dim": 32, "sm_patch_size": 8, "sm_enc_depth": 1,
    "sm_enc_heads": 2,
    "sm_enc_mlp_dim": 64, "lg_dim": 64, "lg_patch_size": 16, "lg_enc_depth": 1, "lg_enc_heads": 2, "lg_enc_mlp_dim": 64,
    "ndim": 2, "input_shape": (32, 32), "num_register_tokens": 2, "max_patch_rows": 8, "max_patch_cols": 8,
    "num_kv_heads": 4,
}
_VIT_CLASSES = (
    "vit.ViT", "simple_vit.SimpleViT", "simple_vit_1d.SimpleViT", "simple_vit_3d.SimpleViT", "vit_1d.ViT",
    "vit_3d.ViT", "deepvit.DeepViT",
    "cait.CaiT", "t2t.T2TViT", "cct.CCT", "cross_vit.CrossViT", "pit.PiT", "levit.LeViT", "cvt.CvT",
    "twins_svt.TwinsSVT",
    "regionvit.RegionViT", "crossformer.CrossFormer", "scalable_vit.ScalableViT", "sep_vit.SepViT", "max_vit.MaxViT",
    "nest.NesT",
    "mobile_vit.MobileViT", "xcit.XCiT", "rvt.RvT", "vit_for_small_dataset.ViT", "parallel_vit.ViT",
    "learnable_memory_vit.ViT", "vivit.ViViT", "simple_vit_with_qk_norm.SimpleViT",
    "simple_vit_with_register_tokens.SimpleViT",
    "simple_vit_with_value_residual.SimpleViT", "simple_vit_with_hyper_connections.SimpleViT",
    "simple_flash_attn_vit.SimpleViT",
    "simple_vit_with_fft.SimpleViT", "simple_vit_with_relative_proj_pos_bias.SimpleViT",
    "simple_vit_with_sparse_gating.SimpleViTWithSparseGating",
    "simple_vit_attn_residual.SimpleViTAttnResidual", "simple_uvit.SimpleUViT", "normalized_vit.nViT",
    "jumbo_vit.JumboViT", "look_vit.LookViT",
    "vit_nd.ViTND", "vit_nd_rotary.ViTND", "vit_nd_pope.ViTND", "ats_vit.ViT", "vit_with_patch_merger.ViT",
    "vit_with_decorr.ViT",
    "vit_with_keel_post_ln.ViT", "looped_vit.LoopedViT", "vit_5.ViT", "na_vit.NaViT", "jet_vit.JetViT",
)
_STAGED: dict[str, dict[str, Any]] = {
    "cct.CCT": {"img_size": 32, "embedding_dim": 64, "n_input_channels": 3, "n_conv_layers": 1, "kernel_size": 3},
    "cross_vit.CrossViT": {"sm_patch_size": 8, "lg_patch_size": 16, "depth": 1, "sm_enc_depth": 1, "lg_enc_depth": 1},
    "simple_vit_with_hyper_connections.SimpleViT": {"num_residual_streams": 2},
    "simple_vit_with_fft.SimpleViT": {"freq_patch_size": 8},
    "look_vit.LookViT": {"depth": 1, "patch_size": 8, "highres_patch_size": 4, "heads": 4},
    "jumbo_vit.JumboViT": {"jumbo_cls_k": 2}, "cvt.CvT": {"s1_emb_dim": 32, "s2_emb_dim": 64, "s3_emb_dim": 64,
        "s1_heads": 2, "s2_heads": 2, "s3_heads": 4, "s3_depth": 1, "s2_depth": 1},
    "levit.LeViT": {"dim": (64, 64, 64), "depth": 1, "heads": (2, 2, 2), "mlp_mult": 2, "image_size": 128},
    "pit.PiT": {"depth": (1, 1)}, "t2t.T2TViT": {"t2t_layers": ((7, 4), (3, 2)), "depth": 2, "heads": 4,
        "mlp_dim": 96}, "xcit.XCiT": {"local_patch_kernel_size": 3},
    "twins_svt.TwinsSVT": {"s1_emb_dim": 32, "s2_emb_dim": 64, "s3_emb_dim": 64, "s4_emb_dim": 64, "s3_depth": 1,
        "image_size": 128},
    "regionvit.RegionViT": {"dim": (32, 64, 64, 64), "depth": (1, 1, 1, 1), "image_size": 224},
    "crossformer.CrossFormer": {"dim": (32, 64, 64, 64), "depth": (1, 1, 1, 1), "local_window_size": 2,
        "global_window_size": (4, 2, 2, 1), "image_size": 64},
    "scalable_vit.ScalableViT": {"dim": 32, "heads": (2, 2, 2, 2), "depth": (1, 1, 1, 1), "ssa_dim_key": 16,
        "reduction_factor": (4, 2, 2, 1), "window_size": (2, 2, None, None), "image_size": 64},
    "sep_vit.SepViT": {"dim": 32, "dim_head": 16, "heads": (1, 2, 2, 2), "depth": (1, 1, 1, 1), "window_size": 4,
        "image_size": 128},
    "max_vit.MaxViT": {"dim": 32, "dim_conv_stem": 16, "depth": (1, 1), "window_size": 4, "image_size": 64},
    "nest.NesT": {"num_hierarchies": 2, "block_repeats": (1, 1), "dim": 32, "heads": 2},
    "mobile_vit.MobileViT": {"image_size": (64, 64), "dims": [32, 32, 32], "channels": [16, 16, 16, 16, 16, 16, 16,
        16, 16, 16, 32]},
    "simple_vit_1d.SimpleViT": {"patch_size": 4}, "vit_1d.ViT": {"patch_size": 4},
}
for _name in ("vit_nd.ViTND", "vit_nd_rotary.ViTND", "vit_nd_pope.ViTND"):
    _STAGED[_name] = {"patch_size": (8, 8)}


def _vit(path: str) -> nn.Module:
    module, name = path.split(".")
    kind = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
    taken = inspect.signature(kind.__init__).parameters
    required = {k: _VIT[k] for k, p in taken.items() if k in _VIT and (p.default is p.empty or k in ("dim_head",
        "channels"))}
    own = {k: v for k, v in _STAGED.get(path, {}).items() if k in taken}
    return drawn(kind(**required | own))


def _vit_calls(path: str, model: nn.Module, call: int) -> Iterator[Call]:
    # the size that it is made for first: others may leave a stage with one key
    own = _STAGED.get(path, {}).get("image_size", 32)
    for size in dict.fromkeys((own if isinstance(own, int) else own[0], 32, 64, 128, 224)):
        yield (numbers(2 + call, 3, size, size),), {}
    yield (numbers(2 + call, 3, 64),), {}
    yield (numbers(2 + call, 3, 4, 32, 32),), {}
    yield ([numbers(3, 32, 16 + 8 * call), numbers(3, 16, 32)],), {}


def vit_pytorch_cases() -> list[Case]:
    importlib.import_module("vit_pytorch")
    return [Case("vit_pytorch", name, (partial(_vit, name),), partial(_vit_calls, name)) for name in _VIT_CLASSES]


# --- diffusers ---

_DIT: dict[str, Any] = {
    "num_layers": 1, "num_single_layers": 1, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_refiner_layers": 1,
    "num_attention_heads": 4, "num_cross_attention_heads": 4, "num_key_value_attention_heads": 2, "num_kv_heads": 2,
    "attention_head_dim": 16, "cross_attention_head_dim": 16, "cross_attention_dim": 64, "joint_attention_dim": 64,
    "caption_projection_dim": 64, "caption_channels": 64, "pooled_projection_dim": 64, "text_dim": 64,
    "text_embed_dim": 64,
    "cross_attention_dim_t5": 64, "cross_attention_input_dim": 64, "global_states_input_dim": 64, "embedding_dim": 64,
    "time_embed_dim": 64, "freq_dim": 32, "ffn_dim": 96, "hidden_size": 64, "cap_feat_dim": 64, "in_channels": 8,
    "out_channels": 8,
    "patch_size": 2, "sample_size": 16, "axes_dims_rope": (4, 6, 6), "axes_dim_rope": (4, 6, 6),
    "rope_axes_dim": (16, 16),
    "pos_embed_max_size": 64, "approximator_hidden_dim": 64, "approximator_layers": 1, "approximator_num_channels": 16,
    "time_proj_dim": 32, "sample_width": 16, "sample_height": 16, "sample_frames": 4, "video_length": 4, "text_len": 12,
    "text_len_t5": 12, "use_style_cond_and_image_meta_size": False, "norm_type": None, "condition_dim": 32,
}


def _flat(call: int) -> dict[str, Any]:
    """A packed image, its text, and where both stand."""
    side, words = 4 + 2 * call, 12
    rows = torch.arange(side * side)
    places = torch.stack([rows * 0, rows // side, rows % side], -1).float()
    return {
        "hidden_states": numbers(2, side * side, 8), "encoder_hidden_states": numbers(2, words, 64, seed=2),
        "pooled_projections": numbers(2, 64, seed=3), "timestep": torch.tensor([0.5, 0.25]), "img_ids": places,
        "txt_ids": torch.zeros(words, 3),
    }


def _image(call: int) -> dict[str, Any]:
    side = 16
    mask = padding(2 + call, 12, call)
    return {
        "hidden_states": numbers(2 + call, 8, side, side), "encoder_hidden_states": numbers(2 + call, 12, 64, seed=2),
        "pooled_projections": numbers(2 + call, 64, seed=3), "timestep": torch.full((2 + call,), 7),
        "encoder_attention_mask": mask, "class_labels": torch.full((2 + call,), 3),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _video(call: int) -> dict[str, Any]:
    return _image(call) | {"hidden_states": numbers(2, 8, 4 + 2 * call, 16, 16)} | _text(2, call)


def _frames(call: int) -> dict[str, Any]:
    return _image(call) | {"hidden_states": numbers(2, 4 + 2 * call, 8, 16, 16)} | _text(2, call)


def _text(batch: int, call: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": numbers(batch, 12, 64, seed=2), "timestep": torch.full((batch,), 7),
        "encoder_attention_mask": padding(batch, 12, call),
    }


def _joint_mask(call: int) -> dict[str, Any]:
    side = 4 + 2 * call
    return _flat(call) | {
        "encoder_hidden_states_mask": padding(2, 12, call), "img_shapes": [(1, side, side)] * 2,
        "attention_mask": padding(2, 12 + side * side, call).bool(), "num_frames": 1, "height": side, "width": side,
        "encoder_attention_mask": padding(2, 12, call),
    }


def _prior(call: int) -> dict[str, Any]:
    return {
        "hidden_states": numbers(2 + call, 64), "timestep": torch.full((2 + call,), 7),
        "proj_embedding": numbers(2 + call, 64, seed=2),
        "encoder_hidden_states": numbers(2 + call, 77, 64, seed=3), "attention_mask": padding(2 + call, 77,
            call).bool(),
    }


_BLOCKS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_UNET: dict[str, Any] = {**_BLOCKS, "in_channels": 4, "out_channels": 4, "sample_size": 16, "attention_head_dim": 8}
_CROSS: dict[str, Any] = {
    **_UNET, "cross_attention_dim": 64, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def _unet(*shape: int) -> Callable[[int], dict[str, Any]]:
    return lambda call: {
        "sample": numbers(2, 4, *shape, 16 + 16 * call, 16), "timestep": 7, "encoder_hidden_states": numbers(2, 12,
            64, seed=2),
        "encoder_attention_mask": padding(2, 12, call),
    }


_DIFFUSERS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "FluxTransformer2DModel": ({"patch_size": 1, "out_channels": None}, _flat),
    "SD3Transformer2DModel": ({"qk_norm": "rms_norm"}, _image),
    "PixArtTransformer2DModel": ({"norm_type": "ada_norm_single", "use_additional_conditions": False}, _image),
    "DiTTransformer2DModel": ({"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 8, "norm_num_groups": 8}, _image),
    "AuraFlowTransformer2DModel": ({}, _image), "WanTransformer3DModel": ({"patch_size": (1, 2, 2)}, _video),
    "CogVideoXTransformer3DModel": ({}, _frames), "LTXVideoTransformer3DModel": ({"patch_size": 1}, _joint_mask),
    "SanaTransformer2DModel": ({"patch_size": 1}, _image), "QwenImageTransformer2DModel": ({"patch_size": 1},
        _joint_mask),
    "HunyuanDiT2DModel": ({}, _image), "PriorTransformer": ({"embedding_proj_dim": None}, _prior),
    "LatteTransformer3DModel": ({"norm_type": "ada_norm_single", "num_embeds_ada_norm": 8}, _video),
    "ChromaTransformer2DModel": ({"patch_size": 1, "out_channels": None}, _joint_mask),
    "MochiTransformer3DModel": ({}, _video),
    "AllegroTransformer3DModel": ({}, _video), "Lumina2Transformer2DModel": ({}, _image),
    "UNet2DConditionModel": (_CROSS, _unet()), "UNet2DModel": (
        {**_UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D",
            "UpBlock2D")}, _unet()
    ),
    "UNet3DConditionModel": (
        {**_UNET, "cross_attention_dim": 64, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}, _unet(3),
    ),
    "UNetMotionModel": (
        {**_BLOCKS, "in_channels": 4, "out_channels": 4, "sample_size": 16, "cross_attention_dim": 64,
            "num_attention_heads": 4,
         "motion_num_attention_heads": 4, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")}, _unet(3),
    ),
    "AutoencoderKL": (
        {**_BLOCKS, "in_channels": 4, "out_channels": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2}, _unet(),
    ),
    "VQModel": (
        {**_BLOCKS, "in_channels": 4, "out_channels": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2}, _unet(),
    ),
}


def _diffuser(name: str) -> nn.Module:
    import diffusers

    kind, own = getattr(diffusers, name), _DIFFUSERS[name][0]
    taken = inspect.signature(kind.__init__).parameters
    general = {} if "block_out_channels" in own else _DIT
    settings = {k: v for k, v in (general | own).items() if k in taken and not (k == "norm_type" and v is None)}
    return drawn(kind(**settings))


def _diffuser_calls(name: str) -> Callable[[nn.Module, int], Iterator[Call]]:
    def calls(model: nn.Module, call: int) -> Iterator[Call]:
        taken = inspect.signature(model.forward).parameters
        yield (), {k: v for k, v in _DIFFUSERS[name][1](call).items() if k in taken}

    return calls


def diffusers_cases() -> list[Case]:
    importlib.import_module("diffusers")
    return [Case("diffusers", name, (partial(_diffuser, name),), _diffuser_calls(name)) for name in _DIFFUSERS]


# --- x-transformers: one feature a row ---

_X: dict[str, dict[str, Any]] = {
    "plain": {}, "flash": {"attn_flash": True}, "rotary": {"rotary_pos_emb": True}, "xpos": {"rotary_xpos": True,
        "rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2}, "t5_bias": {"rel_pos_bias": True},
    "dynamic_bias": {"dynamic_pos_bias": True},
    "talking_pre": {"attn_pre_talking_heads": True}, "talking_post": {"attn_post_talking_heads": True},
    "head_scale": {"attn_head_scale": True}, "sparse_topk": {"attn_sparse_topk": 8},
    "memory_kv": {"attn_num_mem_kv": 4},
    "gate_values": {"attn_gate_values": True}, "qk_norm": {"attn_qk_norm": True},
    "qk_norm_dim": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "one_kv_head": {"attn_one_kv_head": True}, "gqa": {"attn_kv_heads": 2}, "zero_kv": {"attn_add_zero_kv": True},
    "sink": {"attn_head_learned_sink": True},
    "window": {"attn_max_attend_past": 8}, "softclamp": {"attn_softclamp_logits": True},
    "sigmoid": {"attn_sigmoid": True},
    "l2_distance": {"attn_l2_distance": True}, "selective": {"attn_selective": True}, "cope": {"attn_use_cope": True},
    "data_alibi": {"attn_data_dependent_alibi": True}, "laser": {"attn_laser": True},
    "latent_kv": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 32},
    "value_residual": {"add_value_residual": True}, "residual_attn": {"residual_attn": True},
    "macaron": {"macaron": True},
    "cog_signed": {"attn_cog_signed": True}, "polar": {"polar_pos_emb": True},
    "orthogonal": {"attn_orthog_projected_values": True},
    "differential": {"qkv_receive_diff_residuals": True}, "shift": {"shift_tokens": 1},
    "value_head": {"attn_value_dim_head": 24}, "rel_proj_bias": {"attn_use_rel_proj_pos_bias": True},
    "streams": {"num_residual_streams": 2},
}


def _x_transformers(name: str, encoder: bool) -> nn.Module:
    import x_transformers as x

    kind = x.Encoder if encoder else x.Decoder
    depth = 2 if {"residual", "streams", "diff"} & set(" ".join(_X[name]).split("_")) else 1
    layers = kind(dim=64, depth=depth, heads=4, attn_dim_head=16, **_X[name])
    return drawn(x.TransformerWrapper(num_tokens=VOCAB, max_seq_len=64, attn_layers=layers))


def _x_calls(encoder: bool) -> Inputs:
    def given(call: int) -> Call:
        ids = tokens(2, TOKENS[call])
        return (ids,), {"mask": padding(2, TOKENS[call], call).bool()} if encoder else {}

    return given


def x_transformers_cases() -> list[Case]:
    importlib.import_module("x_transformers")
    return [
        Case("x_transformers", f"{name}:{'encoder' if e else 'decoder'}", (partial(_x_transformers, name, e),),
            _once(_x_calls(e)))
        for name in _X for e in (False, True)
    ]
