"""CPU kernels against the oracle in float64, in every type, for masks, biases, row rules and head groups alike."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reattend
from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.forms.form import rows_keep_a_key
from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from tests import strategies
from tests.codegen.attentions import CAUSAL, VARIANTS, Case, aux, build, masked
from tests.tiers import few

pytestmark = pytest.mark.thin(2)

# What torch's SDPA itself may be off by, in the units in which its own error is measured.
RMS, MOST = 1.2, 2.5
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OWN = ("softcap", "sigmoid", "square", "cosine_cap", "dropped")
SDPA = sorted(set(VARIANTS) - set(OWN))
BODIES = ("sdpa", "product")


def kernel(case: Case, mapping: TileMapping) -> cpu.CpuKernel:
    k = cpu.build(case.cascade, mapping)
    assert not isinstance(k, Refusal), str(k)
    return k


def run(case: Case, mapping: TileMapping, x: dict[str, torch.Tensor]) -> torch.Tensor:
    k = kernel(case, mapping)
    return k.run(x, {n: case.sizes[n] for n in k.sizes})


def allowed(case: Case, x: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """RMS and largest error of torch's SDPA on the same operands, given all that the score adds as a tensor.

    Where SDPA cannot express the attention: of the eager code.
    """
    if isinstance(cpu.build(case.cascade, TileMapping(64, 64, body="sdpa")), Refusal):
        e = evaluate(case.cascade, x, case.sizes)["O"].double() - evaluate(case.cascade, x, case.sizes, widen=True)["O"]
        return float(e.pow(2).mean().sqrt()), float(e.abs().max())
    added = evaluate(replace(case.cascade, outputs=("S",)), {**x, "Q": x["Q"] * 0}, case.sizes, widen=True)["S"]
    q, k, v = (x[n].double() for n in "QKV")
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    wide = max(q.shape[-1], v.shape[-1])
    q, k, v = (torch.nn.functional.pad(t, (0, wide - t.shape[-1])) for t in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=0.25)
    rough = torch.nn.functional.scaled_dot_product_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=added.float(), scale=0.25
    )
    e = (rough.double() - exact)[~exact.isnan()]
    return float(e.pow(2).mean().sqrt()), float(e.abs().max())


def check(case: Case, mapping: TileMapping, dtype: torch.dtype, seed: int = 0) -> None:
    x = case.inputs(dtype, seed)
    out = run(case, mapping, x)
    (name,) = case.cascade.outputs
    exact = evaluate(case.cascade, x, case.sizes, widen=True)[name]
    assert out.shape == exact.shape
    assert out.dtype == dtype
    assert torch.equal(out.isnan(), exact.isnan())
    e = (out.double() - exact)[~exact.isnan()]
    rms, most = allowed(case, x, dtype)
    ulp = torch.finfo(dtype).eps * float(exact[~exact.isnan()].abs().max())
    assert float(e.pow(2).mean().sqrt()) <= max(RMS * rms, ulp)
    assert float(e.abs().max()) <= max(MOST * most, ulp)


@pytest.mark.parametrize("dtype", few(TYPES, "f32", "bf16"))
@pytest.mark.parametrize("name", SDPA)
def test_sdpa_body(name: str, dtype: str) -> None:
    check(VARIANTS[name](dtype=dtype), TileMapping(8, 8, body="sdpa"), TYPES[dtype])


@pytest.mark.parametrize("dtype", few(TYPES, "f32", "bf16"))
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_product_body(name: str, dtype: str) -> None:
    check(VARIANTS[name](dtype=dtype), TileMapping(8, 8, body="product"), TYPES[dtype])


def interleaved(dtype: str) -> Case:
    """Head h reads the keys and values of head h mod 2: no view of either."""
    found = build(masked(CAUSAL), square=True, group=2, dtype=dtype)
    table = {x: ex.load(str(x.attr), (x.args[0], ex.index("h") % 2, *x.args[2:]), x.dtype)
             for e in found.cascade.einsums for x in e.reads if str(x.attr) in ("K", "V")}
    einsums = tuple(replace(e, body=ex.substitute(e.body, table)) for e in found.cascade.einsums)
    return replace(found, cascade=replace(found.cascade, einsums=einsums))


@pytest.mark.parametrize("dtype", few(TYPES, "bf16"))
@pytest.mark.parametrize("body", [*BODIES, "slices", "fused"])
def test_operands_that_are_no_view(body: str, dtype: str) -> None:
    case = interleaved(dtype)
    x = case.inputs(TYPES[dtype])
    size = 32 if body == "fused" else 8
    out = run(case, TileMapping(size, size, body=body), x)
    exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol={"f32": 1e-5, "f16": 4e-3, "bf16": 3e-2}[dtype])


@pytest.mark.parametrize("name", OWN)
def test_sdpa_is_refused(name: str) -> None:
    refused = cpu.build(VARIANTS[name]().cascade, TileMapping(8, 8, body="sdpa"))
    assert isinstance(refused, Refusal)
    assert re.search("no multiple of the product|no softmax", refused.reason)


@pytest.mark.parametrize("body", BODIES)
def test_a_temperature_for_every_head(body: str) -> None:
    """A factor of a head goes into the queries; in narrow types that would round it, so there it stays in the score."""

    def learned(dtype: str) -> Case:
        factor = ex.load("factor", (ex.index("h"),), "f32")
        return build(lambda s: masked(CAUSAL)(s * factor), square=True, dtype=dtype, aux=(aux("factor", (4,)),))

    check(learned("f32"), TileMapping(8, 8, body=body), torch.float32)
    assert isinstance(cpu.build(learned("bf16").cascade, TileMapping(8, 8, body="sdpa")), Refusal)


@given(strategies.programs(), st.sampled_from(BODIES))
def test_drawn_programs(program: strategies.Program, body: str) -> None:
    """Scores, masks and row rules that no file names."""
    k = cpu.build(program.cascade, TileMapping(8, 16, body=body))
    if isinstance(k, Refusal):
        assert body == "sdpa", str(k)
        return
    x = program.inputs()
    out = k.run(x, {n: program.sizes[n] for n in k.sizes})
    exact = evaluate(program.cascade, x, program.sizes, widen=True)["O"]
    eager = evaluate(program.cascade, x, program.sizes)["O"]
    assert torch.equal(out.isnan(), exact.isnan())
    worst = [float((t - exact)[~exact.isnan()].abs().max()) if not exact.isnan().all() else 0.0 for t in (out, eager)]
    assert worst[0] <= max(MOST * worst[1], 1e-6), program.label


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("tiles", few([[4, 16], [16, 4], [12, 8], [64, 64], [1, 1]], [12, 8], [1, 1]))
@pytest.mark.parametrize("name", ["causal", "window", "causal_padding", "segments", "prefix", "gqa"])
def test_tilings(name: str, tiles: list[int], body: str) -> None:
    check(VARIANTS[name](p=100), TileMapping(tiles[0], tiles[1], body=body), torch.float32)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("length", few([1, 2, 37, 63, 111], 1, 37))
@pytest.mark.parametrize("name", ["window", "causal", "causal_padding", "alibi"])
def test_lengths(name: str, length: int, body: str) -> None:
    check(VARIANTS[name](p=length), TileMapping(16, 16, body=body), torch.float32)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["padding", "sdpa_padding", "causal_padding", "nan_padding"])
def test_rows_without_a_key(name: str, body: str) -> None:
    """The uniform mean, 0 and NaN, as the model has it."""
    case = VARIANTS[name](p=100, m=100)
    x = case.inputs()
    x["pad"][0, :9] = False
    x["pad"][1] = False
    out = run(case, TileMapping(8, 8, body=body), x)
    exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-6, equal_nan=True)
    assert bool(exact.isnan().any()) == (name == "nan_padding")


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["small_fill", "small_added"])
def test_scores_that_a_small_fill_does_not_drown(name: str, body: str) -> None:
    """A fill of -1e9 or -1e4 hides keys only while the scores are small: larger ones must see the keys as written."""
    case = VARIANTS[name](p=100)
    x = case.inputs()
    x["Q"] *= 3e9 if name == "small_fill" else 1e4
    exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
    eager = evaluate(case.cascade, x, case.sizes)["O"]
    out = run(case, TileMapping(8, 8, body=body), x)
    # rows whose weights are all at one key or nearly so: what rounding of such scores leaves comparable
    steady = (eager - exact).abs().amax(-1) < 1e-3
    assert float(steady.double().mean()) > 0.9
    torch.testing.assert_close(out.double()[steady], exact[steady], rtol=0, atol=1e-3)
    skipped = evaluate(VARIANTS["causal" if name == "small_fill" else "window"](p=100).cascade, x, {"n": 2, "s": 100})["O"]
    assert float((exact - skipped).abs().max()) > 0.1


def test_the_file_stands_alone(tmp_path: Path) -> None:
    """The printed file imports torch only, and gives the same elsewhere."""
    case = VARIANTS["causal_padding"]()
    k = kernel(case, TileMapping(8, 8, body="sdpa"))
    assert set(re.findall(r"^(?:import|from) (\w+)", k.source, re.M)) <= {"__future__", "collections", "functools", "typing", "torch", "math"}
    x = case.inputs()
    (tmp_path / "kernel.py").write_text(k.source)
    torch.save((x, run(case, TileMapping(8, 8, body="sdpa"), x)), tmp_path / "x.pt")
    code = (
        "import sys, torch, kernel; x, o = torch.load('x.pt');"
        "assert torch.equal(kernel.attention(*x.values()), o); assert 'reattend' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["causal_padding", "sinks", "segments", "decode", "alibi", "small_fill"])
def test_the_file_is_clean(name: str, body: str, tmp_path: Path) -> None:
    ruff = pytest.importorskip("ruff.__main__", reason="ruff is a development tool")
    path = tmp_path / "kernel.py"
    path.write_text(kernel(VARIANTS[name](), TileMapping(8, 8, body=body)).source)
    command = [ruff.find_ruff_bin(), "check", "--isolated", "--select", "E,F,W,B,UP", "--ignore", "E501,B905", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["causal", "gqa", "causal_padding", "window"])
def test_strided_operands(name: str, body: str) -> None:
    """Operands as models hand them over: heads inside tokens, every second row of something larger."""
    case = VARIANTS[name](p=40)
    x = case.inputs()
    strange = dict(x)
    for n in "QKV":
        strange[n] = x[n].transpose(1, 2).contiguous().transpose(1, 2)
    strange["V"] = torch.stack([x["V"], x["V"]], -1)[..., 0]
    a, b = (run(case, TileMapping(8, 8, body=body), y) for y in (x, strange))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_nobody_looks_for_rows_without_a_key_where_there_are_none() -> None:
    """Under a causal −∞ each row keeps its own key; behind padding a row may keep none, and then yields NaN."""
    causal = kernel(build(masked(CAUSAL), square=True), TileMapping(8, 8, body="sdpa"))
    assert "empty=" not in causal.source
    assert "empty=nan" in kernel(VARIANTS["nan_padding"](), TileMapping(8, 8, body="sdpa")).source


def test_no_witness_proves_nothing() -> None:
    """A mask that keeps no key leaves no witness; "no condition" would say that every row keeps one."""
    view = attention(VARIANTS["causal"]().cascade)
    assert isinstance(view, Attention)
    assert rows_keep_a_key(view, CAUSAL) == ()
    assert rows_keep_a_key(view, ex.FALSE) != ()


def test_a_package_that_is_not_installed_prints_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on the path has no metadata."""

    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    case = VARIANTS["causal"]()
    assert f"reattend {reattend.__version__}" in kernel(case, TileMapping(64, 64, body="sdpa")).source
