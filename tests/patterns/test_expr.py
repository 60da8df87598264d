"""Terms: one object per term, folding and identities against torch, walks and substitution."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.evaluate import DTYPE, _Evaluation
from reattend.patterns.operators import OPERATORS

torch.set_num_threads(1)


def value(e: Any, tensors: Any = None, extent: Any = None, widen: Any = False) -> Any:
    """A term's value as a tensor over the ranks of `extent`, by the oracle."""
    extent = extent or {}
    return _Evaluation(list(extent), extent, {}, tensors or {}, widen, torch.device("cpu"))(e)


def same(a: Any, b: Any) -> Any:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# --- identity of objects ------------------------------------------------------------------------------------------


def test_equal_terms_are_one_object() -> None:
    a = ex.index("p") + ex.load("T", (ex.index("m"),), "i64")
    b = ex.index("p") + ex.load("T", (ex.index("m"),), "i64")
    assert a is b
    assert copy.deepcopy(a) is a
    assert pickle.loads(pickle.dumps(a)) is a


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (ex.const(0), ex.const(False)),
        (ex.const(0.0), ex.const(-0.0)),
        (ex.const(1, "i32"), ex.const(1, "i64")),
        (ex.const(1.0), ex.const(1)),
    ],
)
def test_different_literals_are_kept_apart(a: Any, b: Any) -> None:
    assert a is not b


def test_nan_is_one_literal() -> None:
    assert ex.const(math.nan) is ex.const(math.nan)


def test_ranks_of_a_term() -> None:
    e = ex.load("T", (ex.index("h") // 2, ex.index("m")), "f32") + ex.symbol("S")
    assert e.ranks == {"h", "m"}


def test_value_of_what_is_no_constant() -> None:
    with pytest.raises(TypeError, match="not a constant"):
        assert ex.index("p").value


# --- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", ex.DTYPES)
@pytest.mark.parametrize("b", ex.DTYPES)
def test_promotion_is_torchs(a: Any, b: Any) -> None:
    if {a, b} & {"b1"} and a != b and {a, b} & set(ex.INTEGERS):
        pass
    want = torch.promote_types(DTYPE[a], DTYPE[b])
    assert DTYPE[ex.promote(a, b)] == want


@pytest.mark.parametrize("op", ex.FLOAT_UNARY)
def test_float_functions_of_integers_are_floats(op: Any) -> None:
    assert ex.unary(op, ex.index("p")).dtype == "f32"


def test_python_scalar_takes_the_other_type() -> None:
    x = ex.load("T", (), "bf16")
    assert (x * 2).dtype == "bf16"
    assert (2.0 + x).dtype == "bf16"
    assert (ex.index("p") * 2.5).dtype == "f32"
    assert (ex.index("p") + 1).dtype == "i64"


# --- folding and identities ---------------------------------------------------------------------------------------

_floats = st.one_of(
    st.floats(-50, 50, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -3.4028234663852886e38]),
)
_ints = st.integers(-20, 20)
_FLOAT_BINARY = ("add", "sub", "mul", "div", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")
_INT_BINARY = (
    "add",
    "sub",
    "mul",
    "floordiv",
    "mod",
    "max",
    "min",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "xor",
)


def torch_value(op: Any, args: Any, dtype: Any) -> Any:
    """What torch computes from tensors that hold the arguments: nothing is folded on this way."""
    names = [f"x{i}" for i in range(len(args))]
    tensors = {n: torch.tensor(v, dtype=DTYPE[dtype]) for n, v in zip(names, args)}
    return value(ex.make(op, tuple(ex.load(n, (), dtype) for n in names)), tensors)


@given(st.sampled_from(_FLOAT_BINARY), _floats, _floats)
def test_folded_float_operations_are_torchs(op: Any, a: Any, b: Any) -> None:
    folded = ex.binary(op, ex.const(a, "f64"), ex.const(b, "f64"))
    want = torch_value(op, (a, b), "f64")
    assert same(value(folded, widen=True), want)


@given(st.sampled_from(_INT_BINARY), _ints, _ints)
def test_folded_integer_operations_are_torchs(op: Any, a: Any, b: Any) -> None:
    if op in ("floordiv", "mod") and b == 0:
        return
    assert same(value(ex.binary(op, ex.const(a), ex.const(b))), torch_value(op, (a, b), "i64"))


@given(st.sampled_from(("and", "or", "xor", "eq", "ne")), st.booleans(), st.booleans())
def test_folded_boolean_operations_are_torchs(op: Any, a: Any, b: Any) -> None:
    assert same(value(ex.binary(op, ex.const(a), ex.const(b))), torch_value(op, (a, b), "b1"))


@given(st.sampled_from([op for op in ex.UNARY if op != "not"]), _floats)
def test_folded_functions_are_torchs(op: Any, a: Any) -> None:
    folded = value(ex.unary(op, ex.const(a, "f64")), widen=True)
    want = torch_value(op, (a,), "f64")
    assert torch.allclose(folded.double(), want.double(), rtol=1e-12, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("op", [op for op in ex.UNARY if op != "not"])
@pytest.mark.parametrize("a", [1096.63, -1096.63, 0.0, -1.0, -2.0, math.inf, -math.inf, math.nan])
def test_functions_are_folded_where_python_has_no_value(op: str, a: float) -> None:
    """Beyond all numbers and outside of a function's domain: what is not folded would be printed, and raise in Python."""
    folded = ex.unary(op, ex.const(a, "f64"))
    assert folded.is_const
    assert torch.allclose(value(folded, widen=True).double(), torch_value(op, (a,), "f64").double(), equal_nan=True)


@given(
    st.sampled_from(("add", "sub", "mul", "div", "max", "min")),
    _floats,
    st.sampled_from([0.0, 1.0, -1.0]),
    st.booleans(),
)
def test_float_identities_hold_for_every_value(op: Any, x: Any, c: Any, left: Any) -> None:
    """x + 0, x · 1, x / 1, … keep NaN and infinity."""
    load, literal = ex.load("x0", (), "f64"), ex.const(c, "f64")
    e = ex.binary(op, literal, load) if left else ex.binary(op, load, literal)
    got = value(e, {"x0": torch.tensor(x, dtype=torch.float64)})
    assert same(got, torch_value(op, (c, x) if left else (x, c), "f64"))


@given(st.sampled_from(_INT_BINARY), _ints, st.sampled_from([0, 1, 2]), st.booleans(), st.booleans())
def test_integer_identities_hold_for_every_value(op: Any, x: Any, c: Any, left: Any, twice: Any) -> None:
    load, literal = ex.load("x0", (), "i64"), ex.const(c)
    a, b, va, vb = (load, load, x, x) if twice else (literal, load, c, x) if left else (load, literal, x, c)
    if op in ("floordiv", "mod") and vb == 0:
        return
    got = value(ex.binary(op, a, b), {"x0": torch.tensor(x)})
    assert same(got, torch_value(op, (va, vb), "i64"))


def test_zero_times_a_float_is_kept() -> None:
    x = ex.load("x", (), "f32")
    assert (x * 0.0).op == "mul"
    assert (x - x).op == "sub"


def test_identities_keep_the_type() -> None:
    x = ex.load("x", (), "bf16")
    assert (x + ex.const(0.0, "f32")).dtype == "f32"
    assert (x + ex.const(0.0, "f32")) is not x
    assert x + 0.0 is x
    assert ex.unary("not", ex.unary("not", x > 0.0)) is (x > 0.0)


def test_narrow_literals_are_not_folded() -> None:
    """Folding in float64 would skip the rounding that bf16 arithmetic has."""
    assert (ex.const(0.1, "bf16") + ex.const(0.2, "bf16")).op == "add"
    assert ex.cast(ex.const(0.1), "bf16").op == "cast"
    assert ex.cast(ex.const(1.0), "bf16").op == "const"


@given(_ints, _ints)
def test_constant_division_floors(a: Any, b: Any) -> None:
    if b:
        assert (ex.const(a) // ex.const(b)).value == a // b
        assert (ex.const(a) % ex.const(b)).value == a % b
        assert (ex.const(a) // ex.const(b)).value == int(torch.floor_divide(torch.tensor(a), torch.tensor(b)))


def test_division_by_the_literal_zero_stays() -> None:
    assert (ex.const(1) // ex.const(0)).op == "floordiv"
    assert ex.binary("div", ex.const(1.0), ex.const(0.0)).value == math.inf
    assert ex.binary("div", ex.const(-1.0), ex.const(0.0)).value == -math.inf


def test_where() -> None:
    x, y, c = ex.load("x", (), "f32"), ex.load("y", (), "f64"), ex.load("c", (), "b1")
    assert ex.where(ex.TRUE, x, y).dtype == "f64"
    assert ex.where(ex.FALSE, x, y) is y
    assert ex.where(c, x, x) is x
    assert ex.where(c, ex.TRUE, ex.FALSE) is c
    assert ex.where(c, x, 0).args[2].dtype == "f32"


# --- walks --------------------------------------------------------------------------------------------------------


def test_walk_visits_shared_terms_once_and_arguments_first() -> None:
    x = ex.load("x", (ex.index("m"),), "f32")
    e = ex.exp(x) * ex.exp(x) + x
    order = list(ex.walk(e))
    assert len(order) == len(set(order))
    assert all(order.index(a) < order.index(t) for t in order for a in t.args)
    assert order[-1] is e


def test_deep_terms_do_not_recurse_in_walks() -> None:
    e = ex.load("x", (), "f32")
    for i in range(5000):
        e = ex.unary("tanh", e) if i % 2 else ex.exp(e)
    assert sum(1 for _ in ex.walk(e)) == 5001
    assert ex.rebuild(e, lambda t, args: None) is e
    assert ex.substitute(e, {ex.load("x", (), "f32"): ex.load("y", (), "f32")}) is not e


def test_substitution_is_simultaneous_and_outermost_first() -> None:
    p, m = ex.index("p"), ex.index("m")
    e = ex.load("T", (p, m), "f32")
    assert ex.substitute(e, {p: m, m: p}) is ex.load("T", (m, p), "f32")
    assert ex.substitute(e + 1.0, {e: ex.const(2.0), p: m}) is ex.const(3.0)


def test_rebuild_runs_the_smart_constructors() -> None:
    e = ex.load("x", (), "f32") * ex.load("k", (), "f32")
    out = ex.rebuild(e, lambda t, args: ex.const(1.0) if t.op == "load" and t.attr == "k" else None)
    assert out is ex.load("x", (), "f32")


@pytest.mark.parametrize("op", [*OPERATORS, "where", "cast"])
def test_make_knows_every_operator(op: Any) -> None:
    x, c = ex.load("x", (), "f32"), ex.load("c", (), "b1")
    b = ex.load("n", (), "i64") if op in ("and", "or", "xor", "not", "mod", "floordiv") else x
    args = (c, x, x * 2) if op == "where" else (b,) if op in (*ex.UNARY, "cast") else (b, b + 1)
    e = ex.make(op, args, None, "f64")
    assert e.op == op
    assert ex.make(e.op, e.args, e.attr, e.dtype) is e


def test_make_refuses_unknown_operators() -> None:
    with pytest.raises(ValueError, match="unknown operator"):
        ex.make("frobnicate", (ex.const(1),))


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("e", "text"),
    [
        (ex.index("p") - (ex.index("m") - 1), "p − (m − 1)"),
        ((ex.index("p") + 1) * 2, "(p + 1) · 2"),
        (ex.load("K", (ex.index("h") // 2, ex.index("m")), "f32"), "K[h // 2,m]"),
        ((ex.index("m") <= ex.index("p")) & (ex.index("p") > 3), "m ≤ p ∧ p > 3"),
        (~(ex.index("m") <= ex.index("p")), "¬(m ≤ p)"),
        (ex.where(ex.index("m") <= 3, ex.load("x", (), "f32"), -math.inf), "where(m ≤ 3, x, −∞)"),
        (ex.cast(ex.load("x", (), "f32"), "bf16"), "bf16(x)"),
        (-(ex.load("x", (), "f32") + 1.0), "−(x + 1)"),
    ],
)
def test_notation(e: Any, text: Any) -> None:
    assert str(e) == text


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_what_a_where_selects_is_stored_in_its_type(dtype: str) -> None:
    torch_type = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    x, cond = ex.load("x", (), dtype), ex.index("m") > 3
    values = [0.0, 1.0, 0.1, -1e9, 1e5, 65519.9, 65520.0, -3.4028234663852886e38, 3.39e38, 1e-8, 6e-8, 1e-40, 1e39,
              math.inf, -math.inf, math.nan, 1.00390625, 1.01171875, 1.0 + 2.0**-8 + 2.0**-30]
    for v in values:
        got = ex.where(cond, x, ex.cast(ex.const(v), dtype)).args[2]
        want = torch.tensor(v, dtype=torch.float64).to(torch_type).item()
        assert got.is_const
        assert got.dtype == dtype
        assert repr(got.value) == repr(want), v


def test_literals_that_a_type_has_are_folded() -> None:
    assert ex.cast(ex.const(0.25), "bf16").is_const
    assert ex.cast(ex.const(-3.3895313892515355e38), "bf16").is_const
    # multiplied with a tensor of 16 bits, it is 0.3 in float32
    assert ex.cast(ex.const(0.3), "bf16").op == "cast"
