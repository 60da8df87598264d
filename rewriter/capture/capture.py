"""Capture: a running model as pre-dispatch ATen graphs, where softmax and SDPA are still one operator.

Dynamo gives pieces of any model, as it runs, with symbolic sizes of its own (rewriter/capture/export.py gives one whole
graph, for planning). Either way each node carries a fake value (`meta["val"]`), whose `requires_grad`
says whether a gradient flows into it, the user's stack trace, and the path of its module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch import Tensor, fx, nn

from ..graph import memory, torch_private
from ..graph.node import written_arguments
from . import backward, calls, mapped
from .autocast import explicit_casts
from .modes import Switches
from .templates import Unfit
from .weights import PARAMETER

# Set on the inputs of a graph that are floats of the model's, which Dynamo passes as tensors of one number.
FLOAT = "reattend_float"
_DETACHING = ("aten::detach", "aten::detach_", "aten::lift_fresh_copy")
NO_NAMES: Mapping[int, str] = MappingProxyType({})
_ROOTS = ("L['self'].", "L['self']", "L['model'].", "L['model']", "L__self___")


class CaptureError(RuntimeError):
    """A graph that has no pre-dispatch ATen form; the sentence says why. The model itself is untouched."""


@dataclass(frozen=True)
class Captured:
    """A pre-dispatch ATen graph: `graph` takes the inputs of the graph that it was made from, in the same order."""

    graph: fx.GraphModule
    route: str
    seconds: float


# --- Dynamo -----------------------------------------------------------------------------------------------------


def from_dynamo(
    gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str] = NO_NAMES, *, inductor: bool = False,
    runs: bool = True,
) -> Captured:
    """The ATen form of a graph that Dynamo hands to its backend, under Dynamo's own fake mode and symbols.

    before   a graph of torch functions (`torch.matmul`, `Tensor.softmax`, `F.linear`, ...)
    after    a graph of ATen operators, in the same order, in-place writes and random state included

    `names` are the paths of the model's modules by identity: Dynamo's own are relative to the function that it compiles.
    Where it need not run before it is rewritten, its Python is not written. Raises CaptureError.
    """
    start = time.perf_counter()
    made = torch_private.dynamo_fakes()
    if made is None:
        raise CaptureError("the graph does not come from Dynamo: it has no fake mode")
    mode, fake = made
    # Inductor has a kernel for a FlexAttention that it meets
    gm = _written_out(gm, inputs, mode, fake, flex=not inductor)
    if transform := torch_private.transform(gm):
        raise CaptureError(f"a function is transformed inside it ({transform}): its values are no tensors of the graph")
    held = {n: attribute(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}
    held = {n: v for n, v in held.items() if isinstance(v, Tensor)}
    attributes = list(held)
    with mode:
        flat = [fake(x) for x in (*inputs, *held.values())]
    changing = [torch_private.is_python_float(x) for x in flat[: len(inputs)]]
    graph, watch = _traced(gm, flat, len(inputs), attributes, mode)
    lost = watch.lost(graph)
    if not lost and any(isinstance(x, Tensor) and x.requires_grad for x in flat) and _enables_gradients(gm):
        lost = backward.inside(gm)
    if lost:
        raise CaptureError(lost)
    made_here = [attribute(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr"]
    baked = [x for x in made_here if torch_private.has_no_value(x)]
    if baked:
        raise CaptureError(f"{len(baked)} values of it are known while it is traced only: an operator there is not recorded")
    _bind_attributes(
        graph, len(inputs), {str(n.target): v for n, v in held.items()}, [str(n.target) for n in attributes]
    )
    for node, value in zip((n for n in graph.graph.nodes if n.op == "placeholder"), flat):
        if isinstance(value, Tensor) and value.requires_grad:
            _mark(node.meta["val"])
    for node, given in zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs):
        if isinstance(given, nn.Parameter):
            node.meta[PARAMETER] = True
    for node, is_float in zip((n for n in graph.graph.nodes if n.op == "placeholder"), changing):
        node.meta[FLOAT] = is_float
    memory.mark([n for n in graph.graph.nodes if n.op == "placeholder"], inputs)
    finish(graph, lambda key, path: path_of(names, key, path), frame_module(names), runs=runs)
    return Captured(graph, "dynamo", time.perf_counter() - start)


def _written_out(
    gm: fx.GraphModule, inputs: Sequence[object], mode: torch_private.FakeTensorMode, fake: Callable[[object], object], *,
    flex: bool,
) -> fx.GraphModule:
    """The graph without mapped functions. Raises CaptureError."""
    def values() -> dict[fx.Node, Any]:
        with mode:
            given = [fake(x) for x in inputs]
        return mapped.values_of(gm, given, mode, fake)

    try:
        return mapped.written_out(gm, values, mode, flex=flex)
    except torch_private.restarts():
        raise
    except Exception as error:
        # Whatever cannot run under a map, or below it.
        raise CaptureError(f"a function is mapped inside it: {type(error).__name__}: {first_line(error)}") from error


def _traced(
    gm: fx.GraphModule, flat: list[object], count: int, held: list[fx.Node], mode: torch_private.FakeTensorMode
) -> tuple[fx.GraphModule, backward.GradientWatch]:
    """Traced call by call where that says all, else as a whole."""
    watch = backward.GradientWatch()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return calls.trace(gm, flat, held, mode, watch), watch
    except Unfit:
        # the trace of the whole says whether the graph can be captured
        watch = backward.GradientWatch()
        return _trace(gm, flat, count, held, mode, watch), watch


def _trace(
    gm: fx.GraphModule,
    flat: list[object],
    count: int,
    held: list[fx.Node],
    mode: torch_private.FakeTensorMode,
    watch: backward.GradientWatch,
) -> fx.GraphModule:
    def run(*values: object) -> object:
        runner = _Run(gm, dict(zip(held, values[count:], strict=True)), watch)
        try:
            with traceback.preserve_node_meta():
                return runner.run(*values[:count])
        finally:
            runner.switches.leave()

    try:
        # Grad mode switches inside the graph act on this thread while it is traced.
        with mode, torch.set_grad_enabled(torch.is_grad_enabled()):
            return torch_private.pre_dispatch_graph(run, flat)
    except torch_private.restarts():
        raise
    except Exception as error:
        # Whatever operator has no pre-dispatch form: the caller runs the graph as it came and reports this sentence.
        raise CaptureError(f"{type(error).__name__}: {first_line(error)}") from error


class _Run(fx.Interpreter):
    """Runs a graph with the values of its tensor attributes given, so that they are traced as inputs."""

    def __init__(self, gm: fx.GraphModule, held: Mapping[fx.Node, object], watch: backward.GradientWatch) -> None:
        super().__init__(gm)
        self.held, self.watch = held, watch
        self.switches = Switches()

    def run_node(self, n: fx.Node) -> Any:
        if n in self.held:
            return self.held[n]
        if n.target in (torch_private.ENTER_AUTOCAST, torch_private.EXIT_AUTOCAST):
            self.switches.act(n)
            return super().run_node(n)
        if n.target is torch_private.CHECKPOINT:
            body = attribute(self.module, str(n.args[0].target))  # type: ignore[union-attr]
            torch_private.trace_checkpoint_with(body, _recompute_all)  # type: ignore[arg-type]
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        return self.watch.call(n, [self.env[x] for x in n.all_input_nodes], lambda: super(_Run, self).run_node(n))


def _enables_gradients(gm: fx.GraphModule) -> bool:
    return torch.is_grad_enabled() or any(n.target is torch_private.SET_GRAD and n.args[0] for n in gm.graph.nodes)


def _recompute_all() -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
        lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    )


def checkpointed(body: fx.GraphModule, *args: object, **options: Any) -> object:
    """Run a checkpointed region eagerly; random state is kept, so that dropout repeats itself when recomputed."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(body, *args, **{"preserve_rng_state": True, **options, "use_reentrant": False})


def regions(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and the bodies of its checkpointed regions, outermost first."""
    yield gm
    for n in gm.graph.nodes:
        if n.op == "call_function" and n.target in (torch_private.CHECKPOINT, checkpointed):
            body = attribute(gm, str(n.args[0].target))
            assert isinstance(body, fx.GraphModule)
            yield from regions(body)


def attribute(root: nn.Module, path: str) -> object:
    value: object = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _bind_attributes(gm: fx.GraphModule, count: int, values: Mapping[str, object], paths: Sequence[str]) -> None:
    """Turn the trailing placeholders back into attributes of the graph."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i, (node, path) in enumerate(zip(inputs[count:], paths, strict=True)):
        name = f"_held{i}"
        value = values[path]
        if isinstance(value, nn.Parameter):
            gm.register_parameter(name, value)
        else:
            gm.register_buffer(name, value, persistent=False)  # type: ignore[arg-type]
        with gm.graph.inserting_before(node):
            new = gm.graph.get_attr(name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else ""


# --- both -------------------------------------------------------------------------------------------------------


def finish(gm: fx.GraphModule, path_of: Callable[[str, str], str], frame: str = "", *, runs: bool = True) -> None:
    """Module paths as in `named_modules()`, gradients and casts. `frame`: the module whose own code the graph is."""
    for n in gm.graph.nodes:
        stack = n.meta.get("nn_module_stack") or ({"": (frame, nn.Module)} if frame and n.op == "call_function" else {})
        if stack:
            n.meta["nn_module_stack"] = {k: (path_of(k, str(p)) if k else p, t) for k, (p, t) in stack.items()}
    mark_gradients(gm, torch.is_grad_enabled())
    explicit_casts(gm)
    for n in gm.graph.nodes:
        if n.op == "call_function" and n.target is torch_private.CHECKPOINT:
            body = attribute(gm, str(n.args[0].target))
            assert isinstance(body, fx.GraphModule)
            for inner, given in zip((x for x in body.graph.nodes if x.op == "placeholder"), n.args[1:]):
                if isinstance(given, fx.Node) and _wants(given):
                    _mark(inner.meta.get("val"))
            finish(body, path_of, frame, runs=runs)
    gm.graph.lint()
    if runs:
        gm.recompile()


def path_of(names: Mapping[int, str], key: str, path: str) -> str:
    """The path of a module in a node's stack, by Dynamo's key and path of it."""
    return names.get(_identity(key), _plain_path(path))


def _identity(key: str) -> int:
    """Dynamo's key of a module in a stack is its identity, with the number of the call."""
    text = key.split("@")[0]
    return int(text) if text.isdigit() else 0


def frame_module(names: Mapping[int, str]) -> str:
    """The path of the module that the compiled function belongs to: a method's operators carry no stack for it."""
    for value in torch_private.compiled_locals().values():
        if isinstance(value, nn.Module) and id(value) in names:
            return names[id(value)]
    return ""


def _plain_path(path: str) -> str:
    """`L['self'].layers.0` → `layers.0`"""
    for root in _ROOTS:
        if path.startswith(root):
            return path.removeprefix(root).strip(".")
    return path


def mark_gradients(gm: fx.GraphModule, enabled: bool) -> None:
    """Say on every fake value whether a gradient flows into it; tracing detaches them.

    A value wants a gradient when grad mode is on where it is made, it is floating, and one of its inputs wants one.
    """
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        if n.op == "call_function" and n.target is torch_private.SET_GRAD:
            enabled = bool(n.args[0])
        if n.op in ("placeholder", "get_attr"):
            held = attribute(gm, str(n.target)) if n.op == "get_attr" else None
            wants = isinstance(held, Tensor) and held.requires_grad
            if isinstance(value, Tensor) and (wants or _was_wanted(n)):
                _mark(value)
            continue
        if n.op != "call_function" or not enabled or _detaches(n):
            continue
        if any(_wants(i) for i in n.all_input_nodes):
            for v in value if isinstance(value, (list, tuple)) else [value]:
                _mark(v)
            for written in written_arguments(n):
                _mark(written.meta.get("val"))


def _was_wanted(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, Tensor) and (value.requires_grad or isinstance(value, nn.Parameter))


def _wants(n: fx.Node) -> bool:
    value = n.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _mark(value: object) -> None:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and not value.requires_grad:
        value.requires_grad_(True)


def _detaches(n: fx.Node) -> bool:
    return isinstance(n.target, torch_private.OpOverload) and torch_private.schema(n.target).name in _DETACHING


Backend = Callable[[fx.GraphModule, Sequence[object]], Callable[..., Any]]
