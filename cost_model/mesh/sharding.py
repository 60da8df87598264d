"""Sharding: what each way to spread an attention over a mesh of devices holds, computes, sends and takes, best first.

    T = max(compute, bytes / bandwidth) + exchanges that computing waits for + their latency
    compute: products, exponentials and other element work, overlapped as the device's time model has it

A way is an assignment of the cascade's ranks to mesh axes: `ways` names them, `placement` derives the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from ...patterns.attention.attention import Attention
from ...patterns.attention.ranks import fuse
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade
from ...patterns.passes.absorb import weighted
from ...patterns.verdict import Obstacle
from ..count.tiles import NOTHING, Data
from ..devices.device import Device
from ..operations import plus, size_int
from ..time.gpu import overlapped, resources
from .capacity import RESERVE, DeviceMemory, largest_batch, memory
from .collectives import RING, Collective, backward, packed
from .core import Refused, Roles, roles
from .mesh import Mesh, MeshError
from .placement import Placed, place
from .plan import MeshPlan
from .scheme import Exchange, Scheme
from .ways import FORMS, LATENT_ROLES, Latents, Way, assignments, captured_ways, latent_ways, latents, with_projection

STEPS = ("prefill", "decode", "training")


@dataclass(frozen=True)
class ShardedSite:
    """An attention with integer sizes, and how many layers of the model are like it.

    `upstream` is the same attention with what makes its keys and values, or why that is not known; `model` the channels
    of its output projection, 0 where they are not known; `data` what is known or expected of run-time data in its mask.
    """

    name: str
    cascade: Cascade
    layers: int = 1
    upstream: Cascade | Obstacle | None = None
    model: int = 0
    data: Data = NOTHING


@dataclass(frozen=True)
class Times:
    """Seconds of one layer's step on the device with most to do; `matrix` and `exp` are the larger parts of `compute`."""

    compute: float
    memory: float
    exposed: float
    latency: float
    matrix: float
    exp: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.exposed + self.latency


# --- time -----------------------------------------------------------------------------------------------------------


def exchanges(p: Placed, mesh: Mesh, step: str) -> tuple[Collective, ...]:
    """The messages of a step, in order; a training step sends those of the gradients as well."""
    forward = packed(p.exchanges)
    if step != "training":
        return forward
    return (*forward, *(backward(x, mesh.size(x.axis)) for x in reversed(forward)))


def times(p: Placed, mesh: Mesh, device: Device, step: str = "prefill") -> Times:
    """Seconds of one layer's step. Raises MeshError for a device without links."""
    model, training = device.model, step == "training"
    done = plus(p.work, p.backward) if training else p.work
    each = resources(done, device, efficiency=model.vendor_matrix_efficiency)
    parts = {r: s / device.units for r, s in each.items()}
    compute = overlapped(parts, model.vendor_overlap)
    # backward reads its operands and writes their gradients
    moving = (3 if training else 1) * p.traffic / (model.bandwidth_efficiency * device.dram_bytes_per_s)
    busy = max(compute, moving)
    exposed = latency = 0.0
    for x in exchanges(p, mesh, step):
        route = mesh.route(x.axis, device)
        share = 0.5 if training else 1.0
        a_step = busy * share / route.parts if x.kind == RING else 0.0
        exposed += x.exposed(route, a_step)
        latency += x.waits(route, a_step)
    return Times(compute, moving, exposed, latency, parts["matrix"], sum(parts.values()) - parts["matrix"])


def hidden_from(p: Placed, tokens: int, mesh: Mesh, device: Device) -> float:
    """Local tokens from which ring steps hide behind products, for a part with `tokens` local tokens.

    A step's products grow with the square of the tokens, its message with their number: n* = n · message / products.
    Source: Ring Attention, section 3 (c ≥ F/B).
    """
    ring = [x for x in packed(p.exchanges) if x.kind == RING]
    if not ring:
        raise Refused("nothing travels in a ring here")
    route = mesh.route(ring[0].axis, device)
    message = sum(x.payload for x in ring) / route.slowest.bytes_per_s
    products = resources(p.work, device)["matrix"] / device.units
    return tokens * message / (products / route.parts)


# --- one way --------------------------------------------------------------------------------------------------------


def placed(way: Way) -> Placed:
    """One device's part. Raises Refused with the reason where the cascade or the mesh does not allow it."""
    return place(way.cascade, way.who, way.how, {a.name: a.size for a in way.mesh.axes}, way.data)


def scheme(
    ways: Sequence[tuple[Way, int]], device: Device, *, step: str, weights: int = 0, approximate: bool = False
) -> Scheme:
    """One way over all attentions of a model: (way, layers) pairs of the same name. `weights`: bytes of the model's."""
    first, exact = ways[0][0], all(w.exact for w, _ in ways)
    try:
        parts = [(w, placed(w), n) for w, n in ways]
    except Refused as no:
        return Scheme(first.name, str(first.how), exact, False, str(no))
    each = [(times(p, w.mesh, device, step), n) for w, p, n in parts]
    total = {f.name: sum(n * getattr(t, f.name) for t, n in each) for f in fields(Times)}
    mem = memory([(p, n) for _, p, n in parts], step, weights)
    sizes = _sizes(first)
    room = device.dram_bytes
    fits = mem.total <= mem.room(room)
    batches = {
        n: largest_batch(mem, room, sizes["batch"], sizes["keys"], n) * sizes["groups"] for n in _lengths(sizes["keys"])
    }
    return Scheme(
        first.name, str(first.how), exact, fits and (exact or approximate), _against(ways, mem, device, approximate),
        mem.weights, mem.cache, mem.activations,
        sum(n * p.flops for _, p, n in parts), sum(n * p.traffic for _, p, n in parts),
        tuple(_exchange(x, w.mesh, device, n) for w, p, n in parts for x in exchanges(p, w.mesh, step)),
        total, sum(n * t.seconds for t, n in each), _bound(total), batches, max(p.even for _, p, _ in parts),
        max(p.copies for _, p, _ in parts), _token_bytes(parts),
    )


def _against(ways: Sequence[tuple[Way, int]], mem: DeviceMemory, device: Device, approximate: bool) -> str:
    """Why a way whose cost is known may not be taken; empty where it may."""
    inexact = next((w.why for w, _ in ways if not w.exact), "")
    if inexact and not approximate:
        return f"approximate: {inexact}; Policy(approximate=True) or --approximate admits it"
    room = mem.room(device.dram_bytes)
    return "" if mem.total <= room else f"needs {_gb(mem.total)} of the {_gb(room)} that {device.name} has for it"


def _token_bytes(parts: Sequence[tuple[Way, Placed, int]]) -> float:
    """Cached bytes of a device by layers and by the tokens of its sequences."""
    tokens = [n * s["batch"] * s["keys"] for w, _, n in parts for s in [_sizes(w)]]
    return sum(p.cache_bytes * n for _, p, n in parts) / sum(tokens)


def _bound(t: Mapping[str, float]) -> str:
    """What takes longest: the link, the memory, or of computing the larger part."""
    link = t["exposed"] + t["latency"]
    if link > max(t["compute"], t["memory"]):
        return "link"
    if t["memory"] > t["compute"]:
        return "memory"
    return "matrix" if t["matrix"] >= t["exp"] else "exp"


def _sizes(way: Way) -> dict[str, int]:
    """Sequences a device has, groups of devices with sequences of their own, keys."""
    whole = {r.name: size_int(r.size) for r in way.cascade.ranks}
    batch = math.prod(whole[r] for r in way.who.batch if r in whole)
    groups = way.mesh.size("dp")
    return {"batch": max(1, batch // groups), "groups": groups, "keys": whole[way.who.key]}


def _lengths(keys: int) -> list[int]:
    return sorted({4096, 32768, 131072, 1048576, keys})


def _exchange(x: Collective, mesh: Mesh, device: Device, layers: int) -> Exchange:
    route = mesh.route(x.axis, device)
    return Exchange(
        x.kind, x.axis, x.what, route.parts, layers, round(x.sent(route.parts)), x.transfer(route) + x.latency(route)
    )


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


# --- a model --------------------------------------------------------------------------------------------------------


def rank_ways(
    ways: Mapping[str, Sequence[tuple[Way, int]]], mesh: Mesh, device: Device, *, step: str, weights: int = 0,
    approximate: bool = False, note: str = "",
) -> MeshPlan:
    """All ways with their cost, best first, those that cannot be last, each with the reason.

    Raises MeshError for a device without links, ValueError for an unknown step.
    """
    if step not in STEPS:
        raise ValueError(f"step {step!r}; one of {', '.join(STEPS)}")
    for a in mesh.axes:
        mesh.route(a.name, device)
    found = [scheme(w, device, step=step, weights=weights, approximate=approximate) for w in ways.values()]
    able = sorted((s for s in found if s.feasible), key=lambda s: (s.seconds, s.held_bytes))
    rest = sorted((s for s in found if not s.feasible), key=lambda s: (not s.parts, not s.exact, s.seconds))
    note += _crowded(found, mesh, device) if not able else ""
    return MeshPlan(str(mesh), mesh.devices, device.name, step, (*_explained(able), *rest), note)


def _crowded(found: Sequence[Scheme], mesh: Mesh, device: Device) -> str:
    """Where weights alone fill every device: on how many they would lie."""
    least = min((s.weight_bytes for s in found if s.parts and s.exact), default=0)
    room = (1 - RESERVE) * device.dram_bytes
    if least <= room:
        return ""
    devices = math.ceil(least / room * mesh.devices)
    return (
        f"; weights alone take {_gb(least)} of a device's {_gb(room)}: they need {devices} devices that share them, or a "
        "smaller type"
    )


def _explained(able: Sequence[Scheme]) -> list[Scheme]:
    """Each way with what speaks for it, or how far behind it is and through which part."""
    out: list[Scheme] = []
    for s in able:
        if s is able[0]:
            out.append(replace(s, why=f"bound by {s.bound}{_rival(able)}{_copies(s)}"))
            continue
        words = {"exposed": "exchanges that nothing hides", "latency": "the latency of its messages",
                 "memory": "memory traffic", "compute": "computing"}
        more = {k: s.parts[k] - able[0].parts[k] for k in words}
        part = max(more, key=lambda k: more[k])
        uneven = f", one device has {s.even:.2f}× the mean" if part == "compute" and s.even > 1.05 else ""
        if s.seconds < 1.005 * able[0].seconds:
            out.append(replace(s, why=f"as fast as {able[0].name}{_copies(s)}"))
            continue
        slower = f"{s.seconds / able[0].seconds:.2f}× the time: more for {words[part]}"
        out.append(replace(s, why=slower + uneven + _copies(s)))
    return out


def _copies(s: Scheme) -> str:
    return f"; every key lies on {s.copies:.3g} devices" if s.copies > 1.05 else ""


def _rival(able: Sequence[Scheme]) -> str:
    if len(able) < 2 or not able[0].seconds:
        return ""
    ratio = able[1].seconds / able[0].seconds
    return f"; {able[1].name} is as fast" if ratio < 1.01 else f"; {ratio:.2f}× as fast as {able[1].name}"


def shard(
    sites: Sequence[ShardedSite], mesh: Mesh, device: Device, *, step: str | None = None, weights: int = 0,
    approximate: bool = False,
) -> MeshPlan:
    """The sharding plan of a model's attentions. `step` None: decode where there is one query, else prefill.

    Raises MeshError where the mesh does not divide the heads or the batch, naming the sizes that do.
    """
    ready: list[tuple[ShardedSite, Cascade, Roles]] = []
    for s in map(_with_one_head_rank, sites):
        who = roles(s.cascade)
        _check(s, who, mesh)
        ready.append((s, with_projection(s.cascade, who, s.model), who))
    decoding = all(size_int(c.rank[w.tokens].size) == 1 for _, c, w in ready)
    step = step or ("decode" if decoding else "prefill")
    narrow = [_latents(s, c, who, step) for s, c, who in ready]
    some = any(isinstance(x, Latents) for x in narrow)
    ways: dict[str, list[tuple[Way, int]]] = {}
    for (s, c, who), found in zip(ready, narrow):
        for name, way in _by_name(c, found, who, mesh, some):
            ways.setdefault(name, []).append((replace(way, data=s.data), s.layers))
    note = (
        "per device and step, attention layers with their output projection"
        f"{'' if all(s.model for s in sites) else ' (taken as wide as the heads together where it is not known)'}; "
        "feed-forward exchanges and the gradients' sum over dp are not counted"
    )
    note += "" if weights else "; the model's weights are not known here and not counted"
    note += _said(sites, narrow)
    return rank_ways(ways, mesh, device, step=step, weights=weights, approximate=approximate, note=note)


def _with_one_head_rank(s: ShardedSite) -> ShardedSite:
    """Heads that are there as groups and members become one rank: ranks that index weights belong to no sequence."""
    if not isinstance(s.upstream, Cascade):
        return s
    view = attention(s.cascade)
    assert isinstance(view, Attention), view
    found = [r for r in view.batch if r in weighted(s.upstream, view.key, view.query)]
    while len(found) > 1:
        high, low, *rest = found
        here, above = fuse(s.cascade, high, low), fuse(s.upstream, high, low)
        if here is s.cascade or above is s.upstream:
            return s
        s, found = replace(s, cascade=here, upstream=above), [f"{high}{low}", *rest]
    return s


def _latents(s: ShardedSite, plain: Cascade, who: Roles, step: str) -> Latents | Obstacle | None:
    """The latent forms of an attention; None where nobody asked, or nothing is cached."""
    if s.upstream is None or step == "training":
        return None
    upstream = s.upstream if isinstance(s.upstream, Obstacle) else with_projection(s.upstream, who, s.model)
    return latents(upstream, plain, who)


def _by_name(
    plain: Cascade, found: Latents | Obstacle | None, who: Roles, mesh: Mesh, some: bool
) -> Iterator[tuple[str, Way]]:
    """The ways of one attention; where others of the model have latents, one that has none takes its plain way beside."""
    own = found if isinstance(found, Latents) else None
    for way in captured_ways(plain, own, who, mesh):
        yield way.name, way
        if some and own is None:
            yield from ((f"{form} {way.name}", way) for form in FORMS)


def _said(sites: Sequence[ShardedSite], narrow: Sequence[Latents | Obstacle | None]) -> str:
    """What latents are kept, and why others have none: each sentence once."""
    out: dict[str, None] = {}
    without: dict[str, list[str]] = {}
    for s, found in zip(sites, narrow):
        if isinstance(found, Obstacle):
            without.setdefault(found.reason, []).append(s.name or "an attention")
        elif found is not None:
            kept = " + ".join(f"{name} {n}" for name, n in found.kept)
            said = (
                f"; latent ways keep {kept} bytes a token and layer in place of {found.instead} of keys and "
                "values: a layout of the cache to plan with, which optimize() does not make"
            )
            out[said] = None
    for reason, (first, *more) in without.items():
        out[f"; no latent form of {first}{f' and {len(more)} like it' if more else ''}: {reason}"] = None
    return "".join(out)


def _check(s: ShardedSite, who: Roles, mesh: Mesh) -> None:
    """What no way on this mesh could do: tp splits weights by heads, dp the sequences of the batch."""
    heads = size_int(s.cascade.rank[who.heads].size) if who.heads else 1
    tp, dp = mesh.size("tp"), mesh.size("dp")
    if heads % tp:
        sizes = [n for n in range(1, heads + 1) if heads % n == 0]
        raise MeshError(
            f"mesh tp={tp} does not divide the {heads} query heads of {s.name or 'an attention'}: "
            f"use tp={_listed(sizes)}, or cp, which cuts the sequence"
        )
    batch = size_int(s.cascade.rank[who.batch[0]].size) if who.batch else 1
    if batch % dp:
        raise MeshError(
            f"mesh dp={dp} does not divide a batch of {batch}: use a --batch that is a multiple of {dp}, or dp=1"
        )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:-1])) + (" or " if len(sizes) > 1 else "") + str(sizes[-1])


__all__ = [
    "LATENT_ROLES", "STEPS", "DeviceMemory", "ShardedSite", "Times", "Way", "assignments", "exchanges", "hidden_from",
    "latent_ways", "placed", "rank_ways", "scheme", "shard", "times", "with_projection",
]
