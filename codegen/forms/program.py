"""A program: a cascade and its mapping as one text, and what an operator needs to know of it without a kernel.

    text   {"schema": 1, "cascade": canonical text, "mapping": canonical text}
    out    the output as kernels allocate it: memory in the order batch…, query, last batch rank, value, seen as declared
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, CascadeError, bind, parse, size_term, to_text
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.passes.further import main

SCHEMA = 1


@dataclass(frozen=True)
class Program:
    """A cascade with the mapping that it runs by."""

    cascade: Cascade
    mapping: TileMapping

    @property
    def loose(self) -> tuple[str, ...]:
        """Sizes that no dimension of an input tells: a caller gives them, in this order."""
        return loose(self.cascade)


@lru_cache(maxsize=1024)
def program_text(c: Cascade, mapping: TileMapping) -> str:
    """Canonical text; equal programs have equal texts."""
    body = {"schema": SCHEMA, "cascade": to_text(c), "mapping": mapping.to_text()}
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


@lru_cache(maxsize=1024)
def read_program(text: str) -> Program:
    """Read a program. Raises CascadeError for another schema, naming both numbers."""
    body = json.loads(text)
    if body.get("schema") != SCHEMA:
        raise CascadeError(f"program text has schema {body.get('schema')}; this version reads schema {SCHEMA}")
    return Program(parse(body["cascade"]), TileMapping.parse(body["mapping"]))


@lru_cache(maxsize=1024)
def bindings(c: Cascade) -> tuple[tuple[str, str, int], ...]:
    """(symbol, tensor, dimension) for every size that is itself a dimension of an input."""
    out: dict[str, tuple[str, str, int]] = {}
    for t in c.inputs:
        for d, s in enumerate(t.shape):
            if isinstance(s, sympy.Symbol):
                out.setdefault(str(s), (str(s), t.name, d))
    return tuple(out.values())


@lru_cache(maxsize=1024)
def loose(c: Cascade) -> tuple[str, ...]:
    """Symbols that no dimension of an input is."""
    bound = {s for s, _, _ in bindings(c)}
    return tuple(s for s in c.free_symbols if s not in bound)


@lru_cache(maxsize=1024)
def memory_order(c: Cascade) -> tuple[int, ...]:
    """The output's dimensions, outermost in memory first: heads lie inside a query, as models put them together."""
    a = attention(main(c))
    n = len(c.tensor[c.outputs[0]].shape)
    if not isinstance(a, Attention) or not a.batch:
        return tuple(range(n))
    (e,) = c.producers[c.outputs[0]]
    place = {str(i.attr): d for d, i in enumerate(e.out.index)}
    wanted = (*a.batch[:-1], a.query, a.batch[-1], a.value)
    return tuple(place[r] for r in wanted) if set(wanted) == set(place) else tuple(range(n))


def output_shape(
    c: Cascade, shapes: Mapping[str, Sequence[Any]], sizes: Mapping[str, Any], name: str = ""
) -> list[Any]:
    """The sizes of an output, the first one unless told; values may be integers or symbolic integers of a tracer."""
    known = {s: shapes[t][d] for s, t, d in bindings(c)} | dict(sizes)
    return [_value(s, known) for s in c.tensor[name or c.outputs[0]].shape]


def _value(size: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(size, int):
        return size
    if isinstance(size, sympy.Symbol):
        return known[str(size)]
    if all(isinstance(known[str(s)], int) for s in size.free_symbols):
        return bind(size, known)
    try:
        term = size_term(size)
    except ValueError:
        names = sorted(str(s) for s in size.free_symbols)
        return sympy.lambdify(names, size, modules="math")(*(known[n] for n in names))
    return _counted(term, known)


# A symbolic integer of torch takes part in Python's arithmetic only, and stays one under whole operators alone.
_WHOLE: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod,
    "min": torch.sym_min, "max": torch.sym_max,
}


def _counted(term: Expr, known: Mapping[str, Any]) -> Any:
    """The value of a size that is a term."""
    if term.op == "symbol":
        return known[str(term.attr)]
    if term.is_const:
        return int(term.value)
    a, b = (_counted(x, known) for x in term.args)
    return _WHOLE[term.op](a, b)
