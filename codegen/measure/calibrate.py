"""Calibration of the present device, with its check: `reattend targets --calibrate`.

    operators and kernels, timed        → rates and constants of the time model
    all ways of some shapes, in turn    → what calls between other work take beside what they take alone (company.py)
    shapes that nothing was fitted to   → how far the model is off there: the band that plans state

The CPU's operators are timed in cost_model/calibration/calibrate.py, a GPU's rates in calibrate_gpu.py; here is what needs
our operator or a compiled FlexAttention on the CPU, and the check at the end. Under two minutes on a CPU, less on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...cost_model.calibration.accuracy import error, percentile
from ...cost_model.calibration.calibrate import (
    Watch,
    between,
    cpu_rates,
    keep,
    seconds,
    torch_threads,
    unwatched,
    with_rates,
)
from ...cost_model.devices.device import Device, alone, with_threads
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import predict
from ...patterns.evaluate import DTYPE
from ...patterns.mapping import TileMapping
from ...patterns.verdict import Refusal
from ..cpu import kernel as cpu
from ..files.native import CompilerError
from ..vendor import use as vendor
from .company import (
    FUSED,
    FUSED_TILES,
    SHAPES,
    TYPES,
    Workload,
    cascade,
    in_company,
    prepare,
    ready,
    rounds,
    runs,
    tensors,
    ways,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# No band is narrower: neighbours, clocks and thermal limits are not known to any calibration. On CPUs 97% of 393 timings of
# shapes that no constant was fitted to lay within this one (benchmarks/results/cost_model_cpu_unseen.json).
LEAST_BAND: Mapping[str, float] = {"cpu": 0.6, "gpu": 0.15}


@dataclass(frozen=True)
class Checked:
    """One shape of the check: what was timed and what the calibrated model says, in seconds."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return error(self.predicted, self.measured)

    @property
    def apart(self) -> float:
        """The narrowest band within which the prediction holds: too high and too low count alike."""
        return max(self.predicted / self.measured, self.measured / self.predicted) - 1


def calibrate(d: Device, path: Path | None = None, watch: Watch = unwatched) -> tuple[Device, tuple[Checked, ...]]:
    """Measure the present device, check the result on other shapes, and keep it. `d` is the device as its data file has it.

    Returns the calibrated device, whose band is the check's 95th percentile (and at least `LEAST_BAND`), and the check.
    Raises ValueError for a device that runs no kernels of ours, OSError when the file cannot be written.
    """
    if d.kind == "cpu":
        # twice, with all else in between: clocks and neighbours change from one minute to the next
        first = cpu_rates(watch=watch)
        _compile_ahead()
        compiled = _flex(first, watch)
        prepared = prepare(compiled, watch)
        before = runs(prepared, watch)
        rates = _own(alone(_flex_of(compiled, between(first, cpu_rates(watch=watch)))))
        rates = _fused(rates, watch)
        found = in_company(rates, [*before, *runs(prepared, watch)])
        check = tuple(_checked_on_cpu(found, watch))
    elif d.is_gpu:
        from .calibrate_gpu import checked, gpu_rates

        found = gpu_rates(d, watch)
        check = tuple(Checked(*row) for row in checked(found))
    else:
        raise ValueError(f"{d.name} runs no kernels of ours, so there is nothing to calibrate: choose cpu or a GPU")
    least = LEAST_BAND["gpu" if d.is_gpu else "cpu"]
    found = replace(found, band=max(least, percentile([c.apart for c in check], 0.95)))
    keep(found, path)
    return found, check


# --- what needs our operator or a compiler ----------------------------------------------------------------------------


def _own(d: Device) -> Device:
    """Our operator on next to nothing, less what the model says of all else in it; then a step of the product body."""
    free = {"operator_call_seconds": 0.0, "step_factor": 1.0}
    took, rest = _beside(_with(d, free), "sdpa", 8)
    d = _with(d, {"operator_call_seconds": max(0.0, took - rest.seconds)})
    took, rest = _beside(_with(d, {"step_factor": 1.0}), "product", 768)
    steps = rest.seconds - rest.parts["launch"]
    return _with(d, {"step_factor": max(1.0, (took - rest.parts["launch"]) / steps)})


def _with(d: Device, rates: Mapping[str, object]) -> Device:
    assert d.host is not None
    return replace(d, host=with_rates(d.host, rates))


def _beside(d: Device, body: str, n: int) -> tuple[float, Cost]:
    """Measured seconds of our kernel without a mask, on one thread, and its predicted cost."""
    shape = Workload("none", 1, 4, n, n)
    c, mapping = cascade(shape, "f32"), TileMapping(128, 128, body=body)
    cost = predict(c, mapping, with_threads(d, 1), shape.sizes)
    assert isinstance(cost, Cost), cost
    return _one_thread(ready(c, mapping, tensors(shape, "f32"), shape.sizes)), cost


def _one_thread(run: Callable[[], object]) -> float:
    with torch_threads(1), torch.no_grad():
        return seconds(run)


def _fused(d: Device, watch: Watch) -> Device:
    """Our fused body, compiled: a multiply-add and a pair by two head sizes, a key, a row, an exponential, a bias.

    seconds = call + heads · (rows·ρ + pairs · (fixed + (e + f)·each) + keys · (e + f)·κ)     a unit a head
    """
    assert d.host is not None
    try:
        call = _compiled_body("f32", queries=16, keys=64)
    except CompilerError as no:
        warnings.warn(f"our fused body was not calibrated: {no}", stacklevel=2)
        return d
    tables: dict[str, dict[str, float]] = {name: {} for name in FUSED_TABLES}
    rows: list[float] = []
    for t in watch(["f32", "bf16"], "our fused body, compiled"):
        pair = {e: (_compiled_body(t, e) - call) / (4 * 768**2) for e in (64, 128)}
        few = (_compiled_body(t, queries=64) - call) / (4 * 64 * 768)
        # a short row has few keys to share what is done for it
        short = (_compiled_body(t, keys=64) - call) / (4 * 768 * 64)
        row, key = (max(0.0, x - pair[64]) / (1 / 64 - 1 / 768) for x in (short, few))
        each = max(0.0, min(pair[128] - pair[64] - key / 768, pair[64])) / 128
        tables["fused_key_seconds"][t], tables["fused_multiply_seconds"][t] = key / 128, each
        tables["fused_pair_seconds"][t] = max(0.0, pair[64] - 128 * each - (row + key) / 768)
        rows.append(row)
    for table in tables.values():
        table["f16"] = table["f32"]
    own = max(0.0, call - d.host.operator_call_seconds)
    return _fused_scores(_with(d, {**tables, "fused_row_seconds": rows[0], "fused_call_seconds": own}))


FUSED_TABLES = ("fused_multiply_seconds", "fused_pair_seconds", "fused_key_seconds")


def _fused_scores(d: Device) -> Device:
    """An exponential and a bias more: what the model says of all else, taken off."""
    without, unit = (_with(d, {"fused_exp_seconds": x}) for x in (0.0, 1e-10))
    rest, more = (_price(CAPPED, x) for x in (without, unit))
    d = _with(d, {"fused_exp_seconds": max(0.0, _body(CAPPED, "f32") - rest) / max(more - rest, 1e-12) * 1e-10})
    none = _with(d, {"fused_bias_seconds": dict.fromkeys(("f32", "bf16", "f16"), 0.0)})
    # neighbours take the last cache as well: twice, with the other type in between
    took = [{t: _body(BIASED, t) for t in ("f32", "bf16")} for _ in range(2)]
    least = {t: min(x[t] for x in took) for t in took[0]}
    biases = {t: max(0.0, least[t] - _price(BIASED, none, t)) / BIASED.pairs for t in least}
    return _with(d, {"fused_bias_seconds": {**biases, "f16": biases["bf16"]}})


# Shapes of the fused body whose exponentials and whose bias are measured; no cache of a core holds the bias.
CAPPED, BIASED = Workload("none", 1, 4, 768, 768, cap=30.0), Workload("bias", 1, 4, 1536, 1536)


def _price(shape: Workload, d: Device, t: str = "f32") -> float:
    cost = predict(cascade(shape, t, constant=True), FUSED_TILES, alone(with_threads(d, 1)), shape.sizes)
    assert isinstance(cost, Cost), cost
    return cost.seconds


def _compile_ahead() -> None:
    """Every kernel of our fused body that is timed later, compiled on all cores at once."""
    shapes = (*(s for s in SHAPES if s.compiled == FUSED), CAPPED, BIASED)
    alike = {(s.mask, s.head, s.cap, s.group): s for s in shapes}
    kernels = [cpu.build(cascade(s, t, constant=True), FUSED_TILES) for s in alike.values() for t in TYPES]
    with ThreadPoolExecutor() as pool, suppress(CompilerError):
        # whoever runs them says so where there is no compiler
        list(pool.map(lambda k: None if isinstance(k, Refusal) else k.prepare(), kernels))


def _compiled_body(t: str, e: int = 64, queries: int = 768, keys: int = 768) -> float:
    """Seconds of our fused body for four heads on one thread."""
    return _body(Workload("none", 1, 4, queries, keys, e), t)


def _body(shape: Workload, t: str) -> float:
    c = cascade(shape, t, constant=True)
    kernel = cpu.build(c, FUSED_TILES)
    if isinstance(kernel, Refusal):
        raise CompilerError(kernel.reason)
    kernel.prepare()
    return _one_thread(ready(c, FUSED_TILES, tensors(shape, t), shape.sizes))


def _flex(d: Device, watch: Watch) -> Device:
    """Compiled FlexAttention, as few compilations as tell: a pair by two head sizes for each type.

    seconds = heads · (pairs · (fixed + (e + f)·each) + blocks of queries · keys · (e + f)·κ)     blocks of 128 queries
    What happens to a score is in fp32 for any type, and is timed where products hide it least. Kept as it was where nothing
    can be compiled.
    """
    try:
        with torch.no_grad():
            full = {(t, e): _compiled_flex(t, e, blocks="full") for t, e in watch(FLEX_PAIRS, "FlexAttention, compiled")}
            plain = full["bf16", 64]
            masked = _compiled_flex("bf16", blocks="partial")
            capped = _compiled_flex("bf16", blocks="full", score=_capped)
            far, askew = (_compiled_flex("bf16", keys=n, queries=n) for n in (1008, 1002))
            few = _compiled_flex("f32", queries=8)
    except RuntimeError as no:
        # Dynamo's too: a machine without a C++ compiler, or one that torch does not know, cannot run FlexAttention
        warnings.warn(f"FlexAttention was not calibrated: {type(no).__name__}", stacklevel=2)
        return d
    pairs: dict[str, tuple[float, float]] = {}
    for t in ("f32", "bf16"):
        each = max(0.0, min(full[t, 128] - full[t, 64], full[t, 64])) / 128
        pairs[t] = (max(0.0, full[t, 64] - 128 * each), each)
    every = {
        "flex_mask_seconds": masked - plain, "flex_far_seconds": far - plain,
        "flex_key_seconds": (few - full["f32", 64]) / (128 * (1 / 8 - 1 / 128)),
    }
    tables = {name: dict.fromkeys(("f32", "bf16", "f16"), max(0.0, x)) for name, x in every.items()}
    # fp32 has no units that want their operands aligned
    left = {"f32": 0.0} | dict.fromkeys(("bf16", "f16"), max(0.0, askew - far) / 128)
    return _with(d, {
        **tables, "flex_pair_seconds": pairs, "flex_left_seconds": left,
        "flex_blocks_seconds": _one_thread(_printed_blocks()), "flex_score_seconds": max(0.0, capped - plain),
    })


FLEX_PAIRS = [("f32", 64), ("f32", 128), ("bf16", 64), ("bf16", 128)]
FLEX_TABLES = ("flex_pair_seconds", "flex_mask_seconds", "flex_key_seconds", "flex_far_seconds", "flex_left_seconds")
FLEX_NUMBERS = ("flex_blocks_seconds", "flex_score_seconds")


def _flex_of(compiled: Device, d: Device) -> Device:
    """The device with another's rates of FlexAttention."""
    return _with(d, {name: getattr(compiled.host, name) for name in (*FLEX_TABLES, *FLEX_NUMBERS)})


def _compiled_flex(
    t: str, e: int = 64, *, keys: int = 768, queries: int = 768, blocks: str = "",
    score: Callable[..., torch.Tensor] | None = None,
) -> float:
    """Seconds a pair: all keys at once, or in blocks of 128 that are all `full` or all `partial`; `score`: a score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    q, k, v = (torch.randn(1, 4, rows, e, dtype=DTYPE[t]) for rows in (queries, keys, keys))
    run = torch.compile(flex_attention, dynamic=False)
    kept = _every_block(keys, blocks == "full") if blocks else None
    return _one_thread(lambda: run(q, k, v, score, block_mask=kept)) / (4 * queries * keys)


def _capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.tanh(score / 30.0) * 30.0


def _every_block(n: int, full: bool, size: int = 128) -> BlockMask:
    """A block mask whose blocks are all visited; all without the mask, or all by one comparison as in a causal mask."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = n // size
    count = torch.full((1, 1, blocks), blocks, dtype=torch.int32)
    order = torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks).contiguous()
    # the compiled kernel takes no tensor twice
    lists = (count, order, torch.zeros_like(count), order.clone())
    lists = (*lists[2:], *lists[:2]) if full else lists
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=lambda b, h, p, m: m <= p + n // 2)


def _printed_blocks(n: int = 768) -> Callable[[], BlockMask]:
    """The block mask of a causal attention, as the printed call makes it."""
    shape = Workload("causal", 1, 4, n, n)
    made, q = vendor.flex(cascade(shape, "f32")), tensors(shape, "f32")["Q"]
    assert not isinstance(made, Refusal), made
    blocks = made.function.__globals__["blocks"]
    return lambda: blocks(lambda b, h, p, m: m <= p, q, n)


# --- the check ----------------------------------------------------------------------------------------------------------

# For all types: neither of what rates or factors are made from nor of benchmarks/cells.py.
CHECKED = (
    Workload("none", 1, 6, 850, 850), Workload("causal", 1, 6, 1250, 1250), Workload("window", 1, 8, 1800, 1800, window=200),
    Workload("causal", 1, 4, 640, 640, 128),
)


def _checked_on_cpu(d: Device, watch: Watch) -> Iterator[Checked]:
    """Every way of some shapes, called in turn."""
    here = with_threads(d, torch.get_num_threads())
    for shape in watch(list(CHECKED), "check on other shapes"):
        for t in TYPES:
            found = list(ways(cascade(shape, t), shape, tensors(shape, t), here))
            with torch.no_grad():
                took = rounds([w.call for w in found])
            name = f"{shape.mask} {shape.batch}×{shape.heads}×{shape.queries}×{shape.head} {t}"
            yield from (Checked(f"{w.kind}, {name}", s, w.price(here).seconds) for w, s in zip(found, took))
