"""Terms as C++ text: each operator against torch, compiled together once, and the shapes of the text itself."""

from __future__ import annotations

import ctypes
import math
import re
from importlib.resources import files

import pytest
import torch

from reattend.codegen.cpu.cpp.names import RESERVED
from reattend.codegen.files import native
from reattend.codegen.files.library import SKELETONS
from reattend.codegen.text.print_cpp import CALLED, STORED, CppBody, CppOperand, CppScope, identifier, kind
from reattend.codegen.text.printer import PrintError
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import DTYPE, _Evaluation
from reattend.patterns.expr import Expr

from .functions import functions

At = ex.index("n")
LOADS = {"x": "f32", "y": "f32", "i": "i64", "j": "i64", "c": "b1", "d": "b1", "u": "u8", "h": "f16", "g": "bf16"}
X, Y, K, J, C, D, U, HALF, BRAIN = (ex.load(n, (At,), d) for n, d in LOADS.items())
N = 256
SCALARS = files(SKELETONS).joinpath("fused_scalar.hpp").read_text(encoding="utf-8")
P, M = ex.index("p"), ex.index("m")


def text(e: Expr, extent: dict[str, int] | None = None) -> str:
    """The term alone, with coordinates called by their ranks."""
    body = CppBody(CppScope({ex.index(r): r for r in e.ranks}, {}, extent or {}), [e], set(e.ranks))
    result = body.term(e)
    return " ".join([*body.lines, result])


# --- the text ---------------------------------------------------------------------------------------------------


def test_parentheses_follow_cpp() -> None:
    assert text((M <= P) & (P - M < 4)) == "(m <= p) & (p - m < 4)"
    assert text(P - (M - P)) == "p - (m - p)"
    assert text(-(P + M)) == "-(p + m)"
    assert text(ex.equal((P + M) % 2, 0), {"p": 8, "m": 8}) == "(p + m) % 2 == 0"
    assert text(ex.binary("eq", M <= P, P < 4)) == "(m <= p) == (p < 4)"


def test_division_of_what_may_be_negative_rounds_down() -> None:
    assert text(P // 4) == "p / 4"
    assert text((P - M) // 4) == "floor_div(p - m, 4)"
    assert text((P - M) % 4) == "floor_mod(p - m, 4)"


def test_products_that_leave_32_bits_are_64_bits_wide() -> None:
    assert text(P * 3, {"p": 100}) == "p * 3"
    assert text(P * 7919) == "(int64_t)p * INT64_C(7919)"
    assert text(P * 7919 % 10) == "(int32_t)((int64_t)p * INT64_C(7919) % INT64_C(10))"


def test_shared_terms_have_one_name_and_a_type() -> None:
    e = ex.unary("tanh", ex.cast(P - M, "f32"))
    assert text(e * e + e) == "const float t = tanh_((float)(p - m)); t * t + t"


def test_choices_have_no_branch() -> None:
    """Both sides have names before the choice, so that a loop around it becomes vectors."""
    e = ex.where(M <= P, ex.exp(ex.cast(M, "f32")), -math.inf)
    assert text(e) == "const float t = exp_((float)m); const float t_1 = m <= p ? t : -INFINITY; t_1"


def test_constants() -> None:
    real = ex.cast(P, "f32")
    assert text(real * 0.1) == "(float)p * 0.1f"
    assert text(real - ex.const(-2.0)) == "(float)p - -2.0f"
    assert text(real * ex.const(math.nan)) == "(float)p * NAN"
    with pytest.raises(PrintError, match=r"1e\+300 is beyond float32"):
        text(real + ex.const(1e300, "f32"))


def test_narrowing_casts_inside_a_term_are_dropped() -> None:
    assert text(ex.cast(ex.cast(ex.cast(P, "f32"), "bf16"), "f32") + 1.0) == "(float)p + 1.0f"


def test_coordinates_are_clamped_where_they_may_lie_outside() -> None:
    table = CppOperand("table", ("table_0", "table_1"), (16, 8), "f32")
    body = CppBody(CppScope({P: "p", M: "m"}, {"table": table}, {"p": 16, "m": 8}), [], {"p", "m", "table"})
    assert body.term(ex.load("table", (P, M), "f32")) == "table_x"
    body.term(ex.load("table", (P - M, ex.const(0)), "f32"))
    assert body.lines == [
        "const float table_x = table[p * table_0 + m * table_1];",
        "const float table_x_1 = table[min_(max_(p - m, (int32_t)0), (int32_t)15) * table_0];",
    ]


def test_types_that_cpp_does_not_have_are_refused() -> None:
    wide = CppOperand("x", ("x_0",), (N,), "f64")
    body = CppBody(CppScope({At: "n"}, {"x": wide}, {"n": N}), [], {"n"})
    with pytest.raises(PrintError, match="computes in float32"):
        body.term(ex.load("x", (At,), "f64"))


@pytest.mark.parametrize("name", sorted(CALLED))
def test_what_the_text_calls_stands_in_the_skeleton(name: str) -> None:
    """And no tensor takes its name."""
    assert re.search(rf"^(INLINE|inline|template .*) .*\b{name}\(", SCALARS, re.MULTILINE)
    assert name in RESERVED


def test_identifiers() -> None:
    assert identifier("layers.0.weight") == "layers_0_weight"
    assert identifier("template") == "x_template"
    assert identifier("7up", ["x_7up"]) == "x_7up_1"


# --- the values -------------------------------------------------------------------------------------------------

FUNCTIONS = functions(X)
REAL: dict[str, Expr] = {
    **FUNCTIONS,
    **{op: ex.binary(op, X, Y) for op in ("add", "sub", "mul", "div", "max", "min", "mod", "floordiv")},
    "square": ex.binary("pow", X, 2.0), "cube": ex.binary("pow", X, 3.0), "root": ex.binary("pow", ex.unary("abs", X), 0.5),
    "inverse": ex.binary("pow", ex.unary("abs", X) + 0.1, -1.0), "power": ex.binary("pow", ex.unary("abs", X) + 0.1, Y * 0.1),
    "log1p near 0": ex.unary("log1p", X * 1e-3), "tanh near 0": ex.unary("tanh", X * 1e-3),
    "where": ex.where(X < Y, X, -math.inf), "from integers": ex.cast(K, "f32") * X, "from a truth": ex.cast(C, "f32") * X,
    "added": ex.unary("abs", X) + ex.unary("abs", K), "half": ex.cast(HALF, "f32") + X, "brain": ex.cast(BRAIN, "f32") * X,
    "chosen of two": ex.where(C, ex.exp(X), ex.where(D, X * Y, 0.5)),
}
EXACT: dict[str, Expr] = {
    **{f"i {op}": ex.binary(op, K, J) for op in ("add", "sub", "mul", "max", "min", "and", "or", "xor")},
    "i floordiv": K // (ex.unary("abs", J) + 1), "i mod": K % (ex.unary("abs", J) + 1),
    "floordiv by a negative": K // (-ex.unary("abs", J) - 1), "mod by a negative": K % (-ex.unary("abs", J) - 1),
    **{f"compare {op}": ex.binary(op, K, J) for op in ex.COMPARISONS},
    **{f"compare reals {op}": ex.binary(op, X, Y) for op in ex.COMPARISONS},
    **{f"b {op}": ex.binary(op, C, D) for op in ("and", "or", "xor", "eq", "ne")},
    "mixed": ex.binary("lt", K, ex.cast(At, "i32")), "narrow": ex.binary("add", U, U),
    "not": ~C, "isnan": ex.unary("isnan", X), "isinf": ex.unary("isinf", X), "to integer": ex.cast(X, "i64"),
    "to i32": ex.cast(X, "i32"), "to truth": ex.cast(K, "b1"), "real to truth": ex.cast(X, "b1"), "i neg": -K,
    "byte": ex.cast(K, "u8"), "index": At * 7919 * 7919 % 1000, "chosen": ex.where(C, K, J), "bits": ex.unary("not", K),
    "i sign": ex.unary("sign", K), "integral": ex.unary("floor", K), "cubed": ex.binary("pow", J, 3), "lifted": ex.unary("relu", K),
    "truths": ex.where(C, X < Y, D), "byte of a real": ex.cast(ex.unary("abs", X), "u8"),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """Every term as a function of all tensors, in one library."""
    try:
        native.compiler()
    except native.CompilerError as no:
        pytest.skip(str(no))
    operands = {n: CppOperand(n, (f"{n}_0",), (N,), d) for n, d in LOADS.items()}
    params = ", ".join(f"const {STORED[d]}* {n}" for n, d in LOADS.items())
    parts = [files("reattend.codegen.skeletons").joinpath("fused_scalar.hpp").read_text(encoding="utf-8")]
    for number, e in enumerate([*REAL.values(), *EXACT.values()]):
        scope = CppScope({At: "n"}, operands, {"n": N})
        body = CppBody(scope, [e], {"n", "out", *LOADS})
        result = body.real(e) if e.is_float else body.term(e)
        stored = STORED[e.dtype]
        parts.append(
            f'extern "C" __attribute__((visibility("default"))) void term_{number}({params}, {stored}* out) {{\n'
            f"  constexpr int64_t {', '.join(f'{n}_0 = 1' for n in LOADS)};\n#pragma omp simd\n"
            f"  for (int32_t n = 0; n < {N}; n++) {{\n    "
            + "\n    ".join([*body.lines, f"const {kind(e, scope.extent)} result = {result};", "out[n] = result;"])
            + "\n  }\n}"
        )
    return native.load("\n".join(parts))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, generator=g) * 3
    x[:8] = torch.tensor([0.0, -0.0, 0.5, 1.5, -2.5, 1e-6, -1e-6, 30.0])
    i, j = torch.randint(-50, 50, (N,), generator=g), torch.randint(-7, 7, (N,), generator=g)
    y = torch.randn(N, generator=g) * 2
    c, d = (torch.rand(N, generator=g) > 0.5 for _ in range(2))
    u = torch.randint(0, 256, (N,), generator=g, dtype=torch.uint8)
    h, b = torch.randn(N, generator=g).half(), torch.randn(N, generator=g).bfloat16()
    return {"x": x, "y": y, "i": i, "j": j, "c": c, "d": d, "u": u, "h": h, "g": b}


def computed(library: ctypes.CDLL, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    number = [*REAL, *EXACT].index(name)
    out = torch.empty(N, dtype=DTYPE[(REAL | EXACT)[name].dtype])
    getattr(library, f"term_{number}")(*(ctypes.c_void_p(t.data_ptr()) for t in (*tensors.values(), out)))
    return out


def wanted(e: Expr, tensors: dict[str, torch.Tensor], widen: bool) -> torch.Tensor:
    values = {n: t.double() if widen and t.is_floating_point() else t for n, t in tensors.items()}
    return _Evaluation(["n"], {"n": N}, {}, values, widen, torch.device("cpu"))(e)


@pytest.mark.parametrize("name", REAL)
def test_real_operators(name: str, library: ctypes.CDLL, tensors: dict[str, torch.Tensor]) -> None:
    """At most 8 units in the last place from float64; remainders and powers as torch's own float32."""
    out, e = computed(library, name, tensors), REAL[name]
    if name in ("mod", "floordiv", "power", "sin", "cos"):
        torch.testing.assert_close(out, wanted(e, tensors, widen=False), rtol=3e-6, atol=3e-6)
    else:
        torch.testing.assert_close(out.double(), wanted(e, tensors, widen=True), rtol=8 * 2.0**-24, atol=1e-30)


@pytest.mark.parametrize("name", EXACT)
def test_integers_and_conditions(name: str, library: ctypes.CDLL, tensors: dict[str, torch.Tensor]) -> None:
    if name.startswith("is"):
        tensors["x"][3:6] = torch.tensor([math.nan, math.inf, -math.inf])
    assert torch.equal(computed(library, name, tensors), wanted(EXACT[name], tensors, widen=False))


def test_not_a_number_passes(library: ctypes.CDLL, tensors: dict[str, torch.Tensor]) -> None:
    """torch's rules: NaN is the larger and the smaller of two, and the result of whatever it enters."""
    tensors["x"][::3] = math.nan
    for name in ("max", "min", "relu", "exp", "exp2", "tanh", "sigmoid", "softplus", "log", "floor", "abs", "mul"):
        out = computed(library, name, tensors)
        assert torch.equal(out.isnan(), wanted(REAL[name], tensors, widen=False).isnan()), name


def test_the_ends_of_the_range(library: ctypes.CDLL, tensors: dict[str, torch.Tensor]) -> None:
    tensors["x"][:4] = torch.tensor([math.inf, -math.inf, 100.0, -100.0])
    for name in ("tanh", "sigmoid", "softplus", "exp", "expm1"):
        got, want = computed(library, name, tensors)[:4], wanted(REAL[name], tensors, widen=False)[:4]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-37)
