"""Predictions: laws that every cost obeys, the order of candidates where it is beyond doubt, and the time it takes."""

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.count.eager import compiled, operators
from reattend.cost_model.devices.device import Device, alone, shipped, targets, with_threads
from reattend.cost_model.time.cost import BOUNDS, Cost
from reattend.cost_model.time.predict import (
    VendorUse,
    best_mapping,
    predict,
    predict_original,
    predict_vendor,
    ranked_mappings,
    tiles_of,
)
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle
from tests.effort import calls
from tests.tiers import pairs

P, M = ex.index("p"), ex.index("m")
GPUS = [d for d in targets() if d.is_gpu]
TILE = TileMapping(128, 64, warps=8, stages=2)
FLASH = VendorUse("flash")


def masked(keep: ex.Expr, fill: float = -3e38) -> papers.Score:
    return lambda b, qk: ex.where(keep, qk * 0.125, fill)


FULL = papers.attention("full", papers.softmax)
CAUSAL = papers.attention("causal", papers.softmax, masked(M <= P))
WINDOW = papers.attention("window", papers.softmax, masked((M <= P) & (P - M < 256)))
GROUPED = papers.attention("grouped", papers.softmax, masked(M <= P + ex.symbol("past")), group=4)
CAPPED = papers.attention("capped", papers.softmax, lambda b, qk: ex.unary("tanh", qk * 0.02) * 50.0)
BIASED = papers.attention("biased", papers.softmax, lambda b, qk: qk * 0.125 + b.input("bias", "hpm"))
SIGMOID = papers.attention("sigmoid", papers.sigmoid, masked(M <= P))


def sizes(n: int, d: int = 64, heads: int = 8, batch: int = 1, **more: int) -> dict[str, int]:
    return {"B": batch, "H": heads, "P": n, "M": n, "E": d, "F": d, **more}


def cpu(threads: int = 1) -> Device:
    return with_threads(shipped("cpu"), threads)


def known(cost: Cost | Obstacle) -> Cost:
    assert isinstance(cost, Cost), cost
    return cost


def faster(d: Device, x: float) -> Device:
    """Every rate times x, every latency divided by it."""
    m = d.model
    names = [f.name for f in fields(m) if f.name.endswith("_seconds")]
    model = replace(m, **{name: getattr(m, name) / x for name in names})
    return replace(
        d, clock_hz=d.clock_hz * x, dram_bytes_per_s=d.dram_bytes_per_s * x, l2_bytes_per_s=d.l2_bytes_per_s * x,
        matrix_flops_per_s={t: r * x for t, r in d.matrix_flops_per_s.items()}, model=model,
    )


@pytest.mark.parametrize("d", GPUS, ids=lambda d: d.name)
@pytest.mark.parametrize("x", [0.5, 2.0, 10.0])
def test_rates_times_x_divide_the_time_by_x(d: Device, x: float) -> None:
    for c in (FULL, CAUSAL, WINDOW):
        base = known(predict(c, TileMapping(64, 32, 8, 2), d, sizes(2048)))
        scaled = known(predict(c, TileMapping(64, 32, 8, 2), faster(d, x), sizes(2048)))
        assert scaled.seconds == pytest.approx(base.seconds / x)
        assert known(predict_vendor(c, FLASH, faster(d, x), sizes(2048))).seconds == pytest.approx(
            known(predict_vendor(c, FLASH, d, sizes(2048))).seconds / x
        )
        assert predict_original(c, faster(d, x), sizes(2048)).seconds == pytest.approx(
            predict_original(c, d, sizes(2048)).seconds / x
        )


def faster_host(d: Device, x: float) -> Device:
    """Every rate of a CPU times x, every time divided by it; sizes of caches, gains and factors stay."""

    def scaled(value: Any, factor: float) -> Any:
        if isinstance(value, Mapping):
            return {k: scaled(v, factor) for k, v in value.items()}
        return tuple(v * factor for v in value) if isinstance(value, tuple) else value * factor

    assert d.host is not None
    rates = {f.name: getattr(d.host, f.name) for f in fields(d.host)}
    times = {n: scaled(v, 1 / x) for n, v in rates.items() if "seconds" in n}
    speeds = {n: scaled(v, x) for n, v in rates.items() if n.endswith("_per_s")}
    flops = {t: r * x for t, r in d.matrix_flops_per_s.items()}
    host = replace(d.host, **times, **speeds)
    return replace(d, dram_bytes_per_s=d.dram_bytes_per_s * x, matrix_flops_per_s=flops, host=host)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("x", [0.5, 2.0, 10.0])
def test_a_cpu_x_times_as_fast_takes_the_time_by_x(threads: int, x: float) -> None:
    d = cpu(threads)
    quick = faster_host(d, x)
    for c in (FULL, CAUSAL, WINDOW, CAPPED):
        assert predict_original(c, quick, sizes(2048)).seconds * x == pytest.approx(predict_original(c, d, sizes(2048)).seconds)
        for body in ("sdpa", "slices", "product"):
            base = known(predict(c, TileMapping(64, 64, body=body), d, sizes(2048)))
            assert known(predict(c, TileMapping(64, 64, body=body), quick, sizes(2048))).seconds * x == pytest.approx(base.seconds)
        for use in (FLASH, VendorUse("flex", skips=True)):
            base = known(predict_vendor(c, use, d, sizes(2048)))
            assert known(predict_vendor(c, use, quick, sizes(2048))).seconds * x == pytest.approx(base.seconds)


@pytest.mark.parametrize(("d", "c"), pairs(3, [*GPUS, cpu(1), cpu(2)], [FULL, CAUSAL, WINDOW, CAPPED, SIGMOID]))
def test_time_grows_with_length(d: Device, c: Cascade) -> None:
    lengths = [256, 512, 1024, 2048, 4096]
    ours = [best_mapping(c, d, sizes(n)) for n in lengths]
    times = [[b[1].seconds for b in ours if isinstance(b, tuple)], [predict_original(c, d, sizes(n)).seconds for n in lengths]]
    times.append([known(predict_vendor(c, FLASH, d, sizes(n))).seconds for n in lengths])
    for row in times:
        assert len(row) == len(lengths)
        # a launch that leaves units idle costs the same on a few more keys
        assert all(a <= b for a, b in pairwise(row)), row
        assert row[0] < row[-1]


@given(st.sampled_from(GPUS), st.integers(1, 4000), st.sampled_from([32, 64, 128]), st.integers(1, 4))
def test_costs_are_positive_and_name_their_bound(d: Device, n: int, head: int, batch: int) -> None:
    for c in (CAUSAL, WINDOW):
        best = best_mapping(c, d, sizes(n, head, batch=batch))
        assert isinstance(best, tuple)
        cost = best[1]
        assert cost.seconds > 0
        assert cost.bound in BOUNDS
        assert cost.flops > 0
        assert cost.exps > 0
        assert cost.bytes >= 4 * batch * 8 * n * head * 4 or n == 0


def test_longer_heads_and_batches_cost_more() -> None:
    for d in (*GPUS, cpu()):
        base = known(predict_vendor(CAUSAL, FLASH, d, sizes(2048))).seconds
        assert known(predict_vendor(CAUSAL, FLASH, d, sizes(2048, d=128))).seconds > base
        assert known(predict_vendor(CAUSAL, FLASH, d, sizes(2048, batch=16))).seconds > base


def test_a_compiler_makes_one_pass_of_what_stands_between_products() -> None:
    at = sizes(512)
    apart, whole = operators(CAPPED, at), compiled(operators(CAPPED, at))
    assert [o for o in whole if o.kind == "product"] == [o for o in apart if o.kind == "product"]
    moved = [o for o in whole if o.kind != "product" and o.read_bytes]
    assert [o.kind for o in moved] == ["softmax"]
    assert sum(o.exps for o in whole) == sum(o.exps for o in apart)
    d = cpu()
    assert predict_original(CAPPED, d, at, fusing=True).seconds < predict_original(CAPPED, d, at).seconds


def test_a_window_beats_a_mask_tensor_and_eager() -> None:
    dense = VendorUse("flash", mask_elements=4096 * 4096)
    for d in (cpu(1), cpu(2)):
        best = best_mapping(WINDOW, d, sizes(4096))
        assert isinstance(best, tuple)
        assert best[1].seconds * 5.5 < known(predict_vendor(WINDOW, dense, d, sizes(4096))).seconds
        assert best[1].seconds * 15 < predict_original(WINDOW, d, sizes(4096)).seconds


def test_without_a_mask_sdpa_stays() -> None:
    best = best_mapping(FULL, cpu(), sizes(2048))
    assert isinstance(best, tuple)
    assert known(predict_vendor(FULL, FLASH, cpu(), sizes(2048))).seconds < best[1].seconds


def test_the_fused_kernel_is_not_offered_what_it_cannot_do() -> None:
    found = ranked_mappings(CAPPED, cpu(), sizes(1024))
    assert not isinstance(found, Obstacle)
    assert {m.body for m, _ in found} == {"product"}
    found = ranked_mappings(CAUSAL, cpu(), sizes(1024))
    assert not isinstance(found, Obstacle)
    assert {m.body for m, _ in found} == {"product", "sdpa", "slices"}
    assert all(a[1].seconds <= b[1].seconds for a, b in pairwise(found))


def test_decode_splits_keys_where_units_would_idle() -> None:
    at = {**sizes(1, 128, heads=32), "M": 131072, "past": 131071}
    for name in ("a100", "h100", "h200", "b200", "mi300x"):
        d = shipped(name)
        best = best_mapping(GROUPED, d, at)
        assert isinstance(best, tuple)
        assert best[0].split_m > 1
        assert best[0].tile_p == 16
        # all the keys and values come over the memory's edge once
        assert best[1].seconds > best[1].bytes / d.dram_bytes_per_s


def test_dense_attention_lies_between_half_and_all_of_the_peak_rate_published() -> None:
    """H100, head size 128, 16k keys: stock Triton 395 to 487, cuDNN 595, eager 74 to 139 TFLOP/s (16 to 35 causal)."""
    d = shipped("h100")
    at = sizes(16384, 128, heads=16)
    c = narrow(papers.attention("full", papers.softmax))
    flops = 4 * 16 * 16384**2 * 128
    best = best_mapping(c, d, at)
    assert isinstance(best, tuple)
    assert 380e12 < flops / best[1].seconds < 560e12
    assert 500e12 < flops / known(predict_vendor(c, VendorUse("cudnn"), d, at)).seconds < 700e12
    assert flops / predict_original(c, d, at).seconds < 139e12


def narrow(c: Cascade) -> Cascade:
    """The cascade in bf16 throughout."""

    def rule(e: ex.Expr, args: tuple[ex.Expr, ...]) -> ex.Expr | None:
        return ex.load(str(e.attr), args, "bf16") if e.op == "load" else None

    return replace(
        c,
        tensors=tuple(replace(t, dtype="bf16") for t in c.tensors),
        einsums=tuple(replace(e, body=ex.rebuild(e.body, rule)) for e in c.einsums),
    )


def test_mappings_that_do_not_fit_are_misses() -> None:
    found = predict(FULL, TileMapping(128, 128, 8, 4), shipped("l4"), sizes(1024, 128))
    assert isinstance(found, Obstacle)
    assert "shared memory" in found.reason
    assert isinstance(best_mapping(FULL, shipped("fusemax"), sizes(1024)), Obstacle)


def test_a_cascade_without_one_pass_form_is_a_miss() -> None:
    sparsemax = papers.attention("sparsemax", papers.sparsemax(2))
    assert isinstance(best_mapping(sparsemax, shipped("h200"), sizes(512)), Obstacle)
    assert predict_original(sparsemax, shipped("h200"), sizes(512)).seconds > 0


def test_missing_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"no value for size .*past"):
        best_mapping(GROUPED, shipped("h200"), sizes(512))


def test_tiles_of_a_causal_mask() -> None:
    found = tiles_of(CAUSAL, TileMapping(128, 128), sizes(8192))
    assert not isinstance(found, Obstacle)
    assert int(found.visited.sum()) == 2080
    assert int(found.full.sum()) == 2016
    assert found.repeat == 8


def test_planning_a_site_is_short() -> None:
    """After the first call, predictions for all mappings of one site are a few thousand calls (5 ms)."""
    d = shipped("h200")
    at = sizes(131072, 128, heads=32)

    def plan() -> None:
        best_mapping(CAUSAL, d, at)
        predict_original(CAUSAL, d, at)
        predict_vendor(CAUSAL, VendorUse("flash", skips=True), d, at)
        predict_vendor(CAUSAL, VendorUse("flex", skips=True), d, at)

    plan()
    # 16,400: in fp32, where heads of 128 fit small tiles alone, there are many of them
    assert calls(plan) < 20_000



def test_a_wave_reads_what_is_in_flight() -> None:
    """128 heads of 128k tokens: a head's keys leave the cache between waves; those of the other heads are not read then."""
    h100, at = shipped("h100"), sizes(131072, d=128, heads=128)
    cost = known(predict_vendor(CAUSAL, replace(FLASH, skips=True), h100, at))
    once = 2 * 128 * 131072 * 128 * 4
    waves = 131072 / 128 / h100.units
    assert once / h100.dram_bytes_per_s < cost.parts["memory"] < 3 * once * waves / h100.dram_bytes_per_s
    assert cost.bound != "memory"


@pytest.mark.parametrize("d", GPUS, ids=lambda d: d.name)
def test_a_vendor_decodes_in_tiles_of_fewer_rows(d: Device) -> None:
    """One query costs as much as 64, which one tile holds, and less than 128."""
    at = sizes(4096, 128, heads=32)
    one, some, more = (known(predict_vendor(FULL, FLASH, d, {**at, "P": n})) for n in (1, 64, 128))
    assert one.parts["matrix"] == pytest.approx(some.parts["matrix"])
    assert one.parts["matrix"] < 0.6 * more.parts["matrix"]


@pytest.mark.parametrize("body", ["sdpa", "product", "fused"])
def test_a_bias_for_each_pair_is_read_from_memory(body: str) -> None:
    """Eight heads of 2000 × 2000 numbers are 128 MB beside 4 MB of operands; SDPA is called for every tile of them."""
    at = sizes(2000)
    fixed, d = {"E": 64, "F": 64}, alone(cpu())
    plain, biased = (known(predict(c.with_sizes(fixed), TileMapping(64, 64, body=body), d, at)) for c in (FULL, BIASED))
    bias = 8 * 2000 * 2000 * 4 / d.dram_bytes_per_s
    if body == "sdpa":
        # each call reads the keys again
        assert biased.parts["memory"] - plain.parts["memory"] > bias
        small, large = (known(predict(BIASED, TileMapping(n, n, body=body), d, at)) for n in (32, 256))
        assert small.parts["launch"] > 4 * large.parts["launch"]
        assert small.seconds > large.seconds
    else:
        assert biased.parts["memory"] - plain.parts["memory"] == pytest.approx(bias, rel=0.05)
    use = replace(FLASH, mask_elements=8 * 2000**2, mask_dtype="f32")
    given, without = (known(predict_vendor(c, u, d, at)) for c, u in ((BIASED, use), (FULL, FLASH)))
    assert given.parts["memory"] - without.parts["memory"] == pytest.approx(bias, rel=0.1)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_a_backward_is_part_of_the_time_only_where_gradients_are_wanted() -> None:
    at, own = sizes(1024), ("Q", "K", "V")
    for cost, trained in (
        (predict_original(CAUSAL, cpu(), at), predict_original(CAUSAL, cpu(), at, own)),
        (known(predict_vendor(CAUSAL, FLASH, cpu(), at)), known(predict_vendor(CAUSAL, FLASH, cpu(), at, wanted=own))),
        (known(predict_vendor(CAUSAL, FLASH, GPUS[0], at)), known(predict_vendor(CAUSAL, FLASH, GPUS[0], at, wanted=own))),
    ):
        assert cost.backward == 0
        assert cost.forward == cost.seconds
        assert trained.forward == pytest.approx(cost.seconds)
        # five products for two, where scores are made again; four where they are read
        assert 0.5 < trained.backward / trained.forward < 3
        assert trained.flops / cost.flops in (3.0, 3.5)
        assert Cost.from_dict(trained.to_dict()) == trained


def test_mappings_are_ranked_by_the_whole_step() -> None:
    found = ranked_mappings(WINDOW, cpu(), sizes(1024), wanted=("Q", "K", "V"))
    assert not isinstance(found, Obstacle)
    assert [c.seconds for _, c in found] == sorted(c.seconds for _, c in found)
    assert all(c.backward > c.forward for _, c in found)


def test_what_is_learned_beside_the_operands_is_summed_up() -> None:
    at = sizes(1024)

    def original(wanted: tuple[str, ...]) -> Cost:
        return predict_original(BIASED, cpu(), at, wanted)

    def ours(wanted: tuple[str, ...]) -> Cost:
        found = ranked_mappings(BIASED, cpu(), at, wanted=wanted)
        assert not isinstance(found, Obstacle)
        return found[0][1]

    for price in (original, ours):
        assert price(("Q", "bias")).backward > price(("Q",)).backward
        assert price(("Q", "bias")).forward == price(("Q",)).forward
