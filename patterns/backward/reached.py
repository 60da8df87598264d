"""Which inputs a gradient can reach, as autograd sees it: those with a path of floats to the output.

    where(x > t, x, 0)      x is reached, t is not: what compares has no derivative, and no gradient of 0 either
"""

from __future__ import annotations

from ..cascade import Cascade
from ..expr import Expr


def reached(c: Cascade) -> frozenset[str]:
    """The inputs of a cascade that have a gradient where they want one."""
    on = set(c.outputs)
    for e in reversed(c.einsums):
        if e.out.tensor in on:
            on |= {str(x.attr) for x in _on_paths(e.body)}
    return frozenset(t.name for t in c.inputs if t.name in on)


def _on_paths(term: Expr) -> list[Expr]:
    """The loads that floats alone lead from."""
    found: list[Expr] = []
    seen: set[Expr] = set()
    stack = [term]
    while stack:
        t = stack.pop()
        if t in seen or not t.is_float:
            continue
        seen.add(t)
        if t.op == "load":
            found.append(t)
        else:
            stack += t.args
    return found
