"""Our scan beside the model's own steps: CPU time of one thread, interleaved, medians; one JSON line a case.

    python benchmarks/scans.py --tokens 512
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
from torch.fx.experimental.proxy_tensor import make_fx

import reattend
from reattend.codegen.cpu.scan import ScanKernel, build
from reattend.rewriter.fold.loop import loops
from reattend.rewriter.fold.recurrences import FoundScan, lifted

ROUNDS = 7


def selective(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's steps: a state [channel, entry], contracted after each."""
    s, out = torch.zeros_like(a[:, :, 0]), []
    for t in range(a.shape[2]):
        s = a[:, :, t] * s + b[:, :, t]
        out.append((s @ c[:, t, :, None])[..., 0])
    return torch.stack(out, -1)


def gated(a: Tensor, x: Tensor) -> Tensor:
    """RG-LRU's steps: a number a channel."""
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def scan_of(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """What our scan computes of a function's loop."""
    gm = make_fx(fn, pre_dispatch=True, tracing_mode="fake")(*args)
    (loop,), _ = loops(gm.graph)
    found = lifted(loop)
    assert isinstance(found, FoundScan), found
    kernel = build(found.recurrence)
    assert isinstance(kernel, ScanKernel), kernel
    places = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), args))
    given = [places.get(n, torch.zeros(n.meta["val"].shape)) for n in map(found.tensors.__getitem__, kernel.inputs)]
    return lambda: kernel.entry(*given)[0]


def median_seconds(ways: list[Callable[[], Tensor]]) -> list[float]:
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
    tokens = parser.parse_args().tokens
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "selective 512x16": (selective, (draw(1, 512, tokens, 16).sigmoid(), draw(1, 512, tokens, 16), draw(1, tokens, 16))),
        "gated 512": (gated, (draw(1, tokens, 512).sigmoid(), draw(1, tokens, 512))),
    }
    for name, (fn, args) in cases.items():
        ours = scan_of(fn, args)
        own, want = ours(), fn(*args)
        off = ((own - want).abs().max() / want.abs().max()).item()
        as_written, scanned = median_seconds([lambda fn=fn, args=args: fn(*args), ours])  # type: ignore[misc]
        print(json.dumps({
            "case": name, "tokens": tokens, "as_written_ms": round(as_written * 1e3, 2), "scan_ms": round(scanned * 1e3, 2),
            "ratio": round(as_written / scanned, 2), "off": off, "torch": torch.__version__, "machine": platform.processor()
            or platform.machine(), "reattend": reattend.__version__,
        }))


if __name__ == "__main__":
    with torch.no_grad():
        main()
