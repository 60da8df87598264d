"""SDPA and FlexAttention read off the cascade: what they are given, what they compute, and what they must not take."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from reattend.codegen.vendor import use as vendor
from reattend.codegen.vendor.call import VendorCall
from reattend.codegen.vendor.sdpa import BACKENDS
from reattend.cost_model.devices.device import Device, device
from reattend.cost_model.time.predict import VENDORS
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import evaluate
from reattend.patterns.verdict import Refusal
from tests import strategies
from tests.codegen.attentions import CAUSAL, VARIANTS, Case, M, P, S, T, aux, build, masked, no_batch, windows

OWN_RULE = ("sigmoid", "square", "dropped")
NOT_SDPA = ("small_fill", "softcap", "sinks", "cosine_cap", "checkerboard", "nan_padding", *OWN_RULE)
# FlexAttention gives rows without a key 0; on the CPU it gives no log-sum-exp.
NOT_FLEX = ("padding", "causal_padding", "checkerboard", "nan_padding", *OWN_RULE)


def taken(found: VendorCall | Refusal) -> VendorCall:
    assert not isinstance(found, Refusal), str(found)
    return found


def check(call: VendorCall, case: Case, dtype: torch.dtype = torch.float32, atol: float = 3e-6) -> None:
    x = case.inputs(dtype)
    exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
    out = call.run(x, case.sizes)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(NOT_SDPA)))
def test_sdpa(name: str) -> None:
    case = VARIANTS[name]()
    # a fill of -1e4 rounds the scores that it is added to
    check(taken(vendor.sdpa(case.cascade)), case, atol=1e-3 if name == "small_padding" else 3e-6)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["causal", "alibi", "padding", "gqa"])
def test_sdpa_in_narrow_types(name: str, dtype: str) -> None:
    case = VARIANTS[name](dtype=dtype)
    made = vendor.sdpa(case.cascade)
    if (name, dtype) == ("padding", "f16"):
        assert isinstance(made, Refusal)
        assert "drowns" in made.reason
        return
    check(taken(made), case, {"bf16": torch.bfloat16, "f16": torch.float16}[dtype], 3e-2)


@pytest.mark.parametrize(("of", "widened"), [("bf16", False), ("f16", True)])
def test_a_bias_of_the_operands_type_is_not_widened(of: str, widened: bool) -> None:
    """PyTorch's kernels take it as it is, and it is as large as all scores."""
    bias = ex.load("bias", (ex.const(0), ex.index("h"), P, M), of)
    case = build(lambda s: s + bias, aux=(aux("bias", (1, 4, S, T), of),), dtype="bf16")
    call = taken(vendor.sdpa(case.cascade))
    assert (".to(torch.float32)" in call.source) == widened
    use = vendor.use(call, device("cpu"), case.sizes)
    assert not isinstance(use, Refusal)
    assert (use.mask_dtype, use.built_elements > 0) == (("f32", True) if widened else ("bf16", False))
    check(call, case, torch.bfloat16, 3e-2)


def test_a_bias_is_as_wide_as_the_operands_once_they_have_one_type() -> None:
    """Keys in fp32 make the queries fp32 as well, and torch takes no bias narrower than them."""
    bias = ex.load("bias", (ex.const(0), ex.index("h"), P, M), "bf16")
    case = build(lambda s: s + bias, aux=(aux("bias", (1, 4, S, T), "bf16"),), dtype="bf16")

    def widened(e: ex.Expr) -> ex.Expr:
        return ex.substitute(e, {x: ex.load("K", x.args, "f32") for x in ex.loads(e) if x.attr == "K"})

    tensors = tuple(replace(t, dtype="f32") if t.name == "K" else t for t in case.cascade.tensors)
    einsums = tuple(replace(e, body=widened(e.body)) for e in case.cascade.einsums)
    mixed = replace(case.cascade, tensors=tensors, einsums=einsums)
    x = {n: t.float() if n == "K" else t for n, t in case.inputs(torch.bfloat16).items()}
    out = taken(vendor.sdpa(mixed)).run(x, case.sizes)
    torch.testing.assert_close(out.double(), evaluate(mixed, x, case.sizes, widen=True)["O"], rtol=0, atol=3e-2)


@pytest.mark.parametrize(("name", "reason"), [
    ("softcap", "no multiple of the product"), ("cosine_cap", "no multiple"), ("sinks", "ends with more"),
    ("checkerboard", "gives NaN in the model and 0 in SDPA"), ("nan_padding", "gives NaN"), ("sigmoid", "no softmax"),
    ("square", "no softmax"), ("small_fill", "drowns them only while they are small"),
])
def test_sdpa_refuses(name: str, reason: str) -> None:
    found = vendor.sdpa(VARIANTS[name]().cascade)
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_is_causal_only_where_it_is() -> None:
    """As many keys as queries, `key ≤ query`, nothing else."""
    assert taken(vendor.sdpa(VARIANTS["causal"]().cascade)).causal
    assert taken(vendor.sdpa(VARIANTS["causal_added"]().cascade)).causal
    assert taken(vendor.sdpa(build(masked(P >= M), square=True).cascade)).causal
    assert taken(vendor.sdpa(build(masked(P + 1 > M), square=True).cascade)).causal
    for other in (
        build(masked(CAUSAL), p=9, m=9), build(masked(P > M), square=True, zero=True),
        build(masked(M <= P + 1), square=True), VARIANTS["prefix"](), VARIANTS["window"](),
    ):
        call = vendor.sdpa(other.cascade)
        assert isinstance(call, Refusal) or (not call.causal and call.mask is not None)


def test_masks_keep_the_models_rows() -> None:
    """Boolean where a row without a key gives 0 or cannot be; numbers, as written, where it gives the uniform mean."""
    kinds = {"sdpa_padding": "b1", "window": "b1", "padding": "f32", "causal_padding": "f32", "bias": "f32"}
    for name, kind in kinds.items():
        call = taken(vendor.sdpa(VARIANTS[name]().cascade))
        assert call.mask is not None
        assert call.mask.dtype == kind, name
    for name in ("padding", "causal_padding", "sdpa_padding"):
        case = VARIANTS[name](p=19, m=19)
        x = case.inputs()
        x["pad"][:, :7] = False
        x["pad"][1] = False
        exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
        out = taken(vendor.sdpa(case.cascade)).run(x, case.sizes)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["causal_padding", "alibi", "bias", "gqa", "window", "sdpa_padding", "segments"])
def test_sdpa_never_falls_to_the_slow_kernel(name: str) -> None:
    case = VARIANTS[name]()
    call = taken(vendor.sdpa(case.cascade))
    x = case.inputs()
    with profile() as p:
        call.run(x, case.sizes)
    names = {e.key for e in p.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


def test_sdpa_passes_gradients() -> None:
    case = VARIANTS["causal_padding"]()
    x = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in case.inputs().items()}
    taken(vendor.sdpa(case.cascade)).run(x, case.sizes).sum().backward()  # type: ignore[no-untyped-call]
    assert all(x[n].grad is not None and bool(x[n].grad.isfinite().all()) for n in "QKV")  # type: ignore[union-attr]


def test_more_batch_ranks() -> None:
    """Three batch ranks, one of them only in the queries, and none at all."""
    for case in (windows(), no_batch()):
        check(taken(vendor.sdpa(case.cascade)), case)


@pytest.mark.parametrize("name", ["causal", "causal_padding", "softcap"])
def test_both_take_fake_tensors(name: str) -> None:
    """A graph that holds the call can be traced: shapes and types as in the real call."""
    case = VARIANTS[name]()
    for made in (vendor.sdpa(case.cascade), vendor.flex(case.cascade)):
        if isinstance(made, Refusal):
            continue
        x = case.inputs()
        with FakeTensorMode() as mode:
            out = made.run({n: mode.from_tensor(t) for n, t in x.items()}, case.sizes)
        assert out.shape == evaluate(case.cascade, x, case.sizes)["O"].shape
        # nothing of the trace stays behind
        assert type(made.run(x, case.sizes)) is torch.Tensor if made.name == "sdpa" else True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["window", "softcap", "cosine_cap", "segments", "alibi", "gqa", "decode", "sdpa_padding"])
def test_flex(name: str) -> None:
    case = VARIANTS[name]()
    check(taken(vendor.flex(case.cascade)), case)


@pytest.mark.slow
def test_flex_skips_by_our_tiles() -> None:
    """Several blocks a row, and lengths that are no multiple of the block; one compilation serves all calls."""
    call = taken(vendor.flex(VARIANTS["window"]().cascade))
    for length in (300, 257, 128):
        check(call, VARIANTS["window"](p=length))


MORE_THREADS = """
import torch
from reattend.codegen.vendor import use as vendor
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import evaluate
from tests.codegen.attentions import VARIANTS

case = VARIANTS["window"](p=600)
call, x = vendor.flex(case.cascade), case.inputs()
exact = evaluate(case.cascade, x, case.sizes, widen=True)["O"]
for threads in (1, 2):
    torch.set_num_threads(threads)
    for _ in range(30):
        torch.testing.assert_close(call.run(x, case.sizes).double(), exact, rtol=0, atol=3e-6)
"""


@pytest.mark.slow
def test_flex_compiled_for_one_thread_runs_on_two(tmp_path: Path) -> None:
    """In a process of its own: PyTorch's kernel keeps room for as many threads as it was compiled for, and would write past it."""
    done = subprocess.run(
        [sys.executable, "-c", MORE_THREADS], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", NOT_FLEX)
def test_flex_refuses(name: str) -> None:
    found = vendor.flex(VARIANTS[name]().cascade)
    assert isinstance(found, Refusal)
    assert "no softmax" in found.reason or "0 in FlexAttention" in found.reason


def test_flex_on_the_cpu() -> None:
    sinks = taken(vendor.flex(VARIANTS["sinks"]().cascade))
    plain = taken(vendor.flex(VARIANTS["plain"]().cascade))
    cpu, gpu = device("cpu"), device("h200")
    assert "log-sum-exp" in str(vendor.use(sinks, cpu, {}))
    assert "no backward" in str(vendor.use(plain, cpu, {}, gradients=True))
    assert backend(plain, cpu, {}) == "flex"
    assert backend(sinks, gpu, {}) == "flex"


def backend(call: VendorCall, where: Device, sizes: Mapping[str, int]) -> str:
    found = vendor.use(call, where, sizes)
    assert not isinstance(found, Refusal)
    return found.backend


def test_backends() -> None:
    """Each kernel's conditions, with the reason."""
    h200, a100, cpu = device("h200"), device("a100"), device("cpu")
    plain = VARIANTS["plain"](dtype="bf16", e=64)
    call = taken(vendor.sdpa(plain.cascade))
    assert backend(call, h200, plain.sizes) == "cudnn"
    assert backend(call, a100, plain.sizes) == "flash"
    assert backend(call, cpu, plain.sizes) == "flash"
    window = VARIANTS["window"](dtype="bf16", e=64)
    masked_call = taken(vendor.sdpa(window.cascade))
    found = vendor.backends(masked_call, a100, window.sizes)
    assert "no mask" in found["flash"]
    assert backend(masked_call, a100, window.sizes) == "efficient"
    found_use = vendor.use(masked_call, a100, window.sizes)
    assert not isinstance(found_use, Refusal)
    assert found_use.mask_elements == 37 * 37
    wide = VARIANTS["wide_values"](dtype="bf16")
    assert backend(taken(vendor.sdpa(wide.cascade)), cpu, wide.sizes) == "math"
    single = VARIANTS["plain"](e=64)
    found = vendor.backends(taken(vendor.sdpa(single.cascade)), h200, single.sizes)
    assert "f32" in found["cudnn"]
    assert backend(taken(vendor.sdpa(single.cascade)), h200, single.sizes) == "efficient"


@given(strategies.programs())
def test_drawn_programs(program: strategies.Program) -> None:
    """Whatever SDPA takes it computes as the model does, rows without a key included.

    Every element is right in exact arithmetic, or what the model's own arithmetic makes of it: where −1e9 is added to all
    scores of a row, float32 drowns them and float64 does not. Where it is −1e4, the order of the sums decides on the last
    digits of what is left of them.
    """
    call = vendor.sdpa(program.cascade)
    if isinstance(call, Refusal):
        return
    x = program.inputs()
    exact = evaluate(program.cascade, x, program.sizes, widen=True)["O"]
    written = evaluate(program.cascade, x, program.sizes)["O"].double()
    out = call.run(x, program.sizes).double()
    assert torch.equal(out.isnan(), written.isnan())
    off = torch.minimum((out - exact).abs(), (out - written).abs())
    scores = evaluate(replace(program.cascade, outputs=("S",)), x, program.sizes, widen=True)["S"]
    # of the scores that count in a row, two roundings; beyond −1e4 nothing is left of them
    rounding = 2 * torch.finfo(torch.float32).eps * scores.amax(-1, keepdim=True).abs().nan_to_num(0.0, 0.0, 0.0)
    assert bool((off.nan_to_num() <= 1e-4 + rounding.clamp(max=5e-3)).all())


def test_nothing_is_made_that_is_not_used() -> None:
    text = taken(vendor.sdpa(VARIANTS["plain"]().cascade)).source
    assert "mask" not in text
    assert "arange" not in text


def test_the_model_of_times_knows_every_kernel_of_sdpa() -> None:
    assert set(BACKENDS) | {"flex"} == set(VENDORS)
