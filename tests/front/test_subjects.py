"""What can be planned: configs of many architectures without weights, factories, exported programs; and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reattend.cost_model.devices.device import device
from reattend.rewriter.capture.models import load
from reattend.rewriter.choose.policy import Policy
from reattend.rewriter.run.planning import plan_spec
from reattend.rewriter.shapes import Shapes, UsageError
from tests.tiers import one_in

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 99,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
          "patch_size": 4}
# config, number of attentions
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({"model_type": "llama", **SMALL, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}, 2),
    "bert": ({"model_type": "bert", **SMALL}, 2),
    "t5": ({"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99}, 6),
    "whisper": ({"model_type": "whisper", **SEQ2SEQ, "max_source_positions": 30, "pad_token_id": 0, "bos_token_id": 1,
                 "eos_token_id": 2, "decoder_start_token_id": 1}, 6),
    "vit": ({"model_type": "vit", **VISION}, 2),
    "clip": ({"model_type": "clip", "text_config": SMALL, "vision_config": VISION}, 4),
    "wav2vec2": ({"model_type": "wav2vec2", **SMALL}, 2),
}


def write(folder: Path, config: object) -> str:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", one_in(3, CONFIGS))
def test_a_config_is_planned_without_weights(name: str, tmp_path: Path) -> None:
    config, attentions = CONFIGS[name]
    plan = plan_spec(
        write(tmp_path, config), Shapes(batch=2, seq=None if name == "wav2vec2" else 24), device("h200"), Policy()
    )
    assert len(plan.sites) == attentions
    assert "inputs:" in plan.note


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["llama"][0])
    given = load(str(tmp_path), Shapes(batch=3, seq=7))
    ids = given.kwargs["input_ids"]
    assert isinstance(ids, Tensor)
    assert ids.shape == (3, 7)
    assert {p.device.type for p in given.model.parameters()} == {"meta"}  # type: ignore[union-attr]


def test_one_sequence_has_no_padding_mask(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIGS["llama"][0])
    assert "attention_mask" not in load(path, Shapes(seq=7)).kwargs
    assert "attention_mask" in load(path, Shapes(batch=2, seq=7)).kwargs


def test_a_decoding_step(tmp_path: Path) -> None:
    plan = plan_spec(
        write(tmp_path, CONFIGS["llama"][0]), Shapes(batch=2, phase="decode", past=100), device("h200"), Policy()
    )
    assert [s.name for s in plan.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all("decode" in s.traits for s in plan.sites)
    assert 101 in plan.sites[0].shape.sizes.values()


def test_dtype_and_attention_implementation(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIGS["llama"][0])
    for attn in ("eager", "sdpa"):
        given = load(path, Shapes(seq=8, dtype="bf16", attn=attn))
        assert given.model.config._attn_implementation == attn  # type: ignore[union-attr]
        assert next(given.model.parameters()).dtype == torch.bfloat16  # type: ignore[union-attr]


def plain() -> nn.Module:
    return nn.Linear(3, 3)


def with_arguments() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, object]]:
    return nn.Linear(3, 3), (torch.zeros(2, 3),), {}


def raising() -> nn.Module:
    raise RuntimeError("no such weights")


def returning_text() -> str:
    return "a model"


def silent() -> nn.Module:
    raise ValueError


def sized(size: int) -> nn.Module:
    return nn.Linear(size, size)


def elsewhere() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return nn.Linear(3, 3), (torch.zeros(2, 3, device="meta"),)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "test_subjects"


def test_factories(here: str) -> None:
    (x,) = load(f"{here}:with_arguments").args
    assert isinstance(x, Tensor)
    assert x.shape == (2, 3)


def test_an_exported_program_is_planned(tmp_path: Path) -> None:
    class M(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(M(), (torch.randn(2, 8, 16),), strict=False), path)
    assert len(plan_spec(str(path), Shapes(), device("cpu"), Policy()).sites) == 1


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "is no JSON file"),
        ({"hidden_size": 3}, "has no model_type"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}, "asks for remote code"),
        ({"model_type": "nothing_like_it"}, "knows no architecture 'nothing_like_it'"),
        ({**CONFIGS["llama"][0], "architectures": ["NoSuchModel"]}, "has no class NoSuchModel: upgrade it, or take"),
        (
            {"model_type": "llama", **SMALL, "num_attention_heads": 5, "hidden_size": 32},
            "config is not valid .*hidden size",
        ),
    ],
)
def test_bad_configs_give_one_sentence(config: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        load(write(tmp_path, config), Shapes(seq=8))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("nothing", "is no model: give package.module:factory"),
        ("no_such_package_anywhere:f", "cannot import no_such_package_anywhere"),
        ("missing/config.json", "does not exist"),
        ("missing.pt2", "does not exist"),
        ("test_subjects:missing", "has no callable named missing"),
        (".", "the folder . holds no config.json"),
        ("test_subjects:raising", r"raised RuntimeError: no such weights \(--debug shows where\)"),
        ("test_subjects:silent", r"raised ValueError \(--debug shows where\)"),
        ("test_subjects:sized", r"needs an argument \('size'\): name a function that takes none"),
        ("test_subjects:elsewhere", r"an input of shape \(2, 3\) is on meta, the model is on cpu: move one of them"),
        ("test_subjects:returning_text", "must return a torch module"),
        ("test_subjects:plain", r"'input' of Linear.forward is missing: .*; a factory may return \(module, args, kwargs\)"),
    ],
)
def test_bad_specs_give_one_sentence(spec: str, sentence: str, here: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load(spec)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"phase": "training"}, "use prefill or decode"),
        ({"attn": "flash"}, "use eager or sdpa"),
        ({"dtype": "int8"}, "use f32, bf16, f16 or f64"),
        ({"batch": 0}, "--batch 0 is too small: give at least 1"),
    ],
)
def test_bad_shape_options_give_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Shapes(**options)


def test_decoding_needs_a_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cache"):
        load(write(tmp_path, CONFIGS["bert"][0]), Shapes(phase="decode"))
