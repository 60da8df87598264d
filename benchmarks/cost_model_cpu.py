"""The cost model beside the clock, on this CPU: every candidate measured and predicted, and the regret of the choice.

    python benchmarks/cost_model_cpu.py [--calibrate] [--threads 1,2] [--lengths 512,1024,2048] [--flex] [--busy]

Prints a row a cell (mask, type, length, threads): measured / predicted milliseconds of each candidate, what the model
chose, and how much slower that is than the best. Then MAPE, Spearman's rank correlation, and mean and largest regret.
Compilation is not timed. FlexAttention takes seconds to compile for every cell, and is left out unless asked for.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import timing
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from reattend.codegen import cpu
from reattend.cost_model.calibrate import calibrate
from reattend.cost_model.cost import Cost
from reattend.cost_model.device import Device, device, with_threads
from reattend.cost_model.predict import VendorUse, predict_original, predict_vendor, ranked_mappings
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.papers import Builder
from reattend.patterns.recognise import Miss, Refusal

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LOWEST = {"f32": -3.3e38, "bf16": -3.3e38, "f16": -6.5e4}
WINDOW = 256


@dataclass(frozen=True)
class Cell:
    """One attention: what is measured. `mask` is window, causal or full."""

    mask: str
    dtype: str
    length: int
    threads: int
    heads: int = 8
    head: int = 64

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": 1, "H": self.heads, "P": self.length, "M": self.length, "E": self.head, "F": self.head}

    def keep(self) -> torch.Tensor | None:
        n = self.length
        if self.mask == "full":
            return None
        p, m = torch.arange(n)[:, None], torch.arange(n)[None]
        return (m <= p) & (p - m < WINDOW) if self.mask == "window" else m <= p


@dataclass
class Row:
    """A cell's result in milliseconds, by candidate."""

    cell: Cell
    measured: Mapping[str, float]
    predicted: Mapping[str, float]
    aa: float
    chosen: str = field(default="")

    @property
    def regret(self) -> float:
        return self.measured[self.chosen] / min(self.measured.values()) - 1


def cascade(cell: Cell) -> Cascade:
    """Eager attention as it is lifted: product, scale, mask, softmax, product, all in the inputs' type."""
    b, i = Builder(), ex.index
    q, k, v = (b.input(n, ranks, cell.dtype) for n, ranks in (("Q", "bhpe"), ("K", "bhme"), ("V", "bhmf")))
    s = b.put("QK", "bhpm", q * k, "add", "e") * 0.125
    keep = i("m") <= i("p")
    if cell.mask == "window":
        keep = keep & (i("p") - i("m") < WINDOW)
    if cell.mask != "full":
        s = ex.where(keep, s, LOWEST[cell.dtype])
    s = b.put("S", "bhpm", s)
    sn = b.put("SN", "bhpm", ex.exp(s - b.put("GM", "bhp", s, "max", "m")))
    b.put("O", "bhpf", b.put("A", "bhpm", sn / b.put("SD", "bhp", sn, "add", "m")) * v, "add", "m")
    return b.cascade(cell.mask, "O")


def candidates(cell: Cell, d: Device, flex: bool) -> Iterator[tuple[str, Callable[[], object], Cost]]:
    """(name, call, predicted cost) of everything that can compute the cell."""
    c, n = cascade(cell), cell.length
    q, k, v = (torch.randn(1, cell.heads, n, cell.head, dtype=DTYPES[cell.dtype]) for _ in range(3))
    keep = cell.keep()

    def original() -> object:
        s = (q @ k.mT) * 0.125
        if keep is not None:
            s = torch.where(keep, s, LOWEST[cell.dtype])
        return s.softmax(-1) @ v

    yield "original", original, predict_original(c, d, cell.sizes)
    if cell.mask == "causal":
        use = VendorUse("flash", skips=True)
        yield "sdpa", lambda: sdpa(q, k, v, is_causal=True), _known(predict_vendor(c, use, d, cell.sizes))
    else:
        use = VendorUse("flash", mask_elements=0 if keep is None else n * n)
        yield "sdpa", lambda: sdpa(q, k, v, attn_mask=keep), _known(predict_vendor(c, use, d, cell.sizes))
    if flex:
        call = _flex(cell, q, k, v)
        yield "flex", call, _known(predict_vendor(c, VendorUse("flex", skips=True), d, cell.sizes))
    yield from _ours(c, cell, d, {"Q": q, "K": k, "V": v})


def _ours(
    c: Cascade, cell: Cell, d: Device, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, Callable[[], object], Cost]]:
    """Our kernel under the mapping that the model likes best, and under a few others to see what it missed."""
    found = ranked_mappings(c, d, cell.sizes)
    if isinstance(found, Miss):
        return
    few = [found[0], *(f for f in found[1:] if f[0].tile_p != found[0][0].tile_p or f[0].body != found[0][0].body)][:6]
    for mapping, cost in few:
        kernel = cpu.build(c, mapping)
        if isinstance(kernel, Refusal):
            continue
        name = f"{mapping.body} {mapping.tile_p}x{mapping.tile_m}"
        yield name, lambda kernel=kernel: kernel.run(tensors, {}), cost  # type: ignore[misc]


def _flex(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    def keep(b: object, h: object, p: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (m <= p) & (p - m < WINDOW) if cell.mask == "window" else m <= p

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    n = cell.length
    blocks = create_block_mask(keep, None, None, n, n, device="cpu") if cell.mask != "full" else None
    return lambda: compiled(q, k, v, block_mask=blocks)


def _known(cost: Cost | Miss) -> Cost:
    assert isinstance(cost, Cost), cost
    return cost


def _on_busy_machine(calls: Mapping[str, Callable[[], object]], seconds: float) -> timing.Timing:
    """Medians of the time that the thread itself ran, candidates in turn; the first one twice a round."""
    names = [*calls, next(iter(calls))]
    times: list[list[float]] = [[] for _ in names]
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - begin < seconds:
        for row, name in zip(times, names):
            start = time.thread_time()
            calls[name]()
            row.append(time.thread_time() - start)
    medians = [statistics.median(t) * 1e3 for t in times]
    return timing.Timing(dict(zip(calls, medians)), medians[-1] / medians[0], len(times[0]))


def measure(cell: Cell, d: Device, flex: bool, seconds: float, busy: bool) -> Row:
    torch.set_num_threads(cell.threads)
    found = list(candidates(cell, with_threads(d, cell.threads), flex))
    calls = {name: call for name, call, _ in found}
    timed = timing.interleaved(calls, seconds=seconds) if not busy or cell.threads > 1 else _on_busy_machine(calls, seconds)
    predicted = {name: cost.seconds * 1e3 for name, _, cost in found}
    return Row(cell, timed.milliseconds, predicted, timed.aa, min(predicted, key=lambda n: predicted[n]))


# --- statistics ---------------------------------------------------------------------------------------------------


def ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = [0.0] * len(values)
    for place, i in enumerate(order):
        out[i] = float(place)
    return out


def spearman(a: list[float], b: list[float]) -> float:
    x, y = ranks(a), ranks(b)
    mean = (len(x) - 1) / 2
    top = sum((i - mean) * (j - mean) for i, j in zip(x, y))
    return top / math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))


def summary(rows: list[Row]) -> str:
    pairs = [(r.measured[n], r.predicted[n]) for r in rows for n in r.measured]
    errors = sorted(abs(p / m - 1) for m, p in pairs)
    regrets = [r.regret for r in rows]
    mean = math.exp(sum(math.log1p(x) for x in regrets) / len(regrets)) - 1
    noise = sum(abs(r.aa - 1) for r in rows) / len(rows)
    return (
        f"{len(pairs)} timings in {len(rows)} cells: MAPE {sum(errors) / len(errors):.1%}, "
        f"p95 {errors[int(0.95 * (len(errors) - 1))]:.1%}, Spearman {spearman(*map(list, zip(*pairs))):.3f}, "
        f"regret {mean:.1%} (geometric mean), {max(regrets):.1%} (largest); A/A off by {noise:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="measure the machine first and keep the file")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--masks", default="window,causal,full")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of a cell")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--busy", action="store_true", help="one thread: time what the thread ran, not the wall")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    d = calibrate(say=print) if given.calibrate else device("cpu")
    print(d)
    rows: list[Row] = []
    with torch.no_grad():
        for threads in map(int, given.threads.split(",")):
            for dtype in given.dtypes.split(","):
                for mask in given.masks.split(","):
                    for length in map(int, given.lengths.split(",")):
                        cell = Cell(mask, dtype, length, threads)
                        rows.append(measure(cell, d, given.flex, given.seconds, given.busy))
                        show(rows[-1])
    print(summary(rows))
    timing.write("cost_model_cpu", [dict(vars(r.cell), measured=dict(r.measured), predicted=dict(r.predicted),
                                         chosen=r.chosen, regret=r.regret, aa=r.aa) for r in rows])  # fmt: skip


def show(r: Row) -> None:
    best = min(r.measured, key=lambda n: r.measured[n])
    cells = "  ".join(f"{n} {r.measured[n]:.2f}/{r.predicted[n]:.2f}" for n in r.measured)
    c = r.cell
    print(
        f"{c.mask:6} {c.dtype:4} {c.length:5} ×{c.threads}  chose {r.chosen}, best {best}, regret {r.regret:.1%} "
        f"(A/A {r.aa:.3f})  {cells}",
        flush=True,
    )


if __name__ == "__main__":
    main()
