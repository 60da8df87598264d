"""Spans of terms against their values at every point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor
from reattend.patterns.evaluate import DTYPE, DTYPE_NAME, evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.terms.affine import affine
from reattend.patterns.terms.block_spans import block_spans
from reattend.patterns.terms.intervals import spans
from tests.tiers import examples

EXTENTS = {"h": 3, "p": 13, "m": 17}
H, P, M = (ex.index(r) for r in EXTENTS)
RNG = np.random.default_rng(0)
ARRAYS = {
    "pad": RNG.random((3, 17)) < 0.7,
    "seg": np.sort(RNG.integers(0, 4, (3, 20)), axis=-1),
    "slope": RNG.standard_normal(3).astype(np.float32),
    "edge": RNG.choice(np.array([-math.inf, -0.5, 2.0, math.inf], np.float32), 20),
}
LOADS = {
    "pad": ex.load("pad", (H, M), "b1"),
    "seg_p": ex.load("seg", (H, P), "i64"),
    "seg_m": ex.load("seg", (H, M), "i64"),
    "seg_shift": ex.load("seg", (H, M + 3), "i64"),
    "seg_gather": ex.load("seg", (0, ex.load("seg", (H, P), "i64") * 4), "i64"),
    "slope": ex.load("slope", (H,), "f32"),
    "edge": ex.load("edge", (M + 3,), "f32"),
}


def values(term: Expr, extents: Mapping[str, int] = EXTENTS, arrays: Mapping[str, np.ndarray] = ARRAYS) -> np.ndarray:
    """The term at every point, by the oracle: [*extents]."""
    tensors = {n: torch.from_numpy(a) for n, a in arrays.items()}
    used = {str(e.attr) for e in ex.loads(term)}
    declared = [Tensor(n, tuple(t.shape), DTYPE_NAME[t.dtype]) for n, t in tensors.items() if n in used]
    out = Tensor("out", tuple(extents.values()), term.dtype)
    einsum = Einsum(Access("out", tuple(ex.index(r) for r in extents)), term)
    c = Cascade("term", tuple(Rank(r, s) for r, s in extents.items()), (*declared, out), (einsum,), ("out",))
    return np.asarray(evaluate(c, {n: t for n, t in tensors.items() if n in used})["out"])


def leaves() -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.sampled_from([H, P, M, M, P, LOADS["seg_p"], LOADS["seg_m"], LOADS["seg_shift"], LOADS["seg_gather"]]),
        st.integers(-6, 20).map(ex.const),
    )


def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    factor = st.integers(-3, 4).map(ex.const)
    divisor = st.integers(1, 9).map(ex.const)
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "add", "sub", "max", "min"]), inner, inner).map(lambda t: ex.binary(*t)),
        st.tuples(inner, factor).map(lambda t: t[0] * t[1]),
        st.tuples(inner, inner).map(lambda t: t[0] * t[1]),
        st.tuples(st.sampled_from(["floordiv", "mod"]), inner, divisor).map(lambda t: ex.binary(*t)),
        st.tuples(st.sampled_from(["neg", "abs", "relu", "sign"]), inner).map(lambda t: ex.unary(*t)),
        st.tuples(inner, inner, inner).map(lambda t: ex.where(t[0] < t[1], t[2], t[0])),
        st.tuples(inner, st.sampled_from(["and", "or", "xor"]), inner).map(lambda t: ex.binary(t[1], t[0], t[2])),
        inner.map(lambda e: ex.cast(ex.cast(e, "i32") + ex.const(3, "i32"), "i64")),
        inner.map(lambda e: ex.cast(ex.cast(e, "u8"), "i64")),
        inner.map(lambda e: ex.cast(e > 2, "i64")),
        inner.map(lambda e: e * e),
    )


INTEGERS = st.recursive(leaves(), grown, max_leaves=6)


def floats(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    scalar = st.sampled_from([0.5, -2.0, 0.3, 7.0])
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div", "max", "min"]), inner, inner).map(lambda t: ex.binary(*t)),
        st.tuples(inner, scalar).map(lambda t: t[0] * t[1]),
        st.tuples(st.sampled_from(["exp", "tanh", "log", "sqrt", "abs", "relu", "neg", "sigmoid", "sin", "floor"]), inner)
        .map(lambda t: ex.unary(*t)),
        inner.map(lambda e: ex.cast(ex.cast(e, "f16"), "f32")),
        inner.map(lambda e: ex.cast(ex.cast(e, "bf16"), "f32")),
    )


FLOATS = st.recursive(
    st.one_of(
        INTEGERS.map(lambda e: ex.cast(e, "f32")), st.sampled_from([LOADS["slope"], LOADS["edge"], ex.const(0.25)]),
    ),
    floats, max_leaves=4,
)
NUMBERS = st.one_of(INTEGERS, INTEGERS, FLOATS)
COMPARED = st.one_of(
    st.tuples(st.sampled_from(ex.COMPARISONS), INTEGERS, INTEGERS).map(lambda t: ex.binary(*t)),
    st.tuples(st.sampled_from(ex.COMPARISONS), NUMBERS, FLOATS).map(lambda t: ex.binary(*t)),
    st.just(LOADS["pad"]),
    FLOATS.map(lambda e: ex.unary("isnan", e)),
    FLOATS.map(lambda e: ex.unary("isinf", e)),
    NUMBERS.map(lambda e: ex.cast(e, "b1")),
)
PREDICATES = st.recursive(
    COMPARED,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "or", "xor", "eq", "ne", "lt", "ge"]), inner, inner).map(
            lambda t: ex.binary(*t)
        ),
        inner.map(lambda e: ~e),
        st.tuples(inner, inner, inner).map(lambda t: ex.where(*t)),
    ),
    max_leaves=5,
)

BOX = st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).map(sorted) for n in EXTENTS.values()))


def box_of(corners: tuple[list[int], ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {r: (np.asarray([lo]), np.asarray([hi])) for r, (lo, hi) in zip(EXTENTS, corners)}


@examples(200)
@given(INTEGERS, BOX, st.booleans())
def test_integer_spans_hold_every_value(term: Expr, corners: tuple[list[int], ...], known: bool) -> None:
    lo, hi = spans(term, box_of(corners), of_load=block_spans(ARRAYS) if known else None)
    inside = values(term)[tuple(slice(a, b + 1) for a, b in corners)]
    assert not (inside < lo).any(), (term, lo)
    assert not (inside > hi).any(), (term, hi)


@examples(200)
@given(FLOATS, BOX, st.booleans())
def test_float_spans_hold_every_value_or_say_unknown(term: Expr, corners: tuple[list[int], ...], known: bool) -> None:
    lo, hi = spans(term, box_of(corners), of_load=block_spans(ARRAYS) if known else None)
    inside = values(term)[tuple(slice(a, b + 1) for a, b in corners)].astype(np.float64)
    if np.isnan(inside).any():
        assert np.isnan(lo).all() or np.isnan(hi).all()
        return
    assert not (inside < lo).any(), (term, lo)
    assert not (inside > hi).any(), (term, hi)


@examples(200)
@given(PREDICATES, BOX, st.booleans())
def test_certain_answers_hold_at_every_point(term: Expr, corners: tuple[list[int], ...], known: bool) -> None:
    yes, maybe = spans(term, box_of(corners), of_load=block_spans(ARRAYS) if known else None)
    inside = values(term)[tuple(slice(a, b + 1) for a, b in corners)]
    if np.all(yes):
        assert inside.all(), term
    if not np.any(maybe):
        assert not inside.any(), term


@examples(200)
@given(INTEGERS)
def test_single_points_are_exact(term: Expr) -> None:
    """Splitting down to points ends: there the span is the value."""
    box = {r: (x, x) for r, x in zip(EXTENTS, np.indices(tuple(EXTENTS.values())))}
    lo, hi = spans(term, box, of_load=block_spans(ARRAYS))
    expected = values(term)
    np.testing.assert_array_equal(np.broadcast_to(lo, expected.shape), expected)
    np.testing.assert_array_equal(np.broadcast_to(hi, expected.shape), expected)


@examples(100)
@given(PREDICATES, st.booleans())
def test_torch_agrees_with_numpy(term: Expr, known: bool) -> None:
    box = {
        "h": (np.arange(3)[:, None, None],) * 2,
        "p": (np.array([0, 4, 8, 12])[None, :, None], np.array([3, 7, 11, 12])[None, :, None]),
        "m": (np.array([0, 6, 12])[None, None, :], np.array([5, 11, 16])[None, None, :]),
    }
    a = spans(term, box, of_load=block_spans(ARRAYS, (4, 6)) if known else None)
    tensors = {n: torch.from_numpy(x) for n, x in ARRAYS.items()}
    b = spans(term, box, of_load=block_spans(tensors, (4, 6), torch) if known else None, xp=torch)
    for x, y in zip(a, b):
        np.testing.assert_array_equal(np.broadcast_to(x, (3, 4, 3)), np.broadcast_to(np.asarray(y), (3, 4, 3)))


# --- infinities -------------------------------------------------------------------------------------------------

# Two loads that vary independently, of whatever is drawn: −∞ and a number, one infinity alone, both, or no number.
PAIR = {"p": 4, "m": 4}
X, Y = ex.load("x", (P,), "f32"), ex.load("y", (M,), "f32")
SOME = st.sampled_from([-math.inf, -2.0, 0.0, 3.0, math.inf])
ROW = st.one_of(
    st.lists(SOME, min_size=4, max_size=4), SOME.map(lambda x: [x] * 4), st.tuples(SOME, SOME).map(lambda t: [*t, *t])
)
DRAWN = st.one_of(ROW, ROW, ROW, ROW.map(lambda row: [*row[:3], math.nan])).map(lambda row: np.array(row, np.float32))
EDGES = st.recursive(
    st.sampled_from([X, X, Y, Y, ex.const(-math.inf), ex.const(math.inf), ex.const(3.0)]),
    lambda inner: st.one_of(
        floats(inner), st.tuples(inner, inner, inner).map(lambda t: ex.where(t[0] < t[1], t[2], t[0]))
    ),
    max_leaves=3,
)
ASKED = st.one_of(
    EDGES.map(lambda e: ex.unary("isinf", e)),
    EDGES.map(lambda e: ex.unary("isnan", e)),
    EDGES.map(lambda e: ex.cast(e, "b1")),
    st.tuples(st.sampled_from(ex.COMPARISONS), EDGES, EDGES).map(lambda t: ex.binary(*t)),
)
WHOLE = {r: (np.int64(0), np.int64(n - 1)) for r, n in PAIR.items()}


@examples(300)
@given(EDGES, DRAWN, DRAWN)
def test_spans_of_infinite_loads_hold_every_value_or_say_unknown(term: Expr, x: np.ndarray, y: np.ndarray) -> None:
    arrays = {"x": x, "y": y}
    lo, hi = spans(term, WHOLE, of_load=block_spans(arrays))
    inside = values(term, PAIR, arrays).astype(np.float64)
    if np.isnan(inside).any():
        assert np.isnan(lo) or np.isnan(hi), (term, lo, hi)
        return
    assert not (inside < lo).any(), (term, lo)
    assert not (inside > hi).any(), (term, hi)


@examples(300)
@given(ASKED, DRAWN, DRAWN)
def test_certain_answers_about_infinite_loads_hold_at_every_point(term: Expr, x: np.ndarray, y: np.ndarray) -> None:
    arrays = {"x": x, "y": y}
    yes, maybe = spans(term, WHOLE, of_load=block_spans(arrays))
    inside = values(term, PAIR, arrays)
    assert inside.all() or not yes, term
    assert maybe or not inside.any(), term


# --- every operator on every pair of intervals --------------------------------------------------------------------

# Box b holds the interval between X[b, 0] and X[b, 1], and 0 where that lies between; Y likewise, every pair of both.
ENDS = (-math.inf, -2.5, -1.0, 0.0, 0.5, 3.0, math.inf, math.nan)
INTERVALS = [(a, b, 0.0 if a <= 0 <= b else a) for i, a in enumerate(ENDS) for b in ENDS[i:]]
PAIRS = {
    "x": np.repeat(np.array(INTERVALS), len(INTERVALS), axis=0), "y": np.tile(np.array(INTERVALS), (len(INTERVALS), 1)),
}
B = ex.index("b")
LEFT, RIGHT = ex.load("x", (B, P), "f64"), ex.load("y", (B, M), "f64")
WHOLE_NUMBERS = ("add", "sub", "mul", "max", "min", "floordiv", "mod", "and", "or", "xor")
NUMERIC = [op for op in ex.BINARY if op not in (*ex.COMPARISONS, "and", "or", "xor", "draw")]
NUMERIC_UNARY = [op for op in ex.UNARY if op not in ("isnan", "isinf", "not")]
# Their span is the hull of their values where all of these are finite.
EXACT = ("add", "sub", "mul", "div", "max", "min", "neg", "abs", "relu", "floor", "ceil", "round", "trunc", "sign", "cast")
# What the ends of two independent intervals decide wholly.
ORDER = ("lt", "le", "gt", "ge")


def on_rows(term: Expr, rows: Mapping[str, np.ndarray], xp: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The span of a term over each pair of rows, and its values there: [pair], [pair], [pair, values]."""
    n, width = rows["x"].shape
    whole = (np.zeros(n), np.full(n, width - 1))
    box = {"b": (np.arange(n),) * 2, "p": whole, "m": whole}
    of_load = block_spans({name: xp.asarray(x) for name, x in rows.items()}, xp=xp)
    lo, hi = (np.broadcast_to(np.asarray(x), n) for x in spans(term, box, of_load=of_load, xp=xp))
    return lo, hi, values(term, {"b": n, "p": width, "m": width}, rows).reshape(n, -1)


@pytest.mark.parametrize(
    "term",
    [
        *(ex.binary(op, LEFT, RIGHT) for op in NUMERIC), *(ex.unary(op, LEFT) for op in NUMERIC_UNARY),
        LEFT * LEFT, ex.binary("pow", LEFT, ex.const(2.0, "f64")), ex.where(LEFT < RIGHT, LEFT, RIGHT),
        *(ex.cast(ex.cast(LEFT, dtype), "f64") for dtype in ex.FLOATS),
    ],
    ids=str,
)
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_every_operator_holds_its_values_on_every_pair_of_intervals(term: Expr, xp: Any) -> None:
    lo, hi, inside = on_rows(term, PAIRS, xp)
    unknown = np.isnan(lo) | np.isnan(hi)
    assert unknown[np.isnan(inside).any(-1)].all()
    with np.errstate(invalid="ignore"):
        assert not (inside < lo[:, None])[~unknown].any()
        assert not (inside > hi[:, None])[~unknown].any()
    if term.op in EXACT:
        finite = np.isfinite(inside).all(-1) & np.isfinite(PAIRS["x"]).all(-1) & np.isfinite(PAIRS["y"]).all(-1)
        np.testing.assert_array_equal(lo[finite], inside[finite].min(-1))
        np.testing.assert_array_equal(hi[finite], inside[finite].max(-1))


@pytest.mark.parametrize(
    "term",
    [
        *(ex.binary(op, LEFT, RIGHT) for op in ex.COMPARISONS), *(ex.unary(op, LEFT) for op in ("isinf", "isnan")),
        ex.cast(LEFT, "b1"),
        *(ex.binary(op, LEFT > 0.0, RIGHT < 0.5) for op in ("and", "or", "xor", "min", "max", "mul", *ex.COMPARISONS)),
        ~(LEFT > 0.0), ex.where(LEFT < 0.5, RIGHT < 0.5, RIGHT > 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_every_predicate_answers_for_every_pair_of_intervals(term: Expr, xp: Any) -> None:
    yes, maybe, inside = on_rows(term, PAIRS, xp)
    assert inside[yes].all()
    assert not inside[~maybe].any()
    # what is one number on both sides, an infinity too, is decided
    one = (PAIRS["x"][:, 0] == PAIRS["x"][:, 1]) & (PAIRS["y"][:, 0] == PAIRS["y"][:, 1])
    np.testing.assert_array_equal(yes[one], maybe[one])
    if term.op not in ("eq", "ne", "isinf", "isnan") or term.args[0].dtype == "b1":
        # two independent operands decide it wholly
        numbers = ~(np.isnan(PAIRS["x"]).any(-1) | np.isnan(PAIRS["y"]).any(-1))
        np.testing.assert_array_equal(yes[numbers], inside[numbers].all(-1))
        np.testing.assert_array_equal(maybe[numbers], inside[numbers].any(-1))


# Integers: every value of an interval stands in its row. Those of the second half lie where narrow types end.
WIDTH = 9
SPREAD = [sorted({a, min(max(a, 0), b), *range(a, b, max(1, (b - a) // 6)), b}) for a, b in [
    *((a, b) for i, a in enumerate((-5, -2, -1, 0, 1, 2)) for b in (-5, -2, -1, 0, 1, 2)[i:]),
    (127, 127), (126, 128), (250, 257), (256, 259), (-130, -127), (-300, 300), (-129, -129), (511, 511),
    (2**31 - 1, 2**31),
]]
ROWS = np.array([[*row, *[row[-1]] * (WIDTH - len(row))] for row in SPREAD])
LEFT_I, RIGHT_I = ex.load("x", (B, P), "i64"), ex.load("y", (B, M), "i64")


@pytest.mark.parametrize(
    "term",
    [
        *(ex.binary(op, LEFT_I, RIGHT_I) for op in WHOLE_NUMBERS),
        *(ex.unary(op, LEFT_I) for op in ("neg", "abs", "relu", "sign", "not")),
        LEFT_I * LEFT_I, ex.binary("pow", LEFT_I, ex.const(2)), LEFT_I // 3, LEFT_I % 3, LEFT_I * -3,
        ex.where(LEFT_I < RIGHT_I, LEFT_I, RIGHT_I),
        *(ex.cast(ex.cast(LEFT_I, dtype), "i64") for dtype in ex.INTEGERS),
        *(
            ex.cast(ex.binary(op, ex.cast(LEFT_I, dtype), ex.cast(RIGHT_I, dtype)), "i64")
            for dtype in ("u8", "i8", "i16", "i32") for op in ("add", "sub", "mul", "min")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_every_integer_operator_holds_its_values(term: Expr, xp: Any) -> None:
    pairs = {"x": np.repeat(ROWS, len(ROWS), axis=0), "y": np.tile(ROWS, (len(ROWS), 1))}
    if term.op in ("floordiv", "mod"):
        # nothing is divided by zero
        pairs = {name: x[~(pairs["y"] == 0).any(-1)] for name, x in pairs.items()}
    lo, hi, inside = on_rows(term, pairs, xp)
    assert not (inside < lo[:, None]).any()
    assert not (inside > hi[:, None]).any()
    one = (pairs["x"][:, 0] == pairs["x"][:, -1]) & (pairs["y"][:, 0] == pairs["y"][:, -1])
    if term.op == "mod":
        # of a negative modulus nothing is said
        one &= pairs["y"][:, 0] > 0
    np.testing.assert_array_equal(lo[one], inside[one, 0])
    np.testing.assert_array_equal(hi[one], inside[one, 0])
    if term.op in ("add", "sub", "mul", "max", "min", "neg", "abs", "relu", "sign", "not"):
        # float64 does not count the squares of the largest
        counted = (abs(inside) < 2**50).all(-1)
        np.testing.assert_array_equal(lo[counted], inside[counted].min(-1))
        np.testing.assert_array_equal(hi[counted], inside[counted].max(-1))
    if term.op in ("and", "or", "xor"):
        # no bit above those of the operands
        natural = (pairs["x"] >= 0).all(-1) & (pairs["y"] >= 0).all(-1)
        most = np.maximum(pairs["x"].max(-1), pairs["y"].max(-1))[natural]
        assert (hi[natural] < [1 << int(x).bit_length() for x in most]).all()


@pytest.mark.parametrize("op", ex.COMPARISONS)
@pytest.mark.parametrize("dtype", ["i64", "i32", "u8"])
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_every_comparison_of_integers_is_answered(op: str, dtype: str, xp: Any) -> None:
    rows = {"x": np.repeat(ROWS, len(ROWS), axis=0), "y": np.tile(ROWS, (len(ROWS), 1))}
    yes, maybe, inside = on_rows(ex.binary(op, ex.cast(LEFT_I, dtype), ex.cast(RIGHT_I, dtype)), rows, xp)
    assert inside[yes].all()
    assert not inside[~maybe].any()
    if op in ORDER and dtype == "i64":
        np.testing.assert_array_equal(yes, inside.all(-1))
        np.testing.assert_array_equal(maybe, inside.any(-1))
    if op in ("eq", "ne") and dtype == "i64":
        apart = (rows["x"].max(-1) < rows["y"].min(-1)) | (rows["x"].min(-1) > rows["y"].max(-1))
        np.testing.assert_array_equal(~maybe if op == "eq" else yes, apart)


@pytest.mark.parametrize("dtype", ["i64", "i32", "i8"])
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_floats_become_integers_towards_zero(dtype: str, xp: Any) -> None:
    lo, hi, inside = on_rows(ex.cast(ex.cast(LEFT, dtype), "i64"), PAIRS, xp)
    finite = np.isfinite(PAIRS["x"]).all(-1)
    np.testing.assert_array_equal(lo[finite], inside[finite].min(-1))
    np.testing.assert_array_equal(hi[finite], inside[finite].max(-1))
    # what an infinity or no number becomes is the machine's affair
    least, most = spans(ex.load("unknown", (P,), dtype), {"p": (np.int64(0), np.int64(1))})
    unknown = np.isnan(PAIRS["x"]).any(-1)
    assert (lo[unknown] == least).all()
    assert (hi[unknown] == most).all()


def test_an_operator_without_a_rule_may_answer_anything() -> None:
    rows = {"x": np.tile(np.arange(-3, 6), (1, 1)), "y": np.zeros((1, 9), int)}
    lo, hi, inside = on_rows(ex.binary("pow", LEFT_I, ex.const(3)), rows, np)
    assert (lo <= inside.min(-1)).all()
    assert (hi >= inside.max(-1)).all()


@pytest.mark.parametrize("op", ["exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sqrt"])
@pytest.mark.parametrize("dtype", ex.FLOATS)
def test_increasing_functions_are_known_to_their_last_places(op: str, dtype: str) -> None:
    at, unit = ex.cast(ex.load("x", (P,), "f64"), dtype), torch.finfo(DTYPE[dtype]).eps
    box = {"p": (np.int64(0), np.int64(1))}
    lo, hi = spans(ex.unary(op, at), box, of_load=block_spans({"x": np.array([0.5, 3.0])}))
    least, most = (getattr(np, op)(x) for x in (0.5, 3.0))
    assert abs(lo - least) <= 4 * unit * abs(least)
    assert abs(hi - most) <= 4 * unit * abs(most)


# --- exactness where masks need it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ((P + 3) - (P + 1), (2, 2)),
        ((P + 5 - M) - 5, (-16, 12)),
        ((P * 4 + H) // 4 - P, (0, 0)),
        ((P * 6 + 2) // 4, (0, 18)),
        ((P - M + H * 2) % 2, (0, 1)),
        ((H * 4 + 1) % 2, (1, 1)),
        (ex.cast(ex.cast(P, "i32"), "i64") - ex.cast(P, "i32"), (0, 0)),
        (ex.unary("abs", P - M), (0, 16)),
    ],
)
def test_correlated_terms_are_exact(term: Expr, expected: tuple[int, int]) -> None:
    box = {r: (np.int64(0), np.int64(n - 1)) for r, n in EXTENTS.items()}
    assert spans(term, box) == expected
    assert (values(term).min(), values(term).max()) == expected


def test_same_load_cancels() -> None:
    seg = LOADS["seg_p"]
    box = {r: (np.int64(0), np.int64(n - 1)) for r, n in EXTENTS.items()}
    assert spans(ex.equal(seg + 1, seg + 1), box) == (True, True)
    assert spans(seg + 1 > seg, box) == (True, True)


def test_parity_is_never_equal() -> None:
    """2p = 2m + 1 has no solution."""
    box = {r: (np.int64(0), np.int64(n - 1)) for r, n in EXTENTS.items()}
    assert spans(ex.equal(P * 2, M * 2 + 1), box)[1] == False  # noqa: E712


def test_affine_forms_are_fixed_points() -> None:
    for e in ((P * 4 + M + 6) // 4, (P * 4 - M + 6) % 4, (P * 6 + M * 4 + 3) // 8, -(P - M) * 3 + 2):
        form = affine(e)
        assert affine(form.term()) == form
        np.testing.assert_array_equal(values(form.term()), values(e))


def test_equal_sums_have_one_affine_form() -> None:
    assert affine(P * 4 + M) == affine(M + P * 4)
    assert affine((P * 4 + 3) % 2) == affine(ex.const(1))
    assert affine(P * 4 - M).scaled(1) == affine(P * 4 - M)
    assert affine(P * 4 - M).scaled(0) == affine(ex.const(0))
    form = affine(P * 4 - M + 2)
    assert [form.coefficient(r) for r in (P, M, H)] == [4, -1, 0]


def test_unknown_integers_are_the_whole_type() -> None:
    box = {r: (np.int64(0), np.int64(0)) for r in EXTENTS}
    load = ex.load("x", (P,), "u8")
    assert spans(ex.cast(load, "i64") + 1, box) == (1, 256)
    assert spans(load, box) == (0, 255)
    lo, hi = spans(ex.load("x", (P,), "f32"), box)
    assert math.isnan(lo)
    assert math.isnan(hi)


def test_wrapping_is_not_overlooked() -> None:
    box = {"p": (np.int64(0), np.int64(300))}
    assert spans(ex.cast(ex.cast(P, "u8"), "i64"), box) == (0, 255)
    assert spans(ex.cast(P, "i8") + ex.const(100, "i8"), {"p": (np.int64(0), np.int64(50))}) == (-128, 127)


def test_integers_beyond_float64_decide_nothing() -> None:
    huge = {"x": np.array([2**60, 2**60 + 1])}
    load = ex.load("x", (P,), "i64")
    yes, maybe = spans(ex.equal(load, 2**60), {"p": (np.array([0, 1]),) * 2}, of_load=block_spans(huge))
    assert not yes.any()
    assert maybe.all()
    yes, maybe = spans(P * 2**53 + 1 > P * 2**53, {"p": (np.int64(0), np.int64(9))})
    assert maybe
    box = {"p": (np.int64(0), np.int64(9)), "m": (np.int64(0), np.int64(9))}
    assert spans(P * 2**50 + M * 2**49 + 1, box) == (-math.inf, math.inf)


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_loads_beyond_float64_are_not_told_apart(xp: Any) -> None:
    x, y = ex.load("x", (P,), "i64"), ex.load("y", (P,), "i64")
    arrays = {"x": xp.asarray([2**53, -(2**53)]), "y": xp.asarray([2**53 + 1, -(2**53) - 1])}
    yes, maybe = spans(ex.equal(x, y), {"p": (np.arange(2),) * 2}, of_load=block_spans(arrays, xp=xp), xp=xp)
    assert not yes.any()
    assert maybe.all()


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64"])
def test_tensors_in_host_memory_are_read_as_arrays(dtype: str) -> None:
    of_load = block_spans({"x": torch.tensor([-2.0, 0.5, 3.0], dtype=DTYPE[dtype], requires_grad=True)})
    assert spans(ex.load("x", (P,), dtype), {"p": (np.int64(0), np.int64(1))}, of_load=of_load) == (-2.0, 0.5)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_constant_is_held_as_written_and_as_rounded(dtype: str) -> None:
    held = float(torch.tensor(0.3, dtype=DTYPE[dtype]))
    assert spans(ex.const(0.3, dtype), {}) == (min(held, 0.3), max(held, 0.3))


@pytest.mark.parametrize("dtype", ["f32", "f64", "i32", "i64"])
def test_answers_count_as_numbers(dtype: str) -> None:
    late, later = (ex.cast(P > k, dtype) for k in (2, 3))
    lo, hi = spans(late + later, {"p": (np.array([0, 3, 4]), np.array([2, 3, 9]))})
    assert (lo.tolist(), hi.tolist()) == ([0, 1, 2], [0, 1, 2])
    # a function of an answer is one of the numbers 0 and 1
    lo, hi = spans(ex.unary("exp", P > 2), {"p": (np.array([0, 3]), np.array([2, 9]))})
    assert (lo <= [1, math.e]).all()
    assert (hi >= [1, math.e]).all()


def test_ends_are_float64() -> None:
    for term in (P, P + 1, ex.const(3), LOADS["seg_m"], ex.cast(P > 2, "i64")):
        for end in spans(term, {r: (np.int64(0), np.int64(n - 1)) for r, n in EXTENTS.items()}):
            assert end.dtype == np.float64


class OneDevice(TorchFunctionMode):
    """Refuses what an accelerator refuses and the meta device lets pass: tensors of two devices in one call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        assert len({t.device for t in tensors}) <= 1, func
        return func(*args, **(kwargs or {}))


def test_spans_stay_on_the_device_of_their_loads() -> None:
    """The meta device holds no numbers, and joins no tensor of another device."""
    tensors = {n: torch.empty(a.shape, dtype=torch.from_numpy(a).dtype, device="meta") for n, a in ARRAYS.items()}
    box = {"h": (np.arange(3),) * 2, "p": (np.array([0, 4, 8]), np.array([3, 7, 11])), "m": (np.zeros(3), np.full(3, 9.0))}
    compared = (LOADS["seg_m"] + M < LOADS["seg_p"]) & LOADS["pad"] & (LOADS["slope"] * 0.5 < LOADS["edge"])
    for term in (compared, LOADS["seg_m"] * P + 3, ex.where(P < M, LOADS["slope"], 0.5)):
        with OneDevice():
            found = spans(term, box, of_load=block_spans(tensors, (4,), torch), xp=torch)
        for end in found:
            assert end.device.type == "meta"
            assert end.shape == (3,)


@pytest.mark.parametrize("blocks", [(), (4,)])
def test_ranges_are_found_on_the_device_of_a_tensor(blocks: tuple[int, ...]) -> None:
    """Blocks that the end cuts, runs of blocks in both dimensions, and single elements."""
    bounds = block_spans({"x": torch.empty(14, 9, device="meta")}, blocks, torch)
    lo, hi = (torch.tensor([0.0, 4.0, 8.0], device="meta"), torch.tensor([3.0, 11.0, 13.0], device="meta"))
    with OneDevice():
        for box in (((lo, hi), (lo, hi)), ((lo, lo), (lo, hi)), ((np.array([0, 4, 8]), np.array([3, 11, 13])), (lo, lo))):
            found = bounds("x", box)
            assert found is not None
            assert {(end.device.type, end.shape) for end in found} == {("meta", (3,))}


def test_a_missing_rank_or_size_is_named() -> None:
    with pytest.raises(ValueError, match="rank p"):
        spans(P, {})
    with pytest.raises(ValueError, match="size n"):
        spans(ex.symbol("n") + P, {"p": (np.int64(0), np.int64(1))})
    assert spans(ex.symbol("n") + P, {"p": (np.int64(0), np.int64(1))}, symbols={"n": 4}) == (4, 5)


# --- ranges of run-time tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 9, 14])
@pytest.mark.parametrize("block", [2, 3, 4, 16])
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_bounds_of_whole_blocks_are_exact(size: int, block: int, xp: Any) -> None:
    """Every run of blocks; the last one may be cut."""
    array = np.random.default_rng(size).permutation(size * 3).reshape(3, size)
    runs = [(a, min(b, size) - 1) for a in range(0, size, block) for b in range(a + block, size + block, block)]
    lo, hi = (np.array(x, float) for x in zip(*runs))
    found = block_spans({"x": xp.asarray(array)}, (block,), xp)("x", [(np.full(len(runs), 1.0),) * 2, (lo, hi)])
    assert found is not None
    for i, (a, b) in enumerate(runs):
        assert (int(found[0][i]), int(found[1][i])) == (array[1, a : b + 1].min(), array[1, a : b + 1].max())


@pytest.mark.parametrize("block", [2, 3, 4])
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_bounds_of_any_interval_are_exact(block: int, xp: Any) -> None:
    """Each one alone, whether it begins and ends with a block or not, and in a box of two dimensions."""
    array = np.random.default_rng(0).permutation(9)
    of_load = block_spans({"x": xp.asarray(array)}, (block,), xp)
    for a, b in itertools.combinations_with_replacement(range(9), 2):
        found = of_load("x", [(np.full((2, 1), float(a)), np.full((2, 1), float(b)))])
        assert found is not None
        assert [np.asarray(x).tolist() for x in found] == [[[array[a : b + 1].min()]] * 2, [[array[a : b + 1].max()]] * 2]


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_bounds_behind_a_load_are_exact(xp: Any) -> None:
    """Coordinates that are read come in the namespace of their tensor."""
    table = np.random.default_rng(1).permutation(9)
    of_load = block_spans({"at": xp.asarray(np.arange(9)), "x": xp.asarray(table)}, xp=xp)
    ends = list(itertools.combinations_with_replacement(range(9), 2))
    box = {"p": (np.array([a for a, _ in ends]), np.array([b for _, b in ends]))}
    lo, hi = spans(ex.load("x", (ex.load("at", (P,), "i64"),), "i64"), box, of_load=of_load, xp=xp)
    np.testing.assert_array_equal(lo, [table[a : b + 1].min() for a, b in ends])
    np.testing.assert_array_equal(hi, [table[a : b + 1].max() for a, b in ends])


@examples(200)
@given(st.data(), st.sampled_from([(), (4,), (4, 3), (64,)]))
def test_block_bounds_are_exact(data: st.DataObject, blocks: tuple[int, ...]) -> None:
    shape = (3, 14, 11)
    array = np.random.default_rng(data.draw(st.integers(0, 9))).integers(-50, 50, shape)
    box = []
    for n in shape:
        pairs = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for _ in range(5)]
        box.append((np.array([a for a, _ in pairs], float), np.array([b for _, b in pairs], float)))
    for xp, given_array in ((np, array), (torch, torch.from_numpy(array))):
        found = block_spans({"x": given_array}, blocks, xp)("x", box)
        assert found is not None
        for i in range(5):
            part = array[tuple(slice(int(lo[i]), int(hi[i]) + 1) for lo, hi in box)]
            assert (int(found[0][i]), int(found[1][i])) == (part.min(), part.max())


def test_block_bounds_of_floats_say_nan() -> None:
    array = np.array([1.0, math.nan, 3.0, 4.0])
    found = block_spans({"x": array}, (2,))("x", [(np.array([0.0, 2.0]), np.array([1.0, 3.0]))])
    assert found is not None
    lo, hi = found
    assert math.isnan(lo[0])
    assert math.isnan(hi[0])
    assert (lo[1], hi[1]) == (3.0, 4.0)


def test_unknown_coordinates_reach_the_whole_tensor() -> None:
    found = block_spans({"x": np.arange(7)})("x", [(np.array([-math.inf, math.nan]), np.array([2.0, math.nan]))])
    assert found is not None
    np.testing.assert_array_equal(found[0], [0, 0])
    np.testing.assert_array_equal(found[1], [2, 6])
