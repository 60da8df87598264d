"""Devices: plain numbers of a machine, each with its source, read from the data files in `devices/`.

Rates are per second, sizes in bytes; units stand in the names. Matrix rates are dense (never 2:4-sparse) and a
multiply-add is two operations. `model` holds the constants of the time model that a calibration would measure.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from ..json import Json, Read
from .architecture import Architecture, architecture
from .kernels import FILE as KERNELS
from .kernels import vendor_kernels
from .latents import FILE as LATENTS
from .layers import FILE as LAYERS

# A number of a machine, or a table of them.
Rate: TypeAlias = "str | float | tuple[float, float] | Mapping[str, Rate] | Mapping[int, Rate]"
KINDS = ("cuda", "hip", "cpu", "array")
KNOWN = ("tables", "family", "sheet")


class UnknownDevice(ValueError):
    """A target that no device file describes; the message names the valid ones."""


@dataclass(frozen=True)
class TimeModel:
    """What lies between a data sheet and a kernel.

    `overlap` is the share of the smaller resources' time that hides under the largest (0: a sum, 1: a maximum) in our
    kernels, `vendor_overlap` in the vendor's; `partial_factor` is how much dearer a tile is whose mask is evaluated.
    Products reach `matrix_efficiency` of the peak in our kernels and in eager operators, `vendor_matrix_efficiency` in a
    vendor's, whose programs and draws take `vendor_program_factor` of the clocks that kernels.toml has. A further kernel of
    the same call costs `further_seconds`. Bytes from memory cost `ramp_seconds` more, all of it where there are as many as
    the last cache holds; a long kernel takes `power_share` longer, half of that after `power_seconds`.
    `flex_share` is FlexAttention's rate beside our kernel's, `efficient_share` that of SDPA's memory-efficient kernel, which
    takes a mask tensor, beside the flash kernel's.
    """

    matrix_efficiency: float = 0.8
    bandwidth_efficiency: float = 0.9
    overlap: float = 0.1
    vendor_overlap: float = 0.5
    vendor_matrix_efficiency: float = 0.8
    vendor_program_factor: float = 1.0
    partial_factor: float = 1.4
    vendor_partial_factor: float = 1.1
    flex_share: float = 0.9
    efficient_share: float = 0.6
    launch_seconds: float = 4e-6
    further_seconds: float = 2e-6
    power_share: float = 0.0
    power_seconds: float = 3e-3
    ramp_seconds: float = 0.0
    prologue_seconds: float = 1e-6
    load_latency_seconds: float = 7e-7


@dataclass(frozen=True)
class HostRates:
    """What PyTorch's operators cost on a CPU: rates of one thread, and what all `threads` bring by class of work.

    `attention_pair_seconds[dtype][rows]` is (fixed, per element of e + f) for one (query, key) pair inside SDPA's fused
    CPU kernel, whose own query block has 32, 64 or 256 rows; `attention_row_seconds` is for each row of a block and each
    of its blocks of 512 keys, `attention_key_seconds` for each element of a key and its value that a call lays out anew.
    `row_flops_per_s` is the rate of products of one row, which no product falls below.
    `step_factor` is what a step of our product body takes beside the sum of its operators, each timed on its own.
    `attention_far_mask_seconds` are of a pair whose mask lies out of the core's own cache, `attention_left_seconds` of a row
    whose last keys fill no vector register.
    `curve_seconds[operator][dtype]` are of an element of tanh and the like; what has no entry is so many exponentials.
    `flex_pair_seconds` are of a pair that is not masked, `flex_mask_seconds` what one of a masked block takes more, and
    `flex_key_seconds` are for each element of a key and its value that a block of queries lays out anew,
    `flex_left_seconds` for a pair of a block whose keys fill no vector register, an element of e + f, `flex_far_seconds`
    for one of a block whose scores the core's own cache does not hold, `flex_score_seconds` for one whose score is changed,
    `flex_blocks_seconds` for the block mask, which is made at each call.
    Of our fused body: `fused_multiply_seconds` are of a multiply-add, `fused_pair_seconds` of a plain softmax a pair,
    `fused_element_seconds` and `fused_exp_seconds` of another operator and another exponential a pair, `fused_row_seconds`
    of a row, `fused_key_seconds` of an element of a key and its value that a unit lays out, `fused_bias_seconds` of an
    element of a bias.
    `gather_seconds` are of an element that an operator reads at coordinates in tensors, `division_seconds` of an integer
    division, `transpose_seconds` of an element that is copied to another innermost dimension; `fused_gather_seconds` and
    `fused_division_seconds` of the first two inside our fused loop.
    `company_factor[kind][dtype]` is what a call takes between other calls beside what all these say, with one thread and
    with several, `company_call_seconds[kind]` what it takes longer until its code and its operands are back in the caches.
    """

    threads: int
    operator_seconds: float
    product_seconds: float
    attention_seconds: float
    mask_seconds: float
    operator_call_seconds: float
    step_factor: float
    flex_call_seconds: float
    flex_blocks_seconds: float
    flex_score_seconds: float
    cache_bytes: float
    cache_bytes_per_s: float
    fault_bytes: float
    fault_seconds_per_byte: float
    gemm_half_rows: Mapping[str, float]
    row_flops_per_s: Mapping[str, float]
    element_seconds: Mapping[str, float]
    exp_seconds: Mapping[str, float]
    curve_seconds: Mapping[str, Mapping[str, float]]
    softmax_seconds: Mapping[str, float]
    where_seconds: Mapping[str, float]
    attention_mask_seconds: Mapping[str, float]
    attention_far_mask_seconds: Mapping[str, float]
    attention_row_seconds: Mapping[str, float]
    attention_key_seconds: Mapping[str, float]
    attention_left_seconds: Mapping[str, float]
    attention_pair_seconds: Mapping[str, Mapping[int, tuple[float, float]]]
    flex_pair_seconds: Mapping[str, tuple[float, float]]
    flex_mask_seconds: Mapping[str, float]
    flex_key_seconds: Mapping[str, float]
    flex_left_seconds: Mapping[str, float]
    flex_far_seconds: Mapping[str, float]
    fused_call_seconds: float
    fused_row_seconds: float
    fused_element_seconds: float
    fused_exp_seconds: float
    fused_multiply_seconds: Mapping[str, float]
    fused_pair_seconds: Mapping[str, float]
    fused_key_seconds: Mapping[str, float]
    fused_bias_seconds: Mapping[str, float]
    gather_seconds: float
    division_seconds: float
    transpose_seconds: float
    fused_gather_seconds: float
    fused_division_seconds: float
    scaling: Mapping[str, float]
    company_factor: Mapping[str, Mapping[str, tuple[float, float]]]
    company_call_seconds: Mapping[str, float]


@dataclass(frozen=True)
class Device:
    """A machine as the cost model sees it. `kind` is cuda, hip, cpu or array (a spatial accelerator).

    `units` are streaming multiprocessors, compute units or threads; `link_bytes_per_s` is one direction, `link_devices` how
    many devices it joins (a node), and `network_bytes_per_s` what one device has to other nodes.
    `basis` says whether the constants of the time model are assumed ("uncalibrated") or calibrated on a machine; `band` how
    far predictions may be off: a time within seconds / (1 + band) and seconds · (1 + band) is as predicted. A calibration
    measures the band on shapes that it was not fitted to; without one it is stated in the data file.
    `kernel` is the family of vendors' kernels (kernels.toml) that SDPA runs on a GPU, and `known` where the rates of such
    kernels come from: "tables" of timings on the device, the "family" of kernels timed on its like, or the data "sheet".
    `prefill_band` and `decode_band` are those of such kernels, `bare_band` that of prompts under no mask (0: as others),
    `band_seconds` what comes to them on short calls; 0: `band`.
    """

    name: str
    title: str
    kind: str
    arch: str
    units: int
    clock_hz: float
    dram_bytes_per_s: float
    dram_bytes: float
    matrix_flops_per_s: Mapping[str, float] = field(hash=False)
    l2_bytes: float = 0.0
    l2_bytes_per_s: float = 0.0
    shared_bytes_per_unit: int = 0
    shared_bytes_per_block: int = 0
    shared_bytes_per_unit_clock: int = 0
    registers_per_unit: int = 0
    registers_per_thread: int = 0
    threads_per_unit: int = 0
    threads_per_warp: int = 0
    exps_per_unit_clock: float = 0.0
    lanes_per_unit: int = 0
    link_bytes_per_s: float = 0.0
    link_latency_seconds: float = 0.0
    link_devices: int = 0
    network_bytes_per_s: float = 0.0
    network_latency_seconds: float = 0.0
    array_lanes: int = 0
    vector_lanes: int = 0
    buffer_bytes: int = 0
    exp_slots: int = 0
    kernel: str = ""
    known: str = "sheet"
    prefill_band: float = 0.0
    decode_band: float = 0.0
    bare_band: float = 0.0
    band_seconds: float = 0.0
    model: TimeModel = TimeModel()
    host: HostRates | None = field(default=None, hash=False)
    basis: str = "uncalibrated"
    band: float = 1.0
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # made once: what a kernel takes is kept by the device
        return hash((self.name, self.kind, self.arch, self.units, self.clock_hz, self.dram_bytes_per_s, self.model))

    def __getstate__(self) -> dict[str, object]:
        # hashes of texts differ from process to process
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}

    @property
    def exps_per_s(self) -> float:
        """Exponentials a second of the special-function units."""
        return self.units * self.exps_per_unit_clock * self.clock_hz

    @property
    def architecture(self) -> Architecture:
        """What is known of a GPU's architecture. Raises UnknownArchitecture, for what is no GPU as well."""
        return architecture(self.arch)

    def vendor_band(self, decode: bool, seconds: float, bare: bool = False) -> float:
        """How far a vendor's kernel may be off that is predicted to take so long; `bare`: no mask hides a key."""
        band = self.decode_band if decode else (bare and self.bare_band) or self.prefill_band
        return band + self.band_seconds / seconds if band else self.band

    @property
    def is_gpu(self) -> bool:
        """Is it a GPU, of NVIDIA or AMD?"""
        return self.kind in ("cuda", "hip")

    def matrix_rate(self, dtype: str) -> float:
        """Peak FLOP a second for products of this dtype; the f32 rate where a type has no unit of its own."""
        return self.matrix_flops_per_s.get(dtype, self.matrix_flops_per_s.get("f32", 0.0))

    def __str__(self) -> str:
        return f"{self.name}: {self.title} ({self.basis}, times ±{self.band:.0%})"


def _split(table: Read, path: str, sources: dict[str, str]) -> dict[str, Any]:
    """Separate `[value, ..., source]` rows into values and sources; tables recurse."""
    out: dict[str, Any] = {}
    for key, row in table.items():
        where = f"{path}.{key}" if path else key
        if isinstance(row, dict):
            out[key] = _split(row, where, sources)
        elif isinstance(row, list):
            sources[where] = str(row[-1])
            out[key] = row[0] if len(row) == 2 else tuple(row[:-1])
        else:
            out[key] = row
    return out


def alone(d: Device) -> Device:
    """The device as if every call found the machine as it left it: what operators take when they are timed one by one."""
    assert d.host is not None
    return replace(d, host=replace(d.host, company_factor={}, company_call_seconds={}))


def host_rates(table: Read) -> HostRates:
    """Host rates from plain nested data (a device file or a calibration file)."""
    values = dict(table)
    pairs = values["attention_pair_seconds"]
    values["attention_pair_seconds"] = {
        dtype: {int(rows): (float(t[0]), float(t[1])) for rows, t in by_rows.items()} for dtype, by_rows in pairs.items()
    }
    values["flex_pair_seconds"] = {d: (float(t[0]), float(t[1])) for d, t in values["flex_pair_seconds"].items()}
    off = values["company_factor"]
    values["company_factor"] = {k: {d: (float(x), float(y)) for d, (x, y) in table.items()} for k, table in off.items()}
    missing = {f.name for f in fields(HostRates)} - set(values)
    if missing:
        raise ValueError(f"host rates lack {', '.join(sorted(missing))}")
    return HostRates(**{f.name: values[f.name] for f in fields(HostRates)})


def parse_device(text: str) -> Device:
    """A device from the text of a device file. Raises ValueError on an unknown kind, field, or architecture of a GPU."""
    sources: dict[str, str] = {}
    values = _split(tomllib.loads(text), "", sources)
    if values.get("kind") not in KINDS:
        raise ValueError(f"device kind {values.get('kind')!r}; one of {', '.join(KINDS)}")
    model = TimeModel(**values.pop("model", {}))
    host = values.pop("host", None)
    unknown = set(values) - {f.name for f in fields(Device)}
    if unknown:
        raise ValueError(f"device {values.get('name')}: unknown field {', '.join(sorted(unknown))}")
    made = Device(**values, model=model, host=host_rates(host) if host else None, sources=sources)
    if made.is_gpu:
        architecture(made.arch)
        if made.kernel not in vendor_kernels() or made.known not in KNOWN:
            raise ValueError(f"device {made.name}: kernel {made.kernel!r} of {made.known!r} is none of those known")
    return made


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Device]:
    folder = files(__package__)
    others = {KERNELS.name, LATENTS.name, LAYERS.name}
    names = [f for f in folder.iterdir() if f.name.endswith(".toml") and f.name not in others]
    found = [parse_device(f.read_text("utf-8")) for f in names]
    return {d.name: d for d in sorted(found, key=lambda d: d.name)}


def shipped(name: str) -> Device:
    """The device as its data file has it, without a calibration of this machine."""
    return _shipped()[name]


def targets() -> list[Device]:
    """Every device that a plan can be made for, by name."""
    return [_calibrated(d) for d in _shipped().values()]


def device(target: str | Device) -> Device:
    """The device of this name, calibrated where it was on this machine; a Device is itself.

    Raises UnknownDevice, naming the closest and all valid names.
    """
    if isinstance(target, Device):
        return target
    found = _shipped().get(target.strip().lower())
    if found is not None:
        return _calibrated(found)
    close = difflib.get_close_matches(target.strip().lower(), list(_shipped()), n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownDevice(f"unknown target {target!r}{hint}; one of: {', '.join(_shipped())}")


def with_threads(d: Device, threads: int) -> Device:
    """The CPU with this number of threads: the measured scaling, drawn as a straight line between one and its own."""
    if d.host is None or threads == d.units:
        return d
    own = max(d.units, 2)
    scaling = {k: max(1.0, 1.0 + (s - 1.0) * (threads - 1) / (own - 1)) for k, s in d.host.scaling.items()}
    return replace(d, units=threads, host=replace(d.host, threads=threads, scaling=scaling))


# --- calibration files ------------------------------------------------------------------------------------------

CALIBRATION_SCHEMA = 5
# Names another file, for whatever device is calibrated next; empty: none is read or written.
CALIBRATION_VARIABLE = "REATTEND_CALIBRATION"


def processor() -> str:
    """The processor's name as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"


def calibration_path(name: str = "cpu") -> Path | None:
    """Where the calibration of a device lies, the CPU's under this processor's name; None where none is wanted."""
    told = os.environ.get(CALIBRATION_VARIABLE)
    if told is not None:
        return Path(told) if told else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    word = re.sub(r"\W+", "-", processor() if name == "cpu" else name).strip("-").lower()
    return cache / "reattend" / f"calibration-{word}.json"


def _calibrated(d: Device) -> Device:
    """The device with this machine's rates where a calibration file of it is there, of this version; else as it is."""
    path = calibration_path(d.name)
    if path is None or not path.is_file():
        return d
    found = _read_calibration(path, path.stat().st_mtime_ns)
    return replace(found, sources=d.sources, kernel=d.kernel) if found is not None and found.name == d.name else d


@lru_cache(maxsize=8)
def _read_calibration(path: Path, changed: int) -> Device | None:
    """The device of a calibration file; None where the file has another schema or is damaged."""
    del changed
    try:
        body = json.loads(path.read_text("utf-8"))
        return device_from_dict(body["device"]) if body["schema"] == CALIBRATION_SCHEMA else None
    except (ValueError, KeyError, TypeError):
        return None


# --- plain data -------------------------------------------------------------------------------------------------


def device_to_dict(d: Device) -> dict[str, Json]:
    """The device as nested plain data, without its sources."""
    out = {f.name: getattr(d, f.name) for f in fields(d) if f.name != "sources"}
    host = None
    if d.host is not None:
        host = {f.name: _plain(getattr(d.host, f.name)) for f in fields(d.host)}
    return out | {
        "matrix_flops_per_s": dict(d.matrix_flops_per_s), "host": host,
        "model": {f.name: getattr(d.model, f.name) for f in fields(d.model)},
    }


def _plain(x: Rate) -> Json:
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    return list(x) if isinstance(x, tuple) else x


def device_from_dict(table: Read) -> Device:
    """The device that `device_to_dict` wrote. Raises TypeError or ValueError on other data."""
    values = dict(table)
    host = values.pop("host")
    return Device(**{**values, "model": TimeModel(**values["model"]), "host": host_rates(host) if host else None})
