"""Steps priced at many sizes at once: each part a column of seconds over the points.

Attention is the subject, and priced elsewhere; the rest is coarse: products by a roofline, passes by their bytes. Over a
mesh `tp` divides products as their `cut` says, `dp` and, in a prefill, `cp` their rows; attentions are divided evenly.

    StepColumns(work, extents, attended, …).on(device, types, spread)   →   a ModelStep a point

A point alone has the same numbers as among others: every sum goes over parts, one after the other, never over points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..columns import Numbers, SizeColumns
from ..devices.device import Device
from ..devices.layers import ProductRates, layer_rates
from ..mesh.capacity import RESERVE
from ..mesh.collectives import ALL_GATHER, ALL_REDUCE
from ..mesh.mesh import Mesh, Route
from ..operations import WIDTH
from .exchange import exchange_seconds
from .products import ProductShapes, expert_seconds, matrix_rate, product_seconds
from .step import CACHE_TYPES, PARTS, WEIGHT_TYPES, Attended, Extent, ModelStep, StepError, StepSpread, Types
from .work import COLUMNS, INNER, LayerProduct, LayerWork

# How far passes and exchanges may be off, and products in a type without rows of its own: stated.
COARSE = 0.5


@dataclass(frozen=True, eq=False)
class _Site:
    """One attention as columns."""

    seconds: Numbers
    launch: Numbers
    band: Numbers
    cache_bytes: Numbers
    held: Numbers
    heads: Numbers
    key_heads: Numbers
    per_key: bool

    @staticmethod
    def of(some: Sequence[Attended]) -> _Site:
        def column(of: Callable[[Attended], float]) -> Numbers:
            return np.array([of(a) for a in some], np.float64)

        return _Site(
            column(lambda a: a.seconds), column(lambda a: a.launch), column(lambda a: a.band),
            column(lambda a: a.cache_bytes), column(lambda a: a.held), column(lambda a: a.heads),
            column(lambda a: a.key_heads), some[0].per_key,
        )


@dataclass(frozen=True, eq=False)
class Attentions:
    """The attentions of a step at its points: the distinct ones, and which of them each layer is, in order."""

    sites: tuple[_Site, ...]
    layers: tuple[int, ...]

    @staticmethod
    def of(sites: Sequence[Sequence[Attended]], layers: Sequence[int]) -> Attentions:
        """`sites`: of each distinct attention what it is at every point."""
        return Attentions(tuple(map(_Site.of, sites)), tuple(layers))

    def __iter__(self) -> Iterator[_Site]:
        return (self.sites[i] for i in self.layers)


def step(
    work: LayerWork, attended: Sequence[Attended], e: Extent, d: Device, types: Types | None = None,
    spread: StepSpread | None = None,
) -> ModelStep:
    """A step of a model whose sizes are given, on a GPU. Raises StepError for a device without rates of products."""
    kinds = list(dict.fromkeys(attended))
    sites = Attentions.of([[a] for a in kinds], [kinds.index(a) for a in attended])
    (made,) = StepColumns(work, SizeColumns({}, 1), (e,)).on(sites, d, types or Types(), spread)
    if isinstance(made, str):
        raise StepError(made)
    return made


class StepColumns:
    """The work of a step at many points, of which all have new tokens, or each sequence has one.

    `extents` at each of the points of `at`. Raises ValueError where a size of the work has no value.
    """

    def __init__(self, work: LayerWork, at: SizeColumns, extents: Sequence[Extent]) -> None:
        self.work, self.at, self.extents = work, at, tuple(extents)
        self.generates, self.decodes = self.extents[0].generates, self.extents[0].tokens == 1
        self.batch, self.tokens, self.context = (
            np.array([float(getattr(e, name)) for e in self.extents]) for name in ("batch", "tokens", "context")
        )

    def on(
        self, sites: Attentions, d: Device, types: Types, spread: StepSpread | None, over_latents: bool = False
    ) -> tuple[ModelStep | str, ...]:
        """The step at each point, or why there is none. Raises StepError for a device without rates of products.

        `over_latents`: the attentions run on what is cached, so that no keys from before are made again.
        """
        rates = layer_rates().get(d.name)
        if rates is None:
            raise StepError(f"products are not priced on {d.name}: one of {', '.join(layer_rates())}")
        return _Priced(self, sites, d, rates, types, spread, over_latents).steps()


class _Priced:
    """One pricing: the points of a step on a device, over a mesh."""

    def __init__(
        self, x: StepColumns, sites: Attentions, d: Device, rates: Mapping[str, ProductRates], types: Types,
        spread: StepSpread | None, over_latents: bool,
    ) -> None:
        self.x, self.sites, self.d, self.rates, self.types, self.spread = x, sites, d, rates, types, spread
        self.mesh = spread.mesh if spread is not None else Mesh(())
        self.tp, self.dp, self.cp = (self.mesh.size(a) for a in ("tp", "dp", "cp"))
        self.rows = self.dp * (1 if x.decodes else self.cp)
        self.elsewhere = spread.attention_seconds if spread is not None else None
        self.latents = over_latents or self.elsewhere is not None
        self.work = x.work.without_keys() if self.latents else x.work
        self.narrow = CACHE_TYPES[types.cache] / _cache_width(self.work) if types.cache else 1.0

    def steps(self) -> tuple[ModelStep | str, ...]:
        parts, band = self.parts()
        weights = sum(w.bytes(WEIGHT_TYPES.get(self.types.weights), self.tp) for w in self.work.weights)
        cache, growing = self.caches()
        active = self.active()
        room = (1 - RESERVE) * self.d.dram_bytes
        left, fixed = room - weights, cache - growing
        growing, fixed = (growing, fixed + active) if self.x.decodes else (growing + active, fixed)
        batches = _most(left, np.zeros_like(fixed), cache + active, self.x.batch)
        contexts = _most(left, fixed, growing, self.x.context)
        refused = self.refused()
        seconds = [dict(zip(parts, row)) for row in zip(*(p.tolist() for p in parts.values()))]
        held = [[math.ceil(n) for n in column.tolist()] for column in (cache, active)]
        common = math.floor(room), self.mesh.devices, str(self.mesh), self.types.weights, self.types.cache, self.latents
        return tuple(
            refused[i] or ModelStep(
                e.phase, e.batch, e.tokens, e.context, seconds[i], b, math.ceil(weights), held[0][i], held[1][i],
                common[0], batches[i], contexts[i], *common[1:],
            )
            for i, (e, b) in enumerate(zip(self.x.extents, band.tolist()))
        )

    def refused(self) -> list[str]:
        """Why there is no step at a point; "" where there is one."""
        out = [""] * len(self.x.extents)
        for s in self.sites.sites:
            for i in np.nonzero(s.heads % self.tp)[0].tolist():
                least = min(int(t.heads[i]) for t in self.sites.sites if t.heads[i] % self.tp)
                out[i] = f"tp={self.tp} does not divide {least} heads of queries"
        return out

    # --- seconds ------------------------------------------------------------------------------------------------------

    def parts(self) -> tuple[dict[str, Numbers], Numbers]:
        """Seconds by part, and the band of their sum."""
        sums: dict[str, list[tuple[Numbers, Numbers | float]]] = defaultdict(list)
        for part, seconds, band in self.products():
            sums[part].append((seconds, band))
        sums["attention"] += self.attention()
        sums["passes"].append((self.passes(), COARSE))
        exchanged = self.exchanges() + (self.spread.exchange_seconds if self.spread else 0.0)
        sums["exchanges"].append((exchanged, COARSE))
        nothing = np.zeros(len(self.x.extents))
        parts = {p: sum((s for s, _ in sums[p]), nothing) for p in PARTS if p in sums}
        whole = sum(parts.values(), nothing)
        return parts, sum((s * b for pairs in sums.values() for s, b in pairs), nothing) / whole

    def attention(self) -> list[tuple[Numbers, Numbers | float]]:
        if self.elsewhere is not None:
            return [(np.full(len(self.x.extents), self.elsewhere * self.narrow), max(self.d.band, COARSE))]
        made: list[tuple[Numbers, Numbers | float]] = []
        for s in self.sites.sites:
            # a step of decoding reads all keys of a device's heads, however few queries these have
            share = self.narrow / np.minimum(self.tp, s.key_heads) if self.x.decodes else 1 / self.tp
            spread = np.maximum(0.0, s.seconds - s.launch) * share / (self.dp * self.cp)
            made.append((s.launch + spread, s.band))
        return [made[i] for i in self.sites.layers]

    def products(self) -> Iterator[tuple[str, Numbers, float]]:
        """Seconds and band of all products, then of all calls of experts."""
        plain: dict[tuple[str, bool], list[tuple[LayerProduct, int]]] = defaultdict(list)
        dealt: dict[tuple[object, ...], list[tuple[LayerProduct, int]]] = defaultdict(list)
        for p, n in self.work.products:
            if p.experts:
                dealt[p.rows, p.matrices, p.dtype].append((p, n))
            else:
                plain[p.dtype, p.weight and not p.last].append((p, n))
        for (dtype, narrowed), some in plain.items():
            how = _how(dtype, self.types.weights if narrowed else "", self.rates, "")
            each = product_seconds(self.shapes([p for p, _ in some], how), self.d, how.rates, matrix_rate(self.d, how.dtype))
            yield "products", sum((row * n for row, (_, n) in zip(each, some)), np.zeros(self.x.at.n)), how.band
        for some in dealt.values():
            p, least = some[0][0], min(n for _, n in some)
            how = _how(p.dtype, self.types.weights, self.rates, "experts_")
            shapes = [self.shapes([q], how) for q, n in some for _ in range(n // least)]
            one = expert_seconds(shapes, self.d, how.rates, matrix_rate(self.d, how.dtype))
            yield "experts", one[0] * least, how.band

    def shapes(self, some: Sequence[LayerProduct], how: _How) -> ProductShapes:
        """Products as [products, points]."""
        of = self.x.at.of
        return ProductShapes(
            np.stack([self.product_rows(p) for p in some]),
            np.stack([of(p.inner) / (self.tp if p.cut == INNER else 1) for p in some]),
            np.stack([of(p.columns) / (self.tp if p.cut == COLUMNS and p.weight else 1) for p in some]),
            np.stack([of(p.matrices) / (self.tp if p.cut == COLUMNS and not p.weight else 1) for p in some]),
            how.given, how.weights, float(WIDTH[some[0].dtype]),
        )

    def product_rows(self, p: LayerProduct) -> Numbers:
        """Rows on one device; where the next token follows, the last of each sequence alone leaves the model."""
        whole = self.x.at.of(p.rows)
        if p.last and self.x.generates:
            whole = np.where(whole == self.x.batch * self.x.tokens, self.x.batch, whole)
        return np.maximum(1.0, np.ceil(whole / self.rows)) if p.weight else whole

    def passes(self) -> Numbers:
        """A launch each, and their bytes."""
        of, d, call = self.x.at.of, self.d, self.rates["bf16"].call_seconds
        bytes_ = (n * (of(p.read) + of(p.written)) / (self.tp if p.cut else 1) for p, n in self.work.passes)
        moved = sum(bytes_, np.zeros(self.x.at.n)) / self.rows
        return sum(n for _, n in self.work.passes) * call + moved / (d.model.bandwidth_efficiency * d.dram_bytes_per_s)

    def exchanges(self) -> Numbers:
        """Sums behind cut products, of looked-up rows, and the gathering of logits."""
        out = np.zeros(self.x.at.n)
        if self.tp == 1:
            return out
        route: Route = self.mesh.route("tp", self.d)
        sums = [(np.ceil(self.x.at.of(n) / self.rows), times) for n, times in self.work.sums]
        each = [(exchange_seconds(ALL_REDUCE, payload, self.d, route), times) for payload, times in sums]
        for seconds, times in [*each, *((s, 1) for s, _ in each[:1])]:
            for _ in range(times):
                out = out + seconds
        for p, _ in self.work.products:
            if p.last and p.cut == COLUMNS:
                payload = np.ceil(self.product_rows(p) * self.x.at.of(p.columns) * WIDTH[p.dtype] / self.tp)
                out = out + exchange_seconds(ALL_GATHER, payload, self.d, route)
        return out

    # --- memory -------------------------------------------------------------------------------------------------------

    def caches(self) -> tuple[Numbers, Numbers]:
        """Bytes of all caches on one device, and of those that grow with the context."""
        nothing = np.zeros(len(self.x.extents))
        of = [self.narrow * s.cache_bytes / (np.minimum(self.tp, s.key_heads) * self.dp * self.cp) for s in self.sites.sites]
        cache = sum((of[i] for i in self.sites.layers), nothing)
        growing = sum((of[i] for i in self.sites.layers if self.sites.sites[i].per_key), nothing)
        if self.spread is None or self.spread.cache_bytes is None:
            return cache, growing
        known = np.divide(self.narrow * self.spread.cache_bytes, cache, out=np.ones_like(cache), where=cache > 0)
        return cache * known, growing * known

    def active(self) -> Numbers:
        """Bytes of what the widest product reads and writes beside two copies of the tokens, or of the widest attention."""
        of = self.x.at.of
        widest, tokens = np.zeros(self.x.at.n), np.zeros(self.x.at.n)
        for p, _ in self.work.products:
            n = of(p.rows) / self.rows if p.experts else self.product_rows(p) * of(p.matrices)
            given = of(p.inner) / (self.tp if p.cut == INNER else 1)
            made = of(p.columns) / (self.tp if p.cut == COLUMNS else 1)
            widest = np.maximum(widest, n * (given + made) * WIDTH[p.dtype])
            if p.weight and not p.last and not p.experts and p.cut == INNER:
                tokens = np.maximum(tokens, 2 * n * of(p.columns) * WIDTH[p.dtype])
        held = np.zeros(len(self.x.extents))
        for s in self.sites.sites:
            held = np.maximum(held, s.held)
        return np.maximum(widest + tokens, held / (self.tp * self.rows))


def _most(left: float, fixed: Numbers, growing: Numbers, now: Numbers) -> list[int | None]:
    """The largest number of what takes `growing` bytes for `now` of it."""
    each = growing / now
    found = np.divide(left - fixed, each, out=np.zeros_like(each), where=each > 0)
    return [max(0, math.floor(x)) if g > 0 else None for x, g in zip(found.tolist(), growing.tolist())]


def _cache_width(work: LayerWork) -> float:
    """Bytes of an element of the cache, which is in the type of most products."""
    widths: dict[str, int] = defaultdict(int)
    for p, n in work.products:
        widths[p.dtype] += n
    return WIDTH[max(widths, key=lambda d: widths[d])] if widths else 2


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
