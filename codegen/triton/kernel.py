"""Our Triton kernel as a candidate: a cascade and a mapping become a module on disk, ready to launch.

    build(cascade, mapping, target)  →  TritonKernel(.source, .run(tensors, sizes))  or  Refusal

Nothing here imports Triton before a kernel is launched; without it `build` still prints the source.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ...cost_model.count.subject import FEW_ROWS
from ...cost_model.devices.architecture import FIRST_TILES_F32, Architecture, UnknownArchitecture
from ...cost_model.devices.architecture import architecture as known_architecture
from ...cost_model.devices.compiled import compiled
from ...cost_model.devices.device import Device
from ...cost_model.operations import WIDTH
from ...cost_model.time.fit import SharedTiles
from ...patterns.cascade import Cascade, bind
from ...patterns.evaluate import DTYPE, evaluate
from ...patterns.mapping import TileMapping
from ...patterns.verdict import Refusal
from ..files import cache
from ..text.printer import PrintError
from . import entry, interpret, module
from .device_function import KernelNames
from .holes import needs_lists
from .streaming import NAME, Streaming, power_of_two, read

MISSING = "Triton is not installed: pip install 'reattend[triton]' (a CUDA build of torch brings its own)"


def available() -> bool:
    return importlib.util.find_spec("triton") is not None


def architecture(target: Device | str) -> Architecture | Refusal:
    """What is known of a target's architecture, or that nothing is."""
    try:
        return known_architecture(target if isinstance(target, str) else target.arch)
    except UnknownArchitecture as no:
        return Refusal(NAME, str(no))


def shared_limit(target: Device | str, arch: Architecture) -> int | None:
    return (target.shared_bytes_per_block or None) if isinstance(target, Device) else arch.shared_bytes_per_block


@lru_cache(maxsize=256)
def build(c: Cascade, mapping: TileMapping, target: Device | str | None = None) -> TritonKernel | Refusal:
    """The kernel of an attention under a mapping, or why there is none.

    `target`: a device, an architecture such as "sm_90" or "gfx942", or None (no limit is checked).
    """
    s = read(c)
    if isinstance(s, Refusal):
        return s
    for name, n in (("tile_p", mapping.tile_p), ("tile_m", mapping.tile_m)):
        if n < 16 or n & (n - 1):
            return Refusal(NAME, f"{name} = {n} is no power of two of at least 16")
    refused = too_large(s, mapping, target) if target is not None else None
    if refused is not None:
        return refused
    try:
        source = module.emit(s, mapping)
    except PrintError as e:
        return Refusal(NAME, str(e))
    return TritonKernel(s, mapping, source)


# --- shared memory and mappings ---------------------------------------------------------------------------------


def too_large(s: Streaming, mapping: TileMapping, target: Device | str) -> Refusal | None:
    arch = architecture(target)
    if isinstance(arch, Refusal):
        return arch
    need, limit = _shared_bytes(s, mapping, arch), shared_limit(target, arch)
    if limit is None or need <= limit:
        return None
    return Refusal(NAME, f"{mapping} needs {need} bytes of shared memory; {arch.name} has {limit}")


def shared_bytes(c: Cascade, mapping: TileMapping, target: Device | str) -> int | Refusal:
    """Bytes of shared memory that Triton gives one program of the kernel."""
    s, arch = read(c), architecture(target)
    if isinstance(s, Refusal):
        return s
    return arch if isinstance(arch, Refusal) else _shared_bytes(s, mapping, arch)


def _shared_bytes(s: Streaming, mapping: TileMapping, arch: Architecture) -> int:
    """Of each operand in its own type and of each chunk of a head; the model of times counts by head sizes alone."""
    rows, keys = mapping.tile_p, mapping.tile_m
    query = rows * sum(WIDTH[p.query.dtype] * w for p in s.products for _, w in p.chunks)
    key = keys * sum(WIDTH[p.key.dtype] * w for p in s.products for _, w in p.chunks)
    width = WIDTH[s.values.dtype]
    plain = "f32" in {s.values.dtype, *(p.query.dtype for p in s.products)}
    cut = any(len(p.chunks) > 1 for p in s.products)
    return SharedTiles(query, key, keys * width * s.value_width, width, s.value_width, plain, cut).laid_out(mapping, arch)


@lru_cache(maxsize=256)
def default_mapping(c: Cascade, target: Device | str) -> TileMapping | Refusal:
    """The mapping to start from on an architecture: large tiles whose accumulators stay in registers."""
    s, arch = read(c), architecture(target)
    if isinstance(s, Refusal):
        return s
    if isinstance(arch, Refusal):
        return arch
    limit = shared_limit(target, arch)
    for mapping in _smaller(_first(s, arch)):
        if (limit is None or _shared_bytes(s, mapping, arch) <= limit) and not _spills(s, mapping, arch):
            return mapping
    return Refusal(NAME, f"no tile of head size {s.value_width} fits into the {limit} bytes of shared memory of {arch.name}")


def _spills(s: Streaming, mapping: TileMapping, arch: Architecture) -> bool:
    """Did the kernel of these sizes spill registers when it was compiled?"""
    widths = {s.value_width, *(sum(w for _, w in p.chunks) for p in s.products)}
    tile = mapping.tile_p, mapping.tile_m, mapping.warps
    found = compiled(arch.compiled_as, WIDTH[s.values.dtype], s.value_width, tile) if len(widths) == 1 else None
    return found is not None and found.spill_bytes > 0


def _first(s: Streaming, arch: Architecture) -> TileMapping:
    wide = max(s.value_width, *(sum(w for _, w in p.chunks) for p in s.products))
    plain = "f32" in {s.values.dtype, *(p.query.dtype for p in s.products)}
    table = FIRST_TILES_F32 if plain else arch.first_tiles
    tile_p, tile_m, warps, stages = table[min(w for w in table if w >= wide)]
    rows = [s.extent[r] for r in s.rows]
    few = [n for n in rows if isinstance(n, int)]
    if len(few) == len(rows) and math.prod(few) <= tile_p // 2:
        tile_p, warps, stages = power_of_two(math.prod(few)), 4, max(stages, 2)
    return TileMapping(tile_p, tile_m, warps, stages)


def _smaller(mapping: TileMapping) -> Iterator[TileMapping]:
    """The mapping, then smaller ones: fewer stages before smaller tiles."""
    while True:
        yield mapping
        if mapping.stages > 2:
            mapping = replace(mapping, stages=2)
        elif mapping.tile_m > 32:
            mapping = replace(mapping, tile_m=mapping.tile_m // 2)
        elif mapping.stages > 1:
            mapping = replace(mapping, stages=1)
        elif mapping.tile_p > 16:
            mapping = replace(mapping, tile_p=mapping.tile_p // 2)
        elif mapping.tile_m > 16:
            mapping = replace(mapping, tile_m=16)
        else:
            return


# --- the kernel -------------------------------------------------------------------------------------------------


class TritonKernel:
    """A compiled-on-first-use kernel. `source` is the whole self-contained file."""

    name = NAME

    def __init__(self, s: Streaming, mapping: TileMapping, source: str) -> None:
        self.streaming, self.mapping, self.source = s, mapping, source
        self.cascade = s.cascade

    def __repr__(self) -> str:
        return f"TritonKernel({self.cascade.name}, {self.mapping})"

    @cached_property
    def module(self) -> ModuleType:
        """The generated file, imported. Raises ImportError without Triton."""
        if not available():
            raise ImportError(MISSING)
        # The default changes in Triton 3.10; products and sums are to be fused as they are now.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        if interpret.interpreting():
            interpret.repair()
        return cache.load(self.source)

    def run(
        self, tensors: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Launch on the inputs by name; returns the cascade's output in its rank order.

        Raises ValueError for a missing tensor, another type than the cascade's, or shapes that contradict it.
        """
        s, made = self.streaming, self.module
        inputs = self._inputs(tensors)
        device = next(t.device for t in inputs if t.dim())
        bound = made.sizes_of(*inputs, **self._named(sizes))
        shape, programs, row_blocks, walk = made.plan_of(*bound)
        # Numbers without dimensions may lie on the host, where Dynamo puts a module's floats.
        inputs = [t if t.dim() else t.to(device) for t in inputs]
        if s.attention.prelude:
            inputs += self._prelude(tensors, bound)
        if self._listed and self._queries(bound) >= FEW_ROWS:
            walk = made.walk_of(tuple(inputs), bound)
        if out is None:
            out = torch.empty(shape, dtype=self._dtype, device=device)
        result: Tensor
        if self.mapping.split_m > 1:
            kernels, constants = (made.stream, made.merge), (made.CONSTANTS, made.MERGE)
            count = len(s.state.carried)
            result = made.launch_split(
                kernels, constants, count, out, tuple(inputs), bound, programs, row_blocks, walk, s.eights,
                planned=self.mapping.split_m,
            )
        else:
            given = out, tuple(inputs), bound, programs, row_blocks, walk, s.eights
            result = made.launch(made.stream, made.CONSTANTS, *given)
        return result

    def _inputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            inputs = [tensors[t.name] for t in self.cascade.inputs]
        except KeyError:
            missing = [t.name for t in self.cascade.inputs if t.name not in tensors]
            raise ValueError(
                f"attention {self.cascade.name!r} needs {', '.join(missing)}; given {', '.join(sorted(tensors))}"
            ) from None
        for t, x in zip(self.cascade.inputs, inputs):
            if x.dtype != DTYPE[t.dtype]:
                raise ValueError(f"{t.name} is {x.dtype}; the kernel was built for {t.dtype}")
        return inputs

    def _named(self, sizes: Mapping[str, int] | None) -> dict[str, int]:
        """The sizes that no shape shows, under their names in the module. Raises ValueError for one without a value."""
        if missing := [n for n in self._unbound if n not in (sizes or {})]:
            raise ValueError(f"attention {self.cascade.name!r}: no value for size {', '.join(missing)}")
        return {name: int((sizes or {})[n]) for n, name in self._unbound.items()}

    @cached_property
    def _unbound(self) -> dict[str, str]:
        names = KernelNames(self.streaming)
        return {n: names.symbols[n] for n in entry.unbound(self.streaming)}

    @cached_property
    def _listed(self) -> bool:
        return needs_lists(self.streaming)

    @cached_property
    def _dtype(self) -> torch.dtype:
        return DTYPE[self.cascade.tensor[self.cascade.outputs[0]].dtype]

    def _known(self, bound: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(self.cascade.free_symbols, bound))

    def _queries(self, bound: tuple[int, ...]) -> int:
        size = self.streaming.extent[self.streaming.attention.query]
        return size if isinstance(size, int) else int(bind(size, self._known(bound)))

    def _prelude(self, tensors: Mapping[str, Tensor], bound: tuple[int, ...]) -> list[Tensor]:
        """Tensors that the attention reads and that are computed beforehand, in plain torch."""
        before = self.streaming.attention.prelude
        names = tuple(e.out.tensor for e in before)
        made = evaluate(replace(self.cascade, einsums=before, outputs=names), tensors, self._known(bound))
        return [made[n] for n in names]
