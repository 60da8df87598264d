"""Every recurrent model type of transformers, tiny and with random weights: which are scanned, and that all compute the same.

The page docs/recurrences.md has the same table; it is held here.
"""

from __future__ import annotations

import copy
import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import reattend
from tests.tiers import few

transformers = pytest.importorskip("transformers", minversion="5.24")

PAGE = Path(__file__).parents[2] / "docs" / "recurrences.md"
# Sizes by what configurations call them; each takes what it knows.
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "state_size": 8, "conv_kernel": 4,
    "chunk_size": 16, "mamba_chunk_size": 16, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_n_groups": 1, "n_mamba_heads": 4, "mamba_ngroups": 1, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1,
    "num_heads": 4, "ssm_state_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4, "block_size": 16, "mamba_d_ssm": 128,
    "expand": 2, "mamba_expand": 2, "lru_width": 64, "attention_window_size": 16, "attention_hidden_size": 64,
    "conv1d_width": 4, "use_mamba_kernels": False, "num_blocks": 1, "use_associative_scan": False,
}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention"]}
# A model type's text model, sizes of its own, and the tokens of a prompt: some chunks and a rest where it has chunks.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen3_next": ("Qwen3NextModel", LINEAR, 200), "qwen3_5": ("Qwen3_5TextModel", LINEAR, 200),
    "qwen3_5_moe": ("Qwen3_5MoeTextModel", LINEAR, 200), "qwen4_exp": ("Qwen4ExpTextModel", LINEAR, 200),
    "lara_mini": ("LaraMiniModel", LINEAR, 200),
    "olmo_hybrid": (
        "OlmoHybridModel", {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}, 200,
    ),
    "kimi_linear": ("KimiLinearModel", LINEAR, 200), "bailing_hybrid": ("BailingHybridModel", LINEAR, 200),
    "glm5_next": (
        "Glm5NextTextModel",
        {**LINEAR, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense"], "indexer_types": ["full"]}, 200,
    ),
    "mamba2": ("Mamba2Model", {"head_dim": 32}, 70), "bamba": ("BambaModel", {"attn_layer_indices": []}, 70),
    "falcon_h1": ("FalconH1Model", {}, 70), "nemotron_h": ("NemotronHModel", {"layers_block_type": ["mamba"]}, 70),
    "granitemoehybrid": ("GraniteMoeHybridModel", {"layer_types": ["mamba"]}, 70),
    "zamba2": ("Zamba2Model", {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "num_mem_blocks": 1}, 70),
    "mamba": ("MambaModel", {}, 24), "falcon_mamba": ("FalconMambaModel", {}, 24),
    "jamba": ("JambaModel", {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1}, 24),
    "zamba": ("ZambaModel", {"layers_block_type": ["mamba"]}, 24),
    "recurrent_gemma": ("RecurrentGemmaModel", {"block_types": ["recurrent"]}, 24), "rwkv": ("RwkvModel", {"num_hidden_layers": 2}, 24),
    "minimax": ("MiniMaxModel", LINEAR, 70), "xlstm": ("xLSTMModel", {}, 70),
}
MINE = reattend.Policy(tune=False, deny=("original",))


def tiny(name: str, head: bool = False) -> torch.nn.Module:
    kind, sizes, _ = MODELS[name]
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    made = getattr(module, kind)
    config = made.config_class
    known = {f.name for f in dataclasses.fields(config)}
    given = {k: v for k, v in {**SIZES, **sizes}.items() if k in known}
    made = getattr(module, kind.removesuffix("Model").removesuffix("Text") + "ForCausalLM") if head else made
    model = made(config(**given)).eval()
    # as they are drawn by default, a layer adds next to nothing to what it reads
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.7 / p.shape[-1] ** 0.5)
    return model  # type: ignore[no-any-return]


def tokens(name: str) -> torch.Tensor:
    return torch.randint(3, 64, (2, MODELS[name][2]), generator=torch.Generator().manual_seed(0))


def optimized(model: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return reattend.optimize(copy.deepcopy(model), policy=MINE)


def scanned(model: torch.nn.Module) -> tuple[int, set[str]]:
    """How many scans of ours run, and what the net said of them."""
    report = reattend.report(model)
    sites = [s for p in report.pieces if p.plan for s in p.plan.sites]
    return sum(s.kind == "scan" and s.choice == "reattend" for s in sites), {c.verdict for c in report.checks}


def rows() -> dict[str, tuple[str, ...]]:
    """The table of the page: a model type → its cells."""
    cells = (tuple(c.strip() for c in x.strip("|").split("|")) for x in PAGE.read_text().splitlines() if x.startswith("| `"))
    return {c[0].strip("`"): c[1:] for c in cells}


def test_the_page_has_every_type() -> None:
    """At least four fifths of them are scanned."""
    table = rows()
    assert set(table) == set(MODELS)
    assert sum(c[1] == "scanned" for c in table.values()) >= 0.8 * len(table)


FAST = ("granitemoehybrid",)


@pytest.mark.parametrize("name", few(MODELS, *FAST))
def test_a_prompt_is_scanned_as_the_page_says(name: str) -> None:
    model, ids = tiny(name), tokens(name)
    ours = optimized(model)
    with torch.no_grad():
        want, got = (m(input_ids=ids, use_cache=False)[0] for m in (model, ours))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    count, said = scanned(ours)
    assert said <= {"same"}
    assert (count > 0) == (rows()[name][1] == "scanned")


# Of each kind of recurrence one, and the hybrids whose padding and types are their own; Mamba's default is a tree of pairs, not scanned.
KINDS = ("qwen3_next", "kimi_linear", "mamba2", "zamba2", "granitemoehybrid", "recurrent_gemma")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_in_two_types(name: str, side: str) -> None:
    """On tokens that are none of the padding; in bfloat16 at most twice as far from float32 as the model's own code."""
    model, ids = tiny(name), tokens(name)
    valid = torch.ones_like(ids)
    pad = slice(0, 9) if side == "left" else slice(-9, None)
    valid[0, pad], ids[0, pad] = 0, 0
    keep = valid.bool()
    given = {"input_ids": ids, "attention_mask": valid, "use_cache": False}
    with torch.no_grad():
        exact = model(**given)[0][keep]
        ours = optimized(model)
        torch.testing.assert_close(ours(**given)[0][keep], exact, rtol=1e-4, atol=1e-4)
        narrow = model.to(torch.bfloat16)
        own = narrow(**given)[0][keep].float()
        other = optimized(narrow)
        got = other(**given)[0][keep].float()
    for m in (ours, other):
        count, said = scanned(m)
        assert count
        assert said <= {"same"}
    assert (got - exact).norm() <= 2 * (own - exact).norm()


# Models whose layers are all linear cannot generate in transformers: their cache asks an attention for its length.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zamba2"])
def test_generated_tokens_are_the_same(name: str) -> None:
    """After a prompt that is padded on the left: states go from a scan into the steps of the model."""
    model, ids = tiny(name, head=True), tokens(name)
    valid = torch.ones_like(ids)
    valid[0, :9], ids[0, :9] = 0, 0
    ours = optimized(model)
    given = {"attention_mask": valid, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        want, got = (m.generate(ids, **given) for m in (model, ours))  # type: ignore[operator]
    assert torch.equal(got, want)
    count, said = scanned(ours)
    assert count
    assert said <= {"same"}
