"""Sizes of graph nodes as the cascade's sizes: integers, or sympy terms over the graph's own symbol names."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from ...patterns.cascade import Size, as_size
from .torch_private import expression, known_size, least, traced_size


def size_of(value: object) -> Size:
    """An `int` or `SymInt` as a Size. Raises TypeError for anything else."""
    if isinstance(value, torch.SymInt):
        known = known_size(value)
        return known if known is not None else plain(expression(value))
    if isinstance(value, int):
        return value
    raise TypeError(f"{value!r} is no size")


def shape_of(value: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size_of(s) for s in value.shape)


def plain(e: sympy.Expr) -> Size:
    """A shape environment's expression in sympy's own functions, every symbol integer and positive."""
    if e.is_Integer:
        return int(e)
    if e.is_Symbol:
        return sympy.Symbol(e.name, integer=True, positive=True)
    args = [sympy.sympify(plain(a)) for a in e.args]
    match type(e).__name__:
        case "FloorDiv" | "CleanDiv":
            out = sympy.floor(args[0] / args[1])
        case "Mod" | "PythonMod":
            out = sympy.Mod(args[0], args[1])
        case "ModularIndexing":
            out = sympy.Mod(sympy.floor(args[0] / args[1]), args[2])
        case "Min":
            out = sympy.Min(*args)
        case "Max":
            out = sympy.Max(*args)
        case _:
            out = e.func(*args)
    return as_size(out)


def same(a: Size, b: Size) -> bool:
    """Equal for every value of the symbols (as far as expansion shows; a false negative is safe)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def agree(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Are two sizes that an operator demands to be one equal in the example? The graph is then guarded to keep it so."""
    known = all(not isinstance(x, torch.SymInt) or traced_size(x) is not None for x in (a, b))
    return bool(a == b) if known else same(size_of(a), size_of(b))


def settle_signs(graph: fx.Graph) -> None:
    """Integers that are no sizes and open in a graph: guarded to be positive, which every symbol is taken for, or fixed."""
    for n in graph.find_nodes(op="placeholder"):
        value = n.meta.get("val")
        if not isinstance(value, torch.SymInt) or known_size(value) is not None or least(value) >= 0:
            continue
        traced = traced_size(value)
        if traced is not None and traced >= 1:
            bool(value >= 1)
        elif traced is not None:
            int(value)


def product(sizes: Sequence[Size]) -> Size:
    out: Size = 1
    for s in sizes:
        out = s if out == 1 else out if s == 1 else sympy.sympify(out) * s if not _ints(out, s) else int(out) * int(s)
    return out


def _ints(a: Size, b: Size) -> bool:
    return isinstance(a, int) and isinstance(b, int)
