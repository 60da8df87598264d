"""Every operator is complete everywhere, and what the table says of it is so: torch is asked, on numbers of all kinds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import sympy
import torch

from reattend.codegen.files.library import functions
from reattend.codegen.text import print_cpp, print_torch, print_triton
from reattend.cost_model.calibration.calibrate import CURVES
from reattend.cost_model.operations import Work, term_operations
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import DTYPE, _Evaluation
from reattend.patterns.expr import Expr
from reattend.patterns.operators import OPERATORS, Operator, facts, logarithm
from reattend.patterns.terms.constant import number
from reattend.patterns.terms.intervals import spans
from reattend.rewriter.lift.rules import RULES
from tests.tiers import few

INF, NAN = math.inf, math.nan
NUMBERS = (
    -INF, -3.4028234663852886e38, -1e4, -20.5, -3.0, -2.5, -1.0, -0.75, -0.0009765625, 0.0, 7.888609052210118e-31, 0.125, 0.5, 1.0, 1.5, 2.5, 7.0,
    19.875, 20.0, 20.125, 88.0, 700.0, 1e6, 3.4028234663852886e38, INF, NAN,
)
MODEST = tuple(x for x in NUMBERS if abs(x) <= 50)
WHOLE = (-9, -4, -1, 0, 1, 2, 3, 7, 12)
TRUTHS = (False, True)
LOGIC = ("not", "and", "or", "xor")
# What turns the bits of integers, and has no meaning on other numbers.
WHOLE_ALONE = ("draw",)
X = torch.tensor([0.25, 1.5, 3.0])


def operators(keep: Callable[[Operator], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("o", [o for o in OPERATORS.values() if keep(o)], ids=lambda o: o.name)


EVERY = operators(lambda o: True)
REAL = operators(lambda o: o.name not in WHOLE_ALONE)


def term(o: Operator, dtype: str) -> Expr:
    """The operator on operands of which nothing is known."""
    return ex.make(o.name, tuple(ex.load(n, (), dtype) for n in "xy"[: o.arity]))


def by_torch(o: Operator, operands: Sequence[Any], dtype: str) -> Any:
    tensors = {n: torch.tensor(v, dtype=DTYPE[dtype]) for n, v in zip("xy", operands)}
    return _Evaluation([], {}, {}, tensors, False, torch.device("cpu"))(term(o, dtype)).item()


def samples(o: Operator, dtype: str) -> list[tuple[Any, ...]]:
    values: Sequence[Any] = TRUTHS if dtype == "b1" else WHOLE if dtype in ex.INTEGERS else NUMBERS
    found = list(itertools.product(values, repeat=o.arity))
    # what an integer is divided by is no 0
    if dtype in ex.INTEGERS and o.name in ("floordiv", "mod"):
        return [v for v in found if v[1] != 0]
    # an integer is raised to no negative power, and a root of −∞ is NaN or ∞ by the way in which it is asked for
    if o.name == "pow":
        return [v for v in found if (v[1] >= 0 if dtype in ex.INTEGERS else v[0] != -INF)]
    return found


def kinds(o: Operator) -> tuple[str, ...]:
    """Types of operands that the operator is for."""
    if o.name in WHOLE_ALONE:
        return ("i64",)
    return ("b1",) if o.name in LOGIC else ("f64",) if o.result == "float" else ("f64", "i64")


def same(a: Any, b: Any) -> bool:
    return bool(np.isclose(float(a), float(b), rtol=1e-12, atol=1e-300, equal_nan=True))


# --- one meaning, in three libraries ----------------------------------------------------------------------------


@EVERY
def test_folds_are_torchs(o: Operator) -> None:
    folded = 0
    for dtype in kinds(o):
        for values in samples(o, dtype):
            made = ex.make(o.name, tuple(ex.const(v, dtype) for v in values))
            if made.is_const:
                folded += 1
                assert same(made.value, by_torch(o, values, dtype)), (made, values)
            else:
                # Python raises there, or its power is complex
                assert o.name == "pow" or (o.name in ("floordiv", "mod") and values[1] == 0), values
    assert folded > 1


@EVERY
def test_numpy_is_torchs(o: Operator) -> None:
    for dtype in kinds(o):
        for values in samples(o, dtype):
            found = number(term(o, dtype), dict(zip("xy", (np.asarray(v) for v in values))))
            assert same(found, by_torch(o, values, dtype)), values


@operators(lambda o: o.algebra is not None)
def test_algebra_is_torchs(o: Operator) -> None:
    function = o.in_algebra(sympy)
    assert function is not None
    for values in itertools.product([x for x in MODEST if 0.1 < x < 19], repeat=o.arity):
        assert same(function(*(sympy.Float(v, 40) for v in values)), by_torch(o, values, "f64")), values


# --- what is claimed --------------------------------------------------------------------------------------------


@operators(lambda o: o.name not in LOGIC)
@pytest.mark.parametrize("dtype", few(["f32", "f64", "i64"], "f32", "i64"))
def test_spans_hold_every_value(o: Operator, dtype: str) -> None:
    if o.name in WHOLE_ALONE and dtype != "i64":
        return
    values = WHOLE if dtype == "i64" else tuple(x for x in NUMBERS if x == x)
    boxes = list(itertools.combinations_with_replacement(values, 2))
    if o.arity == 2:
        boxes = boxes[:: 3 if dtype == "i64" else 17]
    e, known = term(o, dtype), [v for v in samples(o, dtype) if all(x == x for x in v)]
    results = {v: by_torch(o, v, dtype) for v in known}
    for at in itertools.product(boxes, repeat=o.arity):
        ends = {n: (np.float64(lo), np.float64(hi)) for n, (lo, hi) in zip("xy", at)}
        low, high = spans(e, {}, of_load=lambda name, _, ends=ends: ends[name])  # type: ignore[misc]
        inside = [r for v, r in results.items() if all(lo <= x <= hi for x, (lo, hi) in zip(v, at))]
        if o.result == "truth":
            assert all(inside) or not low, (at, low)
            assert high or not any(inside), (at, high)
        elif any(r != r for r in inside):
            assert low != low or high != high, (at, low, high)
        else:
            assert all(not r < low and not r > high for r in inside), (at, low, high)


@operators(lambda o: o.arity == 1 and o.result != "truth" and o.name != "not")
def test_spans_say_the_same_in_torch(o: Operator) -> None:
    """What is unknown stays unknown there, and ends are the same but for a library's last places."""
    for lo, hi in [*itertools.combinations_with_replacement([x for x in NUMBERS if x == x], 2), (NAN, NAN)]:
        of_numpy, of_torch = (
            spans(term(o, "f64"), {}, of_load=lambda *_, at=at: at, xp=lib)
            for at, lib in (
                ((np.float64(lo), np.float64(hi)), np),
                (tuple(torch.tensor(x, dtype=torch.float64) for x in (lo, hi)), torch),
            )
        )
        for a, b in zip(of_numpy, of_torch):
            assert np.isclose(float(a), float(b), rtol=1e-12, atol=1e-300, equal_nan=True), (lo, hi, of_numpy, of_torch)


@operators(lambda o: o.arity == 1)
def test_ranges_and_signs(o: Operator) -> None:
    found = [by_torch(o, (x,), "f64") for x in NUMBERS if o.name not in LOGIC]
    assert all(o.range[0] <= y <= o.range[1] for y in found if y == y)
    if o.positive:
        assert all(by_torch(o, (x,), "f64") > 0 for x in MODEST)


@operators(lambda o: any(math.isfinite(x) for x in o.range) and o.name not in WHOLE_ALONE)
def test_ends_of_a_range_are_reached(o: Operator) -> None:
    """Where it is open or irrational, its end is the value at infinity, or comes as near as one likes."""
    values = (by_torch(o, (x,), "f64") for x in (*np.linspace(-30.0, 30.0, 4001), *NUMBERS))
    found = [y for y in values if y == y]
    assert min(found) == pytest.approx(o.range[0], abs=1e-4)
    assert max(found) == pytest.approx(o.range[1], abs=1e-4)


@operators(lambda o: o.monotone != 0)
def test_monotone(o: Operator) -> None:
    ordered = sorted(x for x in NUMBERS if x == x)
    for other in MODEST if o.arity == 2 else (0.0,):
        found = [by_torch(o, (x, other), "f64") for x in ordered]
        kept = [y for y in found if y == y]
        # the domain is an interval: there is no hole in it
        assert [y == y for y in found] == sorted([y == y for y in found]) or not any(y != y for y in found)
        assert kept == sorted(kept, reverse=o.monotone < 0)
        assert len(set(kept)) > 1


@operators(lambda o: o.arity == 1 and o.result == "float")
def test_poles(o: Operator) -> None:
    assert o.pole == any(math.isinf(by_torch(o, (x,), "f64")) for x in MODEST)


@operators(lambda o: o.exact)
def test_exact_results_need_no_rounding(o: Operator) -> None:
    for values in samples(o, "f32"):
        assert same(by_torch(o, values, "f32"), by_torch(o, [float(np.float32(v)) for v in values], "f64"))


@operators(lambda o: o.name not in (*LOGIC, *WHOLE_ALONE) and o.result == "same")
def test_rounding_before_or_after(o: Operator) -> None:
    def half(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).half())

    rounded = [0.1, 0.9999, 1.4999, 2.5001, -0.30001, 1e5, *NUMBERS]
    equal = [
        same(half(by_torch(o, v, "f64")), half(by_torch(o, [half(x) for x in v], "f64")))
        for v in itertools.product(rounded, repeat=o.arity)
    ]
    assert not o.narrow or all(equal)


def straight(o: Operator, x: float, y: float) -> bool:
    """f(x + y, z) + f(0, z) = f(x, z) + f(y, z) for some z: the operator follows its first operand along a line."""

    def f(v: float, z: float) -> float:
        return float(by_torch(o, (v, z)[: o.arity], "f64"))

    return all(math.isclose(f(x + y, z) + f(0.0, z), f(x, z) + f(y, z), abs_tol=1e-12) for z in (0.75, -2.5))


@operators(lambda o: o.name not in (*LOGIC, *WHOLE_ALONE) and o.result != "truth")
def test_what_is_curved_follows_no_line(o: Operator) -> None:
    """A row rule begins at it, and SDPA's kernel does not reach past it: an operator that is left out is taken for a line."""
    pairs = itertools.product([0.25, 0.6, 1.5, 3.0, -0.4, -2.0], repeat=2)
    assert o.curved == (not all(straight(o, x, y) for x, y in pairs))


@EVERY
def test_what_is_steep_passes_all_bounds(o: Operator) -> None:
    assert o.steep == (o.arity == 1 and o.result == "float" and math.isinf(by_torch(o, (1e4,), "f32")))


@operators(lambda o: o.law == "exponential")
def test_every_exponential_has_its_logarithm(o: Operator) -> None:
    assert same(by_torch(OPERATORS[logarithm(o.name)], (by_torch(o, (1.5,), "f64"),), "f64"), 1.5)


@operators(lambda o: o.law != "")
def test_laws(o: Operator) -> None:
    def f(x: float) -> float:
        return float(by_torch(o, (x,), "f64"))

    for x, y in itertools.product([0.25, 0.5, 1.5, 3.0], repeat=2):
        match o.law:
            case "exponential":
                holds = same(f(x + y), f(x) * f(y)) and same(f(1.0), o.of)
            case "logarithm":
                holds = math.isclose(f(x * y), f(x) + f(y), abs_tol=1e-12) and same(f(o.of), 1.0)
            case "power":
                holds = same(f(x * y), f(x) * f(y)) and same(f(x), x**o.of)
            case "affine":
                holds = straight(o, x, y)
            case _:
                holds = all(same(f(y * s), y * f(s)) for s in (x, -x))
        assert holds, (x, y)


# --- everywhere -------------------------------------------------------------------------------------------------


def test_every_language_spells_every_operator() -> None:
    for printer in (print_torch, print_triton, print_cpp):
        assert set(printer.SPELLINGS) == set(OPERATORS), printer.__name__


def test_every_function_that_triton_lacks_is_in_the_skeleton() -> None:
    assert print_triton.HELPERS <= set(functions("scalar"))


@EVERY
def test_work_is_counted(o: Operator) -> None:
    dtype = "b1" if o.name in LOGIC else "f32"
    e = ex.make(o.name, tuple(ex.load(n, (ex.index("m"),), dtype) for n in "xy"[: o.arity]))
    ops = term_operations(e, {"m": 5})
    assert ops == {o.name: 5}
    work = Work({}, ops)
    assert (work.exps, work.divisions, work.maxima) == tuple(
        5 * n for n in (o.effort.calls, o.effort.unit == "division", o.effort.unit == "maximum")
    )
    assert (o.effort.calls > 0) == (o.effort.unit == "special")
    assert o.effort.exps > 0
    assert (o.effort.slots == 1) or o.effort.unit == "lane"


@EVERY
def test_no_function_is_priced_as_a_lane_s_operator(o: Operator) -> None:
    """What makes floats of anything runs on a unit of its own or takes many steps; truths only choose."""
    assert not (o.result == "float" and o.effort.unit == "lane")
    assert (o.effort.unit == "mask") == (o.result == "truth" or o.name in LOGIC)


def test_the_price_of_an_operator_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match="effort"):
        Operator("new", abs)  # type: ignore[call-arg]


@operators(lambda o: o.effort.unit == "special" and o.arity == 1)
def test_every_function_is_timed(o: Operator) -> None:
    assert o.name == "exp" or o.name in CURVES
    assert torch.equal(getattr(torch.ops.aten, o.aten).out(X, out=torch.empty_like(X)), o.in_torch(torch)(X))


@REAL
def test_graphs_are_lifted(o: Operator) -> None:
    assert o.aten in RULES
    assert hasattr(torch.ops.aten, o.aten)


@EVERY
def test_terms_are_shown(o: Operator) -> None:
    text = str(term(o, "b1" if o.name in LOGIC else "f32"))
    assert o.sign in text if o.sign else text.startswith((o.name, "−", "¬"))


def test_numbers_that_look_random() -> None:
    """Each bit is as often 1 as 0, of neighbours under one key and of one counter under neighbouring keys, and no bit of
    the operands shows in it."""
    (draw,) = (o for o in OPERATORS.values() if o.name == "draw")
    n = 1 << 15
    count = torch.arange(n)
    for a, b in ((torch.tensor(7), count), (count, torch.tensor(7)), (count, count)):
        x = draw.in_torch(torch)(a, b)
        assert int(x.min()) >= 0
        assert int(x.max()) < 2**31
        assert len(set(x.tolist())) > n - 40
        bits = (x[:, None] >> torch.arange(31)) & 1
        assert float((bits.double().mean(0) - 0.5).abs().max()) < 5 * 0.5 / n**0.5
        given = (count[:, None] >> torch.arange(15)) & 1
        same_bit = (bits[:, :, None] == given[:, None]).double().mean(0)
        assert float((same_bit - 0.5).abs().max()) < 6 * 0.5 / n**0.5


def test_of_leaves_nothing_is_known() -> None:
    for op in ("load", "const", "index", "symbol", "where", "cast"):
        o = facts(op)
        assert o.range == (-INF, INF)
        assert not any((o.pole, o.positive, o.monotone, o.law, o.sign, o.algebra))
