"""Derivatives of score terms: equal to autograd's through the oracle in float64, and printed as Triton by the printer of terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given

from reattend.codegen.triton.device_function import DeviceFunction, KernelNames, coordinates
from reattend.codegen.triton.streaming import Streaming, read
from reattend.patterns import expr as ex
from reattend.patterns.backward.derivative import derivative
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.verdict import Obstacle, Refusal

from .. import strategies
from ..strategies import INF, LOWEST, H, M, P, Program, attention, programs

CAUSAL = M <= P


def t5(s: Expr) -> Expr:
    """A bias by distance: exact up to 7 tokens, then by its logarithm."""
    far = ex.maximum(P - M, 1)
    log = ex.unary("log", ex.cast(far, "f32") / 8.0) * (8 / math.log(16))
    bucket = ex.where(far < 8, far, ex.minimum(ex.cast(log, "i64") + 8, 15))
    return ex.where(CAUSAL, s + ex.load("table", (bucket, H), "f32"), -INF)


def masked(keep: Expr, fill: float = -INF) -> Callable[[Expr], Expr]:
    return lambda s: ex.where(keep, s, fill)


def scored(piece: str) -> Callable[[Expr], Expr]:
    return lambda s: ex.where(CAUSAL, strategies.SCORES[piece](s), LOWEST)


# Score, row rule, and the derivative as it is printed, by the plain product, which the model scales by ¼.
VARIANTS: Mapping[str, tuple[Callable[[Expr], Expr], str, str]] = {
    "causal": (masked(CAUSAL), "softmax", "tl.where(m <= p, 1.0, 0.0) * 0.25"),
    "window": (masked(CAUSAL & (P - M < 9)), "softmax", "tl.where((m <= p) & (p - m < 9), 1.0, 0.0) * 0.25"),
    "alibi": (scored("slope"), "softmax", "tl.where(m <= p, 1.0, 0.0) * 0.25"),
    "soft-cap": (
        scored("cap"), "softmax", "t = tanh(qk * 0.25 / 5.0); tl.where(m <= p, 1.0, 0.0) * 5.0 * (1.0 - t * t) / 5.0 * 0.25",
    ),
    "padding": (
        masked(CAUSAL & strategies.MASKS["padding"], LOWEST), "softmax",
        "b_pad = tl.load(pad + m * pad_1); tl.where((m <= p) & b_pad, 1.0, 0.0) * 0.25",
    ),
    "documents": (
        masked(CAUSAL & strategies.MASKS["segments"]), "softmax",
        "b_group = tl.load(group + p * group_1); b_group_1 = tl.load(group + m * group_1); "
        "tl.where((m <= p) & (b_group == b_group_1), 1.0, 0.0) * 0.25",
    ),
    "sinks": (masked(CAUSAL), "sink", "tl.where(m <= p, 1.0, 0.0) * 0.25"),
    "t5": (t5, "softmax", "tl.where(m <= p, 1.0, 0.0) * 0.25"),
}


def variant(name: str) -> Program:
    score, row, _ = VARIANTS[name]
    return attention(score, strategies.ROWS[row], label=name)


def streaming(p: Program) -> Streaming:
    s = read(p.cascade)
    assert not isinstance(s, Refusal), s
    return s


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slopes:
    """The derivative as our term has it, and as autograd finds it."""

    ours: torch.Tensor
    autograd: torch.Tensor


def alone(s: Streaming, term: Expr, name: str) -> Cascade:
    """A cascade of one step: a term of the score over all its ranks, the products given as tensors."""
    c = s.cascade
    (made,) = [e for e in c.einsums if e.out.tensor == str(s.products[0].load.attr)]
    at = made.out.index
    product = c.tensor[made.out.tensor]
    read_here = [c.tensor[t] for t in dict.fromkeys(str(x.attr) for x in ex.loads(term))]
    ranks = tuple(Rank(str(i.attr), n) for i, n in zip(at, product.shape))
    tensors = (*read_here, Tensor(name, product.shape))
    return verify(Cascade(name, ranks, tensors, (Einsum(Access(name, at), term),), (name,)))


def slopes(s: Streaming, p: Program) -> Slopes:
    """∂ score / ∂ product at every query and key, products drawn at random."""
    product = s.products[0].load
    found = derivative(s.score, product)
    assert not isinstance(found, Obstacle)
    given = {n: t.double() if t.is_floating_point() else t for n, t in p.inputs(1).items()}
    shape = [int(n) for n in s.cascade.with_sizes(p.sizes).tensor[str(product.attr)].shape]
    x = (torch.randn(shape, dtype=torch.float64) * 8).requires_grad_()
    given[str(product.attr)] = x
    score = evaluate(alone(s, s.score, "S"), given, p.sizes, widen=True)["S"]
    # what is −∞ has no slope, and no part in the sum either
    (wanted,) = torch.autograd.grad(torch.where(score.isinf(), 0.0, score).sum(), x)
    ours = evaluate(alone(s, found, "D"), given, p.sizes, widen=True)["D"]
    return Slopes(torch.where(score.isinf(), 0.0, ours).detach(), wanted)


def same(found: Slopes) -> None:
    torch.testing.assert_close(found.ours.expand_as(found.autograd), found.autograd, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_of_a_variant(name: str) -> None:
    p = variant(name)
    found = slopes(streaming(p), p)
    same(found)
    assert found.ours.count_nonzero() > 0


@pytest.mark.parametrize("piece", strategies.SCORES)
def test_of_every_score(piece: str) -> None:
    p = attention(strategies.SCORES[piece], strategies.ROWS["softmax"])
    same(slopes(streaming(p), p))


@given(programs())
def test_of_drawn_scores(p: Program) -> None:
    s = read(p.cascade)
    assume(not isinstance(s, Refusal))
    assert not isinstance(s, Refusal)
    same(slopes(s, p))


# --- the text ---------------------------------------------------------------------------------------------------------


def printed(p: Program) -> str:
    """The derivative as the body of a device function: lines that name what is read or shared, then the result."""
    s = streaming(p)
    found = derivative(s.score, s.products[0].load)
    assert not isinstance(found, Obstacle)
    names = KernelNames(s)
    function = DeviceFunction(names, "slope", "state, x, at, m, inputs, sizes", (*coordinates(s), s.key), [found])
    for product in s.products:
        function.body.bind(product.load, names.products[product.load])
    result = function.body.real(found)
    return "; ".join([*(line.strip() for line in function.body.lines), result])


@pytest.mark.parametrize("name", VARIANTS)
def test_text_of_a_variant(name: str) -> None:
    assert printed(variant(name)) == VARIANTS[name][2]
