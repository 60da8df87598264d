"""Open sizes of a graph: which of them move together, and which values they may take.

    axis      `seq` those of query ranks, `past` of key ranks alone, `batch` the outermost of the other ranks
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy

from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, Size
from .course import SweepError, Symbol
from .findings import Findings

AXES = ("seq", "past", "batch")


def axes(cascades: Iterable[Cascade]) -> dict[str, tuple[str, ...]]:
    """The open sizes behind `seq`, `past` and `batch`, read off the ranks of the attentions; only axes that there are."""
    found: dict[str, dict[str, None]] = {name: {} for name in AXES}
    for c in dict.fromkeys(cascades):
        view = attention(c)
        if not isinstance(view, Attention):
            continue
        size = {r.name: r.size for r in view.cascade.ranks}
        found["seq"].update(dict.fromkeys(_whole(size[view.query])))
        found["past"].update(dict.fromkeys(_shifted(size[view.key])))
        outermost = next((s for r in view.batch for s in _whole(size[r])), None)
        found["batch"].update({outermost: None} if outermost is not None else {})
    taken: set[str] = set()
    out = {}
    for name in AXES:
        mine = tuple(s for s in found[name] if s not in taken)
        taken |= set(mine)
        if mine:
            out[name] = mine
    return out


def _whole(size: Size) -> tuple[str, ...]:
    return (str(size),) if isinstance(size, sympy.Symbol) else ()


def _shifted(size: Size) -> tuple[str, ...]:
    """The symbol of s, or of s + constant: a cache and the tokens of this step."""
    if isinstance(size, int):
        return ()
    symbols = [s for s in size.free_symbols if (size - s).is_Integer]
    return tuple(str(s) for s in symbols)


def bound_sizes(plan: Findings, sizes: Mapping[str, int]) -> dict[str, int]:
    """Values of all open sizes of a plan, where `sizes` gives some by axis or by symbol. Raises SweepError."""
    at = {s.name: s.value for s in plan.symbols}
    known = {s.name: s for s in plan.symbols}
    for name, value in sizes.items():
        moved = plan.axes.get(name) or ((name,) if name in known else ())
        if not moved:
            raise SweepError(no_axis(plan, name))
        if value < 1:
            raise SweepError(f"{name}={value}: sizes must be at least 1")
        for s in moved:
            if not known[s].admits(value):
                raise SweepError(f"{name}={value}: the graph was captured for {name} {_range(known[s])}")
            at[s] = value
    return at


def _range(s: Symbol) -> str:
    low = 1 if s.low <= 2 else s.low
    return f"from {low} to {s.high}" if s.high is not None else f"of at least {low}"


def no_axis(plan: Findings, name: str) -> str:
    """Why an axis of this name cannot be varied."""
    if plan.retake is None:
        return "this plan has fixed sizes, or was read from a file: make it with reattend.plan(..., dynamic=True)"
    there = ", ".join([*plan.axes, *(s.name for s in plan.symbols)])
    if not there:
        return f"all sizes of this plan are fixed, {name} among them: make it with dynamic=True (--dynamic)"
    return f"the size {name!r} is fixed or unknown: one of {there} may be varied"


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """`low`, doubled up to `high`; `high` itself is the last. Raises SweepError for what is no range of sizes."""
    if low < 1:
        raise SweepError(f"a sweep starts at 1 or above, not at {low}")
    if high < low:
        raise SweepError(f"a sweep goes up: {low} to {high} is empty")
    out = [low]
    while out[-1] * 2 < high:
        out.append(out[-1] * 2)
    return tuple(out if out[-1] == high else [*out, high])
