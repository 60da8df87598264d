"""Selected keys that are maps of latents: the gather goes before the map, where that is predicted to pay.

    as found       K = W·C, V = U·C for every key;  each row gathers the K and V that it names
    over latents   each row gathers the C that it names, once for all heads;  Q·W before, U behind      K and V are not made

A map that acts on each token alone commutes with a gather of tokens; sums of products are re-associated, as `absorb` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import fx

from ...codegen import operator as ours
from ...cost_model.count.memory import memory
from ...cost_model.devices.device import Device
from ...cost_model.layer.latents import predict_absorbed
from ...cost_model.sites.site import Candidate, Site
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import predict_latent, predict_made
from ...cost_model.words import seconds_text
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, bind, show
from ...patterns.mapping import TileMapping
from ...patterns.passes.absorb import absorb
from ...patterns.passes.latents import Inner, inner
from ...patterns.verdict import Obstacle, Refusal
from ..find.detect import Found
from ..find.place import Place, interior
from ..find.upstream import Reached, upstream
from ..graph.aliases import Aliases
from ..graph.inside import between
from ..splice import splice
from .candidates import our_call
from .policy import Policy

# The candidate of a plan that decodes over what is cached of latents, as serving engines do.
LATENT = "latent"

MAPPING = TileMapping(tile_p=64, tile_m=64, warps=1, stages=1, body="latent")


@dataclass(frozen=True)
class Over:
    """A site whose kernel of ours reads latents: the attention with its maps, and what it is spliced as."""

    found: Found
    site: Site
    call: splice.Call


def over_latents(
    f: Found, stands: Place, site: Site, device: Device, sizes: Mapping[str, int], policy: Policy
) -> Over | None:
    """The site with our kernel over latents in the place of that over keys and values; None where it is no better."""
    if site.kind != "selected" or stands.bound or stands.gradients or device.kind != "cpu":
        return None
    graph, view = f.output.graph, attention(f.cascade)
    assert isinstance(view, Attention), view
    aliases = Aliases(graph)
    made = upstream(graph, aliases, f)
    if isinstance(made, Obstacle) or any(_written_late(n, f, made, aliases) for n in made.tensors.values()):
        return None
    whole = _absorbed(made.cascade, view.key, view.query)
    costs = _costs(made.cascade, f.cascade, whole, device, tuple(sorted(sizes.items()))) if whole is not None else None
    if whole is None or costs is None:
        return None
    cost, saved = costs
    kernel = ours.build(whole, MAPPING, device)
    before = next(c for c in site.candidates if c.name == "reattend")
    if isinstance(kernel, Refusal):
        return None
    gained = saved.seconds if _unread(f, made) else 0.0
    why = "keys are gathered as the latents that they are made of"
    if gained:
        why += f", which saves {seconds_text(gained)} in which all of them would be made"
    ahead = Candidate(
        "reattend", passes=before.passes, cost=cost, mapping=MAPPING.to_text(), why=why, maker=lambda: str(kernel.source)
    )
    rivals = [c.seconds for c in site.candidates if c.feasible and policy.permits(c)]
    if not policy.permits(ahead) or cost.seconds - gained >= min(rivals, default=float("inf")):
        return None
    order = (ahead, *(c for c in site.candidates if c is not before))
    over = replace(f, cascade=whole, tensors=made.tensors)
    chosen = replace(site, candidates=order, choice="reattend", chosen_cascade=show(whole))
    return Over(over, chosen, our_call(whole, MAPPING))


def with_engine_form(site: Site, stands: Place, device: Device, sizes: Mapping[str, int]) -> Site:
    """The site of a plan with what decoding over cached latents would take, where it has such a form and a law for it.

    It is no choice: the cache would have to hold latents, which is the model's and its engine's to decide.
    """
    made = stands.upstream
    if not device.is_gpu or stands.gradients or not isinstance(made, Cascade):
        return site
    found = _engine_form(made, stands.cascade, device, tuple(sorted(sizes.items())))
    if found is None or site.memory is None:
        return site
    cost, kept = found
    why = "over latents in the cache, as serving engines decode: optimize() keeps the model's own layout"
    form = Candidate(LATENT, cost=cost, feasible=False, why=why)
    return replace(site, candidates=(*site.candidates, form), memory=replace(site.memory, latent_bytes=kept))


@lru_cache(maxsize=1024)
def _engine_form(
    made: Cascade, own: Cascade, device: Device, sizes: tuple[tuple[str, int], ...]
) -> tuple[Cost, int] | None:
    """What it takes, and the bytes of its cache; None where there is no such form, or no law for it."""
    view = attention(own)
    assert isinstance(view, Attention), view
    if bind(own.rank[view.query].size, dict(sizes)) != 1:
        return None
    whole = _absorbed(made, view.key, view.query)
    parts = inner(whole) if whole is not None else None
    if whole is None or not isinstance(parts, Inner):
        return None
    core = attention(parts.cascade)
    assert isinstance(core, Attention), core
    try:
        cost = predict_absorbed(whole, device, dict(sizes))
        kept = memory(core, parts.cascade, dict(sizes)).cache_bytes
    except ValueError:
        return None
    return None if isinstance(cost, Obstacle) else (cost, kept)


@lru_cache(maxsize=256)
def _absorbed(c: Cascade, key: str, query: str) -> Cascade | None:
    out = absorb(c, key, query)
    return None if isinstance(out, Obstacle) else out.cascade


@lru_cache(maxsize=256)
def _costs(
    made: Cascade, own: Cascade, whole: Cascade, device: Device, sizes: tuple[tuple[str, int], ...]
) -> tuple[Cost, Cost] | None:
    """What the kernel over latents costs, and what keys and values would that are not made; None where a size is open."""
    maps = frozenset(made.producers) - frozenset(own.producers)
    try:
        cost = predict_latent(whole, device, dict(sizes))
        return None if isinstance(cost, Obstacle) else (cost, predict_made(made, maps, device, dict(sizes)))
    except ValueError:
        return None


def _beside(f: Found, made: Reached) -> frozenset[fx.Node]:
    """The nodes that make keys and values of latents, and the attention's own."""
    return between({*made.tensors.values(), *f.scalars.values()}, f.output) | {f.output}


def _unread(f: Found, made: Reached) -> bool:
    """Does nobody else read keys and values, nor what they are made of on the way from the latents?"""
    inside = _beside(f, made)
    makers = inside - interior(f) - {f.output}
    return all(u in inside for n in makers for u in n.users)


def _written_late(n: fx.Node, f: Found, made: Reached, aliases: Aliases) -> bool:
    """Is a latent, or a weight, written between its use by the model's own code and the attention's output?"""
    inside = _beside(f, made)
    first = min((aliases.position[u] for u in n.users if u in inside), default=aliases.position[f.output])
    return bool(aliases.written_between(n, first - 1, f.output))
