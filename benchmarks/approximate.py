"""Methods that choose tiles, on the CPU: their selection and their kernel beside the fastest exact one, and what they lose.

    python benchmarks/approximate.py [--lengths 4096 16384] [--density 0.1] [--rounds 3] [--methods xattention moba]

Four query heads that share one head of keys, 64 wide, fp32, causal. A head each: near keys, near keys with some that all
rows want, segments of a subject, an offset. Each budget is set so that about the wanted share of the tiles is visited.
Times are seconds of the process's processor time on one thread, selection included, interleaved, the least of the rounds.
`kept` is the share of the softmax that is kept: mean, first percentile and least of sampled rows, in float64; `error` is
that of the output, relative, over the same rows. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import processor, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reattend.codegen.cpu import kernel
from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.selected.flexprefill import FlexPrefill
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selected.xattention import XAttention
from reattend.patterns.methods.selecting.program import SelectedMethod, TableProgram
from reattend.patterns.verdict import Refusal

HEADS, WIDTH, SAMPLED = 4, 64, 256
# Rows and keys of a kernel's tile, those that are tried for the exact one, too.
TILE = TileMapping(64, 64, body="fused")
EXACT = (TILE, TileMapping(32, 64, body="fused"))
# Budgets from small to large: the first that visits enough tiles is taken.
SHARES = (0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Row:
    """One method at one length. `select`, `kernel`, `seconds`: processor time; `promised`: what the tiles alone promise."""

    length: int
    method: str
    density: float
    select: float
    kernel: float
    seconds: float
    speedup: float
    promised: float
    kept_mean: float
    kept_p1: float
    kept_least: float
    error: float


def inputs(n: int) -> dict[str, Tensor]:
    """Q [1, 4, n, 64], K and V [1, 1, n, 64]: parts in subspaces of their own, a sink that all heads like."""
    rng = torch.Generator().manual_seed(0)
    turns = 1e4 ** -(torch.arange(16) / 16)
    place = torch.arange(n, dtype=torch.float32)[:, None]
    turned = [torch.cat([((place + d) * turns).cos(), ((place + d) * turns).sin()], 1) for d in (0, -1000)]
    subjects = torch.nn.functional.normalize(torch.randn(-(-n // 768), 16, generator=rng), dim=-1)
    subject = subjects[torch.randint(len(subjects), (-(-n // 384),), generator=rng)].repeat_interleave(384, 0)[:n]
    wanted = torch.zeros(n, 16)
    wanted[torch.randint(n, (max(2, n // 1024),), generator=rng), 0] = 1.0
    wanted[0, 1] = 1.0
    k = torch.cat([turned[0] / 4, subject, wanted], 1)
    weights = ((8.0, 0.0, 0.0), (7.0, 0.0, 9.0), (0.0, 12.0, 0.0), (8.0, 0.0, 0.0))
    heads = []
    for h, (near, same, all_rows) in enumerate(weights):
        liked = torch.zeros(n, 16)
        liked[:, 0], liked[:, 1] = all_rows, 8.0
        heads.append(torch.cat([turned[h == 3] / 4 * near * 4, subject * same, liked], 1))
    noise = [torch.randn(1, x, n, WIDTH, generator=rng) for x in (HEADS, 1, 1)]
    q = torch.stack(heads)[None] * 8 + noise[0] * 0.1
    return {"Q": q, "K": k[None, None] + noise[1] * 0.02, "V": noise[2]}


def whole(n: int) -> Attention:
    p, m = ex.index("p"), ex.index("m")
    c = papers.attention(
        "causal", papers.softmax, lambda b, qk: ex.where(m <= p, qk * WIDTH**-0.5, float("-inf")), group=HEADS,
        b=1, h=HEADS, p=n, m=n, e=WIDTH, f=WIDTH,
    )
    a = attention(c)
    assert isinstance(a, Attention), a
    return a


def built(c: Any, mapping: TileMapping) -> kernel.CpuKernel:
    made = kernel.build(c, mapping)
    if isinstance(made, Refusal):
        raise SystemExit(str(made))
    return made


def density(table: Tensor, n: int) -> float:
    """Kept tiles of those under the triangle, in tiles of the kernel."""
    rows, keys = (-(-n // s) for s in (TILE.tile_p, TILE.tile_m))
    some = table.repeat_interleave(max(1, rows // table.shape[2]), 2) if table.shape[2] < rows else table
    if some.shape[2] > rows:
        some = some.reshape(*some.shape[:2], rows, -1, some.shape[3]).any(3)
    some = some.repeat_interleave(keys // some.shape[3], 3)
    triangle = torch.ones(rows, keys, dtype=torch.bool).tril()
    return float((some & triangle).sum() / (triangle.sum() * table.shape[1]))


def fitted(name: str, a: Attention, given: dict[str, Tensor], n: int, wanted: float) -> tuple[SelectedMethod, Tensor]:
    """The method with the budget whose table comes nearest to the wanted share of tiles, and that table."""
    ladder: dict[str, list[SelectedMethod]] = {
        "flexprefill": [FlexPrefill(mass=s, least=0) for s in SHARES],
        "xattention": [XAttention(mass=s, stride=16) for s in SHARES],
        "xattention, stride 8": [XAttention(mass=s, stride=8) for s in SHARES],
        "moba": [MoBA(count=c, block=512, rows=64) for c in (1, 2, 3, 4)],
    }
    best: tuple[float, SelectedMethod, Tensor] | None = None
    for method in ladder[name]:
        table = program(method, a)[1].run(torch, given, {})
        found = density(table, n)
        if best is None or abs(found - wanted) < abs(best[0] - wanted):
            best = (found, method, table)
        if found >= wanted:
            break
    assert best is not None
    return best[1], best[2]


def program(method: SelectedMethod, a: Attention) -> tuple[Replacement, TableProgram]:
    made = method.replace(a)
    if isinstance(made, Refusal):
        raise SystemExit(str(made))
    assert isinstance(made.program, TableProgram)
    return made, made.program


def loss(given: dict[str, Tensor], out: Tensor, table: Tensor, n: int) -> tuple[float, float, float, float]:
    """Kept mass of sampled rows: mean, first percentile, least; and the output's relative error over them."""
    rows = torch.linspace(0, n - 1, SAMPLED).long()
    q, k, v = (given[x].double() for x in "QKV")
    seen = torch.arange(n) <= rows[:, None]
    weight = (q[:, :, rows] @ k.mT * WIDTH**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    at = rows // -(-n // table.shape[2])
    kept = (weight * table[:, :, at].repeat_interleave(-(-n // table.shape[3]), 3)[..., :n]).sum(-1).flatten()
    exact = weight @ v
    error = (out[:, :, rows].double() - exact).norm() / exact.norm()
    return float(kept.mean()), float(kept.quantile(0.01)), float(kept.min()), float(error)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least processor time of each, in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def measured(n: int, names: list[str], wanted: float, rounds: int) -> tuple[str, float, list[Row]]:
    a, given = whole(n), inputs(n)
    exact_kernels = {f"exact {m.tile_p}×{m.tile_m}": built(a.cascade, m) for m in EXACT}
    calls: dict[str, Callable[[], object]] = {name: partial(x.run, given, {}) for name, x in exact_kernels.items()}
    q, k, v = (given[x] for x in "QKV")
    calls["exact sdpa"] = lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    chosen = {}
    for name in names:
        method, table = fitted(name, a, given, n, wanted)
        made, making = program(method, a)
        own = built(made.cascade, TILE)
        chosen[name] = method, table, own.run({**given, made.table: table}, {})
        calls[f"select {name}"] = partial(making.run, torch, given, {})
        calls[f"kernel {name}"] = partial(own.run, {**given, made.table: table}, {})
    times = timed(calls, rounds)
    exact = min((x for x in times if x.startswith("exact")), key=lambda x: times[x])
    rows = []
    for name, (method, table, out) in chosen.items():
        select, kernel_s, share = times[f"select {name}"], times[f"kernel {name}"], density(table, n)
        seconds = select + kernel_s
        rows.append(Row(
            n, str(method), share, select, kernel_s, seconds, times[exact] / seconds, 1 / share, *loss(given, out, table, n)
        ))
    return exact, times[exact], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["xattention", "moba", "flexprefill"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"{HEADS} heads on 1, {WIDTH} wide, fp32, one thread; {processor()}, torch {torch.__version__}")
    columns = "tokens", "method", "density", "select", "kernel", "speed-up", "by tiles", "kept mean", "p1", "least", "error"
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    found: list[Row] = []
    exacts: dict[int, tuple[str, float]] = {}
    for n in args.lengths:
        name, seconds, rows = measured(n, args.methods, args.density, args.rounds)
        exacts[n] = (name, seconds)
        table.add_row(str(n), name, "1.000", "", f"{seconds:.3f} s", "1.00", "", "1", "1", "1", "0")
        for r in rows:
            table.add_row(
                "", r.method, f"{r.density:.3f}", f"{r.select:.3f} s", f"{r.kernel:.3f} s", f"{r.speedup:.2f}",
                f"{r.promised:.2f}", f"{r.kept_mean:.4f}", f"{r.kept_p1:.4f}", f"{r.kept_least:.4f}", f"{r.error:.4f}",
            )
        found += rows
    Console(width=160).print(table)
    exact = {str(n): {"candidate": c, "seconds": s} for n, (c, s) in exacts.items()}
    print(write("approximate", [asdict(r) for r in found], exact=exact, density=args.density, rounds=args.rounds))


if __name__ == "__main__":
    main()
