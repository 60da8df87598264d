"""The CPU's loop for gradients of rows that name their keys: torch's tape through the printed forward, some rows at a time.

    for some rows:  near, far, values = leaves of q, k[T], v[T];  out = forward(near, far, values)
        dq = d near;   dk[T] += d far;   dv[T] += d values

A gather's adjoint adds where the gather read. Which keys are read is given, and passes nothing on. No more is on the tape
than what the rows of one turn read; sums over rows are made in their order, so that they are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu import Block, Run
from ..cpu_product import GATHERED, GATHERED_ROWS, At, State, gathered, named_keys

# Below every score of a key that counts: rows of nothing else are differentiated as they are written.
LOWEST = -1e29


class Flow(NamedTuple):
    """Where gradients add up: of queries [Z, H, P, E], of keys [Z, H/G, M, E], of values [Z, H/G, M, F], and of others."""

    dq: list[Tensor]
    dk: list[Tensor]
    dv: Tensor
    others: list[Tensor]


def selected_backward(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, grad: Tensor, given: Sequence[Tensor], slots: Tensor, first: int,
    places: int, block: int, real: torch.dtype, start: Sequence[float],
    score: Callable[[list[Tensor], At, Tensor, Tensor], Tensor],
    take: Callable[[Tensor, State, At], tuple[Tensor, Tensor | None, State]],
    finish: Callable[[Tensor, State, At], Tensor], least: float,
    plain: Callable[[Sequence[tuple[Tensor, Tensor]], Tensor, Tensor, int, Block], None],
) -> list[Tensor]:
    """The gradients of queries, keys and values, in this order, and of those in `given`, where the score reads these itself.

    `grad` [Z, H, P, F]; the others as `selected` takes them. Whatever `least` says, rows of which no named key counts are
    differentiated as they are written: a model's own gradients are NaN there, or reach all values.
    """
    (batch, heads, queries, _), keys = grad.shape, v.shape[2]
    near, far = ([torch.zeros(x.shape, dtype=real, device=x.device) for x in some] for some in zip(*pairs))
    flow = Flow(near, far, torch.zeros(v.shape, dtype=real, device=v.device), [torch.zeros_like(x) for x in given])
    width = max(first + slots.shape[3] * block, 1)
    wide = max([v.shape[3], *(k.shape[3] for _, k in pairs)])
    rows = max(1, min(GATHERED_ROWS, GATHERED * torch.get_num_threads() // (width * wide)))
    together = heads // slots.shape[1]
    for z in range(batch):
        for p0 in range(0, queries, rows):
            at = At(slice(z, z + 1), slice(0, heads), slice(p0, min(p0 + rows, queries)), slice(0, 0))
            for i, s in enumerate(slots[z, :, at.p]):
                m, there = named_keys(s, first, places, block, keys)
                here = at._replace(h=slice(i * together, (i + 1) * together))
                done = group_backward(pairs, v, grad, given, flow, here, m, there, real, start, score, take, finish)
                if done < here.h.stop:
                    as_written(pairs, v, grad, given, flow, at._replace(h=slice(done, heads)), plain)
                    break
    return [*flow.dq, *flow.dk, flow.dv, *flow.others]


def group_backward(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, grad: Tensor, given: Sequence[Tensor], flow: Flow, at: At, m: Tensor,
    there: Tensor, real: torch.dtype, start: Sequence[float], score: Callable[[list[Tensor], At, Tensor, Tensor], Tensor],
    take: Callable[[Tensor, State, At], tuple[Tensor, Tensor | None, State]],
    finish: Callable[[Tensor, State, At], Tensor],
) -> int:
    """The rows `at` of heads with the same keys; the first head of those whose rows have no named key that counts."""
    z, group, together = at.z.start, grad.shape[1] // v.shape[1], at.h.stop - at.h.start
    stop: int = at.h.stop
    count, width, index = m.shape[2], m.shape[3], m.reshape(-1)
    wide = max([v.shape[3], *(k.shape[3] for _, k in pairs)])
    few = max(1, GATHERED * torch.get_num_threads() // (count * width * wide))
    step = group * min(few, together // group) if together % group == 0 else math.gcd(group, together)
    for h in range(at.h.start, at.h.stop, step):
        here = at._replace(h=slice(h, min(h + step, at.h.stop)))
        heads, shared = here.h.stop - h, slice(h // group, (here.h.stop - 1) // group + 1)
        many = shared.stop - shared.start
        near = [leaf(q[z, here.h, at.p], q, real) for q, _ in pairs]
        far = [leaf(gathered(k[z, shared], index, real), k, real) for _, k in pairs]
        values = leaf(gathered(v[z, shared], index, real), v, real)
        with torch.enable_grad():
            scores = []
            for x, y in zip(near, far):
                # keys first: their gradient, the largest of all, comes as they lie
                product = y.view(many, count, width, -1) @ x.unflatten(0, (many, -1)).permute(0, 2, 3, 1)
                scores.append(product.permute(0, 3, 1, 2).reshape(1, heads, count, width))
            s = score(scores, here, m, there)
            if not bool((s.detach().amax(-1) >= LOWEST).all()):
                return h
            state: State = tuple(torch.full((1, heads, count, 1), y, dtype=real, device=v.device) for y in start)
            w, _, state = take(s, state, here)
            w = w.expand(1, heads, count, width).reshape(many, heads // many, count, width).transpose(1, 2)
            acc = w @ values.view(many, count, width, -1)
            out = finish(acc.transpose(1, 2).reshape(1, heads, count, -1), state, here)
        found = iter(reaching(out, [*near, *far, values, *given], grad[here.z, here.h, here.p], bool(given)))
        for into, part in zip(flow.dq, found):
            if part is not None:
                into[z, here.h, at.p] += part
        place = (torch.arange(shared.start, shared.stop, device=m.device)[:, None] * v.shape[2] + index).view(-1)
        for into, part in zip((*flow.dk, flow.dv), found):
            if part is not None:
                into[z].flatten(0, 1).index_add_(0, place, part.flatten(0, 1))
        add(flow.others, found)
    return stop


def as_written(
    pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor, grad: Tensor, given: Sequence[Tensor], flow: Flow, at: At,
    plain: Callable[[Sequence[tuple[Tensor, Tensor]], Tensor, Tensor, int, Block], None],
) -> None:
    """The rows `at` over all keys."""
    near, far = ([leaf(x, x, x.dtype) for x in some] for some in zip(*pairs))
    values = leaf(v, v, v.dtype)
    rows = Block(at.p.start, at.p.stop, at.p.stop - at.p.start, [Run(0, v.shape[2], True)])
    with torch.enable_grad():
        out = torch.zeros(grad.shape, dtype=flow.dv.dtype, device=grad.device)
        plain(list(zip(near, far)), values, out, at.z.start, rows)
        out = out[at.z, at.h, at.p]
    found = iter(reaching(out, [*near, *far, values, *given], grad[at.z, at.h, at.p], bool(given)))
    add([*flow.dq, *flow.dk, flow.dv, *flow.others], found)


def leaf(x: Tensor, of: Tensor, real: torch.dtype) -> Tensor:
    """The beginning of a tape, where what it is made of wants a gradient."""
    return x.detach().to(real).requires_grad_(of.requires_grad)


def reaching(out: Tensor, leaves: Sequence[Tensor], grad: Tensor, again: bool) -> list[Tensor | None]:
    """What reaches each of these; None where nothing does, or nothing is wanted."""
    wanted = [x for x in leaves if x.requires_grad]
    if not out.requires_grad:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), retain_graph=again, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in leaves]


def add(totals: Sequence[Tensor], parts: Iterator[Tensor | None]) -> None:
    for total, x in zip(totals, parts):
        if x is not None:
            total += x
