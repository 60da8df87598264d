"""A Python callable as a value: what it computes by, its tensors and open numbers apart from the rest.

    and_masks(window(64), padding(mask))    key   the code of each function, and the 64        leaves   (mask,)

Two callables with equal keys compute the same from their leaves, and `make` gives the callable anew with others in their
places. So a mask that is built again in every call is known again, and its data can be traced. What cannot be seen through
raises Opaque.
"""

from __future__ import annotations

import dis
import functools
import math
import operator
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


class Opaque(Exception):
    """A callable that cannot be seen through; the sentence says why."""


class OpenNumber(int):
    """A number inside a callable that may change from call to call, such as a length: a leaf."""


Leaf = Tensor | int
_Make = Callable[[Sequence[Any]], Any]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_LIBRARIES = (torch, math, operator, functools)


@dataclass(frozen=True, eq=False)
class Structure:
    """A callable taken apart."""

    key: Hashable
    leaves: tuple[Leaf, ...]
    make: Callable[[Sequence[Any]], Callable[..., Any]]


# Keys that are known again as what stands for them.
KEYS = 1024


class _Standing:
    """Stands for a key: compared, and hashed, as itself."""


@lru_cache(maxsize=KEYS)
def standing_for(key: Hashable) -> Hashable:
    """What stands for a key, the same for equal ones: code in it is hashed here, and not wherever the key is looked up."""
    return _Standing()


def structure(function: Callable[..., Any]) -> Structure:
    """The structure of a callable. Raises Opaque."""
    walk = _Taking()
    key, make = walk.value(function)
    return Structure(key, tuple(walk.leaves), make)


class _Taking:
    """One walk through a callable and all that it reads."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.inside: dict[int, int] = {}

    def value(self, x: Any) -> tuple[Hashable, _Make]:
        """The key of a value, and what makes it from the leaves."""
        if isinstance(x, OpenNumber) or type(x) in (Tensor, nn.Parameter):
            return self._leaf(x)
        if type(x) in _PLAIN or isinstance(x, (types.BuiltinFunctionType, type)):
            return (type(x).__name__, x), lambda leaves: x
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, functools.partial):
            return self._partial(x)
        if type(x) in (tuple, list):
            return self._sequence(x)
        if isinstance(x, types.ModuleType) and any(x is m or x.__name__.startswith(f"{m.__name__}.") for m in _LIBRARIES):
            return ("module", x), lambda leaves: x
        raise Opaque(f"it reads a {type(x).__name__}")

    def _leaf(self, x: Any) -> tuple[Hashable, _Make]:
        if isinstance(x, Tensor) and x.requires_grad:
            raise Opaque("it reads a tensor that wants a gradient")
        at = len(self.leaves)
        self.leaves.append(x if isinstance(x, Tensor) else int(x))
        return ("leaf", at), lambda leaves: leaves[at]

    def _sequence(self, x: Any) -> tuple[Hashable, _Make]:
        parts = [self.value(v) for v in x]
        kind = type(x)
        return (kind.__name__, *(k for k, _ in parts)), lambda leaves: kind(m(leaves) for _, m in parts)

    def _partial(self, x: functools.partial[Any]) -> tuple[Hashable, _Make]:
        function, f = self.value(x.func)
        args, a = self.value(x.args)
        names = tuple(x.keywords)
        given, k = self.value(tuple(x.keywords.values()))
        return ("partial", function, args, names, given), lambda leaves: functools.partial(
            f(leaves), *a(leaves), **dict(zip(names, k(leaves)))
        )

    def _function(self, x: types.FunctionType) -> tuple[Hashable, _Make]:
        if id(x) in self.inside:
            return ("itself", self.inside[id(x)]), _endless
        if vars(x):
            raise Opaque(f"{x.__name__} has attributes of its own")
        self.inside[id(x)] = len(self.inside)
        before = len(self.leaves)
        cells, make_cells = self.value(tuple(_content(c) for c in x.__closure__ or ()))
        defaults, make_defaults = self.value(x.__defaults__)
        keywords = x.__kwdefaults__ or {}
        named, make_named = self.value(tuple(keywords.values()))
        read = {n: x.__globals__[n] for n in _globals_of(x.__code__) if n in x.__globals__}
        outside, make_outside = self.value(tuple(read.values()))
        key = ("function", x.__code__, cells, defaults, tuple(keywords), named, tuple(read), outside)
        if len(self.leaves) == before:
            return key, lambda leaves: x

        def make(leaves: Sequence[Any]) -> Any:
            there = x.__globals__ | dict(zip(read, make_outside(leaves)))
            closure = tuple(map(types.CellType, make_cells(leaves)))
            made = types.FunctionType(x.__code__, there, x.__name__, make_defaults(leaves), closure)
            made.__kwdefaults__ = dict(zip(keywords, make_named(leaves))) or None
            return made

        return key, make


def _endless(leaves: Sequence[Any]) -> Any:
    raise Opaque("it calls itself")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        raise Opaque("it reads a variable that has no value yet") from None


@lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The names of the module that a code object reads, those that it defines inside included."""
    return tuple(dict.fromkeys(_names(code)))


def _names(code: types.CodeType) -> Iterator[str]:
    for i in dis.get_instructions(code):
        if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"):
            raise Opaque("it writes to its module, or imports")
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(i.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
