"""The backward of an attention: its cascade, evaluated in float64, is what autograd finds in the forward's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import assume, given

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.backward.adjoint import Adjoint, adjoint
from reattend.patterns.backward.gradient import gradient
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers, variants
from reattend.patterns.verdict import Obstacle

from .. import strategies
from ..codegen import attentions
from ..codegen.attentions import Case, aux, build
from ..strategies import FILLED, FILLS, INF, MASKS, ROWS, SCORES, Program, programs

pytestmark = pytest.mark.thin(2)

Values = Mapping[str, torch.Tensor]
H, B, P, M, F = (ex.index(r) for r in "hbpmf")


def backward(c: Cascade) -> Adjoint:
    a = attention(c)
    assert isinstance(a, Attention), a
    found = adjoint(a)
    assert isinstance(found, Adjoint), found
    return found


def refusal(c: Cascade) -> str:
    found = gradient(c)
    assert isinstance(found, Obstacle)
    return found.reason


def gradients(c: Cascade, given: Values, sizes: Mapping[str, int], d: torch.Tensor) -> dict[str, torch.Tensor]:
    """The backward cascade in float64, by the name of the input."""
    made = gradient(c)
    assert isinstance(made, Cascade), made
    found = evaluate(made, {**given, str(backward(c).dout.attr): d}, sizes, widen=True)
    return {n.rstrip("_")[1:]: t for n, t in found.items()}


def cotangent(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def equals_autograd(c: Cascade, given: Values, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Compare every float input's gradient, for a random gradient of the output; NaN must stand where autograd has it."""
    xs = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in given.items()}
    out = evaluate(c, xs, sizes, widen=True)[c.outputs[0]]
    d = cotangent(out.shape)
    leaves = [n for n, t in xs.items() if t.requires_grad]
    wanted = dict(zip(leaves, torch.autograd.grad(out, [xs[n] for n in leaves], d, allow_unused=True)))
    found = gradients(c, {n: t.detach() for n, t in xs.items()}, sizes, d)
    assert set(found) <= set(leaves)
    for n, w in wanted.items():
        w = torch.zeros_like(xs[n]) if w is None else w
        mine = found.get(n, torch.zeros_like(w))
        assert torch.allclose(mine, w, rtol=1e-9, atol=1e-9, equal_nan=True), f"{n}: {(mine - w).abs().max()}"
    return found


def of_case(case: Case) -> dict[str, torch.Tensor]:
    return equals_autograd(case.cascade, case.inputs(), case.sizes)


def of_program(p: Program) -> dict[str, torch.Tensor]:
    return equals_autograd(p.cascade, p.inputs(1), p.sizes)


# --- values: what the library and the tests know -----------------------------------------------------------------------


@pytest.mark.parametrize("name", attentions.VARIANTS)
def test_of_a_variant(name: str) -> None:
    assert set(of_case(attentions.VARIANTS[name]())) >= {"Q", "K", "V"}


@pytest.mark.parametrize("make", [attentions.windows, attentions.no_batch])
def test_of_other_ranks(make: Callable[[], Case]) -> None:
    of_case(make())


@pytest.mark.parametrize("name", ["plain", "causal", "padding", "sdpa_padding", "nan_padding", "sinks", "sigmoid", "square"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (5, 1)])
def test_of_one_query_or_one_key(name: str, p: int, m: int) -> None:
    of_case(attentions.VARIANTS[name](b=1, p=p, m=m))


RULES = (
    papers.softmax, papers.softmax_zero, papers.softmax_naive, papers.softmax_sink, papers.log_softmax, papers.sigmoid,
    papers.power, papers.softplus, papers.linear,
)
SIZES = {"B": 2, "H": 4, "P": 5, "M": 7, "E": 6, "F": 3}


def of_library(c: Cascade) -> None:
    sizes = {n: v for n, v in SIZES.items() if n in c.free_symbols}
    g = torch.Generator().manual_seed(3)
    given = {t.name: torch.randn([int(s) for s in t.shape], generator=g) * 0.7 for t in c.with_sizes(sizes).inputs}
    equals_autograd(c, given, sizes)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_of_a_row_rule(rule: papers.Rule, group: int) -> None:
    made = papers.attention("attention", rule, group=2, h=4) if group > 1 else papers.attention("attention", rule)
    of_library(made)


@pytest.mark.parametrize("rule", [papers.softmax_late, papers.softplus_late], ids=lambda r: r.__name__)
def test_of_a_late_division(rule: papers.Rule) -> None:
    of_library(papers.attention("attention", rule, late=True))


@pytest.mark.parametrize(
    "make", [papers.cascade4, papers.naive, papers.cosine, variants.cosine_softmax, lambda: variants.softcap(2.0)]
)
def test_of_a_paper(make: Callable[[], Cascade]) -> None:
    """With norms before the scores, which pass their gradients on."""
    of_library(make())


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("row", [r for r in FILLED if r != "leveled"])
@pytest.mark.parametrize("mask", ["causal", "padding", "far"])
def test_of_rows_without_a_key(row: str, mask: str, fill: str) -> None:
    if (row, fill) == ("zero", "barred"):
        pytest.skip("PyTorch's own kernel and the same written out differ: test_a_row_that_is_set_to_0_passes_nothing_back")
    of_program(strategies.attention(lambda s: FILLS[fill](s, MASKS[mask]), ROWS[row], p=7, m=7, b=2, h=4, group=2))


def test_a_row_that_is_set_to_0_passes_nothing_back() -> None:
    """As PyTorch's own kernel has it for a mask of −∞, where softmax and torch.where written out would make NaN of it."""
    p = strategies.attention(lambda s: s + strategies._load("barred", B, M), ROWS["zero"], p=5, m=6, b=2, h=2)
    given = {n: t.double() for n, t in p.inputs(1).items()}
    given["barred"][0] = -INF
    q, k, v, barred = (given[n].clone().requires_grad_() for n in ("Q", "K", "V", "barred"))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, barred[:, None, None].expand(2, 2, 5, 6), scale=0.25)
    d = cotangent(out.shape)
    wanted = torch.autograd.grad(out, (q, k, v, barred), d)
    found = gradients(p.cascade, given, p.sizes, d)
    for n, w in zip(("Q", "K", "V", "barred"), wanted):
        torch.testing.assert_close(found[n], w, rtol=1e-9, atol=1e-9)
    assert not found["Q"][0].any()


@pytest.mark.parametrize("piece", SCORES)
def test_of_every_score(piece: str) -> None:
    found = of_program(strategies.attention(SCORES[piece], ROWS["softmax"], p=9, m=9, b=2, h=4, group=2))
    assert found["Q"].count_nonzero() > 0


@pytest.mark.slow
@given(programs(longest=16))
def test_of_drawn_attentions(p: Program) -> None:
    assume("leveled" not in p.label)
    assume(not ("zero" in p.label and "barred" in p.label))
    of_program(p)


# --- values: the row's end ---------------------------------------------------------------------------------------------

GATE = ex.load("gate", (B, H, P, F), "f32")
FACTOR = ex.load("factor", (H,), "f32")
NEEDS = {"gate": aux("gate", (attentions.N, 4, attentions.S, 16)), "factor": aux("factor", (4,))}


def ended(finish: Callable[[Expr], Expr], name: str, row: str = "softmax") -> Case:
    return build(lambda s: s, row=row, finish=finish, aux=(NEEDS[name],), p=7, m=9)


def test_a_gate_on_the_output() -> None:
    """Its gradient needs the ungated output, which the forward hands over: the gate may be 0."""
    case = ended(lambda n: n * ex.unary("sigmoid", GATE), "gate")
    assert "gate" in of_case(case)
    found = backward(case.cascade)
    assert str(found.acc) == "dO[b,h,p,f] · sigmoid(gate[b,h,p,f])"
    assert any("f" in s.load.ranks for s in found.saved)


@pytest.mark.parametrize("row", ["softmax", "sigmoid", "square"])
def test_a_factor_on_the_output_that_may_be_0(row: str) -> None:
    case = ended(lambda n: n * FACTOR, "factor", row)
    inputs = case.inputs()
    inputs["factor"][1] = 0.0
    assert equals_autograd(case.cascade, inputs, case.sizes)["factor"][1] != 0.0


def test_scores_that_are_lowered_before_a_softmax_with_a_sink() -> None:
    """A sink's maximum is subtracted twice, the second time to no effect."""
    sink = ex.load("sink", (H,), "f32")

    def row(s: Expr, reduce: strategies.Reduce) -> Expr:
        top = ex.maximum(reduce("R", "max", s), sink)
        lowered = s - top
        again = ex.maximum(reduce("GM", "max", lowered), sink - top)
        return ex.exp(lowered - again) / (reduce("SD", "add", ex.exp(lowered - again)) + ex.exp(sink - top - again))

    assert "sink" in of_program(strategies.attention(lambda s: s, row, p=5, m=7, h=4))


# --- the terms ---------------------------------------------------------------------------------------------------------


def lines(c: Cascade) -> list[str]:
    return str(backward(c)).replace("[b,h,p]", "").replace("[b,h,p,m]", "").splitlines()


def test_softmax_comes_out_as_the_textbook_has_it() -> None:
    """Bound and sum of a row, δ = Σ_f dO·O, and no pass over the keys before the one that makes the gradients."""
    c = attentions.VARIANTS["plain"]().cascade
    assert lines(c) == [
        "bound = GM",
        "scale = 1 / SD",
        "delta = Σ_f dO[b,h,p,f] · O[b,h,p,f]",
        "acc = dO[b,h,p,f]",
        "weight = exp(QK · 0.25 − bound) · scale",
        "dQK = Σ exp(QK · 0.25 − bound) · scale · (dW − delta) · 0.25",
    ]
    assert backward(c).passes == ()


def test_one_number_a_row_is_handed_over_where_a_cap_bounds_the_scores() -> None:
    """d + log l in one float32 is exact enough only beside a d that is known to be small."""
    capped = papers.attention("attention", papers.softmax, lambda b, qk: ex.unary("tanh", qk) * 30.0)
    assert lines(capped)[0] == "lse = GM + log(SD)"


def test_a_sink_takes_its_share() -> None:
    c = papers.attention("attention", papers.softmax_sink)
    assert lines(c)[-1] == "dsink[h] = Σ −(held · delta)"
    assert backward(c).leaves[0].space == ("b", "h", "p")


def test_other_rules_need_no_other_loop() -> None:
    """x²/Σx²: the sum is a row scalar as any other, and its gradient is δ times a term of the row."""
    assert lines(papers.attention("attention", papers.power)) == [
        "scale = 1 / SD",
        "delta = Σ_f dO[b,h,p,f] · O[b,h,p,f]",
        "acc = dO[b,h,p,f]",
        "weight = QK · 0.125 · (QK · 0.125) · scale",
        "dQK = Σ scale · (dW − delta) · QK · 0.03125",
    ]


@pytest.mark.parametrize("name", ["small_fill", "padding", "bias", "alibi"])
def test_a_large_score_keeps_the_bound_and_the_sum_apart(name: str) -> None:
    """Beside −10⁹ the logarithm of a sum is lost: a row that is masked everywhere would get weights of 1. So what may be large,
    fills and tensors, is not joined with it."""
    assert [str(s.load.attr) for s in backward(attentions.VARIANTS[name]().cascade).saved] == ["bound", "scale"]


def test_a_row_of_a_large_fill_in_float32() -> None:
    case = build(attentions.masked(attentions.PAD, -1e9), b=1, aux=(aux("pad", (attentions.N, attentions.T), "b1"),))
    given = case.inputs()
    given["pad"][:] = False
    made = gradient(case.cascade)
    assert isinstance(made, Cascade)
    d = cotangent(torch.Size(given["Q"].shape))
    exact = gradients(case.cascade, {n: t.double() if t.is_floating_point() else t for n, t in given.items()}, case.sizes, d)
    found = evaluate(made, {**given, "dO": d.float()}, case.sizes)
    torch.testing.assert_close(found["dV"].double(), exact["V"], rtol=1e-4, atol=1e-4)


def test_narrow_types_are_computed_in_a_wide_one() -> None:
    """What a model rounds in between, kernels do not: no narrow number stands in a term but where it is read."""
    found = backward(attentions.VARIANTS["causal"](dtype="bf16").cascade)
    terms = [found.acc, found.weight, *(g.term for g in found.scores), *(r.term for r in found.row), *(s.term for s in found.saved)]
    assert {e.op for t in terms for e in ex.walk(t) if e.dtype == "bf16"} == {"load"}
    of_case(attentions.VARIANTS["causal"](dtype="bf16"))


# --- what has no gradient ----------------------------------------------------------------------------------------------


def test_what_reaches_a_maximum_is_an_obstacle() -> None:
    assert "which key has a maximum's gradient" in refusal(strategies.attention(lambda s: s, ROWS["leveled"]).cascade)


def test_an_output_that_is_no_multiple_of_the_product_is_an_obstacle() -> None:
    case = build(lambda s: s, finish=lambda n: ex.unary("tanh", n))
    assert "no multiple of N" in refusal(case.cascade)


def test_an_operator_without_a_derivative_is_an_obstacle() -> None:
    case = build(lambda s: ex.binary("floordiv", s, 0.5), row="sigmoid")
    assert "floordiv has no derivative" in refusal(case.cascade)


def test_without_a_one_pass_form_there_is_none() -> None:
    assert "no one-pass form" in refusal(papers.attention("sparsemax", papers.sparsemax(2)))
    assert "no one-pass form" in refusal(variants.differential())


def test_what_is_no_attention_has_none() -> None:
    assert "no product of weights" in refusal(papers.cascade1())
