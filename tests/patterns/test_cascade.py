"""The cascade: every rule of the verifier refuses what breaks it, sizes as terms, canonical text."""

from dataclasses import replace
from typing import Any

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.cascade import (
    SCHEMA,
    Access,
    Cascade,
    CascadeError,
    Einsum,
    Rank,
    Tensor,
    bind,
    parse,
    parse_size,
    size_term,
    term_size,
    to_text,
    verify,
)
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import papers

S, N = (sympy.Symbol(n, integer=True, positive=True) for n in "SN")
P, M = ex.index("p"), ex.index("m")


def product() -> Any:
    """Z_p = Σ_m A_pm · B_m"""
    a, b = ex.load("A", (P, M), "f32"), ex.load("B", (M,), "f32")
    return Cascade(
        "product",
        (Rank("p", S), Rank("m", N)),
        (Tensor("A", (S, N)), Tensor("B", (N,)), Tensor("Z", (S,))),
        (Einsum(Access("Z", (P,)), a * b, "add", ("m",)),),
        ("Z",),
    )


def with_einsum(c: Any, **changes: Any) -> Any:
    return replace(c, einsums=(replace(c.einsums[0], **changes), *c.einsums[1:]))


REFUSED = {
    "rank m is declared twice": lambda c: replace(c, ranks=(*c.ranks, Rank("m", 3))),
    "tensor A is declared twice": lambda c: replace(c, tensors=(*c.tensors, c.tensors[0])),
    "rank m is not declared": lambda c: replace(c, ranks=c.ranks[:1]),
    "is reduced and indexes the output": lambda c: with_einsum(c, out=Access("Z", (M,))),
    "is neither reduced nor in the output": lambda c: with_einsum(c, op=None, over=()),
    "tensor Z is not declared": lambda c: replace(c, tensors=c.tensors[:2]),
    "tensor B is not declared": lambda c: replace(c, tensors=(c.tensors[0], c.tensors[2])),
    "A has 2 dimensions and is accessed with 1 terms": lambda c: with_einsum(c, body=ex.load("A", (M,), "f32")),
    "is f32, not an integer": lambda c: with_einsum(c, body=ex.load("B", (ex.load("B", (M,), "f32"),), "f32")),
    "B is f32 and is read as bf16": lambda c: with_einsum(c, body=ex.load("B", (M,), "bf16")),
    "Z is read before it is written": lambda c: replace(
        c,
        einsums=(Einsum(Access("Y", (P,)), ex.load("Z", (P,), "f32")), *c.einsums),
        tensors=(*c.tensors, Tensor("Y", (S,))),
    ),
    "output Y is never written": lambda c: replace(c, outputs=("Y",)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_verifier_refuses(reason: Any) -> None:
    with pytest.raises(CascadeError, match=r"cascade 'product'") as error:
        verify(REFUSED[reason](product()))
    assert reason in str(error.value)


def test_verifier_accepts() -> None:
    c = product()
    assert verify(c) is c


def test_what_an_iterative_rank_may_read() -> None:
    """Its own step before: along an iterative rank a tensor is read before its Einsum stands."""
    assert verify(papers.cascade3())
    with pytest.raises(CascadeError, match="read before it is written"):
        verify(replace(papers.cascade3(), ranks=(Rank("i", papers.size("I")),), einsums=papers.cascade3().einsums[2:]))


@pytest.mark.parametrize(("op", "over"), [("add", ()), (None, ("m",)), ("median", ("m",))])
def test_a_reduction_needs_an_operator_and_ranks(op: Any, over: Any) -> None:
    with pytest.raises(ValueError, match="reduction"):
        Einsum(Access("Z", ()), ex.load("B", (M,), "f32"), op, over)


def test_views_of_a_cascade() -> None:
    c = papers.cascade4()
    assert [t.name for t in c.inputs] == ["Q", "K", "V"]
    assert c.free_symbols == ("E", "F", "M", "P")
    graph = c.graph()
    names = [e.out.tensor for e in c.einsums]
    edges = {(names[a], names[b]) for a, b in graph.edges}
    assert edges == {("QK", "GM"), ("QK", "SN"), ("GM", "SN"), ("SN", "SD"), ("SN", "A"), ("SD", "A"), ("A", "AV")}


def test_sizes_can_be_bound() -> None:
    c = product().with_sizes({"S": 3, "N": 4})
    assert c.free_symbols == ()
    assert c.tensor["A"].shape == (3, 4)
    assert c.rank["m"].size == 4


def test_binding_replaces_symbols_in_terms() -> None:
    c = with_einsum(product(), body=ex.where(M < ex.symbol("N"), ex.load("B", (M,), "f32"), 0.0))
    assert "N" not in str(c.with_sizes({"N": 4, "S": 2}).einsums[0])


# --- sizes --------------------------------------------------------------------------------------------------------

_leaf = st.one_of(st.integers(1, 9), st.sampled_from([S, N]))
_sizes = st.recursive(
    _leaf,
    lambda inner: st.tuples(st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "square", "min", "max"]), inner, inner).map(
        lambda t: {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "floordiv": lambda a, b: sympy.floor(sympy.sympify(a) / 3) + b,
            "mod": lambda a, b: sympy.Mod(a, 4) + b,
            "square": lambda a, b: a**2 + b,
            "min": lambda a, b: sympy.Min(a, b + 3),
            "max": lambda a, b: sympy.Max(a, 7) + b,
        }[t[0]](t[1], t[2])
    ),
    max_leaves=5,
)


@given(_sizes, st.integers(1, 30), st.integers(1, 30))
def test_sizes_as_terms_keep_their_value(size: Any, s: Any, n: Any) -> None:
    size = size if isinstance(size, int) else sympy.sympify(size)
    table = {ex.symbol("S"): ex.const(s), ex.symbol("N"): ex.const(n)}
    term = ex.substitute(size_term(size), table)
    assert term.is_const
    assert term.value == bind(size, {"S": s, "N": n})


@given(_sizes, st.integers(1, 30), st.integers(1, 30))
def test_terms_as_sizes_keep_their_value(size: Any, s: Any, n: Any) -> None:
    size = size if isinstance(size, int) else sympy.sympify(size)
    assert bind(term_size(size_term(size)), {"S": s, "N": n}) == bind(size, {"S": s, "N": n})


@given(_sizes)
def test_sizes_as_text_round_trip(size: Any) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize("name", ["S", "N", "E", "I", "Q", "O", "beta", "gamma", "M0", "s77", "Mod_", "floor1"])
def test_any_name_is_a_size(name: Any) -> None:
    """Letters that sympy keeps for itself (E, I, Q, S, …) are sizes here."""
    size = 2 * sympy.Symbol(name, integer=True, positive=True) + 1
    assert parse_size(str(size)) == size


def test_a_quotient_of_sizes_is_a_floor_division() -> None:
    assert str(size_term(S / 2)) == "S // 2"
    assert str(size_term(sympy.floor((S + 15) / 16))) == "(15 + S) // 16"


def test_no_form_as_a_term() -> None:
    with pytest.raises(ValueError, match="no form"):
        size_term(sympy.sqrt(S))
    with pytest.raises(ValueError, match="no size"):
        term_size(ex.index("p"))


# --- canonical text -----------------------------------------------------------------------------------------------


def test_text_keeps_every_literal_apart() -> None:
    b = papers.Builder()
    x = b.input("X", "k")
    for i, v in enumerate([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 0.1, 1e-300, -3.4028234663852886e38]):
        b.put(f"Y{i}", "k", ex.where(x > 0.0, x, ex.const(v, "f32")))
    b.put("Z", "k", ex.where(ex.equal(ex.index("k"), 1), ex.const(True), ex.load("Y0", (ex.index("k"),), "f32") > 0.0))
    c = b.cascade("literals", "Z")
    again = parse(to_text(c))
    assert again == c
    assert all(x.body is y.body for x, y in zip(c.einsums, again.einsums))


def test_other_schema_is_refused_with_both_numbers() -> None:
    text = to_text(product()).replace(f'"schema":{SCHEMA}', '"schema":99')
    with pytest.raises(CascadeError, match=rf"schema 99.*schema {SCHEMA}"):
        parse(text)


def test_text_does_not_depend_on_how_terms_came_about() -> None:
    c, d = product(), product()
    ex.load("noise", (ex.index("z"),), "f64")
    assert to_text(c) == to_text(d)
    assert hash(c) == hash(d)


def test_the_note_is_no_part_of_what_is_computed() -> None:
    assert replace(product(), note="from somewhere") == product()


def test_parsed_cascade_computes_the_same() -> None:
    import torch

    c = papers.cascade5()
    t = {n: torch.randn(s, dtype=torch.float64) for n, s in (("Q", (3, 2)), ("K", (8, 2)), ("V", (8, 2)))}
    sizes = {"M1": 2, "M0": 4}
    assert torch.equal(evaluate(c, t, sizes, widen=True)["AV"], evaluate(parse(to_text(c)), t, sizes, widen=True)["AV"])
