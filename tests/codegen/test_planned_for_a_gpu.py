"""Whole models planned for an H200, their emitted Triton kernels run by the interpreter: the way of a GPU without one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import reattend
from reattend.codegen import operator
from reattend.codegen.files import cache
from reattend.codegen.triton import kernel as triton_kernel
from reattend.cost_model.devices.device import Device, device
from reattend.patterns.cascade import Cascade
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from reattend.rewriter.choose import choose

pytestmark = pytest.mark.interpreter

TOKENS, PADDED, NEW = 21, 5, 3
OURS = reattend.Policy(allow=("reattend",), deny=("original",))
SMALL: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Tensors of the host count as an H200's, and their attentions run in Triton kernels."""

    def on_gpu(
        c: Cascade, mapping: TileMapping, target: Device | str | None = None
    ) -> triton_kernel.TritonKernel | Refusal:
        return triton_kernel.build(c, mapping, None if target == "cpu" else target)

    monkeypatch.setattr(choose, "running_device", lambda kind: device("h200"))
    monkeypatch.setattr(operator, "build", on_gpu)
    # what was built for the host before, and what is built here
    monkeypatch.setattr(operator, "_runners", {})
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM._from_config(LlamaConfig(**SMALL), attn_implementation="sdpa").eval()


def mistral() -> Any:
    """A window shorter than the prompt, and attention as it is written out."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM._from_config(MistralConfig(**SMALL, sliding_window=8), attn_implementation="eager").eval()


def batch() -> dict[str, torch.Tensor]:
    """Two prompts, the second padded on the left."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :PADDED] = 0
    return {"input_ids": torch.randint(1, 101, (2, TOKENS)), "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, mistral], ids=lambda f: f.__name__)
@torch.no_grad()
def test_logits_and_generation_equal_the_original(build: Any) -> None:
    model = build()
    original, given = copy.deepcopy(model), batch()
    reattend.optimize(model, policy=OURS)
    got, want = (m(**given).logits[given["attention_mask"].bool()] for m in (model, original))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    tokens, expected = (m.generate(**given, max_new_tokens=NEW, do_sample=False) for m in (model, original))
    assert torch.equal(tokens, expected)
    report = reattend.report(model)
    assert set(report.kernels) == {"reattend"}, str(report)
    assert not report.misses, str(report)


@torch.no_grad()
def test_the_kernels_are_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attention by itself: what was launched is the emitted file's kernel, once."""
    launched: list[triton_kernel.TritonKernel] = []
    run = triton_kernel.TritonKernel.run

    def counted(self: triton_kernel.TritonKernel, *given: Any, **more: Any) -> torch.Tensor:
        launched.append(self)
        return run(self, *given, **more)

    monkeypatch.setattr(triton_kernel.TritonKernel, "run", counted)

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    model, x = Attention(), [torch.randn(1, 2, 40, 16) for _ in range(3)]
    got = reattend.optimize(copy.deepcopy(model), policy=OURS)(*x)
    assert len(launched) == 1
    assert "@triton.jit" in launched[0].source
    torch.testing.assert_close(got, model(*x), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 8])
def test_a_training_step_equals_the_original(window: int, dtype: torch.dtype) -> None:
    """Heads in groups, a triangle or a window: the output and every gradient, by kernels for an H200."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q = self.q(x).view(b, n, 4, 16).transpose(1, 2)
            k, v = (t.view(b, n, 2, 16).transpose(1, 2).repeat_interleave(2, 1) for t in self.kv(x).chunk(2, -1))
            i = torch.arange(n)
            far = i[None] > i[:, None]
            if window:
                far = far | (i[:, None] - i[None] >= window)
            s = (q @ k.mT * 0.25).masked_fill(far, float("-inf"))
            out: torch.Tensor = s.softmax(-1) @ v
            return out.transpose(1, 2).reshape(b, n, 64)

    torch.manual_seed(0)
    model = Layer().to(dtype)
    optimised = reattend.optimize(copy.deepcopy(model), policy=OURS)
    x = torch.randn(2, 37, 32, dtype=dtype)
    flow = torch.randn(2, 37, 64, dtype=dtype)
    found = []
    for m in (model.double(), optimised):
        given = x.to(next(m.parameters()).dtype).requires_grad_()
        out = m(given)
        found.append([out, *torch.autograd.grad(out, [given, *m.parameters()], flow.to(out.dtype))])
    report = reattend.report(optimised)
    assert set(report.kernels) == {"reattend"}, str(report)
    bound = 3e-6 if dtype == torch.float32 else 3e-2
    for want, got in zip(*found, strict=True):
        assert float((got.double() - want).abs().max()) <= bound * float(want.abs().max()), str(report)


@pytest.mark.slow
def test_operands_of_one_packed_tensor_have_one_gradient() -> None:
    """Queries, keys and values that one layer makes: each operand's gradient goes to its own place of it."""

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(32, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.manual_seed(0)
    model, x = Packed(), torch.randn(2, 37, 32)
    optimised = reattend.optimize(copy.deepcopy(model), policy=OURS)
    found = []
    for m in (model, optimised):
        out = m(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(m.parameters()))])
    assert set(reattend.report(optimised).kernels) == {"reattend"}, str(reattend.report(optimised))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
