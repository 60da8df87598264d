"""Plans made without torch: a cascade from the papers, costed at any size by the cost model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reattend.cost_model.count.memory import memory
from reattend.cost_model.devices.device import Device, shipped
from reattend.cost_model.mesh.mesh import parse
from reattend.cost_model.mesh.plan import MeshPlan
from reattend.cost_model.mesh.sharding import ShardedSite, shard
from reattend.cost_model.plan.plan import Plan
from reattend.cost_model.sites.axes import axes
from reattend.cost_model.sites.course import Symbol
from reattend.cost_model.sites.detail import detail
from reattend.cost_model.sites.picture import picture
from reattend.cost_model.sites.site import Candidate, MaskView, Miss, Site, SiteShape, TileCounts, ranked
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import best_mapping, predict_original, tiles_of
from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import derive, stream
from reattend.patterns.cascade import Cascade, show
from reattend.patterns.library import papers
from reattend.patterns.masks.split import split
from reattend.patterns.verdict import Obstacle

P, M = ex.index("p"), ex.index("m")
CAUSAL = papers.attention("causal", papers.softmax, lambda b, qk: ex.where(M <= P, qk * 0.125, -3e38))
WINDOW = papers.attention(
    "window", papers.softmax, lambda b, qk: ex.where((M <= P) & (P - M < 256), qk * 0.125, -3e38)
)
SIZES = {"B": 2, "H": 4, "P": 1024, "M": 1024, "E": 64, "F": 64}


def site(c: Cascade, d: Device, at: Mapping[str, int], name: str) -> Site:
    """A site with the original code and, where it pays, our kernel."""
    view = attention(c)
    assert isinstance(view, Attention)
    best = best_mapping(c, d, at)
    candidates = [Candidate("original", cost=predict_original(c, d, at)), Candidate("sdpa", feasible=False, why="no <mask>")]
    state = derive(view)
    assert not isinstance(state, Obstacle)
    mapping = ""
    if isinstance(best, tuple):
        mapping = best[0].to_text()
        candidates.append(Candidate("reattend", passes=1, cost=best[1], mapping=mapping, why=str(best[0])))
    order = ranked(tuple(candidates))
    tiling = best[0] if isinstance(best, tuple) else None
    mask = None
    if tiling is not None:
        jobs = tiles_of(c, tiling, at)
        tiles = getattr(jobs, "map", None)
        if tiles is not None:
            counts = TileCounts(tiling.tile_p, tiling.tile_m, tiles.total, tiles.visited, tiles.full, tiles.partial)
            keep = ex.show(split(view.score, view.key).keep)
            mask = MaskView(keep, tiles.density, counts, painter=lambda: picture(c, tiling, at))
    shape = SiteShape({r.name: str(r.size) for r in c.ranks}, "float32", {r.name: at[str(r.size)] for r in c.ranks})
    return Site(
        name, "/some/where/model.py:7", "softmax", frozenset({"causal"}), shape, mask, ("a <proof> & more",), (), order,
        order[0].name, show(c), show(stream(view, state)), (), memory(view, c, at),
        detailer=lambda: detail(c, stream(view, state), mapping, at),
    )


def plan(
    cascades: Sequence[Cascade] = (CAUSAL, CAUSAL, WINDOW), device: str = "h200", mesh: str = "", **high: int
) -> Plan:
    """A plan with the sizes open, over a mesh where one is named; `P=…` bounds the values for which it holds."""

    def retake(d: Device, at: Mapping[str, int], which: Sequence[int]) -> tuple[Site, ...]:
        return tuple(site(cascades[i], d, at, f"layers.{i}.attn") for i in which)

    def reshard(d: Device, at: Mapping[str, int]) -> MeshPlan | None:
        if not mesh:
            return None
        return shard([ShardedSite(f"layers.{i}.attn", c.with_sizes(at)) for i, c in enumerate(cascades)], parse(mesh), d)

    d = shipped(device)
    symbols = tuple(Symbol(n, v, 2, high.get(n)) for n, v in SIZES.items())
    misses = (Miss("/some/where/model.py:9", "product", "softmax over h", "nothing"),)
    return Plan(
        retake(d, SIZES, range(len(cascades))), misses, d, "Sample </script>", "a note", 10**9, symbols, axes(cascades),
        sharding=reshard(d, SIZES), retake=retake, reshard=reshard,
    )


def cost(seconds: float) -> Cost:
    return Cost(seconds, "matrix", 10**9, 10**6, 10**3, {"matrix": seconds})
