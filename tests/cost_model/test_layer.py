"""The work outside of attention, priced: laws of the roofline, what a step adds up to, what fits, how a mesh divides it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from reattend.cost_model.devices.device import shipped, targets
from reattend.cost_model.devices.layers import KINDS, layer_rates
from reattend.cost_model.layer.exchange import exchange_seconds
from reattend.cost_model.layer.products import ProductShapes, expert_seconds, matrix_rate, product_seconds
from reattend.cost_model.layer.step import Attended, Extent, ModelStep, StepError, StepSpread, Types
from reattend.cost_model.layer.steps import step
from reattend.cost_model.layer.table import step_lines
from reattend.cost_model.layer.work import COLUMNS, INNER, LayerProduct, LayerWork, Pass, Weights
from reattend.cost_model.mesh.collectives import ALL_REDUCE
from reattend.cost_model.mesh.mesh import parse
from tests.tiers import one_in

H200 = shipped("h200")
GPUS = sorted(layer_rates())


def seconds(device: str, kind: str, rows: int, inner: int, columns: int) -> float:
    m, k, n, one = (np.array([float(x)]) for x in (rows, inner, columns, 1))
    width = 1.0 if kind == "fp8" else 2.0
    d = shipped(device)
    return float(product_seconds(ProductShapes(m, k, n, one, width, width), d, layer_rates()[device][kind], matrix_rate(d, kind))[0])


def test_every_gpu_has_rates_with_a_source() -> None:
    assert set(layer_rates()) == {d.name for d in targets() if d.is_gpu}
    for kinds in layer_rates().values():
        assert set(kinds) <= {*KINDS}
        assert "bf16" in kinds
        assert all(r.basis and 0 < r.band <= 1 for r in kinds.values())


@pytest.mark.parametrize("device", one_in(4, GPUS))
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_no_product_is_faster_than_the_data_sheet(device: str, kind: str) -> None:
    if kind not in layer_rates()[device]:
        pytest.skip("no rows of this type")
    d = shipped(device)
    width = 1 if kind == "fp8" else 2
    for rows, inner, columns in ((1, 4096, 4096), (16, 8192, 28672), (256, 4096, 14336), (4096, 8192, 8192), (32768, 512, 512)):
        took = seconds(device, kind, rows, inner, columns)
        assert took >= 0.95 * 2 * rows * inner * columns / matrix_rate(d, kind)
        assert took >= 0.95 * width * inner * columns / d.dram_bytes_per_s


@pytest.mark.parametrize("device", one_in(4, GPUS))
def test_more_work_takes_no_less(device: str) -> None:
    for rows in (1, 16, 128, 2048):
        one = seconds(device, "bf16", rows, 4096, 4096)
        assert seconds(device, "bf16", 4 * rows, 4096, 4096) >= one * 0.999
        assert seconds(device, "bf16", rows, 16384, 4096) > one
        assert seconds(device, "bf16", rows, 4096, 16384) > one


def test_experts_read_the_weights_of_those_that_are_met() -> None:
    def took(rows: int, experts: int) -> float:
        n, hidden, inner, e = (np.array([float(x)]) for x in (rows, 2048, 768, experts))
        both = [ProductShapes(n, hidden, 2 * inner, e), ProductShapes(n, inner, hidden, e)]
        return float(expert_seconds(both, H200, layer_rates()["h200"]["experts_bf16"], matrix_rate(H200, "bf16"))[0])

    # one token and its eight choices do not wait for the weights of all experts, many tokens do
    assert took(8, 128) == pytest.approx(took(8, 1024), rel=0.1)
    assert took(4096, 1024) > 3 * took(4096, 128)


def work(batch: int = 4, tokens: int = 1) -> LayerWork:
    rows = batch * tokens
    return LayerWork(
        (
            (LayerProduct(rows, 4096, 6144, cut=COLUMNS), 32), (LayerProduct(rows, 4096, 4096, cut=INNER), 32),
            (LayerProduct(rows, 4096, 28672, cut=COLUMNS), 32), (LayerProduct(rows, 14336, 4096, cut=INNER), 32),
            (LayerProduct(rows, 4096, 128256, cut=COLUMNS, last=True), 1),
        ),
        ((Pass(rows * 8192, rows * 8192), 64), (Pass(rows * 57344, rows * 28672, True), 32)), ((rows * 8192, 64),),
        (Weights(6_979_321_856, 2, True, True), Weights(1_050_673_152, 2, False, True), Weights(266_240, 2)),
    )


ATTENDED = (Attended(3e-5, 6e-6, 0.2, 4 * 4096 * 4096, True, 0, 32, 8),) * 32
DECODE = Extent(4, 1, 4096, True)


def test_a_step_adds_up_and_is_read_back() -> None:
    s = step(work(), ATTENDED, DECODE, H200)
    assert s.seconds == pytest.approx(sum(s.parts.values()))
    assert s.parts["attention"] == pytest.approx(32 * 3e-5)
    assert s.tokens_per_s == pytest.approx(4 / s.seconds)
    assert s.weight_bytes == pytest.approx(16.06e9, rel=0.01)
    assert 0.2 <= s.band <= 0.5
    assert ModelStep.from_dict(s.to_dict()) == s
    assert dataclasses.replace(s, parts={}) == dataclasses.replace(ModelStep.from_dict(s.to_dict()), parts={})


def test_decoding_a_few_sequences_takes_as_long_as_reading_the_weights() -> None:
    s = step(work(), (), DECODE, H200)
    assert 1.0 < s.parts["products"] / ((s.weight_bytes - 1.05e9) / H200.dram_bytes_per_s) < 1.5


def test_the_largest_batch_and_context_fit_and_no_more_do() -> None:
    s = step(work(), ATTENDED, DECODE, H200)
    assert s.largest_batch is not None
    assert s.largest_context is not None
    for batch, fits in ((s.largest_batch, True), (s.largest_batch + 1, False)):
        cache = tuple(dataclasses.replace(a, cache_bytes=a.cache_bytes // 4 * batch) for a in ATTENDED)
        assert step(work(batch), cache, Extent(batch, 1, 4096, True), H200).fits is fits
    for context, fits in ((s.largest_context, True), (s.largest_context + 64, False)):
        cache = tuple(dataclasses.replace(a, cache_bytes=a.cache_bytes // 4096 * context) for a in ATTENDED)
        assert step(work(), cache, Extent(4, 1, context, True), H200).fits is fits


def test_a_prompt_makes_logits_of_its_last_token_alone() -> None:
    whole, last = (step(work(1, 4096), (), Extent(1, 4096, 4096, g), H200) for g in (False, True))
    flop = 2 * 4096 * 4096 * 128256
    assert whole.parts["products"] - last.parts["products"] == pytest.approx(flop / matrix_rate(H200, "bf16"), rel=0.4)


def test_a_mesh_divides_what_it_can_and_pays_for_it() -> None:
    one = step(work(), ATTENDED, DECODE, H200)
    four = step(work(), ATTENDED, DECODE, H200, spread=StepSpread(parse("tp=4")))
    assert one.parts["exchanges"] == 0
    assert four.parts["exchanges"] >= 64 * 4e-6
    assert one.seconds / 4 < four.seconds < one.seconds
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4, rel=0.001)
    assert four.tokens_per_s_device == pytest.approx(four.tokens_per_s / 4)
    batch = step(work(), ATTENDED, DECODE, H200, spread=StepSpread(parse("dp=4")))
    assert (batch.weight_bytes, batch.parts["exchanges"]) == (one.weight_bytes, 0)


def test_sums_over_a_switch_take_what_was_measured() -> None:
    def took(n: int, parts: int) -> float:
        route = parse(f"tp={parts}").route("tp", H200)
        return float(exchange_seconds(ALL_REDUCE, np.array([float(n)]), H200, route)[0])

    # all-reduce on H200 (vllm, captured), by bytes and devices
    for n, parts, seconds in ((128, 8, 4.7e-6), (8192, 4, 4.8e-6), (524288, 4, 12.1e-6), (524288, 8, 14.1e-6), (4194304, 8, 48.4e-6),
                              (268435456, 8, 2035e-6), (268435456, 4, 2314e-6)):
        assert took(n, parts) == pytest.approx(seconds, rel=0.25)


def test_more_devices_than_key_heads_hold_copies_of_their_keys() -> None:
    eight, sixteen = (step(work(), ATTENDED, DECODE, H200, spread=StepSpread(parse(f"tp={n}"))) for n in (8, 16))
    assert sixteen.cache_bytes == eight.cache_bytes
    assert sixteen.parts["attention"] == eight.parts["attention"]
    with pytest.raises(StepError, match="tp=3 does not divide 32 heads"):
        step(work(), ATTENDED, DECODE, H200, spread=StepSpread(parse("tp=3")))


def test_narrower_weights_and_caches() -> None:
    plain = step(work(), ATTENDED, DECODE, H200)
    for weights, share in (("fp8", 1 / 2), ("int8", 1 / 2), ("int4", 0.2578)):
        s = step(work(), ATTENDED, DECODE, H200, Types(weights=weights))
        assert s.weight_bytes - 2.1e9 == pytest.approx((plain.weight_bytes - 2.1e9) * share, rel=0.01)
        assert s.parts["products"] < plain.parts["products"]
        assert s.parts["attention"] == plain.parts["attention"]
    s = step(work(), ATTENDED, DECODE, H200, Types(cache="fp8"))
    assert s.cache_bytes * 2 == plain.cache_bytes
    assert s.parts["attention"] == pytest.approx(32 * (6e-6 + 2.4e-5 / 2))


def test_types_and_devices_that_are_not_known_are_refused() -> None:
    with pytest.raises(StepError, match=r"weights in 'fp5' are not known: one of fp8, int8, int4"):
        Types(weights="fp5")
    with pytest.raises(StepError, match=r"cache in 'int4'"):
        Types(cache="int4")
    with pytest.raises(StepError, match="products are not priced on fusemax"):
        step(work(), (), DECODE, shipped("fusemax"))


def test_a_step_as_text() -> None:
    text = "\n".join(step_lines(step(work(), ATTENDED, DECODE, H200, Types("fp8", "fp8")), "h200"))
    assert "a token of each sequence" in text
    assert "weights in fp8 and caches in fp8" in text
    assert "the largest that fit: batch" in text
    huge = dataclasses.replace(step(work(), (), DECODE, H200), weight_bytes=10**12)
    assert "the weights alone do not fit" in "\n".join(step_lines(huge, "h200"))
