"""Integers that wrap around: an attention whose mask may have some is left alone."""

import pytest

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.cascade import Rank
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers
from reattend.patterns.terms.overflow import DATA, passes
from reattend.patterns.verdict import Obstacle

P, M, N = ex.index("p"), ex.index("m"), ex.symbol("n")
RANKS = {"p": Rank("p", N), "m": Rank("m", 4096)}
SEGMENT = ex.load("segment", (P,), "i64")
NARROW = ex.load("segment", (P,), "i32")


@pytest.mark.parametrize("e", [
    P * N + M, (P * N + M) * 3 % 7, SEGMENT * SEGMENT, P - SEGMENT < 4, NARROW - ex.cast(M, "i32"), (P * 2654435761 + M) % 65536,
    ex.where(P < M, P, 2**62), M * 2**50, -(2**62) + P, ex.binary("pow", P, ex.const(2)),
    ex.cast(P < M, "i64") * 2**62, ex.const(2**63 - 1) - P, ex.index("z") * 2**38, ex.cast(ex.load("x", (P,), "f32"), "i64") + 1,
    ex.binary("pow", ex.const(2), P % 60), ex.binary("pow", ex.const(-2), P % 60), ex.binary("pow", P % 2, SEGMENT),
    ex.binary("and", SEGMENT, ex.const(255)) * 2**40,
], ids=str)
def test_what_fits(e: Expr) -> None:
    assert passes(e, RANKS) is None


@pytest.mark.parametrize("e", [
    P * 6364136223846793005 + M, (P * N * N) < 3, SEGMENT * SEGMENT * SEGMENT, M * 2**51, P + 2**63 - 1, NARROW * NARROW,
    ex.make("xor", (P * 2**39, M)), (P * 2**40) % 5, ex.binary("pow", P, ex.const(3)),
    ex.binary("pow", ex.const(2), P % 64), ex.binary("pow", SEGMENT, P), ex.binary("pow", ex.const(-2), P % 62) - 2**62 - (2**61 + 5),
    ex.binary("pow", ex.const(2), P % 62) + 2**62 + (2**61 + 5), P * 2**38 - 2**62 - (2**62 + 5), N * 2**38 - 2**62 - (2**62 + 5), ex.load("x", (P,), "f32") + ex.cast(P * 6364136223846793005 + M, "f32"),
], ids=str)
def test_what_may_wrap_around(e: Expr) -> None:
    assert passes(e, RANKS) is not None


def test_the_numbers_are_those_of_the_types() -> None:
    assert passes(ex.index("m") * (2**63 // 4096 - 1), RANKS) is None
    assert passes(SEGMENT * (2**63 // DATA + 1), RANKS) is not None


def test_weights_are_looked_at_as_well() -> None:
    def rule(b: papers.Builder, s: Expr) -> Expr:
        return ex.where((P * 6364136223846793005 + M) > 0, s * s, 0.0)

    assert isinstance(attention(papers.attention("weights", rule)), Obstacle)


def test_an_attention_whose_mask_may_wrap_around_is_left_alone() -> None:
    def hashed(k: int) -> papers.Score:
        return lambda b, qk: ex.where((P * k + M) > 0, qk, -3e38)

    assert isinstance(attention(papers.attention("small", papers.softmax, hashed(3))), Attention)
    found = attention(papers.attention("hash", papers.softmax, hashed(6364136223846793005)))
    assert isinstance(found, Obstacle)
    assert "too large for i64, where tensors wrap around" in found.reason
