"""An unrolled loop as one body: copies of a subgraph of which each hands values to the next.

    before   a0 = select(x, 2, 0); s1 = a0 · s0; a1 = select(x, 2, 1); s2 = a1 · s1; …; y = stack([s1, s2, …])
    after    StepLoop: n copies of (a = select(x, 2, t); s' = a · s), s0 handed in, s' handed on, every s' collected in y

Whether two copies are one is proved argument by argument: a node of the same copy, one of the copy before, one of outside
that is the same for all, or a number that grows by the same amount from copy to copy. Everything else is no loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.liveness import is_pure
from ..graph.node import FOLDED, arguments, op_name
from ..graph.torch_private import OpOverload, schema
from .period import Stretch, stretches

JOINS = frozenset(("stack", "cat", "concat", "concatenate"))
SCATTERS = frozenset(("select_scatter", "slice_scatter"))


@dataclass(frozen=True)
class SameCopy:
    """A value of the same copy."""

    place: int


@dataclass(frozen=True)
class CopyBefore:
    """A value of the copy before; the first copy has `initial` in its place."""

    place: int
    initial: fx.Node


@dataclass(frozen=True)
class Stepped:
    """A number that is `first` in the first copy and grows by `by`."""

    first: int
    by: int


@dataclass(frozen=True)
class Collected:
    """What the copies' values at `place` are put together to, in order: `node`, along its dimension `dim`.

    `width`: how many indices each copy gives; None where each is one index of a dimension of its own. `whole`: the place of
    the value that they are written into, where that is how it is done.
    """

    place: int
    node: fx.Node
    dim: int
    width: int | None
    whole: int | None = None


@dataclass(frozen=True)
class StepLoop:
    """`copies[t]` has the nodes of step t by place; the last may lack some, which nobody reads.

    `references[place]` has what each argument is, in the order in which a node holds them. `finals` are places whose last
    value is read outside.
    """

    copies: tuple[tuple[fx.Node | None, ...], ...]
    references: tuple[tuple[object, ...], ...]
    collected: tuple[Collected, ...]
    finals: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.copies)

    @property
    def carried(self) -> Mapping[int, fx.Node]:
        """Places whose values are handed on, but for what is only written into, with their first values."""
        whole = {c.whole for c in self.collected}
        found = (r for refs in self.references for r in refs if isinstance(r, CopyBefore))
        return {r.place: r.initial for r in found if r.place not in whole}

    @property
    def nodes(self) -> Iterator[fx.Node]:
        for copy in self.copies:
            yield from (n for n in copy if n is not None)
        yield from (c.node for c in self.collected if c.whole is None)


@dataclass(frozen=True)
class Unfolded:
    """Copies that hand values on, but are no loop here: `reason` says why, `node` where. `copies` have their nodes."""

    node: fx.Node
    reason: str
    copies: tuple[tuple[fx.Node | None, ...], ...]


def loops(graph: fx.Graph) -> tuple[list[StepLoop], list[Unfolded]]:
    """Every loop over steps of its inputs, in graph order, and what looked like one. Marks the nodes of both."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    numbers: dict[object, int] = {}
    labels = [numbers.setdefault(_label(n), len(numbers)) for n in nodes]
    taken = [False] * len(nodes)
    found: list[tuple[int, StepLoop]] = []
    failed: list[Unfolded] = []
    pure = [is_pure(n) for n in nodes]
    for s in stretches(labels):
        if any(taken[s.start : s.start + s.length]):
            continue
        out = _best(nodes, s) if all(pure[s.start : s.start + s.length]) else None
        if out is None:
            continue
        if isinstance(out, Unfolded):
            failed.append(out)
        else:
            found.append((s.start, out))
        for n in out.nodes if isinstance(out, StepLoop) else nodes[s.start : s.start + s.length]:
            n.meta[FOLDED] = True
        for i in range(s.start, min(s.start + s.length + s.period, len(nodes))):
            taken[i] = taken[i] or FOLDED in nodes[i].meta
    return [x for _, x in sorted(found, key=lambda f: f[0])], failed


def unmark(copies: Sequence[Sequence[fx.Node | None]]) -> None:
    """Let others read the nodes of some copies again."""
    for copy in copies:
        for n in copy:
            if n is not None:
                n.meta.pop(FOLDED, None)


def _label(n: fx.Node) -> object:
    """Equal for nodes that may be the same step of two copies: integers are left open."""
    value = n.meta.get("val")
    said = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)
    return (n.target, tuple(_kinds(n.args)), tuple((k, *_kinds((v,))) for k, v in n.kwargs.items()), str(said))


def _kinds(args: Sequence[Any]) -> Iterator[object]:
    for a in args:
        if isinstance(a, fx.Node):
            yield fx.Node
        elif isinstance(a, (list, tuple)):
            yield (list, *_kinds(a))
        elif isinstance(a, int) and not isinstance(a, bool):
            yield int
        else:
            yield (type(a), repr(a))


def leaves(n: fx.Node) -> Iterator[object]:
    """The arguments of a node one by one, in a fixed order."""
    yield from _flat(n.args)
    yield from _flat(tuple(n.kwargs.values()))


def by_name(n: fx.Node, row: Sequence[object]) -> dict[str, object]:
    """What the arguments of an operator that takes no lists are, by the names of its schema; defaults are left out."""
    assert isinstance(n.target, OpOverload)
    names = [a.name for a in schema(n.target).arguments]
    return dict(zip([*names[: len(n.args)], *n.kwargs], row, strict=True))


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _flat(v)
    else:
        yield value


# --- one stretch --------------------------------------------------------------------------------------------------


def _best(nodes: Sequence[fx.Node], s: Stretch) -> StepLoop | Unfolded | None:
    """The reading of a stretch that hands on the fewest values: where a body begins is not said by its copies alone.

    None where nothing is handed on, or nothing read step by step.
    """
    few = min(s.copies, _LOOKED_AT)
    tried = ((_read(nodes, s.start + o, s.period, few), o) for o in range(min(s.slack, s.period - 1) + 1))
    fit = [(len(handed), o) for rows, o in tried if rows is not None and (handed := _initial(rows))]
    if not fit:
        return None
    offset = min(fit)[1]
    rows = _read(nodes, s.start + offset, s.period, s.copies)
    if rows is None or not _initial(rows):
        return None
    start = s.start + offset
    made: list[tuple[fx.Node | None, ...]] = [
        tuple(nodes[i : i + s.period]) for i in range(start, start + s.period * s.copies, s.period)
    ]
    last = _partial(nodes, start + s.period * s.copies, rows, made[-1], s.copies)
    return _with_results([*made, last] if last is not None else made, rows)


# How many copies say where a body begins.
_LOOKED_AT = 4


def _read(nodes: Sequence[fx.Node], start: int, period: int, copies: int) -> tuple[tuple[object, ...], ...] | None:
    """What the arguments of each place are in whole copies from a node on; None where the copies are not one."""
    stretch = nodes[start : start + period * copies]
    at = {n: divmod(i, period) for i, n in enumerate(stretch)}
    rows: list[tuple[object, ...]] = []
    for place in range(period):
        row = _row([tuple(leaves(stretch[t * period + place])) for t in range(copies)], at)
        if row is None:
            return None
        rows.append(row)
    return tuple(rows)


def _initial(rows: Sequence[tuple[object, ...]]) -> dict[int, fx.Node]:
    """The first values of what is handed on, by place; empty where nothing is, or is read step by step."""
    flat = [r for row in rows for r in row]
    out: dict[int, fx.Node] = {}
    for r in flat:
        if isinstance(r, CopyBefore) and out.setdefault(r.place, r.initial) is not r.initial:
            return {}
    return out if any(isinstance(r, Stepped) for r in flat) else {}


def _row(copies: Sequence[tuple[object, ...]], at: Mapping[fx.Node, tuple[int, int]]) -> tuple[object, ...] | None:
    """What the arguments of one place are, or None where the copies differ."""
    if len({len(c) for c in copies}) != 1:
        return None
    out: list[object] = []
    for values in zip(*copies):
        r = _reference(values, at)
        if r is None:
            return None
        out.append(r)
    return tuple(out)


def _reference(values: Sequence[object], at: Mapping[fx.Node, tuple[int, int]]) -> object | None:
    """One argument over all copies; a tuple of one value for what is the same in all."""
    first, second = values[0], values[1]
    if isinstance(second, fx.Node) and second in at:
        copy, place = at[second]
        apart = 1 - copy
        if any(not isinstance(v, fx.Node) or at.get(v) != (t - apart, place) for t, v in enumerate(values) if t):
            return None
        if apart == 0:
            return SameCopy(place) if isinstance(first, fx.Node) and at.get(first) == (0, place) else None
        return CopyBefore(place, first) if apart == 1 and isinstance(first, fx.Node) and first not in at else None
    if isinstance(first, int) and isinstance(second, int) and not isinstance(first, bool) and first != second:
        by = second - first
        return Stepped(first, by) if all(v == first + t * by for t, v in enumerate(values)) else None
    same = all(v is first if isinstance(first, fx.Node) else type(v) is type(first) and v == first for v in values)
    return (first,) if same and not (isinstance(first, fx.Node) and first in at) else None


def _partial(
    nodes: Sequence[fx.Node], start: int, references: Sequence[tuple[object, ...]], before: Sequence[fx.Node | None],
    step: int,
) -> tuple[fx.Node | None, ...] | None:
    """The nodes of one more copy that lacks what nobody reads (the state behind the last step); None where there is none."""
    found: list[fx.Node | None] = []
    i = start
    for place, row in enumerate(references):
        n = nodes[i] if i < len(nodes) else None
        like = before[place]
        assert like is not None
        # by its label as well: a last piece that is cut off at the end of its tensor is shorter
        if n is None or _label(n) != _label(like) or list(leaves(n)) != _expected(row, found, before, step):
            found.append(None)
            continue
        found.append(n)
        i += 1
    made = [n for n in found if n is not None]
    # a copy of which only some inputs stand there is somebody else's
    steps = any(isinstance(r, Stepped) for n, row in zip(found, references) if n is not None for r in row)
    carries = any(isinstance(r, CopyBefore) for n, row in zip(found, references) if n is not None for r in row)
    return tuple(found) if made and steps and carries else None


def _expected(
    row: Sequence[object], copy: Sequence[fx.Node | None], before: Sequence[fx.Node | None], step: int
) -> list[object]:
    out: list[object] = []
    for r in row:
        match r:
            case SameCopy(place):
                out.append(copy[place])
            case CopyBefore(place, _):
                out.append(before[place])
            case Stepped(first, by):
                out.append(first + by * step)
            case (value,):
                out.append(value)
    return out


# --- what is read outside -----------------------------------------------------------------------------------------


def _with_results(
    copies: Sequence[tuple[fx.Node | None, ...]], references: tuple[tuple[object, ...], ...]
) -> StepLoop | Unfolded:
    inside = {n for copy in copies for n in copy if n is not None}
    collected: list[Collected] = []
    finals: list[int] = []
    for place in range(len(references)):
        column = [copy[place] for copy in copies]
        written = _written(place, column, references)
        if written is not None:
            collected.append(written)
            continue
        outside = {u for n in column if n is not None for u in n.users if u not in inside}
        for u in sorted(outside):
            joined = _joined(place, u, column)
            if joined is not None:
                collected.append(joined)
            elif column[-1] is None or any(u in n.users for n in column[:-1] if n is not None):
                return Unfolded(u, f"the value of one step is read by {op_name(u)}, outside of the steps", tuple(copies))
            elif place not in finals:
                finals.append(place)
    made = StepLoop(tuple(copies), references, tuple(collected), tuple(finals))
    if not made.carried:
        return Unfolded(column[0] or next(iter(inside)), "nothing but what is written is handed on", made.copies)
    return made


def _joined(place: int, user: fx.Node, column: Sequence[fx.Node | None]) -> Collected | None:
    """All values laid side by side in order."""
    if op_name(user) not in JOINS or not isinstance(user.args[0], (list, tuple)) or list(user.args[0]) != list(column):
        return None
    dim = int(arguments(user)["dim"]) % user.meta["val"].dim()  # type: ignore[call-overload]
    if op_name(user) == "stack":
        return Collected(place, user, dim, None)
    first = column[0]
    width = first.meta["val"].shape[dim] if first is not None else None
    return Collected(place, user, dim, width) if isinstance(width, int) else None


def _written(
    place: int, column: Sequence[fx.Node | None], references: Sequence[tuple[object, ...]]
) -> Collected | None:
    """Values written one by one, next to each other, into what nobody reads before the last is there.

        w' = select_scatter(w, value, dim, t)     from 0 to the end of the dimension
    """
    first, last = column[0], column[-1]
    if first is None or last is None or op_name(first) not in SCATTERS or not isinstance(first.target, OpOverload):
        return None
    row = references[place]
    if not isinstance(row[0], CopyBefore) or row[0].place != place or not isinstance(row[1], SameCopy):
        return None
    flat = [(p, i, r) for p, refs in enumerate(references) for i, r in enumerate(refs)]
    readers = [(p, i) for p, i, r in flat if isinstance(r, CopyBefore) and r.place == place]
    own = any(isinstance(r, SameCopy) and r.place == place for refs in references for r in refs)
    if own or readers != [(place, 0)]:
        return None
    members = set(column)
    if any(u not in members for n in column[:-1] if n is not None for u in n.users):
        return None
    given = arguments(first)
    shape = first.meta["val"].shape
    dim = int(given["dim"]) % len(shape)  # type: ignore[call-overload]
    by = _width(first, references[place])
    if by is None or by * len(column) != shape[dim]:
        return None
    return Collected(row[1].place, last, dim, None if op_name(first) == "select_scatter" else by, place)


def _width(n: fx.Node, row: Sequence[object]) -> int | None:
    """How many indices each copy writes, where they begin at 0 and lie next to each other."""
    given = by_name(n, row)
    if isinstance(given.get("dim"), Stepped) or arguments(n).get("step", 1) != 1:
        return None
    if op_name(n) == "select_scatter":
        return 1 if given["index"] == Stepped(0, 1) else None
    end = given.get("end")
    if not isinstance(end, Stepped) or end.first != end.by or given.get("start") != Stepped(0, end.by):
        return None
    return end.by
