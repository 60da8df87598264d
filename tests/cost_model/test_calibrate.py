"""Calibration: rates come back from times that follow the model, files are found again, noise is waited out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reattend.cost_model.calibration import calibrate
from reattend.cost_model.devices.device import device, shipped
from reattend.cost_model.time.host import Bill, Host

FIXED, EACH, KEY, ROW, MASK, LEFT, CALL = 3e-10, 2e-11, 8e-11, 5e-8, 2e-10, 9e-8, 5e-6


def fused(t: str, queries: int, keys: int, d: int, masked: bool = False) -> float:
    """SDPA's fused kernel by the formula that the calibration inverts, for whole blocks of rows."""
    heads = calibrate.HEADS
    pairs = queries * keys * (FIXED + 2 * d * EACH + MASK * masked)
    return CALL + heads * (keys * 2 * d * KEY + queries * (-(-keys // 512) * ROW + (keys % 16 > 0) * LEFT) + pairs)


def test_the_fused_kernel_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_sdpa", fused)
    found = calibrate._attention("f32")
    # the shortest call is not quite only a call, and blocks of keys are read as whole ones
    assert found["attention_key_seconds"] == pytest.approx(KEY, rel=0.05)
    assert found["attention_row_seconds"] == pytest.approx(ROW, rel=0.05)
    assert found["attention_left_seconds"] == pytest.approx(LEFT, rel=0.05)
    assert found["attention_mask_seconds"] == pytest.approx(MASK, rel=0.02)
    assert found["attention_far_mask_seconds"] == pytest.approx(MASK, rel=0.02)
    for block, (fixed, each) in found["attention_pair_seconds"].items():
        if block >= 32:
            assert fixed == pytest.approx(FIXED, rel=0.1)
            assert each == pytest.approx(EACH, rel=0.05)


def test_the_host_prices_a_call_as_it_was_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(calibrate, "_sdpa", fused)
    found = {name: {"f32": rate} for name, rate in calibrate._attention("f32").items()} | {"attention_seconds": CALL}
    base = shipped("cpu")
    assert base.host is not None
    host = Host(replace(base, units=1, host=calibrate.with_rates(base.host, found)))
    for keys in (256, 250):
        host, bill = Host(host.d), Bill()
        host.attention(calibrate.HEADS, 128, keys, 64, 64, "f32", bill)
        assert sum(bill.parts.values()) == pytest.approx(fused("f32", 128, keys, 64), rel=0.03)


def test_keys_that_no_cache_of_a_core_holds_are_read_again_by_every_block_of_queries() -> None:
    host = Host(shipped("cpu"))

    def memory(rows: int, keys: int) -> float:
        bill = Bill()
        host.attention(1, rows, keys, 64, 64, "f32", bill)
        return bill.parts.get("memory", 0.0)

    assert memory(1024, 1024) == 0  # 512 KiB of keys and values
    once = 16384 * 128 * 4 / host.h.cache_bytes_per_s / host.gain("element")
    assert memory(32, 16384) == pytest.approx(once)
    # blocks of 256 rows
    assert memory(1024, 16384) == pytest.approx(4 * once)


def test_a_time_is_believed_when_it_comes_again() -> None:
    assert not calibrate.confirmed([])
    assert not calibrate.confirmed([1.0, 1.01, 2.0])
    assert calibrate.confirmed([3.0, 1.0, 1.01, 1.02, 9.0])
    assert not calibrate.confirmed([1.0, 1.0, 1.0, 0.5])


def test_a_disturbed_run_is_repeated() -> None:
    """Three disturbed runs, none like the other, then quiet ones: the quiet time is found."""
    now = [0.0]
    count = [0]

    def run() -> None:
        count[0] += 1
        now[0] += 0.010 if count[0] > 5 else 0.013 + 0.002 * count[0]

    assert calibrate.seconds(run, lambda: now[0]) == pytest.approx(0.010)


def test_tables_are_joined_and_keep_other_types() -> None:
    found: dict[str, object] = {}
    calibrate.merge(found, {"exp_seconds": {"f32": 1.0}, "threads": 2})
    calibrate.merge(found, {"exp_seconds": {"bf16": 2.0}, "curve_seconds": {"tanh": {"f32": 3.0}}})
    calibrate.merge(found, {"curve_seconds": {"tanh": {"bf16": 4.0}, "erf": {"f32": 5.0}}})
    curves = found.pop("curve_seconds")
    assert curves == {"tanh": {"f32": 3.0, "bf16": 4.0}, "erf": {"f32": 5.0}}
    assert found == {"exp_seconds": {"f32": 1.0, "bf16": 2.0}, "threads": 2}
    base = shipped("cpu").host
    assert base is not None
    assert calibrate.with_rates(base, found).exp_seconds == {**base.exp_seconds, "f32": 1.0, "bf16": 2.0}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement one run: the numbers are bad, and the machine's load does not matter."""

    def once(run: Callable[[], object], clock: object = None) -> float:
        run()
        return 1e-5

    monkeypatch.setattr(calibrate, "seconds", once)


@pytest.mark.usefixtures("quick")
def test_every_rate_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "calibration.json"
    monkeypatch.setenv("REATTEND_CALIBRATION", str(where))
    seen: list[str] = []

    def watch(steps: list[calibrate.T], what: str) -> list[calibrate.T]:
        seen.append(what)
        return steps

    found = calibrate.cpu_rates(threads=2, watch=watch)
    assert seen == ["operators, one thread", "operators, 2 threads"]
    assert found.basis == "calibrated"
    assert found.host is not None
    assert found.host.operator_seconds == 1e-5
    assert set(found.host.scaling) == {"product", "attention", "element", "memory", "fault", "flex"}
    assert calibrate.keep(found) == where
    body = json.loads(where.read_text())
    assert {"schema", "torch", "date", "device"} == set(body)
    assert device("cpu").host == found.host


def test_no_file_is_written_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REATTEND_CALIBRATION", "")
    assert calibrate.keep(shipped("cpu")) is None


def test_the_cache_ends_where_a_byte_gets_dear() -> None:
    took = {1 << n: 1.0 if n < 26 else 2.0 for n in range(23, 29)}
    assert calibrate.held(took) == pytest.approx(2**25.5)
    assert calibrate.held(dict.fromkeys(took, 1.0)) > 1 << 28


def test_two_measurements_meet_half_way() -> None:
    from dataclasses import replace

    a = shipped("cpu")
    assert a.host is not None
    assert calibrate.between(a, a) == a
    slow = {t: {r: (2 * x, 2 * y) for r, (x, y) in by.items()} for t, by in a.host.attention_pair_seconds.items()}
    b = replace(a, dram_bytes_per_s=3 * a.dram_bytes_per_s, host=replace(a.host, attention_pair_seconds=slow))
    found = calibrate.between(a, b)
    assert found.dram_bytes_per_s == 2 * a.dram_bytes_per_s
    assert found.host is not None
    assert found.host.attention_pair_seconds["f32"][64][0] == pytest.approx(1.5 * a.host.attention_pair_seconds["f32"][64][0])
    assert found.host.exp_seconds == a.host.exp_seconds
