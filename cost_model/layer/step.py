"""A step of a whole model: what it takes and holds, from attentions that are priced elsewhere and the work around them.

    seconds   attention + products + experts + passes + exchanges, one after the other, as in a captured graph of launches
    memory    weights + caches + what one product reads and writes, beside two copies of the tokens
    tokens    decode: one a sequence and step; prefill: the first one, after the whole prompt

Attention is the subject, and priced as such; the rest is coarse: products by a roofline, passes by their bytes. Over a mesh
`tp` divides products as their `cut` says, `dp` and, in a prefill, `cp` their rows; attentions are divided evenly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..devices.device import Device
from ..devices.layers import ProductRates, layer_rates
from ..json import Json, Read
from ..mesh.capacity import RESERVE
from ..mesh.collectives import ALL_GATHER, ALL_REDUCE, Collective
from ..mesh.mesh import Mesh
from ..operations import WIDTH
from .products import Numbers, ProductShapes, expert_seconds, matrix_rate, product_seconds
from .work import COLUMNS, INNER, LayerProduct, LayerWork

# Bytes of an element of weights and of caches; int4 with a 16-bit scale for each 128 of them.
WEIGHT_TYPES: Mapping[str, float] = {"fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
CACHE_TYPES: Mapping[str, float] = {"fp8": 1.0, "int8": 1.0}
PARTS = ("attention", "products", "experts", "passes", "exchanges")
# How far passes and exchanges may be off, and products in a type without rows of its own: stated.
COARSE = 0.5
# Links of a switch reach every other device at once: an exchange takes so long, and half the rate of the links. A sum is
# made by everybody of all there is, or in two exchanges of parts. Source: all-reduce rows of aiconfigurator-core 0.12.0
# (vllm, captured) on two to eight H200: 4.4 to 4.7 us for a few bytes, 14 us for 0.5 MB and 2.0 ms for 268 MB on eight.
SWITCHED_BYTES_PER_S, SWITCHED_SECONDS, SWITCHED_SHARE = 2e11, 4.5e-6, 0.5


class StepError(ValueError):
    """A step that cannot be priced; the message is one sentence that says what can."""


@dataclass(frozen=True)
class Attended:
    """One attention of the step: seconds, of these the launch, and bytes of keys and values.

    `per_key`: these grow with the context; `held` are bytes that it holds while it runs. `heads` and `key_heads`: into how
    many parts its queries and its keys can be cut.
    """

    seconds: float
    launch: float
    band: float
    cache_bytes: int
    per_key: bool
    held: int = 0
    heads: int = 1
    key_heads: int = 1


@dataclass(frozen=True)
class Extent:
    """Tokens of a step: sequences, new tokens of each, keys of each; `generates`: the last token alone leads to the next."""

    batch: int
    tokens: int
    context: int
    generates: bool

    @property
    def phase(self) -> str:
        if not self.generates:
            return "forward"
        return "decode" if self.tokens == 1 else "prefill"


@dataclass(frozen=True)
class Types:
    """What weights of products and caches are stored in; "" as in the model. Raises StepError on an unknown type."""

    weights: str = ""
    cache: str = ""

    def __post_init__(self) -> None:
        for what, value, known in (("weights", self.weights, WEIGHT_TYPES), ("cache", self.cache, CACHE_TYPES)):
            if value and value not in known:
                raise StepError(f"{what} in {value!r} are not known: one of {', '.join(known)}, or none for the model's own")


@dataclass(frozen=True)
class ModelStep:
    """What one step takes and holds on each of `devices`. `parts` are seconds by part, which add up.

    `band`: from seconds / (1 + band) to seconds · (1 + band) is as predicted. `room_bytes`: what a device has for weights,
    caches and activations. The largest batch is that at this context, the largest context that at this batch: None where
    nothing grows with it.
    """

    phase: str
    batch: int
    tokens: int
    context: int
    parts: Mapping[str, float] = field(hash=False)
    band: float
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    room_bytes: int
    largest_batch: int | None
    largest_context: int | None
    devices: int = 1
    mesh: str = ""
    weights: str = ""
    cache: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences a second: new ones in decoding, else those of the prompts."""
        return self.batch * self.tokens / self.seconds

    @property
    def tokens_per_s_device(self) -> float:
        return self.tokens_per_s / self.devices

    @property
    def held_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        return self.held_bytes <= self.room_bytes

    def to_dict(self) -> dict[str, Json]:
        """Plain data, with what follows from it."""
        return vars(self) | {
            "parts": dict(self.parts), "seconds": self.seconds, "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_device": self.tokens_per_s_device, "fits": self.fits,
        }

    @staticmethod
    def from_dict(d: Read) -> ModelStep:
        """Read what `to_dict` wrote. Raises KeyError or TypeError on other data."""
        follows = ("seconds", "tokens_per_s", "tokens_per_s_device", "fits")
        return ModelStep(**{k: v for k, v in d.items() if k not in follows})


@dataclass(frozen=True)
class StepSpread:
    """How a step is divided: the mesh, bytes of caches on each device where they are known, seconds of exchanges of `cp`.

    `attention_seconds`: of all attentions on one device, where they run over latents as these are cached.
    """

    mesh: Mesh
    cache_bytes: int | None = None
    exchange_seconds: float = 0.0
    attention_seconds: float | None = None


def step(
    work: LayerWork, attended: Sequence[Attended], e: Extent, d: Device, types: Types | None = None,
    spread: StepSpread | None = None,
) -> ModelStep:
    """A step of a model whose sizes are given, on a GPU. Raises StepError for a device without rates of products."""
    types = types or Types()
    rates = layer_rates().get(d.name)
    if rates is None:
        raise StepError(f"products are not priced on {d.name}: one of {', '.join(layer_rates())}")
    mesh = spread.mesh if spread is not None else Mesh(())
    elsewhere = spread.attention_seconds if spread is not None else None
    work = work if elsewhere is None else work.without_keys()
    tp, dp, cp = (mesh.size(a) for a in ("tp", "dp", "cp"))
    if strange := sorted({a.heads for a in attended if a.heads % tp}):
        raise StepError(f"tp={tp} does not divide {strange[0]} heads of queries")
    rows = dp * (cp if e.tokens > 1 else 1)
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for part, seconds, band in _products(work, e, d, rates, types, tp, rows):
        sums[part].append((seconds, band))
    narrow = CACHE_TYPES[types.cache] / _cache_width(work) if types.cache else 1.0
    if elsewhere is not None:
        sums["attention"].append((elsewhere * narrow, max(d.band, COARSE)))
    for a in attended if elsewhere is None else ():
        # a step of decoding reads all keys of a device's heads, however few queries these have
        share = narrow / min(tp, a.key_heads) if e.tokens == 1 else 1 / tp
        sums["attention"].append((a.launch + max(0.0, a.seconds - a.launch) * share / (dp * cp), a.band))
    sums["passes"].append((_passes(work, d, rates["bf16"], tp, rows), COARSE))
    sums["exchanges"].append((_exchanges(work, e, d, mesh, rows) + (spread.exchange_seconds if spread else 0.0), COARSE))
    parts = {p: sum(s for s, _ in sums[p]) for p in PARTS if p in sums}
    whole = sum(parts.values())
    band = sum(s * b for pairs in sums.values() for s, b in pairs) / whole
    weights = sum(w.bytes(WEIGHT_TYPES.get(types.weights), tp) for w in work.weights)
    caches = [(narrow * a.cache_bytes / (min(tp, a.key_heads) * dp * cp), a.per_key) for a in attended]
    cache = sum(n for n, _ in caches)
    known = narrow * spread.cache_bytes / cache if spread is not None and spread.cache_bytes is not None and cache else 1.0
    active = max(_active(work, e, tp, rows), max((a.held for a in attended), default=0) / (tp * rows))
    room = (1 - RESERVE) * d.dram_bytes
    left = room - weights
    cache *= known
    growing = known * sum(n for n, per_key in caches if per_key)
    fixed = cache - growing
    if e.tokens > 1:
        growing += active
    else:
        fixed += active
    return ModelStep(
        e.phase, e.batch, e.tokens, e.context, parts, band, math.ceil(weights), math.ceil(cache), math.ceil(active),
        math.floor(room), _most(left, 0.0, cache + active, e.batch), _most(left, fixed, growing, e.context),
        mesh.devices, str(mesh), types.weights, types.cache,
    )


def _most(left: float, fixed: float, growing: float, now: int) -> int | None:
    """The largest number of what takes `growing` bytes for `now` of it."""
    return max(0, math.floor((left - fixed) / (growing / now))) if growing > 0 else None


def _cache_width(work: LayerWork) -> float:
    """Bytes of an element of the cache, which is in the type of most products."""
    widths: dict[str, int] = defaultdict(int)
    for p, n in work.products:
        widths[p.dtype] += n
    return WIDTH[max(widths, key=lambda d: widths[d])] if widths else 2


# --- seconds ----------------------------------------------------------------------------------------------------------


def _products(
    work: LayerWork, e: Extent, d: Device, rates: Mapping[str, ProductRates], types: Types, tp: int, rows: int
) -> Iterator[tuple[str, float, float]]:
    """Seconds and band of all products, then of all calls of experts."""
    plain: dict[tuple[str, bool], list[tuple[LayerProduct, int]]] = defaultdict(list)
    dealt: dict[tuple[object, ...], list[tuple[LayerProduct, int]]] = defaultdict(list)
    for p, n in work.products:
        if p.experts:
            dealt[p.rows, p.matrices, p.dtype].append((p, n))
        else:
            plain[p.dtype, p.weight and not p.last].append((p, n))
    for (dtype, narrowed), some in plain.items():
        how = _how(dtype, types.weights if narrowed else "", rates, "")
        x = _shapes([p for p, _ in some], e, tp, rows, how)
        times = np.array([n for _, n in some], np.float64)
        each = product_seconds(x, d, how.rates, matrix_rate(d, how.dtype))
        yield "products", float((each * times).sum()), how.band
    for some in dealt.values():
        p, least = some[0][0], min(n for _, n in some)
        how = _how(p.dtype, types.weights, rates, "experts_")
        shapes = [_shapes([q], e, tp, rows, how) for q, n in some for _ in range(n // least)]
        one = expert_seconds(shapes, d, how.rates, matrix_rate(d, how.dtype))
        yield "experts", float(one[0]) * least, how.band


@dataclass(frozen=True)
class _How:
    """What a product runs as: its rates, the type of its multiplications, bytes of an element of each side."""

    rates: ProductRates
    dtype: str
    given: float
    weights: float
    band: float


def _how(dtype: str, weights: str, rates: Mapping[str, ProductRates], of: str) -> _How:
    """fp8 multiplies in fp8 where the device has rows of it; other narrow weights are widened on their way."""
    width = float(WIDTH[dtype])
    if weights == "fp8" and (fp8 := rates.get(of + "fp8")) is not None:
        return _How(fp8, "fp8", 1.0, 1.0, fp8.band)
    plain = rates.get(of + "bf16", rates["bf16"])
    narrow = WEIGHT_TYPES.get(weights, width)
    known = dtype in ("bf16", "f16") and not weights
    return _How(plain, dtype, width, narrow, plain.band if known else max(COARSE, plain.band))


def _shapes(some: Sequence[LayerProduct], e: Extent, tp: int, rows: int, how: _How) -> ProductShapes:
    def column(values: Iterator[float]) -> Numbers:
        return np.array(list(values), np.float64)

    return ProductShapes(
        column(_rows(p, e, rows) for p in some), column(p.inner / (tp if p.cut == INNER else 1) for p in some),
        column(p.columns / (tp if p.cut == COLUMNS and p.weight else 1) for p in some),
        column(p.matrices / (tp if p.cut == COLUMNS and not p.weight else 1) for p in some),
        how.given, how.weights, float(WIDTH[some[0].dtype]),
    )


def _rows(p: LayerProduct, e: Extent, rows: int) -> float:
    """Rows on one device; where the next token follows, the last of each sequence alone leaves the model."""
    whole = e.batch if p.last and e.generates and p.rows == e.batch * e.tokens else p.rows
    return max(1.0, math.ceil(whole / rows)) if p.weight else whole


def _passes(work: LayerWork, d: Device, r: ProductRates, tp: int, rows: int) -> float:
    """A launch each, and their bytes."""
    moved = sum(n * (p.read + p.written) / (tp if p.cut else 1) for p, n in work.passes) / rows
    return sum(n for _, n in work.passes) * r.call_seconds + moved / (d.model.bandwidth_efficiency * d.dram_bytes_per_s)


def _exchanges(work: LayerWork, e: Extent, d: Device, mesh: Mesh, rows: int) -> float:
    """Sums behind cut products, of looked-up rows, and the gathering of logits."""
    if mesh.size("tp") == 1:
        return 0.0
    sums = [Collective(ALL_REDUCE, "tp", math.ceil(n / rows), "") for n, times in work.sums for _ in range(times)]
    sums += [Collective(ALL_REDUCE, "tp", x.payload, "") for x in sums[:1]]
    logits = [
        Collective(ALL_GATHER, "tp", math.ceil(_rows(p, e, rows) * p.columns * WIDTH[p.dtype] / mesh.size("tp")), "")
        for p, _ in work.products if p.last and p.cut == COLUMNS
    ]
    return sum(_exchange(x, d, mesh) for x in (*sums, *logits))


def _exchange(x: Collective, d: Device, mesh: Mesh) -> float:
    route = mesh.route("tp", d)
    if d.link_bytes_per_s < SWITCHED_BYTES_PER_S or route.outer > 1:
        return x.latency(route) + x.transfer(route)
    twice = x.kind == ALL_REDUCE
    parts = (1 + twice) * SWITCHED_SECONDS + x.transfer(route) / SWITCHED_SHARE
    whole = SWITCHED_SECONDS + (route.parts - 1) * x.payload / (d.link_bytes_per_s * SWITCHED_SHARE)
    return min(parts, whole) if twice else parts


# --- memory -----------------------------------------------------------------------------------------------------------


def _active(work: LayerWork, e: Extent, tp: int, rows: int) -> float:
    """Bytes of what the widest product reads and writes, beside two copies of the tokens."""
    widest = tokens = 0.0
    for p, _ in work.products:
        n = _rows(p, e, rows) * p.matrices if not p.experts else p.rows / rows
        width = WIDTH[p.dtype]
        given = p.inner / (tp if p.cut == INNER else 1)
        made = p.columns / (tp if p.cut == COLUMNS else 1)
        widest = max(widest, n * (given + made) * width)
        if p.weight and not p.last and not p.experts and p.cut == INNER:
            tokens = max(tokens, 2 * n * p.columns * width)
    return widest + tokens
