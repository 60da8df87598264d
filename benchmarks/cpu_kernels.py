"""One attention's kernels on this CPU, from the cascade: eager code, SDPA given the mask, compiled FlexAttention, ours.

    python benchmarks/cpu_kernels.py [--masks window,causal,none] [--lengths 512,1024,2048,4096,8192] [--threads 1,2]
                                     [--dtypes f32,bf16] [--seconds 2] [--no-flex] [--tiles 32,64,128]

8 heads of 64, batch 1. One process, candidates interleaved, medians; a cell whose A/A ratio is off by more than 3% is
measured again. The first call, compilation included, is printed apart. Writes benchmarks/results/cpu_kernels.json.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import timing
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.vendor import use as vendor
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library.papers import Builder
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD, WINDOW = 8, 64, 256
Call = Callable[[], torch.Tensor]


def cascade(mask: str, dtype: str) -> Cascade:
    """Attention as a model writes it, queries as many as keys: product, scale, mask, softmax, product."""
    b, i = Builder(), ex.index
    b.sizes |= {"m": b.extent("p")}
    q, k, v = (b.input(n, ranks, dtype) for n, ranks in (("Q", "bhpe"), ("K", "bhme"), ("V", "bhmf")))
    s = ex.cast(b.put("QK", "bhpm", q * k, "add", "e"), "f32") * HEAD**-0.5
    keep = ex.TRUE if mask == "none" else i("m") <= i("p")
    if mask == "window":
        keep = keep & (i("p") - i("m") < WINDOW)
    if keep is not ex.TRUE:
        s = s + ex.where(keep, 0.0, torch.finfo(torch.float32).min)
    s = b.put("S", "bhpm", s)
    top = b.put("GM", "bhp", s, "max", "m")
    total = b.put("SD", "bhp", ex.exp(s - top), "add", "m")
    b.put("O", "bhpf", b.put("A", "bhpm", ex.cast(ex.exp(s - top) / total, dtype)) * v, "add", "m")
    return b.cascade(mask, "O")


def keep_of(mask: str, n: int) -> torch.Tensor | None:
    p, m = torch.arange(n)[:, None], torch.arange(n)
    return {"none": None, "causal": m <= p, "window": (m <= p) & (p - m < WINDOW)}[mask]


def candidates(mask: str, dtype: str, n: int, flex: bool, tiles: list[int]) -> dict[str, Call]:
    """What a user could call, ours last; all take the same q, k, v."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, HEAD, dtype=DTYPES[dtype]) for _ in range(3))
    keep, c = keep_of(mask, n), cascade(mask, dtype)
    added = None if keep is None else torch.zeros(n, n, dtype=q.dtype).masked_fill_(~keep, torch.finfo(q.dtype).min)
    x, sizes = {"Q": q, "K": k, "V": v}, {"B": 1, "H": HEADS, "P": n, "E": HEAD, "F": HEAD}
    out: dict[str, Call] = {}

    def eager() -> torch.Tensor:
        s = q @ k.transpose(-2, -1) * HEAD**-0.5
        return (s if added is None else s + added).softmax(-1) @ v

    out["eager"] = eager
    out["sdpa"] = lambda: sdpa(q, k, v, attn_mask=keep)
    if mask == "causal":
        out["sdpa is_causal"] = lambda: sdpa(q, k, v, is_causal=True)
    if flex:
        made = vendor.flex(c)
        assert not isinstance(made, Refusal), made
        out["flex"] = lambda: made.run(x, sizes)
    mappings = {f"reattend {t}": TileMapping(t, t, body="sdpa") for t in tiles}
    for name, mapping in (mappings or {"reattend": cpu.default_mapping(c, sizes)}).items():
        kernel = cpu.build(c, mapping)
        assert not isinstance(kernel, Refusal), kernel
        out[name] = lambda kernel=kernel: kernel.run(x, sizes)  # type: ignore[misc]
    return out


def check(calls: dict[str, Call]) -> None:
    """All give the same; the eager code in bfloat16 rounds most."""
    want = calls["sdpa"]().float()
    for name, call in calls.items():
        torch.testing.assert_close(call().float(), want, rtol=0, atol=3e-2, msg=lambda m, name=name: f"{name}: {m}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", default="window,causal,none")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--tiles", default="")
    parser.add_argument("--no-flex", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    tiles = [int(t) for t in given.tiles.split(",") if t]
    rows = []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in given.dtypes.split(","):
            for mask in given.masks.split(","):
                for n in map(int, given.lengths.split(",")):
                    calls = candidates(mask, dtype, n, not given.no_flex, tiles)
                    check(calls)
                    found = timing.interleaved(calls, seconds=given.seconds)
                    rows.append(timing.as_row(found, mask=mask, dtype=dtype, length=n, threads=threads))
                    show(mask, dtype, n, threads, found)
    print(f"written to {timing.write('cpu_kernels', rows)}")


def show(mask: str, dtype: str, n: int, threads: int, found: timing.Timing) -> None:
    ms = found.milliseconds
    ours = min(v for name, v in ms.items() if name.startswith("reattend"))
    cells = "  ".join(f"{name} {v:.2f} ({v / ours:.2f}×)" for name, v in ms.items())
    first = max(found.first_call_seconds.items(), key=lambda kv: kv[1])
    late = f"first call of {first[0]} {first[1]:.1f} s"
    print(f"{mask:7} {dtype:4} {n:5} {threads}T  A/A {found.aa:.3f}  {cells}  {late}", flush=True)


if __name__ == "__main__":
    main()
