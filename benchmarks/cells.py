"""Cells of the cost model's validation: one attention each, everything that can compute it, and what the model predicts.

    cell        mask, type, sizes, threads         → cascade → candidates: original, sdpa, flex, ours under several mappings
    prediction  by the candidate's name, from the cascade and a device alone, so that stored timings can be judged again

Nothing of these shapes is known to the calibration: it times operators and kernels of shapes of its own
(cost_model/calibration/calibrate.py, codegen/measure/calibrate.py). `GRIDS` says which cells were looked at while the model
was written (`development`, `regret`, `heldout`, `fresh`, and `drawn` and `again`: drawn from wide ranges), and which only
judge it (`unseen`: drawn from the same ranges with another seed, not looked at).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from reattend.codegen import operator as ours
from reattend.codegen.forms.program import loose, program_text
from reattend.codegen.vendor import use as vendor
from reattend.cost_model.count.tiles import NOTHING, Data
from reattend.cost_model.devices.device import Device
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import VendorUse, predict, predict_original, predict_vendor, ranked_mappings
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library.papers import Builder
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle, Refusal
from reattend.rewriter.choose.candidates import vendor_call

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LOWEST = {"f32": -3.3e38, "bf16": -3.3e38, "f16": -6.5e4}
WINDOW, PREFIX, CAP = 256, 192, 30.0
# Mappings of our kernel that are timed, and how much slower than the best one the model may find them.
MAPPINGS, NEAR = 4, 4.0
Call = Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """One attention. `mask`: none, causal (the last query sees all keys), window, prefix or padding (by key).

    `score`: plain, softcap (of CAP) or bias (a table added to the scores).
    """

    mask: str
    dtype: str
    queries: int
    keys: int
    threads: int = 1
    batch: int = 1
    heads: int = 8
    group: int = 1
    head: int = 64
    window: int = WINDOW
    score: str = "plain"

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.heads // self.group}" if self.group > 1 else str(self.heads)
        size = str(self.queries) if self.queries == self.keys else f"{self.queries}×{self.keys}"
        mask = self.mask if self.window == WINDOW else f"{self.mask} {self.window}"
        mask = mask if self.score == "plain" else f"{mask} {self.score}"
        return f"{mask:11}{self.dtype:5}{self.batch}×{heads}×{self.head:<4}{size:>10} ×{self.threads}"

    @property
    def past(self) -> int:
        return self.keys - self.queries

    @property
    def sizes(self) -> dict[str, int]:
        out = {"B": self.batch, "H": self.heads, "P": self.queries, "M": self.keys, "E": self.head, "F": self.head}
        return out | ({"past": self.past} if self.past else {})


def square(mask: str, dtype: str, n: int, threads: int, **more: int) -> Cell:
    return Cell(mask, dtype, n, n, threads, **more)


# --- the cascade, and data for it -----------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def cascade(cell: Cell, masked: bool = True) -> Cascade:
    """Eager attention as it is lifted: product, scale, mask, softmax, product, all in the inputs' type."""
    b, i = Builder({"e": cell.head, "f": cell.head}), ex.index
    if not cell.past:
        b.sizes |= {"m": b.extent("p")}
    q = b.input("Q", "bhpe", cell.dtype)
    shape, at = (b.extent("b"), b.extent("h") / cell.group, b.extent("m")), (i("b"), i("h") // cell.group, i("m"))
    k = b.given("K", (*shape, b.extent("e")), (*at, i("e")), cell.dtype)
    v = b.given("V", (*shape, b.extent("f")), (*at, i("f")), cell.dtype)
    s = b.put("QK", "bhpm", q * k, "add", "e") * cell.head**-0.5
    if cell.score == "softcap":
        s = ex.unary("tanh", s / CAP) * CAP
    if cell.score == "bias":
        s = s + b.input("Bias", "hpm", cell.dtype)
    if masked and cell.mask != "none":
        s = ex.where(_keep(b, cell), s, LOWEST[cell.dtype])
    s = b.put("S", "bhpm", s)
    sn = b.put("SN", "bhpm", ex.exp(s - b.put("GM", "bhp", s, "max", "m")))
    b.put("O", "bhpf", b.put("A", "bhpm", sn / b.put("SD", "bhp", sn, "add", "m")) * v, "add", "m")
    return b.cascade(cell.mask, "O")


def _keep(b: Builder, cell: Cell) -> ex.Expr:
    p, m = ex.index("p"), ex.index("m")
    row = p + ex.symbol("past") if cell.past else p
    match cell.mask:
        case "causal":
            return m <= row
        case "window":
            return (m <= row) & (row - m < cell.window)
        case "prefix":
            return (m <= row) | (m < PREFIX)
        case "padding":
            return b.input("Kept", "bm", "b1")
    raise ValueError(f"mask {cell.mask!r}: one of none, causal, window, prefix, padding")


def tensors(cell: Cell, where: str) -> dict[str, torch.Tensor]:
    """Inputs of a cell. A padded batch keeps 7/8 of its keys, the last ones."""
    torch.manual_seed(0)
    few = cell.heads // cell.group
    shapes = {"Q": (cell.heads, cell.queries), "K": (few, cell.keys), "V": (few, cell.keys)}
    made = {n: torch.randn(cell.batch, *s, cell.head, dtype=DTYPES[cell.dtype], device=where) for n, s in shapes.items()}
    if cell.score == "bias":
        made["Bias"] = torch.randn(cell.heads, cell.queries, cell.keys, dtype=DTYPES[cell.dtype], device=where)
    if cell.mask == "padding":
        made["Kept"] = _kept(cell).to(where)
    return made


def _kept(cell: Cell) -> torch.Tensor:
    return (torch.arange(cell.keys) >= cell.keys // 8).repeat(cell.batch, 1)


def keep_tensor(cell: Cell, x: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask as models hold it: [P, M], or [B, 1, 1, M] for padding."""
    if cell.mask == "none":
        return None
    if cell.mask == "padding":
        return x["Kept"][:, None, None]
    where = x["Q"].device
    p, m = torch.arange(cell.queries, device=where)[:, None] + cell.past, torch.arange(cell.keys, device=where)
    return {"causal": m <= p, "window": (m <= p) & (p - m < cell.window), "prefix": (m <= p) | (m < PREFIX)}[cell.mask]


# --- candidates -----------------------------------------------------------------------------------------------------


def calls(cell: Cell, d: Device, flex: bool) -> tuple[dict[str, Call], dict[str, TileMapping]]:
    """Everything that can compute the cell, as a plan would run it, and the mappings among them by name."""
    c, x = cascade(cell), tensors(cell, "cpu" if d.kind == "cpu" else "cuda")
    keep = keep_tensor(cell, x)
    out: dict[str, Call] = {"original": _eager(cell, x, keep)}
    if cell.score != "softcap":
        out["sdpa"] = _vendor_call(c, "sdpa", cell, x)
    if cell.mask not in ("none", "causal") and cell.score == "plain":
        out["sdpa given mask"] = lambda: sdpa(x["Q"], x["K"], x["V"], attn_mask=keep, enable_gqa=cell.group > 1)
    if flex:
        out["flex"] = _vendor_call(c, "flex", cell, x)
    mappings = dict(_mappings(cell, d))
    operands, sizes = [x[t.name] for t in c.inputs], [cell.sizes[n] for n in loose(c)]
    for name, mapping in mappings.items():
        text = program_text(c, mapping)
        out[name] = lambda text=text: torch.ops.reattend.cascade.default(operands, sizes, text)  # type: ignore[misc]
    return out, mappings


def _eager(cell: Cell, x: Mapping[str, torch.Tensor], keep: torch.Tensor | None) -> Call:
    def shared(t: torch.Tensor) -> torch.Tensor:
        b, h, n, e = t.shape
        return t if cell.group == 1 else t[:, :, None].expand(b, h, cell.group, n, e).reshape(b, -1, n, e)

    def original() -> object:
        s = (x["Q"] @ shared(x["K"]).mT) * cell.head**-0.5
        if cell.score == "softcap":
            s = torch.tanh(s / CAP) * CAP
        if cell.score == "bias":
            s = s + x["Bias"]
        if keep is not None:
            s = torch.where(keep, s, LOWEST[cell.dtype])
        return s.softmax(-1) @ shared(x["V"])

    return original


def _made(c: Cascade, name: str) -> vendor.VendorCall:
    """The vendor's function; the data of the cells keeps a key in every row, so a guard on that would hold."""
    make = {"sdpa": vendor.sdpa, "flex": vendor.flex}[name]
    made = make(c)
    if isinstance(made, Refusal):
        made = make(c, keyed=True)
    if isinstance(made, Refusal):
        raise ValueError(f"{name} does not take {c.name}: {made.reason}")
    return made


def _vendor_call(c: Cascade, name: str, cell: Cell, x: Mapping[str, torch.Tensor]) -> Call:
    """The call as it is spliced: its result lies in memory as the model's own does."""
    call = vendor_call(_made(c, name))
    given = call.arguments(x, cell.sizes.__getitem__)
    return lambda: call.target(*given)


def _mappings(cell: Cell, d: Device, most: int = MAPPINGS) -> Iterator[tuple[str, TileMapping]]:
    """Our kernel under the mapping that the model likes best, and under others that differ in tile or body."""
    c = cascade(cell)
    found = ranked_mappings(c, d, cell.sizes, data(cell))
    assert not isinstance(found, Obstacle), found
    seen: set[tuple[int, str]] = set()
    same: set[float] = set()
    for mapping, cost in found:
        known = (mapping.tile_p, mapping.body) in seen or cost.seconds in same
        if known or len(seen) == most or cost.seconds > NEAR * found[0][1].seconds:
            # mappings of equal cost to the last digit make the same calls
            continue
        if not isinstance(ours.build(c, mapping, d), Refusal):
            seen.add((mapping.tile_p, mapping.body))
            same.add(cost.seconds)
            yield label(mapping), mapping


def best(cell: Cell, d: Device) -> Iterator[tuple[str, TileMapping]]:
    """The mapping that a plan would take."""
    return _mappings(cell, d, most=1)


def label(m: TileMapping) -> str:
    gpu = f" {m.warps}w {m.stages}s" + (f" /{m.split_m}" if m.split_m > 1 else "") if m.body == "triton" else ""
    return f"ours {m.body} {m.tile_p}x{m.tile_m}{gpu}"


# --- predictions ----------------------------------------------------------------------------------------------------


def costs(
    cell: Cell, names: list[str], mappings: Mapping[str, TileMapping], d: Device, masked: bool = True
) -> dict[str, Cost]:
    """The predicted cost of each candidate; `masked` False: as if nothing were masked."""
    c = cascade(cell, masked)
    return {n: _known(_cost(c, cell, n, mappings, d, masked)) for n in names}


def _cost(
    c: Cascade, cell: Cell, name: str, mappings: Mapping[str, TileMapping], d: Device, masked: bool
) -> Cost | Obstacle:
    if name == "original":
        return predict_original(c, d, cell.sizes)
    if name == "sdpa given mask":
        elements = cell.keys * (cell.batch if cell.mask == "padding" else cell.queries)
        backend = "flash" if d.kind == "cpu" else "efficient"
        return predict_vendor(c, VendorUse(backend, mask_elements=elements if masked else 0), d, cell.sizes, data(cell))
    if name in ("sdpa", "flex"):
        use = vendor.use(_made(c, name), d, cell.sizes)
        assert isinstance(use, VendorUse), use
        return predict_vendor(c, use, d, cell.sizes, data(cell))
    return predict(c, mappings[name], d, cell.sizes, data(cell))


def data(cell: Cell) -> Data:
    """What padding keeps, which a plan is told by `--expect`."""
    return Data.of({"Kept": _kept(cell).numpy()}) if cell.mask == "padding" else NOTHING


def _known(cost: Cost | Obstacle) -> Cost:
    assert isinstance(cost, Cost), cost
    return cost


# What is timed beside every cell of a grid.
PROBE = Cell("none", "f32", 768, 512, heads=4)


# --- grids ----------------------------------------------------------------------------------------------------------


def _regret(threads: int) -> Iterator[Cell]:
    for mask, dtype, n in product(("window", "causal", "none"), ("f32", "bf16"), (512, 1024, 2048, 4096, 8192)):
        yield square(mask, dtype, n, threads)


def _development(threads: int) -> Iterator[Cell]:
    for t in ("f32", "bf16"):
        yield square("causal", t, 1024, threads, heads=16, head=128, group=4)
        yield square("prefix", t, 768, threads, heads=8, head=64)
        yield square("padding", t, 512, threads, batch=2, heads=12, head=64)
        yield Cell("causal", t, 1, 4096, threads, heads=32, group=8, head=128)
        yield Cell("causal", t, 256, 1024, threads, heads=8, head=64)
        yield Cell("none", t, 256, 2048, threads, heads=8, head=64)


def _heldout(threads: int) -> Iterator[Cell]:
    for t in ("f32", "bf16"):
        yield square("none", t, 1500, threads, heads=6, head=64)
        yield square("none", t, 197, threads, batch=4, heads=12, head=64)
        yield Cell("none", t, 448, 1500, threads, heads=6, head=64)
        yield square("causal", t, 700, threads, heads=12, head=64)
        yield square("causal", t, 1536, threads, heads=8, head=128, group=4)
        yield square("causal", t, 3000, threads, heads=4, head=96)
        yield square("window", t, 1200, threads, heads=12, head=64)
        yield square("window", t, 2560, threads, heads=8, head=128, group=2)
        yield square("window", t, 6000, threads, heads=4, head=64)
        yield square("prefix", t, 1100, threads, heads=8, head=80)
        yield square("prefix", t, 2300, threads, heads=4, head=64)
        yield square("padding", t, 384, threads, batch=3, heads=12, head=64)
        yield square("padding", t, 1300, threads, batch=2, heads=6, head=64)
        yield Cell("causal", t, 1, 3000, threads, heads=24, group=3, head=128)
        yield Cell("none", t, 1, 6000, threads, batch=2, heads=16, group=4, head=64)
        yield Cell("causal", t, 5, 2500, threads, heads=16, group=4, head=128)
        yield Cell("causal", t, 350, 1900, threads, heads=8, head=64)


def _fresh(threads: int) -> Iterator[Cell]:
    for t in ("f32", "bf16"):
        yield square("none", t, 930, threads, heads=10)
        yield square("none", t, 333, threads, batch=3, heads=5)
        yield Cell("none", t, 210, 2750, threads, heads=10)
        yield square("causal", t, 810, threads, heads=10)
        yield square("causal", t, 1700, threads, heads=9, head=128, group=3)
        yield square("causal", t, 2300, threads, batch=2, heads=3, head=80)
        yield square("window", t, 1450, threads, heads=10, window=100)
        yield square("window", t, 2900, threads, heads=6, head=96, group=2, window=333)
        yield square("window", t, 5200, threads, heads=3, window=700)
        yield square("prefix", t, 1310, threads, heads=6, head=96)
        yield square("padding", t, 450, threads, batch=3, heads=10)
        yield Cell("causal", t, 1, 4700, threads, heads=20, group=5, head=128)
        yield Cell("none", t, 1, 3500, threads, batch=5, heads=8)
        yield Cell("causal", t, 7, 1900, threads, heads=18, group=3)
        yield Cell("causal", t, 620, 2100, threads, heads=7)


# (mask, score, kind of shape) of the cells that are drawn.
DRAWN = (
    ("none", "plain", "square"), ("none", "plain", "cross"), ("none", "bias", "square"), ("causal", "plain", "square"),
    ("causal", "plain", "grouped"), ("causal", "softcap", "square"), ("causal", "bias", "square"),
    ("causal", "plain", "past"),
    ("window", "plain", "square"), ("window", "plain", "grouped"), ("window", "softcap", "square"),
    ("prefix", "plain", "square"), ("padding", "plain", "batch"), ("causal", "plain", "decode"), ("none", "plain", "few"),
)
# Pairs of queries and keys of a drawn cell, at most.
PAIRS = 4e7


def _drawn(seed: int, threads: int) -> Iterator[Cell]:
    for t in ("f32", "bf16"):
        draw = random.Random(seed)
        yield from (_draw(draw, mask, score, kind, t, threads) for mask, score, kind in DRAWN)


def _draw(draw: random.Random, mask: str, score: str, kind: str, dtype: str, threads: int) -> Cell:
    group = draw.choice((2, 3, 4)) if kind in ("grouped", "decode") else 1
    heads = group * draw.randint(2, max(2, 16 // group))
    batch = draw.randint(2, 4) if kind in ("batch", "few") else 1
    head = draw.choice((40, 48, 64, 72, 80, 96, 112, 128))
    keys = _log_uniform(draw, 220, 7000)
    queries = {"cross": _log_uniform(draw, 60, 900), "decode": 1, "few": draw.randint(2, 15)}.get(kind, keys)
    most = PAIRS / (batch * heads)
    keys = min(keys, int(math.sqrt(most) if queries == keys else most / queries))
    queries = max(keys // 3, 20) if kind == "past" else min(queries, keys)
    window = _log_uniform(draw, 40, 900)
    return Cell(
        mask, dtype, queries, keys, threads, batch, heads, group, head, window if mask == "window" else WINDOW, score
    )


def _log_uniform(draw: random.Random, low: float, high: float) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


GRIDS: Mapping[str, Callable[[int], Iterator[Cell]]] = {
    "regret": _regret, "development": _development, "heldout": _heldout, "fresh": _fresh,
    "drawn": partial(_drawn, 2711), "again": partial(_drawn, 6007), "unseen": partial(_drawn, 9341),
}


def as_data(cell: Cell) -> dict[str, object]:
    return asdict(cell)
