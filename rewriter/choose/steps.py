"""The step of a whole model: attentions as they were decided, and the work of its graphs around them, priced together.

    Steps(work, places)  →  .at(sizes of many points)  →  .on(device, sites)  →  .over(mesh, types): a step a point

What follows of the graph alone is derived once, what follows of sizes once for all devices, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from ...cost_model.columns import SizeColumns
from ...cost_model.devices.device import Device
from ...cost_model.layer.step import Attended, Extent, ModelStep, StepError, StepSpread, Types
from ...cost_model.layer.steps import Attentions, StepColumns
from ...cost_model.layer.work import LayerProduct, LayerWork
from ...cost_model.mesh.mesh import Mesh, parse
from ...cost_model.mesh.plan import MeshPlan
from ...cost_model.sites.site import Site
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Size
from ..find.place import Place
from .latents import LATENT

# Steps at the points of a device over a mesh, weights and caches stored in these types: one a point, or why there is none.
Over: TypeAlias = Callable[[MeshPlan | Mesh | None, Types], tuple[ModelStep | str, ...]]


@dataclass(frozen=True, eq=False)
class _Kind:
    """Attentions that differ by where they stand: the place of the first, and sizes of its parts."""

    place: Place
    queries: Size
    keys: Size
    batch: tuple[Size, ...]
    keyed: tuple[Size, ...] | None

    @staticmethod
    def of(p: Place) -> _Kind:
        view = attention(p.cascade)
        assert isinstance(view, Attention), view
        size, ranks = {r.name: r.size for r in view.cascade.ranks}, {*view.batch}
        keyed: tuple[Size, ...] | None = None
        for load in ex.loads(view.products[0].body):
            if view.key in load.ranks and load.attr in view.cascade.tensor:
                shape = view.cascade.tensor[str(load.attr)].shape
                keyed = tuple(n for term, n in zip(load.args, shape) if term.ranks and term.ranks <= ranks)
        return _Kind(p, size[view.query], size[view.key], tuple(size[r] for r in view.batch), keyed)

    def known(self, at: SizeColumns) -> SizeColumns:
        """The points with the symbols of its cascade, as `Place.sizes` binds them at one."""
        scalars = {name: size for name, size, _ in self.place.scalars}
        return at.with_values(scalars, {name: traced for name, _, traced in self.place.scalars if traced is not None})


class Steps:
    """The steps of a captured model; `work`: of its graphs, or why there is none."""

    def __init__(self, work: Sequence[LayerWork | str], places: Sequence[Place]) -> None:
        self._work, self._places = tuple(work), places

    @cached_property
    def _kinds(self) -> tuple[tuple[_Kind, ...], tuple[int, ...]]:
        """The kinds of attentions, and which of them each place is."""
        found: dict[Place, int] = {}
        order = tuple(found.setdefault(replace(p, name="", where=""), len(found)) for p in self._places)
        return tuple(map(_Kind.of, found)), order

    @cached_property
    def _joined(self) -> LayerWork:
        graphs = [w for w in self._work if isinstance(w, LayerWork)]
        return LayerWork(
            *(tuple(x for w in graphs for x in getattr(w, part)) for part in ("products", "passes", "sums", "weights"))
        )

    def at(self, points: Sequence[Mapping[str, int]]) -> StepsAt:
        """The steps at sizes of the graph's symbols."""
        said = [w for w in self._work if isinstance(w, str)]
        why = said[0] if said else "" if self._joined.products else "the graph has no product outside of its attentions"
        return StepsAt(self._joined, *self._kinds, points, why)


class StepsAt:
    """The steps of a model at many points; `why` says why there is none at any."""

    def __init__(
        self, work: LayerWork, kinds: tuple[_Kind, ...], order: tuple[int, ...], points: Sequence[Mapping[str, int]],
        why: str,
    ) -> None:
        self._work, self._kinds, self._order, self._points, self._why = work, kinds, order, points, why
        self._n = len(points)
        self._at = SizeColumns({name: [p[name] for p in points] for name in points[0]}, self._n)

    def on(self, d: Device, sites: Sequence[Sequence[Site]]) -> Over:
        """The steps on a device with these sites at each point."""
        if not d.is_gpu:
            return self._none(f"the whole model is priced on GPUs: {d.name} is none")
        if self._why:
            return self._none(self._why)
        try:
            groups = [_Group.of(self, d, sites, some) for some in self._alike(sites)]
        except (StepError, ValueError) as no:
            return self._none(str(no)) if self._n == 1 else self._apart(d, sites)
        return lambda sharding, types: self._joined(groups, sharding, types)

    def _none(self, why: str) -> Over:
        return lambda sharding, types: (why,) * self._n

    def _apart(self, d: Device, sites: Sequence[Sequence[Site]]) -> Over:
        """Point by point, where one of them has no step."""
        each = [
            StepsAt(self._work, self._kinds, self._order, [p], self._why).on(d, [s]) for p, s in zip(self._points, sites)
        ]
        return lambda sharding, types: tuple(over(sharding, types)[0] for over in each)

    def _joined(
        self, groups: Sequence[_Group], sharding: MeshPlan | Mesh | None, types: Types
    ) -> tuple[ModelStep | str, ...]:
        out: list[ModelStep | str] = [""] * self._n
        for g in groups:
            try:
                made: Sequence[ModelStep | str] = g.priced(sharding, types)
            except (StepError, ValueError) as no:
                made = [str(no)] * len(g.points)
            for i, m in zip(g.points, made):
                out[i] = m
        return tuple(out)

    def _alike(self, sites: Sequence[Sequence[Site]]) -> list[list[int]]:
        """Points whose steps are of one phase."""
        generates = [bool(some) and all(s.traits & {"causal", "decode"} for s in some) for some in sites]
        found: dict[tuple[bool, bool], list[int]] = {}
        for i, e in enumerate(self._extents):
            if isinstance(e, str):
                raise StepError(e)
            found.setdefault((generates[i], e.tokens == 1), []).append(i)
        return list(found.values())

    @cached_property
    def _lengths(self) -> list[list[tuple[int, int]]]:
        """At each point the queries and keys of every kind of attention."""
        known = [k.known(self._at) for k in self._kinds]
        columns = [(c.integers(k.queries), c.integers(k.keys)) for k, c in zip(self._kinds, known)]
        return [[(int(q[i]), int(m[i])) for q, m in columns] for i in range(self._n)]

    @cached_property
    def _extents(self) -> list[Extent | str]:
        """How many sequences, new tokens and keys a step has: tokens are the rows of most products, the longest sequence
        of queries that divides them is one of theirs.
        """
        some = [(self._at.integers(p.rows), n) for p, n in self._work.products if _of_tokens(p)]
        out: list[Extent | str] = []
        for i in range(self._n):
            rows: dict[int, int] = {}
            for column, n in some:
                rows[column[i]] = rows.get(column[i], 0) + n
            out.append(_extent(max(rows, key=lambda r: (rows[r], r)) if rows else 1, self._lengths[i]))
        return out

    @cached_property
    def heads(self) -> list[list[tuple[int, int]]]:
        """At each point how many heads of queries and of keys each sequence has, of every kind of attention."""
        out: list[list[tuple[int, int]]] = [[] for _ in range(self._n)]
        for k in self._kinds:
            known = k.known(self._at)
            heads, keys = (_product(known, some) for some in (k.batch, () if k.keyed is None else k.keyed))
            for i, e in enumerate(self._extents):
                batch = 1 if isinstance(e, str) else e.batch
                out[i].append((max(1, heads[i] // batch), max(1, keys[i] // batch)))
        return out

    def group(self, some: Sequence[int], generates: bool) -> StepColumns:
        """The work at some of the points."""
        points = [self._points[i] for i in some]
        extents = [replace(e, generates=generates) for e in (self._extents[i] for i in some) if isinstance(e, Extent)]
        at = self._at if len(some) == self._n else SizeColumns({x: [p[x] for p in points] for x in points[0]}, len(points))
        return StepColumns(self._work, at, extents)

    def layers(self, sites: Sequence[Site]) -> list[int]:
        """Of which kind each site is; recurrences are of a kind that stands behind those of attentions."""
        return [*self._order, *[len(self._kinds)] * (len(sites) - len(self._order))]


@dataclass(frozen=True, eq=False)
class _Group:
    """Points of one phase on a device."""

    points: list[int]
    work: StepColumns
    sites: Attentions
    over_latents: Attentions | None
    device: Device

    def priced(self, sharding: MeshPlan | Mesh | None, types: Types) -> Sequence[ModelStep | str]:
        """A step a point; where attentions decode over cached latents, as engines run them, if that is faster.

        How heads that are divided over devices share latents is for the ways of a mesh to say.
        """
        spread = _spread(sharding)
        made = self.work.on(self.sites, self.device, types, spread)
        apart = isinstance(sharding, MeshPlan) or (spread is not None and spread.mesh.size("tp") > 1)
        if self.over_latents is None or apart:
            return made
        others = self.work.on(self.over_latents, self.device, types, spread, over_latents=True)
        return [b if _faster(a, b) else a for a, b in zip(made, others)]

    @staticmethod
    def of(at: StepsAt, d: Device, sites: Sequence[Sequence[Site]], some: list[int]) -> _Group:
        first = sites[some[0]]
        generates = bool(first) and all(s.traits & {"causal", "decode"} for s in first)
        kinds = at.layers(first)
        # layers that are the same at every point are one
        columns: dict[tuple[int, ...], int] = {}
        order: list[int] = []
        distinct: list[list[Attended]] = []
        for layer, kind in enumerate(kinds):
            key = (kind, *(id(sites[i][layer]) for i in some))
            if key not in columns:
                columns[key] = len(distinct)
                heads = [at.heads[i][kind] if kind < len(at.heads[i]) else (1, 1) for i in some]
                distinct.append([_attended(sites[i][layer], d, *h) for i, h in zip(some, heads)])
            order.append(columns[key])
        latent: Attentions | None = None
        if any(LATENT in {c.name for c in s.candidates} for s in first):
            there = [[_over_latents(sites[i][layer], a) for i, a in zip(some, of)] for layer, of in _firsts(order, distinct)]
            latent = Attentions.of(there, order)
        return _Group(some, at.group(some, generates), Attentions.of(distinct, order), latent, d)


def _firsts(order: Sequence[int], distinct: Sequence[list[Attended]]) -> list[tuple[int, list[Attended]]]:
    """Of each distinct attention the first layer that has it."""
    return [(order.index(n), of) for n, of in enumerate(distinct)]


def _faster(one: ModelStep | str, other: ModelStep | str) -> bool:
    return isinstance(one, ModelStep) and isinstance(other, ModelStep) and other.seconds < one.seconds


def _over_latents(s: Site, plain: Attended) -> Attended:
    """A site that decodes over its latents, which all heads share; one that has none stays as it is."""
    form = next((c for c in s.candidates if c.name == LATENT), None)
    if form is None or form.cost is None or s.memory is None:
        return plain
    launch = min(form.cost.seconds, form.cost.parts.get("launch", 0.0))
    return replace(
        plain, seconds=form.cost.seconds, launch=launch, band=form.cost.band, cache_bytes=s.memory.latent_bytes,
        held=s.memory.tiled_bytes, key_heads=1,
    )


def _of_tokens(p: LayerProduct) -> bool:
    """Are its rows the tokens of the step?"""
    return p.weight and not p.experts and not p.last and not p.keys


def _product(known: SizeColumns, sizes: Sequence[Size]) -> list[int]:
    out = [1] * known.n
    for n in sizes:
        out = [a * int(b) for a, b in zip(out, known.integers(n))]
    return out


def _attended(s: Site, d: Device, heads: int, key_heads: int) -> Attended:
    """A site's chosen candidate as a part of the step."""
    cost, memory = s.chosen.cost, s.memory
    if cost is None:
        raise StepError(f"{s.name or s.where} has no predicted time")
    held = 0 if memory is None else memory.eager_bytes if s.chosen.is_original else memory.tiled_bytes
    cache = memory.cache_bytes if memory is not None else 0
    launch = min(cost.seconds, cost.parts.get("launch", 0.0))
    band = cost.band or d.band
    return Attended(cost.seconds, launch, band, cache, "window" not in s.traits, held, heads, key_heads)


def _extent(tokens: int, lengths: Sequence[tuple[int, int]]) -> Extent | str:
    queries = max((n for n, _ in lengths if tokens % n == 0), default=0)
    if not queries:
        several = f"{tokens} rows of most products are no multiple of any attention's queries"
        return f"{several if lengths else 'there is no attention'}: how long a sequence is cannot be told"
    return Extent(tokens // queries, queries, max(m for n, m in lengths if n == queries), False)


def _spread(sharding: MeshPlan | Mesh | None) -> StepSpread | None:
    """How the mesh divides the step; bytes of caches and exchanges of the sequence as the best way has them."""
    if sharding is None:
        return None
    if isinstance(sharding, Mesh):
        if sharding.size("cp") > 1:
            raise StepError("a mesh with cp is priced by a plan with it: Policy(mesh=…), --mesh")
        return StepSpread(sharding)
    best = sharding.best
    if best is None:
        return StepSpread(parse(sharding.mesh))
    moved = {axis: sum(x.seconds * x.layers for x in best.exchanges if x.axis == axis) for axis in ("tp", "cp")}
    latent = best.name.startswith("latent") and sharding.step == "decode"
    attended = max(0.0, best.seconds - sum(moved.values())) if latent else None
    return StepSpread(parse(sharding.mesh), best.cache_bytes, moved["cp"], attended)
