"""A measured row of a GPU's tables, priced by the cost model: its cascade, its kernel, and what the harness adds.

    seconds = predict_vendor(cascade of the row) + harness

The harness replays one call from a CUDA graph, so operands that the last cache holds are read from there. Serving engines
write the new keys and values to a paged cache before attention, and plan the launch: gpu_harness.toml has what that takes.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from gpu_rows import Row

from reattend.cost_model.count.subject import Shape, Subject, shape, subject
from reattend.cost_model.count.tiles import NOTHING
from reattend.cost_model.devices.device import Device
from reattend.cost_model.devices.kernels import VendorFacts
from reattend.cost_model.time import gpu, vendor_gpu
from reattend.cost_model.time.predict import VendorUse, predict_vendor
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.verdict import Obstacle

FILE = Path(__file__).with_name("gpu_harness.toml")
# Threads of a block that writes a token: one for each element of its keys, from two warps to this. Source: the steps of the
# measured times with heads and their size, alike on every device.
WRITE_THREADS = (64, 512)
P, M = ex.index("p"), ex.index("m")


@dataclass(frozen=True)
class Harness:
    """What a table's harness takes beside the kernel.

    A call of an engine, for a prompt and for a token; finding each sequence of a batch; the write of the cache: so many
    times the bytes of its new keys and values, or the latency of a block of threads, which writes one token, times the waves
    of such blocks, whichever is longer, and smooth between.
    """

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    write_factor: float = 2.0
    block_seconds: float = 0.0
    sequence_seconds: float = 0.0

    def written(self, r: Row) -> float:
        """Bytes that the write of the cache moves: it reads the new keys and values, and writes them."""
        new = 2.0 * r.batch * r.queries * r.key_heads * (r.head + r.value)
        return 0.0 if r.table == "encoder" else 2 * new

    def seconds(self, r: Row, d: Device, work: float) -> float:
        """Seconds beside a kernel that moves `work` bytes."""
        found = r.batch * self.sequence_seconds
        if r.table == "encoder":
            return found
        moved = self.written(r)
        near = gpu.held(moved + work, d)
        rate = 1 / ((1 - near) / d.dram_bytes_per_s + near / d.l2_bytes_per_s)
        call = self.prompt_seconds if r.queries > 1 else self.decode_seconds
        write = self.write_factor / 2 * moved / (d.model.bandwidth_efficiency * rate)
        threads = min(max(r.key_heads * r.head, WRITE_THREADS[0]), WRITE_THREADS[1])
        waves = r.batch * r.queries * threads / (d.threads_per_unit * d.units)
        return found + call + math.hypot(write, waves * self.block_seconds)


@lru_cache(maxsize=1)
def harnesses() -> Mapping[str, Harness]:
    """The harness of each device's tables."""
    wanted = {f.name for f in fields(Harness)}
    table = tomllib.loads(FILE.read_text("utf-8"))
    return {d: Harness(**{k: v for k, v in values.items() if k in wanted}) for d, values in table["harness"].items()}


def narrow(c: Cascade) -> Cascade:
    """The cascade in bf16 throughout."""

    def rule(e: ex.Expr, args: tuple[ex.Expr, ...]) -> ex.Expr | None:
        return ex.load(str(e.attr), args, "bf16") if e.op == "load" else None

    return replace(
        c, tensors=tuple(replace(t, dtype="bf16") for t in c.tensors),
        einsums=tuple(replace(e, body=ex.rebuild(e.body, rule)) for e in c.einsums),
    )


@lru_cache(maxsize=256)
def cascade(causal: bool, window: int, group: int) -> Cascade:
    """Attention over heads of a group, under the mask of a row."""
    keep = (M <= P) & (window > P - M) if window else M <= P
    score: papers.Score = (lambda b, s: ex.where(keep, s * 0.125, -3e38)) if causal else papers.plain
    return narrow(papers.attention("row", papers.softmax, score, group=group))


def sizes(r: Row) -> dict[str, int]:
    return {"B": r.batch, "H": r.heads, "P": r.queries, "M": r.keys, "E": r.head, "F": r.value}


@lru_cache(maxsize=1 << 15)
def bound(r: Row) -> tuple[Subject, Shape]:
    s = subject(cascade(r.causal, r.window, r.group))
    assert not isinstance(s, Obstacle), s
    return s, shape(s.cascade, s.attention, sizes(r))


def use_of(r: Row) -> VendorUse:
    return VendorUse(r.kernel, skips=r.causal)


def priced(r: Row, d: Device, h: Harness) -> tuple[float, float, str]:
    """Seconds, the stated band and what bounds: as the library says it, with the harness."""
    written = h.written(r)
    cost = predict_vendor(cascade(r.causal, r.window, r.group), use_of(r), d, sizes(r), beside=written)
    assert not isinstance(cost, Obstacle), cost
    return cost.seconds + h.seconds(r, d, cost.bytes), cost.band, cost.bound


@dataclass
class Works:
    """Rows laid out once for a family of kernels on a device, to be timed under many constants."""

    rows: tuple[Row, ...]
    layouts: tuple[gpu.KernelWork, ...]

    @staticmethod
    def of(rows: tuple[Row, ...], d: Device, facts: VendorFacts) -> Works:
        laid = (vendor_gpu.laid_out(*bound(r), facts, d, r.causal, NOTHING) for r in rows)
        return Works(rows, tuple(laid))

    def seconds(self, d: Device, facts: VendorFacts, h: Harness, scheduled: int) -> list[float]:
        """Seconds of each row; queues longer than `scheduled` are not run job by job."""
        out = []
        for r, k in zip(self.rows, self.layouts):
            cost = gpu.seconds(k, d, vendor_gpu.pace(facts, d, k), scheduled, h.written(r))
            out.append(cost.seconds + h.seconds(r, d, cost.bytes))
        return out
