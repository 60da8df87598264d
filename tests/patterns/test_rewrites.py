"""Each rewrite: that it works and what it changes, that it refuses and why. `evaluate` in float64 is the judge."""

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, parse, to_text, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import papers, variants
from reattend.patterns.library.papers import Builder, attention, size
from reattend.patterns.passes import rewrites, tiling
from reattend.patterns.passes.bounded import depends, unbound
from reattend.patterns.passes.chain import Reading
from reattend.patterns.passes.repair import repair
from reattend.patterns.terms.laws import moments as moment_basis
from reattend.patterns.verdict import Refusal
from tests.tiers import examples

from . import rules

torch.set_num_threads(1)
SIZES = {**rules.SIZES, "M0": 8, "K": 29, "K0": 4, "E0": 3, "M1": 5}


def same(before: Cascade, after: Cascade, limit: float = 1e-12) -> None:
    t = rules.tensors(before, sizes=SIZES)
    want, got = evaluate(before, t, SIZES, widen=True), evaluate(after, t, SIZES, widen=True)
    assert {n: rules.error(got[n], want[n]) <= limit for n in want} == dict.fromkeys(want, True)


def done(rewrite: Any, c: Cascade, family: tuple[str, ...] = ("m",)) -> Cascade:
    out = rewrite(c, family)
    assert not isinstance(out, Refusal), out
    same(c, out.cascade)
    assert verify(out.cascade) is out.cascade
    assert parse(to_text(out.cascade)) == out.cascade
    return out.cascade


def lines(c: Cascade) -> list[str]:
    return [str(e) for e in c.einsums]


def refuses(rewrite: Any, c: Cascade, reason: str, family: tuple[str, ...] = ("m",)) -> None:
    out = rewrite(c, family)
    assert isinstance(out, Refusal)
    assert reason in out.reason


# --- defer --------------------------------------------------------------------------------------------------------


def test_defer_moves_the_division() -> None:
    assert lines(done(rewrites.defer, papers.cascade4()))[-2:] == [
        "AV_1[p,f] = Σ_m SN[p,m] · V[m,f]",
        "AV[p,f] = AV_1[p,f] / SD[p]",
    ]


def test_defer_gives_cascade_2() -> None:
    assert lines(done(rewrites.defer, papers.cascade1(), ("k",))) == [
        "Y = Σ_k A[k] · B[k]",
        "Z_1 = Σ_k A[k]",
        "Z = Z_1 · Y",
    ]


def test_defer_sees_through_a_shifted_maximum() -> None:
    """max (s − max s) = max s − max s: the second maximum needs no sweep of its own."""
    c = done(rewrites.defer, attention("shifted", rules.shifted_softmax, rules.scaled))
    assert [e.op for e in c.einsums if e.over == ("m",)].count("max") == 1


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (papers.sigmoid, "no reduction holds a row scalar that could move"),
        (papers.sparsemax(1), "relu is no f(element)·h("),
        (papers.softmax_late, "no reduction holds a row scalar that could move"),
    ],
    ids=["sigmoid", "sparsemax", "late"],
)
def test_defer_refuses(rule: Any, reason: str) -> None:
    refuses(rewrites.defer, attention("x", rule, late=rule is papers.softmax_late), reason)


def test_defer_refuses_past_a_mix_of_heads() -> None:
    """B_g = Σ_h W·A_h stands between the division and the product."""
    refuses(rewrites.defer, variants.talking_heads(), "load is no f(element)·h(MX)")


def test_rewrites_of_a_whole_rank_refuse_tiles_and_state() -> None:
    for rewrite in (rewrites.defer, rewrites.expand, rewrites.moments, rewrites.exchange, tiling.partition):
        refuses(rewrite, papers.local_max(), "cut into tiles already", ("m1", "m0"))
        refuses(rewrite, papers.cascade5(), "carries state already", ("m1",))


# --- expand and moments -------------------------------------------------------------------------------------------


def test_expand_splits_a_difference_of_maps() -> None:
    c = done(rewrites.expand, variants.differential())
    assert lines(c)[-3:] == [
        "O_1[h,p,f] = Σ_m SN1[h,p,m] · V[h,m,f]",
        "O_2[h,p,f] = Σ_m −(lam[h] · SN2[h,p,m]) · V[h,m,f]",
        "O[h,p,f] = O_1[h,p,f] / SD1[h,p] + O_2[h,p,f] / SD2[h,p]",
    ]


def test_expand_refuses_one_term() -> None:
    refuses(rewrites.expand, papers.cascade4(), "no reduction holds a row scalar that could move")


def test_moments_of_a_variance() -> None:
    c = done(rewrites.moments, variants.layer_norm(), ("e",))
    sums = [e for e in c.einsums if e.over == ("e",)]
    assert len(sums) == 3
    assert all({str(x.attr) for x in e.reads} == {"X"} for e in sums)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_moments_of_any_degree(degree: int) -> None:
    """Σ (x − d)^k needs at most k moments beside the count."""
    b = Builder()
    x = b.input("X", "pe")
    d = b.put("MN", "p", b.put("SX", "p", x, "add", "e") / ex.cast(ex.symbol("E"), "f32"))
    b.put("Y", "p", ex.binary("pow", x - d, float(degree)), "add", "e")
    c = b.cascade("central moment", "Y")
    out = rewrites.moments(c, ("e",))
    assert not isinstance(out, Refusal)
    same(c, out.cascade, 1e-10)
    assert 1 <= sum(e.over == ("e",) for e in out.cascade.einsums) <= degree + 1
    assert any("cancel" in condition for condition in out.conditions)


def test_moments_refuse_what_is_no_polynomial() -> None:
    refuses(rewrites.moments, attention("x", papers.sparsemax(1)), "relu is no f(element)·h(")
    refuses(rewrites.moments, papers.cascade4(), "no reduction holds a row scalar that could move")


def test_basis_of_moments() -> None:
    x, d = sympy.symbols("x d", positive=True)
    assert moment_basis((x - d) ** 2, x, d) == (d**2, -2 * d, 1)
    assert moment_basis((x / d) ** 3, x, d) == (0, 0, 0, d**-3)
    assert moment_basis(sympy.exp(x - d), x, d) is None
    assert moment_basis(sympy.Max(x - d, 0), x, d) is None


# --- exchange -----------------------------------------------------------------------------------------------------


def test_exchange_of_heads_and_keys() -> None:
    c = done(rewrites.exchange, variants.talking_heads())
    assert lines(c)[-2:] == [
        "UO[g,p,f,h] = Σ_m SN[h,p,m] · V[g,m,f]",
        "O[g,p,f] = Σ_h UO[g,p,f,h] · (W[g,h] / SD[h,p])",
    ]


def test_exchange_gives_linear_attention() -> None:
    """Σ_m (Σ_e q·k)·v = Σ_e q·(Σ_m k·v): the product of keys and values first."""
    b = Builder()
    q, k, v = b.input("Q", "pe"), b.input("K", "me"), b.input("V", "mf")
    b.put("O", "pf", b.put("QK", "pm", q * k, "add", "e") * v, "add", "m")
    c = done(rewrites.exchange, b.cascade("quadratic", "O"))
    assert lines(c) == ["UO[f,e] = Σ_m K[m,e] · V[m,f]", "O[p,f] = Σ_e UO[f,e] · Q[p,e]"]


def test_exchange_takes_one_factor_of_a_square() -> None:
    c = attention("square", lambda b, s: s * s)
    done(rewrites.exchange, c)


def test_exchange_refuses_what_is_not_linear() -> None:
    refuses(rewrites.exchange, papers.cascade4(), "no factor under a sum over m is itself a sum over another rank")


# --- unbound ------------------------------------------------------------------------------------------------------


def test_unbound_uses_the_cap() -> None:
    c = done(unbound, variants.softcap(30.0))
    assert "SN[b,h,p,m] = exp(S[b,h,p,m] − 30)" in lines(c)
    assert not any(e.op == "max" for e in c.einsums)


def test_unbound_uses_cauchy_and_schwarz() -> None:
    assert "SN[p,m] = exp(S[p,m] − 10)" in lines(done(unbound, variants.cosine_softmax()))


@pytest.mark.parametrize("norm", ["sqrt", "max", "rsqrt"])
def test_unit_length_in_every_spelling(norm: str) -> None:
    def unit(x: Any, square: Any) -> Any:
        if norm == "rsqrt":
            return x * ex.unary("rsqrt", square)
        root = ex.unary("sqrt", square)
        return x / (ex.maximum(root, 1e-6) if norm == "max" else root)

    b = Builder()
    q, k, v = b.input("Q", "pe"), b.input("K", "me"), b.input("V", "mf")
    qh = b.put("QH", "pe", unit(q, b.put("QN", "p", q * q, "add", "e")))
    kh = b.put("KH", "me", unit(k, b.put("KN", "m", k * k, "add", "e")))
    s = b.put("S", "pm", b.put("QK", "pm", qh * kh, "add", "e") * 7.0)
    sn = b.put("SN", "pm", ex.exp(s - b.put("GM", "p", s, "max", "m")))
    b.put("O", "pf", b.put("A", "pm", sn / b.put("SD", "p", sn, "add", "m")) * v, "add", "m")
    done(unbound, b.cascade("cosine", "O"))


def test_unbound_of_a_minimum() -> None:
    c = attention("softmin", rules.softmin, lambda b, qk: ex.unary("sin", qk))
    assert "SN[b,h,p,m] = exp(-1 − S[b,h,p,m])" in lines(done(unbound, c))


def capped_score(b: Any, qk: Any) -> Any:
    return ex.unary("tanh", qk) * 9.0


def capped_causal(fill: float, offset: int) -> Any:
    def score(b: Any, qk: Any) -> Any:
        return ex.where(ex.index("m") <= ex.index("p") - offset, ex.unary("tanh", qk) * 9.0, fill)

    return score


def maximum_itself(b: Any, s: Any) -> Any:
    return papers.softmax(b, s) * b.put("G2", "bhp", s, "max", "m")


def temperature(b: Any, s: Any) -> Any:
    gm = b.put("GM", "bhp", s, "max", "m")
    return ex.exp(s - gm) / (b.put("SD", "bhp", ex.exp(s - gm), "add", "m") + 1.0)


@pytest.mark.parametrize(
    ("rule", "score", "reason"),
    [
        (papers.softmax, rules.scaled, "no bound of the scores under GM is provable"),
        (papers.softmax, rules.biased, "no bound of the scores under GM is provable"),
        (papers.softmax, lambda b, qk: ex.unary("tanh", qk) * 50.0, "scores spread over 100 nats"),
        (temperature, capped_score, "the result depends on GM itself"),
        (papers.softmax_zero, capped_score, "the result depends on GM itself"),
        (rules.over_largest, capped_score, "the result depends on SD itself"),
        (papers.sigmoid, capped_score, "no maximum over m"),
        (papers.softmax, capped_causal(-3e38, 3), "a row without a key would end differently without GM"),
    ],
    ids=["no bound", "bias", "wide", "epsilon", "zero rule", "largest", "no maximum", "no-key rows"],
)
def test_unbound_refuses(rule: Any, score: Any, reason: str) -> None:
    refuses(unbound, attention("x", rule, score), reason)


@pytest.mark.parametrize(("fill", "offset"), [(-float("inf"), 0), (-float("inf"), 3), (-3e38, 0)])
def test_unbound_under_masks(fill: float, offset: int) -> None:
    """Causal rows of as many keys keep one; rows without are 0/0 = NaN either way when they are filled with −∞."""
    done(unbound, attention("x", papers.softmax, capped_causal(fill, offset), m=size("P")))


def test_unbound_keeps_a_maximum_that_is_used() -> None:
    out = unbound(attention("x", maximum_itself, capped_score), ("m",))
    assert not isinstance(out, Refusal)
    assert any(e.out.tensor == "G2" and e.op == "max" for e in out.cascade.einsums)


def test_outputs_that_move_with_the_maximum() -> None:
    assert depends(papers.cascade4(), "GM") is None
    assert depends(papers.cascade4(), "SD") is not None
    assert "moves" in str(depends(attention("x", rules.unnormalised), "GM"))
    assert depends(attention("x", papers.log_softmax), "GM") is None
    assert depends(attention("x", rules.base_two), "GM") is None


# --- partition and repair -----------------------------------------------------------------------------------------


def test_partition_cuts_every_reduction_in_two() -> None:
    c = done(tiling.partition, papers.cascade4())
    assert "LGM[p,m1] = max_m0 where(m1 · M0 + m0 < M, QK[p,m1,m0], −∞)" in lines(c)
    assert "GM[p] = max_m1 LGM[p,m1]" in lines(c)
    assert {r.name for r in c.ranks if not r.iterative} == {"p", "e", "f", "m1", "m0"}


def test_partition_refuses_integers() -> None:
    b = Builder()
    b.put("Y", "p", b.input("N", "pm", "i64"), "max", "m")
    refuses(tiling.partition, b.cascade("integers", "Y"), "reduces integers")


def test_partition_reads_other_coordinates_by_tile_and_place() -> None:
    """Y[m] read at the coordinate of another rank: at tile p // M0 and place p % M0."""
    b = Builder({"p": size("M")})
    y = b.put("Y", "m", b.input("A", "m") * 2.0)
    at_p = ex.load("Y", (ex.index("p"),), "f32")
    b.put("Z", "p", at_p * b.put("S", "", y, "add", "m"))
    done(tiling.partition, b.cascade("elsewhere", "Z"))


@pytest.mark.parametrize("c", [variants.returned(), variants.layer_norm()], ids=lambda c: c.name)
def test_outputs_over_the_rank_keep_their_shape(c: Cascade) -> None:
    """Written at m1·M0 + m0; the elements of a ragged last tile are dropped."""
    family = ("m",) if "m" in c.rank else ("e",)
    after = done(tiling.partition, c, family)
    name = c.outputs[-1]
    assert after.tensor[name] == c.tensor[name]


def test_repair_gives_cascade_5() -> None:
    parted: Any = tiling.partition(done(rewrites.defer, papers.cascade4()), ("m",))
    c = done(repair, parted.cascade, parted.family)
    text = lines(c)
    assert "RGM[p,m1 + 1] = max(RGM[p,m1], LGM[p,m1])" in text
    assert "SL[p,m1,m0] = exp(QK[p,m1,m0] − RGM[p,m1 + 1])" in text
    assert "PR[p,m1] = exp(RGM[p,m1] − RGM[p,m1 + 1])" in text
    assert "RSD[p,m1 + 1] = RSD[p,m1] · PR[p,m1] + LSD[p,m1]" in text


def test_repair_by_a_factor_is_cascade_3() -> None:
    """What was divided by a running sum is multiplied by old/new, where the sum is provably more than 0."""
    parted: Any = tiling.partition(attention("softplus", papers.softplus), ("m",))
    c = done(repair, parted.cascade, parted.family)
    assert "PR[b,h,p,m1] = RSD[b,h,p,m1] / RSD[b,h,p,m1 + 1]" in lines(c)


def test_repair_refuses_a_factor_that_may_be_zero() -> None:
    """FuseMax's Cascade 3 guards RY = 0, which loses RZ if RY comes back from 0: then the product is deferred instead."""
    parted: Any = tiling.partition(papers.cascade1(), ("k",))
    refuses(repair, parted.cascade, "a factor that may be 0 loses what was summed under it", parted.family)


def test_repair_refuses_a_whole_rank() -> None:
    refuses(repair, papers.cascade4(), "the rank is not cut into tiles")


def test_scores_that_rise_by_thousands_do_not_overflow() -> None:
    c = attention("steep", papers.softmax, lambda b, qk: qk + ex.cast(ex.index("m"), "f32") * 800.0)
    deferred = done(rewrites.defer, c)
    parted: Any = tiling.partition(deferred, ("m",))
    done(repair, parted.cascade, parted.family)


# --- the widened access: a write at computed coordinates ----------------------------------------------------------


def test_scattered_write() -> None:
    """A[m1·M0 + m0] = X[m1, m0], cut at the end of A."""
    at = ex.index("i") * 4 + ex.index("j")
    x = ex.load("X", (ex.index("i"), ex.index("j")), "f32")
    c = verify(
        Cascade(
            "joined", (Rank("i", 3), Rank("j", 4)), (Tensor("X", (3, 4)), Tensor("A", (10,))),
            (Einsum(Access("A", (at,)), x),), ("A",),
        )
    )
    given_x = torch.randn(3, 4)
    assert torch.equal(evaluate(c, {"X": given_x})["A"], given_x.reshape(-1)[:10])
    assert str(c.einsums[0]) == "A[i · 4 + j] = X[i,j]"


@examples(30)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 30), st.booleans())
def test_scattered_write_of_a_reduction(outer: int, inner: int, length: int, iterative: bool) -> None:
    at = ex.index("i") * inner + ex.index("j")
    x = ex.load("X", (ex.index("i"), ex.index("j"), ex.index("k")), "f32")
    ranks = (Rank("i", outer, iterative), Rank("j", inner), Rank("k", 3))
    tensors = (Tensor("X", (outer, inner, 3)), Tensor("A", (length,)))
    c = verify(Cascade("joined", ranks, tensors, (Einsum(Access("A", (at,)), x, "add", ("k",)),), ("A",)))
    given_x = torch.randn(outer, inner, 3, dtype=torch.float64)
    want = torch.full((length,), float("nan"), dtype=torch.float64)
    n = min(length, outer * inner)
    want[:n] = given_x.sum(-1).reshape(-1)[:n]
    assert torch.allclose(evaluate(c, {"X": given_x}, widen=True)["A"], want, equal_nan=True)


def test_refold_is_the_inverse_of_inline() -> None:
    c = papers.cascade4()
    reading = Reading(c)
    for e in c.einsums:
        if e.op is not None:
            assert reading.refold(reading.inline(e.body)) is e.body
