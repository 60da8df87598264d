"""Predictions: seconds, with their bound, of every way to compute an attention on a device.

    predict            our tiled kernel: the one-pass form of the cascade under a mapping
    predict_original   the original code, operator by operator
    predict_vendor     SDPA and FlexAttention, as they are called
    best_mapping       the mapping of our kernel that the model likes best on a device

All is counted from the cascade; what a vendor's kernel is told stands in `VendorUse`. A "no" is an Obstacle. Where gradients
are `wanted`, of these inputs of the cascade, their backward is part of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ...patterns import expr as ex
from ...patterns.cascade import Cascade, size_term
from ...patterns.mapping import TileMapping
from ...patterns.masks.ranges import key_range
from ...patterns.masks.selection import selection
from ...patterns.methods.method import SelectionWork
from ...patterns.passes.further import main
from ...patterns.passes.latents import Inner, inner
from ...patterns.verdict import Obstacle
from ..count.eager import EagerOperator, backward, beforehand, compiled, gathered_back, operators
from ..count.subject import FEW_ROWS, SHARED_ROWS, Shape, Subject, bound, plan_tiles, subject, tile_work
from ..count.tiles import NOTHING, Data, Jobs
from ..count.work import Streamed
from ..devices.device import Device, HostRates, TimeModel
from ..devices.kernels import vendor_kernels
from ..operations import WIDTH, Sizes, size_int
from . import gpu, host, vendor_gpu
from .beforehand import apart, fetch_seconds, fused_fetch_seconds, plus, with_operands, with_prelude
from .body import bias_bytes, biases, by_sdpa, has_triangles, pointwise, scattered, selected, tiled
from .cost import Cost, bound_of, differentiated
from .fit import Footprint, candidates, limited, padded, refuse
from .fused import PLAIN, few, fused
from .fused import fits as fits_fused
from .ranking import Fitting, fitting, laid_out, rough_seconds

__all__ = [
    "VENDORS", "Cost", "VendorKernel", "VendorUse", "best_mapping", "predict", "predict_latent", "predict_made",
    "predict_original", "predict_vendor", "ranked_mappings", "tiles_of",
]

# Mappings whose queue is run job by job; the others are compared by an even load.
SCHEDULED_MAPPINGS = 3
# Blocks of FlexAttention's mask, and the tile that stands for what it generates; few queries take half its rows.
FLEX_BLOCK = 128
FLEX_TILE = TileMapping(tile_p=128, tile_m=128, warps=8, stages=2, body="vendor")
FEW_FLEX_ROWS = 64


@dataclass(frozen=True)
class VendorKernel:
    """One of PyTorch's kernels as its time is predicted; `way` is what calibrations call it.

    `eager`: the operators of the original; `generated` for the attention at hand, as ours are. `share` of the device's model
    is how much of such a kernel's speed it reaches; None: all of it. `facts` names the family of kernels.toml that it
    belongs to; "": the one that the device runs.
    """

    way: str = "sdpa"
    eager: bool = False
    generated: bool = False
    share: Callable[[TimeModel], float] | None = None
    facts: str = ""


VENDORS: Mapping[str, VendorKernel] = {
    "flash": VendorKernel(),
    "cudnn": VendorKernel(),
    "efficient": VendorKernel(share=lambda m: m.efficient_share, facts="fa2"),
    "math": VendorKernel(eager=True),
    "flex": VendorKernel("flex", generated=True, share=lambda m: m.flex_share),
}
# One family by name, wherever it runs: engines other than torch call these.
FAMILIES: Mapping[str, VendorKernel] = {name: VendorKernel(facts=name) for name in vendor_kernels()}


@dataclass(frozen=True)
class VendorUse:
    """How a vendor's function is called for an attention.

    `backend`: a name of VENDORS or FAMILIES. `skips`: the kernel leaves out tiles that the mask
    empties (SDPA's is_causal, FlexAttention's block mask). `mask_elements` counts the mask tensor that is passed, in
    `mask_dtype`; `built_elements` what of it is made anew at each call. `operators`: ATen calls around it.
    """

    backend: str
    skips: bool = False
    mask_elements: int = 0
    mask_dtype: str = "b1"
    built_elements: int = 0
    operators: int = 0

    @property
    def kernel(self) -> VendorKernel:
        return VENDORS[self.backend] if self.backend in VENDORS else FAMILIES[self.backend]


def predict(
    c: Cascade, mapping: TileMapping, device: Device, sizes: Mapping[str, int] | None = None, data: Data = NOTHING
) -> Cost | Obstacle:
    """The time of our kernel for a lifted cascade under a mapping; an Obstacle where it has no one-pass form or no room.

    `data` is what is known of run-time data. Raises ValueError when a size of the cascade has no value.
    """
    s = subject(c)
    if isinstance(s, Obstacle):
        return s
    at = bound(s, sizes or {})
    if device.kind == "cpu":
        return _ours_on_cpu(s, at, mapping, device, data)
    if not device.is_gpu:
        return Obstacle(f"{device.name} runs no kernels of ours: only papers' cascades are timed on it")
    reason = refuse(mapping, at.embed, at.value, WIDTH[s.dtype], device)
    if reason is not None:
        return Obstacle(f"{mapping} {reason}")
    return _ours(s, at, mapping, device, data)


def best_mapping(
    c: Cascade, device: Device, sizes: Mapping[str, int] | None = None, data: Data = NOTHING
) -> tuple[TileMapping, Cost] | Obstacle:
    """The mapping of our kernel with the least predicted time. Raises ValueError when a size has no value."""
    found = ranked_mappings(c, device, sizes, data)
    return found if isinstance(found, Obstacle) else found[0]


def ranked_mappings(
    c: Cascade, device: Device, sizes: Mapping[str, int] | None = None, data: Data = NOTHING,
    wanted: Sequence[str] | None = None,
) -> tuple[tuple[TileMapping, Cost], ...] | Obstacle:
    """Mappings that fit, best first: all of them on a CPU, the best few on a GPU. Raises ValueError without sizes."""
    s = subject(c)
    if isinstance(s, Obstacle):
        return s
    if device.kind not in ("cpu", "cuda", "hip"):
        return Obstacle(f"{device.name} runs no kernels of ours: only papers' cascades are timed on it")
    at = bound(s, sizes or {})
    width = WIDTH[s.dtype]
    if device.kind == "cpu":
        every = candidates(device, e=at.embed, f=at.value, width=width, queries=_rows(at), keys=at.keys)
        able = [m for m in every if m.body in _bodies(s) and (m.body != "decode" or at.queries < FEW_ROWS)]
        found = [(m, _trained_on_cpu(s, at, m, device, data, wanted)) for m in able]
        return tuple(sorted(found, key=lambda pair: pair[1].seconds))
    fits = fitting(device, at.embed, at.value, width, *limited(_rows(at), at.keys))
    if fits is None:
        return Obstacle(f"no tile of head sizes {at.embed} and {at.value} fits {device.name}")
    few = [(m, _ours(s, at, m, device, data)) for m in _fastest(fits, s, at, data)]
    return tuple(sorted(few, key=lambda pair: pair[1].seconds))


def _fastest(fits: Fitting, s: Subject, at: Shape, data: Data) -> list[TileMapping]:
    """The mappings that a time without queues likes best."""
    work = [_programs(s, at, tile, data) for tile in fits.tiles]
    rough = rough_seconds(fits, work, at, _launches(s, at), gpu.own_pace(fits.device))
    return [fits.mappings[i] for i in np.argsort(rough, kind="stable")[:SCHEDULED_MAPPINGS]]


def _bodies(s: Subject) -> tuple[str, ...]:
    """Bodies that may be printed for an attention on a CPU."""
    sdpa = (("sdpa", "slices") if has_triangles(s) else ("sdpa",)) if by_sdpa(s) else ()
    named = ("selected",) if selection(s.attention, s.mask.keep) is not None else ()
    return ("product", *sdpa, *named, *(("fused", "decode") if fits_fused(s) else ()))


def predict_original(
    c: Cascade, device: Device, sizes: Mapping[str, int] | None = None, wanted: Sequence[str] | None = None, *,
    fusing: bool = False,
) -> Cost:
    """The original code as lifted: every operator a kernel, every result written. Raises ValueError without sizes.

    `fusing`: by a compiler that makes one pass of what stands between products.
    """
    ops = operators(c, sizes or {})
    return _eager(compiled(ops) if fusing else ops, c, device, sizes or {}, wanted)


def predict_vendor(
    c: Cascade, use: VendorUse, device: Device, sizes: Mapping[str, int] | None = None, data: Data = NOTHING,
    wanted: Sequence[str] | None = None, beside: float | None = None,
) -> Cost | Obstacle:
    """SDPA or FlexAttention, called as `use` says. An Obstacle where the cascade is no streaming attention.

    A GPU's last cache holds nothing of the operands, unless the same call came just before: then `beside` are the bytes that
    others moved in between.
    """
    s = subject(c)
    if isinstance(s, Obstacle):
        return s
    known, grads = tuple(sorted((sizes or {}).items())), tuple(wanted) if wanted is not None else None
    return _vendor(s, use, device, known, data, grads, beside)


@lru_cache(maxsize=1024)
def _vendor(
    s: Subject, use: VendorUse, device: Device, known: tuple[tuple[str, int], ...], data: Data,
    wanted: tuple[str, ...] | None, beside: float | None,
) -> Cost:
    sizes = dict(known)
    at = bound(s, sizes)
    if use.kernel.eager:
        return _math(s.cascade, s, use, device, sizes, wanted)
    if device.kind == "cpu":
        cost = with_prelude(_vendor_on_cpu(s, at, use, device, data), s, at, device)
    else:
        cost = _with_prelude(_vendor_on_gpu(s, at, use, device, data, beside), s, at, device)
    return _with_backward(cost, cost, s, at, device, wanted)


# Queries of a tile whose rows are whole, and keys of a tile that is left out.
WHOLE_ROWS = (16, 32, 64, 128)
WHOLE_KEYS = 64


def whole_mappings(device: Device) -> tuple[TileMapping, ...]:
    """Mappings of the body of whole rows; none where no such body runs on a device."""
    if device.kind != "cpu":
        return ()
    return tuple(TileMapping(n, WHOLE_KEYS, warps=1, stages=1, body="whole") for n in WHOLE_ROWS)


def predict_several(
    c: Cascade, mapping: TileMapping, device: Device, sizes: Mapping[str, int], data: Data = NOTHING
) -> Cost | Obstacle:
    """Whole rows at a time on a CPU, of which more leaves than the output: two products, and what is written besides.

    Raises ValueError when a size of the cascade has no value.
    """
    cost = predict(main(c), replace(mapping, body="product"), device, sizes, data)
    if isinstance(cost, Obstacle):
        return cost
    machine, bill, at = host.Host(device), host.Bill(), Sizes(c, sizes)
    for name in c.outputs[1:]:
        (last,) = c.producers[name]
        made = {str(x.attr) for x in last.reads if str(x.attr) in c.producers and str(x.attr).startswith(f"{name}_")}
        elements = math.prod(size_int(n) for n in at.shape[name])
        bill.add("fault", machine.fresh(WIDTH[c.tensor[name].dtype] * elements))
        bill.bytes += WIDTH[c.tensor[name].dtype] * elements
        for t in made:
            machine.point("add", "f32", math.prod(size_int(n) for n in at.shape[t.replace("_sum", "_each")]), 0, bill)
    return plus(cost, bill.cost(device, "our-product", c.tensor[c.outputs[0]].dtype))


def predict_latent(c: Cascade, device: Device, sizes: Mapping[str, int]) -> Cost | Obstacle:
    """Keys that rows name, gathered as the latents that they are made of, on a CPU: with the maps before and behind."""
    parts = inner(c)
    s = subject(parts.cascade) if isinstance(parts, Inner) else parts
    if isinstance(parts, Obstacle) or isinstance(s, Obstacle):
        return s if isinstance(s, Obstacle) else Obstacle("no attention over latents")
    found = selection(s.attention, s.mask.keep)
    if found is None:
        return Obstacle("no row names its keys")
    at = bound(s, sizes)
    cost = with_prelude(selected(s, at, found, device), s, at, device, without=str(found.member.attr))
    return plus(cost, apart((parts.after,), at.extent, device)) if parts.after is not None else cost


def predict_made(c: Cascade, names: Collection[str], device: Device, sizes: Mapping[str, int]) -> Cost:
    """Some tensors of a cascade, each made by itself on a CPU."""
    extent = {r: size_int(n) for r, n in Sizes(c, sizes).rank.items()}
    return apart((e for e in c.einsums if e.out.tensor in names), extent, device)


def tiles_of(c: Cascade, mapping: TileMapping, sizes: Mapping[str, int], data: Data = NOTHING) -> Jobs | Obstacle:
    """The key tiles that a mapping visits, program by program, given what is known of run-time data."""
    s = subject(c)
    return s if isinstance(s, Obstacle) else plan_tiles(s, bound(s, sizes), mapping, data)


def predict_selection(work: SelectionWork, device: Device) -> float:
    """Seconds of a selection: its products as one, the rest as operators that share its bytes, each a launch of its own."""
    points, rest = int(work.flops / 2), max(work.kernels - (work.flops > 0), 0)
    side = max(int(points ** (1 / 3)), 1)
    each = int(work.bytes / max(work.kernels, 1))
    product = EagerOperator("product", "selection", "f32", points, each, 0, max(points // side**3, 1), side, side, side)
    ops = [product] if points else []
    looked = int((work.exps + work.sorted) / max(rest, 1))
    ops += [EagerOperator("point", "exp" if work.exps else "selection", "f32", looked, each, 0)] * rest
    return _operators(tuple(ops), device).seconds if ops else 0.0


# --- operators ----------------------------------------------------------------------------------------------------


def _operators(ops: tuple[EagerOperator, ...], device: Device) -> Cost:
    if device.kind == "cpu":
        return host.original(ops, device)
    model = device.model
    parts = {"matrix": 0.0, "memory": 0.0, "launch": len(ops) * model.launch_seconds}
    for o in ops:
        moving = (o.read_bytes + o.written_bytes) / (model.bandwidth_efficiency * device.dram_bytes_per_s)
        matrix = o.flops / (model.matrix_efficiency * device.matrix_rate(o.dtype)) if o.flops else 0.0
        parts["matrix" if matrix > moving else "memory"] += max(matrix, moving)
    flops, moved = sum(o.flops for o in ops), sum(o.read_bytes + o.written_bytes for o in ops)
    exps = sum(o.exps for o in ops)
    return Cost(sum(parts.values()), bound_of(parts), flops, moved, exps, parts, device.basis, device.band)


def _eager(
    ops: tuple[EagerOperator, ...], c: Cascade, device: Device, sizes: Mapping[str, int], wanted: Sequence[str] | None
) -> Cost:
    """Operators, and autograd's of their gradients."""
    cost = _operators(ops, device)
    if wanted is None:
        return cost
    s = subject(c)
    more = gathered_back(s.attention, wanted, bound(s, sizes).extent) if isinstance(s, Subject) else ()
    back = _operators((*more, *backward(ops)), device)
    return plus(cost, replace(back, backward=back.seconds))


def _with_backward(
    cost: Cost, again: Cost, s: Subject, at: Shape, device: Device, wanted: Sequence[str] | None
) -> Cost:
    """The cost of a kernel with its backward, and with the sums of what is learned beside its operands.

    `again`: the forward at the rates at which the backward computes.
    """
    if wanted is None:
        return cost
    # on a CPU exponentials are pairs, of those tiles that are visited
    share = min(1.0, cost.exps / max(at.batch * at.queries * at.keys, 1)) if device.kind == "cpu" else 1.0
    made, more = differentiated(cost, again), gathered_back(s.attention, wanted, at.extent, share)
    back = _operators(more, device) if more else None
    return plus(made, replace(back, backward=back.seconds)) if back is not None else made


def _math(
    c: Cascade, s: Subject, use: VendorUse, device: Device, sizes: Mapping[str, int], wanted: Sequence[str] | None
) -> Cost:
    """SDPA's fall-back: the operators of the original, in fp32 on a CPU whatever the type of the inputs."""
    ops = operators(c, sizes)
    if device.kind == "cpu" and s.dtype in ("bf16", "f16"):
        ops = tuple(replace(o, dtype="f32", read_bytes=2 * o.read_bytes, written_bytes=2 * o.written_bytes) for o in ops)
    return _eager(ops, c, device, sizes, wanted)


# --- our kernel on a CPU --------------------------------------------------------------------------------------------


def _trained_on_cpu(
    s: Subject, at: Shape, mapping: TileMapping, device: Device, data: Data, wanted: Sequence[str] | None
) -> Cost:
    """With its backward, where gradients are wanted: that of the fused body computes in float32 on vectors."""
    cost = again = _ours_on_cpu(s, at, mapping, device, data)
    if wanted is not None and mapping.body == "fused" and s.dtype != "f32":
        again = _ours_on_cpu(s, at, mapping, device, data, "f32")
    whole = _with_backward(cost, again, s, at, device, wanted)
    found = selection(s.attention, s.mask.keep) if wanted is not None and mapping.body == "selected" else None
    return plus(whole, scattered(s, at, found, device)) if found is not None else whole


def _ours_on_cpu(s: Subject, at: Shape, mapping: TileMapping, device: Device, data: Data, rates: str = "") -> Cost:
    """The tiled body; of keys and values, what its tiles visit crosses the memory's edge. `rates`: of products of a type."""
    if mapping.body == "selected":
        found = selection(s.attention, s.mask.keep)
        assert found is not None, mapping
        return with_prelude(selected(s, at, found, device), s, at, device, without=str(found.member.attr))
    jobs = plan_tiles(s, at, mapping, data)
    if mapping.body == "decode":
        cost = few(s, at, mapping, jobs, device)
    else:
        cost = fused(s, at, mapping, jobs, device, rates) if mapping.body == "fused" else tiled(s, at, mapping, jobs, device)
    unseen = at.keys - _keys_visited(jobs, at.keys)
    cost = with_operands(with_prelude(cost, s, at, device), s, at, device)
    return replace(cost, bytes=cost.bytes - WIDTH[s.dtype] * (at.batch // at.group) * unseen * (at.embed + at.value))


def _keys_visited(jobs: Jobs, keys: int) -> int:
    """The keys from the first that any program visits to the last."""
    if jobs.map is None:
        return keys
    first, last = jobs.map.merged().ends
    seen = last > first
    if not seen.any():
        return 0
    return min(int(last[seen].max()) * jobs.map.tile_m, keys) - int(first[seen].min()) * jobs.map.tile_m


# --- our kernel on a GPU --------------------------------------------------------------------------------------------


def _rows(at: Shape) -> int:
    """Query rows that one tile may hold: with few queries, the heads of a group come together."""
    return at.queries * _packed(at)


def _packed(at: Shape) -> int:
    few = at.queries < FEW_ROWS and at.group > 1 and at.queries * at.group <= SHARED_ROWS
    return at.group if few else 1


def _ours(s: Subject, at: Shape, mapping: TileMapping, device: Device, data: Data) -> Cost:
    cost = gpu.seconds(_kernel(s, at, mapping, device, data), device, gpu.own_pace(device))
    return _with_prelude(cost, s, at, device)


def _kernel(s: Subject, at: Shape, mapping: TileMapping, device: Device, data: Data) -> gpu.KernelWork:
    """Our kernel under a mapping, as its time follows from it."""
    w, jobs, moved = _programs(s, at, (mapping.tile_p, mapping.tile_m), data)
    x = laid_out(mapping, at.embed, at.value, WIDTH[s.dtype], device)
    return gpu.streaming(
        w, mapping, jobs, x.fit, at.value, at.queries, at.batch, moved=moved, launches=_launches(s, at),
        operand_bytes=x.operand_bytes, stages=x.stages, issued=x.issued,
    )


def _programs(s: Subject, at: Shape, tile: tuple[int, int], data: Data) -> tuple[Streamed, Jobs, int]:
    """What one tile takes, the programs with the heads that share them, and bytes that these read."""
    w, jobs = tile_work(s, at, tile, data)
    return w, *_shared_heads(w, jobs, _packed(at), -(-_rows(at) // tile[0]))


def _launches(s: Subject, at: Shape) -> int:
    return 1 + LISTING * _lists(s, at)


# What a call launches to list the tiles of a mask that data decides: the listing, and a sort of what it found.
LISTING = 2


def _lists(s: Subject, at: Shape) -> bool:
    """Are tiles listed at each call? Not where no data decides the mask, nor where a block's keys are a range."""
    return at.queries >= FEW_ROWS and _decided_by_data(s)


@lru_cache(maxsize=256)
def _decided_by_data(s: Subject) -> bool:
    a, keep = s.attention, s.mask.keep
    if not ex.loads(keep):
        return False
    return key_range(keep, a.query, a.key, size_term(a.cascade.rank[a.key].size)) is None


def _with_prelude(cost: Cost, s: Subject, at: Shape, device: Device) -> Cost:
    """What is computed before the kernel runs operator by operator."""
    ops = beforehand(s.attention, at.extent)
    return plus(cost, _operators(ops, device)) if ops else cost


def _shared_heads(w: Streamed, jobs: Jobs, group: int, blocks: int = 1) -> tuple[Jobs, int]:
    """`blocks` programs serve the heads of a group: so many fewer, and the keys are read once by each of them."""
    moved, once, _ = w.bytes
    if group == 1:
        return jobs, moved
    return jobs.repeated(max(1, jobs.repeat * blocks // group)), max(once, moved * blocks // group)


# --- vendors' kernels -----------------------------------------------------------------------------------------------


def _vendor_on_gpu(s: Subject, at: Shape, use: VendorUse, device: Device, data: Data, beside: float | None) -> Cost:
    if use.kernel.generated:
        return _flex_on_gpu(s, at, use, device, data)
    facts = vendor_kernels()[use.kernel.facts or device.kernel]
    kernel = vendor_gpu.laid_out(s, at, facts, device, use.skips, data)
    cost = gpu.seconds(_with_mask(kernel, use), device, vendor_gpu.pace(facts, device, kernel), beside=beside)
    cost = cost if use.kernel.share is None else _slower(cost, use.kernel.share(device.model))
    if use.kernel.share is not None:
        return cost
    return replace(cost, band=device.vendor_band(at.queries == 1, cost.seconds, not use.skips))


def _with_mask(k: gpu.KernelWork, use: VendorUse) -> gpu.KernelWork:
    """The kernel reads the mask tensor that it is given."""
    extra = use.mask_elements * WIDTH[use.mask_dtype]
    return replace(k, unique_bytes=k.unique_bytes + extra, moved_bytes=k.moved_bytes + extra)


def _flex_on_gpu(s: Subject, at: Shape, use: VendorUse, device: Device, data: Data) -> Cost:
    """FlexAttention's kernel, which is generated as ours are."""
    tile = replace(FLEX_TILE, tile_p=FEW_FLEX_ROWS) if _rows(at) <= FEW_FLEX_ROWS else FLEX_TILE
    w, jobs = tile_work(s, at, (tile.tile_p, tile.tile_m), data)
    if not use.skips:
        jobs = tile_work(s, at, (tile.tile_p, tile.tile_m), data, skips=False)[1]
    jobs, moved = _shared_heads(w, jobs, _packed(at))
    kernel = gpu.streaming(w, tile, jobs, Footprint(0, 0, 0, 1), at.value, at.queries, at.batch, moved=moved)
    kernel = _split_keys(kernel, device)
    cost = gpu.seconds(_with_mask(kernel, use), device, gpu.own_pace(device))
    return cost if use.kernel.share is None else _slower(cost, use.kernel.share(device.model))


def _split_keys(k: gpu.KernelWork, device: Device) -> gpu.KernelWork:
    """FlexAttention splits the keys of a launch that leaves units idle."""
    return replace(k, split=max(1, min(device.units // max(k.programs, 1), k.jobs.longest // 2, 32)))


def _slower(cost: Cost, share: float) -> Cost:
    launch = cost.parts.get("launch", 0.0)
    return replace(cost, seconds=(cost.seconds - launch) / share + launch)


def _vendor_on_cpu(s: Subject, at: Shape, use: VendorUse, device: Device, data: Data) -> Cost:
    prices, bill = host.Host(device), host.Bill()
    pairs = at.batch * at.queries * at.keys
    moved = WIDTH[s.dtype] * (at.batch * at.queries + at.batch // at.group * at.keys) * (at.embed + at.value)
    if use.kernel.generated:
        pairs = _flex_on_cpu(s, at, use, prices, bill, data)
    else:
        if use.skips:
            pairs = at.batch * host.causal_pairs(at.queries, at.keys)
        prices.attention(
            at.batch, at.queries, at.keys, at.embed, at.value, s.dtype, bill, masked=use.mask_elements > 0,
            causal=use.skips, group=at.group, mask_dtype=s.dtype if use.mask_dtype == "b1" else use.mask_dtype,
        )
        _mask_on_cpu(s, at, use, prices, bill)
    bill.flops, bill.exps = int(2 * pairs * (at.embed + at.value)), int(pairs)
    bill.bytes = moved + use.mask_elements * WIDTH[use.mask_dtype]
    return bill.cost(device, use.kernel.way, s.dtype)


def _flex_on_cpu(s: Subject, at: Shape, use: VendorUse, prices: host.Host, bill: host.Bill, data: Data) -> int:
    """FlexAttention, compiled, and the pairs that it visits. Without a block mask all keys are one block."""
    h, t = prices.h, s.dtype
    rows, keys = (min(FLEX_BLOCK, n) if use.skips else n for n in (at.queries, at.keys))
    visited, partial = _visited_pairs(s, at, FLEX_BLOCK, data)
    a, b = h.flex_pair_seconds.get(t) or h.flex_pair_seconds["f32"]
    units = at.batch * -(-at.queries // rows)
    gain = host.balanced(prices.gain("flex"), prices.threads, units)
    # the last block's keys lie askew
    share = (at.keys % keys or keys) / at.keys if at.keys % host.VECTOR else 0.0
    askew = visited * share * host.rate(h.flex_left_seconds, t)
    operands = at.batch * at.keys * (at.embed + at.value)
    bill.add("launch", h.flex_call_seconds + use.operators * h.operator_seconds)
    bill.add("launch", h.flex_blocks_seconds if use.skips else 0.0)
    bill.add("matrix", (visited * (b + _few_rows(h, t, at.queries)) + askew) * (at.embed + at.value) / gain)
    # a bias is read as our fused body reads it
    changed = len(pointwise(s, False)) > len(PLAIN) or bool(biases(s, at))
    score = changed * h.flex_score_seconds + len(biases(s, at)) * host.rate(h.fused_bias_seconds, t)
    score += fused_fetch_seconds(prices, s, 1)
    bill.add("exp", (visited * (a + score) + partial * host.rate(h.flex_mask_seconds, t)) / gain)
    bill.add("memory", prices.stream(operands * WIDTH[t] + bias_bytes(s, at)))
    # the scores of a block are written and read in turn by the product, the scale, the maximum and the exponential
    far = WIDTH["f32"] * rows * keys > host.CORE_CACHE
    bill.add("memory", visited * host.rate(h.flex_far_seconds, t) / gain if far else 0.0)
    return visited


def _few_rows(h: HostRates, dtype: str, queries: int) -> float:
    """What a pair takes more where fewer rows than a block's share a key; one query reads the keys as SDPA does."""
    if queries == 1:
        return host.pair_seconds(h, dtype, 1)[1]
    return host.rate(h.flex_key_seconds, dtype) * (1 / min(FLEX_BLOCK, queries) - 1 / FLEX_BLOCK)


def _mask_on_cpu(s: Subject, at: Shape, use: VendorUse, prices: host.Host, bill: host.Bill) -> None:
    """The mask that SDPA is given: made at each call, or only turned from a predicate into what is added to the scores.

    A bias for each query and key comes from memory.
    """
    bill.add("memory", prices.stream(bias_bytes(s, at)))
    bill.add("element", fetch_seconds(prices, s, at, at.batch * at.queries * at.keys))
    if use.built_elements:
        prices.biases(biases(s, at), 1.0, bill, chosen=s.mask.keep is not ex.TRUE)
        made = prices.terms if use.mask_dtype == "b1" else prices.chosen
        made(s.mask.keep, at.extent, bill)
    if use.mask_dtype == "b1" and use.mask_elements:
        prices.point("where", s.dtype, use.mask_elements, use.mask_elements * WIDTH[s.dtype], bill)
        bill.add("fault", prices.fresh(use.mask_elements * WIDTH[s.dtype]))


def _visited_pairs(s: Subject, at: Shape, block: int, data: Data) -> tuple[int, int]:
    """Pairs in the blocks that a block mask keeps, over all batch entries, and those of partial ones.

    The ends of the sequence cut the last blocks. Conditions on run-time data leave every block partial.
    """
    jobs = plan_tiles(s, at, TileMapping(block, block), data)
    most, size = at.batch * at.queries * at.keys, min(block, at.queries) * min(block, at.keys)
    visited = min(int(jobs.visited.sum()) * jobs.repeat * size, most)
    partial = min(int(jobs.partial.sum()) * jobs.repeat * size, most)
    return visited, visited if any(ex.loads(s.mask.keep)) else partial


def head_sizes(c: Cascade, sizes: Mapping[str, int]) -> tuple[int, int] | Obstacle:
    """Head sizes (query and key, value) as the kernel pads them."""
    s = subject(c)
    if isinstance(s, Obstacle):
        return s
    at = bound(s, sizes)
    return padded(at.embed), padded(size_int(at.value))
