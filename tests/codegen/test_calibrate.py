"""Calibration with our kernels: what is refused, what is checked, the cascades and the kernel it times a GPU with."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from reattend.codegen.measure import calibrate, calibrate_gpu, company
from reattend.cost_model.calibration.calibrate import torch_threads, with_rates
from reattend.cost_model.devices.device import Device, alone, device, shipped, with_threads
from reattend.cost_model.time.predict import tiles_of
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle

pytestmark = pytest.mark.thin(2)


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
    monkeypatch.setattr(calibrate, "_compile_ahead", lambda: None)
    monkeypatch.setattr(calibrate, "_flex", lambda d, watch: d)
    monkeypatch.setattr(calibrate, "_fused", lambda d, watch: d)
    monkeypatch.setattr(calibrate, "prepare", lambda d, watch: [])
    monkeypatch.setattr(calibrate, "in_company", lambda d, found: d)
    here = threads(alone(shipped("cpu")))
    predicted = iter([[w.price(here).seconds for w in ways(s, t)] for s in calibrate.CHECKED for t in company.TYPES])
    monkeypatch.setattr(calibrate, "rounds", lambda runs: [s / (1 + wrong) for s in next(predicted)])
    found, check = calibrate.calibrate(shipped("cpu"))
    assert {c.name.partition(",")[0] for c in check} >= {"original", "sdpa", "our-sdpa", "our-slices"}
    assert found.band == pytest.approx(band)
    assert device("cpu").band == pytest.approx(band)


def threads(d: Device) -> Device:
    return with_threads(d, torch.get_num_threads())


def ways(shape: company.Workload, t: str = "f32") -> list[company.Contender]:
    c, x = company.cascade(shape, t), company.tensors(shape, t)
    return list(company.ways(c, shape, x, threads(shipped("cpu"))))


def test_our_operator_on_next_to_nothing_takes_some_time() -> None:
    found = calibrate._own(shipped("cpu"))
    assert found.host is not None
    assert 0 <= found.host.operator_call_seconds < 0.1
    assert 1 <= found.host.step_factor < 100


def test_block_masks_whose_blocks_are_all_visited() -> None:
    def visited(found: BlockMask) -> list[int]:
        counts = (found.kv_num_blocks, found.full_kv_num_blocks)
        return [int(n.sum()) for n in counts if n is not None]

    assert visited(calibrate._every_block(256, True)) == [0, 4]
    assert visited(calibrate._every_block(256, False)) == [4, 0]
    assert visited(calibrate._printed_blocks(256)()) == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["full", "partial", ""])
def test_flex_attention_runs_in_blocks_and_at_once(blocks: str) -> None:
    with torch.no_grad():
        assert calibrate._compiled_flex("bf16", keys=256, queries=256, blocks=blocks) > 0


# --- in company -------------------------------------------------------------------------------------------------------

SMALLER = [
    company.Workload("none", 2, 2, 70, 70), company.Workload("causal", 1, 2, 90, 90, 48), company.Workload("window", 1, 2, 300, 300),
    company.Workload("prefix", 1, 2, 130, 130), company.Workload("bias", 1, 2, 60, 60), company.Workload("padding", 2, 2, 50, 50),
    company.Workload("causal", 1, 4, 1, 80, 32, group=2), company.Workload("causal", 1, 2, 30, 100),
]


@pytest.mark.parametrize("shape", SMALLER, ids=lambda s: f"{s.mask}-{s.queries}")
def test_all_ways_of_a_shape_agree(shape: company.Workload) -> None:
    with torch.no_grad():
        outputs = {w.kind: w.call() for w in ways(shape)}
    assert {"original", "sdpa", "our-sdpa"} <= set(outputs)
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["original"], rtol=0, atol=1e-5)


CALL = {"sdpa": 5e-5, "original": 2e-4, "our-sdpa": 3e-5}
OFF = {("sdpa", "f32"): 1.1, ("sdpa", "bf16"): 1.2, ("our-sdpa", "f32"): 1.3, ("original", "f32"): 1.4, ("original", "bf16"): 1.05}


def timed(noise: Callable[[int], float]) -> list[company.InCompany]:
    """A machine on which every kind is off by its own factor, more with one thread, and some calls take longer by themselves."""
    out = []
    for (kind, t), off in OFF.items():
        for k, s in enumerate((4e-4, 1e-3, 3e-3, 6e-3, 1.1e-2, 2.4e-2, 9e-2)):
            for threads, more in ((1, 1.1), (2, 1.0)):
                out.append(company.InCompany(kind, t, threads, s * more * off * noise(k), s))
        for k, s in enumerate((1e-5, 2e-5, 4e-5)):
            if kind in CALL:
                out.append(company.InCompany(kind, t, 2, s * off + CALL[kind] * noise(k), s, tiny=True))
    return out


# Half of what a kind is off beside the median of all, which is 1.2.
BELIEVED = {key: 1.2 * (off / 1.2) ** company.OWN for key, off in OFF.items()}


def test_the_factors_of_a_machine_come_back() -> None:
    found = company.factors(timed(lambda k: 1.0))
    for (kind, t), off in BELIEVED.items():
        assert found["company_factor"][kind][t] == pytest.approx((1.1 * off, off))
    assert found["company_factor"]["sdpa"]["f16"] == found["company_factor"]["sdpa"]["bf16"]


def test_what_a_call_takes_by_itself_comes_back() -> None:
    found = company.factors(timed(lambda k: 1.0))["company_call_seconds"]
    # of the tiny calls, all but what is believed of their factors
    for kind, seconds in {**CALL, "our-slices": CALL["our-sdpa"]}.items():
        assert found[kind] == pytest.approx(seconds, abs=6e-6)


def test_a_disturbed_shape_moves_no_factor_far() -> None:
    found = company.factors(timed(lambda k: 6.0 if k == 1 else 1.0))
    for (kind, t), off in BELIEVED.items():
        assert found["company_factor"][kind][t] == pytest.approx((1.1 * off, off), rel=0.1)


def test_no_factor_is_beyond_belief() -> None:
    found = company.factors(timed(lambda k: 400.0))
    assert found["company_factor"]["sdpa"]["f32"] == (company.MOST, company.MOST)
    found = company.factors(timed(lambda k: 0.01))
    assert found["company_factor"]["sdpa"]["f32"] == (company.LEAST, company.LEAST)


def test_predictions_in_company_are_what_was_measured() -> None:
    """A device with these factors predicts the times that they were made from."""
    base = alone(shipped("cpu"))
    (way,) = [w for w in ways(company.Workload("none", 1, 4, 400, 400)) if w.kind == "sdpa"]
    before = way.price(base).seconds
    assert base.host is not None
    rates = company.factors([company.InCompany("sdpa", "f32", 1, 1.25 * before, before)])
    after = way.price(replace(base, host=with_rates(base.host, rates)))
    assert after.seconds == pytest.approx(1.25 * before)
    assert sum(after.parts.values()) == pytest.approx(after.seconds)


def test_calls_come_in_turn_and_slow_ones_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    def run(name: str, seconds: float) -> Callable[[], object]:
        def call() -> None:
            seen.append(name)
            now[0] += seconds

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    took = company.rounds([run("fast", 1.0), run("near", 2.0), run("slow", 9.5)])
    assert took == pytest.approx([1.0, 2.0, 9.5])
    assert seen.count("fast") == seen.count("near") == 1 + company.ROUNDS
    assert seen.count("slow") == 1 + len(range(0, company.ROUNDS, company.SELDOM))


@pytest.mark.usefixtures("brief")
def test_every_way_is_run_with_one_thread_and_all() -> None:
    d = with_threads(shipped("cpu"), 2)
    found = company.runs(company.prepare(d, lambda steps, what: steps), lambda steps, what: steps)
    assert {r.threads for r in found} == {1, 2}
    assert {r.dtype for r in found} == set(company.TYPES)
    changed = company.in_company(d, found).host
    assert changed is not None
    # these are tiny
    assert {"original", "sdpa", "our-sdpa"} <= set(changed.company_call_seconds)


def test_what_must_be_compiled_is_run_where_a_shape_asks_for_it() -> None:
    shape = company.Workload("none", 1, 2, 40, 40, compiled=("fused",))
    found = {w.kind: w.call() for w in ways(shape)}
    torch.testing.assert_close(found["our-fused"], found["original"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_is_run_with_one_thread() -> None:
    shape = company.Workload("causal", 1, 2, 20, 20, compiled=("flex f32",))
    c, x = company.cascade(shape, "f32"), company.tensors(shape, "f32")
    with torch.no_grad(), torch_threads(1):
        found = {w.kind: w.call() for w in company.ways(c, shape, x, with_threads(shipped("cpu"), 1))}
    torch.testing.assert_close(found["flex"], found["original"], rtol=0, atol=1e-5)
    assert "flex" not in {w.kind for w in company.ways(c, shape, x, with_threads(shipped("cpu"), 2))}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "SHAPES", tuple(SMALLER[:2]))
    monkeypatch.setattr(company, "ROUNDS", 1)


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_the_checkerboard_leaves_every_tile_partial() -> None:
    at = {"B": 1, "H": 2, "P": 512, "M": 512, "E": 64, "F": 64}
    jobs = tiles_of(calibrate_gpu.attention(True), TileMapping(64, 32), at)
    assert not isinstance(jobs, Obstacle)
    assert int(jobs.full.sum()) == 0
    assert int(jobs.partial.sum()) == 8 * 16
    plain = tiles_of(calibrate_gpu.attention(False), TileMapping(64, 32), at)
    assert not isinstance(plain, Obstacle)
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
    from reattend.codegen.measure.exps import BLOCK, exps

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

    from reattend.codegen.measure.exps import exps

    source = triton.compiler.ASTSource(exps, signature={"out": "*fp32", "steps": "i32"}, constexprs={})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    # the loop keeps its exponentials, and nothing else of that kind
    assert text.count("ex2.approx") >= 1
    assert "div." not in text
