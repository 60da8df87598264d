"""The oracle itself, against plain torch: reductions, gathers, index maps, types, carried state, what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.evaluate import DTYPE, DTYPE_NAME, evaluate, infer_sizes
from reattend.patterns.library import papers
from reattend.patterns.library.papers import Builder, size

torch.set_num_threads(1)
P, M = ex.index("p"), ex.index("m")


def one(
    body: Any,
    tensors: Any,
    ranks: Any = "pm",
    op: Any = None,
    over: Any = "",
    sizes: Any = None,
    widen: Any = False,
    dtypes: Any = None,
) -> Any:
    """Evaluate one Einsum over inputs that lie over the ranks named in `tensors`."""
    b = Builder(dict(sizes or {}))
    for name, (at, _) in tensors.items():
        b.input(name, at, (dtypes or {}).get(name, "f32"))
    b.put("Z", ranks, body, op, over)
    c = b.cascade("one", "Z")
    known = {"P": 4, "M": 6, "K": 5} if not sizes else {}
    return evaluate(
        c, {n: t for n, (_, t) in tensors.items()}, {s: known[s] for s in c.free_symbols if s in known}, widen=widen
    )["Z"]


A = torch.arange(24.0).reshape(4, 6) - 7.0
LOAD = ex.load("A", (P, M), "f32")


@pytest.mark.parametrize(
    ("op", "want"),
    [
        ("add", A.sum(1)), ("max", A.amax(1)), ("min", A.amin(1)), ("mul", A.prod(1)),
    ],
)
def test_reductions(op: Any, want: Any) -> None:
    assert torch.equal(one(LOAD, {"A": ("pm", A)}, "p", op, "m"), want)


@pytest.mark.parametrize(("op", "want"), [("or", (A > 0).any(1)), ("and", (A > 0).all(1))])
def test_boolean_reductions(op: Any, want: Any) -> None:
    out = one(LOAD > 0.0, {"A": ("pm", A)}, "p", op, "m")
    assert out.dtype is torch.bool
    assert torch.equal(out, want)


@pytest.mark.parametrize("op", ["add", "max", "min", "mul"])
def test_reduction_over_two_ranks_and_over_none_of_the_body(op: Any) -> None:
    functions: dict[str, Any] = {"add": torch.sum, "max": torch.amax, "min": torch.amin, "mul": torch.prod}
    assert torch.equal(one(LOAD, {"A": ("pm", A)}, "", op, "pm"), functions[op](A))
    row = torch.tensor([1.0, 2.0, -1.0, 0.5])
    out = one(ex.load("R", (P,), "f32"), {"R": ("p", row)}, "p", op, "m", sizes={"p": 4, "m": 3})
    assert torch.equal(out, {"add": row * 3, "max": row, "min": row, "mul": row**3}[op])


@pytest.mark.parametrize(("op", "want"), [("add", 0.0), ("max", -float("inf")), ("min", float("inf")), ("mul", 1.0)])
def test_a_reduction_over_nothing_is_its_identity(op: Any, want: Any) -> None:
    out = one(LOAD, {"A": ("pm", torch.empty(4, 0))}, "p", op, "m", sizes={"p": 4, "m": 0})
    assert torch.equal(out, torch.full((4,), want))


def test_maximum_keeps_nan() -> None:
    a = A.clone()
    a[1, 2] = float("nan")
    assert one(LOAD, {"A": ("pm", a)}, "p", "max", "m").isnan().tolist() == [False, True, False, False]


def test_sum_of_products_equals_the_expanded_sum() -> None:
    """The einsum short cut, with a scalar factor, a factor over no reduced rank, and a comparison as a factor."""
    g = torch.Generator().manual_seed(0)
    b = torch.randn(6, 5, generator=g)
    r = torch.randn(4, generator=g)
    body = LOAD * ex.load("B", (M, ex.index("k")), "f32") * 0.5 * ex.load("R", (P,), "f32")
    out = one(body, {"A": ("pm", A), "B": ("mk", b), "R": ("p", r)}, "pk", "add", "m")
    assert torch.allclose(out, (A @ b) * 0.5 * r[:, None])


def test_output_dims_in_any_order() -> None:
    assert torch.equal(one(LOAD * 2.0, {"A": ("pm", A)}, "mp"), A.T * 2)


def test_index_terms() -> None:
    out = one(LOAD * ex.cast(M - P, "f32"), {"A": ("pm", A)})
    assert torch.equal(out, A * (torch.arange(6) - torch.arange(4)[:, None]))


def test_gather_through_a_tensor_of_indices() -> None:
    idx = torch.tensor([3, 0, 5, 1])
    i = ex.load("I", (P,), "i64")
    out = one(
        ex.load("A", (P, i), "f32"), {"A": ("pm", A), "I": ("p", idx)}, "p", sizes={"p": 4, "m": 6}, dtypes={"I": "i64"}
    )
    assert torch.equal(out, A[torch.arange(4), idx])


def test_head_groups_by_floor_division() -> None:
    b = Builder({"h": 6, "m": 2})
    k = b.given("K", (3, 2), (ex.index("h") // 2, M))
    b.put("Z", "hm", k + 0.5)
    kk = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(evaluate(b.cascade("c", "Z"), {"K": kk})["Z"], kk.repeat_interleave(2, 0) + 0.5)


def test_a_tensor_longer_than_the_rank_is_read_at_its_start() -> None:
    b = Builder({"p": 3})
    x = b.given("X", (5,), (P,))
    b.put("Z", "p", x)
    assert evaluate(b.cascade("c", "Z"), {"X": torch.arange(5.0)})["Z"].tolist() == [0, 1, 2]


def test_unselected_reads_outside_a_tensor_are_clamped() -> None:
    b = Builder({"p": 5})
    x = b.given("X", (3,), (P - 1,))
    b.put("Z", "p", ex.where((P >= 1) & (P < 4), x, -1.0))
    assert evaluate(b.cascade("c", "Z"), {"X": torch.arange(3.0)})["Z"].tolist() == [-1, 0, 1, 2, -1]


def test_constant_coordinate_and_scalar_tensor() -> None:
    b = Builder({"p": 3})
    x = b.given("X", (2, 3), (ex.const(1), P))
    s = b.given("s", (), ())
    b.put("Z", "p", x * s)
    out = evaluate(b.cascade("c", "Z"), {"X": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(2.0)})["Z"]
    assert out.tolist() == [6, 8, 10]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "f64"])
def test_arithmetic_happens_in_the_written_type(dtype: Any) -> None:
    """0.1 + x rounds as torch rounds in that type, and not at all when widened."""
    x = torch.tensor([1 / 3, 100.3, -7.7], dtype=DTYPE[dtype])
    b = Builder({"p": 3})
    b.put("Z", "p", b.input("X", "p", dtype) * 3.0 + 0.1)
    out = evaluate(b.cascade("c", "Z"), {"X": x})["Z"]
    assert out.dtype is DTYPE[dtype]
    assert torch.equal(out, x * 3.0 + torch.tensor(0.1, dtype=DTYPE[dtype]))
    wide = evaluate(b.cascade("c", "Z"), {"X": x}, widen=True)["Z"]
    assert torch.equal(wide, x.double() * 3.0 + 0.1)


def test_casts_round_unless_widened() -> None:
    b = Builder({"p": 2})
    b.put("Z", "p", ex.cast(ex.cast(b.input("X", "p"), "bf16"), "f32"))
    x = torch.tensor([1.001, 2.003])
    assert torch.equal(evaluate(b.cascade("c", "Z"), {"X": x})["Z"], x.bfloat16().float())
    assert torch.equal(evaluate(b.cascade("c", "Z"), {"X": x}, widen=True)["Z"], x.double())


def test_widening_keeps_fill_values_and_integers() -> None:
    b = Builder({"p": 3})
    b.put("Z", "p", ex.where(P > 0, b.input("X", "p"), -3.4028234663852886e38))
    b.put("I", "p", P // 2)
    c = b.cascade("c", "Z", "I")
    out = evaluate(c, {"X": torch.ones(3)}, widen=True)
    assert out["Z"].tolist() == [-3.4028234663852886e38, 1, 1]
    assert out["I"].dtype is torch.int64


def test_mixed_types_compare_as_torch_does() -> None:
    b = Builder({"p": 3})
    b.put("Z", "p", b.input("X", "p") > b.input("N", "p", "i64"))
    out = evaluate(b.cascade("c", "Z"), {"X": torch.tensor([0.5, 1.5, 2.0]), "N": torch.tensor([0, 2, 2])})["Z"]
    assert out.tolist() == [True, False, False]


def test_carried_state() -> None:
    """A running sum along an iterative rank is cumsum."""
    b = Builder(iterative=("i",))
    i, n = ex.index("i"), size("I")
    x = b.input("X", "pi")
    b.write("S", (b.extent("p"), n + 1), (P, ex.const(0)), ex.const(0.0))
    new = b.write("S", (b.extent("p"), n + 1), (P, i + 1), ex.load("S", (P, i), "f32") + x)
    b.put("Z", "pi", new * 1.0)
    c = b.cascade("running", "Z")
    values = torch.randn(3, 7)
    assert torch.allclose(evaluate(c, {"X": values})["Z"], values.cumsum(1))


def test_outputs_by_name() -> None:
    b = Builder({"p": 2})
    x = b.input("X", "p")
    b.put("Y", "p", x + 1.0)
    b.put("Z", "p", x * 2.0)
    out = evaluate(b.cascade("c", "Z", "Y"), {"X": torch.ones(2)})
    assert list(out) == ["Z", "Y"]


# --- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_are_read_off_shapes() -> None:
    c = papers.cascade4()
    t = {"Q": torch.zeros(3, 2), "K": torch.zeros(5, 2), "V": torch.zeros(5, 4)}
    assert infer_sizes(c, t) == {"P": 3, "E": 2, "M": 5, "F": 4}


def test_sizes_inside_expressions_are_solved() -> None:
    b = Builder({"p": 2 * size("H") + 1})
    b.put("Z", "p", b.input("X", "p"))
    assert infer_sizes(b.cascade("c", "Z"), {"X": torch.zeros(9)}) == {"H": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": None}, "needs tensor K"),
        ({"K": torch.zeros(5, 3)}, "K has 3 elements in dimension 1, the cascade says 2"),
        ({"K": torch.zeros(5)}, "K has 1 dimensions, the cascade has 2"),
    ],
)
def test_wrong_tensors_are_named(change: Any, message: Any) -> None:
    t = {"Q": torch.zeros(3, 2), "K": torch.zeros(5, 2), "V": torch.zeros(5, 4), **change}
    with pytest.raises(ValueError, match=message):
        evaluate(papers.cascade4(), {n: x for n, x in t.items() if x is not None})


def test_unbound_size_is_named() -> None:
    t = {"Q": torch.zeros(3, 2), "K": torch.zeros(8, 2), "V": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match="no value for size"):
        evaluate(papers.cascade5(), t)


def test_dtype_names_are_a_bijection() -> None:
    assert {DTYPE_NAME[t] for t in DTYPE.values()} == set(DTYPE)


# --- random terms against torch -----------------------------------------------------------------------------------

_leaves = st.sampled_from(["x", "y", "row", "p", "two"])
_binary = ("add", "sub", "mul", "max", "min")
_unary = ("neg", "abs", "relu", "tanh", "sigmoid", "exp", "softplus")


@st.composite
def programs(draw: Any, depth: Any = 3) -> Any:
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(_leaves)
    kind = draw(st.sampled_from(["unary", "binary", "where"]))
    if kind == "unary":
        return (draw(st.sampled_from(_unary)), draw(programs(depth=depth - 1)))
    if kind == "binary":
        return (draw(st.sampled_from(_binary)), draw(programs(depth=depth - 1)), draw(programs(depth=depth - 1)))
    return ("where", draw(programs(depth=depth - 1)), draw(programs(depth=depth - 1)), draw(programs(depth=depth - 1)))


TORCH: dict[str, Any] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "min": torch.minimum, "neg": torch.neg,
    "abs": torch.abs, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp,
    "softplus": torch.nn.functional.softplus,
}


def as_term(program: Any, b: Any) -> Any:
    leaves: dict[str, Any] = {
        "x": lambda: b.input("X", "pm"), "y": lambda: b.input("Y", "mp"), "row": lambda: b.input("R", "p"),
        "p": lambda: ex.cast(P, "f32"), "two": lambda: ex.const(2.0),
    }
    if isinstance(program, str):
        return leaves[program]()
    op, *args = program
    terms = [as_term(a, b) for a in args]
    return ex.where(terms[0] > 0.5, terms[1], terms[2]) if op == "where" else ex.make(op, tuple(terms))


def as_torch(program: Any, t: Any) -> Any:
    leaves = {"x": t["X"], "y": t["Y"].T, "row": t["R"][:, None], "p": torch.arange(4.0, dtype=torch.float64)[:, None],
              "two": torch.tensor(2.0, dtype=torch.float64)}
    if isinstance(program, str):
        return leaves[program]
    op, *args = program
    values = [as_torch(a, t) for a in args]
    return torch.where(values[0] > 0.5, values[1], values[2]) if op == "where" else TORCH[op](*values)


@given(programs(), st.sampled_from([None, "add", "max"]), st.integers(0, 99))
def test_random_terms_are_what_torch_computes(program: Any, op: Any, seed: Any) -> None:
    g = torch.Generator().manual_seed(seed)
    t = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in (("X", (4, 3)), ("Y", (3, 4)), ("R", (4,)))}
    b = Builder({"p": 4, "m": 3})
    body = as_term(program, b)
    b.put("Z", "pm" if op is None else "p", body, op, "" if op is None else "m")
    c = b.cascade("random", "Z")
    got = evaluate(c, {i.name: t[i.name] for i in c.inputs}, widen=True)["Z"]
    want = as_torch(program, t).expand(4, 3)
    want = want if op is None else want.sum(1) if op == "add" else want.amax(1)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
