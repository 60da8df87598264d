"""A few queries on long keys on this CPU (a step of generation): how fast keys and values are read, beside a copy.

    python benchmarks/decode.py [--keys 4096,16384,32768] [--queries 1,8] [--groups 1,4] [--threads 1,2]
                                [--dtypes f32,bf16] [--rounds 9] [--clock cpu]

8 heads of keys, 128 wide, batch 1, with 1 or 4 heads of queries each; the keys before the queries are all seen. Bandwidth is
the bytes of keys and values over the time; a copy's is what it reads and writes. One process, candidates in turn, medians.
`--clock cpu` counts processor time of the calling thread (with one thread: others on the machine do not lengthen it);
`wall` counts time. Writes benchmarks/results/decode_cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timing
import torch
from cpu_kernels import DTYPES
from torch.nn.functional import scaled_dot_product_attention as sdpa

from reattend.codegen.cpu import kernel as cpu
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library.papers import Builder
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

HEADS, HEAD = 8, 128
CLOCKS = {"cpu": time.thread_time, "wall": time.perf_counter}


def cascade(group: int, dtype: str) -> Cascade:
    """Queries at the end of the keys: product, scale, causal mask, softmax, product."""
    b, i = Builder({"b": 1, "h": HEADS * group, "e": HEAD, "f": HEAD}), ex.index
    at = (i("b"), i("h") // group, i("m"))
    shape = (1, HEADS, b.extent("m"), HEAD)
    q = b.input("Q", "bhpe", dtype)
    k, v = (b.given(n, shape, (*at, i(r)), dtype) for n, r in (("K", "e"), ("V", "f")))
    s = ex.cast(b.put("QK", "bhpm", q * k, "add", "e"), "f32") * HEAD**-0.5
    past = ex.symbol("M") - ex.symbol("P")
    s = b.put("S", "bhpm", ex.where(i("m") <= i("p") + past, s, -3e38))
    top = b.put("GM", "bhp", s, "max", "m")
    total = b.put("SD", "bhp", ex.exp(s - top), "add", "m")
    b.put("O", "bhpf", b.put("A", "bhpm", ex.cast(ex.exp(s - top) / total, dtype)) * v, "add", "m")
    return b.cascade("decode", "O")


def calls(queries: int, keys: int, group: int, dtype: str) -> dict[str, Callable[[], torch.Tensor]]:
    """A copy, what a user could call, ours last."""
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    q = torch.randn(1, HEADS * group, queries, HEAD, dtype=kind)
    k, v = (torch.randn(1, HEADS, keys, HEAD, dtype=kind) for _ in range(2))
    from_, to = torch.cat([k, v]), torch.empty(2, HEADS, keys, HEAD, dtype=kind)
    keep = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    c = cascade(group, dtype)
    made = cpu.build(c, TileMapping(16, 64, body="decode"))
    assert not isinstance(made, Refusal), made
    mask = None if queries == 1 else keep

    def packed() -> torch.Tensor:
        s = (q.view(1, HEADS, group * queries, HEAD) @ k.mT * HEAD**-0.5).view(1, HEADS * group, queries, keys)
        w = (s if mask is None else s.masked_fill(~keep, float("-inf"))).softmax(-1).view(1, HEADS, group * queries, keys)
        return (w @ v).view(1, HEADS * group, queries, HEAD)

    return {
        "copy": lambda: to.copy_(from_),
        "sdpa": lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=group > 1),
        "packed products": packed,
        "reattend": lambda: made.run({"Q": q, "K": k, "V": v}, {"P": queries, "M": keys}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, many in (
        ("keys", "4096,16384,32768"), ("queries", "1,8"), ("threads", "1,2"), ("dtypes", "f32,bf16"), ("groups", "1,4")
    ):
        parser.add_argument(f"--{name}", default=many)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    clock, rows = CLOCKS[given.clock], []
    for threads in map(int, given.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in given.dtypes.split(","):
            for group, queries, keys in (
                (g, p, m) for g in map(int, given.groups.split(",")) for p in map(int, given.queries.split(","))
                for m in map(int, given.keys.split(","))
            ):
                rows.append({"threads": threads, **cell(queries, keys, group, dtype, given.rounds, clock)})
                print(rows[-1], flush=True)
    print(f"written to {timing.write('decode_cpu', rows, clock=given.clock, rounds=given.rounds)}")


def cell(
    queries: int, keys: int, group: int, dtype: str, rounds: int, clock: Callable[[], float]
) -> dict[str, object]:
    """GB/s of every candidate, and ours as a share of the copy's."""
    made = calls(queries, keys, group, dtype)
    want = made["packed products"]()
    off = float((made["reattend"]() - want).float().norm() / want.float().norm())
    assert off < {"f32": 1e-5, "bf16": 2e-2}[dtype], off
    spent: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, call in made.items():
            start = clock()
            call()
            spent[name].append(clock() - start)
    size = 2 * HEADS * keys * HEAD * DTYPES[dtype].itemsize
    rates = {name: size * (1 + (name == "copy")) / statistics.median(x) / 1e9 for name, x in spent.items()}
    return {
        "dtype": dtype, "group": group, "queries": queries, "keys": keys,
        "gigabytes_per_s": {name: round(x, 2) for name, x in rates.items()},
        "share_of_copy": round(rates["reattend"] / rates["copy"], 3),
    }


if __name__ == "__main__":
    main()
