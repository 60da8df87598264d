"""The time model of a CPU: what PyTorch's operators, SDPA and our tiled bodies take, operator by operator.

    operator   = call + max(elements · seconds each, bytes / bandwidth) / threads' gain + first touch of fresh memory
    product    = call + FLOP / max(peak · rows / (rows + half), one row's) / threads' gain + bytes / bandwidth + first touch
    SDPA       = call + Σ pairs · (fixed + (E + F)·(each + once / rows)) / threads' gain        the fused CPU kernel
    between other calls: everything · a factor of the kind of way + what it takes until its code is back in the caches

Nothing overlaps: parts add up. Rates come from the device file or a calibration of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...patterns import expr as ex
from ...patterns.expr import Expr
from ...patterns.operators import OPERATORS
from ...patterns.terms.divisions import DIVISIONS
from ..count.eager import EagerOperator
from ..devices.device import Device, HostRates
from ..operations import EXPONENTIALS, MAXIMA, WIDTH
from .cost import Cost, bound_of

# ATen runs tensors below this many elements on one thread.
GRAIN = 32768
# The allocator gives its top back when twice its largest block is free: three blocks of this share, which die together.
FAIR = 0.85
# Bytes that a core keeps to itself.
CORE_CACHE = 1 << 20
# Keys of a block inside PyTorch's fused CPU kernel.
KEY_BLOCK = 512
# Keys that fill a vector register, whatever the machine: the kernels' products and their rows are the slower for a rest.
VECTOR = 16
# Element-wise operators by what a plain addition costs, on operands in the cache.
IN_ELEMENTS: Mapping[str, float] = dict.fromkeys(MAXIMA, 0.7)
# torch's vectorised exp is the unit; what was not timed costs about so many of them.
IN_EXPS: Mapping[str, float] = {o.name: o.effort.exps for o in OPERATORS.values()}


@dataclass
class Bill:
    """Seconds by resource, added up while a body is walked."""

    parts: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    exps: int = 0

    def add(self, name: str, seconds: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds

    def cost(self, d: Device, kind: str, dtype: str) -> Cost:
        """The cost of a way of this kind: original, sdpa, flex or our-BODY."""
        factor, more = company(d, kind, dtype)
        parts = {k: v * factor for k, v in self.parts.items() if v > 0}
        parts["launch"] = parts.get("launch", 0.0) + more
        by_bound: dict[str, float] = {}
        for k, v in parts.items():
            by_bound[bound_of({k: v})] = by_bound.get(bound_of({k: v}), 0.0) + v
        bound = bound_of(by_bound)
        return Cost(sum(parts.values()), bound, self.flops, self.bytes, self.exps, parts, d.basis, d.band)


def company(d: Device, kind: str, dtype: str) -> tuple[float, float]:
    """A call between other work, beside what the rates say that are timed over and over: a factor, and seconds more."""
    assert d.host is not None
    table = d.host.company_factor.get(kind, {})
    one, several = table.get(dtype) or table.get("f32") or (1.0, 1.0)
    return several if d.units > 1 else one, d.host.company_call_seconds.get(kind, 0.0)


class Host:
    """Prices of one machine."""

    def __init__(self, d: Device) -> None:
        if d.host is None:
            raise ValueError(f"device {d.name} has no host rates: it is no CPU")
        self.d, self.h = d, d.host
        self.threads = d.units

    def gain(self, kind: str, elements: float = math.inf) -> float:
        """What the threads bring over one for this class of work."""
        if self.threads < 2 or elements < GRAIN:
            return 1.0
        return self.h.scaling.get(kind, 1.0)

    # single operators

    def operator(self, o: EagerOperator, bill: Bill) -> None:
        """One eager operator whose result is fresh memory."""
        bill.flops += o.flops
        bill.exps += o.exps
        bill.bytes += o.read_bytes + o.written_bytes
        often = self.often(o.written_bytes)
        # a line is fetched before it is written, unless the first touch of its page has just put it into the cache
        moved = o.read_bytes + round(2 * (1 - often) * o.written_bytes)
        match o.kind:
            case "product":
                bill.add("launch", self.h.product_seconds)
                bill.add("matrix", self.product(o.batch, o.rows, o.columns, o.inner, o.dtype))
                bill.add("memory", self.stream(moved, o.points))
            case "softmax":
                bill.add("launch", self.h.operator_seconds)
                bill.add("exp", o.points * rate(self.h.softmax_seconds, o.dtype) / self.gain("element", o.points))
                bill.add("memory", self.stream(moved, o.points))
            case _:
                bill.add("launch", self.h.operator_seconds)
                self.point(o.name, o.dtype, o.points, moved, bill)
        bill.add("fault", self.fresh(o.written_bytes))

    def product(self, batch: int, rows: int, columns: int, inner: int, dtype: str) -> float:
        half = rate(self.h.gemm_half_rows, dtype)
        speed = max(self.d.matrix_rate(dtype) * rows / (rows + half), rate(self.h.row_flops_per_s, dtype))
        # what the threads share is the result, or the operand that few rows read
        return 2.0 * batch * rows * columns * inner / speed / self.gain("product", batch * columns * max(rows, inner))

    def stream(self, moved: float, points: float = math.inf, held: float | None = None) -> float:
        """Seconds in which operands come from memory or from the last cache; none where the core's own one holds them.

        `held`: the bytes that lie there, where some of them are read several times.
        """
        held = moved if held is None else held
        if held <= CORE_CACHE:
            return 0.0
        if held <= self.h.cache_bytes:
            return moved / self.h.cache_bytes_per_s / self.gain("element", points)
        return moved / self.d.dram_bytes_per_s / self.gain("memory", points)

    def point(self, name: str, dtype: str, points: int, moved: int, bill: Bill) -> None:
        """An element-wise operator; its operands lie in the cache or stream from memory."""
        gain = self.gain("element", points)
        if name in EXPONENTIALS:
            bill.add("exp", points * self.curve(name, dtype) / gain)
            bill.add("memory", self.stream(moved, points))
            return
        if each := self._apart(name, dtype):
            bill.add("element", points * each / gain)
            return
        if name == "where":
            # a branch for each element: nothing is fetched ahead of it
            bill.add("element", points * rate(self.h.where_seconds, dtype) / gain)
            bill.add("memory", self.stream(moved, points))
            return
        busy = points * rate(self.h.element_seconds, dtype) * IN_ELEMENTS.get(name, 1.0) / gain
        stream = self.stream(moved, points)
        bill.add("memory" if stream > busy else "element", max(stream, busy))

    def _apart(self, name: str, dtype: str) -> float:
        """Seconds of an element that is no vector's; 0 for all others."""
        if name == "gather":
            return self.h.gather_seconds
        if name == "transpose":
            return self.h.transpose_seconds
        return self.h.division_seconds if name in DIVISIONS and dtype in ex.INTEGERS else 0.0

    def curve(self, name: str, dtype: str) -> float:
        """Seconds of an element of an exponential, or of what is made of exponentials."""
        if name in self.h.curve_seconds:
            return rate(self.h.curve_seconds[name], dtype)
        return rate(self.h.exp_seconds, dtype) * IN_EXPS.get(name, 1.0)

    def often(self, size: int) -> float:
        """How often a block of this size is new: a large one every time, a fair one every second time."""
        return 1.0 if size >= self.h.fault_bytes else 0.5 if size >= FAIR * self.h.fault_bytes else 0.0

    def fresh(self, size: int) -> float:
        """The first touch of a result's pages."""
        return self.often(size) * size * self.h.fault_seconds_per_byte / self.gain("fault")

    def terms(self, e: Expr, extent: Mapping[str, int], bill: Bill) -> None:
        """A term evaluated eagerly, operator by operator, each over its own ranks, in fresh memory."""
        for t in ex.walk(e):
            if t.op in ("const", "index", "symbol", "load") or not t.ranks:
                continue
            points = math.prod(extent[r] for r in t.ranks)
            bill.add("launch", self.h.operator_seconds)
            self.point(t.op, t.dtype, points, points * WIDTH[t.dtype], bill)
            bill.add("fault", self.fresh(points * WIDTH[t.dtype]))

    def chosen(self, keep: Expr, extent: Mapping[str, int], bill: Bill) -> None:
        """What is added to scores, made from a predicate: it is widened, moved to 0 and −1, and multiplied by the fill."""
        self.terms(keep, extent, bill)
        points = math.prod(extent[r] for r in keep.ranks)
        for _ in range(3):
            bill.add("launch", self.h.operator_seconds)
            self.point("mul", "f32", points, points * WIDTH["f32"], bill)

    def biases(self, read: Sequence[tuple[str, int]], part: float, bill: Bill, *, chosen: bool) -> None:
        """Biases in fp32 as a mask of numbers, a `part` of them at a time: widened, and `chosen` by a predicate."""
        wide = WIDTH["f32"]
        for dtype, n in read:
            widened = WIDTH[dtype] < wide
            each = widened * rate(self.h.element_seconds, dtype) + chosen * rate(self.h.where_seconds, "f32")
            written, size = widened + chosen, round(n * part * wide)
            bill.add("element", n * each / self.gain("element", n * part))
            moved = n * (WIDTH[dtype] + 2 * (1 - self.often(size)) * wide * written)
            bill.add("memory", self.stream(moved, n * part, moved * part) if written else 0.0)
            bill.add("fault", written * self.fresh(size) / max(part, 1e-9))

    # the fused attention kernel

    def attention(
        self, batch: int, rows: int, keys: int, e: int, f: int, dtype: str, bill: Bill, *, masked: bool = False,
        causal: bool = False, group: int = 1, mask_dtype: str = "",
    ) -> None:
        """One call of the fused kernel on [batch, rows] queries and `keys` keys each, which `group` of the batch share.

        `causal`: its own causal mode. `mask_dtype`: of a mask of numbers, where it is not the operands'.
        """
        fixed, each = pair_seconds(self.h, dtype, rows)
        pairs = batch * (causal_pairs(rows, keys) if causal else rows * keys)
        block = query_block(rows)
        gain = balanced(self.gain("attention"), self.threads, batch * -(-rows // block))
        far = rows * keys * WIDTH["f32"] > CORE_CACHE
        masks = self.h.attention_far_mask_seconds if far else self.h.attention_mask_seconds
        mask = rate(masks, mask_dtype or dtype) if masked else 0.0
        walked = pairs / max(rows * keys, 1) * -(-keys // KEY_BLOCK) * rows * rate(self.h.attention_row_seconds, dtype)
        left = batch * last_rows(rows, keys, causal) * rate(self.h.attention_left_seconds, dtype) if keys % VECTOR else 0.0
        head = keys * (e + f) * WIDTH[dtype]
        bill.add("launch", self.h.attention_seconds + (self.h.mask_seconds if masked else 0.0))
        bill.add("matrix", pairs * each * (e + f) / gain)
        bill.add("exp", (pairs * (fixed + mask) + walked + left) / gain)
        bill.add("memory", self.stream(batch // group * head))
        # every block of queries after the first reads the keys of its head again
        share = pairs / max(batch * rows * keys, 1)
        bill.add("memory", self.stream(batch * (-(-rows // block) - 1) * head * share, held=head))


def rate(table: Mapping[str, float], dtype: str) -> float:
    """The entry of a type; f32's where a type has none."""
    return table.get(dtype, table["f32"])


def query_block(rows: int) -> int:
    """Rows of the query block inside PyTorch's fused CPU kernel (ATen/native/cpu/FlashAttentionKernel.cpp)."""
    return 256 if rows >= 768 else 64 if rows >= 192 else 32


def causal_pairs(queries: int, keys: int) -> int:
    """Pairs of the fused kernel's is_causal: a query block walks whole key blocks until it has passed its last row."""
    block = query_block(queries)
    total = 0
    for start in range(0, queries, block):
        end = min(start + block, queries)
        walked = -(-min(end, keys) // KEY_BLOCK) * KEY_BLOCK
        total += (end - start) * min(walked, keys)
    return total


def last_rows(queries: int, keys: int, causal: bool) -> int:
    """Rows of the fused kernel that reach the last block of keys."""
    if not causal:
        return queries
    block, start = query_block(queries), (keys - 1) // KEY_BLOCK * KEY_BLOCK
    return max(0, queries - start // block * block)


def pair_seconds(h: HostRates, dtype: str, rows: int) -> tuple[float, float]:
    """(fixed, per element of e + f) seconds of a pair: what is laid out for a key is shared by the rows of a call.

    Fewer rows than a block lie between the measured numbers on a logarithmic scale.
    """
    table = h.attention_pair_seconds.get(dtype) or h.attention_pair_seconds["f32"]
    key = rate(h.attention_key_seconds, dtype)
    if rows >= 32:
        fixed, each = table[query_block(rows)]
        return fixed, each + key / rows
    whole = {**table, 32: (table[32][0], table[32][1] + key / 32)}
    low = max(r for r in whole if r <= rows)
    high = min(r for r in whole if r > rows)
    t = math.log(rows / low) / math.log(high / low)
    (a, b), (c, d) = whole[low], whole[high]
    return a + t * (c - a), _between(b, d, t)


def _between(a: float, b: float, t: float) -> float:
    return float(math.exp((1 - t) * math.log(a) + t * math.log(b))) if a > 0 and b > 0 else a + t * (b - a)


def balanced(gain: float, threads: int, units: int) -> float:
    """The gain of threads that share `units` equal pieces: the last round may leave some idle."""
    if threads < 2 or units < 1:
        return 1.0
    rounds = -(-units // threads)
    return max(1.0, gain * units / (rounds * threads))


def original(operators: Sequence[EagerOperator], d: Device) -> Cost:
    """The original code: every operator after the other."""
    host, bill = Host(d), Bill()
    for o in operators:
        host.operator(o, bill)
    return bill.cost(d, "original", operators[-1].dtype if operators else "f32")
