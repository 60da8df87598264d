"""Masks: separating them from scores, tile classes against known answers and brute force, rows that keep a key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor
from reattend.patterns.evaluate import DTYPE_NAME, evaluate
from reattend.patterns.expr import TRUE, Expr
from reattend.patterns.masks.split import (
    EMPTY,
    FULL,
    PARTIAL,
    TileMap,
    block_spans,
    classify,
    rows_with_key,
    runtime_classify,
    simplify_under,
    split,
)
from reattend.patterns.masks.tiles import pairs
from reattend.patterns.terms.conditions import normal
from tests.effort import calls, peak_bytes
from tests.tiers import examples

B, H, P, M = (ex.index(r) for r in "bhpm")
CAUSAL = M <= P
PAD = ex.load("pad", (B, M), "b1")
PAST = ex.symbol("past")
LOWEST = -3.4028234663852886e38
S = ex.load("QK", (B, P, M), "f32")


def window(size: int) -> Expr:
    return CAUSAL & (size > P - M)


def band(size: int) -> Expr:
    return (size >= P - M) & (size >= M - P)


def seg(rank: Expr) -> Expr:
    return ex.load("seg", (B, rank), "i64")


def f32(e: Expr) -> Expr:
    return ex.cast(e, "f32")


def fill(cond: Expr, value: float, other: Expr | float = 0.0) -> Expr:
    return ex.where(cond, ex.lift_scalar(other, "f32"), ex.const(value))


def tiles(keep: Expr, n: int, tile_p: int = 128, tile_m: int = 128, m: int | None = None, **more: int) -> TileMap:
    extents = {**more, "p": n, "m": m or n}
    return classify(keep, query="p", key="m", extents=extents, tile_p=tile_p, tile_m=tile_m)


def points(keep: Expr, extents: Mapping[str, int], arrays: Mapping[str, Any] | None = None) -> np.ndarray:
    """The mask as a boolean tensor, by the oracle."""
    tensors = {n: torch.from_numpy(np.asarray(a)) for n, a in (arrays or {}).items()}
    tensors = {n: t for n, t in tensors.items() if n in {str(e.attr) for e in ex.loads(keep)}}
    declared = [Tensor(n, tuple(t.shape), DTYPE_NAME[t.dtype]) for n, t in tensors.items()]
    einsum = Einsum(Access("out", tuple(ex.index(r) for r in extents)), keep)
    out = Tensor("out", tuple(extents.values()), "b1")
    c = Cascade("mask", tuple(Rank(r, s) for r, s in extents.items()), (*declared, out), (einsum,), ("out",))
    return np.asarray(evaluate(c, tensors)["out"])


def brute_classes(mask: np.ndarray, tile_p: int, tile_m: int) -> np.ndarray:
    """Classes of [..., P, M] by looking at every point."""
    kept, size = mask.astype(np.int64), np.ones_like(mask, dtype=np.int64)
    for axis, tile in ((-2, tile_p), (-1, tile_m)):
        at = np.arange(0, mask.shape[axis], tile)
        kept, size = np.add.reduceat(kept, at, axis), np.add.reduceat(size, at, axis)
    return np.asarray((kept > 0).astype(np.uint8) + (kept == size))


# --- split ------------------------------------------------------------------------------------------------------

BIAS = ex.load("bias", (P, M), "f32")
NUMBERS = ex.load("am", (B, M), "i64")
DOUBLE = f32(CAUSAL) * f32(PAD)


@pytest.mark.parametrize(
    ("score", "keep", "full", "fills"),
    [
        (fill(CAUSAL, -math.inf, S), CAUSAL, S, (-math.inf,)),
        (ex.where(~CAUSAL, -math.inf, S), CAUSAL, S, (-math.inf,)),
        (S * 0.125 + fill(CAUSAL & PAD, LOWEST), CAUSAL & PAD, S * 0.125, (LOWEST,)),
        (fill(CAUSAL, LOWEST) + S, CAUSAL, S, (LOWEST,)),
        (S + fill(CAUSAL, LOWEST) + fill(PAD, LOWEST), CAUSAL & PAD, S, (LOWEST,)),
        (S + (fill(CAUSAL, LOWEST) + fill(PAD, LOWEST)), CAUSAL & PAD, S, (LOWEST,)),
        (ex.maximum(S + fill(CAUSAL, LOWEST), LOWEST), CAUSAL, ex.maximum(S, LOWEST), (LOWEST,)),
        (ex.minimum(S + fill(CAUSAL, LOWEST), 1e4), CAUSAL, ex.minimum(S, 1e4), (LOWEST,)),
        (S + (1 - f32(PAD)) * -1e4, PAD, S, (-1e4,)),
        (S - (1 - f32(PAD)) * 1e4, PAD, S, (-1e4,)),
        (S - 1e4 * (1.0 - f32(CAUSAL)), CAUSAL, S, (-1e4,)),
        (S * f32(CAUSAL) - 1e4 * (1 - f32(CAUSAL)), CAUSAL, S, (-1e4,)),
        (S + (1 - f32(ex.binary("ne", NUMBERS, 0))) * LOWEST, ex.binary("ne", NUMBERS, 0), S, (LOWEST,)),
        (fill(ex.cast(NUMBERS, "b1"), -math.inf, S), ex.binary("ne", NUMBERS, 0), S, (-math.inf,)),
        (
            S + ex.where(ex.cast(1 - f32(NUMBERS), "b1"), LOWEST, 1 - f32(NUMBERS)),
            ex.equal(1 - f32(NUMBERS), 0.0), S, (LOWEST,),
        ),
        (ex.cast(fill(CAUSAL, LOWEST, S), "f64"), CAUSAL, ex.cast(S, "f64"), (LOWEST,)),
        (ex.cast(S + fill(CAUSAL, -math.inf), "bf16"), CAUSAL, ex.cast(S, "bf16"), (-math.inf,)),
        (S + f32(ex.cast(fill(CAUSAL, LOWEST), "f16")), CAUSAL, S, (-math.inf,)),
        ((S + fill(CAUSAL, LOWEST)) * 0.5, CAUSAL, S * 0.5, (LOWEST / 2,)),
        ((S + fill(CAUSAL, -1e9)) / 2, CAUSAL, S / 2, (-5e8,)),
        (0.5 * (S + fill(CAUSAL, LOWEST)), CAUSAL, 0.5 * S, (LOWEST / 2,)),
        (ex.maximum(LOWEST, S + fill(CAUSAL, LOWEST)), CAUSAL, ex.maximum(LOWEST, S), (LOWEST,)),
        (fill(CAUSAL, -1e3, S), CAUSAL, S, (-1e3,)),
        (fill(CAUSAL, -1e9, fill(PAD, LOWEST, S)), CAUSAL & PAD, S, (LOWEST, -1e9)),
        (fill(CAUSAL, LOWEST, S) + BIAS, CAUSAL, S + BIAS, (LOWEST,)),
        (ex.unary("tanh", S) * 50 + fill(CAUSAL, LOWEST), CAUSAL, ex.unary("tanh", S) * 50, (LOWEST,)),
        (S + ex.unary("log", f32(CAUSAL)), CAUSAL, S, (-math.inf,)),
        (fill(DOUBLE > 0.5, LOWEST, S), CAUSAL & PAD, S, (LOWEST,)),
        (ex.where(ex.equal(DOUBLE, 0.0), LOWEST, S), CAUSAL & PAD, S, (LOWEST,)),
        (ex.where(PAD, fill(CAUSAL, LOWEST, S), S), ~PAD | CAUSAL, S, (LOWEST,)),
        (ex.where(PAD, fill(CAUSAL, LOWEST, S), BIAS), ~PAD | CAUSAL, ex.where(PAD, S, BIAS), (LOWEST,)),
        (
            ex.where(PAD, fill(CAUSAL, LOWEST, S), fill(P - M < 3, -1e4, BIAS)),
            (~PAD | CAUSAL) & (PAD | (P - M < 3)), ex.where(PAD, S, BIAS), (LOWEST, -1e4),
        ),
        (S + ex.where(CAUSAL, f32(M - P) * 0.5, LOWEST), CAUSAL, S + f32(M - P) * 0.5, (LOWEST,)),
        (fill(P - M >= 0, LOWEST, S), P - M >= 0, S, (LOWEST,)),
        (fill(P > 3, LOWEST, S), P > 3, S, (LOWEST,)),
    ],
    ids=str,
)
def test_split(score: Expr, keep: Expr, full: Expr, fills: tuple[float, ...]) -> None:
    mask = split(score, "m")
    # the same predicate, however it is written
    arrays = {"pad": np.random.default_rng(0).random((2, 7)) < 0.5, "am": np.random.default_rng(1).integers(0, 3, (2, 7))}
    extents = {"b": 2, "p": 5, "m": 7}
    np.testing.assert_array_equal(points(mask.keep, extents, arrays), points(keep, extents, arrays))
    assert mask.full is full
    assert mask.fills == fills


@pytest.mark.parametrize(
    "score",
    [
        S,
        S + BIAS,
        S + (1 - f32(NUMBERS)) * LOWEST,
        S * f32(CAUSAL),
        S + fill(CAUSAL, -100.0),
        fill(CAUSAL, -999.0, S),
        (S + fill(CAUSAL, LOWEST)) / 0.0,
        (S + fill(CAUSAL, LOWEST)) * math.inf,
        1.0 / (S + fill(CAUSAL, -math.inf)),
        ex.unary("tanh", S + fill(CAUSAL, LOWEST)),
        ex.maximum(S + fill(CAUSAL, LOWEST), -50.0),
        (S + fill(CAUSAL, -1e4)) * 1e-3,
        (S + fill(CAUSAL, LOWEST)) * -1.0,
        S - fill(CAUSAL, LOWEST),
        ex.exp(fill(CAUSAL, -math.inf, S)),
        fill(CAUSAL, LOWEST, S) * ex.load("scale", (P,), "f32"),
    ],
    ids=str,
)
def test_split_leaves_alone(score: Expr) -> None:
    mask = split(score, "m")
    assert mask.keep is TRUE
    assert mask.full is score
    assert mask.fills == ()


def test_vanishing_fills() -> None:
    assert split(fill(CAUSAL, -math.inf, S), "m").vanishing
    assert split(fill(CAUSAL, LOWEST, S), "m").vanishing
    assert not split(fill(CAUSAL, -1e4, S), "m").vanishing
    assert split(S, "m").vanishing


def test_split_of_opaque_masks() -> None:
    """Additive masks that are read: the element itself says where it masks, and stays in the score."""
    mask = split(S * 0.5 + BIAS, "m", frozenset({"bias"}))
    assert (mask.keep, mask.full, mask.vanishing) == (BIAS > -1e32, S * 0.5 + BIAS, True)
    assert split(S + fill(CAUSAL, LOWEST, BIAS), "m", frozenset({"bias"})).keep is CAUSAL & (BIAS > -1e32)
    assert split(ex.unary("tanh", S + BIAS), "m", frozenset({"bias"})).keep is TRUE
    dense = np.where(np.tril(np.ones((32, 32), bool)), 0.0, LOWEST).astype(np.float32)
    dense[0, 0] = math.nan
    walk = runtime_classify(
        mask.keep, query="p", key="m", extents={"p": 32, "m": 32}, tile_p=8, tile_m=8, arrays={"bias": dense}
    )
    expected = np.tril(np.full((4, 4), FULL, np.uint8), -1) + np.eye(4, dtype=np.uint8) * PARTIAL
    np.testing.assert_array_equal(walk.tiles.classes, expected)


CONDITIONS = st.sampled_from([CAUSAL, PAD, P - M < 3, ex.equal(P // 2, M // 2), ~PAD, ex.cast(NUMBERS, "b1"), M < 4])
FILLS = st.sampled_from([-math.inf, LOWEST, -1e4, -1e9])


def masked(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    bools = st.recursive(
        CONDITIONS,
        lambda c: st.one_of(
            st.tuples(c, c).map(lambda t: t[0] & t[1]), st.tuples(c, c).map(lambda t: t[0] | t[1]), c.map(lambda e: ~e),
            st.tuples(c, c).map(lambda t: f32(t[0]) * f32(t[1]) > 0.5),
        ),
        max_leaves=3,
    )
    return st.one_of(
        st.tuples(bools, FILLS, inner).map(lambda t: fill(t[0], t[1], t[2])),
        st.tuples(bools, FILLS, inner).map(lambda t: ex.where(t[0], ex.const(t[1]), t[2])),
        st.tuples(bools, FILLS, inner).map(lambda t: t[2] + fill(t[0], t[1])),
        st.tuples(bools, inner).map(lambda t: t[1] - (1 - f32(t[0])) * 1e4),
        st.tuples(bools, inner).map(lambda t: t[1] * f32(t[0]) - (1 - f32(t[0])) * 1e4),
        st.tuples(bools, inner, inner).map(lambda t: ex.where(*t)),
        st.tuples(inner, st.sampled_from([0.5, 2.0, -1.0])).map(lambda t: t[0] * t[1]),
        st.tuples(inner, st.sampled_from([0.5, 2.0, -1.0])).map(lambda t: t[1] * t[0]),
        st.tuples(inner, st.sampled_from([0.5, 2.0, -1.0])).map(lambda t: t[0] / t[1]),
        st.tuples(inner, inner).map(lambda t: t[0] + t[1]),
        inner.map(lambda e: ex.maximum(e, LOWEST)),
        inner.map(lambda e: f32(ex.cast(e, "f64"))),
        inner.map(lambda e: ex.unary("tanh", e)),
    )


@examples(300)
@given(st.recursive(st.sampled_from([S, S, BIAS]), masked, max_leaves=4))
def test_split_means_the_score(score: Expr) -> None:
    """Where keep holds the score equals full bit by bit; elsewhere it is at most the largest fill plus what is finite."""
    rng = np.random.default_rng(2)
    arrays = {
        "pad": rng.random((2, 7)) < 0.5, "am": rng.integers(0, 3, (2, 7)),
        "QK": rng.standard_normal((2, 5, 7)).astype(np.float32), "bias": rng.standard_normal((5, 7)).astype(np.float32),
    }
    extents = {"b": 2, "p": 5, "m": 7}
    mask = split(score, "m")
    keep = points(mask.keep, extents, arrays)
    written, full = (values(e, extents, arrays) for e in (score, mask.full))
    np.testing.assert_array_equal(written[keep], full[keep])
    if mask.fills:
        finite = written[~keep]
        assert (finite[~np.isnan(finite)] <= max(mask.fills) + 100).all()


def values(term: Expr, extents: Mapping[str, int], arrays: Mapping[str, Any]) -> np.ndarray:
    tensors = {n: torch.from_numpy(a) for n, a in arrays.items() if n in {str(e.attr) for e in ex.loads(term)}}
    declared = [Tensor(n, tuple(t.shape), DTYPE_NAME[t.dtype]) for n, t in tensors.items()]
    einsum = Einsum(Access("out", tuple(ex.index(r) for r in extents)), term)
    out = Tensor("out", tuple(extents.values()), term.dtype)
    c = Cascade("term", tuple(Rank(r, s) for r, s in extents.items()), (*declared, out), (einsum,), ("out",))
    return np.asarray(evaluate(c, tensors)["out"])


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (f32(CAUSAL) * f32(PAD), ex.where(CAUSAL & PAD, ex.const(1.0), ex.const(0.0))),
        (ex.minimum(f32(CAUSAL), f32(PAD)), ex.where(CAUSAL & PAD, ex.const(1.0), ex.const(0.0))),
        (ex.maximum(f32(CAUSAL), f32(PAD)), ex.where(CAUSAL | PAD, ex.const(1.0), ex.const(0.0))),
        (fill(CAUSAL, -1.0, S) + fill(CAUSAL, 2.0, BIAS), fill(CAUSAL, 1.0, S + BIAS)),
        (~(P < M), CAUSAL),
        (P >= M, CAUSAL),
    ],
    ids=str,
)
def test_normal_form(term: Expr, expected: Expr) -> None:
    """One spelling of equal conditions and choices."""
    assert normal(term) is expected
    rng = np.random.default_rng(8)
    arrays = {
        "pad": rng.random((2, 7)) < 0.5, "QK": rng.standard_normal((2, 5, 7)).astype(np.float32),
        "bias": rng.standard_normal((5, 7)).astype(np.float32),
    }
    extents = {"b": 2, "p": 5, "m": 7}
    np.testing.assert_array_equal(values(term, extents, arrays), values(expected, extents, arrays))


def test_simplify_under() -> None:
    term = ex.where(CAUSAL & PAD, S, BIAS) + ex.where(M > P, BIAS, S)
    assert simplify_under(term, {CAUSAL & PAD: True}) is S + S
    assert simplify_under(ex.where(CAUSAL | PAD, S, BIAS), {CAUSAL | PAD: False}) is BIAS


# --- known answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "n", "tile_p", "tile_m", "visited", "full"),
    [
        pytest.param(CAUSAL, 8192, 128, 128, 2080, 2016, id="B1"),
        pytest.param(CAUSAL, 8192, 128, 64, 4160, 4032, id="B2-128x64"),
        pytest.param(CAUSAL, 4096, 64, 128, 1056, 992, id="B2-64x128"),
        pytest.param(band(512), 8192, 128, 128, 556, None, id="B4"),
        pytest.param(ex.unary("abs", P - M) <= 512, 8192, 128, 128, 556, None, id="B4-abs"),
        pytest.param(CAUSAL & ((M < 4) | (P - M < 1024)), 8192, 128, 128, 595, None, id="B5-8192"),
        pytest.param(CAUSAL & ((M < 128) | (P - M < 2048)), 131072, 128, 128, 18279, None, id="B5-131072"),
        pytest.param(M // 256 <= P // 256, 8 * 256, 128, 128, 144, 144, id="B7-aligned"),
        pytest.param(M // 200 <= P // 200, 5 * 200, 128, 128, 45, 32, id="B7-unaligned"),
        pytest.param(M <= P // 256 * 256 + 255, 8 * 256, 128, 128, 144, 144, id="B7-bound"),
        pytest.param(ex.equal(M // 256, P // 256), 8 * 256, 128, 128, 32, 32, id="blocks"),
        pytest.param(ex.equal((P - M) % 2, 0), 512, 128, 128, 16, 0, id="checkerboard"),
    ],
)
def test_known_tiles(keep: Expr, n: int, tile_p: int, tile_m: int, visited: int, full: int | None) -> None:
    found = tiles(keep, n, tile_p, tile_m)
    assert found.visited == visited
    assert full is None or found.full == full
    assert found.visited == found.full + found.partial


def test_b1_sparsity() -> None:
    assert round(100 * (1 - tiles(CAUSAL, 8192).density), 2) == 49.22


@pytest.mark.parametrize(("n", "size", "expected"), [(2048, 256, 2_359_296), (1000, 200, 600_000)], ids=["f8", "f5"])
def test_b7_pairs(n: int, size: int, expected: int) -> None:
    keep = M // size <= P // size
    assert pairs(keep, tiles(keep, n), query="p", key="m", extents={"p": n, "m": n}) == expected


def dkernel(block: int, local: int, stride: int, step: int) -> Expr:
    i, j = P // block, M // block
    return (j <= i) & ((i - j < local) | ex.equal((j + H * step) % stride, 0))


def test_b8_local_and_stride() -> None:
    found = tiles(dkernel(64, 2, 3, 1), 8 * 64, 64, 64, h=1)
    assert found.counts().tolist() == [[1, 2, 3, 3, 3, 4, 4, 4]]
    assert (found.visited, found.partial) == (24, 0)


def test_b9_local_and_stride_by_head() -> None:
    found = tiles(dkernel(64, 16, 8, 1), 128 * 64, 64, 64, h=8)
    assert found.counts().sum(-1).tolist() == [2768, 2670, 2684, 2698, 2712, 2726, 2740, 2754]
    assert found.partial == 0
    assert tiles(CAUSAL, 128 * 64, 64, 64).visited == 8256


# --- closed forms and brute force -------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


SIZES = st.tuples(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70))


@examples(200)
@given(SIZES, st.integers(1, 200))
def test_closed_forms_of_b1(sizes: tuple[int, int, int], w: int) -> None:
    n, tq, tk = sizes
    rows = [(a, min(a + tq, n) - 1) for a in range(0, n, tq)]
    causal = tiles(CAUSAL, n, tq, tk)
    assert causal.visited == sum(ceil_div(min(n, b + 1), tk) for _, b in rows)
    sliding = tiles(window(w), n, tq, tk)
    assert sliding.visited == sum(b // tk - max(0, a - w + 1) // tk + 1 for a, b in rows)
    both = tiles(band(w), n, tq, tk)
    assert both.visited == sum(min(n - 1, b + w) // tk - max(0, a - w) // tk + 1 for a, b in rows)
    for keep, found in ((CAUSAL, causal), (window(w), sliding), (band(w), both)):
        brute = brute_classes(points(keep, {"p": n, "m": n}), tq, tk)
        np.testing.assert_array_equal(found.classes, brute)


PRACTICAL = {
    "future": P < M,
    "strict": M < P,
    "window ahead": (M - P < 9) & (M >= P),
    "prefix": CAUSAL | (M < 21),
    "prefix window": window(13) | (M < 7),
    "past": M <= P + 5,
    "short": (M <= P) & (M < 30),
    "blocks": ex.equal(P // 10, M // 10),
    "block causal": (M // 7 <= P // 7) & (P // 7 - M // 7 < 3),
    "documents": CAUSAL & ex.equal(
        ex.where(P < 11, ex.const(0), ex.where(P < 40, ex.const(1), ex.const(2))),
        ex.where(M < 11, ex.const(0), ex.where(M < 40, ex.const(1), ex.const(2))),
    ),
    "ranges": ((P < 20) & (M < 20)) | ((P >= 20) & (M >= 20)),
    "dilated": CAUSAL & ex.equal((P - M) % 4, 0) & (P - M < 24),
    "checkerboard": ex.equal((P + M + H) % 2, 0),
    "heads": P - M < H * 4 + 1,
    "stride or local": CAUSAL & ((P - M < 5) | ex.equal(M % 8, 7)),
    "stripes": ex.equal((P // 4 + M // 4 + H) % 2, 0),
    "image window": (ex.unary("abs", P // 8 - M // 8) <= 1) & (ex.unary("abs", P % 8 - M % 8) <= 2),
    "criss-cross": ex.equal(P // 8, M // 8) | ex.equal(P % 8, M % 8),
    "nothing": (M < P) & (M > P),
    "everything": (M <= P) | (M > P - 1),
    "bits": ex.equal(ex.binary("and", ex.binary("xor", P, M), 12), 0),
}


@pytest.mark.parametrize("name", PRACTICAL)
@pytest.mark.parametrize(("p", "m", "tile_p", "tile_m"), [(64, 64, 8, 8), (61, 75, 8, 16), (1, 50, 16, 8), (37, 37, 5, 7)])
def test_practical_masks_are_exact(name: str, p: int, m: int, tile_p: int, tile_m: int) -> None:
    keep = PRACTICAL[name]
    extents = {**({"h": 3} if "h" in keep.ranks else {}), "p": p, "m": m}
    found = classify(keep, query="p", key="m", extents=extents, tile_p=tile_p, tile_m=tile_m)
    mask = points(keep, extents)
    np.testing.assert_array_equal(found.classes, brute_classes(mask, tile_p, tile_m))
    assert not found.data
    assert pairs(keep, found, query="p", key="m", extents=extents) == mask.sum()
    certain = rows_with_key(keep, found, query="p", key="m", extents=extents)
    sound_rows(certain, mask, tile_p)


def sound_rows(certain: np.ndarray, mask: np.ndarray, tile_p: int) -> None:
    has = np.asarray(mask.any(-1))
    for i in range(certain.shape[-1]):
        rows = has[..., i * tile_p : (i + 1) * tile_p].all(-1)
        assert (rows | ~certain[..., i]).all()


# --- a grammar of predicates ------------------------------------------------------------------------------------

EXTENTS = {"b": 2, "h": 3, "p": 23, "m": 29}
RNG = np.random.default_rng(7)
ARRAYS = {
    "pad": RNG.random((2, 29)) < 0.8,
    "seg": np.sort(RNG.integers(0, 4, (2, 29)), axis=-1),
    "table": RNG.integers(0, 12, 30),
    "dense": RNG.random((23, 29)) < 0.5,
}
PLAIN = st.sampled_from([P, M, M, P, H, B])
LOADED = st.sampled_from([seg(P), seg(M), ex.load("table", (M,), "i64"), ex.load("table", (seg(P) + 2,), "i64")])


def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "sub", "max", "min"]), inner, inner).map(lambda t: ex.binary(*t)),
        st.tuples(inner, st.integers(-3, 3)).map(lambda t: t[0] * t[1]),
        st.tuples(st.sampled_from(["floordiv", "mod"]), inner, st.integers(1, 9)).map(lambda t: ex.binary(*t)),
        st.tuples(inner, st.integers(-9, 9)).map(lambda t: t[0] + t[1]),
        inner.map(lambda e: ex.unary("abs", e)),
    )


def predicates(leaf: st.SearchStrategy[Expr], *bools: Expr) -> st.SearchStrategy[Expr]:
    terms = st.recursive(leaf, grown, max_leaves=4)
    compared = st.one_of(
        st.tuples(st.sampled_from(ex.COMPARISONS), terms, terms).map(lambda t: ex.binary(*t)),
        st.tuples(st.sampled_from(ex.COMPARISONS), terms, st.integers(-5, 30)).map(lambda t: ex.binary(*t)),
        st.sampled_from([CAUSAL, window(6), *bools]),
    )
    return st.recursive(
        compared,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["and", "or", "and", "xor"]), inner, inner).map(lambda t: ex.binary(*t)),
            inner.map(lambda e: ~e),
        ),
        max_leaves=4,
    )


TILES = st.sampled_from([(8, 8), (4, 16), (23, 5), (1, 8), (7, 30)])


@examples(200)
@given(predicates(PLAIN), TILES)
def test_static_predicates_are_exact(keep: Expr, tile: tuple[int, int]) -> None:
    found = classify(keep, query="p", key="m", extents=EXTENTS, tile_p=tile[0], tile_m=tile[1])
    extents = {r: n for r, n in EXTENTS.items() if r in (*found.batch, "p", "m")}
    mask = points(keep, extents)
    np.testing.assert_array_equal(found.classes, brute_classes(mask, *tile))
    sound_rows(rows_with_key(keep, found, query="p", key="m", extents=EXTENTS), mask, tile[0])


@examples(300)
@given(predicates(st.one_of(PLAIN, LOADED), PAD, ex.load("dense", (P, M), "b1")), TILES, st.booleans())
def test_predicates_with_loads_are_sound(keep: Expr, tile: tuple[int, int], known: bool) -> None:
    arguments: dict[str, Any] = {
        "query": "p", "key": "m", "extents": EXTENTS, "of_load": block_spans(ARRAYS, tile) if known else None,
    }
    found = classify(keep, tile_p=tile[0], tile_m=tile[1], **arguments)
    extents = {r: n for r, n in EXTENTS.items() if r in (*found.batch, "p", "m")}
    mask = points(keep, extents, ARRAYS)
    brute = brute_classes(mask, *tile)
    np.testing.assert_array_equal(found.classes == FULL, (found.classes == FULL) & (brute == FULL))
    np.testing.assert_array_equal(found.classes == EMPTY, (found.classes == EMPTY) & (brute == EMPTY))
    certain = rows_with_key(keep, found, **arguments)
    sound_rows(certain, mask, tile[0])
    if known:
        settled = classify(keep, tile_p=tile[0], tile_m=tile[1], settle=True, **arguments)
        np.testing.assert_array_equal(settled.classes, brute)
        assert pairs(keep, found, **arguments) == mask.sum()


# --- large grids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [CAUSAL, window(4096), band(1024), CAUSAL & ((M < 128) | (P - M < 2048))], ids=str)
def test_long_sequences_cost_what_their_tiles_do(keep: Expr) -> None:
    n = 131072
    found = tiles(keep, n + 128)
    certain = rows_with_key(keep, found, query="p", key="m", extents={"p": n + 128, "m": n + 128})
    assert found.classes.shape == (1025, 1025)
    assert certain.all()

    def work() -> None:
        again = tiles(keep, n + 128)
        rows_with_key(keep, again, query="p", key="m", extents={"p": n + 128, "m": n + 128})

    # 700 to 2,000 calls, a byte a tile: nothing of n² elements
    assert calls(work) < 4000
    assert peak_bytes(work) < 2 * found.classes.size
    # every tile on a coarse grid, and the neighbourhood of what is not empty, against direct evaluation of corners
    lo = np.arange(1025) * 128
    hi = lo + 127
    if keep is CAUSAL:
        np.testing.assert_array_equal(found.classes == FULL, hi[None, :] <= lo[:, None])
        np.testing.assert_array_equal(found.classes == EMPTY, lo[None, :] > hi[:, None])


def test_subdivision_equals_the_dense_grid() -> None:
    for keep in (CAUSAL, window(300), ex.equal(P // 100, M // 100), P - M < H * 200 + 1):
        extents = {**({"h": 3} if "h" in keep.ranks else {}), "p": 1111, "m": 999}
        found = classify(keep, query="p", key="m", extents=extents, tile_p=4, tile_m=8)
        assert found.total > 4096
        np.testing.assert_array_equal(found.classes, brute_classes(points(keep, extents), 4, 8))


@pytest.mark.parametrize("settle", [False, True])
def test_subdivision_of_a_mask_of_data(settle: bool) -> None:
    arrays = {"seg": np.sort(np.random.default_rng(4).integers(0, 9, (2, 1111)), axis=-1)}
    keep = (M < P + 50) & ex.equal(seg(P), seg(M)) & ex.binary("ne", seg(M) % 3, 1)
    arguments: dict[str, Any] = {"query": "p", "key": "m", "extents": {"b": 2, "p": 1111, "m": 999}, "tile_p": 8, "tile_m": 16}
    found = classify(keep, of_load=block_spans(arrays, (8, 16)), settle=settle, **arguments)
    assert found.total > 4096
    expected = brute_classes(points(keep, arguments["extents"], arrays), 8, 16)
    assert ((found.classes == expected) | (found.classes == PARTIAL)).all()
    assert not settle or (found.classes == expected).all()


def test_static_maps_are_cached_and_read_only() -> None:
    assert tiles(CAUSAL, 777) is tiles(CAUSAL, 777)
    with pytest.raises(ValueError, match="read-only"):
        tiles(CAUSAL, 777).classes[0, 0] = 1


# --- what kernels walk ------------------------------------------------------------------------------------------


def test_rows_and_runs_list_the_visited_tiles() -> None:
    found = tiles(CAUSAL & ((M < 4) | (P - M < 20)) & (H < 2), 100, 8, 8, h=3)
    rows, runs = found.rows(), found.runs()
    flat = found.classes.reshape(-1, found.classes.shape[-1])
    for i, row in enumerate(flat):
        n = rows.counts.reshape(-1)[i]
        visited = np.flatnonzero(row != EMPTY)
        np.testing.assert_array_equal(rows.indices.reshape(len(flat), -1)[i, :n], visited)
        np.testing.assert_array_equal(rows.partial.reshape(len(flat), -1)[i, :n], row[visited] == PARTIAL)
        kinds = np.zeros(100, np.uint8)
        for run in runs[i]:
            assert run.start < run.stop <= 100
            kinds[run.start : run.stop] = run.kind
        np.testing.assert_array_equal(kinds, np.repeat(row, 8)[:100])
        for a, b in zip(runs[i], runs[i][1:]):
            assert a.stop < b.start or a.kind != b.kind


def test_heavy_first() -> None:
    assert tiles(CAUSAL, 512).heavy_first().tolist() == [3, 2, 1, 0]
    counts = tiles(window(200), 2048).counts()
    order = tiles(window(200), 2048).heavy_first()
    assert (np.diff(counts[order]) <= 0).all()


def test_rows_in_torch() -> None:
    arrays = {"pad": np.arange(64)[None] >= np.array([[0], [20]])}
    extents = {"b": 2, "p": 64, "m": 64}
    a = runtime_classify(CAUSAL & PAD, query="p", key="m", extents=extents, tile_p=8, tile_m=8, arrays=arrays)
    b = runtime_classify(
        CAUSAL & PAD, query="p", key="m", extents=extents, tile_p=8, tile_m=8,
        arrays={"pad": torch.from_numpy(arrays["pad"])}, xp=torch,
    )
    for x, y in ((a.tiles, b.tiles), (a.guarded, b.guarded)):
        np.testing.assert_array_equal(x.classes, y.classes.numpy())
        np.testing.assert_array_equal(x.rows().counts, y.rows().counts.numpy())
        used = np.arange(x.rows().indices.shape[-1]) < x.rows().counts[..., None]
        np.testing.assert_array_equal(x.rows().indices[used], y.rows().indices.numpy()[used])
        np.testing.assert_array_equal(x.rows().partial[used], y.rows().partial.numpy()[used])
        assert (x.visited, x.full, x.partial) == (y.visited, y.full, y.partial)


# --- run-time data ----------------------------------------------------------------------------------------------


def run_time(keep: Expr, arrays: Mapping[str, np.ndarray], p: int, m: int, tile: int, past: int = 0) -> Any:
    batch = next(iter(arrays.values())).shape[0]
    return runtime_classify(
        keep, query="p", key="m", extents={"b": batch, "p": p, "m": m}, symbols={"past": past}, tile_p=tile,
        tile_m=tile, arrays=arrays,
    )


def left_padding(batch: int, size: int, widest: int) -> np.ndarray:
    return np.arange(size)[None] >= np.random.default_rng(3).integers(0, widest, batch)[:, None]


def test_padding_classes_are_exact() -> None:
    arrays = {"pad": left_padding(4, 256, 100)}
    walk = run_time((M <= P + PAST) & PAD, arrays, 256, 256, 16)
    mask = points(CAUSAL & PAD, {"b": 4, "p": 256, "m": 256}, arrays)
    np.testing.assert_array_equal(walk.tiles.classes, brute_classes(mask, 16, 16))
    assert walk.tiles.data
    # left padding: exactly the rows before the first token have no key
    has = mask.any(-1).reshape(4, 16, 16).all(-1)
    np.testing.assert_array_equal(walk.certain, has)
    guarded = walk.guarded.classes
    assert (guarded[~has] != EMPTY).all()
    np.testing.assert_array_equal(guarded[has], walk.tiles.classes[has])


def test_right_padding_and_holes_keep_every_row() -> None:
    pad = np.random.default_rng(5).random((3, 128)) < 0.6
    pad[:, 0] = True
    walk = run_time(CAUSAL & PAD, {"pad": pad}, 128, 128, 16)
    assert walk.certain.all()
    walk = run_time(PAD, {"pad": pad}, 128, 128, 16)
    assert walk.certain.all()
    walk = run_time(PAD, {"pad": pad & (np.arange(3) > 0)[:, None]}, 128, 128, 16)
    assert walk.certain.tolist() == [[False] * 8, [True] * 8, [True] * 8]


@pytest.mark.parametrize("keep", [CAUSAL & PAD, (M < P + 9) & PAD, (M > P - 9) & CAUSAL & PAD], ids=str)
def test_rows_are_proved_by_the_nearest_key_that_data_keeps(keep: Expr) -> None:
    pad = np.random.default_rng(7).random((3, 128)) < 0.3
    pad[:, 0] = False
    walk = run_time(keep, {"pad": pad}, 128, 128, 16)
    has = points(keep, {"b": 3, "p": 128, "m": 128}, {"pad": pad}).any(-1).reshape(3, 8, 16).all(-1)
    np.testing.assert_array_equal(walk.certain, has)
    assert has.any()


def test_segments() -> None:
    arrays = {"seg": np.sort(np.random.default_rng(6).integers(0, 6, (3, 200)), axis=-1)}
    keep = CAUSAL & ex.equal(seg(P), seg(M))
    walk = run_time(keep, arrays, 200, 200, 16)
    mask = points(keep, {"b": 3, "p": 200, "m": 200}, arrays)
    brute = brute_classes(mask, 16, 16)
    np.testing.assert_array_equal(walk.tiles.classes == FULL, brute == FULL)
    np.testing.assert_array_equal(walk.tiles.classes == EMPTY, brute == EMPTY)
    assert walk.certain.all()


def test_decode_reads_one_row() -> None:
    arrays = {"pad": left_padding(8, 1024, 300)}
    walk = run_time((M <= P + PAST) & PAD, arrays, 1, 1024, 128, past=1023)
    mask = points((M <= P + 1023) & PAD, {"b": 8, "p": 1, "m": 1024}, arrays)
    np.testing.assert_array_equal(walk.tiles.classes, brute_classes(mask, 1, 128))
    assert walk.certain.all()


def test_unknown_loads_leave_what_coordinates_decide() -> None:
    found = classify(CAUSAL & PAD, query="p", key="m", extents={"b": 2, "p": 64, "m": 64}, tile_p=8, tile_m=8)
    expected = np.tril(np.full((8, 8), PARTIAL))
    np.testing.assert_array_equal(found.classes, np.stack([expected] * 2))
    assert not rows_with_key(CAUSAL & PAD, found, query="p", key="m", extents={"b": 2, "p": 64, "m": 64}).any()
    # a row always keeps itself when it compares with itself
    keep = CAUSAL & ex.equal(seg(P), seg(M))
    found = classify(keep, query="p", key="m", extents={"b": 2, "p": 64, "m": 64}, tile_p=8, tile_m=8)
    assert rows_with_key(keep, found, query="p", key="m", extents={"b": 2, "p": 64, "m": 64}).all()


def test_run_time_data_costs_what_its_blocks_do() -> None:
    arrays = {"pad": left_padding(8, 4096, 2000)}

    def work() -> None:
        of_load = block_spans(arrays, (128,))
        extents = {"b": 8, "p": 4096, "m": 4096}
        classify(CAUSAL & PAD, query="p", key="m", extents=extents, tile_p=128, tile_m=128, of_load=of_load)

    work()
    # 620 calls; 8 · 32 · 32 tiles
    assert calls(work) < 1300
    assert peak_bytes(work) < 1 << 20


def test_a_missing_extent_or_size_is_named() -> None:
    with pytest.raises(ValueError, match="rank h"):
        classify(P - M < H, query="p", key="m", extents={"p": 8, "m": 8}, tile_p=4, tile_m=4)
    with pytest.raises(ValueError, match="size past"):
        classify(M <= P + PAST, query="p", key="m", extents={"p": 8, "m": 8}, tile_p=4, tile_m=4)
