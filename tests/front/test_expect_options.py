"""What is expected of run-time data, from the command line on real models: padding, packing, shares, and wrong names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reattend
from reattend.cost_model.plan.plan import Plan

from .commands import CONFIG, run


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def packed_llama() -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """Two segments of 512 tokens a sequence, told by their positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")}
    ids = torch.zeros(2, 1024, dtype=torch.long)
    positions = torch.arange(512).repeat(2, 2)
    model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    return model, (), {"input_ids": ids, "position_ids": positions, "use_cache": False}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> Plan:
    code, out, err = run(capsys, "plan", *arguments, "--target", "h200", "--json")
    assert code == 0, err
    return Plan.from_json(out)


def test_padding_of_a_llama(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Four sequences, 1024 of 8192 tokens of each are no padding: fewer tiles, less time, and the plan says so."""
    shape = (config, "--seq", "8k", "--batch", "4", "--dtype", "bf16")
    whole, short = planned(capsys, *shape), planned(capsys, *shape, "--expect", "attention_mask=length:1k")
    for made in (whole, short):
        assert made.sites[0].mask is not None
        assert made.sites[0].mask.tiles is not None
    counts = [p.sites[0].mask.tiles for p in (whole, short)]  # type: ignore[union-attr]
    # causal: half of all; then an eighth of the keys, less their upper triangle
    assert counts[0].visited / counts[0].total == pytest.approx(0.5, abs=0.02)  # type: ignore[union-attr]
    assert counts[1].visited / counts[1].total == pytest.approx(1 / 8 - 1 / 128, abs=0.02)  # type: ignore[union-attr]
    assert short.sites[0].chosen.seconds < 0.6 * whole.sites[0].chosen.seconds
    assert any("(from attention_mask)" in n for n in whole.sites[0].notes)
    assert any(n.startswith("expected: attention_mask (") and "first 1024 tokens" in n for n in short.sites[0].notes)


def test_a_mesh_computes_what_is_expected_to_be_kept(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Products of queries with keys shrink with the kept pairs; the output projection and all messages stay."""
    shape = (config, "--seq", "8k", "--batch", "4", "--dtype", "bf16", "--mesh", "tp=2")
    whole, short = planned(capsys, *shape).sharding, planned(capsys, *shape, "--expect", "attention_mask=length:1k").sharding
    assert whole is not None
    assert short is not None
    for way in ("heads", "ring", "merge"):
        a, b = whole.scheme(way), short.scheme(way)
        assert (b.cache_bytes, b.sent_bytes) == (a.cache_bytes, a.sent_bytes), way
        assert 0.15 < b.flops / a.flops < 0.5, way
    assert "first 1024 tokens" in short.note
    assert "attention_mask" not in whole.note


@pytest.mark.slow
def test_packed_segments_of_a_llama(capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{__name__}:packed_llama"
    code, out, err = run(capsys, "plan", spec, "--target", "h200", "--expect", "position_ids=segments:4")
    assert code == 0, err
    assert "packs 4 segments of equal length" in out
    masks = [planned(capsys, spec, "--expect", f"position_ids=segments:{n}").sites[0].mask for n in (1, 4)]
    assert all(m is not None for m in masks)
    # four triangles of a quarter: a quarter of one, and the diagonal's tiles
    assert masks[1].density < 0.4 * masks[0].density  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_sweep_and_explain_take_expectations(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (config, "--seq", "256", "--batch", "2", "--target", "h200", "--expect", "attention_mask=length:25%")
    code, out, err = run(capsys, "plan", *arguments, "--sweep", "seq=256:1k")
    assert code == 0, err
    assert "keeps the first 0.25 of all tokens of a sequence" in out
    code, out, err = run(capsys, "explain", *arguments)
    assert code == 0, err
    assert "expected: attention_mask" in out


def test_a_policy_takes_expectations() -> None:
    model, _, kwargs = packed_llama()
    with torch.no_grad():
        made = reattend.plan(model, (), kwargs, target="h200", policy=reattend.Policy(expect="position_ids=0.25"))
    assert any("position_ids" in n and "keeps 0.25 of the key blocks" in n for n in made.sites[0].notes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch", "2", "--expect", "padding=0.5"], "--expect padding: no mask reads 'padding': one of attention_mask"),
        (["--expect", "attention_mask=0.5"], "no mask reads 'attention_mask': no mask of this model reads run-time data"),
        (["--expect", "attention_mask=2"], "--expect 'attention_mask=2': a share lies between 0 and 1: write NAME=0.25"),
        (["--expect", "attention_mask"], "--expect 'attention_mask' is no expectation: write NAME=0.25"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plan", config, "--seq", "64", "--target", "h200", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
