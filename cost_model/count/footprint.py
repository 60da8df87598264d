"""What lies between two passes, and what it costs: buffer it, spill it, or compute it again.

    revisited   a tensor that one pass makes (or reads, if it is an input) and a later pass reads
    buffer      w · M · Pt bytes on chip, for Pt query rows held at a time
    spill       w · M · P · (writes + reads) bytes moved
    recompute   inputs over the rank read again, w · ⌈P/Pt⌉ · M · E bytes, and the operations, once for each later pass
No choice is made here for a device; `moved` adds up the bytes of any set of choices, `cheapest` picks by bytes alone.
Source: Nayak et al., "FuseMax" (MICRO 2024), section III; its artifact's traffic is reproduced exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...patterns.cascade import Cascade, Einsum, Size
from ...patterns.passes.rewrites import Family
from ..operations import WIDTH, Sizes, ceiling, is_view, operations, product
from .passes import levels
from .work import sources

BUFFER, SPILL, RECOMPUTE, REREAD = "buffer", "spill", "recompute", "read again"


@dataclass(frozen=True)
class Revisited:
    """A tensor between passes: the pass that makes it (or first reads it), the later passes that read it."""

    tensor: str
    made: int
    read: tuple[int, ...]
    is_input: bool = False


@dataclass(frozen=True)
class Choice:
    """One way to bring a tensor to its later passes. `held_bytes` on chip; the rest for the whole cascade."""

    tensor: str
    how: str
    held_bytes: Size = 0
    moved_bytes: Size = 0
    flops: Size = 0
    exps: Size = 0


def revisited(c: Cascade, family: Family) -> tuple[Revisited, ...]:
    """The tensors that more than one pass over the family needs, in the order in which they are made.

    Raises KeyError for a rank that the cascade lacks.
    """
    level, outer = levels(c, family), family[0]
    made: dict[str, int] = {}
    read: dict[str, set[int]] = {}
    source = sources(c)
    for i, e in enumerate(c.einsums):
        if i not in level or is_view(e):
            continue
        if any(outer in x.ranks for x in e.out.index):
            made.setdefault(e.out.tensor, level[i])
        for x in e.reads:
            if any(outer in a.ranks for a in x.args):
                read.setdefault(source.get(str(x.attr), str(x.attr)), set()).add(level[i])
    inputs = {t.name for t in c.inputs}
    out = []
    for name, passes in read.items():
        first = min(passes) if name in inputs else made.get(name, min(passes))
        later = tuple(sorted(p for p in passes if p > first))
        if later:
            out.append(Revisited(name, first, later, name in inputs))
    return tuple(sorted(out, key=lambda r: (r.made, not r.is_input)))


@dataclass(frozen=True)
class Setting:
    """Where the choices stand: how many query rows are held at a time, and sizes; `width` overrides bytes an element."""

    cascade: Cascade
    family: Family
    query: str
    rows: Size
    sizes: Sizes
    width: int | None = None

    @property
    def blocks(self) -> Size:
        """Times that what lacks the query is read: once for each block of rows."""
        return ceiling(self.sizes.rank[self.query], self.rows)

    def bytes(self, name: str) -> Size:
        w = self.width or WIDTH[self.cascade.tensor[name].dtype]
        return w * product(self.sizes.shape[name])

    def has(self, name: str, rank: str) -> bool:
        """Is a tensor indexed by a rank wherever it is read or written?"""
        at = [e.out.index for e in self.cascade.einsums if e.out.tensor == name]
        at += [x.args for e in self.cascade.einsums for x in e.reads if str(x.attr) == name]
        return any(rank in i.ranks for access in at for i in access)


def setting(
    c: Cascade, family: Family, query: str, rows: Size, sizes: Mapping[str, int] | None = None, width: int | None = None
) -> Setting:
    """The setting of `choices` and `moved`. Raises ValueError for a query rank that the cascade lacks."""
    if query not in c.rank:
        raise ValueError(f"cascade {c.name!r} has no rank {query}; one of {', '.join(c.rank)}")
    return Setting(c, family, query, rows, Sizes(c, sizes), width)


def choices(g: Setting) -> tuple[Choice, ...]:
    """Every way to bring each revisited tensor to its later passes, with its bytes and operations."""
    out: list[Choice] = []
    for r in revisited(g.cascade, g.family):
        out.append(Choice(r.tensor, BUFFER, held_bytes=_held(g, r.tensor)))
        n = len(r.read)
        whole = g.bytes(r.tensor)
        if r.is_input:
            again = whole * (1 if g.has(r.tensor, g.query) else g.blocks)
            out.append(Choice(r.tensor, REREAD, moved_bytes=again * n))
            continue
        out.append(Choice(r.tensor, SPILL, moved_bytes=whole * (1 + n)))
        chain = _chain(g.cascade, r.tensor, g.family)
        work = operations(chain, g.sizes.rank)
        names = {str(x.attr) for e in chain for x in e.reads} & {t.name for t in g.cascade.inputs}
        keyed = [t for t in sorted(names) if any(g.has(t, f) for f in g.family)]
        again = sum((g.bytes(t) * (1 if g.has(t, g.query) else g.blocks) for t in keyed), 0)
        out.append(
            Choice(r.tensor, RECOMPUTE, moved_bytes=again * n, flops=work.flops * n, exps=work.exps * n)
        )
    return tuple(out)


def _held(g: Setting, name: str) -> Size:
    """Bytes of the part of a tensor that one block of rows needs: whole fibers of the family, one batch entry."""
    c = g.cascade
    batch = {str(i.attr) for o in c.outputs for e in c.producers[o] for i in e.out.index if i.op == "index"}
    accesses = [x.args for e in c.einsums for x in e.reads if str(x.attr) == name]
    shape = g.sizes.shape[name]
    out: Size = g.width or WIDTH[c.tensor[name].dtype]
    for d, n in enumerate(shape):
        ranks = frozenset().union(*(a[d].ranks for a in accesses))
        if g.query in ranks:
            out = out * g.rows
        elif ranks & set(g.family) or not ranks & batch:
            out = out * n
    return out


def _chain(c: Cascade, name: str, family: Family) -> list[Einsum]:
    """The Einsums that make a tensor again from inputs and from scalars of the row, which stay on chip."""
    todo, seen = [name], dict[int, Einsum]()
    while todo:
        for e in c.producers.get(todo.pop(), ()):
            if id(e) in seen or not any(f in i.ranks for f in family for i in e.out.index):
                continue
            seen[id(e)] = e
            todo += [str(x.attr) for x in e.reads]
    return list(seen.values())


def moved(g: Setting, how: Mapping[str, str] | None = None) -> Size:
    """Bytes moved under a choice for every revisited tensor (`how` names those that are not buffered).

    Inputs come once, or once a block of rows if they lack the query; outputs leave once. Raises KeyError for a choice
    that a tensor does not have.
    """
    table = {(x.tensor, x.how): x for x in choices(g)}
    out: Size = sum((g.bytes(o) for o in g.cascade.outputs), 0)
    for t in g.cascade.inputs:
        out = out + g.bytes(t.name) * (1 if g.has(t.name, g.query) else g.blocks)
    for name, way in (how or {}).items():
        if (name, way) not in table:
            known = ", ".join(sorted(f"{n}: {w}" for n, w in table)) or "none, because no tensor is revisited"
            raise KeyError(f"{name} cannot be brought to its later passes by {way!r}; the choices are {known}")
        out = out + table[name, way].moved_bytes
    return out


def cheapest(g: Setting, room_bytes: int) -> dict[str, str]:
    """For each revisited tensor: buffered while there is room, else the way that moves the fewest bytes.

    Sizes must be bound. The tensors that would cost most to move are buffered first.
    """
    table: dict[str, dict[str, Choice]] = {}
    for x in choices(g):
        table.setdefault(x.tensor, {})[x.how] = x
    out: dict[str, str] = {}

    def dear(name: str) -> int:
        return min(int(x.moved_bytes) for x in table[name].values() if x.how != BUFFER)

    for name in sorted(table, key=dear, reverse=True):
        held = int(table[name][BUFFER].held_bytes)
        if held <= room_bytes:
            room_bytes -= held
            out[name] = BUFFER
        else:
            out[name] = min((w for w in table[name] if w != BUFFER), key=lambda w: int(table[name][w].moved_bytes))
    return out
