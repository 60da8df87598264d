"""Vendors' kernels on GPUs: how they lay out an attention, against known answers and laws; bands and sources of the data files."""

from dataclasses import replace

import pytest

from reattend.cost_model.count.subject import Shape, Subject, shape, subject
from reattend.cost_model.count.tiles import NOTHING
from reattend.cost_model.devices.device import Device, shipped, targets
from reattend.cost_model.devices.kernels import vendor_kernels
from reattend.cost_model.time import gpu, vendor_gpu
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import VendorUse, predict_vendor
from reattend.patterns import expr as ex
from reattend.patterns.library import papers
from reattend.patterns.verdict import Obstacle

from .test_predict import narrow

P, M = ex.index("p"), ex.index("m")
GPUS = [d for d in targets() if d.is_gpu]


def laid_out(kernel: str, device: str, group: int, causal: bool, **sizes: int) -> tuple[gpu.KernelWork, Shape]:
    s, at = bound(group, causal, **sizes)
    return vendor_gpu.laid_out(s, at, vendor_kernels()[kernel], shipped(device), causal, NOTHING), at


def bound(group: int, causal: bool, **sizes: int) -> tuple[Subject, Shape]:
    score: papers.Score = (lambda b, x: ex.where(M <= P, x * 0.125, -3e38)) if causal else papers.plain
    s = subject(narrow(papers.attention("a", papers.softmax, score, group=group)))
    assert isinstance(s, Subject)
    return s, shape(s.cascade, s.attention, sizes)


def sizes(batch: int, heads: int, queries: int, keys: int, head: int) -> dict[str, int]:
    return {"B": batch, "H": heads, "P": queries, "M": keys, "E": head, "F": head}


def seconds(kernel: str, d: Device, group: int, causal: bool, **at: int) -> float:
    cost = predict_vendor(bound(group, causal, **at)[0].cascade, VendorUse(kernel, skips=causal), d, at)
    assert isinstance(cost, Cost)
    return cost.seconds


@pytest.mark.parametrize(
    ("programs", "slots", "tiles", "parts"),
    [
        (106, 132, 64, 1),  # 80 % of the units: not split
        (1, 132, 1, 1),  # one tile of keys cannot be
        (8, 132, 32, 16),  # 128 of 132 is within 85 % of the best, and 11, 8 are not
        (1, 108, 1024, 94),  # parts that hold as many tiles as one fewer are passed over
    ],
)
def test_the_rule_of_the_split(programs: int, slots: int, tiles: int, parts: int) -> None:
    assert vendor_gpu.splits(programs, slots, tiles) == parts


def test_heads_of_a_group_fill_a_tile_on_hopper_at_every_length() -> None:
    """16 queries of 12 heads are 192 rows: one tile of FlashAttention-3 at head size 64, 12 of FlashAttention-2."""
    at = sizes(1, 12, 16, 4096, 64)
    assert laid_out("fa3", "h200", 12, False, **at)[0].programs == 1
    assert laid_out("fa2", "a100", 12, False, **at)[0].programs == 12
    # one query alone: the heads come together everywhere
    assert laid_out("fa2", "a100", 12, False, **sizes(1, 12, 1, 4096, 64))[0].programs == 1


def test_packed_heads_read_their_keys_once() -> None:
    packed, _ = laid_out("fa3", "h200", 8, True, **sizes(1, 32, 4096, 4096, 128))
    apart, _ = laid_out("fa2", "h200", 8, True, **sizes(1, 32, 4096, 4096, 128))
    assert packed.unique_bytes == apart.unique_bytes
    assert packed.flops == pytest.approx(apart.flops, rel=0.05)


def test_more_heads_than_rows_take_several_tiles() -> None:
    """128 heads of one key head, one query each: two tiles of 64 rows or one of 128, never a tile a head."""
    k, _ = laid_out("fa2", "a100", 128, False, **sizes(2, 128, 1, 4096, 128))
    assert k.programs == 2 * 128 // 128


@pytest.mark.parametrize(("head", "wide"), [(64, 64), (72, 96), (80, 96), (128, 128)])
def test_products_run_with_the_width_that_the_kernel_has(head: int, wide: int) -> None:
    """FlashAttention-3 has none for 72: measured, 72 useful numbers of 96 take as long as 96."""
    k, _ = laid_out("fa3", "h200", 1, False, **sizes(1, 8, 1024, 1024, head))
    rows, keys = vendor_kernels()["fa3"].tile(head)
    assert k.full_tile.flops == 4 * rows * keys * wide


def test_keys_of_a_group_come_again_where_a_pass_over_the_batch_fills_the_cache() -> None:
    """FlashAttention-2 walks all sequences before the next head: 16 GB of keys do not wait in 96 MB; 4 MB do."""
    far, _ = laid_out("fa2_paged", "l40s", 8, True, **sizes(64, 32, 4096, 4096, 128))
    near, _ = laid_out("fa2_paged", "l40s", 8, True, **sizes(2, 32, 256, 256, 128))
    assert far.again_bytes == 7 * 2 * 64 * 4 * 4096 * 256
    assert near.again_bytes == 0


def test_bringing_heads_together_takes_copies_unless_they_lie_so() -> None:
    d = "a100"
    assert laid_out("fa2", d, 4, False, **sizes(8, 32, 1, 512, 128))[0].further == 2
    assert laid_out("fa2", d, 4, False, **sizes(1, 32, 1, 512, 128))[0].further == 0
    assert laid_out("fa2", d, 32, False, **sizes(8, 32, 1, 512, 128))[0].further == 0
    assert laid_out("fa3", "h200", 4, False, **sizes(8, 32, 1, 512, 128))[0].further == 0


def test_single_heads_are_split_by_flashattention_3_alone() -> None:
    at = sizes(1, 4, 1, 65536, 128)
    assert laid_out("fa2", "a100", 1, False, **at)[0].split == 1
    assert laid_out("fa3", "h200", 1, False, **at)[0].split > 8


def test_a_lone_program_has_its_unit_to_itself() -> None:
    """Two programs fit a unit of A100, and share its rates where they meet: 4 and 100 on 108 units do not."""
    took = []
    for heads in (4, 100, 200):
        at = sizes(1, heads, 128, 8192, 128)
        cost = predict_vendor(bound(1, False, **at)[0].cascade, VendorUse("fa2"), shipped("a100"), at)
        assert isinstance(cost, Cost)
        took.append(cost.parts["makespan"])
    assert took[0] == pytest.approx(took[1])
    assert took[2] > 1.7 * took[1]


def test_what_the_cache_holds_is_not_read_from_memory() -> None:
    """64 MB of keys: from L40S' cache of 96 MB on a second call, not on the first, and not with as much moved in between."""
    d, at = shipped("l40s"), sizes(8, 8, 1, 2048, 128)
    c = bound(1, False, **at)[0].cascade
    took = {}
    for beside in (None, 0.0, 64e6):
        cost = predict_vendor(c, VendorUse("fa2_paged"), d, at, beside=beside)
        assert isinstance(cost, Cost)
        took[beside] = cost.parts["memory"]
    assert took[0.0] < 0.5 * took[None]
    assert took[64e6] == pytest.approx(took[None])


def test_long_calls_slow_down_by_what_the_power_allows() -> None:
    d = replace(shipped("h200"), model=replace(shipped("h200").model, power_share=0.1))
    cool = replace(d, model=replace(d.model, power_share=0.0))
    short, long = (
        seconds("fa3", d, 1, True, **sizes(1, 8, n, n, 128)) / seconds("fa3", cool, 1, True, **sizes(1, 8, n, n, 128))
        for n in (512, 131072)
    )
    assert 1 <= short < 1.01
    assert 1.09 < long < 1.1


@pytest.mark.parametrize("d", GPUS, ids=lambda d: d.name)
def test_a_device_says_how_its_kernels_are_known(d: Device) -> None:
    """Only tables of its own make a band narrow; by its family it is wider, and by the data sheet that of all else."""
    assert d.kernel in vendor_kernels()
    prefill, decode = {"tables": (0.25, 0.30), "family": (0.25, 0.35), "sheet": (0.0, 0.0)}[d.known]
    assert d.prefill_band <= prefill
    assert d.decode_band <= decode
    assert (d.prefill_band > 0) == (d.known != "sheet")
    assert d.vendor_band(False, 1.0) <= d.band
    assert d.prefill_band <= d.vendor_band(False, 1.0, bare=True) <= max(d.band, 0.35)
    assert d.band_seconds <= 2e-6


def test_every_fact_of_a_kernel_has_a_source() -> None:
    for k in vendor_kernels().values():
        assert set(k.sources) >= {"tiles", "packed", "program_clocks", "draw_bytes_per_clock"}
        assert all(k.sources.values())


def test_a_kernel_of_another_name_is_refused() -> None:
    from reattend.cost_model.devices.device import parse_device

    text = 'name = "x"\ntitle = "X"\nkind = "cuda"\narch = "sm_90"\nkernel = "fa9"\nunits = [1, "s"]\nclock_hz = [1e9, "s"]\n'
    text += 'dram_bytes_per_s = [1e9, "s"]\ndram_bytes = [1e9, "s"]\n[matrix_flops_per_s]\nf32 = [1e9, "s"]\n'
    with pytest.raises(ValueError, match="kernel 'fa9'"):
        parse_device(text)


def test_no_split_of_one_query_on_one_key() -> None:
    """The smallest of all calls is priced, whatever its group."""
    for group in (1, 4, 32):
        cost = predict_vendor(bound(group, False, **sizes(1, 32, 1, 1, 128))[0].cascade, VendorUse("flash"), shipped("h200"),
                              sizes(1, 32, 1, 1, 128))
        assert not isinstance(cost, Obstacle)
        assert cost.seconds > shipped("h200").model.launch_seconds
