"""Splicing: put the chosen call in the place of an attention's last product, and drop what nobody reads any more.

    before   s = matmul(q, kT); p = softmax(s · scale + mask); out = matmul(p, v)
    after    y = call(q, k, v, …); out = reshape(y, …)

Everything else of the graph stays: other consumers keep their nodes, operators that write or draw random numbers stay
where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from ..capture.autocast import regions, remove_unused_casts
from ..check.watch import SiteWatch
from ..graph import torch_private
from ..graph.aliases import SPLICED
from ..graph.liveness import ARITHMETIC, erase_dead
from ..graph.sizes import shape_of
from ..graph.torch_private import expression
from .guards import Condition, Guarded
from .order import absorbed, equal, is_known_outside, same_strides
from .recipe import RECIPE, Recipe

# In the metadata of what is spliced in: the site that it computes.
SITE = "reattend_site"


class SpliceError(RuntimeError):
    """A replacement that does not fit its place: a bug of whoever made it. The graph stays as it was."""


@dataclass(frozen=True)
class Call:
    """What is put in: `target(*tensors…, *sizes…)` as `arguments` lays them out.

    `arguments(tensors, sizes)` gives the positional arguments from the nodes of the cascade's inputs, by name, and from
    `size(name)`, which gives the node or number of a symbol. `closed` calls run with autocast off. `fake` stands in for
    `target` on fake values where the target cannot run on them. Under `conditions`, or where the call is `fragile` (its
    kernel is compiled when it first runs) or can be differentiated only `once`, the original subgraph stands by; with
    `one_flow` also for gradients of several flows at once. From its
    `recipe`, where it has one, another process makes it again.
    """

    name: str
    target: Callable[..., Any]
    arguments: Callable[[Mapping[str, Any], Callable[[str], object]], tuple[Any, ...]]
    closed: bool = True
    fake: Callable[..., Any] | None = None
    conditions: tuple[Condition, ...] = ()
    fragile: bool = False
    once: bool = False
    one_flow: bool = False
    recipe: Recipe | None = None

    @property
    def guarded(self) -> bool:
        return self.fragile or self.once or bool(self.conditions)


def replace(
    gm: fx.GraphModule,
    output: fx.Node,
    tensors: Mapping[str, fx.Node],
    scalars: Mapping[str, fx.Node],
    call: Call,
    *,
    name: str = "",
    original: tuple[fx.GraphModule, list[fx.Node]] | None = None,
    watch: SiteWatch | None = None,
    further: Sequence[fx.Node] = (),
) -> fx.Node:
    """Put `call` in the place of `output`; the value has the same shape, type and strides. Returns the new value's node.

    Where it stands for `further` values as well, it answers a tuple of all, and is put where the output stands.

    A guarded call needs the `original` subgraph with its inputs, and is counted by `name` where it falls back. With the
    subgraph, any call goes back to it where it raises, or where the `watch` finds that it differs. Where this raises, the
    graph has no node more than before.
    """
    before = frozenset(gm.graph.nodes)
    try:
        return _replace(gm, (output, *further), tensors, scalars, call, name, original, watch)
    except Exception:
        for n in reversed(gm.graph.nodes):
            if n not in before:
                gm.graph.erase_node(n)
        raise


def _replace(
    gm: fx.GraphModule, outputs: Sequence[fx.Node], tensors: Mapping[str, fx.Node], scalars: Mapping[str, fx.Node],
    call: Call, name: str, original: tuple[fx.GraphModule, list[fx.Node]] | None, watch: SiteWatch | None,
) -> fx.Node:
    if call.guarded and original is None:
        raise SpliceError(f"{call.name} is guarded and has no original to fall back to")
    graph, output = gm.graph, outputs[0]
    state = next(s for n, s in regions(gm) if n is output)
    old = output.meta["val"]
    device = old.device.type
    region = state.get(device)
    with graph.inserting_before(output):
        sizes = SizeNodes(graph, output, scalars)
        target: Callable[..., Any] | str = call.target
        arguments = call.arguments(tensors, sizes.symbol)
        fake = call.fake or call.target
        if original is not None:
            target, arguments, fake = _guarded(gm, call, original, arguments, tensors, sizes, name, watch)
        token = None
        if call.closed and region is not None and region.enabled:
            token = graph.call_function(torch_private.ENTER_AUTOCAST, (device, region.dtype, False, False))
        new = node(graph, output, target, arguments, fake)
        if token is not None:
            graph.call_function(torch_private.EXIT_AUTOCAST, (token,))
        new.meta[SPLICED] = call.name
        new.meta[SITE] = name
        if call.recipe is not None:
            new.meta[RECIPE] = call.recipe
        made = [new] if len(outputs) == 1 else [node(graph, output, operator.getitem, (new, i)) for i in range(len(outputs))]
        fitted = [_fit(graph, old, value, sizes) for old, value in zip(outputs, made, strict=True)]
        guard = gm.get_submodule(target) if isinstance(target, str) else None
        if isinstance(guard, Guarded):
            guard.known = any(known for _, known in fitted)
    for old, (value, _) in zip(outputs, fitted):
        old.replace_all_uses_with(value)
        value.meta.setdefault("replaces", old.name)
    return fitted[0][0]


def _guarded(
    gm: fx.GraphModule, call: Call, original: tuple[fx.GraphModule, list[fx.Node]], arguments: tuple[Any, ...],
    tensors: Mapping[str, fx.Node], sizes: SizeNodes, name: str, watch: SiteWatch | None,
) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
    """The name of a module that guards the call, its arguments, and what gives its fake value."""
    subgraph, inputs = original
    module = Guarded(name, call.target, subgraph, call.conditions, call.once, watch, one_flow=call.one_flow)
    path = f"guarded_{sum(isinstance(m, Guarded) for m in gm.modules())}"
    gm.add_module(path, module)
    wanted = {t: tensors[t] for c in call.conditions for t in c.tensors}
    known = {s: sizes.symbol(s) for c in call.conditions for s in c.sizes}
    fake = call.fake or call.target
    return path, (arguments, tuple(inputs), wanted, known), lambda given, *_: fake(*given)


def node(
    graph: fx.Graph,
    like: fx.Node,
    target: Callable[..., Any] | str,
    arguments: Sequence[Any],
    fake: Callable[..., Any] | None = None,
) -> fx.Node:
    """A call of a function, or of a module by its name, with the traces of the node it stands for, and its fake value."""
    given = tuple(arguments)
    n = graph.call_module(target, given) if isinstance(target, str) else graph.call_function(target, given)
    n.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "seq_nr")}
    values = fx.map_arg(n.args, lambda x: x.meta["val"])
    tensors = [v for v in torch_private.tree_leaves(values) if isinstance(v, torch.Tensor)]
    mode = torch_private.detect_fake_mode(tensors)
    if mode is None:
        raise SpliceError(f"{like.name}: the graph has no fake values")
    with mode, torch.no_grad():
        n.meta["val"] = (fake or target)(*values)  # type: ignore[operator]
    return n


def _fit(graph: fx.Graph, output: fx.Node, new: fx.Node, sizes: SizeNodes) -> tuple[fx.Node, bool]:
    """Give the value the shape, type and order of memory of the value that it replaces: later views may rely on them.

    With the node, whether others than the graph know the memory of the call's result.
    """
    old = output.meta["val"]
    if not equal(shape_of(new.meta["val"]), shape_of(old)):
        made = new.meta["val"].untyped_storage()
        new = node(graph, output, torch.ops.aten.reshape.default, (new, [sizes.value(s) for s in shape_of(old)]))
        if not old.requires_grad and new.meta["val"].untyped_storage() is made:
            # no view for autograd: a view that was made without gradients refuses writes with them
            new.target = torch_private.reshape_to_own()
    if new.meta["val"].dtype != old.dtype:
        new = node(graph, output, torch.ops.aten.to.dtype, (new, old.dtype))
    fits = same_strides(new.meta["val"], old)
    changed = None if fits else absorbed(output, new.meta["val"])
    known = fits and is_known_outside(output, {})
    if changed is not None:
        values, shared = changed
        known = is_known_outside(output, shared)
        for n, value in values.items():
            n.meta["val"] = value
    elif not fits:
        new = in_order(graph, output, new)
    if old.requires_grad:
        new.meta["val"].requires_grad_(True)
    return new, known


def in_order(graph: fx.Graph, like: fx.Node, new: fx.Node) -> fx.Node:
    """The value of `new` with its dimensions one inside the other in memory as those of `like` are."""
    old = like.meta["val"]
    order = sorted(range(old.dim()), key=lambda d: -hint(old.stride(d)))
    if order == sorted(order):
        return node(graph, like, torch.ops.aten.contiguous.default, (new,))
    back = [order.index(d) for d in range(old.dim())]
    new = node(graph, like, torch.ops.aten.permute.default, (new, order))
    new = node(graph, like, torch.ops.aten.contiguous.default, (new,))
    return node(graph, like, torch.ops.aten.permute.default, (new, back))


def hint(value: int | torch.SymInt) -> int:
    return value if isinstance(value, int) else int(torch_private.traced_size(value))  # type: ignore[arg-type]


class SizeNodes:
    """Nodes that hold symbolic sizes, found among the graph's inputs or computed from them before `at`."""

    def __init__(self, graph: fx.Graph, at: fx.Node, scalars: Mapping[str, fx.Node]) -> None:
        self.graph, self.at = graph, at
        self.known, self.tensors = dict(scalars), list[fx.Node]()
        self.looked = False

    def _look(self) -> None:
        self.looked = True
        for n in self.graph.nodes:
            if n is self.at:
                return
            value = n.meta.get("val")
            if isinstance(value, torch.SymInt) and expression(value).is_Symbol:
                self.known.setdefault(str(expression(value)), n)
            elif isinstance(value, torch.Tensor):
                self.tensors.append(n)

    def symbol(self, name: str) -> fx.Node:
        """The node whose value is the symbol. Raises SpliceError where no input carries it."""
        if name not in self.known and not self.looked:
            self._look()
        if name in self.known:
            return self.known[name]
        for n in self.tensors:
            for d, s in enumerate(n.meta["val"].shape):
                if isinstance(s, torch.SymInt) and expression(s).is_Symbol and str(expression(s)) == name:
                    node = self.graph.call_function(torch.ops.aten.sym_size.int, (n, d))
                    node.meta["val"] = s
                    self.known[name] = node
                    return node
        raise SpliceError(f"no input of the graph carries the size {name}")

    def value(self, size: Size) -> fx.Node | int:
        """A size as a number, or as the node that computes it."""
        return size if isinstance(size, int) else self.term(size_term(size))

    def term(self, e: Expr) -> fx.Node | int:
        match e.op:
            case "const":
                return int(e.value)
            case "symbol":
                return self.symbol(str(e.attr))
        function = ARITHMETIC.get(e.op)
        if function is None:
            raise SpliceError(f"the size {ex.show(e)} cannot be computed from the graph's inputs")
        args = tuple(self.term(a) for a in e.args)
        node = self.graph.call_function(function, args)
        node.meta["val"] = function(*fx.map_arg(args, lambda x: x.meta["val"]))
        return node


def is_changed(gm: fx.GraphModule) -> bool:
    """Was anything put into the graph?"""
    return any(SITE in n.meta for n in gm.graph.nodes)


def finish(gm: fx.GraphModule) -> None:
    """After the last replacement: erase, check, compile the graph's Python."""
    erase_dead(gm)
    remove_unused_casts(gm)
    gm.graph.lint()
    gm.recompile()
