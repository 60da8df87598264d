"""Calibration in company: what every way to run an attention takes when the others run between its calls.

    rates       operators timed alone, over and over: caches, the allocator's memory and the clock are as they left them
    in company  every way of a shape in turn, in another order every round, with one thread and with all
    measured / predicted  →  a factor for each kind of way and type; measured − predicted of small calls  →  seconds a call

A model calls an attention between other work, as the rounds do. Shapes are neither the check's nor of benchmarks/cells.py.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

import torch

from ...cost_model.calibration.calibrate import Watch, torch_threads, with_rates
from ...cost_model.devices.device import Device, alone, with_threads
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import VendorUse, predict, predict_original, predict_vendor, ranked_mappings
from ...patterns import expr as ex
from ...patterns.cascade import Cascade
from ...patterns.evaluate import DTYPE
from ...patterns.library.papers import Builder
from ...patterns.mapping import TileMapping
from ...patterns.verdict import Obstacle, Refusal
from ..cpu import kernel as cpu
from ..files.native import CompilerError
from ..forms.program import loose
from ..operator import program_text
from ..vendor import use as vendor

Call = Callable[[], object]
Price = Callable[[Device], Cost]
TYPES = ("f32", "bf16")
# Rounds of a shape. A way so many times slower than the fastest one is called in every second round, and so on.
ROUNDS, SLOW, SELDOM = 3, 3.0, 2
# Mappings of a body whose predicted time is so much above the best one's are not run.
NEAR = 4.0
# No kind of way is believed to be faster in company, or slower by more.
LEAST, MOST = 1.0, 2.0
# The share of what a kind is off beside the others that is believed: the rest is as much its shapes' as its own.
OWN = 0.5
# Pairs of queries and keys of a shape that shows what a call takes by itself.
TINY = 1 << 15


@dataclass(frozen=True)
class Workload:
    """One attention. `cap` of the scores, 0: none.

    `mask`: none, causal (the last query sees all keys), window, prefix, bias or padding (by key).

    `compiled`: what is run although it is compiled first: fused, flex f32, flex bf16.
    """

    mask: str
    batch: int
    heads: int
    queries: int
    keys: int
    head: int = 64
    group: int = 1
    window: int = 150
    cap: float = 0.0
    compiled: tuple[str, ...] = ()

    @property
    def pairs(self) -> int:
        return self.batch * self.heads * self.queries * self.keys

    @property
    def sizes(self) -> dict[str, int]:
        out = {"B": self.batch, "H": self.heads, "P": self.queries, "M": self.keys, "E": self.head, "F": self.head}
        return out | ({"past": self.keys - self.queries} if self.keys > self.queries else {})


FUSED = ("fused",)
SHAPES = (
    Workload("none", 2, 5, 410, 410), Workload("none", 1, 8, 150, 1280),
    Workload("none", 1, 4, 980, 980, 128, compiled=FUSED),
    Workload("causal", 1, 8, 560, 560, compiled=FUSED), Workload("causal", 1, 5, 1160, 1160, 96, compiled=("flex bf16",)),
    Workload("causal", 1, 12, 770, 770, group=3), Workload("causal", 1, 6, 300, 1450),
    Workload("causal", 1, 4, 2350, 2350, compiled=FUSED), Workload("window", 1, 8, 1040, 1040),
    Workload("window", 1, 4, 1550, 1550, 80, window=310), Workload("window", 2, 4, 920, 920, window=70),
    Workload("prefix", 1, 6, 890, 890), Workload("bias", 1, 6, 690, 690), Workload("padding", 2, 6, 580, 580),
    Workload("causal", 1, 24, 1, 2600, 128, group=4), Workload("none", 4, 8, 1, 2050),
    Workload("causal", 1, 12, 6, 1420, group=3),
    Workload("none", 1, 2, 30, 60, compiled=FUSED), Workload("causal", 1, 8, 1, 300, group=2, compiled=("flex f32",)),
    Workload("none", 1, 4, 1, 520), Workload("causal", 1, 3, 60, 60),
)


@dataclass(frozen=True)
class Contender:
    """One way to run an attention: its kind (original, sdpa or our-BODY), the call, and what a device says it costs."""

    kind: str
    call: Call
    price: Price


@dataclass(frozen=True)
class Measurement:
    """What a way of some type took with so many threads, in company."""

    way: Contender
    dtype: str
    threads: int
    seconds: float
    tiny: bool

    def timed(self, d: Device) -> InCompany:
        predicted = self.way.price(with_threads(d, self.threads)).seconds
        return InCompany(self.way.kind, self.dtype, self.threads, self.seconds, predicted, self.tiny)


@dataclass(frozen=True)
class InCompany:
    """Seconds of a way, measured in company and predicted alone. `tiny`: it is hardly more than a call."""

    kind: str
    dtype: str
    threads: int
    measured: float
    predicted: float
    tiny: bool = False

    @property
    def off(self) -> float:
        return math.log(self.measured / self.predicted)


def in_company(d: Device, found: list[Measurement]) -> Device:
    """The device with the factors that follow from its rates and some runs."""
    d = alone(d)
    assert d.host is not None
    return replace(d, host=with_rates(d.host, factors([r.timed(d) for r in found])))


@dataclass(frozen=True)
class Round:
    """The ways of a shape and type with so many threads, ready to be called in turn."""

    ways: tuple[Contender, ...]
    dtype: str
    threads: int
    tiny: bool

    def runs(self) -> list[Measurement]:
        with torch_threads(self.threads), torch.no_grad():
            took = rounds([w.call for w in self.ways])
        return [Measurement(w, self.dtype, self.threads, s, self.tiny) for w, s in zip(self.ways, took)]


def prepare(d: Device, watch: Watch) -> list[Round]:
    """Every way of every shape, type and number of threads, built. `d` says which of our mappings are worth it."""
    settle()
    steps = [(shape, t) for shape in SHAPES for t in TYPES]
    with torch.no_grad():
        return [r for shape, t in watch(steps, "attentions, built") for r in _prepared(shape, t, alone(d))]


def _prepared(shape: Workload, t: str, d: Device) -> Iterator[Round]:
    c, x = cascade(shape, t), tensors(shape, t)
    for threads in sorted({1, d.units}):
        with torch_threads(threads):
            yield Round(tuple(ways(c, shape, x, with_threads(d, threads))), t, threads, shape.pairs <= TINY)


def runs(prepared: list[Round], watch: Watch) -> list[Measurement]:
    """All of them timed now."""
    settle()
    return [run for r in watch(prepared, "attentions in company") for run in r.runs()]


def settle() -> None:
    """Bring the allocator where a process that has run a while is: it keeps what it is given back up to its largest size."""
    for size in (1 << 20, 8 << 20, 31 << 20):
        torch.ones(size, dtype=torch.uint8)


def rounds(runs: list[Call]) -> list[float]:
    """Seconds of calls that come in turn, in another order every round, as often more as less."""
    order = random.Random(0)
    times: list[list[float]] = [[_clock(run)] for run in runs]
    fastest = min(t[0] for t in times)
    every = [min(SELDOM, max(1, round(t[0] / (SLOW * fastest)))) for t in times]
    for n in range(ROUNDS):
        due = [i for i in range(len(runs)) if n % every[i] == 0]
        order.shuffle(due)
        for i in due:
            times[i].append(_clock(runs[i]))
    return [statistics.median(t[1:]) for t in times]


def _clock(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# --- the factors --------------------------------------------------------------------------------------------------------


class Company(TypedDict):
    """The rates of company, by their names in `HostRates`."""

    company_factor: dict[str, dict[str, tuple[float, float]]]
    company_call_seconds: dict[str, float]


def factors(found: list[InCompany]) -> Company:
    """The rates of company from timings of every kind of way.

    measured = predicted · factor of the kind and type, with so many threads + seconds of the kind, from tiny calls
    Medians, so that a disturbed shape moves nothing; a kind that was not run has neither.
    """
    off: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, t in sorted({(w.kind, w.dtype) for w in found if not w.tiny}):
        alike = [w for w in found if (w.kind, w.dtype, w.tiny) == (kind, t, False)]
        one, several = ([w.off for w in alike if (w.threads > 1) == more] for more in (False, True))
        off.setdefault(kind, {})[t] = (statistics.median(one or several), statistics.median(several or one))
    # of the machine more than of the kind: between the operators' turn and theirs its clock has changed
    common = [statistics.median(x[k] for table in off.values() for x in table.values()) if off else 0.0 for k in (0, 1)]
    made = {
        kind: {t: (_factor(x[0], common[0]), _factor(x[1], common[1])) for t, x in table.items()}
        for kind, table in off.items()
    }
    for table in made.values():
        # a type that was not run is taken to be like the other
        both = {**dict.fromkeys(("f32", "bf16"), next(iter(table.values()))), **table}
        table |= both | {"f16": both["bf16"]}
    return {"company_factor": made, "company_call_seconds": _calls(found, made)}


def _factor(off: float, common: float) -> float:
    return min(max(math.exp(common + OWN * (off - common)), LEAST), MOST)


def _calls(found: list[InCompany], made: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """What a call takes by itself, by the kind of way."""
    calls: dict[str, list[float]] = {}
    for w in found:
        if w.tiny:
            own = made.get(w.kind, {}).get(w.dtype, (1.0, 1.0))[w.threads > 1]
            calls.setdefault(w.kind, []).append(w.measured - own * w.predicted)
    if "our-sdpa" in calls:
        # on few queries it makes the same calls, and is not run twice
        calls.setdefault("our-slices", calls["our-sdpa"])
    return {kind: max(0.0, statistics.median(more)) for kind, more in sorted(calls.items())}


# --- the ways of a shape ------------------------------------------------------------------------------------------------


def ways(c: Cascade, shape: Workload, x: Mapping[str, torch.Tensor], d: Device) -> Iterator[Contender]:
    """What can run this attention on the CPU; of our mappings the best few by prediction.

    What needs a compiler is run where the shape asks for it and there is one.
    """
    sizes = shape.sizes
    yield Contender("original", original(shape, x), lambda d: predict_original(c, d, sizes))
    made = vendor.sdpa(c)
    made = vendor.sdpa(c, keyed=True) if isinstance(made, Refusal) else made
    if not isinstance(made, Refusal):
        yield Contender("sdpa", partial(_vendor, made, x, sizes), partial(_vendor_price, made, sizes))
    found = ranked_mappings(c, d, sizes)
    assert not isinstance(found, Obstacle), found
    for mapping in _different(found):
        yield Contender(f"our-{mapping.body}", ready(c, mapping, x, sizes), partial(_our_price, c, mapping, sizes))
    if "fused" in shape.compiled:
        yield from _fused(shape, x)
    if f"flex {c.tensor['Q'].dtype}" in shape.compiled and d.units == 1:
        # compiled anew for every type and number of threads, four seconds each
        yield from _flex(c, x, sizes)


# Tiles of the fused body here.
FUSED_TILES = TileMapping(32, 32, warps=1, stages=1, body="fused")


def _fused(shape: Workload, x: Mapping[str, torch.Tensor]) -> Iterator[Contender]:
    c = cascade(shape, next(t for t, d in DTYPE.items() if d == x["Q"].dtype), constant=True)
    kernel = cpu.build(c, FUSED_TILES)
    try:
        if not isinstance(kernel, Refusal):
            kernel.prepare()
            price = partial(_our_price, c, FUSED_TILES, shape.sizes)
            yield Contender("our-fused", ready(c, FUSED_TILES, x, shape.sizes), price)
    except CompilerError as no:
        warnings.warn(f"our fused body was not run: {no}", stacklevel=2)


def _flex(c: Cascade, x: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> Iterator[Contender]:
    made = vendor.flex(c)
    made = vendor.flex(c, keyed=True) if isinstance(made, Refusal) else made
    assert not isinstance(made, Refusal), made
    call = partial(_vendor, made, x, sizes)
    try:
        call()
    except RuntimeError as no:
        # Dynamo's too: a machine without a C++ compiler, or one that torch does not know, cannot run FlexAttention
        warnings.warn(f"FlexAttention was not run: {type(no).__name__}", stacklevel=2)
        return
    yield Contender("flex", call, partial(_vendor_price, made, sizes))


def _vendor(made: vendor.VendorCall, x: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> torch.Tensor:
    return made.run(x, sizes).contiguous()


def _vendor_price(made: vendor.VendorCall, sizes: Mapping[str, int], d: Device) -> Cost:
    use = vendor.use(made, d, sizes)
    assert isinstance(use, VendorUse), use
    return _known(predict_vendor(made.cascade, use, d, sizes))


def _our_price(c: Cascade, mapping: TileMapping, sizes: Mapping[str, int], d: Device) -> Cost:
    return _known(predict(c, mapping, d, sizes))


def _known(cost: Cost | Obstacle) -> Cost:
    assert isinstance(cost, Cost), cost
    return cost


def _different(found: tuple[tuple[TileMapping, Cost], ...], each: int = 2) -> Iterator[TileMapping]:
    """The best mappings of every body, which differ in their rows and make other calls."""
    seen: dict[str, set[int]] = {}
    costs: set[float] = set()
    for mapping, cost in found:
        rows = seen.setdefault(mapping.body, set())
        known = mapping.tile_p in rows or cost.seconds in costs
        if not known and len(rows) < each and cost.seconds < NEAR * found[0][1].seconds:
            rows.add(mapping.tile_p)
            costs.add(cost.seconds)
            yield mapping


def ready(c: Cascade, mapping: TileMapping, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> Call:
    """A call of our operator with everything laid out, as it stands in a rewritten graph."""
    operands, loose_sizes, text = [tensors[t.name] for t in c.inputs], [sizes[n] for n in loose(c)], program_text(c, mapping)
    return lambda: torch.ops.reattend.cascade.default(operands, loose_sizes, text)


def original(shape: Workload, x: Mapping[str, torch.Tensor]) -> Call:
    """The eager code, with its mask as a tensor that was made before."""
    p, m = torch.arange(shape.queries)[:, None] + shape.keys - shape.queries, torch.arange(shape.keys)
    kept = {
        "causal": m <= p, "window": (m <= p) & (p - m < shape.window), "prefix": (m <= p) | (m < PREFIX),
        "padding": x["Kept"][:, None, None] if "Kept" in x else None,
    }.get(shape.mask)

    def shared(t: torch.Tensor) -> torch.Tensor:
        b, h, n, e = t.shape
        return t if shape.group == 1 else t[:, :, None].expand(b, h, shape.group, n, e).reshape(b, -1, n, e)

    def run() -> object:
        s = (x["Q"] @ shared(x["K"]).mT) * shape.head**-0.5
        if "Bias" in x:
            s = s + x["Bias"]
        if kept is not None:
            s = torch.where(kept, s, LOWEST)
        return s.softmax(-1) @ shared(x["V"])

    return run


PREFIX = 100
LOWEST = -3e38


def cascade(shape: Workload, t: str, constant: bool = False) -> Cascade:
    """Softmax attention as the eager code computes it, all in the type of its inputs; `constant`: head sizes are numbers."""
    b, i = Builder({"e": shape.head, "f": shape.head} if constant else {}), ex.index
    if shape.queries == shape.keys:
        b.sizes |= {"m": b.extent("p")}
    q = b.input("Q", "bhpe", t)
    few, at = (b.extent("b"), b.extent("h") / shape.group, b.extent("m")), (i("b"), i("h") // shape.group, i("m"))
    k, v = b.given("K", (*few, b.extent("e")), (*at, i("e")), t), b.given("V", (*few, b.extent("f")), (*at, i("f")), t)
    s = b.put("QK", "bhpm", q * k, "add", "e") * shape.head**-0.5
    if shape.cap:
        s = ex.unary("tanh", s / shape.cap) * shape.cap
    if shape.mask == "bias":
        s = s + b.input("Bias", "hpm", t)
    elif shape.mask != "none":
        s = ex.where(_keep(b, shape), s, LOWEST)
    s = b.put("S", "bhpm", s)
    sn = b.put("SN", "bhpm", ex.exp(s - b.put("GM", "bhp", s, "max", "m")))
    b.put("O", "bhpf", b.put("A", "bhpm", sn / b.put("SD", "bhp", sn, "add", "m")) * v, "add", "m")
    return b.cascade(shape.mask, "O")


def _keep(b: Builder, shape: Workload) -> ex.Expr:
    m = ex.index("m")
    row = ex.index("p") + ex.symbol("past") if shape.keys > shape.queries else ex.index("p")
    match shape.mask:
        case "causal":
            return m <= row
        case "window":
            return (m <= row) & (row - m < shape.window)
        case "prefix":
            return (m <= row) | (m < PREFIX)
    return b.input("Kept", "bm", "b1")


def tensors(shape: Workload, t: str) -> dict[str, torch.Tensor]:
    """Random inputs; a padded batch keeps most of its keys, the last ones."""
    few = shape.heads // shape.group
    of = {"Q": (shape.heads, shape.queries), "K": (few, shape.keys), "V": (few, shape.keys)}
    out = {n: torch.randn(shape.batch, *s, shape.head, dtype=DTYPE[t]) for n, s in of.items()}
    if shape.mask == "bias":
        out["Bias"] = torch.randn(shape.heads, shape.queries, shape.keys, dtype=DTYPE[t])
    if shape.mask == "padding":
        out["Kept"] = (torch.arange(shape.keys) >= shape.keys // 9).repeat(shape.batch, 1)
    return out
