"""Numbers gathered into one factor, soft-caps by one exponential, and what is left as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reattend.codegen.forms import base2
from reattend.codegen.forms.base2 import LARGEST_CAP, LN2, LOG2E, gathered, in_base2, one_factor, positive_factor
from reattend.codegen.forms.terms import Terms
from reattend.codegen.triton.streaming import Streaming, read
from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.terms.intervals import spans

from .. import strategies
from ..strategies import INF, LOWEST, M, P, attention

X, ROW, Y = (ex.load(n, (ex.index(r),), "f32") for n, r in (("x", "m"), ("row", "p"), ("y", "m")))


def factor(e: Expr) -> float:
    assert e.op == "mul"
    assert e.args[0] is X
    return float(e.args[1].value)


@pytest.mark.parametrize(
    ("e", "want"),
    [
        (ex.cast(X * 1.0, "bf16") * ex.cast(ex.const(0.3, "f32"), "bf16") * LOG2E, 0.3 * LOG2E),
        (X / 11.3 * 2.0, 2 / 11.3), (2.0 * (X * 0.5) / 0.25, 4.0), (X * -2.0 * -3.0, 6.0),
    ],
    ids=str,
)
def test_numbers_that_follow_one_another_are_one(e: Expr, want: float) -> None:
    assert factor(gathered(e)) == pytest.approx(want, rel=1e-15)


def test_a_sum_takes_out_the_factor_of_its_product() -> None:
    out = gathered(X * 0.5 + ROW * 3.0 * Y)
    found = positive_factor(out)
    assert found is not None
    assert (found[0], found[1].value) == (X + ROW * ex.const(6.0, "f32") * Y, 0.5)
    for other in (X * -0.5 + ROW * 3.0 * Y, X + Y, X * 0.5 + Y):
        assert positive_factor(gathered(other)) is None


def test_numbers_that_would_overflow_stay_apart() -> None:
    assert gathered(X * 1e20 * 1e20).args[0] is not X
    assert gathered(X / 0.0).op == "div"


def test_a_soft_cap_by_one_exponential() -> None:
    """Off by at most 2⁻¹³ of a weight at the largest cap, computed in float32."""
    out = gathered(ex.unary("tanh", X * 0.1) * LARGEST_CAP)
    assert all(e.op != "tanh" for e in ex.walk(out))
    x = np.linspace(-400, 400, 4001, dtype=np.float32)
    y = np.exp2(x * np.float32(0.2 * LOG2E)) + np.float32(1)
    with np.errstate(over="ignore"):
        root = np.float32(1) / np.sqrt(y)
    capped = (np.float32(1) - root * root * np.float32(2)) * np.float32(LARGEST_CAP)
    assert np.abs(capped - LARGEST_CAP * np.tanh(x.astype(np.float64) * 0.1)).max() * LN2 <= 2.0**-13
    # and the printed term is that formula
    table = {X: ex.const(7.0, "f32")}
    low, high = spans(ex.substitute(out, table), {})
    assert low == pytest.approx(high)
    assert low == pytest.approx(LARGEST_CAP * math.tanh(0.7), rel=1e-6)


def test_a_large_cap_is_left_to_tanh() -> None:
    e = ex.unary("tanh", X) * (2 * LARGEST_CAP)
    assert gathered(e) is e


def form(score: Expr | None = None, name: str = "softmax", dtype: str = "bf16") -> Streaming:
    made = read(attention(lambda s: s if score is None else s + score, strategies.ROWS[name], dtype=dtype).cascade)
    assert isinstance(made, Streaming)
    return made


def rewritten(s: Streaming) -> Terms:
    return one_factor(in_base2(Terms(s.score, s.mask, s.state), s.key, frozenset(p.load for p in s.products)))


def exponentials(t: Terms) -> set[str]:
    return {e.op for e in ex.walk(t.state.weight, *t.state.corrections) if e.op in ("exp", "exp2")}


def test_a_score_with_a_tensor_keeps_its_units() -> None:
    """Fills in the tensor would overflow: the difference is scaled."""
    s = form(strategies._load("bias", 0, strategies.H, P, M))
    out = rewritten(s)
    assert exponentials(out) == {"exp2"}
    assert out.score is gathered(s.score)
    arguments = [e.args[0] for e in ex.walk(out.state.weight) if e.op == "exp2"]
    assert arguments
    assert all(e.op == "mul" and e.args[0].op == "sub" and e.args[1].value == LOG2E for e in arguments)


def test_fills_are_no_numbers_to_compute_with() -> None:
    made = read(attention(lambda s: ex.where(M <= P, s, LOWEST), strategies.ROWS["softmax"], dtype="bf16").cascade)
    assert isinstance(made, Streaming)
    out = rewritten(made)
    assert [e.value for e in ex.walk(out.score) if e.is_const and e.is_float and abs(e.value) > 1e30] == [LOWEST]
    assert positive_factor(out.mask.full) is not None


def test_the_score_stays_one_term_of_the_row_program() -> None:
    """What follows it does not reach past it: keys past the end are idle there."""
    made = read(attention(lambda s: ex.where(M <= P, s, -INF), strategies.ROWS["softmax"], dtype="bf16").cascade)
    assert isinstance(made, Streaming)
    out = rewritten(made)
    for c in out.state.carried:
        assert out.score in set(ex.walk(c.lift))
    assert base2.UNSCALED < -LOWEST
