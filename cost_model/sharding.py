"""Sharding: what each way to spread an attention over a mesh of devices holds, computes, sends and takes, best first.

    T = max(compute, bytes / bandwidth) + exchanges that computing waits for + their latency
    compute: products, exponentials and other element work, overlapped as the device's time model has it

A way is an assignment of the cascade's ranks to mesh axes (`placement` derives the rest). Named ones, on an axis a:
    heads        h→a                                        tensor parallel
    ring         p→a, keys at rest m→a, whole inside        context parallel; contiguous, or zigzag for causal masks
    all-to-all   p→a and m→a outside, h→a inside            Ulysses
    merge        m→a inside, h→a outside                    context-parallel decode: DCP, Helix; tree attention
Sources: Megatron-LM; Ring Attention; DeepSpeed-Ulysses; Helix Parallelism; "TPLA"; the exactness of each is derived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from ..patterns import expr as ex
from ..patterns.cascade import Access, Cascade, Einsum, Rank, Tensor
from ..patterns.latent import Latent, Widths, absorbed, sliced
from .capacity import Memory, largest_batch, memory
from .collectives import RING, Collective, backward, packed
from .core import Refused, Roles, core, roles
from .device import Device
from .gpu import overlapped, resources
from .mesh import Mesh, MeshError
from .mesh_plan import Exchange, MeshPlan, Scheme
from .placement import Assignment, Placed, place
from .work import plus, size_int

STEPS = ("prefill", "decode", "training")
LATENT_ROLES = Roles(("b",), "h", "p", "m")


@dataclass(frozen=True)
class Way:
    """A candidate: a cascade on a mesh under an assignment. `mesh` may cut an axis of the user's mesh in two."""

    name: str
    cascade: Cascade
    who: Roles
    how: Assignment
    mesh: Mesh
    exact: bool = True
    why: str = ""


@dataclass(frozen=True)
class Site:
    """An attention with integer sizes, and how many layers of the model are like it."""

    name: str
    cascade: Cascade
    layers: int = 1


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
    parts = {r: s / device.units for r, s in resources(plus(p.work, p.backward) if training else p.work, device).items()}
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


# --- ways -------------------------------------------------------------------------------------------------------------


def with_projection(c: Cascade, who: Roles) -> Cascade:
    """The output projection behind an attention, of a model as wide as its heads together: there the heads meet.

        before   … O[b,h,p,f]        after   …  Y[b,p,d] = Σ_h,f O[b,h,p,f]·WO[h,f,d],   d = h·f
    """
    found = core(c)
    out = c.producers[c.outputs[0]][-1].out
    if found is None or found.output != out.tensor or any(t.op != "index" for t in out.index):
        return c
    within = tuple(r for r in (who.heads, found.view.value) if r)
    width = math.prod(size_int(c.rank[r].size) for r in within)
    dtype = c.tensor[out.tensor].dtype
    rank, weight, result = (_unused(n, c) for n in ("d", "WO", "Y"))
    kept = tuple(t for t in out.index if t.attr not in within)
    d = ex.index(rank)
    wo = ex.load(weight, (*(ex.index(r) for r in within), d), dtype)
    e = Einsum(Access(result, (*kept, d)), ex.load(out.tensor, out.index, dtype) * wo, "add", within)
    shape = tuple(c.rank[str(t.attr)].size for t in kept)
    made = (
        Tensor(weight, (*(c.rank[r].size for r in within), width), dtype),
        Tensor(result, (*shape, width), dtype),
    )
    return replace(
        c, ranks=(*c.ranks, Rank(rank, width)), tensors=(*c.tensors, *made), einsums=(*c.einsums, e), outputs=(result,)
    )


def _unused(name: str, c: Cascade) -> str:
    while name in c.rank or name in c.tensor:
        name += "_"
    return name


def assignments(who: Roles, mesh: Mesh) -> list[tuple[str, Assignment]]:
    """Every named way on a mesh: `tp` carries heads where `cp` carries the sequence, either carries all alone."""
    single = {a.name for a in mesh.axes} & {"tp", "cp"}
    options: list[list[tuple[str, Assignment]]] = []
    for axis in mesh.axes:
        if axis.name == "dp":
            options.append([("batch", _both((_first(who.batch), "dp")))])
        elif axis.name == "tp" and len(single) > 1:
            options.append([("heads", _heads(who, axis.name))])
        else:
            options.append([*([("heads", _heads(who, axis.name))] if axis.name == "tp" else []), *_sequence(who, axis.name)])
    out = []
    for chosen in product(*options):
        name = " × ".join(n for n, _ in chosen)
        out.append((name, _joined([a for _, a in chosen])))
    return out


def _first(batch: tuple[str, ...]) -> str:
    return batch[0] if batch else ""


def _both(*pairs: tuple[str, str]) -> Assignment:
    return Assignment(pairs, pairs)


def _heads(who: Roles, a: str) -> Assignment:
    return _both((who.heads, a))


def _sequence(who: Roles, a: str) -> list[tuple[str, Assignment]]:
    tokens, keys, heads = (who.tokens, a), (who.key, a), (who.heads, a)
    ring = Assignment((tokens,), (tokens, keys), ring=True)
    return [
        ("ring", ring), ("ring zigzag", replace(ring, order="zigzag")),
        ("all-to-all", Assignment((heads,), (tokens, keys))), ("merge", Assignment((keys,), (keys, heads), "interleaved")),
    ]  # fmt: skip


def _joined(parts: Sequence[Assignment]) -> Assignment:
    inside = tuple(dict.fromkeys(x for a in parts for x in a.inside))
    # the sequence comes first: a cache that keys and heads index is cut along its keys
    outside = tuple(x for a in reversed(parts) for x in a.outside)
    order = next((a.order for a in parts if a.order != "contiguous"), "contiguous")
    return Assignment(inside, outside, order, any(a.ring for a in parts))


def latent_ways(w: Widths, mesh: Mesh, *, batch: int = 1, queries: int = 1, keys: int, axis: str = "tp") -> list[Way]:
    """Ways to decode over cached latents on one axis: heads, the sequence, scores summed over slices, and TPLA.

    All but TPLA compute what the model does; TPLA is there for 2 slices and for one slice a device.
    """
    mla = absorbed(w, batch=batch, queries=queries, keys=keys)
    n, heads, seq = mesh.size(axis), ("h", axis), ("m", axis)
    whole = ("c", axis), ("k", axis)
    out = [
        Way("heads", mla.cascade, LATENT_ROLES, _both(heads), mesh),
        Way("merge", mla.cascade, LATENT_ROLES, Assignment((seq,), (seq, heads), "interleaved"), mesh),
        Way("summed scores", mla.cascade, LATENT_ROLES, Assignment(whole, (*whole, heads)), mesh),
    ]
    for g in sorted({2, n} if n > 1 else set()):
        if n % g == 0 and w.latent % g == 0:
            out.append(_tpla(sliced(g, w, batch=batch, queries=queries, keys=keys), g, mesh, axis))
    return out


def _tpla(latent: Latent, g: int, mesh: Mesh, axis: str) -> Way:
    how = _both(("g", "slice"), ("h", axis))
    return Way(f"TPLA {g} slices", latent.cascade, LATENT_ROLES, how, mesh.split(axis, "slice", g), latent.exact, latent.why)


# --- one way --------------------------------------------------------------------------------------------------------


def placed(way: Way) -> Placed:
    """One device's part. Raises Refused with the reason where the cascade or the mesh does not allow it."""
    return place(way.cascade, way.who, way.how, {a.name: a.size for a in way.mesh.axes})


def scheme(
    ways: Sequence[tuple[Way, int]], device: Device, *, step: str, weights: int = 0, approximate: bool = False
) -> Scheme:
    """One way over all attentions of a model: (way, layers) pairs of the same name. `weights`: bytes of the model's."""
    first = ways[0][0]
    if any(not w.exact for w, _ in ways) and not approximate:
        why = next(w.why for w, _ in ways if not w.exact)
        return _refused(first, f"approximate: {why}; Policy(approximate=True) admits it", exact=False)
    try:
        parts = [(w, placed(w), n) for w, n in ways]
    except Refused as no:
        return _refused(first, str(no))
    each = [(times(p, w.mesh, device, step), n) for w, p, n in parts]
    total = {f.name: sum(n * getattr(t, f.name) for t, n in each) for f in fields(Times)}
    mem = memory([(p, n) for _, p, n in parts], step, weights)
    sizes = _sizes(first)
    room = device.dram_bytes
    fits = mem.total <= mem.room(room)
    batches = {
        n: largest_batch(mem, room, sizes["batch"], sizes["keys"], n) * sizes["groups"] for n in _lengths(sizes["keys"])
    }
    short = "" if fits else f"needs {_gb(mem.total)} of the {_gb(mem.room(room))} that {device.name} has for it"
    return Scheme(
        first.name, str(first.how), all(w.exact for w, _ in ways), fits, short, mem.weights, mem.cache, mem.activations,
        sum(n * p.flops for _, p, n in parts), sum(n * p.traffic for _, p, n in parts),
        tuple(_exchange(x, w.mesh, device, n) for w, p, n in parts for x in exchanges(p, w.mesh, step)),
        total, sum(n * t.seconds for t, n in each), _bound(total), batches, max(p.even for _, p, _ in parts),
        max(p.copies for _, p, _ in parts),
    )  # fmt: skip


def _bound(t: Mapping[str, float]) -> str:
    """What takes longest: the link, the memory, or of computing the larger part."""
    link = t["exposed"] + t["latency"]
    if link > max(t["compute"], t["memory"]):
        return "link"
    if t["memory"] > t["compute"]:
        return "memory"
    return "matrix" if t["matrix"] >= t["exp"] else "exp"


def _refused(way: Way, why: str, exact: bool = True) -> Scheme:
    return Scheme(way.name, str(way.how), exact, False, why)


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
) -> MeshPlan:  # fmt: skip
    """All ways with their cost, best first, those that cannot be last, each with the reason.

    Raises MeshError for a device without links, ValueError for an unknown step.
    """
    if step not in STEPS:
        raise ValueError(f"step {step!r}; one of {', '.join(STEPS)}")
    for a in mesh.axes:
        mesh.route(a.name, device)
    found = [scheme(w, device, step=step, weights=weights, approximate=approximate) for w in ways.values()]
    able = sorted((s for s in found if s.feasible), key=lambda s: (s.seconds, s.held_bytes))
    rest = [s for s in found if not s.feasible]
    return MeshPlan(str(mesh), mesh.devices, device.name, step, (*_explained(able), *rest), note)


def _explained(able: Sequence[Scheme]) -> list[Scheme]:
    """Each way with what speaks for it, or how far behind it is and through which part."""
    out: list[Scheme] = []
    for s in able:
        if s is able[0]:
            out.append(replace(s, why=f"bound by {s.bound}{_rival(able)}{_copies(s)}"))
            continue
        words = {"exposed": "exchanges that nothing hides", "latency": "the latency of its messages",
                 "memory": "memory traffic", "compute": "computing"}  # fmt: skip
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
    sites: Sequence[Site], mesh: Mesh, device: Device, *, step: str | None = None, weights: int = 0,
    approximate: bool = False,
) -> MeshPlan:  # fmt: skip
    """The sharding plan of a model's attentions. `step` None: decode where there is one query, else prefill.

    Raises MeshError where the mesh does not divide the heads or the batch, naming the sizes that do.
    """
    ready: list[tuple[Site, Cascade, Roles]] = []
    for s in sites:
        who = roles(s.cascade)
        _check(s, who, mesh)
        ready.append((s, with_projection(s.cascade, who), who))
    decoding = all(size_int(c.rank[w.tokens].size) == 1 for _, c, w in ready)
    ways: dict[str, list[tuple[Way, int]]] = {}
    for s, c, who in ready:
        for name, how in assignments(who, mesh):
            ways.setdefault(name, []).append((Way(name, c, who, how, mesh), s.layers))
    note = (
        "per device and step, attention layers with their output projection (taken as wide as the heads together); "
        "feed-forward exchanges and the gradients' sum over dp are not counted"
    )
    note += "" if weights else "; the model's weights are not known here and not counted"
    return rank_ways(
        ways, mesh, device, step=step or ("decode" if decoding else "prefill"), weights=weights, approximate=approximate,
        note=note,
    )  # fmt: skip


def _check(s: Site, who: Roles, mesh: Mesh) -> None:
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
    "LATENT_ROLES", "STEPS", "Memory", "Site", "Times", "Way", "assignments", "exchanges", "hidden_from", "latent_ways",
    "placed", "rank_ways", "scheme", "shard", "times", "with_projection",
]  # fmt: skip
