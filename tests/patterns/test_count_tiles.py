"""Tile runs: closed form, repetition and descent against brute force on drawn masks, and what is derived from runs."""

from __future__ import annotations

import operator
import tracemalloc
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.masks import periodic
from reattend.patterns.masks.closed_form import in_closed_form
from reattend.patterns.masks.descent import Grid, KnownMask, descend
from reattend.patterns.masks.runs import Intervals, tile_runs
from reattend.patterns.masks.split import (
    EMPTY,
    FULL,
    PARTIAL,
    TileRuns,
    block_spans,
    classify,
    count_tiles,
    rows_with_key,
)
from reattend.patterns.masks.tiles import pairs
from reattend.patterns.terms.constant import number
from tests.tiers import examples

B, H, P, M = (ex.index(r) for r in "bhpm")
CAUSAL = M <= P
EXTENTS = {"b": 2, "h": 3, "p": 61, "m": 53}
RNG = np.random.default_rng(11)
TABLES: Mapping[str, np.ndarray] = {
    "span": np.array([3, 17, 40]), "slope": np.array([1, 2, 3]), "seg": np.sort(RNG.integers(0, 5, (2, 61)), axis=-1),
    "block": RNG.integers(0, 2, (3, 8, 8)), "start": np.array([[0, 9, 30], [4, 4, 50]]), "on": RNG.random(3) < 0.5,
}


def table(name: str, *at: Expr) -> Expr:
    return ex.load(name, at, "b1" if name == "on" else "i64")


def any_of(terms: Iterable[Expr]) -> Expr:
    return reduce(operator.or_, terms)


def brute(keep: Expr, extents: Mapping[str, int], tables: Mapping[str, np.ndarray] = TABLES) -> np.ndarray:
    """The mask point by point: [*batch, P, M]."""
    axes = np.meshgrid(*(np.arange(n) for n in extents.values()), indexing="ij", sparse=True)
    known = dict(zip((ex.index(r) for r in extents), axes))
    for e in ex.walk(keep):
        if e.op == "load":
            at = [number(a, {}, known) for a in e.args]
            inside = [np.clip(i, 0, n - 1) for i, n in zip(at, tables[str(e.attr)].shape)]
            known[e] = tables[str(e.attr)][tuple(inside)]
    return np.broadcast_to(number(keep, {}, known), tuple(extents.values())).astype(bool)


def brute_classes(mask: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    kept, size = mask.astype(np.int64), np.ones_like(mask, dtype=np.int64)
    for axis, side in ((-2, tile[0]), (-1, tile[1])):
        at = np.arange(0, mask.shape[axis], side)
        kept, size = np.add.reduceat(kept, at, axis), np.add.reduceat(size, at, axis)
    return np.asarray((kept > 0).astype(np.uint8) + (kept == size))


def grid_of(keep: Expr, tile: tuple[int, int], extents: Mapping[str, int] = EXTENTS) -> Grid:
    return Grid("p", "m", tuple(r for r in extents if r in keep.ranks and r not in "pm"), extents, *tile)


def runs_of(found: tuple[Intervals, Intervals], grid: Grid) -> TileRuns:
    entries = tuple(grid.extents[r] for r in grid.batch)
    sizes = grid.extents["p"], grid.extents["m"]
    return tile_runs(sizes, (grid.tile_p, grid.tile_m), grid.batch, entries, *found)


def extents_of(grid: Grid) -> dict[str, int]:
    return {r: grid.extents[r] for r in (*grid.batch, "p", "m")}


TILES = st.sampled_from([(8, 8), (4, 16), (61, 5), (1, 8), (7, 30), (16, 1)])
TILE_STAIRS = st.tuples(st.sampled_from([P, M]), st.integers(-9, 9), st.integers(1, 9)).map(lambda t: (t[0] + t[1]) // t[2])
FREE = st.sampled_from([H, B, table("span", H), table("start", B, H), H * 5 - B])


def affine_predicates() -> st.SearchStrategy[Expr]:
    """Comparisons of sums of one query and one key coordinate, scaled and rounded down, by heads and tables."""
    side = st.tuples(st.integers(-3, 3), st.sampled_from([P, M, P // 4, M // 4, (P + 3) // 5]), st.integers(-30, 60)).map(
        lambda t: t[1] * t[0] + t[2]
    )
    free = st.tuples(FREE, st.integers(-2, 2)).map(lambda t: t[0] * t[1])
    line = st.one_of(st.tuples(side, side).map(lambda t: t[0] - t[1]), st.tuples(side, side, free).map(lambda t: t[0] + t[1] + t[2]))
    bent = st.one_of(
        line, line.map(lambda e: ex.unary("abs", e)), st.tuples(line, line).map(lambda t: ex.maximum(*t)),
        st.tuples(line, line).map(lambda t: ex.minimum(*t)), st.tuples(line, line).map(lambda t: ex.where(CAUSAL, t[0], t[1])),
    )
    atom = st.one_of(
        st.tuples(st.sampled_from(ex.COMPARISONS), bent, st.integers(-20, 40)).map(lambda t: ex.binary(*t)),
        st.sampled_from([CAUSAL, P - M < 9, table("on", H), ex.equal(P // 6, M // 6), M < 5, P - M < table("span", H)]),
    )
    return st.recursive(
        atom,
        lambda p: st.one_of(st.tuples(p, p).map(lambda t: t[0] & t[1]), st.tuples(p, p).map(lambda t: t[0] | t[1]), p.map(lambda e: ~e),
                            st.tuples(p, p).map(lambda t: ex.binary("xor", *t)), st.tuples(p, p, p).map(lambda t: ex.where(*t))),
        max_leaves=4,
    )


@examples(400)
@given(affine_predicates(), TILES)
@example(CAUSAL & (P - M < 0), (8, 8))
@example((P * 2 - M < 7) & (M - P < 3), (4, 16))
@example(ex.equal(P, M + 3) | ex.equal(M * 3, P), (8, 8))
def test_closed_forms_have_no_difference(keep: Expr, tile: tuple[int, int]) -> None:
    grid = grid_of(keep, tile)
    of_load = block_spans(TABLES, tile)
    found = in_closed_form(KnownMask(keep, of_load), grid)
    if found is not None:
        expected = brute_classes(brute(keep, extents_of(grid)), tile)
        np.testing.assert_array_equal(runs_of(found, grid).classes(), expected)


@pytest.mark.parametrize(
    "keep",
    [
        CAUSAL, CAUSAL & (P - M < 9), ex.unary("abs", P - M) <= 7, CAUSAL & ((P - M < 9) | (M < 5)), M // 8 <= P // 8,
        (M // 8 <= P // 8) & (P // 8 - M // 8 < 3), P - M < table("span", H), ex.equal(P // 6, M // 6), 2 * P >= 3 * M + H,
        (M >= ex.maximum(ex.minimum(P - 4, 53 - 9), 0)) & (M < ex.maximum(ex.minimum(P - 4, 53 - 9), 0) + 9),
        ex.binary("ne", P, M), ex.where(P < 20, M < 20, M >= 20), ex.binary("xor", CAUSAL, P - M < 9), ex.equal(CAUSAL, P - M < table("span", H)),
        ex.binary("ne", M < 30, table("on", H)), ex.where(P < 20, M, M + 9) <= P, ex.TRUE & (M < 30), ~CAUSAL,
    ],
    ids=str,
)
def test_what_has_a_closed_form(keep: Expr) -> None:
    grid = grid_of(keep, (8, 8))
    found = in_closed_form(KnownMask(keep, block_spans(TABLES, (8, 8))), grid)
    assert found is not None
    np.testing.assert_array_equal(runs_of(found, grid).classes(), brute_classes(brute(keep, extents_of(grid)), (8, 8)))


@pytest.mark.parametrize(
    "keep",
    [
        ex.equal((P - M) % 3, 0), CAUSAL & ex.equal(P // 8, M), (P * 3 - M * 2 < 20) & (M * 2 - P * 3 < 20),
        ex.equal(table("seg", B, P), table("seg", B, M)), P - M < table("unknown", H), P * M < 9,
        # more cases than are looked at one by one
        any_of(P - M < k for k in range(7)) & any_of(M - P < k for k in range(7)),
        any_of(P - M < k for k in range(6)) & any_of(M - P < k for k in range(6)) | any_of(P < k for k in range(6)) & any_of(M < k for k in range(6)),
    ],
    ids=lambda e: str(e)[:60],
)
def test_what_has_none(keep: Expr) -> None:
    assert in_closed_form(KnownMask(keep, block_spans(TABLES, (8, 8))), grid_of(keep, (8, 8))) is None


# --- masks that repeat --------------------------------------------------------------------------------------------


def repeating() -> st.SearchStrategy[Expr]:
    apart = st.sampled_from([P - M, M - P, ex.unary("abs", P - M)])
    atom = st.one_of(
        st.tuples(apart, st.integers(2, 7), st.integers(0, 6)).map(lambda t: ex.equal(t[0] % t[1], t[2] % t[1])),
        st.tuples(apart, st.integers(-9, 40)).map(lambda t: t[0] < t[1]),
        st.tuples(st.sampled_from([2, 4, 8]), st.integers(0, 7)).map(lambda t: ex.equal(M % t[0], t[1] % t[0])),
        st.sampled_from([2, 4, 8, 16]).map(lambda n: ex.equal(P // n, M // n)),
        st.sampled_from([CAUSAL, M // 4 <= P // 4, ex.equal((P // 4 + M // 4 + H) % 2, 0)]),
    )
    return st.recursive(atom, lambda p: st.one_of(st.tuples(p, p).map(lambda t: t[0] & t[1]), st.tuples(p, p).map(lambda t: t[0] | t[1]), p.map(lambda e: ~e)), max_leaves=3)


@examples(200)
@given(repeating(), st.sampled_from([(8, 8), (4, 16), (16, 4), (8, 2)]), st.integers(1, 75), st.integers(1, 75))
def test_repeated_masks_have_no_difference(keep: Expr, tile: tuple[int, int], p: int, m: int) -> None:
    grid = grid_of(keep, tile, {"h": 2, "p": p, "m": m})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(periodic, "FEW", 0)
        found = periodic.repeated(KnownMask(keep, None), grid)
    if found is not None:
        np.testing.assert_array_equal(runs_of(found, grid).classes(), brute_classes(brute(keep, extents_of(grid)), tile))


@pytest.mark.parametrize("keep", [ex.equal((P - M) % 3, 0), CAUSAL & (P - M < 900) & ex.equal((P - M) % 4, 0), ex.equal(M % 64, 63)], ids=str)
def test_what_repeats(keep: Expr) -> None:
    extents = {"p": 1500, "m": 1400}
    found = periodic.repeated(KnownMask(keep, None), grid_of(keep, (16, 16), extents))
    assert found is not None
    np.testing.assert_array_equal(runs_of(found, grid_of(keep, (16, 16), extents)).classes(), brute_classes(brute(keep, extents), (16, 16)))


@pytest.mark.parametrize("keep", [CAUSAL & (M < 900), ex.equal(M % 1021, 5), P * 2 > M, ex.equal(table("seg", B, P), table("seg", B, M))], ids=str)
def test_what_does_not_repeat(keep: Expr) -> None:
    assert periodic.repeated(KnownMask(keep, None), grid_of(keep, (16, 16), {"b": 2, "p": 4000, "m": 4000})) is None


# --- any mask -----------------------------------------------------------------------------------------------------


def terms() -> st.SearchStrategy[Expr]:
    leaf = st.sampled_from([P, M, P, M, H, table("seg", B, P), table("seg", B, M), table("span", H), table("block", H, P // 8, M // 8)])
    return st.recursive(
        leaf,
        lambda e: st.one_of(
            st.tuples(st.sampled_from(["add", "sub", "sub", "max", "min"]), e, e).map(lambda t: ex.binary(*t)),
            st.tuples(st.sampled_from(["floordiv", "mod"]), e, st.integers(1, 9)).map(lambda t: ex.binary(*t)),
            st.tuples(e, st.integers(-3, 9)).map(lambda t: t[0] * t[1]), e.map(lambda x: ex.unary("abs", x)),
        ),
        max_leaves=3,
    )


def predicates() -> st.SearchStrategy[Expr]:
    atom = st.one_of(
        st.tuples(st.sampled_from(ex.COMPARISONS), terms(), terms()).map(lambda t: ex.binary(*t)),
        st.tuples(st.sampled_from(ex.COMPARISONS), terms(), st.integers(-5, 40)).map(lambda t: ex.binary(*t)),
        st.just(CAUSAL), st.just(table("on", H)),
    )
    return st.recursive(
        atom,
        lambda p: st.one_of(st.tuples(st.sampled_from(["and", "or", "xor"]), p, p).map(lambda t: ex.binary(*t)), p.map(lambda e: ~e)),
        max_leaves=4,
    )


@examples(300)
@given(predicates(), TILES, st.booleans())
def test_drawn_masks_have_no_difference(keep: Expr, tile: tuple[int, int], coarse: bool) -> None:
    """Whatever the mask, counts equal those of looking at every point, and lie between pairs and all."""
    grid = grid_of(keep, tile)
    of_load = block_spans(TABLES, tile)
    mask = brute(keep, extents_of(grid))
    expected = brute_classes(mask, tile)
    if coarse:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("reattend.patterns.masks.descent.COARSE", 4)
            found = runs_of(descend(KnownMask(keep, of_load), grid, settle=True), grid)
    else:
        found = count_tiles(keep, query="p", key="m", extents=EXTENTS, tile_p=tile[0], tile_m=tile[1], of_load=of_load)
    np.testing.assert_array_equal(found.classes(), expected)
    assert (found.visited, found.full) == ((expected != EMPTY).sum(), (expected == FULL).sum())
    np.testing.assert_array_equal(found.counts(), (expected != EMPTY).sum(-1))
    np.testing.assert_array_equal(found.counts(PARTIAL), (expected == PARTIAL).sum(-1))
    assert pairs(keep, found, query="p", key="m", extents=EXTENTS, of_load=of_load) == mask.sum()
    assert -(-int(mask.sum()) // (tile[0] * tile[1])) <= found.visited <= found.total
    certain = rows_with_key(keep, found, query="p", key="m", extents=EXTENTS, of_load=of_load)
    rows = np.logical_and.reduceat(mask.any(-1), np.arange(0, 61, tile[0]), -1)
    assert (rows | ~certain).all()


def test_thousands_of_open_tiles_are_settled() -> None:
    """Intervals do not see that p² − p is even: all 1,600 tiles are split down to points."""
    keep = ex.equal((P * P - P) % 2, 0) & (M < 130)
    found = count_tiles(keep, query="p", key="m", extents={"p": 160, "m": 160}, tile_p=4, tile_m=4)
    np.testing.assert_array_equal(found.classes(), brute_classes(brute(keep, {"p": 160, "m": 160}), (4, 4)))


# --- what is derived from runs ------------------------------------------------------------------------------------


@examples(100)
@given(predicates(), predicates(), st.integers(1, 9))
def test_runs_say_what_the_matrix_says(keep: Expr, other: Expr, at_most: int) -> None:
    keep, other = keep | (H > 5), other | (H > 5)
    both: dict[str, Any] = {
        "query": "p", "key": "m", "extents": EXTENTS, "tile_p": 8, "tile_m": 4, "of_load": block_spans(TABLES, (8, 4)),
    }
    found, second = count_tiles(keep, **both), count_tiles(other, **both)
    table = found.classes()
    flat = table.reshape(-1, *table.shape[-2:])
    merged = found.merged()
    kinds = np.where((flat == FULL).all(0), FULL, np.where((flat != EMPTY).any(0), PARTIAL, EMPTY))
    np.testing.assert_array_equal(merged.classes(), kinds)
    np.testing.assert_array_equal(found.has_full(), (table == FULL).any(-1))
    np.testing.assert_array_equal(found.has_visited(), (table != EMPTY).any(-1))
    first, last = found.ends
    some = table != EMPTY
    np.testing.assert_array_equal(first, np.where(some.any(-1), some.argmax(-1), 0))
    np.testing.assert_array_equal(last, np.where(some.any(-1), some.shape[-1] - some[..., ::-1].argmax(-1), 0))
    one = second.merged()
    np.testing.assert_array_equal(merged.outside(one), ((kinds != EMPTY) & (one.classes() != FULL)).any(-1))
    certain = RNG.random(found.shape[:-1]) < 0.5
    np.testing.assert_array_equal(found.guarded(certain).classes(), np.where(~certain[..., None] & ~some, PARTIAL, table))
    for kind in (PARTIAL, FULL):
        np.testing.assert_array_equal(np.stack(found.tiles_of(kind)), np.stack(np.nonzero(table == kind)))
    same = classify(keep, **both, settle=True)
    assert found.runs() == same.runs()
    np.testing.assert_array_equal(found.heavy_first(), same.heavy_first())
    _drawn_right(found.picture(at_most), kinds, at_most)


def _drawn_right(picture: Mapping[str, Any], kinds: np.ndarray, at_most: int) -> None:
    high, wide = picture["cell"]
    assert picture["grid"] == [-(-n // c) for n, c in zip(kinds.shape, (high, wide))]
    assert max(picture["grid"]) <= at_most
    assert len(picture["rows"]) == picture["grid"][0]
    for i, row in enumerate(picture["rows"]):
        drawn = ["empty"] * picture["grid"][1]
        for start, stop, kind in row:
            drawn[start:stop] = [kind] * (stop - start)
        for j, name in enumerate(drawn):
            cell = kinds[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            assert name == ("full" if (cell == FULL).all() else "partial" if (cell != EMPTY).any() else "empty")


def test_a_picture_is_plain_data() -> None:
    found = count_tiles(CAUSAL, query="p", key="m", extents={"p": 256, "m": 256}, tile_p=64, tile_m=64)
    assert found.picture() == {
        "tile": [64, 64], "size": [256, 256], "cell": [1, 1], "grid": [4, 4], "batch": [],
        "rows": [[[0, 1, "partial"]], [[0, 1, "full"], [1, 2, "partial"]], [[0, 2, "full"], [2, 3, "partial"]], [[0, 3, "full"], [3, 4, "partial"]]],
    }
    with pytest.raises(ValueError, match="at least one cell"):
        found.picture(0)


# --- a million tokens ---------------------------------------------------------------------------------------------


def test_a_million_tokens_with_windows_sinks_and_documents() -> None:
    """Counts of 1000 documents, from where each of them begins."""
    n, tile, window, sinks = 1 << 20, 128, 4096, 128
    cuts = np.sort(np.random.default_rng(0).choice(n - 1, 999, replace=False)) + 1
    starts = np.concatenate([[0], cuts])
    doc = np.zeros(n, np.int32)
    doc[cuts] = 1
    ids = {"doc": doc.cumsum().astype(np.int32)}
    p, m = (ex.load("doc", (r,), "i32") for r in (P, M))
    keep = CAUSAL & ((P - M < window) | (M < sinks)) & ex.equal(p, m)
    found = count_tiles(keep, query="p", key="m", extents={"p": n, "m": n}, tile_p=tile, tile_m=tile, of_load=block_spans(ids, (tile, tile)))
    first = np.arange(0, n, tile)
    last = first + tile - 1
    # a query tile sees from its window or the beginning of its first document, whichever is later, to itself
    begin = starts[ids["doc"][first]]
    low = np.maximum(begin, first - window + 1)
    visited = last // tile - low // tile + 1 + ((begin < sinks) & (low >= tile))
    np.testing.assert_array_equal(found.counts(), visited)
    assert len(found.row) < 4 * found.rows
    assert found.partial + found.full == found.visited < found.total / 500


def test_a_million_tokens_by_head() -> None:
    n = 1 << 20
    spans = {"span": np.array([1024, 4096, 65536])}
    found = count_tiles(
        CAUSAL & (P - M < table("span", H)), query="p", key="m", extents={"h": 3, "p": n, "m": n}, tile_p=128, tile_m=128,
        of_load=block_spans(spans, (128, 128)),
    )
    a = np.arange(0, n, 128)
    expected = [int(((a + 127) // 128 - np.maximum(0, a - w + 1) // 128 + 1).sum()) for w in spans["span"]]
    assert found.counts().sum(-1).tolist() == expected


def test_planning_a_million_tokens_makes_no_matrix_of_tiles() -> None:
    """8192 × 8192 tiles would be 64 MiB as bytes; what is counted is a few runs a row."""
    n = 1 << 20
    for keep in (CAUSAL, CAUSAL & ((P - M < 4096) | (M < 128)), CAUSAL & (P - M < 4096) & ex.equal((P - M) % 5, 0)):
        tracemalloc.start()
        found = count_tiles(keep, query="p", key="m", extents={"p": n, "m": n - 77}, tile_p=128, tile_m=128)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 24 << 20
        assert len(found.row) <= 4 * found.rows


@pytest.mark.parametrize("keep", [CAUSAL, CAUSAL & (P - M < 300), (P - M < 300) & (M - P < 100), ex.equal(P // 200, M // 200)], ids=str)
def test_lists_are_those_of_a_block_mask(keep: Expr) -> None:
    """The four arrays of FlexAttention's BlockMask, as PyTorch makes them by looking at every point."""
    dense = torch.from_numpy(brute(keep, {"p": 1000, "m": 900}))
    made = create_block_mask(lambda b, h, q, k: dense[q, k], None, None, 1000, 900, device="cpu")
    found = count_tiles(keep, query="p", key="m", extents={"p": 1000, "m": 900}, tile_p=128, tile_m=128)
    theirs = (made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices)
    for (counts, tiles), (n, at) in zip((found.lists(PARTIAL), found.lists(FULL)), theirs):
        assert n is not None
        assert at is not None
        # PyTorch pads the last row and column with masked points, so that its tiles there are never full
        for i in range(7):
            inner = [t for t in at[0, 0, i, : n[0, 0, i]].tolist() if t < 7]
            assert sorted(inner) == [t for t in tiles[i, : counts[i]].tolist() if t < 7]


def test_long_masks_are_counted_by_intervals() -> None:
    """A chain of three hundred choices and one of as many alternatives: no closed form, no recursion, the same counts."""
    cuts = np.sort(np.random.default_rng(3).choice(np.arange(1, 1500), 299, replace=False)).tolist()

    def segment(at: Expr) -> Expr:
        out: Expr = ex.const(len(cuts))
        for i in reversed(range(len(cuts))):
            out = ex.where(at < cuts[i], ex.const(i), out)
        return out

    alternatives = ex.FALSE
    for cut, after in zip([0, *cuts], [*cuts, 1500]):
        alternatives = alternatives | ((P >= cut) & (P < after) & (M >= cut) & (M < after))
    extents = {"p": 1500, "m": 1500}
    ids = np.searchsorted(cuts, np.arange(1500), side="right")
    expected = brute_classes(ids[:, None] == ids[None], (64, 64))
    for keep in (ex.equal(segment(P), segment(M)), alternatives):
        assert in_closed_form(KnownMask(keep, None), grid_of(keep, (64, 64), extents)) is None
        found = count_tiles(keep, query="p", key="m", extents=extents, tile_p=64, tile_m=64)
        np.testing.assert_array_equal(found.classes(), expected)
