"""Forms with fewer passes, found by search: for what the field writes, equal in float64 after every single rewrite."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.count.describe import describe
from reattend.cost_model.count.passes import passes, report
from reattend.cost_model.count.search import TILED, WHOLE, CascadeForm, search, state
from reattend.patterns import expr as ex
from reattend.patterns.attention.recognise import attention as recognised
from reattend.patterns.cascade import Cascade, parse, to_text, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import papers, variants
from reattend.patterns.library.papers import attention
from reattend.patterns.verdict import Refusal

from ..patterns import rules
from ..strategies import Program, programs
from ..tiers import examples, pairs

torch.set_num_threads(1)
M, K, EMBED, TOKEN = ("m",), ("k",), ("e",), ("i",)
SIZES = {**rules.SIZES, "M0": 8, "K": 29, "K0": 4, "E0": 3, "M1": 5, "I": 11}


def softmax_with_cap_and_sink(b: Any, s: Any) -> Any:
    return papers.softmax_sink(b, b.put("C", "bhpm", ex.unary("tanh", s) * 5.0))


# name → cascade, family, passes as written, of the best form, its rewrites
FIELD: dict[str, tuple[Cascade, tuple[str, ...], int, int, str]] = {
    "softmax": (attention("softmax", papers.softmax), M, 3, 1, "defer partition repair"),
    "softmax, causal": (attention("softmax", papers.softmax, rules.causal), M, 3, 1, "defer partition repair"),
    "softmax, late division": (attention("late", papers.softmax_late, late=True), M, 2, 1, "partition repair"),
    "softmax, no maximum": (papers.naive(), M, 2, 1, "defer"),
    "sigmoid": (attention("sigmoid", papers.sigmoid), M, 1, 1, ""),
    "softplus with L1": (attention("softplus", papers.softplus), M, 2, 1, "defer"),
    "power with L1": (attention("power", papers.power), M, 2, 1, "defer"),
    "soft-cap of 30": (variants.softcap(30.0), M, 3, 1, "defer unbound"),
    "soft-cap of 50": (variants.softcap(50.0), M, 3, 1, "defer partition repair"),
    "soft-cap and sink": (attention("both", softmax_with_cap_and_sink), M, 3, 1, "unbound defer"),
    "cosine": (variants.cosine_softmax(), M, 3, 1, "defer unbound"),
    "cosine over the embedding": (papers.cosine(), EMBED, 2, 1, "defer"),
    "sinks": (attention("sinks", papers.softmax_sink), M, 3, 1, "defer partition repair"),
    "differential": (variants.differential(), M, 3, 1, "expand partition repair"),
    "returned probabilities": (variants.returned(), M, 3, 2, "defer partition repair"),
    "sparsemax in 2 steps": (attention("sparsemax", papers.sparsemax(2)), M, 4, 4, ""),
    "sparsemax in 5 steps": (attention("sparsemax", papers.sparsemax(5)), M, 7, 7, ""),
    "entmax in 3 steps": (attention("entmax", variants.entmax(3)), M, 5, 5, ""),
    "talking heads": (variants.talking_heads(), M, 3, 1, "exchange partition repair"),
    "layer norm": (variants.layer_norm(), EMBED, 3, 2, "moments"),
    "layer norm, moments": (variants.layer_norm_moments(), EMBED, 2, 2, ""),
    "layer norm, Welford": (variants.layer_norm_welford(), EMBED, 2, 2, ""),
    "linear, quadratic spelling": (attention("linear", papers.linear), M, 2, 1, "defer"),
    "linear, keys first": (papers.reassociated(), M, 1, 1, ""),
    "linear, causal": (variants.causal_linear(), TOKEN, 1, 1, ""),
    "linear, gated": (variants.gated_linear(), TOKEN, 1, 1, ""),
    "linear, decayed": (variants.decayed_linear(), TOKEN, 1, 1, ""),
    "Cascade 1": (papers.cascade1(), K, 2, 1, "defer"),
    "Cascade 4": (papers.cascade4(), M, 3, 1, "defer partition repair"),
}


def outputs(c: Cascade, tensors: Any, sizes: Any = SIZES) -> Any:
    return evaluate(c, tensors, sizes, widen=True)


def agree(written: Cascade, forms: Sequence[CascadeForm], sizes: Any = SIZES) -> None:
    tensors = rules.tensors(written, sizes=sizes)
    want = outputs(written, tensors, sizes)
    for form in forms:
        got = outputs(form.cascade, tensors, sizes)
        assert list(got) == list(want)
        for name in want:
            assert rules.error(got[name], want[name]) <= 1e-12, (str(form), name)


@pytest.mark.parametrize("name", FIELD)
def test_forms_of_the_field(name: str) -> None:
    c, family, written, best, how = FIELD[name]
    found = search(c, family)
    assert passes(c, family) == found.written.passes == written
    assert found.best.passes == best
    assert " ".join(s.rewrite for s in found.best.steps) == how
    assert passes(found.best.cascade, found.best.family) == best
    agree(c, found.forms)


@pytest.mark.parametrize("name", [n for n, row in FIELD.items() if row[4]])
def test_every_single_rewrite_keeps_the_values(name: str) -> None:
    """Along the way to the best form, after each step: same values, verified, canonical, passes as the step says."""
    c, family, *_ = FIELD[name]
    tensors = rules.tensors(c, sizes=SIZES)
    want = outputs(c, tensors)
    table = {r.__name__: r for r in (*WHOLE, *TILED)}
    for step in search(c, family).best.steps:
        before = passes(c, family)
        out = table[step.rewrite](c, family)
        assert not isinstance(out, Refusal)
        c, family = out.cascade, out.family
        assert (step.before, step.after) == (before, passes(c, family))
        assert verify(c) is c
        assert parse(to_text(c)) == c
        got = outputs(c, tensors)
        assert all(rules.error(got[n], want[n]) <= 1e-12 for n in want)


@pytest.mark.parametrize("tile", [1, 5, 37, 64])
@pytest.mark.parametrize("name", ["softmax, causal", "differential", "returned probabilities", "talking heads"])
def test_any_tile_size(name: str, tile: int) -> None:
    c, family, *_ = FIELD[name]
    agree(c, search(c, family).forms, {**SIZES, "M0": tile})


@pytest.mark.parametrize(("rule", "score"), pairs(6, [*rules.SOFTMAX, *rules.OTHERS], rules.SCORES))
def test_every_row_rule_and_mask(rule: Any, score: Any) -> None:
    """Rows without a key included: NaN where the model has NaN, and only there."""
    c = attention(rule.__name__, rule, score)
    found = search(c, M)
    assert found.best.passes == 1
    agree(c, [found.best])


def test_the_best_form_of_softmax_is_cascade_5() -> None:
    """One running maximum, sum and product, two exponentials in the loop: as many operations as the paper's."""
    best = search(papers.cascade4(), M).best
    iterative = {r.name for r in best.cascade.ranks if r.iterative}
    assert iterative == {"m1"}
    assert str(best.state) == "F*P + 2*P"
    holders = [e.out.tensor for e in best.cascade.einsums if any(x.op == "exp" for x in ex.walk(e.body))]
    assert holders == ["SL", "PR"]
    assert len(best.steps[-1].conditions) == 2


def test_talking_heads_have_two_forms() -> None:
    """Two passes with a state of one row, or one with a product for every pair of heads."""
    forms = {f.passes: f for f in search(variants.talking_heads(), M).forms}
    assert sorted(forms) == [1, 2, 3]
    assert str(forms[2].state) == "F*H*P + 2*H*P"
    assert str(forms[1].state) == "F*H**2*P + 2*H*P"


def test_inputs_are_read_as_often_as_the_form_says() -> None:
    """Returned probabilities need the keys twice and the values once; a differential map each operand once."""
    best = search(variants.returned(), M).best
    assert report(best.cascade, best.family).inputs == {"K": 2, "V": 1}
    best = search(variants.differential(), M).best
    assert report(best.cascade, best.family).inputs == {"K1": 1, "K2": 1, "V": 1}


def test_conditions_of_a_dropped_maximum() -> None:
    found = search(variants.softcap(30.0), M)
    assert [s.conditions for s in found.best.steps if s.rewrite == "unbound"] == [
        ("-30 ≤ scores of GM ≤ 30", "60 < 88 nats in f32")
    ]
    assert not any(e.op == "max" for e in found.best.cascade.einsums)


def test_a_wide_cap_keeps_its_maximum() -> None:
    """Gemma 2 caps at 50: exp(−100) is no normal number in f32."""
    reasons = [str(r) for r in search(variants.softcap(50.0), M).refusals]
    assert any("scores spread over 100 nats" in r and "the running maximum stays" in r for r in reasons)


def test_refusals_name_the_law() -> None:
    reasons = {r.candidate: r.reason for r in search(attention("x", papers.sparsemax(2)), M).refusals}
    assert "relu is no f(element)·h(" in reasons["repair"]
    assert reasons["unbound"] == "no bound of the scores under GM is provable"


def test_unknown_rank() -> None:
    with pytest.raises(KeyError):
        search(papers.cascade4(), ("x",))


def test_state_counts_what_is_carried() -> None:
    assert str(state(papers.cascade5(), ("m1", "m0"))) == "F*P + 2*P"
    assert str(state(variants.causal_linear(), TOKEN)) == "E*F"


def test_describe_is_plain_data() -> None:
    import json

    d = describe(papers.cascade4(), {"P": 4096, "M": 4096, "E": 64, "F": 64}, rows=256, width=2)
    assert json.loads(json.dumps(d)) == d
    (keys,) = [f for f in d["families"] if f["ranks"] == ["m"]]
    assert (keys["passes"], keys["inputs"], keys["footprint"]) == (3, {"K": 3, "V": 1}, 4096)
    assert keys["levels"] == {"QK": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "AV": 3}
    assert [r["tensor"] for r in keys["revisited"]] == ["QK", "SN"]
    assert {x["how"]: x["held_bytes"] for x in keys["revisited"][0]["choices"]}["buffer"] == 2 * 4096 * 256
    assert [(f["passes"], f["best"]) for f in d["forms"]] == [(1, True), (2, False), (3, False)]
    assert [r["name"] for r in d["forms"][0]["rewrites"]] == ["defer", "partition", "repair"]


def test_describe_an_attention_with_a_key_family() -> None:
    d = describe(attention("softmax", papers.softmax), family=M)
    assert d["forms"][0]["ranks"] == ["m1", "m0"]
    assert {r["tensor"] for f in d["families"] for r in f["revisited"]} >= {"S", "SN"}


# --- properties ---------------------------------------------------------------------------------------------------

_maps: dict[str, Any] = {
    "exp": lambda x: ex.exp(x * 0.3), "square": lambda x: x * x, "relu": lambda x: ex.unary("relu", x),
    "sigmoid": lambda x: ex.unary("sigmoid", x), "abs": lambda x: ex.unary("abs", x) + 0.1, "same": lambda x: x,
}
_norms: dict[str, Any] = {
    "sum": lambda b, n, a: a / (b.put(n, "bhp", a, "add", "m") + 40.0),
    "shift": lambda b, n, a: a - b.put(n, "bhp", a, "max", "m"),
    "centre": lambda b, n, a: a - b.put(n, "bhp", a, "add", "m") * 0.04,
    "threshold": lambda b, n, a: ex.unary("relu", a - b.put(n, "bhp", a, "add", "m") * 0.04),
}
_small = {"B": 1, "H": 2, "P": 5, "M": 11, "E": 3, "F": 2}


@examples(25)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(_norms)), st.sampled_from(sorted(_maps))), min_size=1, max_size=3),
    st.sampled_from([rules.scaled, rules.biased, rules.capped, rules.causal_lowest]),
    st.integers(1, 12),
)
def test_random_row_programs_keep_their_values(steps: Any, score: Any, tile: int) -> None:
    """Whatever the search finds, for chains with and without a one-pass form: no more passes, the same values."""

    def rule(b: Any, s: Any) -> Any:
        a = b.put("Z", "bhpm", ex.where(s > -1e3, s, -3.0))
        for i, (norm, f) in enumerate(steps):
            a = b.put(f"A{i}", "bhpm", _maps[f](b.put(f"N{i}", "bhpm", _norms[norm](b, f"S{i}", a))))
        return a

    c = attention("drawn", rule, score)
    found = search(c, M)
    assert found.best.passes <= found.written.passes
    assert all(s.after <= s.before for form in found.forms for s in form.steps)
    tensors = rules.tensors(c, 3, _small)
    sizes = {**_small, "M0": tile}
    want = evaluate(c, tensors, sizes, widen=True)["O"]
    for form in found.forms:
        got = evaluate(form.cascade, tensors, sizes, widen=True)["O"]
        # moments cancel: their own condition says so. A rule that is zero everywhere has no size to measure rounding by.
        assert rules.error(got, want) <= 1e-9 or float((got - want).abs().max()) <= 1e-15, str(form)


@examples(30)
@given(programs(longest=33), st.integers(1, 40))
def test_drawn_attentions_keep_their_values(program: Program, tile: int) -> None:
    """Scores, masks and row rules drawn at random, grouped heads and symbolic lengths: one pass, and the same values."""
    view: Any = recognised(program.cascade)
    found = search(program.cascade, (view.key,))
    assert found.best.passes == 1
    tensors = program.inputs()
    (name,) = program.cascade.outputs
    for form in found.forms:
        want = evaluate(program.cascade, tensors, program.sizes, widen=True)[name]
        width = {str(r.size): tile for r in form.cascade.ranks if r.name.endswith("0")}
        got = evaluate(form.cascade, tensors, {**program.sizes, **width}, widen=True)[name]
        assert rules.error(got, want) <= 1e-12, str(form)
