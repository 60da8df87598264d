"""Ways to spread an attention over a mesh: assignments of its ranks to axes, and forms of it whose cache is narrower.

    heads        h→a                                        tensor parallel
    ring         p→a, keys at rest m→a, whole inside        context parallel; contiguous, or zigzag for causal masks
    all-to-all   p→a and m→a outside, h→a inside            Ulysses
    merge        m→a inside, h→a outside                    context-parallel decode: DCP, Helix; tree attention

An attention whose keys and values are made of latents comes in forms (see `patterns.absorb`), each of which takes every
assignment:
    latent            scores and values on the latents themselves: MLA's decoding form
    latent expanded   latents are kept, keys and values made of them in every step: what the model's code computes
and on one axis of tensor parallelism also with its latent channels spread: `summed scores`, exact, and `TPLA`, which is
another function. Sources: Megatron-LM; Ring Attention; DeepSpeed-Ulysses; Helix Parallelism; DeepSeek-V2; "TPLA".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ...patterns import expr as ex
from ...patterns.attention.latent import Latent, Widths, absorbed, sliced
from ...patterns.cascade import Access, Cascade, Einsum, Rank, Tensor
from ...patterns.passes.absorb import Absorbed, absorb, shared, slices
from ...patterns.verdict import Obstacle
from ..count.tiles import NOTHING, Data
from ..operations import size_int
from .core import Roles, core
from .mesh import Mesh
from .placement import Assignment, place

# Forms over latents, which take every assignment.
FORMS = ("latent", "latent expanded")
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
    data: Data = NOTHING


# --- assignments ----------------------------------------------------------------------------------------------------


def with_projection(c: Cascade, who: Roles, model: int = 0) -> Cascade:
    """The output projection behind an attention, to `model` channels (0: as wide as its heads together): there heads meet.

        before   … O[b,h,p,f]        after   …  Y[b,p,d] = Σ_h,f O[b,h,p,f]·WO[h,f,d]
    """
    found = core(c)
    out = c.producers[c.outputs[0]][-1].out
    if found is None or found.output != out.tensor or any(t.op != "index" for t in out.index):
        return c
    within = tuple(r for r in (who.heads, found.view.value) if r)
    width = model or math.prod(size_int(c.rank[r].size) for r in within)
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
    ]


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
            cut = sliced(g, w, batch=batch, queries=queries, keys=keys)
            out += _slice_ways(cut, LATENT_ROLES, g, "g", mesh, axis, _both())
    return out


def _slice_ways(cut: Latent, who: Roles, g: int, rank: str, mesh: Mesh, axis: str, more: Assignment) -> list[Way]:
    """TPLA in two ways: heads whole behind the slices, as published, or dealt out there.

    The first sends one sum of the output and holds the output's weights for all heads; the second divides them, and sends
    queries and the sum of what heads yield as well.
    """
    halves = mesh.split(axis, "slice", g)
    inside = ((rank, "slice"), (who.heads, axis))
    behind = Assignment(inside, ((rank, "slice"), (who.heads, "slice"), (who.heads, axis)))
    return [
        Way(name, cut.cascade, who, _joined([how, more]), halves, cut.exact, cut.why)
        for name, how in ((f"TPLA {g} slices", _both(*inside)), (f"TPLA {g} slices, heads behind", behind))
    ]


# --- latents of a captured attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """The forms of one attention over its latents, with their output projection; `kept` is bytes a token by tensor.

    `instead` are the bytes a token of keys and values, which the latents stand for.
    """

    who: Roles
    absorbed: Absorbed
    expanded: Cascade
    kept: tuple[tuple[str, int], ...]
    instead: int


def latents(upstream: Cascade | Obstacle, plain: Cascade, who: Roles) -> Latents | Obstacle:
    """The latent forms of an attention, from the cascade that makes its keys and values; or why there are none.

    `plain` is the attention on keys and values as they are. Both have their output projection.
    """
    if isinstance(upstream, Obstacle):
        return upstream
    found, expanded = (absorb(upstream, who.key, who.tokens, expand=e) for e in (False, True))
    if isinstance(found, Obstacle):
        return found
    assert isinstance(expanded, Absorbed), expanded
    kept, instead = (_a_token(c, who) for c in (found.cascade, plain))
    if sum(n for _, n in kept) >= sum(n for _, n in instead):
        said = ", ".join(f"{name} {n} bytes" for name, n in kept)
        return Obstacle(f"what keys and values are made of is no narrower: {said} a token, for {sum(n for _, n in instead)}")
    return Latents(who, found, expanded.cascade, kept, sum(n for _, n in instead))


def _a_token(c: Cascade, who: Roles) -> tuple[tuple[str, int], ...]:
    """Bytes that one device alone would cache, by tensor, for one token of one sequence."""
    whole = {r.name: size_int(r.size) for r in c.ranks}
    tokens = whole[who.key] * math.prod(whole[r] for r in who.batch if r in whole)
    held = place(c, who, Assignment((), ()), {}).cache
    return tuple((name, n // tokens) for name, n in held.items())


def captured_ways(plain: Cascade, found: Latents | None, who: Roles, mesh: Mesh) -> Iterator[Way]:
    """Every way for a captured attention: on keys and values, and on latents where it has them."""
    named = assignments(who, mesh)
    yield from (Way(name, plain, who, how, mesh) for name, how in named)
    if found is None:
        return
    for form, c in zip(FORMS, (found.absorbed.cascade, found.expanded)):
        yield from (Way(f"{form} {name}", c, who, how, mesh) for name, how in named)
    if mesh.size("tp") > 1 and mesh.size("cp") == 1:
        yield from _channel_ways(found, mesh)


def _channel_ways(found: Latents, mesh: Mesh) -> Iterator[Way]:
    """Latent channels on the axis of tensor parallelism, sequences on that of data parallelism."""
    a, who, n = found.absorbed, found.who, mesh.size("tp")
    if not shared(a, who.key, who.heads):
        return
    batch = _both((_first(who.batch), "dp"))
    whole, heads = tuple((r, "tp") for r in dict.fromkeys((*a.keys, a.values)) if r), (who.heads, "tp")
    beside = " × batch" if mesh.size("dp") > 1 else ""
    spread = _joined([Assignment(whole, (*whole, heads)), batch])
    yield Way(f"latent summed scores{beside}", a.cascade, who, spread, mesh)
    for g in sorted({2, n}):
        cut = slices(a, g) if n % g == 0 else None
        if isinstance(cut, Cascade):
            rank = next(r.name for r in cut.ranks if r.name not in a.cascade.rank)
            why = f"a softmax over each of {g} slices of the latent is not one over the whole, however latents are turned"
            for way in _slice_ways(Latent(cut, False, why), who, g, rank, mesh, "tp", batch):
                yield replace(way, name=f"{way.name}{beside}")
