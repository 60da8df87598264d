"""Devices: every number has a source, rates are dense, unknown names are told what to say instead."""

import json
import math
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from reattend.cost_model.devices import device as devices
from reattend.cost_model.devices.device import (
    UnknownDevice,
    calibration_path,
    device,
    device_from_dict,
    device_to_dict,
    parse_device,
    shipped,
    targets,
    with_threads,
)

NAMES = (
    "a10", "a100", "b200", "b300", "cpu", "fusemax", "gb200", "gb300", "h100", "h200", "l4", "l40s", "mi300x", "rtx3090", "rtx4090",
    "rtx5090", "rtxpro6000",
)


@pytest.fixture(autouse=True)
def _uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REATTEND_CALIBRATION", "")


def test_targets_are_the_files() -> None:
    assert tuple(d.name for d in targets()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    def numbers(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, list[Any]]]:
        for key, row in table.items():
            if isinstance(row, dict):
                yield from numbers(row, f"{path}{key}.")
            elif not isinstance(row, str):
                yield f"{path}{key}", row

    text = files("reattend.cost_model.devices").joinpath(f"{name}.toml").read_text("utf-8")
    for where, row in numbers(tomllib.loads(text)):
        assert isinstance(row, list), where
        assert isinstance(row[-1], str), where
        assert row[-1], where
        assert all(isinstance(x, (int, float)) for x in row[:-1]), where


@pytest.mark.parametrize(("name", "dense"), [("h100", 989.4e12), ("b200", 2250e12), ("l4", 121e12), ("a100", 312e12)])
def test_matrix_rates_are_dense(name: str, dense: float) -> None:
    assert device(name).matrix_rate("bf16") == dense


def test_d3_exponentials() -> None:
    assert device("h100").exps_per_s == pytest.approx(3.865e12, rel=1e-3)
    assert device("b200").exps_per_s == pytest.approx(4.381e12, rel=1e-3)
    assert device("h100").matrix_rate("bf16") / device("h100").exps_per_s == pytest.approx(256, rel=1e-3)
    assert device("b200").matrix_rate("bf16") / device("b200").exps_per_s == pytest.approx(512, rel=5e-3)


def test_unknown_names_the_closest_and_all() -> None:
    with pytest.raises(UnknownDevice, match=r"unknown target 'h20' \(did you mean 'h200'\?\); one of: a10, a100, .*rtx4090"):
        device("h20")
    with pytest.raises(UnknownDevice, match=r"unknown target 'toaster'; one of"):
        device("toaster")


def test_a_device_is_itself_and_names_ignore_case() -> None:
    assert device(device("H200 ")) is device("h200")


def test_plain_data_round_trip() -> None:
    for d in targets():
        assert device_from_dict(json.loads(json.dumps(device_to_dict(d)))) == d


def test_unknown_fields_and_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown field warp_speed"):
        parse_device('name = "x"\nkind = "cuda"\nwarp_speed = [9, "none"]\n')
    with pytest.raises(ValueError, match="device kind 'tpu'"):
        parse_device('name = "x"\nkind = "tpu"\n')


def test_threads_scale_between_one_and_the_measured() -> None:
    def gain(threads: int) -> float:
        host = with_threads(shipped("cpu"), threads).host
        assert host is not None
        return host.scaling["product"]

    assert gain(1) == 1.0
    assert gain(2) > 1.5
    assert gain(4) == pytest.approx(1 + 3 * (gain(2) - 1))


def test_a_calibration_file_is_read_and_a_damaged_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "calibration.json"
    monkeypatch.setenv("REATTEND_CALIBRATION", str(where))
    assert calibration_path() == where
    assert device("cpu").basis == "uncalibrated"
    body = {**device_to_dict(shipped("cpu")), "basis": "calibrated", "dram_bytes_per_s": 1e9}
    where.write_text(json.dumps({"schema": devices.CALIBRATION_SCHEMA, "device": body}))
    assert device("cpu").basis == "calibrated"
    assert device("cpu").dram_bytes_per_s == 1e9
    where.write_text("{}")
    devices._read_calibration.cache_clear()
    assert device("cpu").basis == "uncalibrated"


@pytest.mark.parametrize(("name", "sparse"), [("h100", 1979e12), ("h200", 1979e12), ("l4", 242e12), ("a100", 624e12), ("b200", 4500e12), ("mi300x", 2614.9e12)])
def test_no_rate_is_the_sparse_one(name: str, sparse: float) -> None:
    """Known wrong: the figures with 2:4 sparsity, twice the dense ones, which some tables list as peaks."""
    d = shipped(name)
    for dtype in ("bf16", "f16"):
        assert d.matrix_rate(dtype) < 0.6 * sparse
        # the dense rate is what the units can do: a power of two of multiply-adds a clock
        per_clock = d.matrix_rate(dtype) / (d.units * d.clock_hz)
        assert per_clock == pytest.approx(2 ** round(math.log2(per_clock)), rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_every_device_states_a_band(name: str) -> None:
    d = shipped(name)
    assert d.basis == "uncalibrated"
    assert 0 < d.band <= 1
    assert "band" in d.sources


def test_a_calibration_belongs_to_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "calibration.json"
    monkeypatch.setenv("REATTEND_CALIBRATION", str(where))
    body = {**device_to_dict(shipped("h200")), "basis": "calibrated", "band": 0.15}
    where.write_text(json.dumps({"schema": devices.CALIBRATION_SCHEMA, "device": body}))
    assert device("h200").basis == "calibrated"
    assert device("h200").band == 0.15
    assert device("h100").basis == device("cpu").basis == "uncalibrated"
