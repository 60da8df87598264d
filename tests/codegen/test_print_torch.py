"""Terms printed as torch compute what `evaluate` computes, and read as a person would write them."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from reattend.codegen.skeletons.cpu import choose, tile
from reattend.codegen.text.integers import in_range
from reattend.codegen.text.print_torch import SPELLINGS, TorchBody, TorchScope, identifier, literal, size_source
from reattend.codegen.text.printer import PrintError
from reattend.codegen.text.tile_terms import Corners, relative, relative_parts
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr

from .functions import functions

H, P, M = ex.index("h"), ex.index("p"), ex.index("m")
SIZES = {"h": 3, "p": 7, "m": 9}
SHAPES = {"slope": (3,), "bias": (3, 7, 9), "pad": (9,), "seg": (9,), "wide": (2, 9), "half": (7, 9)}
KINDS = {"pad": "b1", "seg": "i64", "half": "f16"}


def load(name: str, *at: Expr | int) -> Expr:
    return ex.load(name, tuple(ex.lift_scalar(i, "i64") for i in at), KINDS.get(name, "f32"))


def inputs() -> dict[str, torch.Tensor]:
    made = {n: torch.randn(s) for n, s in SHAPES.items()}
    made["pad"] = torch.rand(9) > 0.4
    made["seg"] = torch.arange(9) // 3
    made["half"] = made["half"].half()
    return made


def scope(views: bool = True, real: str = "f32", reuse: bool = False) -> TorchScope:
    names = {H: "h", P: "p", M: "m", ex.symbol("past"): "past"}
    return TorchScope(names, {n: n for n in SHAPES}, SHAPES, SIZES, real, views, reuse)


def source(e: Expr, views: bool = True, real: str = "f32", reuse: bool = False) -> str:
    body = TorchBody(scope(views, real, reuse), [e])
    text = body.real(e) if e.is_float else body.term(e)
    return "\n".join([*(x.strip() for x in body.lines), text])


def run(
    e: Expr, x: dict[str, torch.Tensor], views: bool = True, real: str = "f32", reuse: bool = False
) -> torch.Tensor:
    lines = source(e, views, real, reuse).splitlines()
    space = {
        "torch": torch, "math": math, "inf": math.inf, "nan": math.nan, "choose": choose, "tile": tile, "past": 3,
        "LOG2E": math.log2(math.e),
        "h": torch.arange(3).view(-1, 1, 1), "p": torch.arange(7).view(-1, 1), "m": torch.arange(9), **x,
    }
    exec("\n".join(lines[:-1]), space)
    return torch.as_tensor(eval(lines[-1], space)).expand(3, 7, 9)


def meaning(e: Expr, x: dict[str, torch.Tensor], widen: bool = False) -> torch.Tensor:
    tensors = (*(Tensor(n, s, KINDS.get(n, "f32")) for n, s in SHAPES.items()), Tensor("O", (3, 7, 9), e.dtype))
    c = Cascade("t", tuple(Rank(r, n) for r, n in SIZES.items()), tensors, (Einsum(Access("O", (H, P, M)), e),), ("O",))
    return evaluate(c, x, {"past": 3}, widen=widen)["O"]


TERMS: dict[str, tuple[Expr, str]] = {
    "causal": (M <= P + ex.symbol("past"), "m <= p + past"),
    "window": ((M <= P) & (P - M < 4), "(m <= p) & (p - m < 4)"),
    "fill": (ex.where(M <= P, 0.0, -math.inf), "choose(m <= p, 0.0, -inf)"),
    "padding": (ex.where(load("pad", M), 0.0, -1e4), "choose(pad[m], 0.0, -10000.0)"),
    "slope": (load("slope", H) * ex.cast(M - P, "f32"), "slope[h] * (m - p).to(torch.float32)"),
    "bias": (load("bias", H, P, M) * 0.5, "tile(bias, h, p, m) * 0.5"),
    "gather": (load("slope", (P + M) % 3), "slope[(p + m) % 3]"),
    "group": (load("wide", H // 2, M), "wide[h // 2, m]"),
    "negative": (-(load("slope", H) - 1.0), "-(slope[h] - 1.0)"),
    "clamp": (ex.minimum(ex.maximum(P - M, -2), 2), "(p - m).clamp(min=-2).clamp(max=2)"),
    "segments": (ex.equal(load("seg", P), load("seg", M)), "seg[p.clamp(0, 8)] == seg[m]"),
    "narrow": (ex.cast(load("half", P, M), "f32") * 2.0, "tile(half, p, m).to(torch.float32) * 2.0"),
    "either": (~((M < 2) | (M > 5)), "~((m < 2) | (m > 5))"),
    "size": (ex.where(ex.symbol("past") > 2, load("slope", H), 0.0), "slope[h] if past > 2 else torch.full_like(slope[h], 0.0)"),
    "constant": (load("bias", 1, P, M), "tile(bias, 1, p, m)"),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str) -> None:
    e, text = TERMS[name]
    # a row that no segment names is clamped by evaluate as well
    assert source(e) == text
    x = inputs()
    got, want = run(e, x), meaning(e, x)
    torch.testing.assert_close(got.to(want.dtype), want)
    torch.testing.assert_close(run(e, x, views=False).to(want.dtype), want)


FUNCTIONS = functions(load("bias", H, P, M))


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("reuse", [False, True])
def test_every_function(op: str, reuse: bool) -> None:
    """On tensors, written anew or over what the text itself has made."""
    e = ex.substitute(FUNCTIONS[op], {load("bias", H, P, M): load("bias", H, P, M) * 3.0})
    x = inputs()
    torch.testing.assert_close(run(e, x, reuse=reuse), meaning(e, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_every_function_of_a_size(op: str) -> None:
    """In Python's numbers, or refused with the operator's name."""
    past = ex.cast(ex.symbol("past"), "f32") * 0.3
    e = ex.unary(op, past) * load("slope", H)
    if SPELLINGS[op].plain is None:
        with pytest.raises(PrintError, match=f"the operator '{op}' on a size"):
            source(e)
        return
    x = inputs()
    torch.testing.assert_close(run(e, x), meaning(e, x))


def test_what_is_used_twice_is_named_once() -> None:
    s = ex.unary("tanh", load("bias", H, P, M))
    assert source(s * s + s) == "t = torch.tanh(tile(bias, h, p, m))\nt * t + t"


def test_casts_to_narrower_floats_are_dropped() -> None:
    e = ex.cast(ex.cast(load("bias", H, P, M), "bf16") * 2.0, "f32")
    assert "bfloat16" not in source(e)


def test_float64_stays() -> None:
    e = ex.cast(load("half", P, M), "f64") + ex.cast(M, "f64")
    assert source(e, real="f64") == "tile(half, p, m).to(torch.float64) + m.to(torch.float64)"


def test_a_choice_of_numbers_ignores_the_default_type() -> None:
    x = inputs()
    torch.set_default_dtype(torch.float16)
    try:
        out = run(TERMS["fill"][0], x), run(ex.where(M <= P, 0.0, -3e38), x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out[0].dtype == out[1].dtype == torch.float32
    assert float(out[1].min()) == pytest.approx(-3e38)


def test_reasons() -> None:
    with pytest.raises(PrintError, match="x has no value"):
        source(ex.index("x") + 1)
    with pytest.raises(PrintError, match="the tensor other is not at hand"):
        source(ex.load("other", (M,), "f32"))


def test_a_size_that_repeats_itself_has_no_names_of_its_own() -> None:
    """A length that is padded to chunks, cut into them."""
    n = sympy.Symbol("n", integer=True, positive=True)
    padded = n + sympy.Mod(63 * n, 64)
    size = sympy.floor(padded / sympy.floor(padded / 64))
    text = size_source(size, {"n": "n"})
    for value in (1, 64, 100, 640):
        assert eval(text, {}, {"n": value}) == size.subs(n, value)


def test_names_and_numbers() -> None:
    assert identifier("3 x", {"t_3_x"}) == "t_3_x_1"
    assert identifier("lambda") == "lambda_1"
    assert [literal(v) for v in (math.inf, -math.inf, 2, True, 0.5)] == ["inf", "-inf", "2", "True", "0.5"]
    n = sympy.Symbol("n", integer=True, positive=True)
    text = size_source(sympy.floor((2 * n + 1) / 4), {"n": "n"})
    assert [eval(text, {"n": k}) for k in range(9)] == [(2 * k + 1) // 4 for k in range(9)]
    assert in_range(H // 2, 2, {"h": 4})
    assert not in_range(H // 2, 1, {"h": 4})


# --- random terms -------------------------------------------------------------------------------------------------

integers: st.SearchStrategy[Expr] = st.deferred(lambda: st.one_of(
    st.sampled_from([P, M, H, ex.symbol("past"), load("seg", M)]), st.integers(-3, 9).map(ex.const),
    st.tuples(st.sampled_from(["add", "sub", "max", "min", "mul"]), integers, integers).map(lambda t: ex.binary(*t)),
    st.tuples(st.sampled_from(["floordiv", "mod"]), integers, st.integers(1, 5)).map(lambda t: ex.binary(*t)),
))
predicates: st.SearchStrategy[Expr] = st.deferred(lambda: st.one_of(
    st.just(load("pad", M)),
    st.tuples(st.sampled_from(ex.COMPARISONS), integers, integers).map(lambda t: ex.binary(*t)),
    st.tuples(st.sampled_from(["and", "or"]), predicates, predicates).map(lambda t: ex.binary(*t)),
    predicates.map(lambda e: ~e),
))
reals: st.SearchStrategy[Expr] = st.deferred(lambda: st.one_of(
    st.sampled_from([load("bias", H, P, M), load("slope", H), load("half", P, M), load("wide", 0, M)]),
    integers.map(lambda e: ex.cast(e, "f32")),
    st.tuples(st.sampled_from(["add", "sub", "mul", "max", "min"]), reals, reals).map(lambda t: ex.binary(*t)),
    st.tuples(st.sampled_from(["tanh", "abs", "relu", "sigmoid", "neg", "cos", "exp"]), reals).map(lambda t: ex.unary(*t)),
    st.tuples(predicates, reals, reals).map(lambda t: ex.where(*t)),
))


@given(st.one_of(reals, predicates, integers))
def test_random_terms(e: Expr) -> None:
    x = inputs()
    want = meaning(e, x)
    got = run(e, x).to(want.dtype)
    if e.is_float:
        # one unit of the narrowest type in which a part of it is rounded
        near = 2.0**-7 if any(t.dtype == "bf16" for t in ex.walk(e)) else 2e-3
        torch.testing.assert_close(got.float(), want.float(), rtol=near, atol=near, equal_nan=True)
    else:
        assert torch.equal(got, want)


@given(reals)
@example(ex.unary("tanh", ex.where(ex.symbol("past") > 2, ex.cast(ex.symbol("past"), "f32"), load("bias", H, P, M))))
def test_memory_is_used_again_without_harm(e: Expr) -> None:
    """In-place operators give the same and leave every input as it is."""
    x = inputs()
    kept = {n: t.clone() for n, t in x.items()}
    want = run(e, x)
    got = run(e, x, reuse=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert all(torch.equal(x[n], kept[n]) for n in x)


def test_memory_is_used_again() -> None:
    bias = load("bias", H, P, M)
    assert source(ex.unary("tanh", bias * 0.5) * 2.0, reuse=True) == "(tile(bias, h, p, m) * 0.5).tanh_().mul_(2.0)"
    assert source(ex.exp(bias - load("slope", H)), reuse=True) == "(tile(bias, h, p, m) - slope[h]).mul_(LOG2E).exp2_()"
    assert source(ex.exp(bias), reuse=True) == "(tile(bias, h, p, m) * LOG2E).exp2_()"
    chosen = ex.where(ex.symbol("past") > 2, bias, 0.0)
    assert "mul_" not in source(chosen * 2.0, reuse=True)


@given(predicates)
def test_tile_terms_bound_the_mask(e: Expr) -> None:
    """`every` and `some` over the corners of tiles hold for every point of a tile."""
    x = inputs()
    keep = meaning(e, x)
    size = 3
    corners = Corners.of("p", "m", size, size)
    every, some = corners.predicate(e)
    tables: dict[str, torch.Tensor] = {}
    for t in corners.tables.values():
        low, high = x[t.tensor], x[t.tensor]
        for d, _, block in t.blocked:
            assert block == 1
            blocks = [(low.narrow(d, i, min(size, 9 - i)), high.narrow(d, i, min(size, 9 - i))) for i in range(0, 9, size)]
            low = torch.stack([a.amin(d) for a, _ in blocks], d)
            high = torch.stack([b.amax(d) for _, b in blocks], d)
        for d in t.whole:
            low, high = low.amin(d, keepdim=True), high.amax(d, keepdim=True)
        tables |= {f"{t.key}:low": low, f"{t.key}:high": high}
    for i in range(0, 7, size):
        for j in range(0, 9, size):
            p1, m1 = min(i + size, 7), min(j + size, 9)
            at = {"p0": i, "p1": p1 - 1, "m0": j, "m1": m1 - 1, "p#": i // size, "m#": j // size}
            tile_of = keep[:, i:p1, j:m1]
            for h in range(3):
                sure, maybe = (_at_corner(t, {**at, "h": h}, {**x, **tables}) for t in (every, some))
                assert not sure or bool(tile_of[h].all())
                assert maybe or not bool(tile_of[h].any())


def _at_corner(e: Expr, at: dict[str, int], x: dict[str, torch.Tensor]) -> bool:
    """The value of a corner term."""
    memo: dict[Expr, object] = {}
    for t in ex.walk(e):
        args = [memo[a] for a in t.args]
        match t.op:
            case "const":
                memo[t] = t.value
            case "index":
                memo[t] = at[str(t.attr)]
            case "symbol":
                memo[t] = 3
            case "load":
                data = x[str(t.attr)]
                memo[t] = data[tuple(min(max(int(str(i)), 0), n - 1) for i, n in zip(args, data.shape))].item()
            case _:
                values = [ex.const(v, a.dtype) for v, a in zip(args, t.args)]  # type: ignore[arg-type]
                memo[t] = ex.make(t.op, tuple(values), t.attr, t.dtype).value
    return bool(memo[e])


def test_what_varies_with_the_difference_alone() -> None:
    causal = M <= P
    assert relative(causal & (P - M < 4), "p", "m")
    assert relative(ex.cast(M - P, "f32") * load("slope", H), "p", "m")
    assert relative(load("slope", ex.minimum(ex.maximum(P - M, 0), 2)), "p", "m")
    assert relative(M * 2 <= P * 2 + 1, "p", "m")
    assert not relative(ex.equal((P + M) % 2, 0), "p", "m")
    assert not relative(ex.equal(P // 2, M // 2), "p", "m")
    assert not relative(M < 3, "p", "m")
    assert relative_parts(causal & load("pad", M), "p", "m") == (causal,)
    assert relative_parts(load("pad", M) & (M < 3), "p", "m") == ()


@given(st.one_of(predicates, integers))
def test_relative_is_sound(e: Expr) -> None:
    """Moving query and key by one changes nothing."""
    if not relative(e, "p", "m") or ex.loads(e):
        return
    whole = meaning(e, inputs())
    assert torch.equal(whole[:, 1:, 1:], whole[:, :-1, :-1])
