"""Forward and backward of one attention on this CPU: eager code, SDPA given the mask, Inductor's code, ours.

    python benchmarks/training.py [--masks window,causal] [--length 4096] [--threads 1] [--dtypes f32,bf16] [--rounds 5]
                                  [--clock cpu] [--no-inductor]

8 heads of 64, batch 1, a window of 256. `--masks alibi,t5,swin,sinks` trains parameters as well (benchmarks/learned.py),
through `reattend.optimize`: with our kernel ("reattend") and with what it chooses ("chosen"). One process, candidates in
turn, medians; the first call, compilation included, is made before and not counted. `--clock cpu` counts processor time,
which others on the machine do not lengthen (with one thread: threads that wait are counted as well); `wall` counts time.
Writes benchmarks/results/training_cpu.json, or of those alone training_learned_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import cpu_kernels
import timing
import torch
from learned import LEARNED
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import reattend
from reattend.codegen import trained
from reattend.codegen.forms.program import loose, program_text
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

HEADS, HEAD = cpu_kernels.HEADS, cpu_kernels.HEAD
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def forwards(mask: str, dtype: str, n: int, inductor: bool) -> dict[str, Forward]:
    """What a user could call, ours last."""
    kind = cpu_kernels.DTYPES[dtype]
    keep = cpu_kernels.keep_of(mask, n)
    assert keep is not None
    added = torch.zeros(n, n, dtype=kind).masked_fill_(~keep, torch.finfo(kind).min)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * HEAD**-0.5 + added).softmax(-1) @ v

    out: dict[str, Forward] = {"eager": eager, "sdpa": lambda q, k, v: sdpa(q, k, v, attn_mask=keep)}
    if mask == "causal":
        out["sdpa is_causal"] = lambda q, k, v: sdpa(q, k, v, is_causal=True)
    if inductor:
        out["inductor"] = torch.compile(eager)
    sizes = {"B": 1, "H": HEADS, "E": HEAD, "F": HEAD}
    c = cpu_kernels.cascade(mask, dtype).with_sizes(sizes)
    for tile in (32, 64):
        mapping = TileMapping(tile, tile, body="fused")
        made = trained.build(c, mapping)
        assert not isinstance(made, Refusal), made
        text, known = program_text(c, mapping), [{"P": n}[s] for s in loose(c)]
        out[f"reattend {tile}"] = lambda q, k, v, text=text, known=known: trained.call([q, k, v], known, text)  # type: ignore[misc]
    return out


def learned_steps(name: str, dtype: str, n: int, inductor: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """An attention with parameters of its own, which get their gradients as well."""
    torch.manual_seed(0)
    kind, at = cpu_kernels.DTYPES[dtype], LEARNED[name]
    model = at.make(at.heads).to(kind)
    q, k, v, flow = (torch.randn(at.batch, at.heads, at.tokens or n, at.head, dtype=kind) for _ in range(4))

    def step(forward: Forward, parameters: list[torch.nn.Parameter]) -> tuple[Tensor, ...]:
        leaves = [*(x.detach().requires_grad_() for x in (q, k, v)), *parameters]
        out = forward(*leaves[:3])
        return (out.detach(), *torch.autograd.grad(out, leaves, flow))

    own = list(model.parameters())
    ours = reattend.Policy(allow=("reattend",), tune=False, strict=True)
    policies = {"reattend": ours, "chosen": reattend.Policy()}
    made = {x: reattend.optimize(copy.deepcopy(model), policy=policy) for x, policy in policies.items()}
    out = {"eager": lambda: step(model, own), "sdpa": lambda: step(model.given_to_sdpa, own)}
    if inductor:
        compiled = torch.compile(model)
        out["inductor"] = lambda: step(compiled, own)
    for x, m in made.items():
        out[x] = lambda m=m: step(m, list(m.parameters()))  # type: ignore[misc]
    return out


def steps(mask: str, dtype: str, n: int, inductor: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The same with their gradients."""
    if mask in LEARNED:
        return learned_steps(mask, dtype, n, inductor)
    torch.manual_seed(0)
    q, k, v, flow = (torch.randn(1, HEADS, n, HEAD, dtype=cpu_kernels.DTYPES[dtype]) for _ in range(4))

    def step(forward: Forward) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = forward(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, flow))

    return {name: lambda f=f: step(f) for name, f in forwards(mask, dtype, n, inductor).items()}  # type: ignore[misc]


def check(calls: dict[str, Callable[[], tuple[Tensor, ...]]], dtype: str) -> None:
    """All give the same; the eager code in bfloat16 rounds most."""
    want = [x.float() for x in calls["sdpa"]()]
    # what is decided on the first calls is decided before anything is timed
    for _ in range(8 if "chosen" in calls else 0):
        calls["chosen"]()
    limit = {"f32": 1e-3, "bf16": 5e-2}[dtype]
    for name, call in calls.items():
        for a, b in zip(call(), want):
            off = float((a.float() - b).norm() / b.norm())
            assert off < limit, f"{name}: off by {off:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", default="window,causal")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--no-inductor", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    clock, rows = CLOCKS[given.clock], []
    for mask in given.masks.split(","):
        for dtype in given.dtypes.split(","):
            calls = steps(mask, dtype, given.length, not given.no_inductor)
            check(calls, dtype)
            spent: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(given.rounds):
                for name, call in calls.items():
                    start = clock()
                    call()
                    spent[name].append(clock() - start)
            ms = {name: statistics.median(x) * 1e3 for name, x in spent.items()}
            rows.append({"mask": mask, "dtype": dtype, "length": given.length, "milliseconds": ms})
            show(mask, dtype, ms)
    more = {"clock": given.clock, "rounds": given.rounds}
    name = "training_learned_cpu" if set(given.masks.split(",")) <= set(LEARNED) else "training_cpu"
    print(f"written to {timing.write(name, rows, **more)}")


def show(mask: str, dtype: str, ms: dict[str, float]) -> None:
    ours = min(v for name, v in ms.items() if name.startswith("reattend"))
    print(f"{mask:7} {dtype:4} " + "  ".join(f"{name} {v:.1f} ({v / ours:.2f}×)" for name, v in ms.items()), flush=True)


if __name__ == "__main__":
    main()
