"""The backward of an attention: its cascade, evaluated in float64, is what autograd finds in the forward's."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.backward.adjoint import Adjoint, adjoint
from reattend.patterns.backward.gradient import gradient
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.verdict import Obstacle

from ..codegen import attentions

Values = Mapping[str, torch.Tensor]


def backward(c: Cascade) -> Adjoint:
    a = attention(c)
    assert isinstance(a, Attention), a
    found = adjoint(a)
    assert isinstance(found, Adjoint), found
    return found


def equals_autograd(c: Cascade, given: Values, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Compare every float input's gradient, for a random gradient of the output; NaN must stand where autograd has it."""
    made = gradient(c)
    assert isinstance(made, Cascade), made
    xs = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in given.items()}
    out = evaluate(c, xs, sizes, widen=True)[c.outputs[0]]
    d = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    leaves = [n for n, t in xs.items() if t.requires_grad]
    wanted = dict(zip(leaves, torch.autograd.grad(out, [xs[n] for n in leaves], d, allow_unused=True)))
    known = {**{n: t.detach() for n, t in xs.items()}, str(backward(c).dout.attr): d}
    found = {n.rstrip("_")[1:]: t for n, t in evaluate(made, known, sizes, widen=True).items()}
    assert set(found) <= set(leaves)
    for n, w in wanted.items():
        w = torch.zeros_like(xs[n]) if w is None else w
        torch.testing.assert_close(found.get(n, torch.zeros_like(w)), w, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, n=n: f"{n}: {m}")
    return found


def text(c: Cascade) -> str:
    return str(backward(c)).replace("[b,h,p]", "").replace("[b,h,p,m]", "")


@pytest.mark.parametrize("name", attentions.VARIANTS)
def test_of_a_variant(name: str) -> None:
    case = attentions.VARIANTS[name]()
    assert set(equals_autograd(case.cascade, case.inputs(), case.sizes)) >= {"Q", "K", "V"}


@pytest.mark.parametrize("make", [attentions.windows, attentions.no_batch])
def test_of_other_ranks(make: object) -> None:
    assert callable(make)
    case = make()
    equals_autograd(case.cascade, case.inputs(), case.sizes)


def test_softmax_comes_out_as_the_textbook_has_it() -> None:
    """One saved number a row, δ = Σ_f dO·O, and no pass over the keys before the one that makes the gradients."""
    case = attentions.VARIANTS["plain"]()
    assert text(case.cascade).splitlines() == [
        "lse = GM + log(SD)",
        "delta = Σ_f dO[b,h,p,f] · O[b,h,p,f]",
        "acc = dO[b,h,p,f]",
        "weight = exp(QK · 0.25 − lse)",
        "dQK = Σ exp(QK · 0.25 − lse) · (dW − delta) · 0.25",
    ]
    assert backward(case.cascade).passes == ()


def test_a_large_fill_keeps_the_bound_and_the_sum_apart() -> None:
    """Beside a fill of −10⁹ the logarithm of a sum is lost: a row that is masked everywhere would get weights of 1."""
    case = attentions.VARIANTS["small_fill"]()
    assert [str(s.load.attr) for s in backward(case.cascade).saved] == ["bound", "scale"]


def test_what_reaches_a_maximum_is_an_obstacle() -> None:
    from ..strategies import ROWS, attention as drawn

    a = attention(drawn(lambda s: s, ROWS["leveled"]).cascade)
    assert isinstance(a, Attention)
    found = adjoint(a)
    assert isinstance(found, Obstacle)
    assert "which key has a maximum's gradient" in found.reason
