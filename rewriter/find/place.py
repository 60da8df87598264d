"""An attention's place in its graph: what a decision needs to know beside the cascade, whatever the sizes and the device.

    Found (graph nodes)  →  Place (plain data: name, bounds, sizes of what is passed)  →  at sizes, on a device: Question

A place holds no node, so that an attention can be costed again and again after its graph is gone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...cost_model.count.expect import unknowns
from ...cost_model.count.tiles import NOTHING, Data
from ...cost_model.sites.course import Symbol
from ...cost_model.time.predict import VendorUse
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, Size, bind
from ...patterns.evaluate import DTYPE_NAME
from ...patterns.verdict import Obstacle
from ..graph.aliases import Aliases
from ..graph.inside import between, read_by
from ..graph.liveness import survivors
from ..graph.node import arguments, op_name
from ..graph.sizes import product, shape_of, size_of
from ..graph.torch_private import bounds, expression, traced_size
from ..graph.where import source_line
from ..lift.operators_contract import CONTRACTIONS
from ..splice.splice import hint
from . import defect
from .constants import constants
from .detect import Found, is_plain, up_to_the_product
from .further import with_outputs

# Sizes from here on are no bound that anyone set.
UNBOUNDED = 1 << 40
# What a call in a captured graph is marked with whose mask the model leaves out when nothing traces it.
BARE = "passes no mask when it runs"


@dataclass(frozen=True)
class Place:
    """Where an attention stands and what binds it there.

    `bound` says why it cannot be replaced, whatever its cascade says; empty when it can. `scalars` are the symbols of
    its cascade that are no size of a graph input: as sizes of the graph, with the value that was traced. `written`: how
    the model itself calls SDPA, if it does; `mask_elements` are those of the mask tensor that it passes, `bare`: to a
    trace alone. `upstream` has what makes its keys and values, where that was asked for, and `model` the channels of the
    projection behind it. `several` has what else of it is read as further outputs. `wanted`: the inputs of the cascade whose
    gradients flow on, None where none flows back through the output. `origins`: the graph's inputs behind each tensor that
    its mask reads; `constants`: those of these tensors that no input reaches.
    """

    cascade: Cascade
    name: str
    where: str
    notes: tuple[str, ...]
    bound: str
    wanted: tuple[str, ...] | None
    dtype: str
    device_type: str
    scalars: tuple[tuple[str, Size, int | None], ...]
    written: VendorUse | None
    mask_elements: Size
    bare: bool = False
    origins: tuple[tuple[str, tuple[str, ...]], ...] = ()
    constants: Data = NOTHING
    upstream: Cascade | Obstacle | None = None
    model: Size = 0
    window: Size = 0
    several: Cascade | None = None

    @property
    def gradients(self) -> bool:
        return self.wanted is not None

    def sizes(self, at: Mapping[str, int]) -> dict[str, int]:
        """The value of every symbol of the cascade where the graph's own symbols have the values `at`."""
        wider = self.upstream.free_symbols if isinstance(self.upstream, Cascade) else ()
        known = {s: at[s] for s in (*self.cascade.free_symbols, *wider) if s in at}
        for name, size, traced in self.scalars:
            value = bind(size, at)
            if isinstance(value, int):
                known[name] = value
            elif traced is not None:
                known[name] = traced
        return known

    def call(self, at: Mapping[str, int]) -> VendorUse | None:
        """How the model calls SDPA at these sizes."""
        if self.written is None:
            return None
        elements = bind(self.mask_elements, at)
        return replace(self.written, mask_elements=elements) if isinstance(elements, int) else self.written


def named(found: Iterable[Found], taken: Counter[str]) -> Iterator[tuple[Found, str]]:
    """A name for every attention: its module's path, and where a module has several, path, path#2, path#3."""
    for f in found:
        taken[f.module] += 1
        yield f, f.module if taken[f.module] == 1 else f"{f.module}#{taken[f.module]}"


def place(f: Found, name: str) -> Place:
    """The place of a found attention."""
    value = f.output.meta["val"]
    written, mask_elements = _written(f)
    view = attention(f.cascade)
    assert isinstance(view, Attention), view
    read = {name: f.tensors[name] for name in unknowns(view) if name in f.tensors}
    return Place(
        f.cascade, name, f.where, f.notes, _bound_to_original(f), _wanted(f),
        str(value.dtype).removeprefix("torch."), value.device.type, _scalars(f), written, mask_elements,
        BARE in f.final.meta, tuple((name, _inputs_behind(n)) for name, n in read.items()), constants(read),
        window=f.window, several=f.several,
    )


def _inputs_behind(node: fx.Node) -> tuple[str, ...]:
    """The graph's inputs whose values, not sizes, reach a tensor."""
    found: dict[str, None] = {}
    seen, stack = {node}, [node]
    while stack:
        n = stack.pop()
        if n.op == "placeholder":
            found[str(n.meta.get("argument", n.target))] = None
        fresh = [i for i in n.all_input_nodes if i not in seen and isinstance(i.meta.get("val"), torch.Tensor)]
        seen |= set(fresh)
        stack += fresh
    return tuple(sorted(found))


def _scalars(f: Found) -> tuple[tuple[str, Size, int | None], ...]:
    values = {name: node.meta.get("val") for name, node in f.scalars.items()}
    return tuple((name, size_of(v), traced_size(v)) for name, v in values.items() if isinstance(v, torch.SymInt))


def _bound_to_original(f: Found) -> str:
    """Why this attention cannot be replaced where it stands, whatever its cascade says; empty when it can."""
    inside = interior(f)
    escaped = _escaped(f, inside)
    if escaped:
        readers = (u.name for n in escaped for u in n.users if u not in inside and u is not f.output)
        return f"the scores or weights are read elsewhere ({next(readers, 'in place')}): they would be computed twice"
    if _wants_gradient(f) and (cut := gradient_cut(inside)):
        return f"a gradient is cut inside the attention (at {cut.name})"
    return _PLAIN if is_plain(f.cascade) else ""


_PLAIN = "nothing stands between its two products, which run best one after the other, in the model's own order"


def _escaped(f: Found, inside: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The scores and weights that stay alive when the attention's outputs are replaced."""
    read = {*f.tensors.values(), *f.scalars.values()}
    return survivors(frozenset(_scores(f, inside | set(f.further))), (f.output, *f.further), read)


def with_further(found: Iterable[Found], aliases: Aliases) -> Iterator[Found]:
    """Attentions whose scores or weights are read outside, with what is read as further outputs, where that can be."""
    for f in found:
        try:
            whole = _whole(f, aliases)
        except Exception as error:
            # a bug of ours in one site takes no other along
            defect.reason(source_line(f.output) or f.output.name, error)
            whole = None
        yield f if whole is None else whole


def _whole(f: Found, aliases: Aliases) -> Found | None:
    inside = interior(f)
    escaped = frozenset() if is_plain(f.cascade) else _escaped(f, inside)
    whole = _with_outputs(f, aliases, inside, escaped) if escaped else f
    if whole is None and (short := up_to_the_product(f, aliases)) is not None:
        # what follows the product may be made of what is read
        inside = interior(short)
        whole = _with_outputs(short, aliases, inside, _escaped(short, inside))
    return whole


def _with_outputs(
    f: Found, aliases: Aliases, inside: frozenset[fx.Node], escaped: frozenset[fx.Node]
) -> Found | None:
    whole = with_outputs(f, aliases, escaped, inside)
    return whole if isinstance(whole, Found) and not _escaped(whole, interior(whole)) else None


def _wants_gradient(f: Found) -> bool:
    """Whether a gradient flows back through the output; under no_grad it does not, whatever the parameters want."""
    return bool(f.output.meta["val"].requires_grad)


def _wanted(f: Found) -> tuple[str, ...] | None:
    """The inputs of the cascade whose gradients are wanted."""
    if not _wants_gradient(f):
        return None
    return tuple(name for name, n in f.tensors.items() if n.meta["val"].requires_grad)


def interior(f: Found) -> frozenset[fx.Node]:
    """The nodes between the inputs of an attention and its outputs."""
    given = {*f.tensors.values(), *f.scalars.values()}
    inside = frozenset().union(*(between(given, n) for n in (f.output, *f.further)))
    return inside - {f.output, *f.further}


def _scores(f: Found, inside: frozenset[fx.Node]) -> set[fx.Node]:
    """The interior nodes from the products of queries and keys on: scores, weights and what is between."""
    order = sorted(inside, key={n: i for i, n in enumerate(f.output.graph.nodes)}.__getitem__)
    queries, keys = _reading(f, order)
    # a product that reads neither makes a mask (which queries meet which keys), and masks are shared
    reached = {n for n in order if op_name(n) in CONTRACTIONS and n in queries | keys}
    # where a product is spelled by hand, it is where both meet; of one tensor that is both, all that is made of it would be
    if not reached or not any(t in queries & keys for t in f.tensors.values()):
        reached |= {n for n in order if n in queries & keys}
    for n in order:
        if any(i in reached for i in n.all_input_nodes):
            reached.add(n)
    return reached


def _reading(f: Found, order: Sequence[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The interior nodes that depend on operands of a product without the key, and on those with it; and the operands."""
    view = attention(f.cascade)
    assert isinstance(view, Attention), view
    sides: tuple[set[fx.Node], set[fx.Node]] = (set(), set())
    for e in view.products:
        for load in ex.loads(e.body):
            if str(load.attr) in f.tensors:
                sides[view.key in load.ranks].add(f.tensors[str(load.attr)])
    for n in order:
        for reached in sides:
            if any(i in reached for i in n.all_input_nodes):
                reached.add(n)
    return sides


def gradient_cut(inside: frozenset[fx.Node]) -> fx.Node | None:
    """A node inside whose inputs want a gradient and whose floating value does not."""
    for n in inside:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
            for i in read_by(n):
                given = i.meta.get("val")
                if isinstance(given, torch.Tensor) and given.requires_grad:
                    return n
    return None


def _written(f: Found) -> tuple[VendorUse | None, Size]:
    """How the model itself calls SDPA, if that is what it does; the mask that it passes is made once for many layers."""
    if op_name(f.final) != "scaled_dot_product_attention":
        return None, 0
    given = arguments(f.final)
    mask = given["attn_mask"]
    if not isinstance(mask, fx.Node):
        return VendorUse("", skips=bool(given["is_causal"])), 0
    value = mask.meta["val"]
    traced = math.prod(hint(s) for s in value.shape)
    return VendorUse("", False, traced, DTYPE_NAME[value.dtype]), product(shape_of(value))


# --- open sizes ---------------------------------------------------------------------------------------------------


def hints_of(gm: fx.GraphModule) -> Mapping[str, int]:
    """The size that each symbol of the graph has in the example that it was traced with."""
    out: dict[str, int] = {}
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for s in sizes:
            if not isinstance(s, torch.SymInt):
                continue
            known, term = traced_size(s), expression(s)
            if known is not None and term.is_Symbol:
                out.setdefault(str(term), known)
    return out


def symbols_of(gm: fx.GraphModule) -> tuple[Symbol, ...]:
    """Every open size of a graph. Capture takes 0 and 1 for special, so that `low` is 2 for what may be 1 as well."""
    hints, found = hints_of(gm), dict[str, Symbol]()
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        for s in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(s, torch.SymInt) and str(expression(s)) in hints and str(expression(s)) not in found:
                name, known = str(expression(s)), bounds(s)
                low, high = map(_number, known) if known is not None else (None, None)
                found[name] = Symbol(name, hints[name], low or 0, high if high is None or high < UNBOUNDED else None)
    return tuple(found.values())


def _number(bound: Any) -> int | None:
    """A bound of a range; None for infinity."""
    return int(bound) if bound.is_Integer else None
