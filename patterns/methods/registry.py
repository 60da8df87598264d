"""The methods that there are, found by listing the rooms of `patterns/methods/`: a file with a method in it is enough."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from .method import Method


@dataclass(frozen=True)
class MethodFacts:
    """A method as people choose it. `parameters`: its defaults by name, `...` where there is none and one must be given."""

    name: str
    source: str
    parameters: Mapping[str, Any]
    needs: tuple[str, ...]
    make: type[Method]

    def __str__(self) -> str:
        given = ", ".join(f"{n}={'…' if v is ... else v}" for n, v in self.parameters.items())
        return f"{self.make.__name__}({given})  {self.source}" + (f"; needs {', '.join(self.needs)}" if self.needs else "")


@cache
def methods() -> tuple[MethodFacts, ...]:
    """Every method, by name."""
    package = __name__.rpartition(".")[0]
    found: dict[str, MethodFacts] = {}
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        for kind in vars(importlib.import_module(module.name)).values():
            own = inspect.isclass(kind) and kind.__module__ == module.name and issubclass(kind, Method)
            if own and not inspect.isabstract(kind):
                found[kind.name] = MethodFacts(kind.name, kind.source, _defaults(kind), kind.needs, kind)
    return tuple(found[n] for n in sorted(found))


def _defaults(kind: type[Method]) -> Mapping[str, Any]:
    return {f.name: ... if f.default is MISSING else f.default for f in fields(kind)}


def named(name: str) -> Method | None:
    """The method of this name with its defaults; None for another name, or where a parameter has no default."""
    facts = next((m for m in methods() if m.name == name), None)
    if facts is None or any(v is ... for v in facts.parameters.values()):
        return None
    return facts.make()
