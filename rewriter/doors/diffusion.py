"""diffusers' doors: the attention backend "reattend", and processors whose SDPA goes through us.

    model.set_attention_backend("reattend")                 processors that ask for a backend (diffusion transformers)
    unet.set_attn_processor(reattend.processors(unet))      processors that call SDPA themselves (UNets)

Either way what is traced, checked against and fallen back to is what diffusers' native backend or torch's SDPA computes, the
mask included, in whatever shape it comes.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from enum import Enum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..run.bypass import traced
from .book import layer_of
from .reads import Reads
from .site import Door, DoorCall

NAME = "reattend"
SDPA = torch.nn.functional.scaled_dot_product_attention
_doors: list[Door] = []


def register(door: Door) -> None:
    """Make the backend known to diffusers. Raises ImportError where its registry is another than the one known here."""
    _doors[:] = [door]
    try:
        registry, backends, constraints, names = (pkgutil.resolve_name(part) for part in _PARTS)
        native, checks = backends[names.NATIVE], constraints[names.NATIVE]
    except (ImportError, AttributeError, KeyError) as no:
        raise ImportError(f"reattend.register: this diffusers has no attention backends as 0.42 has them: {no}") from None
    registry.register(_member(names), constraints=list(checks))(_backend(door, native))


# Parts of diffusers that promise nothing.
_FILE = "diffusers.models.attention_dispatch:"
_REGISTRY = f"{_FILE}_AttentionBackendRegistry"
_PARTS = _REGISTRY, f"{_REGISTRY}._backends", f"{_REGISTRY}._constraints", f"{_FILE}AttentionBackendName"


def _member(names: type[Enum]) -> Enum:
    """The name as a member of diffusers' list of names, which is closed to others by its kind alone."""
    known = names.__members__.get(NAME.upper())
    if known is not None:
        return known
    kind: Any = names
    made: Enum = str.__new__(kind, NAME)
    lists = vars(names)
    vars(made).update({"_name_": NAME.upper(), "_value_": NAME, "_sort_order_": len(names)})
    lists["_member_names_"].append(NAME.upper())
    lists["_member_map_"][NAME.upper()] = made
    lists["_value2member_map_"][NAME] = made
    return made


def _backend(door: Door, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(native)
    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        given = dict(options)
        out = None
        if given.get("_parallel_config") is None and not given.get("return_lse"):
            out = _through(door, _caller(inspect.currentframe()), native, (query, key, value), given)
        return native(query, key, value, **options) if out is None else out

    return attention


# The dispatcher and the processor stand between a backend and the module that it works for.
_FRAMES = 5
_nobody = nn.Module()


def _caller(frame: FrameType | None) -> nn.Module:
    """The module whose attention is asked for: the first among the arguments of the functions that are running."""
    if torch.compiler.is_dynamo_compiling():
        return _nobody
    for _ in range(_FRAMES):
        if frame is None:
            break
        code, local = frame.f_code, frame.f_locals
        for name in code.co_varnames[: code.co_argcount]:
            if isinstance(local.get(name), nn.Module):
                found: nn.Module = local[name]
                return found
        frame = frame.f_back
    return _nobody


def _through(
    door: Door, layer: nn.Module, function: Callable[..., Tensor], operands: tuple[Tensor, Tensor, Tensor],
    options: Mapping[str, Any],
) -> Tensor | None:
    """The attention of a call; None where the library's own function is to run."""
    mask = options.get("attn_mask")
    values = (*operands, mask) if isinstance(mask, Tensor) else operands
    if torch.compiler.is_dynamo_compiling() or traced(values, {}):
        return None
    page = layer_of(layer)
    if why := _left(values, options):
        page.calls += 1
        page.leave(why)
        return None
    plain = {n: x for n, x in options.items() if n != "attn_mask"}

    def code(layer: nn.Module, reads: Reads) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
            return function(q, k, v, attn_mask=rest[0] if rest else None, **plain)

        return run

    key = (function, len(values), tuple((n, type(x), x) for n, x in plain.items()))
    return page.run(DoorCall(layer, lambda: inspect.getsourcefile(type(layer)) or "", key, values, code), door)


def _left(values: tuple[Tensor, ...], options: Mapping[str, Any]) -> str:
    if any(type(x) not in (Tensor, nn.Parameter) for x in values):
        return "a tensor of a kind of its own is read"
    devices = {x.device.type for x in values}
    if len(devices) != 1 or not devices <= {"cpu", "cuda"}:
        return f"no kernel runs on {', '.join(sorted(devices))}"
    return "live dropout (model.eval() turns it off): its random numbers cannot be kept" if options.get("dropout_p") else ""


# --- processors -------------------------------------------------------------------------------------------------------


def processors(model: Any) -> dict[str, Any]:
    """The model's attention processors, each as it is but that its SDPA goes through us; for `set_attn_processor`.

    Processors that are modules, with weights of their own, stay as they are. Registers with diffusers where nobody has.
    """
    if not _doors:
        raise RuntimeError('reattend.processors: call reattend.register("diffusers") first')
    wrapped: dict[str, Any] = {}
    for name, p in model.attn_processors.items():
        wrapped[name] = p if isinstance(p, (nn.Module, DoorProcessor)) else DoorProcessor(p, _doors[0])
    return wrapped


class DoorProcessor:
    """A processor whose calls of SDPA go through us."""

    def __init__(self, inner: Callable[..., Tensor], door: Door) -> None:
        self.inner, self.door = inner, door

        def call(*args: Any, **kwargs: Any) -> Tensor:
            return DoorProcessor.__call__(self, *args, **kwargs)

        # diffusers reads which options a processor takes
        self.__dict__["__call__"] = functools.wraps(getattr(inner, "__call__"))(call)  # noqa: B004, B009

    def __reduce__(self) -> tuple[object, ...]:
        return DoorProcessor, (self.inner, self.door)

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return self.inner(attn, *args, **kwargs)
        with _Redirected(self.door, attn):
            return self.inner(attn, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "door"):
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Redirected(TorchFunctionMode):
    """While a processor runs, SDPA is ours."""

    def __init__(self, door: Door, layer: nn.Module) -> None:
        super().__init__()
        self.door, self.layer = door, layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        bound = _bound(*args, **(kwargs or {}))
        operands = tuple(bound.pop(n) for n in ("query", "key", "value"))
        out = _through(self.door, self.layer, SDPA, operands, bound)
        return func(*args, **(kwargs or {})) if out is None else out


def _bound(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> dict[str, Any]:
    return dict(locals())
