"""The fused CPU body against the oracle in float64: what it prints, compiles and computes, and what it refuses.

Each kernel is a compile of about a second: a few run in the fast tier, the breadth is marked slow.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from reattend.codegen import operator
from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.files import cache, native
from reattend.codegen.forms.program import Program
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, verify
from reattend.patterns.cascade import Tensor as Shape
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from tests import programs, strategies
from tests.codegen import test_cpu
from tests.codegen.attentions import (
    CAUSAL,
    VARIANTS,
    B,
    Case,
    E,
    F,
    H,
    M,
    P,
    aux,
    build,
    long_sum,
    masked,
    no_batch,
    relative_rms,
    size,
    windows,
)
from tests.rewriter.helpers import values_of
from tests.test_unnamed_variants import found_in, is_right

FUSED = TileMapping(32, 32, body="fused")
TYPES = test_cpu.TYPES
FAST = {("causal_padding", "bf16"), ("sinks", "f32"), ("gqa", "f16")}
# float16 is widened as it is laid out, and then computed as float32 is: a few show that.
HALF = ("bias", "causal_padding", "gqa", "sinks")
EVERY = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in FAST else pytest.mark.slow)
    for name in sorted(VARIANTS)
    for dtype in TYPES
    if dtype != "f16" or name in HALF
]


def kernel(c: Cascade, mapping: TileMapping = FUSED) -> cpu.CpuKernel:
    made = cpu.build(c, mapping)
    assert isinstance(made, cpu.CpuKernel), str(made)
    return made


def close(c: Cascade, x: Mapping[str, torch.Tensor], sizes: Mapping[str, int], atol: float = 5e-6) -> torch.Tensor:
    made = kernel(c)
    out = made.run(x, {n: sizes[n] for n in made.sizes})
    exact = evaluate(c, x, sizes, widen=True)[c.outputs[0]]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol, equal_nan=True)
    return out


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_attentions(name: str, dtype: str) -> None:
    """No further from float64 than torch's own SDPA, or than the eager code where SDPA cannot express it."""
    test_cpu.check(VARIANTS[name](dtype=dtype), FUSED, TYPES[dtype])


@pytest.mark.slow
@settings(max_examples=30)
@given(strategies.programs())
def test_drawn_programs(program: strategies.Program) -> None:
    """Scores, masks and row rules that no file names."""
    made = kernel(program.cascade)
    x = program.inputs()
    out = made.run(x, {n: program.sizes[n] for n in made.sizes})
    exact = evaluate(program.cascade, x, program.sizes, widen=True)["O"]
    eager = evaluate(program.cascade, x, program.sizes)["O"]
    assert torch.equal(out.isnan(), exact.isnan())
    worst = [float((t - exact)[~exact.isnan()].abs().max()) if not exact.isnan().all() else 0.0 for t in (out, eager)]
    # a few digits of the largest number, where the eager code happens to round well
    digits = 4 * torch.finfo(torch.float32).eps * float(exact.nan_to_num(0.0, 0.0, 0.0).abs().max())
    assert worst[0] <= max(test_cpu.MOST * worst[1], 1e-6, digits), program.label


@pytest.mark.slow
@settings(max_examples=30)
@given(programs.programs())
def test_programs_as_a_user_writes_them(program: programs.Program) -> None:
    args = programs.inputs()
    found, gm = found_in(program, args)
    values = values_of(gm, args)
    is_right(kernel(found.cascade).run({k: values[v] for k, v in found.tensors.items()}, {}), args, program)


@pytest.mark.parametrize("name", ["sdpa_padding", *(pytest.param(n, marks=pytest.mark.slow) for n in ("padding", "causal_padding", "nan_padding"))])
def test_rows_without_a_key(name: str) -> None:
    """The uniform mean, 0 and NaN, as the model has it."""
    case = VARIANTS[name](p=100, m=100)
    x = case.inputs()
    x["pad"][0, :9] = False
    x["pad"][1] = False
    close(case.cascade, x, case.sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window", "segments", "small_added", "gqa"])
def test_one_kernel_for_every_length(name: str) -> None:
    """Sizes are the caller's: shorter than a tile, not a multiple of one, and longer than a run of tiles."""
    for p in (1, 31, 32, 33, 100, 1000):
        case = VARIANTS[name](p=p, b=1)
        close(case.cascade, case.inputs(seed=p), case.sizes)


def test_a_bias_in_every_layout() -> None:
    """Key by key, transposed, and the same for all queries or heads: copied only where keys have gaps."""
    bias = ex.load("bias", (ex.const(0), H, P, M), "f32") + ex.load("mask", (B, ex.const(0), P, M), "f32")
    tensors = (aux("bias", (1, 4, size("s"), size("t"))), aux("mask", (size("n"), 1, size("s"), size("t"))))
    case = build(lambda s: s + bias, p=40, m=70, aux=tensors)
    x = case.inputs()
    close(case.cascade, x, case.sizes)
    layouts = {
        "bias": (x["bias"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), x["bias"][:, :1, :1].expand(1, 4, 40, 70),
                 x["bias"][..., :1].expand(1, 4, 40, 70)),
        "mask": (x["mask"].mT.contiguous().mT, x["mask"][:1].expand(2, 1, 40, 70), x["mask"].flip(0)),
    }
    for name, views in layouts.items():
        for view in views:
            close(case.cascade, {**x, name: view}, case.sizes)


def test_operands_in_every_layout() -> None:
    """Heads inside tokens, a slice of something larger, and rows with gaps, which are copied."""
    case = VARIANTS["gqa"](p=40)
    x = case.inputs()
    want = close(case.cascade, x, case.sizes)
    tokens = {n: x[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "QKV"}
    inside = {n: torch.cat([x[n], x[n]], 2)[:, :, 40:] for n in "QKV"}
    gaps = {n: torch.stack([x[n], x[n]], -1)[..., 1] for n in "QKV"}
    for strange in (tokens, inside, gaps):
        assert torch.equal(close(case.cascade, strange, case.sizes), want)


def latent() -> tuple[Cascade, dict[str, torch.Tensor], Mapping[str, int]]:
    """Scores from a latent and a position part; the position part sums over two ranks and is shared by all heads."""
    r, t = ex.index("r"), ex.index("t")
    base = strategies.attention(lambda s: ex.where(CAUSAL, s, -float("inf")), strategies.ROWS["softmax"], h=4, group=2, p=40, m=40)
    qk, at = ex.load("QK", (B, H, P, M), "f32"), (B, H, P, M)
    part = ex.load("QR", (B, H, P, r, t), "f32") * ex.load("KR", (B, M, r, t), "f32") * 0.5
    table = {qk: qk + ex.load("QP", at, "f32")}
    einsums = [Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in base.cascade.einsums]
    shapes = (Shape("QR", (1, 4, strategies.QUERIES, 2, 12)), Shape("KR", (1, strategies.QUERIES, 2, 12)),
              Shape("QP", base.cascade.tensor["QK"].shape))
    c = Cascade(
        "latent", (*base.cascade.ranks, Rank("r", 2), Rank("t", 12)), (*base.cascade.tensors, *shapes),
        (Einsum(Access("QP", at), part, "add", ("r", "t")), *einsums), ("O",),
    )
    g = torch.Generator().manual_seed(1)
    more = {"QR": torch.randn(1, 4, 40, 2, 12, generator=g), "KR": torch.randn(1, 40, 2, 12, generator=g)}
    return verify(c), {**base.inputs(), **more}, base.sizes


def test_two_products_and_keys_of_all_heads() -> None:
    c, x, sizes = latent()
    close(c, x, sizes)
    assert "PRODUCTS = 2" in kernel(c).source


def shared(table: Mapping[Expr, Expr], heads: Mapping[str, int]) -> tuple[Cascade, dict[str, torch.Tensor], Mapping[str, int]]:
    """An attention of four heads whose keys or values are read otherwise: fewer heads of some tensors."""
    base = strategies.attention(lambda s: ex.where(CAUSAL, s, -float("inf")), strategies.ROWS["softmax"], h=4)
    einsums = tuple(Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in base.cascade.einsums)
    shapes = tuple(replace(t, shape=(1, heads[t.name], *t.shape[2:])) if t.name in heads else t for t in base.cascade.tensors)
    x = {n: t[:, : heads.get(n, 4)] for n, t in base.inputs().items()}
    return verify(replace(base.cascade, tensors=shapes, einsums=einsums)), x, base.sizes


@pytest.mark.slow
@pytest.mark.parametrize("keys", [ex.const(0), H // 2, H])
@pytest.mark.parametrize("values", [ex.const(0), H // 2, H])
def test_heads_that_share_keys_otherwise_than_values(keys: Expr, values: Expr) -> None:
    many = {ex.const(0): 1, H // 2: 2, H: 4}
    table = {ex.load("K", (B, H, M, E), "f32"): ex.load("K", (B, keys, M, E), "f32"),
             ex.load("V", (B, H, M, F), "f32"): ex.load("V", (B, values, M, F), "f32")}
    close(*shared(table, {"K": many[keys], "V": many[values]}))


@pytest.mark.slow
def test_what_is_computed_beforehand() -> None:
    """Scores over relative positions, a small product that is whole before the loop, read at p − m."""
    base = strategies.attention(lambda s: s, strategies.ROWS["softmax"], p=40, m=40)
    r, qk = ex.index("r"), ex.load("QK", (B, H, P, M), "f32")
    far = ex.minimum(ex.maximum(P - M + 8, 0), 15)
    part = ex.load("Q", (B, H, P, E), "f32") * ex.load("R", (r, E), "f32")
    table = {qk: qk + ex.load("C", (B, H, P, far), "f32")}
    einsums = [Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in base.cascade.einsums]
    shapes = (Shape("R", (16, 16)), Shape("C", (1, 2, strategies.QUERIES, 16)))
    c = verify(Cascade(
        "relative", (*base.cascade.ranks, Rank("r", 16)), (*base.cascade.tensors, *shapes),
        (Einsum(Access("C", (B, H, P, r)), part, "add", ("e",)), *einsums), ("O",),
    ))
    close(c, {**base.inputs(), "R": torch.randn(16, 16, generator=torch.Generator().manual_seed(3))}, base.sizes, atol=2e-5)


@pytest.mark.slow
def test_an_operand_that_is_computed() -> None:
    """A rotation in the query, values held as integers."""
    angle, half = ex.cast(P, "f32") * 0.1, (E + 8) % 16
    q, turned = ex.load("Q", (B, H, P, E), "f32"), ex.load("Q", (B, H, P, half), "f32")
    rotated = q * ex.unary("cos", angle) + ex.where(E < 8, -turned, turned) * ex.unary("sin", angle)
    base = strategies.attention(lambda s: s, strategies.ROWS["softmax"])
    table = {q: rotated, ex.load("V", (B, H, M, F), "f32"): ex.cast(ex.load("V", (B, H, M, F), "i8"), "f32")}
    einsums = tuple(Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in base.cascade.einsums)
    shapes = tuple(t if t.name != "V" else Shape("V", t.shape, "i8") for t in base.cascade.tensors)
    c = verify(replace(base.cascade, tensors=shapes, einsums=einsums))
    values = torch.randint(-9, 9, (1, 2, 33, 16), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    close(c, {**base.inputs(), "V": values}, base.sizes, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [windows, no_batch])
def test_other_batch_ranks(make: object) -> None:
    """Three batch ranks with a mask for one and a table for another; none at all."""
    case: Case = make()  # type: ignore[operator]
    close(case.cascade, case.inputs(), case.sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_fill", "small_added"])
def test_scores_that_a_small_fill_does_not_drown(name: str) -> None:
    """A fill of -1e9 or -1e4 hides keys only while the scores are small: larger ones must see the keys as written."""
    case = VARIANTS[name](p=100)
    x = case.inputs()
    x["Q"] *= 3e9 if name == "small_fill" else 1e4
    exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
    eager = evaluate(case.cascade, x, case.sizes)["O"]
    made = kernel(case.cascade)
    out = made.run(x, {n: case.sizes[n] for n in made.sizes})
    steady = (eager - exact).abs().amax(-1) < 1e-3
    assert float(steady.double().mean()) > 0.9
    torch.testing.assert_close(out.double()[steady], exact[steady], rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_a_bound_that_no_weight_reads_is_that_of_the_scores(scale: float) -> None:
    """The weights are written over the scores by the very loop that is the bound's."""

    def rule(b: papers.Builder, s: Expr) -> Expr:
        return ex.unary("sigmoid", s) / (ex.unary("abs", b.put("GM", "bhp", s, "max", "m")) + 1.0)

    c = papers.attention("bounded after", rule, lambda b, qk: qk * scale).with_sizes({"E": 16, "F": 16})
    x = {n: torch.randn(1, 2, 90, 16) for n in "QKV"}
    close(c, x, {"B": 1, "H": 2, "P": 90, "M": 90})


def test_many_small_weights_add_up() -> None:
    """Beside a large sum small numbers are lost one by one, not together: keys are summed up by tiles."""
    case, x = long_sum(64)
    made = kernel(case.cascade)
    out = made.run(x, {n: case.sizes[n] for n in made.sizes})
    assert relative_rms(out, evaluate(case.cascade, x, case.sizes, widen=True)["O"]) < 6e-7


def test_a_divisor_of_zero_ends_no_process() -> None:
    """PyTorch raises there; where the divisor is none the blocks are what they are."""

    def score(b: papers.Builder, qk: Expr) -> Expr:
        block = b.input("Block", "h", "i64")
        return ex.where((P // block >= M // block), qk, -math.inf)

    c = papers.attention("blocks", papers.softmax, score).with_sizes({"E": 16, "F": 16})
    x = {n: torch.randn(1, 2, 50, 16) for n in "QKV"}
    sizes = {"B": 1, "H": 2, "P": 50, "M": 50}
    close(c, {**x, "Block": torch.tensor([7, 16])}, sizes)
    # the tiles of few scores are not looked for
    kernel(c).run({**x, "Block": torch.tensor([0, 16])}, {n: sizes[n] for n in kernel(c).sizes})


def test_not_a_number_stays_one() -> None:
    """A NaN among the keys makes the rows NaN that see it, though the largest score is found without it."""
    case = VARIANTS["causal"](p=70, b=1)
    x = case.inputs()
    x["K"][0, 1, 40, 3] = float("nan")
    out = close(case.cascade, x, case.sizes)
    assert bool(out[0, 1, 40:].isnan().all())
    assert not bool(out[0, 1, :40].isnan().any())


def test_the_output_needs_no_copy() -> None:
    """The loop writes as models put heads together: the operator hands its memory on."""
    case = VARIANTS["causal"](p=70, b=1)
    x = case.inputs()
    out = kernel(case.cascade).run(x, {})
    assert out.stride() == operator.allocate(Program(case.cascade, FUSED), [x[n] for n in "QKV"], []).stride()
    assert torch.equal(operator.call(case.cascade, FUSED, x, {}), out)


def test_two_threads_at_the_first_call() -> None:
    case = build(masked((M <= P) & (P - M < 21)), square=True)
    made, x = kernel(case.cascade), case.inputs()
    out: list[torch.Tensor] = []
    workers = [threading.Thread(target=lambda: out.append(made.run(x, {}))) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(out) == 4
    assert all(torch.equal(o, out[0]) for o in out)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_file_stands_alone(tmp_path: Path) -> None:
    """The printed file imports torch and Python's own library, holds its C++, and gives the same elsewhere."""
    case = VARIANTS["causal_padding"](dtype="bf16")
    made, x = kernel(case.cascade), case.inputs(torch.bfloat16)
    found = set(re.findall(r"^(?:import|from) ([\w.]+)", made.source, re.M)) - {"torch", "__future__"}
    assert found <= {*sys.stdlib_module_names, "collections.abc"}
    (tmp_path / "kernel.py").write_text(made.source)
    torch.save((x, made.run(x, {})), tmp_path / "x.pt")
    code = (
        "import sys, torch, kernel; x, o = torch.load('x.pt');"
        "assert torch.equal(kernel.attention(*x.values()), o); assert 'reattend' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("name", ["causal_padding", "segments", "decode", "small_fill", "bias"])
def test_the_file_is_clean(name: str, tmp_path: Path) -> None:
    ruff = pytest.importorskip("ruff.__main__", reason="ruff is a development tool")
    path = tmp_path / "kernel.py"
    path.write_text(kernel(VARIANTS[name]().cascade).source)
    command = [ruff.find_ruff_bin(), "check", "--isolated", "--select", "E,F,W,B,UP", "--ignore", "E501,B905", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def holes(c: Cascade) -> str:
    text = kernel(c).source
    start = text.index("struct Program")
    return text[start : text.index("\n};", start)]


def test_what_a_row_shares_is_computed_once_a_row() -> None:
    """Slopes, segments of the query and pointers to the row's bias are fields of Row; the loop over keys has the rest."""
    text = holes(VARIANTS["alibi"]().cascade)
    row, step = text.split("static void start")
    assert "slope[h * slope_0]" in row
    assert "slope_0" not in step
    assert "bias + h * bias_1 + p * bias_2" in holes(VARIANTS["bias"]().cascade)


@pytest.mark.parametrize(("name", "fetched"), [("bias", 1), ("alibi", 0), ("padding", 0), ("causal", 0)])
def test_what_has_an_element_for_each_query_and_key_is_fetched_before(name: str, fetched: int) -> None:
    text = holes(VARIANTS[name]().cascade)
    assert text.count("__builtin_prefetch") == fetched


def test_costly_terms_over_the_distance_are_tabulated() -> None:
    """The host computes a cosine once a diagonal, for all lengths; what is quickly computed stays in the loop."""
    factor = ex.unary("cos", ex.cast(P - M, "f32") * 0.1)
    case = build(lambda s: masked((M <= P) & (P - M < 30))(s * factor), p=40, m=70)
    assert "cos" not in holes(case.cascade)
    assert re.search(r"\bp(_1)? - m < 30", holes(case.cascade))
    for p, m in ((40, 70), (70, 40), (1, 33), (33, 1)):
        case = build(lambda s: masked((M <= P) & (P - M < 30))(s * factor), p=p, m=m)
        close(case.cascade, case.inputs(), case.sizes)


def test_full_tiles_have_no_mask() -> None:
    """Where every key is kept nothing asks for the mask, and nobody reads what it is made of."""
    partial, full = holes(VARIANTS["segments"]().cascade).split("} else {")
    assert "seg" in partial
    assert "seg" not in full.split("INLINE void finish")[0]


def test_exponentials_are_by_base_two_for_narrow_operands() -> None:
    assert "exp_(" not in holes(VARIANTS["causal"](dtype="bf16").cascade)
    assert "exp2_(" not in holes(VARIANTS["causal"](dtype="f32").cascade)


def test_constants_are_one_factor_for_narrow_operands() -> None:
    assert "qk * 0.05f" in holes(VARIANTS["softcap"](dtype="bf16").cascade)
    assert "/ 5.0f" in holes(VARIANTS["softcap"](dtype="f32").cascade)


def test_scores_and_weights_in_memory_are_reduced_row_by_row() -> None:
    """Largest score and sum of weights by the loop's own reductions; a plain product needs no pass of its own."""
    text = holes(VARIANTS["causal"]().cascade)
    assert "row_max(x0, n, gm_old)" in text
    assert "max_(gm_old, row_max(x0, n, -INFINITY) * 0.25f)" in text
    assert "row_sum(w, n)" in text
    for scale in (1.0, 0.25):
        assert holes(build(lambda s: s, scale=scale).cascade).count("for (int i = 0; i < n; i++)") == 1


def test_one_division_a_row_where_the_sum_is_no_less_than_one() -> None:
    assert "1.0f / sd" in holes(VARIANTS["causal"]().cascade)
    assert "acc[i] / ss" in holes(VARIANTS["square"]().cascade)


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(c: Cascade, mapping: TileMapping = FUSED) -> str:
    made = cpu.build(c, mapping)
    assert isinstance(made, Refusal)
    return made.reason


def test_refusals() -> None:
    case = VARIANTS["causal"]()
    assert "multiples of 16 × 32" in refused(case.cascade, TileMapping(8, 32, body="fused"))
    assert "float64" in refused(VARIANTS["causal"](dtype="f64").cascade)
    wide = case.cascade.tensor
    loose = replace(
        case.cascade,
        ranks=tuple(r if r.name != "e" else Rank("e", size("d")) for r in case.cascade.ranks),
        tensors=tuple(
            replace(t, shape=(*t.shape[:3], size("d"))) if t.name in ("Q", "K") else t for t in wide.values()
        ),
    )
    assert "is no constant" in refused(verify(loose))


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.compiler.cache_clear()
    try:
        assert "install g++ or clang++" in refused(build(masked(M <= P - 3)).cascade)
    finally:
        monkeypatch.undo()
        native.compiler.cache_clear()


def test_a_compiler_that_fails_says_so_at_the_first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = build(masked(M <= P - 5), square=True)
    made = kernel(case.cascade)
    monkeypatch.setenv("CXX", "false")
    module = sys.modules[f"reattend_generated_{cache.key(made.source)}"]
    module.compiler.cache_clear()
    with pytest.raises(RuntimeError, match="could not compile the kernel; set CXX"):
        made.prepare()


def test_memory_of_another_kind_is_refused() -> None:
    case = VARIANTS["causal"]()
    made, x = kernel(case.cascade), case.inputs()
    with pytest.raises(ValueError, match=r"K is torch.float64 \(2, 4, 37, 16\) on cpu; this kernel reads torch.float32"):
        made.run({**x, "K": x["K"].double()}, {})
    with pytest.raises(ValueError, match=r"V is torch.float32 \(2, 4, 30, 16\)"):
        made.run({**x, "V": x["V"][:, :, :30]}, {})


def test_small_fills_ask_for_small_scores() -> None:
    """Tiles under a small fill are skipped where a bound on the scores says that it hides them."""
    assert "classes(s, reach(q, k, 0.25) <= LIMIT)" in kernel(VARIANTS["small_added"]().cascade).source
