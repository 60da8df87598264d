"""Derivatives of score terms: equal to autograd's through the oracle in float64, and printed as Triton by the printer of terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given

from reattend.codegen.triton.device_function import DeviceFunction, KernelNames, coordinates
from reattend.codegen.triton.streaming import Streaming, read
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.operators import OPERATORS
from reattend.patterns.terms.constant import number
from reattend.patterns.verdict import Refusal

from .. import strategies
from ..strategies import INF, LOWEST, H, M, P, Program, attention, programs
from .derivative import RULES, STAIRCASES, derivative

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
    "causal": (masked(CAUSAL), "softmax", "tl.where(m <= p, 0.25, 0.0)"),
    "window": (masked(CAUSAL & (P - M < 9)), "softmax", "tl.where((m <= p) & (p - m < 9), 0.25, 0.0)"),
    "alibi": (scored("slope"), "softmax", "tl.where(m <= p, 0.25, 0.0)"),
    "soft-cap": (
        scored("cap"), "softmax", "t = tanh(qk * 0.25 / 5.0); tl.where(m <= p, 0.05 * (1.0 - t * t) * 5.0, 0.0)",
    ),
    "padding": (
        masked(CAUSAL & strategies.MASKS["padding"], LOWEST), "softmax",
        "b_pad = tl.load(pad + m * pad_1); tl.where((m <= p) & b_pad, 0.25, 0.0)",
    ),
    "documents": (
        masked(CAUSAL & strategies.MASKS["segments"]), "softmax",
        "b_group = tl.load(group + p * group_1); b_group_1 = tl.load(group + m * group_1); "
        "tl.where((m <= p) & (b_group == b_group_1), 0.25, 0.0)",
    ),
    "sinks": (masked(CAUSAL), "sink", "tl.where(m <= p, 0.25, 0.0)"),
    "t5": (t5, "softmax", "tl.where(m <= p, 0.25, 0.0)"),
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
    assert found is not None
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


# --- the rules --------------------------------------------------------------------------------------------------------

N = ex.index("n")
X, Y = ex.load("x", (N,), "f32"), ex.load("y", (N,), "f32")
# What an operator may be asked about: all numbers, those above 0, those between 0 and 1.
DOMAINS = (X, ex.unary("abs", X) + 0.5, ex.unary("sigmoid", X))


def defined(of: Callable[[Expr], Expr]) -> Expr:
    """The operator on the widest domain where it has values."""
    loads = {"x": np.linspace(-4.0, 4.0, 33), "y": np.linspace(-1.5, 2.0, 33)}
    return next(of(x) for x in DOMAINS if not np.isnan(number(of(x), loads)).any())


def cases() -> Mapping[str, Expr]:
    """Every operator that makes numbers of numbers, where it has values, of arguments that both vary."""
    x, y = X, X * Y + 0.3
    unary = {op: defined(lambda x, op=op: ex.unary(op, x)) for op in RULES if op in ex.UNARY}  # type: ignore[misc]
    binary = {op: defined(lambda x, op=op: ex.binary(op, x, y)) for op in RULES if op in ex.BINARY}  # type: ignore[misc]
    stairs = {op: ex.make(op, (x, y)[: 1 if op in ex.UNARY else 2]) * x for op in STAIRCASES}
    return {**unary, **binary, **stairs, "where": ex.where(y > 0.0, x * x, y), "cast": ex.cast(x * x, "f64")}


def test_every_operator_has_a_rule() -> None:
    whole = {"not", "isnan", "isinf", "and", "or", "xor", *ex.COMPARISONS}
    assert {*RULES, *STAIRCASES} == {*OPERATORS, "where", "cast"} - whole
    assert set(cases()) == {*RULES, *STAIRCASES}


def valued(e: Expr, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The term at every n, in float64."""
    size = len(given["x"])
    tensors = tuple(Tensor(str(i.attr), (size,)) for i in ex.loads(e))
    c = Cascade("term", (Rank("n", size),), (*tensors, Tensor("z", (size,))), (Einsum(Access("z", (N,)), e),), ("z",))
    return evaluate(verify(c), given, widen=True)["z"]


@pytest.mark.parametrize("op", cases())
def test_of_an_operator(op: str) -> None:
    """Against central differences."""
    term, step = cases()[op], 1e-6
    found = derivative(term, X)
    assert found is not None
    x, y = (torch.randn(64, dtype=torch.float64) * n for n in (2, 1))
    above, below = (valued(term, {"x": x + d, "y": y}) for d in (step, -step))
    torch.testing.assert_close(valued(found, {"x": x, "y": y}), (above - below) / (2 * step), rtol=1e-5, atol=1e-6)


def test_what_does_not_depend_has_none() -> None:
    assert derivative(Y * 2.0 + ex.cast(N, "f32"), X) is None
    assert derivative(ex.cast(X > 0.0, "f32") + ex.unary("floor", X), X) is None
    assert derivative(ex.load("table", (ex.cast(X, "i64"),), "f32"), X) is None


# --- the text ---------------------------------------------------------------------------------------------------------


def printed(p: Program) -> str:
    """The derivative as the body of a device function: lines that name what is read or shared, then the result."""
    s = streaming(p)
    found = derivative(s.score, s.products[0].load)
    assert found is not None
    names = KernelNames(s)
    function = DeviceFunction(names, "slope", "state, x, at, m, inputs, sizes", (*coordinates(s), s.key), [found])
    for product in s.products:
        function.body.bind(product.load, names.products[product.load])
    result = function.body.real(found)
    return "; ".join([*(line.strip() for line in function.body.lines), result])


@pytest.mark.parametrize("name", VARIANTS)
def test_text_of_a_variant(name: str) -> None:
    assert printed(variant(name)) == VARIANTS[name][2]
