"""Autocast made explicit: the casts that autocast makes in silence become nodes, so that a lift sees every type.

    before   under autocast(bf16):  matmul(q: f32, k: f32) : bf16
    after    under autocast(bf16):  matmul(to(q, bf16), to(k, bf16)) : bf16

Autocast leaves operands alone that have its type already, so the graph means the same and still runs under it. Which
operands are cast, and to what, is observed by running the operator once on its fake values, not looked up in a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import torch_private

DEVICES = ("cpu", "cuda", "xpu", "mps")
_FOR = "autocast_for"


@dataclass(frozen=True)
class Region:
    """The autocast state of one device type."""

    enabled: bool
    dtype: torch.dtype


def regions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Mapping[str, Region]]]:
    """Every node with the autocast state that it runs under: what holds around the graph, and its own regions."""
    state = {
        d: Region(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in DEVICES
        if torch.amp.is_autocast_available(d)
    }
    saved: dict[fx.Node, tuple[str, Region]] = {}
    for n in list(gm.graph.nodes):
        if n.op == "call_function" and n.target is torch_private.ENTER_AUTOCAST:
            device, dtype, enabled, *_ = n.args
            before = state.get(str(device), Region(False, torch.float32))
            saved[n] = (str(device), before)
            state = {**state, str(device): Region(bool(enabled), dtype or before.dtype)}
        elif n.op == "call_function" and n.target is torch_private.EXIT_AUTOCAST:
            device, before = saved[n.args[0]]
            state = {**state, device: before}
        yield n, state


def explicit_casts(gm: fx.GraphModule) -> None:
    """Insert every cast that autocast would make. Cast nodes remember the operator that they were made for."""
    known: dict[object, tuple[tuple[torch.dtype | None, ...], torch.dtype | None]] = {}
    for n, state in regions(gm):
        if n.op != "call_function" or not isinstance(n.target, torch_private.OpOverload):
            continue
        region = _region_of(n, state)
        if region is None:
            continue
        # an operator of several steps (einsum) casts by what its other arguments and the sizes say
        key = (n.target, tuple(_kind(i) for i in n.all_input_nodes), region, repr(fx.map_arg((n.args, n.kwargs), _dtype)))
        if key not in known:
            known[key] = _observe(n, region[0], region[1])
        casts, option = known[key]
        for source, dtype in zip(n.all_input_nodes, casts):
            if dtype is not None:
                _insert(gm, n, source, dtype)
        if option is not None:
            n.kwargs = {**n.kwargs, "dtype": option}


def remove_unused_casts(gm: fx.GraphModule) -> None:
    """Take back the casts whose operator is still in the graph: autocast makes them, and caches those of weights."""
    for n in list(gm.graph.nodes):
        owner = n.meta.get(_FOR)
        if owner is None:
            continue
        for user in list(n.users):
            if user.name == owner:
                user.replace_input_with(n, n.args[0])
        if not n.users:
            gm.graph.erase_node(n)


def _region_of(n: fx.Node, state: Mapping[str, Region]) -> tuple[str, Region] | None:
    for i in n.all_input_nodes:
        value = i.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            region = state.get(value.device.type)
            return (value.device.type, region) if region is not None and region.enabled else None
    return None


def _dtype(n: fx.Node) -> torch.dtype | None:
    value = n.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _kind(n: fx.Node) -> tuple[object, ...]:
    value = n.meta.get("val")
    return (value.dtype, *map(str, value.shape)) if isinstance(value, torch.Tensor) else (type(value),)


# What holds its first argument's numbers in another shape, beside the views.
_RESHAPED = ("aten::clone", "aten::_unsafe_view")


class _Watch(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the type that each watched tensor is converted to: as it is, or as the operator has reshaped it (einsum)."""

    def __init__(self, watched: list[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes = [[w] for w in watched]
        self.casts: list[torch.dtype | None] = [None] * len(watched)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        mine = [i for i, shapes in enumerate(self.shapes) if args and any(w is args[0] for w in shapes)]
        for i in mine:
            if func is torch_private.TO_COPY and self.casts[i] is None:
                self.casts[i] = (kwargs or {}).get("dtype")
            elif _reshapes(func):
                self.shapes[i].append(out)
        return out


def _reshapes(func: Any) -> bool:
    said = torch_private.schema(func)
    shared = any(r.alias_info is not None and not r.alias_info.is_write for r in said.returns)
    return shared or said.name in _RESHAPED


def _observe(n: fx.Node, device: str, region: Region) -> tuple[tuple[torch.dtype | None, ...], torch.dtype | None]:
    """The casts of the operands, and the `dtype` argument where autocast sets that instead (softmax on CUDA)."""
    sources = n.all_input_nodes
    values = [i.meta.get("val") for i in sources]
    none = (None,) * len(sources)
    said = torch_private.schema(n.target)  # type: ignore[arg-type]
    if said.is_mutable or said.name in ("aten::to", "aten::_to_copy") or any(v is None for v in values):
        return none, None
    mode = _fake_mode(values)
    if isinstance(mode, torch_private.FakeTensorMode):
        values = [mode.from_tensor(v) if type(v) is torch.Tensor else v for v in values]
    table: dict[fx.Node, Any] = dict(zip(sources, values))
    args, kwargs = fx.map_arg((n.args, n.kwargs), table.__getitem__)
    watch = _Watch(values)
    with mode, torch.no_grad(), torch.autocast(device, region.dtype, cache_enabled=False), watch:
        n.target(*args, **kwargs)  # type: ignore[operator]
    wanted, alone = _dtypes(n.meta.get("val")), _Watch(values)
    same = _run(n, args, kwargs, mode, alone) == wanted
    # what the operator converts by itself is no cast of autocast's: SDPA in 16 bits computes in float32
    own = alone.casts if same else none
    casts = tuple(c if c not in (None, _dtype(s), o) else None for s, c, o in zip(sources, watch.casts, own))
    if any(casts) or same or not any(a.name == "dtype" for a in said.arguments):
        return casts, None
    return none, wanted[0]


def _fake_mode(values: list[Any]) -> AbstractContextManager[Any]:
    """The fake mode of some operand: scalars of the operator become fake under it, and constants with real values too."""
    mode = torch_private.detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    return mode if mode is not None else nullcontext()


def _run(
    n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], mode: AbstractContextManager[Any], watch: _Watch
) -> tuple[torch.dtype | None, ...] | None:
    """The types of the results without autocast; None where the operator refuses mixed types."""
    try:
        with torch_private.quietly(), mode, torch.no_grad(), no_autocast(), watch:
            return _dtypes(n.target(*args, **kwargs))  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return None


@contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off, on every device."""
    with ExitStack() as stack:
        for d in DEVICES:
            if torch.amp.is_autocast_available(d):
                stack.enter_context(torch.autocast(d, enabled=False))
        yield


def _dtypes(value: object) -> tuple[torch.dtype | None, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(v.dtype if isinstance(v, torch.Tensor) else None for v in values)


def _insert(gm: fx.GraphModule, n: fx.Node, source: fx.Node, dtype: torch.dtype) -> None:
    with gm.graph.inserting_before(n):
        cast = gm.graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
    value = source.meta["val"]
    cast.meta = {k: v for k, v in n.meta.items() if k in ("stack_trace", "nn_module_stack", "seq_nr")}
    with torch.no_grad(), no_autocast():
        cast.meta["val"] = value.detach().to(dtype)
    if value.requires_grad:
        cast.meta["val"].requires_grad_(True)
    cast.meta[_FOR] = n.name
    n.replace_input_with(source, cast)
