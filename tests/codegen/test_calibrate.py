"""Calibration with our kernels: what is refused, what is checked, the cascades and the kernel it times a GPU with."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reattend.codegen import calibrate, calibrate_gpu
from reattend.cost_model.cost import Cost
from reattend.cost_model.device import Device, device, shipped
from reattend.cost_model.predict import tiles_of
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import Mapping
from reattend.patterns.recognise import Miss


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fusemax runs no kernels of ours.*choose cpu or a GPU"):
        calibrate.calibrate(shipped("fusemax"))


@pytest.mark.parametrize(("wrong", "band"), [(0.0, calibrate.LEAST_BAND["cpu"]), (0.8, 0.8), (-4 / 9, 0.8)])
def test_the_band_is_what_the_check_finds(
    wrong: float, band: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which everything takes as predicted, or all of it (1 + wrong) times less: too high and too low count alike."""
    where = tmp_path / "calibration.json"
    monkeypatch.setenv("REATTEND_CALIBRATION", str(where))
    monkeypatch.setattr(calibrate, "cpu_rates", lambda watch: replace(shipped("cpu"), basis="calibrated"))
    monkeypatch.setattr(calibrate, "_own", lambda d: d)
    monkeypatch.setattr(calibrate, "_flex", lambda d, watch: d)
    predicted = [
        cost.seconds
        for mask, batch, heads, n, head in calibrate.CHECKED
        for t in ("f32", "bf16")
        for _, _, cost in runs(mask, t, batch, heads, n, head)
    ]
    times = iter(predicted)

    def instead(run: Callable[[], object], clock: object = None) -> float:
        return next(times) / (1 + wrong)

    monkeypatch.setattr(calibrate, "seconds", instead)
    found, check = calibrate.calibrate(shipped("cpu"))
    assert len(check) == 3 * 2 * len(calibrate.CHECKED)
    assert found.band == pytest.approx(band)
    assert device("cpu").band == pytest.approx(band)


def threads(d: Device) -> Device:
    from reattend.cost_model.device import with_threads

    return with_threads(d, torch.get_num_threads())


def runs(
    mask: str, t: str, batch: int, heads: int, n: int, head: int
) -> Iterator[tuple[str, Callable[[], object], Cost]]:
    c, x, sizes = calibrate._attention(mask, t, batch, heads, n, head)
    return calibrate._runs(c, mask, x, sizes, threads(shipped("cpu")))


def test_the_candidates_of_the_check_agree() -> None:
    for mask in ("none", "causal", "window"):
        with torch.no_grad():
            outputs = [run() for _, run, _ in runs(mask, "f32", 1, 2, 300, 64)]
        assert len(outputs) == 3
        for out in outputs[1:]:
            torch.testing.assert_close(out, outputs[0], rtol=0, atol=1e-5)


def test_our_operator_on_next_to_nothing_takes_some_time() -> None:
    found = calibrate._own(shipped("cpu"))
    assert found.host is not None
    assert 0 <= found.host.operator_call_seconds < 0.1
    assert 1 <= found.host.step_factor < 100


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_the_checkerboard_leaves_every_tile_partial() -> None:
    at = {"B": 1, "H": 2, "P": 512, "M": 512, "E": 64, "F": 64}
    jobs = tiles_of(calibrate_gpu.attention(True), Mapping(64, 32), at)
    assert not isinstance(jobs, Miss)
    assert int(jobs.full.sum()) == 0
    assert int(jobs.partial.sum()) == 8 * 16
    plain = tiles_of(calibrate_gpu.attention(False), Mapping(64, 32), at)
    assert not isinstance(plain, Miss)
    assert int(plain.partial.sum()) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_the_cascades_are_attention(masked: bool) -> None:
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.bfloat16) for _ in range(3))
    got = evaluate(calibrate_gpu.attention(masked), {"Q": q, "K": k, "V": v})["O"]
    i = torch.arange(12)
    kept = ((i[:, None] + i) % 2 == 0) if masked else torch.ones(12, 12, dtype=torch.bool)
    want = torch.where(kept, (q.double() @ k.double().mT) * 0.125, -torch.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-2)


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_the_kernel_does_nothing_but_exponentials() -> None:
    from reattend.codegen.skeletons.exps import BLOCK, exps

    out = torch.empty(2 * BLOCK)
    exps[(2,)](out, 5)
    want = (np.arange(2 * BLOCK) % 1024 / 1024).astype(np.float32)
    for _ in range(5):
        want = np.exp2(-want)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-6)


@pytest.mark.aot
def test_the_kernel_of_exponentials_compiles_for_gpus() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from reattend.codegen.skeletons.exps import exps

    source = triton.compiler.ASTSource(exps, signature={"out": "*fp32", "steps": "i32"}, constexprs={})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    # the loop keeps its exponentials, and nothing else of that kind
    assert text.count("ex2.approx") >= 1
    assert "div." not in text
