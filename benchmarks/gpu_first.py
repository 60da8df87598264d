"""What no machine without a GPU can answer, asked of the first one: one command of under ten minutes.

    python benchmarks/gpu_first.py                         every part, until ten minutes are spent
    python benchmarks/gpu_first.py --parts exact,decode    only these
    python benchmarks/gpu_first.py --rehearse              the same steps at toy sizes in Triton's interpreter, without a GPU

    exact     emitted kernels in bf16 and fp16 against float64, SDPA's own error beside
    forward   as emitted, the stock tutorial kernel, SDPA by each backend, FlexAttention: TFLOP/s, predicted and measured
    decode    one query at 32k and 128k keys with 1 to 64 splits: bytes a second beside those of a copy
    masks     padding and documents whose tile lists are made at every call, and kept; in a CUDA graph
    host      what a call costs before the device has it

Every cell is a line of benchmarks/results/gpu_first.jsonl as soon as it is known; a second run goes on where the first one
stopped (--anew: begins again). `predicted` is what the cost model said before anything was measured on this device. After
it: `reattend targets --calibrate` and `python benchmarks/cost_model.py --quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

PARTS = ("exact", "forward", "decode", "masks", "host")
OUT = Path(__file__).parent / "results" / "gpu_first.jsonl"
REHEARSED_AS = "h200"
ROUNDS, ROUND_SECONDS = 7, 5e-3
Row = dict[str, Any]
Call = Callable[[], object]
Ask = Callable[[], Row]
console = Console(width=140)

if "--rehearse" in sys.argv:
    # Triton binds its interpreter when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import cells  # noqa: E402
import stock_kernels  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402

from reattend.codegen.triton import kernel  # noqa: E402
from reattend.cost_model.devices.device import Device, device  # noqa: E402
from reattend.cost_model.time.cost import Cost  # noqa: E402
from reattend.cost_model.time.predict import predict, ranked_mappings  # noqa: E402
from reattend.patterns import expr as ex  # noqa: E402
from reattend.patterns.cascade import Cascade  # noqa: E402
from reattend.patterns.library.papers import Builder, softmax  # noqa: E402
from reattend.patterns.mapping import TileMapping  # noqa: E402
from reattend.patterns.verdict import Obstacle, Refusal  # noqa: E402
from reattend.rewriter.choose.choose import running_device  # noqa: E402

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Lab:
    """The device at hand, or the interpreter that stands in for it, and how many times smaller its sizes are."""

    target: Device
    where: str
    smaller: int = 1

    @property
    def rehearses(self) -> bool:
        return self.where == "cpu"

    def tokens(self, n: int) -> int:
        return max(n // self.smaller, 48)


# --- clocks -----------------------------------------------------------------------------------------------------------


def _span(lab: Lab, call: Call, times: int) -> float:
    """Seconds of a call, `times` of them back to back."""
    if lab.rehearses:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / times


def interleaved(lab: Lab, ways: Mapping[str, Call]) -> dict[str, float]:
    """Medians of seconds, each way in turn in another order every round; the first one twice, as "A/A"."""
    first = next(iter(ways))
    runs = {**ways, "A/A": ways[first]}
    rounds, most = (1, 1) if lab.rehearses else (ROUNDS, 200)
    for run in runs.values():
        # what is compiled is compiled here
        run()
    each = {n: min(most, max(1, round(ROUND_SECONDS / max(_span(lab, run, 1), 1e-6)))) for n, run in runs.items()}
    took: dict[str, list[float]] = {n: [] for n in runs}
    order, rng = list(runs), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for n in order:
            took[n].append(_span(lab, runs[n], each[n]))
    return {n: statistics.median(t) for n, t in took.items()}


# --- our kernel -------------------------------------------------------------------------------------------------------


def mappings(
    lab: Lab, c: Cascade, sizes: Mapping[str, int], most: int, splits: bool = True
) -> Iterator[tuple[TileMapping, Cost]]:
    """The mappings that the model likes best."""
    found = ranked_mappings(c, lab.target, sizes)
    assert not isinstance(found, Obstacle), found
    for mapping, cost in found:
        if (splits or mapping.split_m == 1) and not isinstance(kernel.build(c, mapping, lab.target), Refusal):
            yield mapping, cost
            most -= 1
            if not most:
                return


def ours(lab: Lab, c: Cascade, mapping: TileMapping, x: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> Call:
    made = kernel.build(c, mapping, lab.target)
    assert not isinstance(made, Refusal), made
    return lambda: made.run(x, sizes)


def _inputs(lab: Lab, cell: cells.Cell) -> dict[str, torch.Tensor]:
    return cells.tensors(cell, lab.where)


def _cell(lab: Lab, mask: str, dtype: str, tokens: int, **more: int) -> cells.Cell:
    heads = 2 if lab.rehearses else more.pop("heads", 16)
    more.pop("heads", None)
    return cells.square(mask, dtype, lab.tokens(tokens), 1, heads=heads, **more)


# --- the parts --------------------------------------------------------------------------------------------------------


def exact(lab: Lab) -> Iterator[Ask]:
    heads = (16, 40) if lab.rehearses else (40, 64, 128, 256)
    for dtype in ("bf16", "f16"):
        for head in heads:
            for mask in ("none", "causal", "window", "padding"):
                yield partial(_exact, lab, _cell(lab, mask, dtype, 1500, head=head, window=200))


def _exact(lab: Lab, cell: cells.Cell) -> Row:
    c, x = cells.cascade(cell), _inputs(lab, cell)
    (mapping, _), *_ = mappings(lab, c, cell.sizes, 1)
    keep = cells.keep_tensor(cell, x)
    want = sdpa(*(x[n].double() for n in "QKV"), attn_mask=keep)
    got, own = ours(lab, c, mapping, x, cell.sizes)(), sdpa(*(x[n] for n in "QKV"), attn_mask=keep)
    assert isinstance(got, torch.Tensor)
    error, reference = (float((t.double() - want).abs().max()) for t in (got, own))
    right = error <= 2 * reference
    return {"cell": str(cell), "mapping": str(mapping), "error": error, "sdpa_error": reference, "right": right}


def forward(lab: Lab) -> Iterator[Ask]:
    for head in (16,) if lab.rehearses else (64, 128, 256):
        for mask in ("none", "causal", "window"):
            yield partial(_forward, lab, _cell(lab, mask, "bf16", 8192, head=head, window=1024))


def _forward(lab: Lab, cell: cells.Cell) -> Row:
    c, x = cells.cascade(cell), _inputs(lab, cell)
    ways: dict[str, Call] = {}
    predicted: dict[str, float] = {}
    for mapping, cost in mappings(lab, c, cell.sizes, 2, splits=False):
        name = cells.label(mapping)
        ways[name], predicted[name] = ours(lab, c, mapping, x, cell.sizes), cost.seconds
    keep = cells.keep_tensor(cell, x) if cell.mask == "window" else None
    backends = {"math": SDPBackend.MATH} if lab.rehearses else BACKENDS
    refused: dict[str, str] = {}
    for name, backend in backends.items():
        way = _backend(x, backend, keep, cell.mask == "causal")
        try:
            way()
        except RuntimeError as no:
            # which backend takes what is one of the questions
            refused[name] = str(no).splitlines()[0]
            continue
        ways[f"sdpa {name}"] = way
    if cell.mask == "causal" and cell.queries % 128 == 0 and not lab.rehearses:
        ways["tutorial"] = _tutorial(cell, x)
    if not lab.rehearses:
        ways["flex"] = cells._vendor_call(c, "flex", cell, x)
    took = interleaved(lab, ways)
    pairs = {"none": 1.0, "causal": 0.5, "window": min(1.0, cell.window / cell.keys)}[cell.mask] * cell.queries * cell.keys
    flops = 4 * cell.batch * cell.heads * pairs * cell.head
    return {
        "cell": str(cell), "seconds": took, "predicted": predicted, "refused": refused,
        "tflops": {n: round(flops / t * 1e-12, 1) for n, t in took.items()},
    }


def _backend(x: Mapping[str, torch.Tensor], which: SDPBackend, keep: torch.Tensor | None, causal: bool) -> Call:
    def run() -> object:
        with sdpa_kernel(which):
            return sdpa(x["Q"], x["K"], x["V"], attn_mask=keep, is_causal=causal)

    return run


def _tutorial(cell: cells.Cell, x: Mapping[str, torch.Tensor]) -> Call:
    q, k, v = (x[n].flatten(0, 1) for n in "QKV")
    out = torch.empty_like(q)
    bm, bn, warps, stages = (128, 64, 4, 3) if cell.head <= 64 else (128, 64, 8, 3) if cell.head <= 128 else (64, 32, 8, 2)
    grid = (cell.queries // bm, q.shape[0])
    strides = [s for t in (q, k, v, out) for s in t.stride()[:2]]
    constants = {"G": cell.group, "D": cell.head, "BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}
    run = stock_kernels.tutorial[grid]
    return lambda: run(q, k, v, out, cell.head**-0.5, *strides, **constants)


def decode(lab: Lab) -> Iterator[Ask]:
    for keys in (32768, 131072):
        for group in (4, 32):
            few = {"heads": 32, "group": group, "head": 128} if not lab.rehearses else {"heads": 4, "group": 4, "head": 16}
            cell = cells.Cell("none", "bf16", 1, lab.tokens(keys // 8) if lab.rehearses else keys, **few)
            yield partial(_decode, lab, cell)


def _decode(lab: Lab, cell: cells.Cell) -> Row:
    c, x = cells.cascade(cell).with_sizes(cell.sizes), _inputs(lab, cell)
    (best, cost), *_ = mappings(lab, c, cell.sizes, 1)
    ways: dict[str, Call] = {f"planned: {cells.label(best)}": ours(lab, c, best, x, cell.sizes)}
    predicted = {next(iter(ways)): cost.seconds}
    for split in (1, 4) if lab.rehearses else (1, 2, 4, 8, 16, 32, 64):
        mapping = replace(best, split_m=split)
        if isinstance(kernel.build(c, mapping, lab.target), Refusal):
            continue
        said = predict(c, mapping, lab.target, cell.sizes)
        ways[f"{split} splits"] = ours(lab, c, mapping, x, cell.sizes)
        predicted[f"{split} splits"] = said.seconds if isinstance(said, Cost) else float("nan")
    ways["sdpa"] = lambda: sdpa(x["Q"], x["K"], x["V"], enable_gqa=cell.group > 1)
    source = torch.cat([x["K"].flatten(), x["V"].flatten()])
    target = torch.empty_like(source)
    ways["copy"] = lambda: target.copy_(source)
    took = interleaved(lab, ways)
    read = source.numel() * source.element_size()
    rate = {n: (2 if n == "copy" else 1) * read / t * 1e-9 for n, t in took.items()}
    return {
        "cell": str(cell), "seconds": took, "predicted": predicted, "gb_per_s": {n: round(r, 1) for n, r in rate.items()},
        "of_copy": {n: round(r / rate["copy"], 3) for n, r in rate.items()},
    }


def masks(lab: Lab) -> Iterator[Ask]:
    for name in ("padding", "documents"):
        yield partial(_masks, lab, name)


def masked(name: str, head: int) -> Cascade:
    """Causal attention beside a mask that is data: keys that are kept, or documents' numbers."""
    b, i = Builder({"e": head, "f": head}), ex.index
    q, k, v = (b.input(n, r, "bf16") for n, r in (("Q", "bhpe"), ("K", "bhme"), ("V", "bhmf")))
    s = ex.cast(b.put("QK", "bhpm", q * k, "add", "e"), "f32") * head**-0.5
    if name == "padding":
        keep = b.input("Kept", "bm", "b1")
    else:
        keep = ex.equal(b.input("Of", "bp", "i64"), b.input("Key", "bm", "i64"))
    s = ex.where(keep & (i("m") <= i("p")), s, -3.3e38)
    w = b.put("A", "bhpm", ex.cast(softmax(b, b.put("S", "bhpm", s)), "bf16"))
    b.put("O", "bhpf", w * v, "add", "m")
    return b.cascade(name, "O")


def _masks(lab: Lab, name: str) -> Row:
    batch, heads, n, head = (2, 2, 64, 16) if lab.rehearses else (2, 16, 4096, 128)
    c, sizes = masked(name, head), {"B": batch, "H": heads, "P": n, "M": n, "E": head, "F": head}
    x = {t: torch.randn(batch, heads, n, head, device=lab.where, dtype=torch.bfloat16) for t in "QKV"}
    numbers = (torch.arange(n, device=lab.where) // (n // 8)).repeat(batch, 1)
    x |= {"Kept": (numbers > 0).clone()} if name == "padding" else {"Of": numbers, "Key": numbers.clone()}
    (mapping, cost), *_ = mappings(lab, c, sizes, 1)
    made = kernel.build(c, mapping, lab.target)
    assert not isinstance(made, Refusal), made
    inputs = tuple(x[t.name] for t in c.inputs)
    bound = made.module.sizes_of(*inputs)
    ways: dict[str, Call] = {"a call": lambda: made.run(x, sizes), "its lists": lambda: made.module.walk_of(inputs, bound)}
    row: Row = {"cell": name, "mapping": str(mapping), "seconds": interleaved(lab, ways), "predicted": cost.seconds}
    if lab.rehearses:
        return {**row, "graph": "no CUDA graphs here"}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made.run(x, sizes)
    for t in ("Q", "K", "V"):
        x[t].normal_()
    graph.replay()
    row["graph_equal"] = bool(torch.equal(out, made.run(x, sizes)))
    return {**row, "graph_seconds": interleaved(lab, {"replayed": graph.replay})["replayed"]}


def host(lab: Lab) -> Iterator[Ask]:
    yield partial(_host, lab)


def _host(lab: Lab) -> Row:
    """Microseconds from one call to the next while the device is not waited for."""
    cell = cells.Cell("causal", "bf16", lab.tokens(256), lab.tokens(256), heads=2, head=16)
    c, x = cells.cascade(cell), _inputs(lab, cell)
    (mapping, _), *_ = mappings(lab, c, cell.sizes, 1, splits=False)
    ways = {"ours": ours(lab, c, mapping, x, cell.sizes), "sdpa": lambda: sdpa(x["Q"], x["K"], x["V"], is_causal=True)}
    took: dict[str, float] = {}
    for name, run in ways.items():
        times = []
        for _ in range(1 if lab.rehearses else 20):
            run()
            if not lab.rehearses:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(10):
                run()
            times.append((time.perf_counter() - begin) / 10 * 1e6)
        took[name] = statistics.median(times)
    return {"cell": str(cell), "microseconds": took}


# --- the command ------------------------------------------------------------------------------------------------------


def written(path: Path, name: str) -> dict[tuple[str, int], Row]:
    """The cells of a device that an earlier run has answered, by part and number."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(r["part"], r["number"]): r for r in lines if r["device"] == name and "failed" not in r}


def asked(lab: Lab, parts: Sequence[str]) -> Iterator[tuple[str, int, Ask]]:
    """One cell of each part in turn: where time is short, every question has some answer."""
    left = {p: iter(enumerate(globals()[p](lab))) for p in parts}
    while left:
        for p in list(left):
            cell = next(left[p], None)
            if cell is None:
                del left[p]
            else:
                yield p, *cell


def answer(lab: Lab, ask: Ask) -> Row:
    guard: AbstractContextManager[object] = torch.no_grad() if not lab.rehearses else nullcontext()
    with guard:
        try:
            return ask()
        except Exception as error:
            # the other cells' answers are worth having; this one's failure is printed, and makes the command fail
            return {"failed": f"{type(error).__name__}: {error}"}


def versions() -> Row:
    return {"torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def said(row: Row) -> Iterator[str]:
    """A cell as a line, and a line for each way that was timed."""
    heads = ("part", "cell", "mapping", "failed", "graph", "right", "graph_equal")
    yield "  ".join(str(row[k]) if k in heads[:3] else f"{k}: {row[k]}" for k in heads if k in row)
    if "error" in row:
        yield f"    error {row['error']:.2e}, SDPA's {row['sdpa_error']:.2e}"
    for n, us in row.get("microseconds", {}).items():
        yield f"    {n:40} {us:10.1f} µs a call on the host"
    for n, t in row.get("seconds", {}).items():
        predicted = row["predicted"].get(n) if isinstance(row.get("predicted"), dict) else None
        rate = "".join(f"{row[k][n]:12,.1f} {unit}" for k, unit in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s")) if k in row)
        yield f"    {n:40} {t * 1e6:12,.1f} µs{rate}" + (f"   predicted {predicted * 1e6:,.1f} µs" if predicted else "")
    for n, why in row.get("refused", {}).items():
        yield f"    sdpa {n}: {why}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--minutes", type=float, default=10.0, help="no cell is begun after so many")
    p.add_argument("--rehearse", action="store_true", help="toy sizes in Triton's interpreter, without a GPU")
    p.add_argument("--anew", action="store_true", help="answer what an earlier run has answered, too")
    p.add_argument("--out", type=Path, help=f"JSON lines; {OUT.name} among the results, a rehearsal's nowhere")
    a = p.parse_args()
    parts = a.parts.split(",")
    if unknown := [x for x in parts if x not in PARTS]:
        p.error(f"no part {', '.join(unknown)}: {', '.join(PARTS)}")
    if not a.rehearse and not torch.cuda.is_available():
        p.error("no CUDA or ROCm device here: --rehearse runs the same steps in Triton's interpreter")
    lab = Lab(device(REHEARSED_AS), "cpu", 128) if a.rehearse else Lab(running_device("cuda"), "cuda")
    name = f"interpreter, as {REHEARSED_AS}" if a.rehearse else torch.cuda.get_device_name()
    out = a.out or (None if a.rehearse else OUT)
    known = {} if a.anew or out is None else written(out, name)
    begin, failed, later = time.perf_counter(), 0, 0
    for part, number, ask in asked(lab, parts):
        if (part, number) in known:
            continue
        if time.perf_counter() - begin > 60 * a.minutes:
            later += 1
            continue
        row = {"part": part, "number": number, "device": name, **answer(lab, ask)}
        failed += "failed" in row or row.get("right") is False or row.get("graph_equal") is False
        for text in said(row):
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        if out is not None:
            with out.open("a") as f:
                f.write(json.dumps(row | versions()) + "\n")
    if later:
        console.print(f"{later} cells are left: run the command again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
