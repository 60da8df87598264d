"""Loss curves of a small GPT with learned slopes over 200 steps of AdamW: in float64, as written, and with our kernels.

    python benchmarks/losses.py [--steps 200] [--dtypes f32,bf16]

One seed, the same batches, every block in a checkpoint. bf16: under autocast. Printed for each: the last loss, how far the
curve as written and ours lie from float64 (root mean square over the steps, and at most), milliseconds of processor time a
step. Writes benchmarks/results/losses_cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import timing
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import reattend

HEADS, WIDTH, LAYERS, TOKENS, WORDS, BATCH = 4, 64, 2, 96, 64, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.slopes = nn.Parameter(torch.tensor([2.0 ** -(i + 2) for i in range(HEADS)]))

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        i = torch.arange(n)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.slopes[:, None, None] * (i - i[:, None])
        weights = scores.masked_fill(i > i[:, None], float("-inf")).softmax(-1).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before(x))
        return x + self.wide(self.behind(x))


class SmallGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Curve:
    """Losses step by step, and processor time in milliseconds a step, the first ones not counted."""

    losses: Tensor
    milliseconds: float

    def off(self, exact: Curve) -> tuple[float, float]:
        """Root mean square and largest distance."""
        away = self.losses - exact.losses
        return float(away.square().mean().sqrt()), float(away.abs().max())


def batches(steps: int) -> Iterator[Tensor]:
    """Each word follows from the one before by one rule, or, once in four times, is drawn."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        words = torch.randint(0, WORDS, (BATCH, TOKENS), generator=g)
        follows = torch.rand(BATCH, TOKENS, generator=g) < 0.75
        for i in range(1, TOKENS):
            words[:, i] = torch.where(follows[:, i], (words[:, i - 1] * 7 + 3) % WORDS, words[:, i])
        yield words


def trained(model: nn.Module, steps: int, autocast: bool = False) -> Curve:
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses, spent = [], []
    for words in batches(steps):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            said = model(words[:, :-1])
        loss = cross_entropy(said.to(torch.promote_types(said.dtype, torch.float32)).flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        spent.append(time.process_time() - start)
    return Curve(torch.tensor(losses, dtype=torch.float64), 1e3 * float(torch.tensor(spent[min(10, steps - 1) :]).median()))


def curves(dtype: str, steps: int) -> tuple[Curve, Curve, Curve, reattend.Report]:
    """In float64, as written, with our kernels; and what ran of these."""
    torch.manual_seed(0)
    model = SmallGPT()
    exact = trained(copy.deepcopy(model).double(), steps)
    own = trained(copy.deepcopy(model), steps, dtype == "bf16")
    policy = reattend.Policy(allow=("reattend",), deny=("original",), tune=False)
    made = reattend.optimize(copy.deepcopy(model), policy=policy)
    return exact, own, trained(made, steps, dtype == "bf16"), reattend.report(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtypes", default="f32,bf16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in given.dtypes.split(","):
        exact, own, ours, report = curves(dtype, given.steps)
        ran = report.kernels["reattend"]
        row = {"dtype": dtype, "steps": given.steps, "last": float(exact.losses[-1]), "ran": ran}
        for name, curve in (("written", own), ("reattend", ours)):
            rms, most = curve.off(exact)
            row |= {f"{name} rms": rms, f"{name} most": most, f"{name} milliseconds": curve.milliseconds}
        rows.append(row)
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    print(f"written to {timing.write('losses_cpu', rows)}")


if __name__ == "__main__":
    main()
