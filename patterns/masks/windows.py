"""Windows over one and more dimensions, and ways to lay tokens out, as terms: nothing but predicates and index maps.

    neighborhood(q, k)   start(q) ≤ k < start(q) + w          start = clamp(leader(q) − w//2, 0, L − w)
    unfolded(keep, p)    p  →  y·W + x                         a predicate over positions becomes one over coordinates
    tile_order(p)        p  →  (tile, place in the tile)       so that a tile of several dimensions is contiguous

Source: Hassani et al., "Generalized Neighborhood Attention" (2504.16922), and NATTEN's mask definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .. import expr as ex
from ..expr import Expr
from ..terms.arithmetic import Span
from ..terms.intervals import spans
from .periodic import canonical


def neighborhood(
    q: Expr, k: Expr, *, length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> Expr:
    """The keys of a query in one dimension: `window` tokens, `dilation` apart, around the leader of its group of `stride`.

    A stride of 1 is neighbourhood attention, a stride of the window blocks (Swin); masks of several dimensions are
    conjunctions of these. Near the ends the window is shifted, not cut. Source: GNA, section 3; with dilation δ the
    tokens of each residue are a problem of their own. Raises ValueError for a window that does not fit.
    """
    if not (1 <= stride <= window and dilation >= 1 and window * dilation <= length):
        raise ValueError(
            f"a window of {window} with stride {stride} and dilation {dilation} does not fit {length} tokens: "
            "1 ≤ stride ≤ window and window · dilation ≤ length"
        )
    if dilation == 1:
        return _window(q, k, ex.const(length), window, stride, causal)
    residue = q % dilation
    size = (length + dilation - 1 - residue) // dilation
    inside = _window(q // dilation, k // dilation, size, window, stride, causal)
    return ex.equal(residue, k % dilation) & inside


def _window(q: Expr, k: Expr, length: Expr, window: int, stride: int, causal: bool) -> Expr:
    group = q // stride * stride
    if causal:
        leader = ex.minimum(group + (stride - 1), length - 1)
        return (k >= ex.maximum(leader - (window - 1), 0)) & (k <= q)
    start = ex.maximum(ex.minimum(group + (stride // 2 - window // 2), length - window), 0)
    return (k >= start) & (k < start + window)


# --- layouts ------------------------------------------------------------------------------------------------------


def flat(coordinates: Sequence[Expr], lengths: Sequence[int]) -> Expr:
    """The position of a point in row-major order: (y, x) ↦ y·W + x."""
    out = ex.const(0)
    for c, n in zip(coordinates, lengths):
        out = out * n + c
    return out


def unflat(position: Expr, lengths: Sequence[int]) -> tuple[Expr, ...]:
    """The coordinates of a position in row-major order: p ↦ (p // W, p % W)."""
    out = []
    for d in range(len(lengths)):
        below = math.prod(lengths[d + 1 :])
        out.append(position // below if d == 0 else position // below % lengths[d])
    return tuple(out)


def unfolded(keep: Expr, rank: str, lengths: Mapping[str, int]) -> Expr:
    """The predicate over coordinates instead of the positions of `rank`.

        before   |p // 8 − m // 8| ≤ 1          after   |y − m // 8| ≤ 1        for p = y·8 + x, 0 ≤ x < 8
    """
    position = flat([ex.index(r) for r in lengths], list(lengths.values()))
    box = {r: (np.float64(0), np.float64(n - 1)) for r, n in lengths.items()}
    out = ex.substitute(keep, {ex.index(rank): position})
    while (simpler := canonical(_narrowed(canonical(out), box))) is not out:
        out = simpler
    return out


def _narrowed(keep: Expr, box: Mapping[str, Span]) -> Expr:
    """Quotients and remainders of numbers that stay between two multiples, without them."""

    def rule(e: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if e.op not in ("floordiv", "mod") or not args[1].is_const or not args[0].ranks <= set(box) or ex.loads(args[0]):
            return None
        n = int(args[1].value)
        lo, hi = (float(x) for x in spans(args[0], box))
        if n <= 0 or not abs(lo) < math.inf or not abs(hi) < math.inf or lo // n != hi // n:
            return None
        turns = int(lo // n)
        return ex.const(turns) if e.op == "floordiv" else args[0] - turns * n

    return ex.rebuild(keep, rule)


def tile_order(position: Expr, lengths: Sequence[int], tile: Sequence[int]) -> tuple[Expr, ...]:
    """The coordinates of the token at a position when tokens lie tile after tile, each tile row-major.

    Lengths are rounded up to whole tiles: coordinates past them are padding, for the mask to leave out (`inside`).
    """
    grid = [-(-n // t) for n, t in zip(lengths, tile)]
    size = math.prod(tile)
    tiles, places = unflat(position // size, grid), unflat(position % size, list(tile))
    return tuple(i * t + j for i, j, t in zip(tiles, places, tile))


def residue_order(position: Expr, length: int, dilation: int) -> Expr:
    """The token at a position when the tokens of each residue lie together, in groups of ⌈length / dilation⌉."""
    group = -(-length // dilation)
    return position % group * dilation + position // group


def inside(coordinates: Sequence[Expr], lengths: Sequence[int]) -> Expr:
    """Whether a point is no padding."""
    out = ex.TRUE
    for c, n in zip(coordinates, lengths):
        out = out & (c < n)
    return out


def laid_out(keep: Expr, coordinates: Mapping[str, Expr]) -> Expr:
    """The predicate over other ranks: every coordinate by the term that it is in the new layout."""
    return ex.substitute(keep, {ex.index(r): e for r, e in coordinates.items()})
