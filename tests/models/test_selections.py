"""Models that select keys themselves, tiny and with random weights: each layer is one site that gathers, and computes the same."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import reattend

transformers = pytest.importorskip("transformers", minversion="5.20")

BASE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
# Each token goes to all experts: which of them a router names may change with a rounding, and is nobody's error here.
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "index_topk": 8,
    "index_n_heads": 4, "index_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}
BLOCKS = {
    "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 4,
    "dense_intermediate_size": 64, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 3,
    "mlp_layer_types": ["dense"], "layer_types": ["minimax_m3_sparse"],
}
POOLS = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 0, "v_head_dim": 16, "index_topk": 8,
    "index_n_heads": 4, "index_head_dim": 16, "index_kpool": 4, "n_routed_experts": 4, "num_experts_per_tok": 4,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense"], "indexer_types": ["full"],
    "layer_types": ["indexed_attention"],
}
ENTRIES = {
    "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "index_topk": 4,
    "index_n_heads": 2, "index_head_dim": 16, "sliding_window": 8, "n_routed_experts": 4, "num_experts_per_tok": 4,
    "moe_intermediate_size": 32, "layer_types": ["compressed_sparse_attention"], "mlp_layer_types": ["moe"],
}
LOOPS = {
    "num_key_value_heads": 2, "head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 8, "indexer_compress_ratio": 2, "layer_types": ["indexed_attention"], "num_experts": 4,
    "num_experts_per_tok": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}
# what a model type's text model is called, and its sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v32": ("DeepseekV32Model", LATENT), "axk2": ("AXK2Model", LATENT), "glm_moe_dsa": ("GlmMoeDsaModel", LATENT),
    "hy_v4": ("HYV4Model", {**LATENT, "head_dim": 24}), "dots3_note": ("Dots3NoteTextModel", LATENT),
    "mistral_large4": ("MistralLarge4TextModel", {**LATENT, "head_dim": 8}),
    "minimax_m3_vl": ("MiniMaxM3VLTextModel", BLOCKS), "glm5_next": ("Glm5NextTextModel", POOLS),
    "deepseek_v4": ("DeepseekV4Model", ENTRIES), "qwen4_exp": ("Qwen4ExpTextModel", LOOPS),
}
# whose selection is made outside of any graph: a mask that is data
LOOPED = frozenset({"qwen4_exp"})
# A second layer, which takes the selection of the first.
SHARED: dict[str, Any] = {"num_hidden_layers": 2, "indexer_types": ["full", "shared"], "mlp_layer_types": ["dense", "sparse"]}
# what a model type's model with a head is called, and what its sizes have besides
GENERATING: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v32": ("DeepseekV32ForCausalLM", {}), "axk2": ("AXK2ForCausalLM", {}),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", SHARED), "hy_v4": ("HYV4ForCausalLM", SHARED),
    "dots3_note": ("Dots3NoteForCausalLM", {}), "mistral_large4": ("MistralLarge4ForConditionalGeneration", SHARED),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {}),
    "glm5_next": ("Glm5NextForConditionalGeneration", {**SHARED, "layer_types": ["indexed_attention"] * 2}),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {}), "qwen4_exp": ("Qwen4ExpForCausalLM", {}),
}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2,
    "out_hidden_size": 64, "patch_size": 4, "image_size": 16,
}
# where a graph breaks inside of the attention module, eager code hands its weights out
ATTENTION = {"glm5_next": "sdpa"}
MINE = reattend.Policy(tune=False, deny=("sdpa", "flex", "original"))


def tiny(name: str, attention: str = "", generating: bool = False) -> torch.nn.Module:
    """A model of random weights, none of which is so near zero that what it multiplies is of no effect."""
    (kind, more), sizes = GENERATING[name] if generating else (MODELS[name][0], {}), MODELS[name][1]
    chosen = {"attn_implementation": attention or ATTENTION.get(name, "eager")}
    made = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), kind)
    given = {**BASE, **sizes, **more}
    if "vision_config" in made.config_class.sub_configs:
        config = made.config_class(text_config=given, vision_config=VISION, image_token_id=60, **chosen)
    else:
        config = made.config_class(**given, **chosen)
    torch.manual_seed(0)
    model: torch.nn.Module = made(config).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, x in model.named_parameters():
            drawn = torch.randn(x.shape, generator=g)
            gain = "norm" in part and not part.endswith("bias")
            x.copy_(1 + 0.2 * drawn if gain else drawn * (1.2 * x.shape[-1] ** -0.5 if x.dim() > 1 else 0.3))
    return model


def planned(ours: torch.nn.Module) -> tuple[reattend.Plan, set[str]]:
    """What was planned, and what the net said of it."""
    report = reattend.report(ours)
    assert report.plan is not None
    return report.plan, {c.verdict for c in report.checks}


# Of these, steps of one token over a cache that grows keep a mask of all pairs (docs/limits.md).
DENSE_STEPS = ("glm5_next",)


@pytest.mark.slow
def test_a_layer_is_one_site_that_gathers() -> None:
    """Without a mask of its own as well, and rows of padding, which have no visible key."""
    model = tiny("deepseek_v32")
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids)
    valid[0, :15] = 0
    ours = reattend.optimize(copy.deepcopy(model), policy=MINE)
    with torch.no_grad():
        for mask in (None, valid):
            given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            want, out = (m(**given).last_hidden_state for m in (model, ours))
            torch.testing.assert_close(out, want, rtol=0, atol=2e-5)
    plan, checks = planned(ours)
    assert {s.kind for s in plan.sites if s.name.endswith("attn")} == {"selected"}
    assert checks == {"same"}
    assert not plan.misses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl"])
def test_tokens_one_by_one(name: str) -> None:
    """Each token after the cache of those before, with and without us."""
    model = tiny(name, "sdpa")
    ids = torch.randint(3, 64, (1, 26), generator=torch.Generator().manual_seed(0))
    ours = reattend.optimize(copy.deepcopy(model), policy=MINE)
    with torch.no_grad():
        kept = [m(input_ids=ids[:, :20], use_cache=True).past_key_values for m in (model, ours)]
        for t in range(20, 26):
            given = [{"input_ids": ids[:, t : t + 1], "past_key_values": k, "use_cache": True} for k in kept]
            want, out = (m(**g).last_hidden_state for m, g in zip((model, ours), given))
            torch.testing.assert_close(out, want, rtol=0, atol=2e-5)
    plan, checks = planned(ours)
    assert checks == {"same"}
    assert any("decode" in s.traits and s.kind == "selected" and s.choice == "reattend" for s in plan.sites)


def states(
    m: torch.nn.Module, ids: torch.Tensor, valid: torch.Tensor, given: torch.Tensor | None = None, steps: int = 3,
    padding: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of a prompt's tokens and of those after it, one by one, as given or as they are chosen; and these.

    `padding`: of rows that are padding as well, which have no visible key.
    """
    head = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()
    out = m(input_ids=ids, attention_mask=valid, use_cache=True)
    seen, tokens = [out.last_hidden_state[valid.bool() | padding]], list[torch.Tensor]()
    for i in range(steps):
        tokens.append((out.last_hidden_state[:, -1:].double() @ head).argmax(-1) if given is None else given[i])
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], 1)
        out = m(input_ids=tokens[-1], attention_mask=valid, past_key_values=out.past_key_values, use_cache=True)
        seen.append(out.last_hidden_state[:, 0])
    return torch.cat(seen).double(), torch.stack(tokens) if tokens else ids[:0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_and_tokens_in_types(name: str, dtype: torch.dtype) -> None:
    """Whole prompts, padded on the right and on the left, and tokens after them: equal in float32, as near in bfloat16."""
    torch._dynamo.reset()
    model = tiny(name).to(dtype)
    # far nearer than bfloat16, and experts have no products in float64
    exact = copy.deepcopy(model).float()
    ours = reattend.optimize(copy.deepcopy(model), policy=MINE)
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(ids)
    right, left = whole.clone(), whole.clone()
    right[0, 17:], left[0, :7] = 0, 0
    with torch.no_grad():
        for valid in (whole, right, left):
            # after padding on the right no token follows
            steps = 0 if valid is right else 3
            every = dtype == torch.float32
            want, said = states(model, ids, valid, steps=steps, padding=every)
            out, says = states(ours, ids, valid, None if every else said, steps, padding=every)
            if dtype == torch.float32:
                torch.testing.assert_close(out, want, rtol=0, atol=2e-5)
                assert torch.equal(says, said)
            else:
                true, _ = states(exact, ids, valid, said, steps)
                own, off = ((x - true).square().mean().sqrt() for x in (want, out))
                assert off <= 2 * own
    plan, checks = planned(ours)
    assert checks <= {"same"}
    sites = [s for s in plan.sites if s.name.endswith("attn")]
    assert sites
    if name in LOOPED:
        assert {s.kind for s in sites} == {"softmax"}
        return
    assert {s.choice for s in sites} == {"reattend"}
    assert "top-k" in sites[0].traits
    assert not plan.misses or name in ("hy_v4", "glm5_next", "deepseek_v4")
    steps_apart = [s for s in sites if name in DENSE_STEPS and "decode" in s.traits]
    assert {s.kind for s in sites if s not in steps_apart} == {"selected"}


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATING)
def test_generate(name: str) -> None:
    """`generate` token by token, of a batch that is padded on the left; layers that share a selection gather as well."""
    torch._dynamo.reset()
    model = tiny(name, generating=True)
    ours = reattend.optimize(copy.deepcopy(model), policy=MINE)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids)
    valid[0, :7] = 0
    given = {"attention_mask": valid, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    want, out = (m.generate(ids, **given) for m in (model, ours))  # type: ignore[operator]
    assert torch.equal(out, want)
    plan, checks = planned(ours)
    assert checks == {"same"}
    prompts = {s.kind for s in plan.sites if s.name.endswith("self_attn") and "decode" not in s.traits}
    assert prompts == {"softmax" if name in LOOPED else "selected"}


def test_the_page_says_which_are_gathered() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "selections.md").read_text(encoding="utf-8")
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
    assert {name.strip("`"): (prompts, steps) for name, _, prompts, steps in rows} == {
        name: ("dense" if name in LOOPED else "gathered", "dense" if name in {*LOOPED, *DENSE_STEPS} else "gathered")
        for name in MODELS
    }


class Named(torch.nn.Module):
    """Rows that name 8 of 64 keys."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        top = i.topk(8, -1).indices
        keep = torch.zeros(i.shape, dtype=torch.bool).scatter(-1, top, True)
        keep = keep & torch.ones(64, 64, dtype=torch.bool).tril()
        out: torch.Tensor = (q @ k.mT * 0.25).masked_fill(~keep, -1e30).softmax(-1) @ v
        return out


@pytest.mark.slow
def test_gradients_go_another_way() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 16) for _ in range(3))
    i = torch.randn(2, 1, 64, 64)
    ours, grads = reattend.optimize(Named(), policy=reattend.Policy(tune=False)), []
    for m in (Named(), ours):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(m(*leaves, i).square().sum(), leaves))
    for want, got in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert {c.verdict for c in reattend.report(ours).checks} <= {"same"}
    with torch.no_grad():
        torch.testing.assert_close(ours(q, k, v, i), Named()(q, k, v, i))


def test_it_is_gathered() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 16) for _ in range(3))
    i = torch.randn(2, 1, 64, 64)
    policy = reattend.Policy(tune=False, deny=("original", "sdpa", "flex"))
    ours = reattend.optimize(Named(), policy=policy)
    with torch.no_grad():
        torch.testing.assert_close(ours(q, k, v, i), Named()(q, k, v, i))
    (site,) = planned(ours)[0].sites
    assert (site.kind, site.choice) == ("selected", "reattend")
    assert site.mask is not None
    assert site.mask.density == 0.125
