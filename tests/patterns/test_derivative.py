"""What a gradient of a term's result makes of its operands: autograd's, in float64, at drawn points and at every operator's edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import torch

from reattend.patterns import expr as ex
from reattend.patterns.backward.derivative import derivative, pullback
from reattend.patterns.backward.rules import RULES
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.operators import OPERATORS
from reattend.patterns.verdict import Obstacle

N = ex.index("n")
X, Y = ex.load("x", (N,), "f64"), ex.load("y", (N,), "f64")
INF, NAN = math.inf, math.nan
EDGES = (0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 20.0, 21.0, 800.0, -800.0, 1e300, INF, -INF, NAN)
Values = Mapping[str, torch.Tensor]


def valued(e: Expr, given: Values) -> torch.Tensor:
    """The term at every n."""
    size = len(next(iter(given.values())))
    tensors = tuple(Tensor(n, (size,), "f64") for n in dict.fromkeys(str(i.attr) for i in ex.loads(e)))
    if not tensors:
        e, tensors = ex.where(ex.equal(X, X), e, e + 0.0), (Tensor("x", (size,), "f64"),)
    c = Cascade("term", (Rank("n", size),), (*tensors, Tensor("z", (size,), "f64")), (Einsum(Access("z", (N,)), e),), ("z",))
    return evaluate(verify(c), {t.name: given[t.name] for t in tensors})["z"]


def drawn(size: int = 64) -> Values:
    g = torch.Generator().manual_seed(1)
    return {n: torch.randn(size, generator=g, dtype=torch.float64) * 2 for n in "xy"}


def edges(arity: int) -> Values:
    """Every edge, of two operands every pair of them."""
    pairs = list(itertools.product(EDGES, repeat=arity))
    return {n: torch.tensor([p[i] for p in pairs], dtype=torch.float64) for i, n in enumerate("xy"[:arity])}


def autograd(of: Callable[..., torch.Tensor], given: Values) -> list[torch.Tensor]:
    xs = [x.clone().requires_grad_() for x in given.values()]
    found = torch.autograd.grad(of(*xs).sum(), xs, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for d, x in zip(found, xs)]


def ours(e: Expr, given: Values) -> list[torch.Tensor]:
    found = pullback({e: ex.const(1.0, e.dtype)}, (X, Y))
    assert not isinstance(found, Obstacle)
    zero = torch.zeros(len(given["x"]), dtype=torch.float64)
    leaves = {"x": X, "y": Y}
    return [valued(found[leaves[n]], given) if leaves[n] in found else zero for n in given]


def same(e: Expr, of: Callable[..., torch.Tensor], given: Values) -> None:
    for mine, theirs in zip(ours(e, given), autograd(of, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-15, equal_nan=True)


REAL = tuple(o for o in OPERATORS.values() if o.result != "truth" and o.name not in ("not", "and", "or", "xor", "draw"))
SMOOTH = tuple(o.name for o in REAL if RULES.get(o.name))


@pytest.mark.parametrize("points", ["drawn", "edges"])
@pytest.mark.parametrize("name", SMOOTH)
def test_equals_autograd(name: str, points: str) -> None:
    o = OPERATORS[name]
    term = ex.unary(name, X) if o.arity == 1 else ex.binary(name, X, Y)
    given = edges(o.arity) if points == "edges" else dict(list(drawn().items())[: o.arity])
    same(term, o.in_torch(torch), given)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, -1.0, 2.5, 3.0])
def test_a_number_as_exponent(exponent: float) -> None:
    same(ex.binary("pow", X, exponent), lambda x: x**exponent, edges(1))


@pytest.mark.parametrize("number", [0.0, 1.0, -2.0])
def test_a_clamp_passes_all_at_its_border(number: float) -> None:
    same(ex.maximum(X, number), lambda x: x.clamp(min=number), edges(1))
    same(ex.minimum(X, number), lambda x: x.clamp(max=number), edges(1))
    same(ex.minimum(ex.maximum(X, -number), number), lambda x: x.clamp(min=-number, max=number), edges(1))


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_the_larger_of_two_halves_a_tie(number: float) -> None:
    """A number that comes first is one that torch.maximum is given; a clamp's comes second."""
    other = torch.full((len(EDGES),), number, dtype=torch.float64)
    same(ex.maximum(ex.const(number, "f64"), X), lambda x: torch.maximum(x, other), edges(1))
    same(ex.minimum(ex.const(number, "f64"), X), lambda x: torch.minimum(x, other), edges(1))


def test_a_selection_hides_what_it_does_not_select() -> None:
    """∞ · 0 behind a mask stays behind it, as it does for autograd."""
    keep = X > 0.0
    same(
        ex.where(keep, ex.unary("log", X) * Y, Y), lambda x, y: torch.where(x > 0.0, torch.log(x) * y, y),
        {"x": torch.tensor([2.0, 0.5]).double(), "y": torch.tensor([1.0, -1.0]).double()},
    )
    hidden = pullback({ex.where(X > 0.0, Y * 2.0, -INF): ex.load("d", (N,), "f64")}, (Y,))
    assert not isinstance(hidden, Obstacle)
    d = torch.tensor([NAN, NAN, 1.0], dtype=torch.float64)
    at = {"x": torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64), "d": d}
    assert str(valued(hidden[Y], at).tolist()) == "[0.0, nan, 2.0]"


def test_a_chain_of_casts() -> None:
    half = ex.cast(ex.cast(X, "f32") * 3.0, "f64") * Y
    found = pullback({half: ex.const(1.0, "f64")}, (X, Y))
    assert not isinstance(found, Obstacle)
    assert found[X].dtype == "f64"
    same(half, lambda x, y: (x.float() * 3.0).double() * y, {n: x.float().double() for n, x in drawn().items()})


@pytest.mark.parametrize("name", [o.name for o in REAL if RULES.get(o.name) == ()])
def test_a_staircase_passes_nothing_on(name: str) -> None:
    same(ex.unary(name, X) * X, lambda x: OPERATORS[name].in_torch(torch)(x) * x, {"x": drawn()["x"]})


def test_what_does_not_depend_has_none() -> None:
    assert derivative(Y * 2.0 + ex.cast(N, "f64"), X) is ex.const(0.0, "f64")
    assert derivative(ex.cast(X > 0.0, "f64") + ex.unary("floor", X), X) is ex.const(0.0, "f64")
    assert derivative(ex.load("table", (ex.cast(X, "i64"),), "f64"), X) is ex.const(0.0, "f64")


def test_every_operator_has_a_rule_or_torch_has_none() -> None:
    missing = {o.name for o in OPERATORS.values()} - set(RULES)
    assert missing == {"floordiv"}
    for name in missing:
        with pytest.raises(RuntimeError, match="not implemented"):
            autograd(OPERATORS[name].in_torch(torch), drawn())
        found = derivative(ex.binary(name, X, Y) * X, X)
        assert isinstance(found, Obstacle)
        assert name in found.reason
