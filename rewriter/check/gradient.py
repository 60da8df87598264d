"""The derivatives of a rewritten site held against those of the model's own code.

A derivative is linear in what flows back, so that a random cotangent on the compared positions, and zero elsewhere, shows it
whole: it is compared at the first call, before a wrong gradient has reached a parameter, and the user's tape is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..graph.torch_private import may_hook_saved_tensors, tree_map
from .compare import CANCELLED, DRAWS, MAX_RATIO, SMALLEST_ROW, UNITS, Errors, change, drawn, errors, moved, redrawn
from .cut import CutProgram
from .demand import everything, kept, pick

# A gradient is a longer chain of rounded steps, and a backward that makes the weights again from their log-sum-exp
# rounds them once more: so many times what is asked of a result.
LONGER = 4.0


def wrong_gradient(
    p: CutProgram, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], generator: torch.Generator
) -> Errors | None:
    """The errors of the first input's gradient that is wrong; None where all are right."""
    wanting = [i for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad]
    with torch.enable_grad(), saved_by_us():
        flow = torch.randn(kept(p.own.shape, p.wanted), generator=generator)
        mine, exact = _own(p, given, wanting, flow, [_detached(x) for x in given])
        theirs = _ours(p, target, arguments, given, wanting, flow)
        types = {i: computed_in(mine[i]) for i in wanting}
        mine, theirs = ({i: x.to(types[i]) for i, x in y.items()} for y in (mine, theirs))
        found = {i: errors(theirs[i], mine[i], exact[i]) for i in wanting}
        doubtful = [i for i in wanting if not _right(found[i], (0.0, 0.0))]
        if not doubtful:
            return None
        _, other = _own(p, given, wanting, flow, moved(given))
        limits = {i: change(exact[i], other[i]) for i in doubtful}
        doubtful = [i for i in doubtful if not _right(found[i], limits[i])]
        doubtful = [i for i in doubtful if not _drowned(p, given, wanting, flow, i, theirs[i], exact[i])]
        whole = _whole(p, given, flow) if doubtful else 0.0
        doubtful = [i for i in doubtful if not vanishing(theirs[i], exact[i], whole)]
        if not doubtful:
            return None
        limits = _drawn(p, given, wanting, flow)
        return next((found[i] for i in doubtful if not _right(found[i], limits[i])), None)


def saved_by_us() -> AbstractContextManager[object]:
    """What is saved for a backward here is detached, and no hook of anybody sees it; where none may be set, none does."""
    return saved_tensors_hooks(Tensor.detach, lambda x: x) if may_hook_saved_tensors() else nullcontext()


def computed_in(own: Tensor) -> torch.dtype:
    """The type that a gradient's numbers were rounded to, whatever holds them: under autocast it is narrower."""
    if own.dtype != torch.float32 or not bool(own.any()):
        return own.dtype
    held = (t for t in (torch.bfloat16, torch.float16) if _equal(own.to(t).to(own.dtype), own))
    return next(held, own.dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | b.isnan()).all())


def _whole(p: CutProgram, given: Sequence[Any], flow: Tensor) -> float:
    """The size of what flows back through the result: sums of it are what a derivative cancels from."""
    with torch.no_grad():
        _, exact = p.run([_detached(x) for x in given])
        return float((flow.to(exact.device) * exact).nan_to_num(0.0, 0.0, 0.0).norm())


# What a derivative of this share of the whole is: 0, and rounded in float64.
ZERO = 2.0**-40


def vanishing(ours: Tensor, exact: Tensor, whole: float) -> bool:
    """Is a gradient 0 by itself (of a bias that a row's keys share), and ours rounding of sums as large as the `whole`?"""
    if not exact.numel() or not bool(ours.isfinite().all()) or float(exact.abs().max()) > ZERO * whole:
        return False
    # a scale's is a sum of scores times what cancels: as many units as where it is not 0
    return float(ours.abs().max()) <= LONGER * DROWNED.get(ours.dtype, 0.0) * torch.finfo(ours.dtype).eps * whole


# What one input is made by, so that scores are near 0 and no softmax is saturated.
FLAT = 1e-3
# Units of the largest number there that rounding of many terms may come to.
DROWNED = UNITS | {torch.float32: 64.0}


def _drowned(
    p: CutProgram, given: Sequence[Any], wanting: Sequence[int], flow: Tensor, i: int, ours: Tensor, exact: Tensor
) -> bool:
    """Is a gradient off by no more than the rounding of what it cancels from?

    Of a row with one key, of equal keys and behind a saturated softmax, p·(dp − Σ p·dp) is 0 or nearly so: what is left is
    rounding of p·dp. How large that is shows where nothing cancels: on numbers at random, as large as those at hand.
    """
    if not bool(ours.isfinite().all()) or not bool(exact.isfinite().all()):
        return False
    seen = []
    # One draw may be small by luck where a row has one key: the largest of some.
    for seed in range(DRAWS):
        sizes = []
        for share in (FLAT, FLAT / 2):
            generator = torch.Generator().manual_seed(i + len(given) * seed)
            plain = list(given)
            for j in wanting:
                x = given[j].detach()
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
                plain[j] = (noise * _usual(x) * (share if j == i else 1.0)).to(x.dtype)
            sizes.append(_own(p, plain, wanting, flow, [_detached(x) for x in plain])[1][i])
        seen.append((sizes[0], sizes[1]))
    return drowned(ours, exact, seen)


def drowned(ours: Tensor, exact: Tensor, seen: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Is a gradient off, row by row, by no more than rounding leaves of numbers as large as there are where nothing cancels?

    `seen`: the gradient where its input is made by FLAT, and by half of that, in one way or several: the largest counts.
    Queries, keys and values that lie in one tensor are all small then, and their gradients with them: by which power, the
    two tell.
    """
    each = []
    for there, half in seen:
        size, less = (_rows(x) for x in (there, half))
        power = (size / less).log2().nan_to_num(0.0, 0.0, 0.0).round().clamp(0, 3)
        each.append(size / FLAT**power)
    rows = torch.stack(each).amax(0)
    rows = rows.clamp_min(SMALLEST_ROW * float(rows.max()))
    limit = LONGER * DROWNED.get(ours.dtype, 0.0) * torch.finfo(ours.dtype).eps * rows
    return bool(((ours.double() - exact).abs() <= limit).all())


def _rows(x: Tensor) -> Tensor:
    """The largest number of each row."""
    size = x.nan_to_num(0.0, 0.0, 0.0).abs().double()
    return size.amax(-1, keepdim=True) if size.dim() else size


def _usual(x: Tensor) -> float:
    """The size of most of its numbers: a fill among them says nothing."""
    held = x.double().abs()
    held = held[held.isfinite() & (held > 0)]
    return float(held.median()) if held.numel() else 0.0


def _drawn(p: CutProgram, given: Sequence[Any], wanting: Sequence[int], flow: Tensor) -> dict[int, tuple[float, float]]:
    """What errors are right as well: the largest of the own code's, on inputs moved within their types.

    Where a derivative cancels, by how much the own code is off is luck on a few rows.
    """
    off: dict[int, list[Errors]] = {i: [] for i in wanting}
    for seed in range(DRAWS):
        shaken = redrawn(given, seed)
        mine, exact = _own(p, shaken, wanting, flow, [_detached(x) for x in shaken])
        for i in wanting:
            off[i].append(errors(mine[i], mine[i], exact[i], CANCELLED))
    return {i: drawn(e, LONGER) for i, e in off.items()}


def _right(e: Errors, yardstick: tuple[float, float]) -> bool:
    rms, largest = max(e.own_rms, e.floor), max(e.own_largest, e.floor)
    return e.within((max(LONGER * rms, yardstick[0]), max(LONGER * MAX_RATIO * largest, yardstick[1])))


def _own(
    p: CutProgram, given: Sequence[Any], wanting: Sequence[int], flow: Tensor, wide: Sequence[Any]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The gradients of the own code, in its own types and in float64."""
    leaves = {i: given[i].detach().requires_grad_() for i in wanting}
    wider = {i: wide[i].detach().double().requires_grad_() for i in wanting}
    own, exact = p.run([leaves.get(i, x) for i, x in enumerate(given)], [wider.get(i, x) for i, x in enumerate(wide)])
    back = flow.to(own.device, own.dtype)
    return _gradients(p, own, leaves, back), _gradients(p, exact, wider, back.double())


def _ours(
    p: CutProgram, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], wanting: Sequence[int],
    flow: Tensor,
) -> dict[int, Tensor]:
    """The gradients of what was spliced in."""
    at = {id(given[i]): i for i in wanting}
    leaves = {i: given[i].detach().requires_grad_() for i in wanting}
    call = tree_map(lambda x: leaves[at[id(x)]] if id(x) in at else _detached(x), tuple(arguments))
    out = target(*call).reshape(p.own.shape)
    out = out.to(p.own.values[p.own.output].dtype)
    shown = pick(out, everything(p.own.shape), p.wanted)
    return _gradients(p, shown, leaves, flow.to(shown.device, shown.dtype))


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _gradients(p: CutProgram, out: Tensor, leaves: dict[int, Tensor], flow: Tensor) -> dict[int, Tensor]:
    """The gradient of each leaf, summed where its values repeat; zero where none flows."""
    none = (None,) * len(leaves)
    found = torch.autograd.grad(out, list(leaves.values()), flow, allow_unused=True) if out.requires_grad else none
    whole = {i: torch.zeros_like(x) if g is None else g for (i, x), g in zip(leaves.items(), found)}
    return {i: g.sum(p.repeated[i], keepdim=True) if p.repeated.get(i) else g for i, g in whole.items()}
