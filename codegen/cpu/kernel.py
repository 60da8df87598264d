"""CPU kernels: a cascade and a mapping become a file of plain torch code that walks tiles, and the call into it.

    body "sdpa"      softmax of scale · QK + anything: torch's own kernel on slices of the keys, causal triangles whole
    body "slices"    the same with every triangle cut into slices
    body "product"   every other score and row rule: two products around the printed program, with carried row state
    body "selected"  rows that name their keys: the same around keys gathered for each row
    body "latent"    the same around the latents of which keys and values are made
    body "fused"     any score and row rule in one pass of C++ around the printed program, compiled at the first call
    body "decode"    the same for few queries
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module

from torch import Tensor

from ...cost_model.count.tiles import expected
from ...patterns.backward.reached import reached
from ...patterns.cascade import Cascade
from ...patterns.mapping import TileMapping
from ...patterns.masks.split import count_tiles
from ...patterns.passes.latents import Inner, inner
from ...patterns.verdict import Obstacle, Refusal
from ..files import cache
from ..forms.form import Form, form, softmax
from ..forms.program import loose
from ..text.printer import PrintError
from . import fused as cpu_fused
from . import product as cpu_product
from . import sdpa as cpu_sdpa
from . import selected as cpu_selected
from . import training as cpu_training
from . import training_product as cpu_training_product
from . import training_selected as cpu_training_selected
from .training import PrintedTraining


@dataclass(frozen=True)
class CpuKernel:
    """A printed kernel: the file's text, and a call that runs exactly that text on `inputs`, in this order, and `sizes`.

    `compiled` compiles what the first call would; either raises one of `failures` where the compiler fails.
    """

    source: str
    inputs: tuple[str, ...]
    sizes: tuple[str, ...]
    entry: Callable[..., Tensor]
    compiled: Callable[[], object] | None = None
    failures: tuple[type[Exception], ...] = ()

    def run(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
        """The cascade's output, from its inputs by name and the sizes that no input has as a dimension."""
        return self.entry(*[tensors[n] for n in self.inputs], **{n: sizes[n] for n in self.sizes})

    def prepare(self) -> None:
        """Compile now what would be compiled at the first call. Raises CompilerError's sentence where that fails."""
        if self.compiled is not None:
            self.compiled()


@dataclass(frozen=True)
class TrainedKernel:
    """A printed kernel with its backward, both in the file `source`. Inputs in the order of the cascade's.

    `forward(*inputs, **sizes)` gives the output and what its rows hand over, float32 [Z, H, P, `scalars`], first the numbers
    that leave the cascade besides, where a backward has their gradients in the same places;
    `backward(grad, out, saved, wanted, *inputs, **sizes)` the gradients of the inputs in the wanted places. `without`: float
    inputs of which it gives none. `reached`: the inputs that have a gradient where they want one. `row_dims`: the output's
    dimensions that make each of Z, H and P.
    """

    source: str
    inputs: tuple[str, ...]
    sizes: tuple[str, ...]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., list[Tensor]]
    without: tuple[str, ...]
    reached: frozenset[str]
    scalars: int
    row_dims: tuple[tuple[int, ...], ...]


def version() -> str:
    # The package's own number: there is no metadata where it is a folder on the path.
    return str(import_module(__name__.partition(".")[0]).__version__)


# What one more call costs, in elements of a score matrix; and how many rows a tile gives up to reach full speed.
CALL_ELEMENTS = 8192
SLOW_ROWS = 2
NAME = "cpu"
TILES = (32, 64, 128, 256, 512)


def default_mapping(c: Cascade, sizes: Mapping[str, int]) -> TileMapping:
    """The tiling that visits the fewest elements, calls included, by the mask alone (run-time data may keep every key)."""
    f = form(c)
    if isinstance(f, Obstacle):
        return TileMapping(128, 128, body="product")
    body = "product" if isinstance(softmax(f), str) else "sdpa"
    if f.rule == "never":
        return TileMapping(128, 128, body=body)
    bound = c.with_sizes(sizes)
    extents = {r.name: int(r.size) for r in bound.ranks if isinstance(r.size, int)}
    keep = expected(f.mask.keep)
    ranks = {r: extents[r] for r in keep.ranks | {f.attention.query, f.attention.key}}
    heads = math.prod(extents[r] for r in f.attention.batch) or 1
    cost = {}
    for size in TILES:
        tiles = count_tiles(
            keep, query=f.attention.query, key=f.attention.key, extents=ranks, symbols=sizes, tile_p=size, tile_m=size
        )
        rows = tiles.shape[-2]
        per_batch = tiles.visited * rows * tiles.shape[-1] / tiles.total
        cost[size] = per_batch * size * (size + SLOW_ROWS) + rows * CALL_ELEMENTS / heads
    best = min(TILES, key=lambda s: cost[s])
    return TileMapping(best, best, body=body)


@lru_cache(maxsize=512)
def build(c: Cascade, mapping: TileMapping) -> CpuKernel | Refusal:
    """The kernel of a cascade under a mapping, or why there is none."""
    parts = inner(c) if mapping.body == "latent" else Inner(c, None)
    f = form(parts.cascade) if isinstance(parts, Inner) else parts
    if isinstance(f, Obstacle) or isinstance(parts, Obstacle):
        return Refusal(NAME, str(f))
    try:
        if mapping.body == "product":
            source = cpu_product.text(f, mapping, version())
        elif mapping.body == "latent":
            source = cpu_selected.text(f, mapping, version(), parts.after)
        elif mapping.body == "selected":
            source = cpu_selected.text(f, mapping, version())
        elif mapping.is_compiled:
            source = cpu_fused.text(f, mapping, version())
        else:
            s = softmax(f)
            if isinstance(s, str):
                return Refusal(f"{NAME} sdpa", s)
            source = cpu_sdpa.text(f, s, mapping, version())
    except PrintError as no:
        return Refusal(f"{NAME} {mapping.body}", str(no))
    made = cache.load(source)
    # the file has them in the order in which the attention's own cascade reads them
    inputs = tuple(t.name for t in f.cascade.inputs)
    if not mapping.is_compiled:
        return CpuKernel(source, inputs, loose(f.cascade), made.attention)
    compiled = partial(made.compiled, made.SOURCE)
    return CpuKernel(source, inputs, loose(f.cascade), made.attention, compiled, (made.CompilerError,))


BODIES_TRAINED: Mapping[str, Callable[[Form, TileMapping, str], PrintedTraining]] = {
    "fused": cpu_training.printed, "product": cpu_training_product.printed, "selected": cpu_training_selected.printed,
}


@lru_cache(maxsize=512)
def build_trained(c: Cascade, mapping: TileMapping) -> TrainedKernel | Refusal:
    """The kernel of a cascade with its backward under a mapping, or why there is none."""
    f = form(c)
    if isinstance(f, Obstacle):
        return Refusal(NAME, str(f))
    if mapping.body not in BODIES_TRAINED:
        return Refusal(f"{NAME} {mapping.body}", f"of our bodies {' and '.join(BODIES_TRAINED)} have a backward")
    try:
        printed = BODIES_TRAINED[mapping.body](f, mapping, version())
    except PrintError as no:
        return Refusal(f"{NAME} {mapping.body}", str(no))
    made = cache.load(printed.text)
    inputs = tuple(t.name for t in f.cascade.inputs)
    return TrainedKernel(
        printed.text, inputs, loose(f.cascade), made.attention, made.backward, printed.without, reached(c),
        printed.scalars, _row_dims(f),
    )


def _row_dims(f: Form) -> tuple[tuple[int, ...], ...]:
    """The output's dimensions that make the batch, the heads and the queries of a kernel."""
    (e,) = f.cascade.producers[f.cascade.outputs[0]]
    place = {str(i.attr): d for d, i in enumerate(e.out.index)}
    ranks = (f.heads.lead, (f.heads.head,) if f.heads.head else (), (f.attention.query,))
    return tuple(tuple(place[r] for r in group) for group in ranks)
