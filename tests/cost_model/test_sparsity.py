"""Block sparsity: the published counts by their id, every mask a predicate that the general machinery counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.count.neighborhood import GridTiles, TokenAxis, end_to_end, grid_tiles, separated
from reattend.cost_model.count.tiles import Data, Expectation, assumptions, expected, jobs, tile_map
from reattend.cost_model.count.work import count
from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers
from reattend.patterns.masks.split import FULL, PARTIAL, Mask, count_tiles
from reattend.patterns.masks.tiles import pairs
from reattend.patterns.masks.windows import flat, laid_out, neighborhood, residue_order, tile_order, unflat, unfolded
from reattend.patterns.verdict import Obstacle
from tests.loading import benchmark
from tests.tiers import examples

B, H, P, M = (ex.index(r) for r in "bhpm")
CAUSAL = M <= P
INF = float("inf")


def masked(keep: Expr) -> Mask:
    return Mask(keep, ex.const(0.0), (-INF,))


def kept_pairs(keep: Expr, n: int, **more: int) -> int:
    extents = {**more, "p": n, "m": n}
    found = count_tiles(keep, query="p", key="m", extents=extents, tile_p=16, tile_m=16)
    return pairs(keep, found, query="p", key="m", extents=extents)


# --- B8, B9: local and stride by head -----------------------------------------------------------------------------


def dkernel(local: int, stride: int, step: int) -> Expr:
    """Source: linxihui/dkernel: blocks of 64, `local` of them, and every `stride`-th, shifted by head."""
    i, j = P // 64, M // 64
    return (j <= i) & ((i - j < local) | ex.equal((j + H * step) % stride, 0))


def test_b8_rows_and_total() -> None:
    found = tile_map(masked(dkernel(2, 3, 1)), "p", "m", {"h": 1, "p": 512, "m": 512}, {}, 64, 64)
    assert found is not None
    assert found.counts().tolist() == [[1, 2, 3, 3, 3, 4, 4, 4]]
    assert (found.visited, found.partial) == (24, 0)


def test_b9_heads() -> None:
    n = 128 * 64
    found = tile_map(masked(dkernel(16, 8, 1)), "p", "m", {"b": 2, "h": 8, "p": n, "m": n}, {}, 64, 64)
    assert found is not None
    assert found.counts().sum(-1).tolist() == [2768, 2670, 2684, 2698, 2712, 2726, 2740, 2754]
    j = jobs(found, 2 * 8 * 128, 128, 128)
    assert (j.full.shape, j.repeat, j.partial.sum()) == ((8, 128), 2, 0)
    # the union over the heads is the causal triangle
    assert found.merged().visited == 8256


# --- B11, B12: video and images in one dimension ------------------------------------------------------------------


def radial(f: int, s: int) -> Expr:
    """Radial attention, equation 4: the reach halves whenever the distance of two frames doubles; frame 0 is a sink.

    Source: 2506.19852.
    """
    away = ex.unary("abs", P // s - M // s)
    near = ex.unary("abs", P % s - M % s)
    keep = M // s < 1
    level = 1
    while level < max(2, f):
        reach = (near + 1) * level <= s if level <= s else ex.FALSE
        thin = ex.equal(away % -(-level // s), 0) & ex.equal(near, 0)
        here = (away < 2) if level == 1 else (away >= level) & (away < 2 * level)
        keep = keep | (here & (reach | thin))
        level *= 2
    return keep


@pytest.mark.parametrize(
    ("f", "s", "nnz"), [(4, 4, 232), (8, 8, 3024), (16, 8, 8400), (32, 16, 92704), (64, 16, 223008), (128, 8, 119184)]
)
def test_b11_radial(f: int, s: int, nnz: int) -> None:
    found = kept_pairs(radial(f, s), f * s)
    assert found == nnz
    assert found <= 4 * s * s * f * np.log2(f)


def test_b12_criss_cross() -> None:
    keep = ex.equal(P // 64, M // 64) | ex.equal(P % 64, M % 64)
    assert kept_pairs(keep, 4096) == 520_192
    assert 520_192 / 4096**2 == pytest.approx(0.0310, abs=5e-5)


# --- GNA ----------------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]
FLUX, HUNYUAN, COSMOS = (256, 256), (30, 48, 80), (16, 44, 80)


def gna(lengths: Shape, window: Shape, stride: Shape, tile_q: Shape, tile_k: Shape, dynamic: bool = False) -> GridTiles:
    keep, axes = ex.TRUE, []
    extents: dict[str, int] = {}
    for d, (n, w, s, tq, tk) in enumerate(zip(lengths, window, stride, tile_q, tile_k)):
        keep = keep & neighborhood(ex.index(f"p{d}"), ex.index(f"m{d}"), length=n, window=w, stride=s)
        axes.append(TokenAxis(f"p{d}", f"m{d}", tq, tk))
        extents |= {f"p{d}": n, f"m{d}": n}
    found = grid_tiles(keep, axes, extents, dynamic=dynamic)
    assert isinstance(found, GridTiles)
    return found


FLUX_TILES = ((16, 16), (16, 8))
VIDEO_TILES = ((4, 8, 8), (2, 8, 8))
WIDE_TILES = ((2, 16, 8), (2, 8, 8))
COSMOS_TILES = ((8, 4, 8), (4, 4, 8))


@pytest.mark.parametrize(("stride", "most"), [((1, 1), 84), ((16, 1), 60), ((16, 16), 50)])
def test_b13_tiles(stride: Shape, most: int) -> None:
    found = gna(FLUX, (80, 80), stride, *FLUX_TILES)
    assert (found.most, found.tiles) == (most, 512)


# Layout, window, tiles; strides with the tiles of the longest query tile; share of the attention in the whole; steps that
# are sparse; the published simulated speed-ups. Source: GNA, tables of end-to-end speed-ups.
HUNYUAN_91 = [(1, 1, 1), (2, 1, 1), (1, 1, 8), (2, 1, 8), (1, 8, 8), (2, 8, 8), (16, 8, 8), (18, 24, 24)]
HUNYUAN_58 = [(1, 1, 1), (1, 1, 8), (1, 32, 8), (30, 40, 40)]
COSMOS_STRIDES = [(1, 1, 1), (1, 8, 1), (1, 1, 16), (1, 8, 16)]
FLUX_STRIDES = [(1, 1), (16, 1), (16, 16)]
TABLE: Sequence[tuple[str, Shape, Shape, tuple[Shape, Shape], Sequence[Shape], Sequence[int], float, float, Sequence[float]]] = [
    ("flux", FLUX, (80, 80), FLUX_TILES, FLUX_STRIDES, (84, 60, 50), 0.518, 1, (1.76, 1.84, 1.88)),
    ("flux 9/28", FLUX, (80, 80), FLUX_TILES, FLUX_STRIDES, (84, 60, 50), 0.518, 19 / 28, (1.42, 1.45, 1.46)),
    ("hunyuan 91", HUNYUAN, (18, 24, 24), VIDEO_TILES, HUNYUAN_91, (275, 250, 165, 150, 99, 90, 81, 135), 0.607, 1,
     (1.73, 1.78, 1.99, 2.02, 2.17, 2.20, 2.23, 2.06)),
    ("hunyuan 91 15/50", HUNYUAN, (18, 24, 24), VIDEO_TILES, HUNYUAN_91[:7], (275, 250, 165, 150, 99, 90, 81), 0.607, 35 / 50,
     (1.42, 1.44, 1.53, 1.55, 1.61, 1.62, 1.63)),
    ("hunyuan 58", HUNYUAN, (30, 40, 40), WIDE_TILES, HUNYUAN_58, (630, 450, 375, 450), 0.607, 1, (1.21, 1.44, 1.55, 1.44)),
    ("cosmos 89", COSMOS, (16, 24, 16), COSMOS_TILES, COSMOS_STRIDES, (84, 72, 56, 48), 0.587, 1, (1.90, 1.96, 2.05, 2.10)),
    ("cosmos 56", COSMOS, (16, 32, 48), COSMOS_TILES, COSMOS_STRIDES, (252, 224, 216, 192), 0.587, 1, (1.35, 1.42, 1.42, 1.50)),
]


def cells() -> list[tuple[str, float, float]]:
    """(name, what the paper's simulator says, what ours says)."""
    out = []
    for name, lengths, window, tiles, strides, most, share, sparse, published in TABLE:
        for stride, visited, theirs in zip(strides, most, published):
            found = gna(lengths, window, stride, *tiles)
            assert found.most == visited, (name, stride)
            out.append((f"{name} {stride}", theirs, end_to_end(share * sparse, found.bound)))
    return out


def test_b15_end_to_end() -> None:
    """The reference tabulates 33 of the paper's 42 cells in full; those are here, with its tolerances."""
    found = cells()
    assert len(found) == sum(len(row[4]) for row in TABLE) == 33
    off = {name: abs(ours - theirs) for name, theirs, ours in found}
    assert max(off.values()) <= 0.016, off
    assert sum(o > 0.008 for o in off.values()) <= 4, off


@pytest.mark.parametrize(("tile", "stride", "most", "mean"), [(128, 1, 17, 16.94), (128, 256, 16, 16.0)])
def test_b16_one_dimension(tile: int, stride: int, most: int, mean: float) -> None:
    found = gna((32768,), (2048,), (stride,), (tile,), (128,))
    assert (found.most, found.tiles) == (most, 256)
    assert found.mean == pytest.approx(mean, abs=5e-3)
    assert (found.partial == 0) == (stride == 256)


def test_b16_the_least_stride_that_is_block_sparse() -> None:
    """For the tiles of both kernels it is 256, as NATTEN says."""
    free = [
        s for s in (32, 64, 128, 256, 512)
        if all(gna((32768,), (2048,), (s,), (tq,), (128,)).partial == 0 for tq in (128, 256))
    ]
    assert free[0] == 256


@pytest.mark.parametrize(
    ("lengths", "window", "bound"), [(FLUX, (80, 80), 10.24), (HUNYUAN, (18, 24, 24), 11.11), (COSMOS, (16, 24, 16), 9.167)]
)
def test_b19_flop_bound(lengths: Shape, window: Shape, bound: float) -> None:
    ones = (1,) * len(lengths)
    found = gna(lengths, window, ones, tuple(8 for _ in ones), tuple(8 for _ in ones))
    assert found.flop_bound == pytest.approx(bound, abs=5e-3)


def test_b20_amdahl() -> None:
    found = gna(HUNYUAN, (18, 24, 24), (16, 8, 8), *VIDEO_TILES)
    assert end_to_end(0.607, found.bound) == pytest.approx(2.234, abs=5e-4)
    assert end_to_end(0.425, found.bound) == pytest.approx(1.630, abs=1e-3)


@pytest.mark.parametrize(
    ("lengths", "window", "stride", "tile_q", "tile_k"),
    [
        ((12, 20), (5, 7), (1, 1), (4, 4), (3, 4)), ((12, 20), (4, 10), (2, 5), (3, 5), (4, 4)),
        ((6, 8, 10), (3, 4, 5), (1, 2, 5), (2, 4, 5), (3, 4, 5)), ((13, 9), (6, 4), (3, 4), (4, 4), (4, 4)),
    ],
)
def test_products_against_brute_force(lengths: Shape, window: Shape, stride: Shape, tile_q: Shape, tile_k: Shape) -> None:
    found = gna(lengths, window, stride, tile_q, tile_k)
    n = int(np.prod(lengths))
    keep = ex.TRUE
    for p, m, length, w, s in zip(unflat(P, lengths), unflat(M, lengths), lengths, window, stride):
        keep = keep & neighborhood(p, m, length=length, window=w, stride=s)
    mask = count_tiles(keep, query="p", key="m", extents={"p": n, "m": n}, tile_p=1, tile_m=1).classes() == FULL
    boxes = [np.array(c) for c in product(*(range(0, length, t) for length, t in zip(lengths, tile_q)))]
    keys = [np.array(c) for c in product(*(range(0, length, t) for length, t in zip(lengths, tile_k)))]
    at = np.stack(np.unravel_index(np.arange(n), lengths))
    rows = np.stack([(at // np.array(tile_q)[:, None] == (b // tile_q)[:, None]).all(0) for b in boxes])
    columns = np.stack([(at // np.array(tile_k)[:, None] == (k // tile_k)[:, None]).all(0) for k in keys])
    kept = rows.astype(np.int64) @ mask.astype(np.int64) @ columns.T.astype(np.int64)
    size = rows.sum(1)[:, None] * columns.sum(1)[None]
    j = found.jobs()
    np.testing.assert_array_equal(j.visited[0], (kept > 0).sum(1))
    np.testing.assert_array_equal(j.full[0], (kept == size).sum(1))
    assert (found.visited, found.full, found.most) == ((kept > 0).sum(), (kept == size).sum(), (kept > 0).sum(1).max())
    assert found.pairs == mask.sum()
    assert found.mean <= found.most <= found.tiles


@examples(80)
@given(st.integers(2, 90).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.data())
def test_visits_of_one_dimension(sizes: tuple[int, int], data: st.DataObject) -> None:
    """Published pseudo-code of the simulator (static), and its rule for dynamic tiling, against the counts."""
    n, w = sizes
    s, tq, tk = data.draw(st.integers(1, w)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    found, moved = (gna((n,), (w,), (s,), (tq,), (tk,), dynamic) for dynamic in (False, True))
    left = w // 2
    starts = [max(min(i // s * s + s // 2 - left, n - w), 0) for i in range(n)]
    for i, q in enumerate(range(0, n, tq)):
        own = starts[q : q + tq]
        assert found.sides[0].visited[i] == (max(own) + w - 1) // tk - min(own) // tk + 1
        assert moved.sides[0].visited[i] == -(-(max(own) + w - min(own)) // tk)
        # full where every query of the tile keeps all of the tile's keys
        inner = range(min(own), max(own) + w, tk)
        whole = [a >= max(own) and min(a + tk, max(own) + w) <= min(own) + w for a in inner]
        assert moved.sides[0].full[i] == sum(whole)
    assert found.most <= -(-n // tk)
    assert found.visited >= -(-found.pairs // (tq * tk))
    assert found.mean <= found.most


@given(st.integers(1, 60), st.integers(1, 16), st.integers(1, 16))
def test_a_window_of_all_is_dense(n: int, tq: int, tk: int) -> None:
    found = gna((n,), (n,), (1,), (tq,), (tk,))
    assert found.full == found.visited == -(-n // tq) * -(-n // tk)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_blocks_reach_the_flop_bound(blocks: int, many: int, tq: int, tk: int) -> None:
    """A stride of the window, with tiles that divide it: Π L / Π w."""
    w = many * tq * tk
    found = gna((blocks * w, 2 * w), (w, w), (w, w), (tq, tk), (tk, tq))
    assert found.bound == found.flop_bound == 2 * blocks
    assert found.partial == 0


# --- layouts ------------------------------------------------------------------------------------------------------


def test_tile_order_makes_the_boxes_contiguous() -> None:
    """In tile order the one-dimensional count of the permuted mask is the count of the boxes."""
    lengths, window, stride, tile = (16, 24), (8, 12), (4, 2), (4, 6)
    boxes = gna(lengths, window, stride, tile, tile)
    coordinates = {
        f"{r}{d}": c for r in "pm" for d, c in enumerate(tile_order(ex.index(r), lengths, tile))
    }
    keep = ex.TRUE
    for d, (n, w, s) in enumerate(zip(lengths, window, stride)):
        keep = keep & neighborhood(ex.index(f"p{d}"), ex.index(f"m{d}"), length=n, window=w, stride=s)
    moved = laid_out(keep, coordinates)
    n = 16 * 24
    one = count_tiles(moved, query="p", key="m", extents={"p": n, "m": n}, tile_p=24, tile_m=24)
    np.testing.assert_array_equal(one.counts(), boxes.jobs().visited[0])
    assert (one.visited, one.full) == (boxes.visited, boxes.full)


def test_residues_together_make_dilation_cost_a_plain_window() -> None:
    """Dilation 4 touches every tile near the diagonal; with residues together it is four windows of a quarter."""
    n, window, dilation, tile = 2048, 64, 4, 64
    keep = neighborhood(P, M, length=n, window=window, dilation=dilation)
    moved = laid_out(keep, {r: residue_order(ex.index(r), n, dilation) for r in "pm"})
    spread, together = (
        count_tiles(k, query="p", key="m", extents={"p": n, "m": n}, tile_p=tile, tile_m=tile) for k in (keep, moved)
    )
    one = count_tiles(
        neighborhood(P, M, length=n // dilation, window=window), query="p", key="m",
        extents={"p": n // dilation, "m": n // dilation}, tile_p=tile, tile_m=tile,
    )
    assert (together.visited, together.full) == (dilation * one.visited, dilation * one.full)
    assert spread.visited > 1.5 * together.visited
    assert spread.full == 0


def test_one_dimensional_tiles_of_a_plane_cost_more() -> None:
    """The curse of multi-dimensionality: 1-D tiles of a 2-D window, by the generic path."""
    lengths, window = (32, 32), (8, 8)
    keep = ex.TRUE
    for p, m, n, w in zip(unflat(P, lengths), unflat(M, lengths), lengths, window):
        keep = keep & neighborhood(p, m, length=n, window=w)
    rows = count_tiles(keep, query="p", key="m", extents={"p": 1024, "m": 1024}, tile_p=64, tile_m=64)
    boxes = gna(lengths, window, (1, 1), (8, 8), (8, 8))
    assert rows.visited > 1.5 * boxes.visited / 2
    assert pairs(keep, rows, query="p", key="m", extents={"p": 1024, "m": 1024}) == boxes.pairs == 1024 * 64


def test_a_lifted_window_is_found_to_be_a_product() -> None:
    """The mask as a model writes it, over positions, becomes one over rows and columns, dimension by dimension."""
    near = (ex.unary("abs", P // 24 - M // 24) <= 3) & (ex.unary("abs", P % 24 - M % 24) <= 5)
    keep = unfolded(unfolded(near, "p", {"p0": 16, "p1": 24}), "m", {"m0": 16, "m1": 24})
    axes = [TokenAxis("p0", "m0", 4, 4), TokenAxis("p1", "m1", 8, 8)]
    extents = {"p0": 16, "m0": 16, "p1": 24, "m1": 24}
    parts = separated(keep, axes)
    assert not isinstance(parts, Obstacle)
    assert [p.ranks for p in parts] == [{"p0", "m0"}, {"p1", "m1"}]
    found = grid_tiles(keep, axes, extents)
    assert isinstance(found, GridTiles)
    assert found.pairs == kept_pairs(near, 16 * 24)


def test_what_is_no_product_says_so() -> None:
    ring = ex.unary("abs", ex.index("p0") - ex.index("m0")) + ex.unary("abs", ex.index("p1") - ex.index("m1")) < 4
    axes = [TokenAxis("p0", "m0", 4, 4), TokenAxis("p1", "m1", 4, 4)]
    found = grid_tiles(ring, axes, {"p0": 8, "m0": 8, "p1": 8, "m1": 8})
    assert isinstance(found, Obstacle)
    assert "ties m0, m1, p0, p1" in found.reason
    by_head = ex.index("p0") - ex.index("m0") < H
    assert isinstance(separated(by_head, axes), Obstacle)
    assert flat([ex.index("p0")], [8]) is ex.index("p0")


# --- what differs by head, and what data decides ------------------------------------------------------------------


def test_spans_by_head_are_counted_from_their_table() -> None:
    """MoA: every head has a window of its own, and a sink."""
    spans = np.array([256, 1024, 4096, 512])
    keep = CAUSAL & ((P - M < ex.load("span", (H,), "i64")) | (M < 64))
    n, t = 8192, 128
    found = tile_map(masked(keep), "p", "m", {"h": 4, "p": n, "m": n}, {}, t, t, Data.of({"span": spans}))
    assert found is not None
    a = np.arange(0, n, t)
    low = np.maximum(0, a - spans[:, None] + 1) // t
    visited = (a + t - 1) // t - low + 1 + np.minimum(1, low)
    np.testing.assert_array_equal(found.counts(), visited)
    # the same mask when nothing is known of the table: assumed to keep what causality keeps
    assert expected(keep) is CAUSAL
    assert assumptions(keep) == ("predicted as if span kept every key",)
    assert assumptions(keep, Data.of({"span": spans})) == ()


def test_slopes_by_head_cut_what_they_make_vanish() -> None:
    """ALiBi: keys whose bias is below −32 are cut, nearer for steeper heads."""
    slopes = np.array([0.5, 0.25, 0.125], np.float32)
    keep = CAUSAL & (ex.cast(P - M, "f32") * ex.load("slope", (H,), "f32") < 32.0)
    found = tile_map(masked(keep), "p", "m", {"h": 3, "p": 2048, "m": 2048}, {}, 64, 64, Data.of({"slope": slopes}))
    same = [tile_map(masked(CAUSAL & (P - M < w)), "p", "m", {"p": 2048, "m": 2048}, {}, 64, 64) for w in (64, 128, 256)]
    assert found is not None
    assert found.counts().sum(-1).tolist() == [s.visited for s in same if s is not None]
    assert found.counts(FULL).sum(-1).tolist() == [s.full for s in same if s is not None]


def test_segments_known_when_planning_are_exact() -> None:
    ids = np.repeat(np.arange(8), [100, 300, 28, 84, 128, 128, 200, 56])
    seg = [ex.load("seg", (r,), "i64") for r in (P, M)]
    keep = CAUSAL & ex.equal(*seg)
    found = tile_map(masked(keep), "p", "m", {"p": 1024, "m": 1024}, {}, 64, 64, Data.of({"seg": ids}))
    dense = (ids[:, None] == ids[None]) & (np.arange(1024)[:, None] >= np.arange(1024)[None])
    blocks = dense.reshape(16, 64, 16, 64).any((1, 3))
    assert found is not None
    assert found.visited == blocks.sum()
    # other segments are other tiles, whatever was counted before
    other = tile_map(masked(keep), "p", "m", {"p": 1024, "m": 1024}, {}, 64, 64, Data.of({"seg": ids * 0}))
    assert other is not None
    assert other.visited == 136


TABLE_OF_BLOCKS = ex.load("table", (H, P // 64, M // 64), "b1")


def chosen(keep: Expr, e: Expectation, tile: int = 64, n: int = 1024) -> tuple[float, float, tuple[str, ...]]:
    data = Data.of({}, e)
    mask = masked(keep)
    tiles = tile_map(mask, "p", "m", {"h": 2, "p": n, "m": n}, {}, tile, tile, data)
    found = jobs(tiles, 2 * n // tile, n // tile, n // tile, mask, data, (tile, tile))
    return float(found.full.sum()), float(found.visited.sum()), found.assumed


def test_top_k_blocks_are_an_expectation() -> None:
    """SeerAttention, MoBA: k key blocks a query block; causal rows that have fewer keep all of theirs."""
    e = Expectation("table", blocks=4)
    full, visited, words = chosen(TABLE_OF_BLOCKS, e)
    assert (full, visited) == (16 * 4, 16 * 4)
    assert words == ("expected: table keeps 4 key blocks of each row",)
    assert chosen(CAUSAL & TABLE_OF_BLOCKS, e)[1] == sum(min(i + 1, 4) for i in range(16))
    assert chosen(CAUSAL, e)[1] == 136


def test_a_share_of_blocks_is_an_expectation() -> None:
    full, visited, words = chosen(CAUSAL & TABLE_OF_BLOCKS, Expectation("table", share=0.25))
    assert (full, visited) == pytest.approx((30, 34))
    assert words == ("expected: table keeps 0.25 of the blocks",)
    # tiles of four blocks: visited when one of them is kept, full when all are
    wide = chosen(TABLE_OF_BLOCKS, Expectation("table", share=0.5, block_p=64, block_m=64), tile=128)
    assert wide[:2] == pytest.approx((64 / 16, 64 * 15 / 16))
    found = jobs(None, 32, 16, 16, masked(TABLE_OF_BLOCKS), Data.of({}, Expectation("table", share=0.25)), (64, 64))
    assert found.tally is not None
    assert (found.tally.total, found.tally.visited) == (256, 64)


@pytest.mark.parametrize("arguments", [{}, {"share": 0.5, "blocks": 3.0}, {"share": 1.5}, {"blocks": -1.0}])
def test_expectations_that_mean_nothing(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="table"):
        Expectation("table", **arguments)  # type: ignore[arg-type]


def test_b23_sparse_and_linear() -> None:
    """SLA: 5% of the blocks exact, a linear branch for the rest; FLOP over those of dense attention."""
    n, d = 32760, 128
    mask = masked(TABLE_OF_BLOCKS)
    data = Data.of({}, Expectation("table", share=0.05))
    rows = -(-n // 64)
    sparse = jobs(None, rows, rows, rows, mask, data, (64, 64))
    share = float(sparse.visited.sum()) / rows**2
    sizes = {"E": d, "F": d, "M": n, "P": n, **dict.fromkeys(("B", "H"), 1)}
    dense = 4 * n * n * d
    linear = count(papers.reassociated(), sizes={k: v for k, v in sizes.items() if k in papers.reassociated().free_symbols})
    flops = sum(int(sympy.Integer(x)) for x in linear.matrix.values())
    assert flops == 4 * n * d * d
    assert share + flops / dense == pytest.approx(0.05 + 128 / 32760, rel=1e-9)
    assert share + flops / dense == pytest.approx(0.0539, abs=5e-5)


# --- NATTEN's timings ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def natten() -> ModuleType:
    return benchmark("natten_timings")


def test_b21_ratios(natten: ModuleType) -> None:
    """NA over GNA, six measured ratios: tiles and the mask's cost explain them, held out or not."""
    assert len(natten.ratios()) == 6
    measured = [round(r.measured, 2) for r in natten.ratios()]
    assert sorted(measured) == [1.51, 1.53, 2.05, 2.11, 3.25, 3.38]
    assert natten.mape(natten.ratios(), 1.5) <= 0.05
    assert natten.loo_mape() <= 0.06
    # the rule to beat: the longest query tile, and masks that cost nothing
    rule = [abs(r.by_longest() / r.measured - 1) for r in natten.ratios()]
    assert sum(rule) / 6 > 0.15
    assert len([p for p in natten.points() if p.stride]) == 14


def test_natten_masks_where_not_block_sparse(natten: ModuleType) -> None:
    partial = {str(p): natten.tiles(p).partial > 0 for p in natten.points() if p.device == "b200"}
    assert partial["flux 1×1 b200"]
    assert not partial["flux 16×16 b200"]
    assert not partial["one 2048 b200"]
    assert not partial["hunyuan dense b200"]


def test_full_and_partial_tiles_cost_differently() -> None:
    found = tile_map(masked(CAUSAL), "p", "m", {"p": 1024, "m": 1024}, {}, 128, 128)
    assert found is not None
    j = jobs(found, 8, 8, 8)
    np.testing.assert_allclose(j.costs(1.5)[0], np.arange(8) + 1.5)
    assert found.counts(PARTIAL).tolist() == [1] * 8
