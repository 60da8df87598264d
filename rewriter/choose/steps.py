"""The step of a whole model: attentions as they were decided, and the work of its graphs around them, priced together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...cost_model.devices.device import Device
from ...cost_model.layer.step import Attended, Extent, ModelStep, StepError, StepSpread, Types, step
from ...cost_model.layer.work import LayerWork
from ...cost_model.mesh.mesh import Mesh, parse
from ...cost_model.mesh.plan import MeshPlan
from ...cost_model.operations import bound_size, size_int
from ...cost_model.sites.site import Site
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ..find.place import Place


def step_of(
    work: Sequence[LayerWork | str], places: Sequence[Place], sites: Sequence[Site], at: Mapping[str, int], device: Device,
    sharding: MeshPlan | Mesh | None, types: Types,
) -> ModelStep | str:
    """A step at sizes of the graph's symbols; or why there is none. Raises StepError on a type that is not known."""
    if not device.is_gpu:
        return f"the whole model is priced on GPUs: {device.name} is none"
    if said := [w for w in work if isinstance(w, str)]:
        return said[0]
    try:
        joined = _joined([w for w in work if isinstance(w, LayerWork)]).at(at)
        if joined.is_empty:
            return "the graph has no product outside of its attentions"
        extent = _extent(joined, places, sites, at)
        heads = [_heads(p, at, extent.batch) for p in places]
        heads += [(1, 1)] * (len(sites) - len(places))
        attended = [_attended(s, device, *h) for s, h in zip(sites, heads)]
        return step(joined, attended, extent, device, types, _spread(sharding))
    except (StepError, ValueError) as no:
        return str(no)


def _joined(work: Sequence[LayerWork]) -> LayerWork:
    return LayerWork(
        *(tuple(x for w in work for x in getattr(w, part)) for part in ("products", "passes", "sums", "weights"))
    )


def _heads(p: Place, at: Mapping[str, int], batch: int) -> tuple[int, int]:
    """How many heads of queries and of keys each sequence has."""
    view = attention(p.cascade)
    assert isinstance(view, Attention), view
    sizes = p.sizes(at)
    ranks = {*view.batch}
    heads = keys = 1
    for r in ranks:
        heads *= size_int(bound_size(view.cascade.rank[r].size, sizes))
    for load in ex.loads(view.products[0].body):
        if view.key in load.ranks and load.attr in view.cascade.tensor:
            shape = view.cascade.tensor[str(load.attr)].shape
            named = [size for term, size in zip(load.args, shape) if term.ranks and term.ranks <= ranks]
            keys = math.prod(size_int(bound_size(size, sizes)) for size in named)
    return max(1, heads // batch), max(1, keys // batch)


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


def _extent(work: LayerWork, places: Sequence[Place], sites: Sequence[Site], at: Mapping[str, int]) -> Extent:
    """How many sequences, new tokens and keys a step has: tokens are the rows of most products, the longest sequence of
    queries that divides them is one of theirs.
    """
    rows: dict[int, int] = {}
    for p, n in work.products:
        if p.weight and not p.experts and not p.last:
            rows[size_int(p.rows)] = rows.get(size_int(p.rows), 0) + n
    tokens = max(rows, key=lambda r: (rows[r], r)) if rows else 1
    lengths: list[tuple[int, int]] = []
    for place in places:
        view = attention(place.cascade)
        assert isinstance(view, Attention), view
        sizes = place.sizes(at)
        queries, keys = (size_int(bound_size(view.cascade.rank[r].size, sizes)) for r in (view.query, view.key))
        lengths.append((queries, keys))
    queries = max((n for n, _ in lengths if tokens % n == 0), default=0)
    if not queries:
        several = f"{tokens} rows of most products are no multiple of any attention's queries"
        said = several if lengths else "there is no attention"
        raise StepError(f"{said}: how long a sequence is cannot be told")
    keys = max(m for n, m in lengths if n == queries)
    generates = bool(sites) and all(s.traits & {"causal", "decode"} for s in sites)
    return Extent(tokens // queries, queries, keys, generates)


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
