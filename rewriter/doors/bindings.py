"""What names are bound to, of modules and classes: noted where code was looked at, and held against later calls.

    eager_attention_forward    noted: the function        patched by the user    another one: the code is looked at anew
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

_Binding = tuple[Mapping[str, Any], str, Any]


class _Nothing:
    """Where a name is bound to nothing."""


class Bindings:
    """Names with what they were bound to. `hold` says whether they still are; equal ones hold the same things."""

    def __init__(self, read: Iterable[tuple[Mapping[str, Any], str]]) -> None:
        self._noted: tuple[_Binding, ...] = tuple((space, name, space.get(name, _Nothing)) for space, name in read)

    def hold(self) -> bool:
        return all(space.get(name, _Nothing) is value for space, name, value in self._noted)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bindings):
            return NotImplemented
        mine, theirs = self._noted, other._noted
        return len(mine) == len(theirs) and all(a[1] == b[1] and a[2] is b[2] for a, b in zip(mine, theirs))

    def __hash__(self) -> int:
        return hash(tuple((name, id(value)) for _, name, value in self._noted))


def read_by(function: types.FunctionType) -> Bindings:
    """The names of modules that a function reads, and that those functions read which it finds there, torch's apart."""
    return Bindings(_read_by(function, set()))


def _read_by(function: types.FunctionType, seen: set[types.FunctionType]) -> Iterator[tuple[Mapping[str, Any], str]]:
    seen.add(function)
    space = function.__globals__
    for name in globals_of(function.__code__):
        yield space, name
        value = space.get(name)
        if isinstance(value, types.FunctionType) and value not in seen and not _is_of_torch(value):
            yield from _read_by(value, seen)


def _is_of_torch(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


@lru_cache(maxsize=1024)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The names of its module that a code object reads, code inside it included."""
    read = [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = (n for c in code.co_consts if isinstance(c, types.CodeType) for n in globals_of(c))
    return tuple(dict.fromkeys((*read, *inner)))
