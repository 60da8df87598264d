"""One-pass forms: derived for every row rule that has one, equal to the rule as written, refused with the law that fails."""

from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import RowState, derive, stream
from reattend.patterns.cascade import parse, to_text, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import papers
from reattend.patterns.terms.constant import TRIES, number, tries
from reattend.patterns.terms.laws import additive, multiplicative, separates
from reattend.patterns.verdict import Obstacle
from tests.effort import calls
from tests.tiers import examples, pairs

from . import rules

torch.set_num_threads(1)


def derived(rule: Any, score: Any = rules.scaled, **options: Any) -> Any:
    c = papers.attention(rule.__name__, rule, score, **options)
    view = attention(c)
    assert isinstance(view, Attention), view
    state = derive(view)
    assert isinstance(state, RowState), state
    return c, view, state


def streams(found: Any, tile: int, sizes: Any = rules.SIZES, seed: int = 0) -> Any:
    c, view, state = found
    given_tensors = rules.tensors(c, seed, sizes)
    whole = evaluate(c, given_tensors, sizes, widen=True)["O"]
    tiled = evaluate(stream(view, state), given_tensors, {**sizes, "M0": tile}, widen=True)["O"]
    return rules.error(tiled, whole), whole


@pytest.mark.parametrize("rule", [rules.sink_log, rules.sink_logsumexp], ids=lambda f: f.__name__)
def test_a_sink_in_a_logarithm_leaves_the_running_bound_in_the_weight(rule: Any) -> None:
    """An exponential that lost its bound passes all numbers, and a factor that was tried on one sink is wrong for others."""
    *_, state = derived(rule)
    assert state.correction is not None
    assert [c.op for c in state.carried] == ["max", "add"]


def test_no_law_takes_a_value_for_what_it_does_not_know() -> None:
    x, gate = ex.load("x", (ex.index("m"),), "f32"), ex.load("gate", (), "f32")
    with pytest.raises(KeyError):
        number(x * gate, {"x": 1.0})
    for leaf in (ex.index("m"), ex.symbol("n")):
        with pytest.raises(KeyError, match=f"'{leaf}'"):
            number(leaf + 1, {})
    assert len({str(row[gate]) for row in tries((x * gate,), {x: 1.0})}) == TRIES


def test_what_is_made_up_takes_every_kind_of_value() -> None:
    """Floats of both signs, coordinates and sizes of 1 to 3, conditions of both kinds; two of each where a rank spreads."""
    p, m = ex.index("p"), ex.index("m")
    floats, flags, counts = (
        {ex.load(f"{dtype}{n}", (r,), dtype): r for n in range(6) for r in (p, m)} for dtype in ("f32", "b1", "i64")
    )
    sizes: dict[Any, Any] = {**counts, p: p, m: m, ex.symbol("n"): p}
    terms = (*floats, *flags, *sizes)
    rows = list(tries(terms, {}, spread="m"))
    for e, r in {**floats, **flags, **sizes}.items():
        assert {np.asarray(row[e]).shape for row in rows} == {(2,) if r is m else ()}
    made, truths, whole = (
        np.concatenate([np.asarray(row[e]).reshape(-1) for row in rows for e in kind]) for kind in (floats, flags, sizes)
    )
    assert made.min() < 0 < made.max()
    assert truths.dtype == np.bool_
    assert set(truths.tolist()) == {False, True}
    assert whole.dtype == np.int64
    assert set(whole.tolist()) == {1, 2, 3}


@pytest.mark.parametrize(("rule", "score"), pairs(4, [*rules.SOFTMAX, *rules.OTHERS], rules.SCORES))
def test_stream_equals_the_rule_as_written(rule: Any, score: Any) -> None:
    """37 keys in tiles of 16, rows without a key included: NaN where the model has NaN, and only there."""
    error, _ = streams(derived(rule, score), 16)
    assert error <= 1e-12


@pytest.mark.parametrize("tile", [1, 5, 37, 64])
@pytest.mark.parametrize("rule", [papers.softmax, papers.softmax_sink, rules.no_nan, rules.variance])
def test_any_tile_size(rule: Any, tile: Any) -> None:
    error, _ = streams(derived(rule, rules.padded_inf), tile)
    assert error <= 1e-12


@pytest.mark.parametrize(
    ("rule", "score", "value"),
    [
        (papers.softmax, rules.causal, "nan"),
        (papers.softmax, rules.causal_lowest, "mean"),
        (papers.softmax_zero, rules.causal, "zero"),
        (papers.softmax_sink, rules.causal, "zero"),
        (rules.no_nan, rules.causal, "zero"),
        (rules.no_nan_log, rules.causal, "zero"),
        (rules.masked_after, rules.causal, "zero"),
        (rules.all_masked, rules.causal, "zero"),
        (rules.any_kept, rules.causal_lowest, "zero"),
        (rules.logsumexp, rules.causal_lowest, "sum"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_rows_without_a_key(rule: Any, score: Any, value: Any) -> None:
    c, view, state = derived(rule, score)
    given_tensors = rules.tensors(c)
    out = evaluate(stream(view, state), given_tensors, {**rules.SIZES, "M0": 16}, widen=True)["O"][:, :, :3]
    v = given_tensors["V"].sum(2, keepdim=True).expand(out.shape)
    want = {"nan": v * float("nan"), "zero": v * 0, "mean": v / 37, "sum": v}[value]
    assert torch.allclose(out, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("rule", [papers.softmax, papers.softmax_late, papers.softmax_naive, papers.power])
def test_late_division_and_grouped_heads(rule: Any) -> None:
    late = rule is papers.softmax_late
    error, _ = streams(derived(rule, rules.padded, late=late, group=2), 16)
    assert error <= 1e-12


def test_softmax_is_cascade_5() -> None:
    """The state is the paper's: a running maximum, sum and product, one correction for both sums."""
    _, _, state = derived(papers.softmax)
    assert [(s.name, s.op) for s in state.carried] == [("GM", "max"), ("SD", "add")]
    assert state.correction is state.carried[1].correction
    assert str(state.correction) == "exp(old:GM[b,h,p] − GM[b,h,p])"
    assert state.weight is state.carried[1].lift
    assert str(state.finish) == "O[b,h,p,f] / SD[b,h,p]"


def test_a_bound_that_may_be_empty_is_guarded() -> None:
    _, _, state = derived(papers.softmax, rules.causal)
    assert str(state.correction) == "exp(old:GM[b,h,p] − where(GM[b,h,p] = −∞, 0, GM[b,h,p]))"


@pytest.mark.parametrize(
    "rule",
    [rules.shifted_softmax, papers.log_softmax, rules.logsumexp, papers.softmax_late],
    ids=lambda f: f.__name__,
)
def test_spellings_of_softmax_carry_one_state(rule: Any) -> None:
    """A maximum that is subtracted twice is carried once; a logarithm of the sum becomes a division."""
    _, _, state = derived(rule, late=rule is papers.softmax_late)
    assert [s.op for s in state.carried] == ["max", "add"]
    assert str(state.weight).startswith("exp(QK")


def test_a_sink_that_is_shifted_twice_is_one_bound() -> None:
    _, _, state = derived(rules.shifted_sink)
    assert [s.op for s in state.carried] == ["max", "add"]
    assert "max(R0[b,h,p], sink[h])" in str(state.correction)


@pytest.mark.parametrize("rule", [papers.sigmoid, papers.power, papers.softplus, papers.linear, papers.softmax_naive])
def test_sums_are_deferred_without_correction(rule: Any) -> None:
    _, _, state = derived(rule)
    assert state.correction is None
    assert all(s.correction is None and s.op == "add" for s in state.carried)


@pytest.mark.parametrize("rule", [*rules.SOFTMAX], ids=lambda f: f.__name__)
def test_derivation_is_short_and_carries_what_is_read(rule: Any) -> None:
    view: Any = attention(papers.attention("warm", rule, rules.scaled))
    derive(view)
    view = attention(papers.attention("timed", rule, rules.capped))
    state: Any = None

    def work() -> None:
        nonlocal state
        state = derive(view)

    # 1,200 to 7,700 of them
    assert calls(work) < 16_000
    read = {
        str(x.attr).removeprefix("old:")
        for t in (
            state.weight,
            state.finish,
            *(u for s in state.carried for u in (s.lift, s.correction) if u is not None),
        )
        for x in ex.loads(t)
    }
    assert {s.name for s in state.carried} <= read


def test_corrections_never_exceed_one() -> None:
    """Scores that rise by thousands from tile to tile: nothing overflows on the way."""
    c, view, state = derived(papers.softmax, lambda b, qk: qk + ex.cast(ex.index("m"), "f32") * 800.0)
    error, whole = streams((c, view, state), 4)
    assert error <= 1e-12
    assert whole.isfinite().all()


@pytest.mark.parametrize("empty", [slice(0, 0), slice(0, 20), slice(20, 40), slice(0, 40)], ids=str)
def test_merge_of_two_states_by_the_documented_rule(empty: slice) -> None:
    """States over disjoint keys, one of them or both without a key: by the terms of the state alone."""
    _, view, state = derived(papers.softmax, rules.causal)
    g = torch.Generator().manual_seed(1)
    s, v = torch.randn(40, generator=g).double().numpy(), torch.randn(40, generator=g).double().numpy()
    s[empty] = -np.inf
    top, total = state.carried

    def part(keys: slice) -> dict[str, Any]:
        known = {view.score: s[keys]}
        out: dict[str, Any] = {"GM": s[keys].max()}
        out["SD"] = number(total.lift, out, known).sum()
        out["O"] = (number(state.weight, out, known) * v[keys]).sum()
        return out

    left, right = part(slice(0, 20)), part(slice(20, 40))
    merged = {"GM": max(left["GM"], right["GM"])}
    assert top.correction is None
    for name, correction in (("SD", total.correction), ("O", state.correction)):
        assert correction is not None
        factors = [number(correction, {"GM": merged["GM"], "old:GM": side["GM"]}) for side in (left, right)]
        merged[name] = left[name] * factors[0] + right[name] * factors[1]
    want = (torch.tensor(s).softmax(0) * torch.tensor(v)).sum()
    got = torch.tensor(float(number(state.finish, merged)), dtype=torch.float64)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_stream_is_canonical_and_verified() -> None:
    c, view, state = derived(papers.softmax_sink, rules.padded)
    tiled = stream(view, state)
    assert verify(tiled) is tiled
    assert parse(to_text(tiled)) == tiled
    assert {t.name for t in tiled.inputs} == {t.name for t in c.inputs}
    assert tiled.outputs == c.outputs
    assert tiled.tensor["O"] == c.tensor["O"]
    # one tile of the scores, as FuseMax names it
    assert tiled.tensor["BS"].shape[-1] == sympy.Symbol("M0", integer=True, positive=True)


def test_exponentials_are_shared() -> None:
    """One exponential per score and one per row and tile, as in the paper's count."""
    _, view, state = derived(papers.softmax)
    tiled = stream(view, state)
    holders = [e.out.tensor for e in tiled.einsums if any(x.op == "exp" for x in ex.walk(e.body))]
    assert len(holders) == 2


# --- refusals -----------------------------------------------------------------------------------------------------


def threshold(b: Any, s: Any) -> Any:
    tau = b.put("TAU", "bhp", ex.unary("relu", s), "add", "m")
    a = ex.where(s > tau, s, -float("inf"))
    return papers.softmax(b, b.put("T", "bhpm", a))


def shifted_sigmoid(b: Any, s: Any) -> Any:
    return ex.unary("sigmoid", s - b.put("SD", "bhp", s, "add", "m"))


def row_temperature(b: Any, s: Any) -> Any:
    return papers.softmax(b, b.put("T", "bhpm", s / b.put("TT", "bhp", s * s, "add", "m")))


def scaled_apart(b: Any, s: Any) -> Any:
    return ex.where(s > 0.0, s / b.put("SD", "bhp", s * s, "add", "m"), s)


def floor_after(b: Any, s: Any) -> Any:
    return ex.maximum(papers.softmax(b, s), 1e-6)


def ceiling_after(b: Any, s: Any) -> Any:
    return ex.minimum(papers.softmax(b, s), 0.5)


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (threshold, "threshold"),
        (shifted_sigmoid, "sigmoid is no f(element)·h(SD)"),
        (row_temperature, "exp of a term that splits into no sum: div is no element + h(TT)"),
        (floor_after, "max of an element and a row scalar"),
        (ceiling_after, "min of an element and a row scalar"),
        (scaled_apart, "a choice between terms that scale differently with SD"),
        (papers.sparsemax(2), "relu is no f(element)·h(GM)"),
        (papers.differential, "one accumulator holds one"),
    ],
    ids=["threshold", "sigmoid", "temperature", "floor", "ceiling", "choice", "sparsemax", "differential"],
)
def test_chains_without_a_one_pass_form(rule: Any, law: Any) -> None:
    view = attention(papers.attention("x", rule, rules.scaled))
    assert isinstance(view, Attention), view
    obstacle = derive(view)
    assert isinstance(obstacle, Obstacle)
    assert law in obstacle.reason


def test_a_long_term_is_quoted_in_part() -> None:
    def floors(b: Any, s: Any) -> Any:
        floor = ex.cast(ex.index("p"), "f32")
        for k in range(40):
            floor = ex.maximum(floor * 0.5, 1e-6 * k)
        return ex.maximum(papers.softmax(b, s), floor)

    view: Any = attention(papers.attention("x", floors, rules.scaled))
    obstacle = derive(view)
    assert isinstance(obstacle, Obstacle)
    assert "max of an element and a row scalar" in obstacle.reason
    assert obstacle.reason.endswith("…")
    assert len(obstacle.reason) < 300


X, D = sympy.symbols("x d", positive=True)
NEW = sympy.Symbol("d'", positive=True)
REPAIRS = [
    ("exp(x − d)", sympy.exp(X - D), sympy.exp(D - NEW)),
    ("x/d", X / D, D / NEW),
    ("x/√d", X / sympy.sqrt(D), sympy.sqrt(D / NEW)),
    ("exp(x/d)", sympy.exp(X / D), None),
    ("σ(x − d)", 1 / (1 + sympy.exp(D - X)), None),
    ("relu(x − d)", sympy.Max(X - D, 0), None),
    ("(x − d)²", (X - D) ** 2, None),
]


@pytest.mark.parametrize(("name", "term", "factor"), REPAIRS, ids=[r[0] for r in REPAIRS])
def test_a20_repair_terms(name: Any, term: Any, factor: Any) -> None:
    """What turns Σ g(x, d) into Σ g(x, d'), or nothing."""
    found = multiplicative(term, X, D)
    assert found is None if factor is None else sympy.simplify(found - factor) == 0


def test_what_separates_is_seen_through_casts_and_other_loads() -> None:
    x, d, c = (ex.load(n, (), "f32") for n in ("x", "d", "c"))
    assert separates(ex.exp(ex.cast(x, "f64") - d) * c, x, (d,))
    assert not separates(ex.exp(ex.cast(x * d, "f64")) + c, x, (d,))
    assert not separates(ex.exp(x - d) + float("inf"), x, (d,))


def test_a_proof_that_has_no_end_is_not_begun() -> None:
    """Numbers do not refute it (it hardly varies), and sympy simplifies what is left of it for hours."""
    x, *rows = (ex.load(n, (), "f32") for n in ("x", "a", "b", "c"))
    term = x
    for r in rows:
        term = ex.unary("sigmoid", term / (r + 40.0))
    assert not separates(term, x, tuple(rows))
    assert separates(ex.exp(x / 40.0) * rows[0], x, (rows[0],))


@pytest.mark.parametrize("of", [lambda x, t: x * t, lambda x, t: x / t], ids=["times", "over"])
@pytest.mark.parametrize("score", [rules.scaled, rules.causal, rules.late_keys], ids=lambda f: f.__name__)
def test_a_bound_that_data_scale_may_fall(of: Any, score: Any) -> None:
    """Temperatures of either sign: where one is negative the scaled maximum falls from +∞ on."""

    def rule(b: Any, s: Any) -> Any:
        sn = b.put("SN", "bhpm", ex.exp(of(s - b.put("GM", "bhp", s, "max", "m"), b.input("temperature", "h"))))
        return sn / b.put("SD", "bhp", sn, "add", "m")

    c, view, state = derived(rule, score)
    given_tensors = rules.tensors(c)
    given_tensors["temperature"] = torch.tensor([0.7, -0.6, 1.3, -1.1], dtype=torch.float64)
    whole, tiled = (
        evaluate(x, given_tensors, {**rules.SIZES, "M0": 8}, widen=True)["O"] for x in (c, stream(view, state))
    )
    assert rules.error(tiled, whole) <= 1e-12
    assert whole[:, 0].isfinite().any()


def test_a20_shifts_of_a_maximum() -> None:
    assert additive(X - D, X, D) == D - NEW
    assert additive(X * D, X, D) is None


def row_of(term: Any) -> Any:
    """A sum over the keys of a term of the score and of an earlier sum."""

    def rule(b: Any, s: Any) -> Any:
        x = b.put("SX", "bhpm", ex.unary("sigmoid", s))
        d = b.put("D", "bhp", x, "add", "m")
        return x / (b.put("SD", "bhp", term(x, d), "add", "m") + 1.0)

    return rule


@pytest.mark.parametrize(
    ("term", "one_pass"),
    [
        (lambda x, d: ex.exp(x - d), True), (lambda x, d: x / d, True), (lambda x, d: ex.exp(x / d), False),
        (lambda x, d: ex.unary("sigmoid", x - d), False), (lambda x, d: ex.unary("relu", x - d), False),
        (lambda x, d: (x - d) * (x - d), True),
    ],
    ids=["exp(x − d)", "x/d", "exp(x/d)", "σ(x − d)", "relu(x − d)", "(x − d)² by moments"],
)
def test_a20_derivation_agrees(term: Any, one_pass: Any) -> None:
    view: Any = attention(papers.attention("x", row_of(term), rules.scaled))
    assert isinstance(derive(view), RowState) is one_pass


def test_separable_beyond_the_rules() -> None:
    """log(exp(x)^r) = r·x: sympy proves what no structural rule knows."""

    def rule(b: Any, s: Any) -> Any:
        a = b.put("SN", "bhpm", ex.unary("sigmoid", s))
        sd = b.put("SD", "bhp", a, "add", "m")
        return ex.unary("log", ex.binary("pow", ex.exp(a), sd))

    error, _ = streams(derived(rule), 16)
    assert error <= 1e-12


@pytest.mark.parametrize(
    "of",
    [
        lambda a, sd: ex.unary("abs", a * (0.5 - sd)), lambda a, sd: ex.binary("pow", a / (0.5 + sd), -1.0),
        lambda a, sd: -(a / (0.5 + sd)),
    ],
    ids=["absolute", "inverse", "negative"],
)
def test_factors_of_either_sign_and_inverse_powers_are_deferred(of: Any) -> None:
    def rule(b: Any, s: Any) -> Any:
        a = b.put("SN", "bhpm", ex.unary("sigmoid", s))
        return of(a, b.put("SD", "bhp", a, "add", "m"))

    error, _ = streams(derived(rule), 16)
    assert error <= 1e-12


def total(b: Any, x: Any) -> Any:
    return b.put("SD", "bhp", x, "add", "m")


@pytest.mark.parametrize(
    "of",
    [
        lambda b, s: s * total(b, ex.unary("relu", s)), lambda b, s: s / (total(b, ex.unary("relu", s)) + 1.0),
        lambda b, s: s / ex.unary("sqrt", total(b, s * s) + 1e-6), lambda b, s: ex.unary("abs", s) / total(b, ex.unary("abs", s)),
        lambda b, s: s * ex.unary("reciprocal", total(b, ex.unary("relu", s)) + 1.0), lambda b, s: s * (total(b, ex.unary("relu", s)) / 37.0),
    ],
    ids=["times a sum", "over a sum and 1", "over a length", "no sign", "reciprocal", "times a mean"],
)
@pytest.mark.parametrize("score", [rules.scaled, lambda b, qk: -ex.unary("sigmoid", qk)], ids=["any", "below 0"])
def test_a_rectifier_commutes_with_what_is_positive(of: Any, score: Any) -> None:
    error, whole = streams(derived(lambda b, s: ex.unary("relu", of(b, s)), score), 16)
    assert error <= 1e-12
    assert score is not rules.scaled or (whole.isfinite().all() and (whole != 0).any())


@pytest.mark.parametrize(
    "of",
    [
        lambda b, s: s * (0.5 - total(b, ex.unary("sigmoid", s))), lambda b, s: s / (total(b, ex.unary("sigmoid", s)) - 18.0),
        lambda b, s: s / total(b, ex.unary("relu", s)), lambda b, s: s / ex.unary("sqrt", total(b, ex.unary("relu", s))),
        lambda b, s: s * ex.unary("rsqrt", total(b, ex.unary("relu", s))),
        lambda b, s: s * ex.binary("pow", total(b, ex.unary("relu", s)), -1.0),
    ],
    ids=["times any", "over any", "over 0", "over the root of 0", "times ∞", "times 0 to the power −1"],
)
def test_a_rectifier_hides_what_a_row_makes_infinite(of: Any) -> None:
    """relu(−1/0) is 0, where 0/0 is NaN: the row attends to nothing, and is no degenerate one."""
    c = papers.attention("x", lambda b, s: ex.unary("relu", of(b, s)), rules.scaled)
    view: Any = attention(c)
    assert isinstance(derive(view), Obstacle)


@pytest.mark.parametrize("k", [0.0, -1.0])
def test_no_power_of_a_row_without_a_key_is_deferred_that_makes_something_of_0(k: float) -> None:
    def rule(b: Any, s: Any) -> Any:
        kept = b.put("E", "bhp", rules.M <= rules.P - 3, "or", "m")
        x = ex.unary("sigmoid", s)
        return ex.binary("pow", ex.where(kept, x / total(b, x), 0.0), ex.const(k))

    view: Any = attention(papers.attention("x", rule, rules.scaled))
    obstacle = derive(view)
    assert isinstance(obstacle, Obstacle)
    assert "pow is no f(element)·h(" in obstacle.reason


@pytest.mark.parametrize(("dtype", "ends"), [("f32", True), ("i64", False)])
def test_only_a_float_lets_a_bound_be_empty(dtype: str, ends: bool) -> None:
    """A number of a row that is an integer is never −∞: such a row ends as it is guarded."""

    def rule(b: Any, s: Any) -> Any:
        top = b.put("GM", "bhp", ex.maximum(b.put("RM", "bhp", s, "max", "m"), ex.cast(b.input("sink", "h", dtype), "f32")))
        return ex.exp(s - top) / (total(b, ex.exp(s - top)) + 1e-6)

    found = derived(rule, rules.causal)
    assert streams(found, 16)[0] <= 1e-12
    assert any(e.is_const and np.isnan(float(e.value)) for e in ex.walk(found[2].finish)) is ends


# --- row programs drawn at random ---------------------------------------------------------------------------------

_maps: dict[str, Any] = {
    "exp": lambda x: ex.exp(x * 0.3),
    "square": lambda x: x * x,
    "relu": lambda x: ex.unary("relu", x),
    "sigmoid": lambda x: ex.unary("sigmoid", x),
    "abs": lambda x: ex.unary("abs", x) + 0.1,
    "softplus": lambda x: ex.unary("softplus", x),
    "tanh": lambda x: ex.unary("tanh", x) + 2.0,
}
_norms: dict[str, Any] = {
    "sum": lambda b, n, a: b.put(n, "bhp", a, "add", "m") + 1.0,
    "length": lambda b, n, a: ex.unary("sqrt", b.put(n, "bhp", a * a, "add", "m") + 1e-3),
    "largest": lambda b, n, a: b.put(n, "bhp", a, "max", "m") + 1.0,
    "none": lambda b, n, a: ex.const(2.0),
}


@examples(60)
@given(
    st.sampled_from(sorted(_maps)),
    st.lists(st.sampled_from(sorted(_norms)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([rules.scaled, rules.biased, rules.capped]),
    st.integers(1, 40),
)
def test_random_row_programs(name: Any, norms: Any, stable: Any, score: Any, tile: Any) -> None:
    """A map, then several normalisations one after another, with a running bound subtracted first or not."""

    def rule(b: Any, s: Any) -> Any:
        if stable:
            s = b.put("T", "bhpm", s - b.put("GM", "bhp", s, "max", "m"))
            a = b.put("A0", "bhpm", ex.exp(s))
        else:
            if score is rules.capped:
                s = ex.where(s > -1e30, s, 0.0)
            a = b.put("A0", "bhpm", _maps[name](s))
        for i, n in enumerate(norms):
            # a maximum of what is itself rescaled has no additive correction
            n = "sum" if stable and n == "largest" else n
            a = b.put(f"A{i + 1}", "bhpm", a / _norms[n](b, f"S{i}", a))
        return a

    sizes = {"B": 1, "H": 2, "P": 7, "M": 23, "E": 4, "F": 3}
    error, _ = streams(derived(rule, score), tile, sizes)
    assert error <= 1e-12
