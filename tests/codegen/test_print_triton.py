"""Terms as Triton text: each operator against torch in the interpreter, and the shapes of the text itself."""

from __future__ import annotations

import math

import pytest
import torch

from reattend.codegen.files import cache, library
from reattend.codegen.text.integers import in_range, span_of
from reattend.codegen.text.print_triton import SPELLINGS, TritonBody, TritonOperand, TritonScope, identifier
from reattend.codegen.text.printer import PrintError
from reattend.codegen.triton import interpret
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import DTYPE, _Evaluation
from reattend.patterns.expr import Expr

from .functions import functions

X, Y = ex.load("x", (ex.index("n"),), "f32"), ex.load("y", (ex.index("n"),), "f32")
K, J = ex.load("i", (ex.index("n"),), "i64"), ex.load("j", (ex.index("n"),), "i64")
C, D = ex.load("c", (ex.index("n"),), "b1"), ex.load("d", (ex.index("n"),), "b1")
LOADS = {"x": "f32", "y": "f32", "i": "i64", "j": "i64", "c": "b1", "d": "b1"}
N = 256


def scope() -> TritonScope:
    operands = {n: TritonOperand(n, (f"{n}_0",), (N,), d) for n, d in LOADS.items()}
    return TritonScope({ex.index("n"): "n"}, operands, {"n": N})


def text(e: Expr, extent: dict[str, int] | None = None) -> str:
    """The term alone, with coordinates called by their ranks."""
    body = TritonBody(TritonScope({ex.index(r): r for r in e.ranks}, {}, extent or {}), [e])
    result = body.term(e)
    return "; ".join([*(line.strip() for line in body.lines), result])


# --- the text ---------------------------------------------------------------------------------------------------

P, M, H = (ex.index(r) for r in "pmh")


def test_parentheses_follow_python() -> None:
    assert text((M <= P) & (P - M < 4)) == "(m <= p) & (p - m < 4)"
    assert text(ex.equal((P + M) % 2, 0), {"p": 8, "m": 8}) == "(p + m) % 2 == 0"
    assert text(P - (M - H)) == "p - (m - h)"
    assert text(-(P + M)) == "-(p + m)"


def test_division_of_what_may_be_negative_rounds_down() -> None:
    assert text(P // 4) == "p // 4"
    assert text((P - M) // 4) == "floor_div(p - m, 4)"
    assert text((P - M) % 4) == "floor_mod(p - m, 4)"


def test_products_that_leave_32_bits_are_64_bits_wide() -> None:
    assert text(P * 3, {"p": 100}) == "p * 3"
    assert text(P * 7919) == "p.to(tl.int64) * 7919"


def test_shared_terms_have_one_name() -> None:
    e = ex.unary("tanh", ex.cast(P - M, "f32"))
    assert text(e * e + e) == "t = tanh((p - m).to(tl.float32)); t * t + t"


def test_constants() -> None:
    real = ex.cast(P, "f32")
    assert text(ex.where(M <= P, real, -math.inf)) == 'tl.where(m <= p, p.to(tl.float32), float("-inf"))'
    assert text(real * ex.const(math.nan)) == 'p.to(tl.float32) * float("nan")'
    with pytest.raises(PrintError, match=r"1e\+300 is beyond float32"):
        text(real + ex.const(1e300, "f32"))


def test_narrowing_casts_inside_a_term_are_dropped() -> None:
    assert text(ex.cast(ex.cast(ex.cast(P, "f32"), "bf16"), "f32") + 1.0) == "p.to(tl.float32) + 1.0"


def test_loads_are_guarded_or_clamped() -> None:
    table = TritonOperand("table", ("table_0", "table_1"), (16, 8), "f32")
    body = TritonBody(TritonScope({P: "p", M: "m"}, {"table": table}, {"p": 16, "m": 8}, {"m": "m < M"}), [])
    assert body.load_text(ex.load("table", (P, M), "f32")) == (
        "tl.load(table + p * table_0 + m * table_1, mask=m < M, other=0.0)"
    )
    assert body.load_text(ex.load("table", (P - M, ex.const(0)), "f32")) == (
        "tl.load(table + tl.minimum(tl.maximum(p - m, 0), 15) * table_0)"
    )


def test_float64_is_refused() -> None:
    wide = TritonOperand("x", ("x_0",), (N,), "f64")
    body = TritonBody(TritonScope({ex.index("n"): "n"}, {"x": wide}, {"n": N}), [])
    with pytest.raises(PrintError, match="float64"):
        body.load_text(ex.load("x", (ex.index("n"),), "f64"))


def test_bounds_of_integer_terms() -> None:
    extent = {"p": 10, "m": 20}
    for e, lo, hi in ((P - M, -19, 9), (P * M, 0, 171), ((P - M) % 7, 0, 6), (P // 3, 0, 3), (ex.minimum(P, M), 0, 9)):
        assert span_of(e, extent) == (lo, hi)
    assert in_range(H // 4, 2, {"h": 8})
    assert not in_range(H // 2, 2, {"h": 8})


def test_identifiers() -> None:
    assert identifier("layers.0.weight") == "layers_0_weight"
    assert identifier("lambda") == "x_lambda"
    assert identifier("7up", ["x_7up"]) == "x_7up_1"


# --- the values -------------------------------------------------------------------------------------------------

FUNCTIONS = functions(X)
REAL: dict[str, Expr] = {
    **FUNCTIONS,
    **{op: ex.binary(op, X, Y) for op in ("add", "sub", "mul", "div", "max", "min", "mod")},
    "square": ex.binary("pow", X, 2.0), "cube": ex.binary("pow", X, 3.0), "root": ex.binary("pow", ex.unary("abs", X), 0.5),
    "power": ex.binary("pow", ex.unary("abs", X) + 0.1, Y * 0.1), "log1p near 0": ex.unary("log1p", X * 1e-3),
    "tanh near 0": ex.unary("tanh", X * 1e-3), "expm1 near 0": ex.unary("expm1", X * 1e-3),
    "where": ex.where(X < Y, X, -math.inf), "from integers": ex.cast(K, "f32") * X, "added": ex.unary("abs", X) + ex.unary("abs", K), "from a truth": ex.cast(C, "f32") * X,
}
EXACT: dict[str, Expr] = {
    **{f"i {op}": ex.binary(op, K, J) for op in ("add", "sub", "mul", "max", "min", "and", "or", "xor")},
    "floordiv": K // (ex.unary("abs", J) + 1), "mod": K % (ex.unary("abs", J) + 1),
    "floordiv by a negative": K // (-ex.unary("abs", J) - 1), "mod by a negative": K % (-ex.unary("abs", J) - 1),
    **{f"compare {op}": ex.binary(op, K, J) for op in ex.COMPARISONS},
    **{f"compare reals {op}": ex.binary(op, X, Y) for op in ex.COMPARISONS},
    **{f"b {op}": ex.binary(op, C, D) for op in ("and", "or", "xor", "eq", "ne")},
    "not": ~C, "isnan": ex.unary("isnan", X), "isinf": ex.unary("isinf", X), "to integer": ex.cast(X, "i64"),
    "to i32": ex.cast(X, "i32"), "to truth": ex.cast(K, "b1"), "real to truth": ex.cast(X, "b1"), "neg": -K,
    "byte": ex.cast(K, "u8"), "index": ex.index("n") * 7919 * 7919 % 1000, "chosen": ex.where(C, K, J), "bits": ex.unary("not", K),
    "sign": ex.unary("sign", K),
}

KERNEL = '''import triton
import triton.language as tl

{helpers}

@triton.jit
def kernel(x, x_0, y, y_0, i, i_0, j, j_0, c, c_0, d, d_0, out):
    n = tl.arange(0, 256)
{body}
    tl.store(out + n, {result})
'''


def computed(e: Expr, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The term through its printed text."""
    interpret.repair()
    body = TritonBody(scope(), [e])
    result = body.real(e) if e.is_float else body.term(e)
    helpers = library.called(body.helpers)
    source = KERNEL.format(helpers="\n\n\n".join(helpers), body="\n".join(body.lines), result=result)
    out = torch.empty(N, dtype=DTYPE[e.dtype])
    arguments = [a for t in tensors.values() for a in (t, 1)]
    cache.load(source).kernel[(1,)](*arguments, out)
    return out


@pytest.fixture
def tensors(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    x = torch.randn(N) * 3
    x[:8] = torch.tensor([0.0, -0.0, 0.5, 1.5, -2.5, 1e-6, -1e-6, 30.0])
    i, j = torch.randint(-50, 50, (N,)), torch.randint(-7, 7, (N,))
    return {"x": x, "y": torch.randn(N) * 2, "i": i, "j": j, "c": torch.rand(N) > 0.5, "d": torch.rand(N) > 0.5}


def wanted(e: Expr, tensors: dict[str, torch.Tensor], widen: bool) -> torch.Tensor:
    values = {n: t.double() if widen and t.is_floating_point() else t for n, t in tensors.items()}
    return _Evaluation(["n"], {"n": N}, {}, values, widen, torch.device("cpu"))(e)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", REAL)
def test_real_operators(name: str, tensors: dict[str, torch.Tensor]) -> None:
    """At most 8 units in the last place from float64; remainders and powers as torch's own float32."""
    e = REAL[name]
    out, want = computed(e, tensors), wanted(e, tensors, widen=True)
    if name in ("mod", "power", "sin", "cos"):
        torch.testing.assert_close(out, wanted(e, tensors, widen=False), rtol=3e-6, atol=3e-6)
    else:
        torch.testing.assert_close(out.double(), want, rtol=8 * 2.0**-24, atol=1e-30)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", EXACT)
def test_integers_and_conditions(name: str, tensors: dict[str, torch.Tensor]) -> None:
    if name.startswith("is"):
        tensors["x"][3:6] = torch.tensor([math.nan, math.inf, -math.inf])
    out, want = computed(EXACT[name], tensors), wanted(EXACT[name], tensors, widen=False)
    assert torch.equal(out, want)


@pytest.mark.interpreter
def test_special_values_of_the_scalar_functions(tensors: dict[str, torch.Tensor]) -> None:
    tensors["x"][:4] = torch.tensor([math.inf, -math.inf, 100.0, -100.0])
    for op in ("sigmoid", "exp", *(op for op in FUNCTIONS if SPELLINGS[op].helper)):
        e = FUNCTIONS[op]
        got, want = computed(e, tensors)[:4], wanted(e, tensors, widen=False)[:4]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-37)
