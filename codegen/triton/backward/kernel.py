"""Our Triton kernel that is trained: the forward, which hands row scalars over, and two kernels for the gradients.

    attention   tensors → output, saved      backward   output, its gradient, saved → gradients of the wanted inputs

Both stand in one file that runs without reattend. FlashAttention-2's order (Dao 2023, algorithm 2): dQ by row blocks, dK and
dV by key blocks, nothing added across programs, so that gradients are the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from ....cost_model.devices.device import Device
from ....cost_model.operations import WIDTH
from ....patterns import expr as ex
from ....patterns.cascade import Cascade, Size
from ....patterns.evaluate import DTYPE, evaluate
from ....patterns.mapping import TileMapping
from ....patterns.verdict import Refusal
from ...files import cache
from ...files.library import called, functions
from ...forms.program import loose, memory_order
from ...text import print_torch
from ...text.printer import PrintError
from .. import entry, interpret, module
from ..device_function import atom
from ..holes import needs_lists
from ..holes import printed as forward_holes
from ..kernel import MISSING, architecture, available, shared_limit, too_large
from ..streaming import NAME, Streaming
from . import holes
from .form import OperandGradient, StreamingBackward, read_backward
from .leaf_host import direct, looked_up, room
from .names import BackwardNames

# Rows and keys of a tile of the backward, which holds twice as many accumulators.
MOST = 64
# With four warps both kernels spill at heads of 128 (compiled for sm_80 and sm_90).
WARPS, STAGES = 8, 2


def build(c: Cascade, mapping: TileMapping, target: Device | str | None = None) -> TritonTraining | Refusal:
    """The kernel of an attention with its backward under a mapping, or why there is none."""
    b = read_backward(c)
    if isinstance(b, Refusal):
        return b
    if mapping.split_m > 1:
        return Refusal(NAME, "split keys are not trained")
    if target is not None and (refused := _too_large(b, mapping, target)) is not None:
        return refused
    try:
        return TritonTraining(b, mapping, text(b, mapping))
    except PrintError as no:
        return Refusal(NAME, str(no))


@dataclass(frozen=True)
class TritonTraining:
    """A forward and its backward, compiled where they first run. Fields and calls as those of the CPU's trained kernel."""

    b: StreamingBackward
    mapping: TileMapping
    source: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.b.s.cascade.inputs)

    @property
    def sizes(self) -> tuple[str, ...]:
        return loose(self.b.s.cascade)

    @property
    def without(self) -> tuple[str, ...]:
        """Float inputs of which it gives no gradient."""
        return self.b.without

    @property
    def scalars(self) -> int:
        return len(self.b.saved)

    @property
    def row_dims(self) -> tuple[tuple[int, ...], ...]:
        """The output's dimensions that make the programs, nothing, and the queries of what is handed over."""
        s = self.b.s
        place = {str(i.attr): d for d, i in enumerate(s.output) if i.op == "index"}
        return tuple(place[r] for r in s.grid), (), tuple(place[r] for r in s.rows if r in place)

    @cached_property
    def module(self) -> ModuleType:
        """The generated file, imported. Raises ImportError without Triton."""
        if not available():
            raise ImportError(MISSING)
        if interpret.interpreting():
            interpret.repair()
        return cache.load(self.source)

    def forward(self, *tensors: Tensor, **sizes: int) -> tuple[Tensor, Tensor]:
        """The output in the order in memory of `reattend::cascade`, and what its rows hand over."""
        given, named = self._given(tensors, sizes)
        shape = self.module.plan_of(*self.module.sizes_of(*given[: len(tensors)], **named))[0]
        order = memory_order(self.b.s.cascade)
        dtype = DTYPE[self.b.s.cascade.tensor[self.b.s.cascade.outputs[0]].dtype]
        device = next(t.device for t in given if t.dim())
        out = torch.empty([shape[d] for d in order], dtype=dtype, device=device)
        out = out.permute([order.index(d) for d in range(len(order))])
        return out, self.module.attention(*given, out=out, **named)

    def backward(
        self, grad: Tensor, out: Tensor, saved: Tensor, wanted: Sequence[int], *tensors: Tensor, **sizes: int
    ) -> list[Tensor]:
        given, named = self._given(tensors, sizes)
        found: list[Tensor] = self.module.backward(grad, out, saved.contiguous(), wanted, *given, **named)
        return found

    def _given(self, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[list[Tensor], dict[str, int]]:
        """The kernel's inputs, the prelude's among them, and the sizes that no shape shows."""
        s = self.b.s
        names = BackwardNames(self.b)
        named = {names.symbols[n]: int(sizes[n]) for n in entry.unbound(s, names)}
        device = next(t.device for t in tensors if t.dim())
        given = [t if t.dim() else t.to(device) for t in tensors]
        before = s.attention.prelude
        if before:
            bound = self.module.sizes_of(*given, **named)
            made_of = replace(s.cascade, einsums=before, outputs=tuple(e.out.tensor for e in before))
            known = dict(zip(s.cascade.free_symbols, bound))
            made = evaluate(made_of, {t.name: x for t, x in zip(s.cascade.inputs, given)}, known)
            given += [made[e.out.tensor] for e in before]
        return given, named


# --- the file -----------------------------------------------------------------------------------------------------------


def text(b: StreamingBackward, mapping: TileMapping) -> str:
    """The text of the module. Raises PrintError."""
    s, back = b.s, backward_mapping(mapping)
    in_base2, saved = module.base2(s, b.saved_terms)
    forward = forward_holes(in_base2, min(mapping.tile_m, back.tile_m), saved=saved)
    own = holes.printed(b, back.tile_m)
    listed = needs_lists(s)
    names = BackwardNames(b)
    parts = [
        *called(frozenset().union(*(h.helpers for h in (*forward, *own)))),
        *(h.text for h in (*forward, *own)),
        *functions("stream").values(),
        *functions("backward/stream").values(),
        *(functions("lists").values() if listed else ()),
        module.constants(s, mapping, trained=True),
        _constants(b, mapping, back),
        *(t for n, t in functions("host").items() if n == "index_type"),
        *(t for n, t in functions("backward/host").items() if b.leaves or n not in ("room", "looked_up")),
        *(t for n, t in functions("host_lists").items() if listed and (n == "tile_lists" or entry.is_static(s))),
        entry.sizes_of(s, names),
        entry.plan_of(s, names, mapping),
        *([entry.walk_of(s, names, mapping)] if listed else []),
        *([entry.walk_of(s, names, back, "LISTING_BACKWARD", "walk_backward")] if listed and b.skips else []),
        _attention(b, names),
        *looked_up(b, names),
        _backward(b, names, back),
    ]
    body = "\n\n\n".join(p.strip("\n") for p in parts)
    gradients = "\n".join([*(f"{x} = {t}" for x, t in zip(b.saved, b.saved_terms)), *map(str, b.row)])
    more = f"Its gradients, from what rows hand over and sum:\n{module.indented(gradients)}\n\n"
    return f"{module.header(s, mapping, more)}\n\n{module.imports(body)}\n\n\n{body}\n"


def _too_large(b: StreamingBackward, mapping: TileMapping, target: Device | str) -> Refusal | None:
    arch = architecture(target)
    if isinstance(arch, Refusal):
        return arch
    need, limit = shared_bytes(b, mapping), shared_limit(target, arch)
    if limit is None or need <= limit:
        return too_large(b.s, mapping, target)
    return Refusal(f"{NAME} backward", f"{mapping} needs {need} bytes of shared memory backwards; {arch.name} has {limit}")


def backward_mapping(mapping: TileMapping) -> TileMapping:
    """The tile of both backward kernels."""
    return replace(mapping, tile_p=min(mapping.tile_p, MOST), tile_m=min(mapping.tile_m, MOST))


def shared_bytes(b: StreamingBackward, mapping: TileMapping) -> int:
    """Shared memory of the larger of both backward kernels, at most: what is resident, what streams in stages, dX turned.

    A tile of floats is turned as well where the score reads a tensor of pairs, or what reaches one is stored. Compiled:
    98,304 and 107,264 bytes for heads of 128 in bf16 on sm_90, less on sm_80; 74,752 for heads of 64 and a bias on sm_100.
    """
    back, stages = backward_mapping(mapping), min(mapping.stages, STAGES)
    own = WIDTH[b.s.values.dtype]
    far, near = (
        sum(WIDTH[getattr(p, side).dtype] * w for p in b.s.products for _, w in p.chunks) + own * b.s.value_width
        for side in ("query", "key")
    )
    rows, keys = back.tile_p * far, back.tile_m * near
    resident = max(rows + stages * keys, keys + stages * rows)
    both = {b.s.attention.query, b.s.key}
    pairs = any(both <= x.ranks and str(x.attr) in b.s.inputs for e in b.partial for x in ex.loads(e))
    turned = own + (WIDTH["f32"] if pairs else 0)
    # barriers, and what reductions across warps exchange
    return resident + back.tile_p * back.tile_m * turned + 2048


def _constants(b: StreamingBackward, mapping: TileMapping, back: TileMapping) -> str:
    s = b.s
    tile: dict[str, object] = {"BM": back.tile_p, "BN": back.tile_m, "BF": s.value_width}
    both = {h.upper(): h for h in ("rows", "queries", "values", "keys", "flow", "dots", "adjoint")}
    ranged = b.skips and s.span is not None
    late = s.span is not None and s.span.growing and mapping.heavy_first
    by_rows, by_keys = (
        {f"{what}_{side}".upper(): f"{what}_{side}" if b.leaves else None for what in ("start", "add", "store")}
        for side in ("l", "keyed")
    )
    rows: dict[str, object] = {
        **tile, **both, **by_rows, "RANGED": ranged, "LATE": late and ranged, "SPAN": "span" if ranged else None,
        "BATCH": "batch",
        **{h.upper(): h for h in ("start_q", "add_q", "store_q")},
    }
    keys: dict[str, object] = {
        **tile, **by_keys, "RANGED": b.seen is not None, "SEEN": "seen" if b.seen is not None else None,
        "WHOLE": s.mask.keep is ex.TRUE, "KEYED": "keyed", **both, **{h.upper(): h for h in ("start_k", "add_k", "store_k")},
    }
    options = {"num_warps": WARPS, "num_stages": min(mapping.stages, STAGES)}
    out = [module.dictionary("ROWS_BACKWARD", {**rows, **options}), module.dictionary("KEYS_BACKWARD", {**keys, **options})]
    if needs_lists(s) and b.skips:
        listing = {"BM": back.tile_p, "BN": back.tile_m, "SKIP": repr(s.skipping), "LISTS": "lists", "ROWS": "rows"}
        out.append(module.dictionary("LISTING_BACKWARD", {**listing, "KEPT": "kept"}))
    return "\n".join(out)


def _signature(b: StreamingBackward, names: BackwardNames) -> tuple[str, str, str]:
    """Parameters of both functions, the inputs as a tuple, and what `sizes_of` is given."""
    s = b.s
    tensors = [names.operands[t].name for t in s.inputs]
    keywords = [names.symbols[n] for n in entry.unbound(s, names)]
    own = [names.operands[t.name].name for t in s.cascade.inputs]
    parameters = ", ".join([*tensors, "*", *keywords]) if keywords else ", ".join(tensors)
    return parameters, entry.tuple_text(tensors), ", ".join([*own, *(f"{k}={k}" for k in keywords)])


def _attention(b: StreamingBackward, names: BackwardNames) -> str:
    s = b.s
    parameters, inputs, read = _signature(b, names)
    parameters += ", out" if "*, " in parameters else ", *, out"
    own = entry.symbols(s, names)
    return "\n".join([
        f"def attention({parameters}):",
        '    """Writes the output; what its rows hand over, [programs, 1, rows, scalars]."""',
        f"    {entry.tuple_text(own)[1:-1] + ' = ' if own else ''}sizes = sizes_of({read})",
        f"    _, programs, row_blocks, walk = plan_of({', '.join(own)})",
        f"    inputs = {inputs}",
        *entry.choose_walk(s, names),
        f"    saved = torch.empty((programs, 1, {_rows(s, names)}, {len(b.saved)}), dtype=torch.float32, device=out.device)",
        "    launch_trained(stream, CONSTANTS, out, saved, inputs, sizes, programs, row_blocks, walk)",
        "    return saved",
    ])


def _rows(s: Streaming, names: BackwardNames) -> str:
    return entry.product_text([s.extent[r] for r in s.rows], names)


def _backward(b: StreamingBackward, names: BackwardNames, back: TileMapping) -> str:
    s = b.s
    parameters, inputs, read = _signature(b, names)
    own = entry.symbols(s, names)
    keys, rows = (atom(entry.product_text([s.extent[r]], names)) for r in (s.key, s.attention.query))
    full = f"{keys} // {back.tile_m}" if s.mask.keep is ex.TRUE else "0"
    walk = "walk_backward(inputs, sizes)" if needs_lists(s) and b.skips else f"({full}, -(-{keys} // {back.tile_m}))"
    programs = entry.product_text([s.extent[r] for r in s.grid], names)
    sharing: list[Size] = holes.sharing(b)
    keyed = [n for r, n in zip(b.keys[0].ranks, b.keys[0].sizes) if r in s.grid]
    number = f"({entry.product_text(keyed, names)}, {entry.product_text(sharing, names)}, {keys})"
    sides = [*b.queries, *b.keys]
    first = names.operands[sides[0].tensor].name
    made = [f"        {_buffer(b, side, names, first)}," for side in sides]
    return "\n".join([
        f"def backward(grad, out, saved, wanted, {parameters}):",
        '    """The gradients of the inputs in the wanted places, from the output and its gradient."""',
        f"    {entry.tuple_text(own)[1:-1] + ' = ' if own else ''}sizes = sizes_of({read})",
        f"    inputs = {inputs}", "    grads = (", *made, "    )",
        f"    walk = {walk}", *room(b, names, first),
        "    launch_backward(",
        "        (rows_backward, keys_backward), (ROWS_BACKWARD, KEYS_BACKWARD), grads, (out, grad, saved), inputs, sizes,",
        f"        {programs}, {rows}, walk, {number}, {len(b.row)},",
        *([f"        leaves, (leaf_bits & {~b.keyed_bits}, leaf_bits & {b.keyed_bits}),"] if b.leaves else []),
        "    )",
        "    parts = {}",
        *(f"    {_part(b, i, side)}" for i, side in enumerate(sides)),
        *(f"    {x}" for x in direct(b, names)),
        "    return [total(parts.get(i, ()), inputs[i]) for i in wanted]",
    ])


def _lacks(b: StreamingBackward, side: OperandGradient) -> list[str]:
    """Ranks of a buffer that the tensor has not: what it gives is summed over them."""
    held = {r for i in side.load.args for r in i.ranks}
    return [r for r in side.ranks if r not in held]


def _buffer(b: StreamingBackward, side: OperandGradient, names: BackwardNames, first: str) -> str:
    dtype = "f32" if _lacks(b, side) else b.s.cascade.tensor[side.tensor].dtype
    sizes = entry.tuple_text(entry.size_text(n, names) for n in side.sizes)
    return f"torch.empty({sizes}, dtype={print_torch.TYPES[dtype]}, device={first}.device)"


def _part(b: StreamingBackward, number: int, side: OperandGradient) -> str:
    """Where a buffer goes: the number of the input, the ranks summed, the order of the others, its place there."""
    lacking = _lacks(b, side)
    left = [r for r in side.ranks if r not in lacking]
    order = [left.index(min(i.ranks)) for i in side.load.args if i.ranks]
    summed = entry.tuple_text(str(side.ranks.index(r)) for r in lacking)
    at = b.s.inputs.index(side.tensor)
    place = entry.tuple_text(str(int(i.value)) if i.is_const else "None" for i in side.load.args)
    return f"parts.setdefault({at}, []).append((grads[{number}], {summed}, {entry.tuple_text(map(str, order))}, {place}))"

