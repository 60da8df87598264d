"""Plans for a mesh of models that keep latents, captured from their own code: DeepSeek's in transformers, and hand-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cli import main
from reattend.cost_model.mesh.plan import MeshPlan
from reattend.cost_model.plan.plan import Plan
from tests.tiers import few

# Heads 8; keys of 32 + 16 rotary, values of 24, a latent of 64.
SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 24, "vocab_size": 99, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "V3": {**SIZES, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 48},
    "V2": {**SIZES, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None},
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return out


def sharding(capsys: pytest.CaptureFixture[str], path: Path, name: str, *words: str) -> MeshPlan:
    config = path / "config.json"
    config.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    out = run(capsys, "plan", str(config), "--target", "h200", "--dtype", "bf16", "--mesh", "tp=8", "--json", *words)
    return MeshPlan.from_dict(json.loads(out)["sharding"])


@pytest.mark.parametrize(("name", "attn"), few([(n, a) for n in CONFIGS for a in ("eager", "sdpa")], ("V3", "sdpa")))
def test_a_config_shows_latents_beside_expanded_keys(
    name: str, attn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes a token and device, of one head of 8: 72 channels; of latents 64 + 16 whole, or an eighth of the tokens."""
    found = sharding(capsys, tmp_path, name, "--attn", attn, "--seq", "512")
    assert found.step == "prefill"
    by = {s.name: s.token_bytes for s in found.schemes if s.parts}
    assert (by["heads"], by["latent heads"], by["latent expanded heads"]) == (2 * 72, 2 * 80, 2 * 80)
    assert (by["latent merge"], by["TPLA 2 slices"], by["TPLA 8 slices"]) == (2 * 10, 2 * 48, 2 * 24)
    assert {s.name.partition(",")[0] for s in found.schemes if not s.exact} == {"TPLA 2 slices", "TPLA 8 slices"}
    # the norm stands between: the latent is what comes after it
    assert "latent ways keep kv_a_layernorm 128 + " in found.note
    assert "in place of 1152 of keys and values" in found.note


@pytest.mark.parametrize("name", few(CONFIGS, "V2"))
def test_a_decoding_step_reads_latents_from_its_cache(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = sharding(capsys, tmp_path, name, "--phase", "decode", "--past", "1023", "--batch", "4")
    assert found.step == "decode"
    assert found.scheme("latent heads").cache_bytes == 2 * 4 * 1024 * 160
    assert found.scheme("latent merge").cache_bytes == 2 * 4 * 128 * 160
    assert found.scheme("latent expanded heads").flops > 4 * found.scheme("latent heads").flops
    assert "1 query token does not divide over 8 devices" in found.scheme("latent ring").why


def test_the_table_says_what_each_device_holds_computes_and_sends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIGS["V3"]), encoding="utf-8")
    out = run(capsys, "plan", str(config), "--target", "h200", "--seq", "512", "--mesh", "tp=4")
    table = out[out.index("sharded over tp=4") :]
    for word in ("exact", "holds", "a token", "computes", "sends", "latent merge", "latent summed scores", "TPLA 4 slices"):
        assert word in table
    assert "optimize() does not make" in table


class Squeezed(nn.Module):
    """Latent attention under other names, with an einsum, and no positions."""

    def __init__(self, shared: int = 0) -> None:
        super().__init__()
        self.ask, self.narrow = nn.Linear(128, 8 * (16 + shared), bias=False), nn.Linear(128, 32, bias=False)
        self.up = nn.Parameter(torch.randn(8, 40, 32))
        self.side = nn.Linear(128, shared, bias=False) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        q = self.ask(x).unflatten(-1, (8, -1)).transpose(1, 2)
        k, v = torch.split(torch.einsum("bmc,hec->bhme", nn.functional.layer_norm(self.narrow(x), (32,)), self.up), [16, 24], -1)
        if self.side is not None:
            k = torch.cat([k, self.side(x).sin()[:, None].expand(-1, 8, -1, -1)], -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("shared", [0, 4])
def test_latents_are_found_by_data_flow(shared: int) -> None:
    policy = reattend.Policy(mesh="tp=4", approximate=True)
    with torch.no_grad():
        found = reattend.plan(Squeezed(shared), (torch.randn(2, 256, 128),), target="h200", policy=policy).sharding
    assert found is not None
    assert found.scheme("latent heads").token_bytes == 4 * (32 + shared)
    assert found.scheme("latent merge").token_bytes == 4 * (32 + shared) / 4
    assert found.scheme("TPLA 4 slices").token_bytes == 4 * (8 + shared)
    assert found.scheme("TPLA 4 slices").feasible


@pytest.mark.slow
def test_ways_that_are_not_exact_are_taken_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = sharding(capsys, tmp_path, "V3", "--seq", "256")
    asked = sharding(capsys, tmp_path, "V3", "--seq", "256", "--approximate")
    inexact = {s.name for s in plain.schemes if not s.exact}
    assert inexact
    assert not any(s.feasible for s in plain.schemes if not s.exact)
    assert {s.name for s in asked.schemes if s.feasible} - {s.name for s in plain.schemes if s.feasible} == inexact


class Grouped(nn.Module):
    """Two latents, each of half the heads (GLA)."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.small = nn.Linear(128, 8 * 16, bias=False), nn.Linear(128, 64, bias=False)
        self.up_k, self.up_v = (nn.Parameter(torch.randn(2, 32, 4 * 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.ask(x).view(batch, tokens, 8, 16).transpose(1, 2)
        c = self.small(x).view(batch, tokens, 2, 32).transpose(1, 2)
        k, v = ((c @ w).view(batch, 2, tokens, 4, 16).transpose(2, 3).reshape(batch, 8, tokens, 16) for w in (self.up_k, self.up_v))
        out: Tensor = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v
        return out


def test_latents_of_groups_of_heads_are_divided_with_them() -> None:
    with torch.no_grad():
        found = reattend.plan(Grouped(), (torch.randn(2, 64, 128),), target="h200", policy=reattend.Policy(mesh="tp=2")).sharding
    assert found is not None
    assert (found.scheme("heads").token_bytes, found.scheme("latent heads").token_bytes) == (4 * 128, 4 * 32)
    assert found.scheme("latent heads").copies == 1.0
    assert not any("TPLA" in s.name for s in found.schemes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "bytes_by_way"), [
    ("deepseek-v3", "tp=16", {"heads": 5120, "latent heads": 1152, "latent merge": 72, "TPLA 2 slices": 640}),
    ("deepseek-v2-lite", "tp=8", {"heads": 1280, "latent heads": 1152, "latent merge": 144, "TPLA 2 slices": 640}),
])
def test_the_configs_of_the_examples(
    name: str, mesh: str, bytes_by_way: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "examples" / "configs" / f"{name}.json"
    words = ("--target", "h200", "--dtype", "bf16", "--mesh", mesh, "--phase", "decode", "--past", "32767", "--batch", "16")
    found = MeshPlan.from_dict(json.loads(run(capsys, "plan", str(config), *words, "--json"))["sharding"])
    assert {n: found.scheme(n).token_bytes for n in bytes_by_way} == bytes_by_way
    assert found.best is not None
    assert found.best.name == "latent merge"


def test_open_sizes_are_bound_in_what_keys_are_made_of() -> None:
    policy = reattend.Policy(mesh="tp=4")
    x = torch.randn(2, 256, 128)
    with torch.no_grad():
        opened, fixed = (reattend.plan(Squeezed(4), (x,), target="h200", policy=policy, dynamic=d) for d in (True, False))
    assert opened.sharding is not None
    assert fixed.sharding is not None
    a, b = (p.sharding.scheme("latent merge") for p in (opened, fixed) if p.sharding)
    assert (a.cache_bytes, a.flops, a.sent_bytes) == (b.cache_bytes, b.flops, b.sent_bytes)


def test_keys_that_positions_turn_say_why_there_is_no_latent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 99,
    }), encoding="utf-8")
    out = run(capsys, "plan", str(config), "--target", "h200", "--seq", "256", "--mesh", "tp=2")
    assert "no latent form of model.layers.0.self_attn: what keys and values are made of is no narrower" in out


class Decoding(nn.Module):
    """One token a sequence over latents that the caller cached: keys and values are made of all of them at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.out = nn.Linear(128, 8 * 16, bias=False), nn.Linear(8 * 24, 128, bias=False)
        self.up = nn.Linear(64, 8 * 40, bias=False)

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        q = self.ask(x).unflatten(-1, (8, -1)).transpose(1, 2)
        k, v = torch.split(self.up(cache).unflatten(-1, (8, -1)).transpose(1, 2), [16, 24], -1)
        y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def test_decoding_is_priced_over_latents_where_a_kernel_like_it_was_timed() -> None:
    with torch.no_grad():
        inputs = torch.randn(64, 1, 128, dtype=torch.bfloat16), torch.randn(64, 4096, 64, dtype=torch.bfloat16)
        plan = reattend.plan(Decoding().to(torch.bfloat16).eval(), inputs, target="h200", dynamic=True)
    site, step = plan.sites[0], plan.step
    form = site.candidate("latent")
    assert (form.feasible, form.exact, site.choice == "latent") == (False, True, False)
    assert form.cost is not None
    assert form.cost.band > 0
    assert site.memory is not None
    assert 0 < site.memory.latent_bytes < site.memory.cache_bytes
    assert step is not None
    assert (step.latents, step.cache_bytes) == (True, site.memory.latent_bytes)
    assert step.parts["attention"] == pytest.approx(form.cost.seconds)
    assert "attention over cached latents" in str(plan)
    assert Plan.from_json(plan.to_json()).step == step
    # elsewhere nobody has timed one, and what divides heads says itself how these share latents
    far = plan.at("mi300x")
    assert all(c.name != "latent" for c in far.sites[0].candidates)
    assert far.step is not None
    assert not far.step.latents
    held = plan.grid(("h200",), meshes=("", "dp=2", "tp=2"), batch=(64,)).columns["step_seconds"]
    assert held[0] == step.seconds
    assert held[1] < held[0] < held[2]  # type: ignore[operator]
