"""On a real device: what the interpreter shows of the kernels' text, shown of what the compiler makes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import reattend
from reattend.codegen.triton.kernel import TritonKernel, build, default_mapping
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import DTYPE
from reattend.patterns.verdict import Refusal
from reattend.rewriter.choose.choose import running_device

from .. import strategies
from ..codegen import attentions
from ..codegen.nearness import close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")]
OURS = reattend.Policy(allow=("reattend",), deny=("original",))


def made(c: Cascade) -> TritonKernel:
    target = running_device("cuda")
    mapping = default_mapping(c, target)
    assert not isinstance(mapping, Refusal), mapping
    kernel = build(c, mapping, target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


def check(c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    got = made(c).run({n: t.cuda() for n, t in tensors.items()}, sizes)
    close(got.cpu(), c, tensors, sizes)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", attentions.VARIANTS)
def test_variants(name: str, dtype: str) -> None:
    case = attentions.VARIANTS[name](dtype=dtype)
    check(case.cascade, case.inputs(DTYPE[dtype]), case.sizes)


@pytest.mark.parametrize("size", [8, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("length", [1, 17, 128, 1000])
def test_head_sizes_and_lengths(size: int, length: int) -> None:
    p = strategies.attention(
        lambda s: s, strategies.ROWS["softmax"], p=length, m=max(length, 7), e=size, f=size, dtype="bf16"
    )
    check(p.cascade, p.inputs(), p.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_equals_itself(dtype: torch.dtype) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    model, x = Attention(), [torch.randn(2, 4, 300, 64, device="cuda", dtype=dtype) for _ in range(3)]
    with torch.no_grad():
        want = model(*(t.double() for t in x))
        own = float((model(*x).double() - want).abs().max())
        got = reattend.optimize(copy.deepcopy(model), policy=OURS)(*x)
    assert float((got.double() - want).abs().max()) <= 2 * own


def test_a_captured_call_reads_what_is_there_when_it_is_replayed() -> None:
    case = attentions.VARIANTS["causal_padding"](dtype="bf16")
    x = {n: t.cuda() for n, t in case.inputs(torch.bfloat16).items()}
    kernel = made(case.cascade)
    kernel.run(x, case.sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.run(x, case.sizes)
    x["Q"].normal_()
    graph.replay()
    assert torch.equal(out, kernel.run(x, case.sizes))
