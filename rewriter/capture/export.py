"""Capture of a whole model on real, meta or fake tensors, without running it: for plans, and for exported programs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import torch_private
from . import mapped
from .capture import Captured, CaptureError, attribute, finish, first_line


def from_export(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object] | None, *, dynamic: bool = False
) -> Captured:
    """One whole graph of a model on real, meta or fake tensors. Nothing is computed. Raises CaptureError.

    The graph takes every tensor of the arguments, in order (tensors inside caches and other objects too), and answers every
    tensor of the result (itself where it is one tensor); parameters, buffers and constants are its attributes. Each input's
    `meta["argument"]` names the argument that held it. With `dynamic`, every input size that the model does not fix is
    symbolic.
    """
    start = time.perf_counter()
    inputs, given = held_tensors((args, dict(kwargs or {})))
    flat = _Flat(model, given)
    shapes = (tuple(map(_open_dims, inputs)),) if dynamic else None
    try:
        with _no_hook_left(), torch_private.quietly(), _without_graph():
            program = torch.export.export(flat, tuple(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        # Export reports what it cannot trace with many types of error, from user code as well.
        raise CaptureError(f"{type(error).__name__}: {first_line(error)}") from error
    captured = from_program(program, drop="model")
    names = _arguments_of(model, args, kwargs or {})
    for n, t in zip((n for n in captured.graph.graph.nodes if n.op == "placeholder"), inputs):
        n.meta["argument"] = names.get(id(t), str(n.target))
    return Captured(captured.graph, "export", time.perf_counter() - start)


@contextlib.contextmanager
def _no_hook_left() -> Iterator[None]:
    """Export that fails leaves its hook on buffers in all modules: Dynamo then breaks every graph that assigns one."""
    hooks = torch_private.buffer_hooks()
    before = set(hooks)
    try:
        yield
    finally:
        for left in set(hooks) - before:
            del hooks[left]


@contextlib.contextmanager
def _without_graph() -> Iterator[None]:
    """Export prints the graph so far beside some errors; what else was said meanwhile is passed on."""
    said, graph = io.StringIO(), ""
    with _redirecting:
        try:
            with contextlib.redirect_stderr(said):
                yield
        except Exception as error:
            graph = torch_private.graph_so_far(error)
            raise
        finally:
            sys.stderr.write(said.getvalue().replace(f"{graph}\n", "") if graph else said.getvalue())


# Standard error is one for all threads.
_redirecting = threading.RLock()


def _open_dims(t: Tensor) -> dict[int, Any]:
    """Which sizes export may leave open: it takes 0 and 1 for special."""
    dim = torch.export.Dim
    return {i: dim.AUTO if n > 1 else dim.STATIC for i, n in enumerate(t.shape)}


def _arguments_of(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Mapping[int, str]:
    """The name of the model's argument that holds each tensor, by the tensor's identity."""
    parameters = inspect.signature(model.forward).parameters
    names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = {**dict(zip(names, args)), **kwargs}
    out: dict[int, str] = {}
    for name, value in given.items():
        for t in held_tensors(value)[0]:
            out.setdefault(id(t), name)
    return out


class _Flat(nn.Module):
    """A model as a function of tensors: arguments are put together from them, results taken apart."""

    def __init__(self, model: nn.Module, given: Callable[[Sequence[Tensor]], Any]) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        args, kwargs = self.given(tensors)
        out = self.model(*args, **kwargs)
        return out if isinstance(out, Tensor) else tuple(held_tensors(out)[0])


def held_tensors(value: object) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Every tensor that a value holds, each once, and how to make the value anew with others in their places.

    Looks into tuples, lists, mappings, data classes and plain objects (a cache and its layers), not into modules.
    """
    found: dict[int, Tensor] = {}
    make = _rebuilder(value, found, {})
    order = list(found)
    return list(found.values()), lambda new: make(dict(zip(order, new, strict=True)), {})


_Make = Callable[[dict[int, Tensor], dict[int, Any]], Any]


def _rebuilder(value: Any, found: dict[int, Tensor], seen: dict[int, _Make]) -> _Make:
    if isinstance(value, Tensor):
        found.setdefault(id(value), value)
        return lambda new, made: new[id(value)]
    if isinstance(value, tuple) and type(value) is not tuple and hasattr(value, "_fields"):
        parts = [_rebuilder(v, found, seen) for v in value]
        return lambda new, made: type(value)(*(p(new, made) for p in parts))
    if isinstance(value, (list, tuple)):
        parts = [_rebuilder(v, found, seen) for v in value]
        return lambda new, made: type(value)(p(new, made) for p in parts)
    if isinstance(value, dict) and type(value) is dict:
        table = {k: _rebuilder(v, found, seen) for k, v in value.items()}
        return lambda new, made: {k: p(new, made) for k, p in table.items()}
    if isinstance(value, dict):
        for v in value.values():
            _rebuilder(v, found, seen)
        return lambda new, made: value
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, type)) or callable(value) or _is_config(value):
        return lambda new, made: value
    return _object_rebuilder(value, found, seen)


def _object_rebuilder(value: Any, found: dict[int, Tensor], seen: dict[int, _Make]) -> _Make:
    if id(value) in seen:
        return seen[id(value)]
    table: dict[str, _Make] = {}

    def make(new: dict[int, Tensor], made: dict[int, Any]) -> Any:
        if id(value) not in made:
            made[id(value)] = other = copy.copy(value)
            for k, p in table.items():
                object.__setattr__(other, k, p(new, made))
        return made[id(value)]

    seen[id(value)] = make
    table.update({k: _rebuilder(v, found, seen) for k, v in vars(value).items()})
    return make


def _is_config(value: object) -> bool:
    return hasattr(value, "to_json_string") or isinstance(value, (torch.dtype, torch.device))


def from_program(program: torch.export.ExportedProgram, drop: str = "") -> Captured:
    """The graph of an exported program, which may have been read from a file. `drop` leads every module path."""
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    for n in list(graph.graph.nodes):
        # Export's own assertions on types would count as readers of the values that they name.
        if n.target is torch_private.ASSERT_METADATA:
            graph.graph.erase_node(n)
    inline_regions(graph)
    plain = _written_out(graph)
    if plain is not graph or any(n.target is torch_private.ENTER_AUTOCAST for n in graph.graph.nodes):
        _propagate(plain)
    graph = plain
    finish(graph, lambda key, path: _without(path, drop))
    return Captured(graph, "pt2", 0.0)


def _written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without mapped functions and FlexAttentions. Raises CaptureError."""
    known = {n: n.meta.get("val") for n in gm.graph.nodes}
    mode = torch_private.detect_fake_mode([v for v in known.values() if isinstance(v, Tensor)])
    if mode is None:
        return gm
    try:
        return mapped.written_out(gm, lambda: known, mode, flex=True)
    except Exception as error:
        raise CaptureError(f"a function is mapped inside it: {type(error).__name__}: {first_line(error)}") from error


def _propagate(gm: fx.GraphModule) -> None:
    """Compute the fake values again, autocast regions entered: export records such regions without entering them."""

    class Values(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = n.meta["val"] if n.op in ("placeholder", "get_attr") and "val" in n.meta else super().run_node(n)
            if n.op != "output":
                n.meta["val"] = value
            return value

    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    mode = torch_private.detect_fake_mode(inputs)
    with torch.no_grad(), mode if mode is not None else contextlib.nullcontext():
        Values(gm).run(*inputs)


def inline_regions(gm: fx.GraphModule) -> None:
    """Put the bodies of grad-mode and autocast regions back in line.

    before   y = wrap_with_set_grad_enabled(False, body, x)
    after    set_grad_enabled(False); y = ops of body on x; set_grad_enabled(True)
    """
    leading = {torch_private.GRAD_REGION: 1, torch_private.AUTOCAST_REGION: 4}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in leading:
            _inline(gm, node, leading[node.target])
    gm.recompile()


def _inline(gm: fx.GraphModule, region: fx.Node, leading: int) -> None:
    """`leading` arguments of the region come before its body."""
    name = str(region.args[leading].target)  # type: ignore[union-attr]
    body = attribute(gm, name)
    assert isinstance(body, fx.GraphModule)
    inline_regions(body)
    inputs = (n for n in body.graph.nodes if n.op == "placeholder")
    values: dict[fx.Node, Any] = dict(zip(inputs, region.args[leading + 1 :]))
    with gm.graph.inserting_before(region):
        leave = _enter(gm.graph, region)
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            values[inner] = gm.graph.node_copy(inner, values.__getitem__)
            if inner.op == "get_attr":
                values[inner].target = f"{name}_{inner.target}".replace(".", "_")
                setattr(gm, values[inner].target, attribute(body, str(inner.target)))
        leave()
    (out,) = next(n for n in body.graph.nodes if n.op == "output").args
    results = [values[n] for n in (out if isinstance(out, (list, tuple)) else [out])]
    for user in list(region.users):
        user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(region)


def _enter(graph: fx.Graph, region: fx.Node) -> Callable[[], fx.Node]:
    """Open a region in line, and answer what closes it."""
    if region.target is torch_private.GRAD_REGION:
        graph.call_function(torch_private.SET_GRAD, (region.args[0],))
        return lambda: graph.call_function(torch_private.SET_GRAD, (not region.args[0],))
    token = graph.call_function(torch_private.ENTER_AUTOCAST, region.args[:4])
    return lambda: graph.call_function(torch_private.EXIT_AUTOCAST, (token,))


def _without(path: str, leading: str) -> str:
    if leading and (path == leading or path.startswith(leading + ".")):
        return path[len(leading) + 1 :]
    return path
