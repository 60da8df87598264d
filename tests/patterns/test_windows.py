"""Windows and layouts: NATTEN's window point by point, published pattern counts, and index maps that are bijections."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.masks import rows
from reattend.patterns.masks.coordinates import Coordinate, places, plane
from reattend.patterns.masks.split import count_tiles
from reattend.patterns.masks.windows import (
    flat,
    inside,
    laid_out,
    neighborhood,
    residue_order,
    tile_order,
    unflat,
    unfolded,
)
from reattend.patterns.terms.constant import number
from tests.tiers import examples

P, M = ex.index("p"), ex.index("m")


def values(e: Expr, **extents: int) -> np.ndarray:
    axes = np.meshgrid(*(np.arange(n) for n in extents.values()), indexing="ij", sparse=True)
    found = number(e, {}, dict(zip((ex.index(r) for r in extents), axes)))
    return np.broadcast_to(found, tuple(extents.values()))


def natten(i: int, length: int, window: int, stride: int, causal: bool) -> tuple[int, int]:
    """[start, end) of a query, as the paper's definition has it."""
    left, right = window // 2, window // 2 + window % 2 - 1
    if causal:
        leader = min(i // stride * stride + stride - 1, length - 1)
        return max(leader - left - right, 0), i + 1
    leader = min(i // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0) + (length - right - leader - 1 if leader + right >= length else 0)
    return start, start + window


@examples(150)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.data())
def test_the_window_is_natten_s(sizes: tuple[int, int], data: st.DataObject) -> None:
    length, window = sizes
    stride, causal = data.draw(st.integers(1, window)), data.draw(st.booleans())
    dilation = data.draw(st.integers(1, length // window))
    keep = neighborhood(P, M, length=length, window=window, stride=stride, dilation=dilation, causal=causal)
    expected = np.zeros((length, length), bool)
    for residue in range(dilation):
        own = np.arange(residue, length, dilation)
        for i, q in enumerate(own):
            start, end = natten(i, len(own), window, stride, causal)
            expected[q, own[start:end]] = True
    np.testing.assert_array_equal(values(keep, p=length, m=length), expected)


@pytest.mark.parametrize(("window", "stride", "dilation"), [(0, 1, 1), (4, 5, 1), (4, 0, 1), (4, 1, 4), (4, 1, 0)])
def test_windows_that_do_not_fit(window: int, stride: int, dilation: int) -> None:
    with pytest.raises(ValueError, match="does not fit 15 tokens"):
        neighborhood(P, M, length=15, window=window, stride=stride, dilation=dilation)


@examples(60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.data())
def test_tile_order_visits_every_token_once(lengths: list[int], data: st.DataObject) -> None:
    tile = [data.draw(st.integers(1, 4)) for _ in lengths]
    size = math.prod(-(-n // t) * t for n, t in zip(lengths, tile))
    coordinates = tile_order(P, lengths, tile)
    real = values(inside(coordinates, lengths), p=size)
    seen = values(flat(coordinates, lengths), p=size)[real]
    assert sorted(seen.tolist()) == list(range(math.prod(lengths)))
    # a tile is contiguous
    block = np.stack([values(c, p=size) for c in coordinates]) // np.array(tile)[:, None]
    assert (block.reshape(len(lengths), -1, math.prod(tile)) == block[:, :: math.prod(tile), None]).all()


@given(st.integers(1, 40), st.integers(1, 6))
def test_residue_order_visits_every_token_once(length: int, dilation: int) -> None:
    size = -(-length // dilation) * dilation
    at = residue_order(P, length, dilation)
    seen = values(at, p=size)[values(inside([at], [length]), p=size)]
    assert sorted(seen.tolist()) == list(range(length))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_flat_undoes_unflat(lengths: list[int]) -> None:
    size = math.prod(lengths)
    np.testing.assert_array_equal(values(flat(unflat(P, lengths), lengths), p=size), np.arange(size))


def test_dilation_becomes_a_window_when_residues_lie_together() -> None:
    keep = neighborhood(P, M, length=24, window=4, dilation=3)
    moved = laid_out(keep, {"p": residue_order(P, 24, 3), "m": residue_order(M, 24, 3)})
    plain = values(ex.equal(P // 8, M // 8) & neighborhood(P % 8, M % 8, length=8, window=4), p=24, m=24)
    np.testing.assert_array_equal(values(moved, p=24, m=24), plain)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (M // 8 <= P // 8, "m0 ≤ p0"),
        (ex.equal(P % 8, M % 8) & (P // 8 - M // 8 < 2), "p1 = m1 ∧ p0 − m0 < 2"),
        (ex.equal(P // 8, M // 8) | ex.equal(P % 8, M % 8), "p0 = m0 ∨ p1 = m1"),
        (ex.unary("abs", P % 8 // 2 - M % 8 // 2) < 2, "|p1 // 2 − m1 // 2| < 2"),
    ],
    ids=str,
)
def test_unfolding_finds_the_coordinates(keep: Expr, expected: str) -> None:
    out = unfolded(unfolded(keep, "p", {"p0": 6, "p1": 8}), "m", {"m0": 6, "m1": 8})
    assert all(len(c.ranks) == 2 for c in ex.walk(out) if c.op in ex.COMPARISONS), (out, expected)
    assert not any(e.op == "mod" for e in ex.walk(out)), (out, expected)
    found = values(out, p0=6, p1=8, m0=6, m1=8).reshape(48, 48)
    np.testing.assert_array_equal(found, values(keep, p=48, m=48))


def strided(q: ex.Expr, k: ex.Expr, size: int, reach: int) -> ex.Expr:
    first = q // size * size
    return (k - first <= reach) & (first - k <= reach)


@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("steps", [(4, 5, 8, 6), (4, 1, 8, 1), (1, 3, 6, 2)], ids=str)
def test_rows_of_strided_planes_are_proved_by_their_coordinates(
    width: int, steps: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row keeps its own key for certain, and none is looked at key by key."""
    monkeypatch.setattr(rows, "SCORES", 0)
    p, m = ex.index("p"), ex.index("m")
    keep = strided(p // width, m // width, *steps[:2]) & strided(p % width, m % width, *steps[2:])
    extents = {"p": 32 * width, "m": 32 * width}
    tiles = count_tiles(keep, query="p", key="m", extents=extents, tile_p=64, tile_m=64)
    assert rows.rows_with_key(keep, tiles, query="p", key="m", extents=extents).all()


def test_coordinates_of_a_key() -> None:
    m = ex.index("m")
    keep = (m // 192 <= 3) & (m % 192 // 16 <= 2)
    assert plane(keep, m) == (Coordinate(192, None), Coordinate(16, 12), Coordinate(1, 16))
    # two ways to cut the keys are no plane
    assert plane((m // 10 <= 3) & (m // 16 <= 2), m) == ()
    assert places(m <= 4, "p", "m") == ()


def test_rows_that_no_bound_proves_are_looked_at() -> None:
    """The one kept key of a row is at none of its bounds."""
    p, m = ex.index("p"), ex.index("m")
    keep = ex.equal(m * 7 % 64, p)
    extents = {"p": 64, "m": 64}
    tiles = count_tiles(keep, query="p", key="m", extents=extents, tile_p=16, tile_m=16)
    assert rows.rows_with_key(keep, tiles, query="p", key="m", extents=extents).all()
    none = ex.equal(m * 2 % 64, p)
    tiles = count_tiles(none, query="p", key="m", extents=extents, tile_p=16, tile_m=16)
    assert not rows.rows_with_key(none, tiles, query="p", key="m", extents=extents).any()
