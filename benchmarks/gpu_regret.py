"""Which of several backends is fastest: the choice that predictions make, beside the clock's, on shapes timed with several.

    regret = measured time of the backend predicted fastest / least measured time - 1

A backend is an engine's kernel. Its time is that of the device's family of kernels, as the library predicts it, times a
factor for each head size, and what its harness takes: gpu_backends.toml, fitted to the part `fit` by gpu_tables.py
--fit backends.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpu_prices import Harness, cascade, sizes, use_of
from gpu_rows import ENGINE, Limits, Row, rows

from reattend.cost_model.devices.device import Device
from reattend.cost_model.time.predict import predict_vendor
from reattend.patterns.verdict import Obstacle

FILE = Path(__file__).with_name("gpu_backends.toml")
TABLES = ("context", "generation")
# Other engines, and what their tables call their kernels.
ENGINES: Mapping[str, tuple[str, ...]] = {
    "sglang": ("fa3", "flash_attention", "trtllm_mha", "flashinfer", "triton"),
    "trtllm": ("torch_flow", "torch_flow_flashinfer"),
}
# Tables that say more bytes a second than the memory has, over many shapes.
UNTRUSTED = (("a100", "generation", "trtllm"),)
# Times so near each other are one time to the tables.
TIE = 0.05
# So many heads at most share keys in the common kernels.
MOST_SHARED = 32
# No call is shorter.
LEAST = 1e-6
# Of the engine's own rows, whose kernel prices all others: their mean error (results/gpu_tables.json).
OWN_SPREAD = 0.07
# How much of the spread counts against a backend: chosen on the part `choose`.
CAUTION: Mapping[str, float] = {"context": 0.0, "generation": 0.75}
# Fewer shapes than these give no rates.
FEWEST = 12
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Call:
    """A row's call as the library prices it: seconds of the device's own kernel, those of its memory, its programs for each
    unit of the device, and what the harness of `ENGINE` takes beside it."""

    row: Row
    kernel: float
    memory: float
    programs: float
    beside: float

    @staticmethod
    def of(r: Row, d: Device, h: Harness) -> Call:
        cost = predict_vendor(cascade(r.causal, r.window, r.group), use_of(r), d, sizes(r), beside=h.written(r))
        assert not isinstance(cost, Obstacle), cost
        programs = r.batch * r.key_heads / d.units
        return Call(r, cost.seconds, cost.parts["memory"], programs, h.seconds(r, d, cost.bytes))


@dataclass(frozen=True)
class Terms:
    """A backend's time: `factor` by head size of the kernel's time, or of its memory's (`of`), and seconds beside it.

    `spread` is the mean |log| of the ratio to measured times that the terms were fitted to: how little is known.
    """

    of: str
    factor: Mapping[int, float]
    call: float
    sequence: float
    token: float
    program: float
    spread: float

    def seconds(self, c: Call) -> float:
        r = c.row
        own = c.kernel if self.of == "kernel" else c.memory
        beside = self.call + r.batch * (self.sequence + r.queries * self.token) + c.programs * self.program
        return max(self.factor[r.head] * own + beside, LEAST)


# A backend's terms by how many heads share keys: engines have another kernel for one head alone, and one for many.
Rates = Mapping[str, Terms]


def kind(r: Row) -> str:
    return "alone" if r.group == 1 else "shared" if r.group <= MOST_SHARED else "many"


def said(rates: Rates, c: Call) -> tuple[float, float] | None:
    """Seconds and their spread; None where a backend has no terms for such a call."""
    terms = rates.get(kind(c.row))
    return (terms.seconds(c), terms.spread) if terms is not None and c.row.head in terms.factor else None


@dataclass(frozen=True)
class Field:
    """One shape with the times of its backends: measured, and predicted with their spread."""

    row: Row
    measured: Mapping[str, float]
    predicted: Mapping[str, tuple[float, float]]

    @property
    def chosen(self) -> str:
        """The backend with the least time, each as slow as its spread says: what is little known has to be clearly
        faster."""
        caution = CAUTION[self.row.table]
        return min(self.predicted, key=lambda b: self.predicted[b][0] * math.exp(caution * self.predicted[b][1]))

    def regret(self, backend: str) -> float:
        return self.measured[backend] / min(self.measured.values()) - 1


def raced(device: str, table: str, limits: Limits) -> dict[Shape, dict[str, Row]]:
    """Rows of each shape that several backends were timed with, by backend; `ENGINE` is always one of them."""
    found: dict[Shape, dict[str, Row]] = defaultdict(dict)
    for r in rows(device, table, limits)[0]:
        found[r.shape][ENGINE] = r
    for engine, names in ENGINES.items():
        if (device, table, engine) in UNTRUSTED:
            continue
        for r in rows(device, table, limits, engine, {n: n for n in names})[0]:
            # values of such heads are narrower in one engine, and nothing in the tables says so
            if r.shape in found and r.head != 192:
                found[r.shape][f"{engine} {r.kernel}"] = r
    return {shape: by for shape, by in found.items() if len(by) > 1}


def drawn(given: Mapping[Shape, dict[str, Row]], part: str, most: int) -> list[dict[str, Row]]:
    """Shapes of a part, evenly over the times of each head size and group."""
    strata: dict[tuple[int, int], list[dict[str, Row]]] = defaultdict(list)
    for by in given.values():
        r = by[ENGINE]
        if r.part == part:
            strata[r.head, r.group].append(by)
    total = sum(map(len, strata.values()))
    out = []
    for same in strata.values():
        same.sort(key=lambda by: (by[ENGINE].seconds, by[ENGINE].shape))
        n = len(same) if total <= most else max(1, round(most * len(same) / total))
        out += [same[i * len(same) // n] for i in range(n)]
    return out


def fields_of(
    given: Iterable[Mapping[str, Row]], d: Device, h: Harness, rates: Mapping[str, Rates]
) -> list[Field]:
    """Shapes with predictions of those backends whose rates are known."""
    out = []
    for by in given:
        call = Call.of(by[ENGINE], d, h)
        times = {b: t for b in by if b in rates and (t := said(rates[b], call)) is not None}
        times[ENGINE] = call.kernel + call.beside, OWN_SPREAD
        if len(times) > 1:
            out.append(Field(call.row, {b: by[b].seconds for b in times}, times))
    return out


def _terms(v: Mapping[str, Any]) -> Terms:
    factor = {int(h): float(f) for h, f in v["factor"].items()}
    return Terms(v["of"], factor, v["call"], v["sequence"], v["token"], v["program"], v["spread"])


@lru_cache(maxsize=1)
def known() -> Mapping[tuple[str, str], Mapping[str, Rates]]:
    """Rates of the backends by device and table."""
    out: dict[tuple[str, str], dict[str, Rates]] = {}
    for device, tables in tomllib.loads(FILE.read_text("utf-8")).items():
        for table, backends in tables.items():
            out[device, table] = {name: {k: _terms(v) for k, v in kinds.items()} for name, kinds in backends.items()}
    return out


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regret:
    """Of some shapes: the mean and the 95th percentile of the regret, the share chosen within a tie of the best, and what
    one backend for all of them would have cost, where all have it."""

    n: int
    mean: float
    p95: float
    right: float
    constant: Mapping[str, float]

    @staticmethod
    def of(found: Sequence[Field]) -> Regret:
        lost = sorted(f.regret(f.chosen) for f in found)
        every = set.intersection(*(set(f.measured) for f in found))
        return Regret(
            len(lost), statistics.fmean(lost), lost[min(len(lost) - 1, int(0.95 * len(lost)))],
            statistics.fmean(x <= TIE for x in lost),
            {b: statistics.fmean(f.regret(b) for f in found) for b in sorted(every)},
        )

    def __str__(self) -> str:
        always = ", ".join(f"{b} {x:.1%}" for b, x in self.constant.items())
        return f"{self.n:5d} {self.mean:7.1%} {self.p95:7.1%} {self.right:6.0%}   {always}"


# --- fitting --------------------------------------------------------------------------------------------------------

ROUNDS, STEP, SMALLEST, MICROSECOND = 60, 0.5, 1e-3, 1e-6


def fit(given: Sequence[tuple[Call, float]]) -> Terms:
    """Terms of a backend from calls and their measured seconds: those with the least mean |log| of the ratio."""
    found = min((_searched(given, of) for of in ("kernel", "memory")), key=lambda t: _loss(given, t))
    return replace(found, spread=_loss(given, found))


def _searched(given: Sequence[tuple[Call, float]], of: str) -> Terms:
    heads = sorted({c.row.head for c, _ in given})
    now = {f"factor.{h}": 1.0 for h in heads} | {"call": 1e-6, "sequence": 1e-9, "token": 1e-10}
    now |= {"call": 5e-6, "program": 1e-6} if of == "memory" else {"program": 0.0}
    steps = dict.fromkeys(now, STEP)
    best = _loss(given, _made(of, now))
    for _ in range(ROUNDS):
        for name in now:
            for by in (steps[name], -steps[name]):
                # programs of the device's own kernel may be dearer than a backend's
                moved = now[name] + by * MICROSECOND if name == "program" else now[name] * math.exp(by)
                if (loss := _loss(given, _made(of, {**now, name: moved}))) < best:
                    now, best = {**now, name: moved}, loss
                    break
            else:
                steps[name] = max(steps[name] / 2, SMALLEST)
    return _made(of, now)


def _made(of: str, values: Mapping[str, float]) -> Terms:
    factor = {int(n.removeprefix("factor.")): v for n, v in values.items() if n.startswith("factor.")}
    return Terms(of, factor, values["call"], values["sequence"], values["token"], values["program"], 0.0)


def _loss(given: Sequence[tuple[Call, float]], terms: Terms) -> float:
    return statistics.fmean(abs(math.log(terms.seconds(c) / measured)) for c, measured in given)


def fitted(given: Iterable[Mapping[str, Row]], d: Device, h: Harness) -> dict[str, Rates]:
    """Terms of every backend and kind of group with enough shapes."""
    by: dict[str, dict[str, list[tuple[Call, float]]]] = defaultdict(lambda: defaultdict(list))
    for shape in given:
        call = Call.of(shape[ENGINE], d, h)
        for name, r in shape.items():
            if name != ENGINE:
                by[name][kind(r)].append((call, r.seconds))
    every = {name: {k: fit(some) for k, some in kinds.items() if len(some) >= FEWEST} for name, kinds in sorted(by.items())}
    return {name: rates for name, rates in every.items() if rates}


def written(device: str, table: str, found: Mapping[str, Rates]) -> str:
    """The rates as gpu_backends.toml has them."""
    lines = []
    for name, rates in found.items():
        for k, t in rates.items():
            factor = ", ".join(f"{h} = {f:.3g}" for h, f in t.factor.items())
            beside = [f"{n} = {getattr(t, n):.3g}" for n in ("call", "sequence", "token", "program", "spread")]
            lines += [f'[{device}.{table}."{name}".{k}]', f'of = "{t.of}"', f"factor = {{ {factor} }}", *beside, ""]
    return "\n".join(lines)
