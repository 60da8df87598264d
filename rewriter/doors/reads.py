"""What a library's function reads of the module that it is given: noted while it is traced, and held against later modules.

    module.num_key_value_groups    noted: 2        module.sinks    a tensor: an input of the graph
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import torch_private
from .callables import Opaque

_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()


class Reads:
    """The plain values that were read, by their paths. `hold` says whether another module has the same ones."""

    def __init__(self) -> None:
        self.noted: dict[str, object] = {}
        self._found: dict[str, Callable[[nn.Module], object]] = {}

    def note(self, path: str, value: object) -> None:
        self.noted[path], self._found[path] = value, attrgetter(path)

    def clear(self) -> None:
        self.noted.clear()
        self._found.clear()

    def hold(self, module: nn.Module) -> bool:
        return all(_same(_at(module, get), self.noted[path]) for path, get in self._found.items())


def _at(module: nn.Module, get: Callable[[nn.Module], object]) -> object:
    try:
        return get(module)
    except AttributeError:
        return MISSING


def _same(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and a == b)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that stand on a module itself."""
    parameters, buffers = torch_private.own_tensors(module)
    return {n: x for n, x in (*parameters.items(), *buffers.items()) if x is not None} if parameters or buffers else {}


class Seen:
    """A module as its function sees it while it is traced."""

    def __init__(self, of: Any, tensors: Mapping[str, Any], reads: Reads, path: str = "") -> None:
        self.__dict__["_seen"] = (of, tensors, reads, path)

    def __getattr__(self, name: str) -> Any:
        of, tensors, reads, path = self.__dict__["_seen"]
        if name in tensors:
            return tensors[name]
        try:
            value = getattr(of, name)
        except AttributeError:
            reads.note(path + name, MISSING)
            raise
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)):
            reads.note(path + name, value)
            return value
        if isinstance(value, types.MethodType) and value.__self__ is of:
            reads.note(path + name + ".__func__", value.__func__)
            return types.MethodType(value.__func__, self)
        if isinstance(value, (Tensor, nn.Module)) or callable(value):
            raise Opaque(f"it reads {path}{name}, a {type(value).__name__}")
        return Seen(value, {}, reads, f"{path}{name}.")

    def __setattr__(self, name: str, value: object) -> None:
        raise Opaque(f"it writes {name} to its module")
