"""What narrow float types make of masks beyond their range, against numpy's own conversion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.terms.constant import number
from reattend.patterns.terms.narrow import BEYOND, narrowed

KEEP = ex.load("keep", (ex.index("m"),), "b1")
SCORE = ex.load("score", (ex.index("m"),), "f32")


def mask(fill: float) -> Expr:
    return ex.where(KEEP, ex.const(0.0, "f32"), ex.const(fill, "f32"))


def by_arithmetic(fill: float) -> Expr:
    return (1.0 - ex.cast(KEEP, "f32")) * ex.const(fill, "f32")


@pytest.mark.parametrize("make", [mask, by_arithmetic, lambda fill: mask(fill / 2) + mask(fill / 2)])
@pytest.mark.parametrize("fill", [-1e9, -65520.0, -65519.0, -6e4, 7e4, 1.0])
def test_a_mask_is_what_its_type_makes_of_it(make: Any, fill: float) -> None:
    for keep in (True, False):
        got = float(number(narrowed(make(fill), "f16"), {"keep": keep}))
        with np.errstate(over="ignore"):
            want = float(np.float16(number(make(fill), {"keep": keep})))
        assert math.isclose(got, want, rel_tol=1e-3)


def test_the_limits_are_where_rounding_reaches_infinity() -> None:
    with np.errstate(over="ignore"):
        for dtype, convert in (("f16", np.float16), ("f32", np.float32)):
            assert np.isinf(convert(BEYOND[dtype]))
            assert np.isfinite(convert(np.nextafter(BEYOND[dtype], 0)))


def test_a_filled_score_keeps_its_score() -> None:
    e = ex.where(KEEP, SCORE, ex.const(-1e9, "f32"))
    assert narrowed(e, "f16") is ex.where(KEEP, SCORE, ex.const(-math.inf, "f32"))


@pytest.mark.parametrize("e", [SCORE, SCORE * 1e9, SCORE + mask(-1e9), mask(-1e4), by_arithmetic(-1e4), ex.index("m") * 7], ids=str)
def test_what_stays_in_range_and_what_data_decide_is_left_alone(e: Expr) -> None:
    assert narrowed(e, "f16") is e


def test_a_wide_type_has_no_limit() -> None:
    assert narrowed(mask(-1e300), "f64") is mask(-1e300)
