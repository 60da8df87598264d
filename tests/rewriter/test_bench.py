"""Measured beside predicted: samples keep shapes and strides, every candidate that can run is timed, others say why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reattend.cost_model.sites.site import ORIGINAL
from reattend.rewriter.capture import export
from reattend.rewriter.capture.models import ModelInput
from reattend.rewriter.choose import choose
from reattend.rewriter.choose.policy import Policy
from reattend.rewriter.run import bench
from reattend.rewriter.shapes import Shapes, UsageError


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        keep = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        return (q @ k.transpose(-1, -2) * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Causal(), Causal()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(*[self.first(x, x, x)] * 3)
        return out


def nothing(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention compiles for seconds: what is tested here is who is called, not how fast."""
    real = bench.calls

    def without_flex(*given: Any) -> dict[str, Callable[[], object]]:
        return {name: call for name, call in real(*given).items() if name != "flex"}

    monkeypatch.setattr(bench, "calls", without_flex)


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(2, 3, 4, dtype=torch.bfloat16),
        torch.empty(2, 3, 4).transpose(0, 2),
        torch.empty(2, 1, 4).expand(2, 3, 4),
        torch.empty(2, 3, dtype=torch.bool),
        torch.empty(5, dtype=torch.long),
    ],
)
def test_samples_are_like_what_they_stand_for(like: Tensor) -> None:
    made = bench.sample(like)
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
    assert made.dtype != torch.bool or made.all()
    assert not made.is_floating_point() or (made != 0).any()


def test_every_call_computes_the_same() -> None:
    graph = export.from_export(Causal(), tuple(torch.empty(1, 2, 48, 16) for _ in range(3)), None).graph
    (d,), _ = choose.decide(graph, choose.Request(Policy()))
    made = {name: call() for name, call in bench.calls(graph, d).items() if name != "flex"}
    assert {ORIGINAL, "sdpa", "reattend"} <= set(made)
    for value in made.values():
        assert isinstance(value, Tensor)
        original = made[ORIGINAL]
        assert isinstance(original, Tensor)
        torch.testing.assert_close(value.reshape(original.shape), original)


@pytest.mark.usefixtures("quick")
def test_identical_sites_are_measured_once() -> None:
    steps: list[tuple[int, int]] = []
    result = bench.bench_input(
        ModelInput("twice", Twice(), (torch.randn(1, 2, 32, 16),)), None, 0.01, lambda what, done, total: steps.append((done, total))
    )
    (site,) = result.sites
    assert site.names == ("first", "second")
    assert steps == [(0, 1)]
    rows = {r.candidate: r for r in site.rows}
    for name in (ORIGINAL, "sdpa", "reattend"):
        assert rows[name].measured_seconds is not None
        assert rows[name].ratio == pytest.approx(rows[name].measured_seconds / rows[name].predicted_seconds)  # type: ignore[operator]
    assert site.rounds >= bench.ROUNDS
    assert site.noise > 0
    assert site.fastest in rows
    text = json.loads(result.to_json())
    assert text["sites"][0]["fastest"] == site.fastest
    assert "measured / predicted" in str(result)


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1 << 18)
    result = bench.bench_input(ModelInput("causal", Causal(), tuple(torch.randn(1, 2, 256, 16) for _ in range(3))), None, 0.01, nothing)
    rows = {r.candidate: r for r in result.sites[0].rows}
    assert rows[ORIGINAL].measured_seconds is None
    assert "are free" in rows[ORIGINAL].why


@pytest.mark.usefixtures("quick")
def test_what_would_take_too_long_is_left_out() -> None:
    result = bench.bench_input(ModelInput("causal", Causal(), tuple(torch.randn(1, 2, 256, 16) for _ in range(3))), None, 1e-9, nothing)
    assert all(r.measured_seconds is None and r.why for r in result.sites[0].rows)
    assert "give more --seconds" in str(result)
    assert "nothing measured" in str(result)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="no attention is named 'third'"):
        bench.bench_input(ModelInput("twice", Twice(), (torch.randn(1, 2, 32, 16),)), "third", 0.01, nothing)
    with pytest.raises(UsageError, match="no attention that was found"):
        bench.bench_input(ModelInput("linear", nn.Linear(4, 4), (torch.randn(2, 4),)), None, 0.01, nothing)


def test_a_config_is_measured_without_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "calls", lambda gm, d: {ORIGINAL: lambda: None})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    }))
    result = bench.bench_spec(str(path), Shapes(seq=16), "1", 0.01, nothing)
    assert result.sites[0].names == ("model.layers.1.self_attn",)
    assert {r.candidate for r in result.sites[0].rows if r.why} >= {"reattend"}
