"""Our scan beside the model's own steps: CPU time of one thread, interleaved, medians; one JSON line a case.

With --training a step is the forward and the gradients of all inputs, and `off` is the farthest gradient.

    python benchmarks/scans.py --tokens 512 [--case "gated delta"] [--training]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import reattend

ROUNDS = 5


def selective(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's steps: a state [channel, entry], contracted after each."""
    s, out = torch.zeros_like(a[:, :, 0]), []
    for t in range(a.shape[2]):
        s = a[:, :, t] * s + b[:, :, t]
        out.append((s @ c[:, t, :, None])[..., 0])
    return torch.stack(out, -1)


def mamba_steps(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """transformers' steps of Mamba: decays and what is added of all tokens are made ahead of them."""
    given: Tensor = _own(mamba.mamba_selective_scan)(x, dt, a, b, c, delta_softplus=True)
    return given * 1


def gated(a: Tensor, x: Tensor) -> Tensor:
    """RG-LRU's steps: a number a channel."""
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def lightning(q: Tensor, k: Tensor, v: Tensor, ratio: Tensor) -> Tensor:
    """MiniMax's steps with a cache: a matrix a head under one decay."""
    s, out = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        s = ratio * s + k[:, :, t : t + 1].transpose(-1, -2) @ v[:, :, t : t + 1]
        out.append(q[:, :, t : t + 1] @ s)
    return torch.cat(out, 2)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """transformers' chunks of the gated delta rule."""
    return _own(qwen3_next.torch_chunk_gated_delta_rule)(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0] * 1


def gated_delta_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """transformers' token loop of the same."""
    return _own(qwen3_next.torch_recurrent_gated_delta_rule)(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0] * 1


def kimi_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """transformers' chunks of Kimi's delta attention: a decay a channel."""
    return _own(kimi_linear.chunk_kimi_delta_attention)(q, k, v, g, beta, 64, None, False, True)[0] * 1


def state_space(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """transformers' chunks of a state space (Mamba-2): all states between chunks from all before them, without a loop."""
    given: tuple[Tensor, ...] = _own(mamba2.mamba2_chunk_scan)(
        x, dt, a, b, c, 256, D=d, dt_softplus=True, return_final_states=True
    )
    return given[0] * 1


def _own(fn: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A model's own code, whatever kernel a library would put in its place."""
    return getattr(fn, "__wrapped__", fn)


class Model(torch.nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


def scan_of(fn: Callable[..., Tensor], args: tuple[Tensor, ...], training: bool) -> Callable[..., Tensor]:
    """The whole function with our scan in it, as a model that is optimised runs it."""
    torch._dynamo.reset()
    policy = reattend.Policy(tune=False, check="never", deny=("original",))
    model = reattend.optimize(Model(fn).eval(), policy=policy)
    if training:
        args = tuple(x.detach().requires_grad_() for x in args)
    model(*args)
    chosen = [s.choice for p in reattend.report(model).pieces if p.plan for s in p.plan.sites]
    assert chosen == ["reattend"], chosen
    return model


def trained(run: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """The result and the gradients of all arguments, from the same flow each time."""
    leaves = [x.detach().requires_grad_() for x in args]
    flow: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        out = run(*leaves)
        if not flow:
            flow.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        return torch.autograd.grad(out, leaves, flow)

    return step


def farthest(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest difference of any of some tensors, by the largest number of its own."""
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want))


def median_seconds(ways: list[Callable[[], object]]) -> list[float]:
    """CPU seconds of each way, called in turn."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, seconds in zip(ways, taken):
            start = time.thread_time()
            way()
            seconds.append(time.thread_time() - start)
    return [statistics.median(x) for x in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--training", action="store_true", help="forward and gradients")
    parsed = parser.parse_args()
    tokens = parsed.tokens
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    heads = (draw(1, tokens, 8, 128), draw(1, tokens, 8, 128), draw(1, tokens, 8, 128))
    beta = draw(1, tokens, 8).sigmoid()
    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "selective 512x16": (selective, (draw(1, 512, tokens, 16).sigmoid(), draw(1, 512, tokens, 16), draw(1, tokens, 16))),
        "mamba, steps 512x16": (
            mamba_steps,
            (draw(1, 512, tokens), draw(1, 512, tokens), -draw(512, 16).exp(), draw(1, 16, tokens), draw(1, 16, tokens)),
        ),
        "gated 512": (gated, (draw(1, tokens, 512).sigmoid(), draw(1, tokens, 512))),
        "gated delta, chunks 8x128x128": (gated_delta, (*heads, -draw(1, tokens, 8).exp(), beta)),
        "gated delta, steps 8x128x128": (gated_delta_steps, (*heads, -draw(1, tokens, 8).exp(), beta)),
        "kimi delta, chunks 8x128x128": (kimi_delta, (*heads, -draw(1, tokens, 8, 128).exp(), beta)),
        "state space, chunks 32x64x128": (
            state_space,
            (
                draw(1, tokens, 32, 64), draw(1, tokens, 32), -draw(32).exp(), draw(1, tokens, 1, 128),
                draw(1, tokens, 1, 128), draw(32),
            ),
        ),
        "lightning, steps 16x96x96": (
            lightning,
            (*(draw(1, 16, tokens, 96) for _ in range(3)), draw(16, 1, 1).sigmoid()),
        ),
    }
    cases = {n: c for n, c in cases.items() if parsed.case in n}
    torch.set_grad_enabled(parsed.training)
    for name, (fn, args) in cases.items():
        ways = [fn, scan_of(fn, args, parsed.training)]
        calls: list[Callable[[], tuple[Tensor, ...]]] = [
            trained(w, args) if parsed.training else lambda w=w, args=args: (w(*args),) for w in ways  # type: ignore[misc]
        ]
        want, own = (call() for call in calls)
        off = farthest(own, want)
        as_written, scanned = median_seconds([*calls])
        print(json.dumps({
            "case": name, "tokens": tokens, "training": parsed.training,
            "as_written_ms": round(as_written * 1e3, 2), "scan_ms": round(scanned * 1e3, 2),
            "ratio": round(as_written / scanned, 2), "off": off, "torch": torch.__version__, "machine": platform.processor()
            or platform.machine(), "reattend": reattend.__version__,
        }))


if __name__ == "__main__":
    main()
