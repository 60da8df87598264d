"""Chunks that have tokens in common: products of chunks are one product, and a sum over a chunk is one over a row's window.

    before   QK[c,x,y] = Σ_e Q[c·W + x,e]·K[c·W + y,e]                  chunks of 2·W tokens, W of them the next one's
             S[i,j] = where(…, QK[i // W,i % W,…], QK[i // W − 1,…])    each row's keys, put together of chunks
             O[c,w,f] = Σ_m where(0 ≤ m − w < n, A[c·W + w,m − w], 0)·V[c·W + m,f]
    after    QK[i,k] = Σ_e Q[i,e]·K[k,e];     S[i,j] = QK[i,i + j − W];     O[i,f] = Σ_j A[i,j]·V[i + j,f]

Where views, paddings and edits put a row's keys is looked up at every coordinate (`places`). What is left is a window
that moves with its row (`slide`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from .. import expr as ex
from ..attention import ranks
from ..cascade import Access, Cascade, Einsum, Rank, Size, size_term
from ..expr import Expr
from ..terms.conditions import constant
from ..terms.divisions import collected
from .places import PlaceGrid, settled
from .slide import fresh


def overlapped(c: Cascade, key: str) -> tuple[Cascade, str]:
    """The cascade over rows and their windows, and the rank of these; itself, with `key`, where chunks are no such."""
    whole = c
    for e in c.einsums:
        whole = _whole(whole, e)
    extent = {r.name: r.size for r in whole.ranks}
    einsums = [replace(e, body=settled(e.body, extent)) for e in whole.einsums]
    whole = replace(whole, einsums=tuple(einsums))
    found = _straight(whole, key)
    if found is None:
        return c, key
    straight, window = found
    return _summed(ranks.unify(ranks.split(straight)), window), window


def _summed(c: Cascade, window: str) -> Cascade:
    """Rows are reduced over the window's own rank, by whatever name they were read."""
    at = {e.out.tensor: e.out.index.index(ex.index(window)) for e in c.einsums if ex.index(window) in e.out.index}
    einsums = []
    for e in c.einsums:
        own = {x.args[at[str(x.attr)]] for x in e.reads if str(x.attr) in at}
        if e.over != (window,) and len(own) == len(e.over) == 1 and own == {ex.index(*e.over)}:
            e = replace(e, body=ex.substitute(e.body, {ex.index(*e.over): ex.index(window)}), over=(window,))
        einsums.append(e)
    used = {r for e in einsums for r in (*e.ranks, *e.over)}
    return replace(c, ranks=tuple(r for r in c.ranks if r.name in used), einsums=tuple(einsums))


# --- keys ---------------------------------------------------------------------------------------------------------


def trimmed(c: Cascade, before: Cascade, window: str) -> Cascade | None:
    """Keys before the first token and behind the last, which no row weighs, are none; None where a row may weigh them.

        S[i,u] = where(…, −∞, QK[i,u − W]),  V[u]        →        S[i,m] = where(…, −∞, QK[i,m]),  V[m + W]

    `before` is the cascade over windows, in which a key is row + `window`.
    """
    (key,) = c.producers[c.outputs[0]][-1].over
    u, extent = ex.index(key), {r.name: r.size for r in c.ranks}
    at = {(x, d) for e in c.einsums for x in e.reads for d, i in enumerate(x.args) if i.ranks == {key} and i is not u}
    if not at:
        return c
    shifts = {collected(u - x.args[d], extent) for x, d in at}
    ends = {c.tensor[str(x.attr)].shape[d] for x, d in at}
    size, n, shift = extent[key], ends.pop(), shifts.pop()
    if ends or shifts or not shift.is_const or not isinstance(n, int) or not isinstance(size, int):
        return None
    start = int(shift.value)
    if not 0 < start <= size - n or not _unweighed(c, key, _hidden(before, window, start, n)):
        return None

    def term(e: Expr) -> Expr:
        def rule(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
            own = x.op == "load" and str(x.attr) in c.producers
            return ex.load(str(x.attr), tuple(u if i is u + shift else i for i in args), x.dtype) if own else None

        return ex.rebuild(ex.substitute(e, {u: u + shift}), rule)

    made = {e.out.tensor: e.out.index for e in c.einsums}
    return replace(
        c,
        ranks=tuple(replace(r, size=n) if r.name == key else r for r in c.ranks),
        tensors=tuple(
            replace(t, shape=tuple(n if i is u else s for i, s in zip(made[t.name], t.shape))) if t.name in made else t
            for t in c.tensors
        ),
        einsums=tuple(replace(e, body=term(e.body)) for e in c.einsums),
    )


def _unweighed(c: Cascade, key: str, hidden: Collection[str]) -> bool:
    """Does a key at which these scores are −∞ add nothing to any row?"""
    return all(
        _is_low(e.body, hidden) if e.op == "max" else e.op == "add" and _is_nothing(e.body, hidden)
        for e in c.einsums if key in e.over
    )


def _hidden(c: Cascade, window: str, start: int, n: int) -> frozenset[str]:
    """Scores that are −∞ at all keys outside of `start … start + n − 1`."""
    j, extent = ex.index(window), {r.name: r.size for r in c.ranks}
    keys = {i for x in c.producers[c.outputs[0]][-1].reads for i in x.args if i.op == "add" and window in i.ranks}
    if len(keys) != 1:
        return frozenset()
    (key,) = keys
    outside = (key < start) | (key >= start + n)
    scores = [e for e in c.einsums if e.op is None and j in e.out.index]
    return frozenset(e.out.tensor for e in scores if _is_low(settled(e.body, extent, outside), ()))


def _is_low(e: Expr, hidden: Collection[str]) -> bool:
    """Is a term −∞, or NaN where something else in it is not finite?"""
    match e.op:
        case "const":
            return e.attr == -math.inf
        case "load":
            return str(e.attr) in hidden
        case "cast":
            return _is_low(e.args[0], hidden)
        case "sub":
            return _is_low(e.args[0], hidden)
        case "add":
            return any(_is_low(x, hidden) for x in e.args)
        case "mul" | "div":
            number = constant(e.args[1])
            return _is_low(e.args[0], hidden) and number is not None and number > 0
        case "where":
            return _is_low(e.args[1], hidden) and _is_low(e.args[2], hidden)
    return False


def _is_nothing(e: Expr, hidden: Collection[str]) -> bool:
    """Is a term 0 where what is hidden is −∞?"""
    match e.op:
        case "const":
            return e.attr == 0.0
        case "exp" | "exp2":
            return _is_low(e.args[0], hidden)
        case "cast" | "div":
            return _is_nothing(e.args[0], hidden)
        case "mul":
            return any(_is_nothing(x, hidden) for x in e.args)
        case "where":
            return _is_nothing(e.args[1], hidden) and _is_nothing(e.args[2], hidden)
    return False


# --- products -----------------------------------------------------------------------------------------------------


def _whole(c: Cascade, e: Einsum) -> Cascade:
    """A product of chunks, over what the chunks are cut from."""
    pair = _chunked(c, e)
    if pair is None:
        return c
    at = [str(i.attr) for i in e.out.index]
    chunk = next(iter(frozenset.intersection(*(t.ranks for t in pair))))
    names = {t: fresh(stem, c) for t, stem in zip(pair, ("i", "k"))}
    sizes = {t: _reach(c, t) for t in pair}
    # each of the two takes the place of its coordinate in the chunk, and the chunk has none any more
    of = {next(iter(t.ranks - {chunk})): t for t in pair}
    index = tuple(ex.index(names[of[r]]) if r in of else ex.index(r) for r in at if r != chunk)
    shape = tuple(sizes[of[r]] if r in of else c.rank[r].size for r in at if r != chunk)
    body = ex.substitute(e.body, {t: ex.index(n) for t, n in names.items()})
    made = replace(e, out=Access(e.out.tensor, index), body=body)

    def read(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if x.op != "load" or str(x.attr) != e.out.tensor:
            return None
        table = {ex.index(r): i for r, i in zip(at, args)}
        return ex.load(e.out.tensor, tuple(ex.substitute(of.get(r, ex.index(r)), table) for r in at if r != chunk), x.dtype)

    einsums = tuple(made if x is e else replace(x, body=ex.rebuild(x.body, read)) for x in c.einsums)
    used = {r for x in einsums for r in (*x.ranks, *x.over)}
    added = (*c.ranks, *(Rank(names[t], sizes[t]) for t in pair))
    tensors = tuple(replace(t, shape=shape) if t.name == e.out.tensor else t for t in c.tensors)
    return replace(c, ranks=tuple(r for r in added if r.name in used), tensors=tensors, einsums=einsums)


def _chunked(c: Cascade, e: Einsum) -> tuple[Expr, Expr] | None:
    """The two coordinates `c·W + x` and `c·W + y` that are all a product reads of its chunk and of places in it."""
    own = {str(i.attr) for i in e.out.index}
    found = {i for x in e.reads for i in x.args if i.op == "add" and len(i.ranks) == 2 and i.ranks <= own}
    if e.op != "add" or not e.out.plain or len(found) != 2 or len(frozenset().union(*(i.ranks for i in found))) != 3:
        return None
    first, second = sorted(found, key=str)
    left = ex.substitute(e.body, {first: ex.const(0), second: ex.const(0)})
    whole = all(isinstance(c.rank[r].size, int) for i in found for r in i.ranks)
    return (first, second) if whole and not left.ranks & (first.ranks | second.ranks) else None


def _reach(c: Cascade, i: Expr) -> int:
    """One more than the largest value of a coordinate."""
    values = PlaceGrid({r: int(c.rank[r].size) for r in sorted(i.ranks)}).values(i)
    assert values is not None
    return int(values.max()) + 1


# --- sums ---------------------------------------------------------------------------------------------------------


def _straight(c: Cascade, key: str) -> tuple[Cascade, str] | None:
    """The sum over a chunk's tokens, as one over the window of a row: j = m − w, where all others are weighed by 0."""
    last = c.producers[c.outputs[0]][-1]
    if last.over != (key,) or last.body.op != "mul" or not isinstance(c.rank[key].size, int):
        return None
    weight, value = last.body.args
    at = [str(i.attr) for i in last.out.index]
    if weight.op != "where" or not (weight.args[2].is_const and weight.args[2].value == 0.0):
        return None
    distances = {i for x in ex.loads(weight) for i in x.args if key in i.ranks}
    if len(distances) != 1:
        return None
    (distance,) = distances
    rows = distance.ranks - {key}
    if len(rows) != 1 or distance is not ex.index(key) - ex.index(*rows):
        return None
    (row,) = rows
    size = c.rank[row].size
    many = {c.tensor[str(x.attr)].shape[d] for x in ex.loads(weight) for d, i in enumerate(x.args) if i is distance}
    if len(many) != 1 or not isinstance(n := many.pop(), int) or not isinstance(size, int):
        return None
    grid = PlaceGrid({row: size, key: int(c.rank[key].size)})
    kept, away = grid.values(weight.args[0]), grid.values(distance)
    if kept is None or away is None or np.any(kept != ((away >= 0) & (away < n))):
        return None
    chunk = at[at.index(row) - 1] if at.index(row) else ""
    if not chunk or size - 1 + n > int(c.rank[key].size):
        return None
    window = fresh("j", c)
    moved = {ex.index(key): ex.index(row) + ex.index(window), distance: ex.index(window)}
    extent = {r.name: r.size for r in c.ranks} | {window: n}

    def near(x: Expr) -> Expr:
        out = ex.substitute(x, moved)
        whole = ex.index(chunk) * size_term(size) + ex.index(row)

        def rule(y: Expr, args: tuple[Expr, ...]) -> Expr | None:
            return ex.load(str(y.attr), tuple(_around(i, whole, extent) for i in args), y.dtype) if y.op == "load" else None

        return ex.rebuild(out, rule)

    made = replace(last, body=near(weight.args[1]) * near(value), over=(window,))
    einsums = tuple(made if e is last else e for e in c.einsums)
    used = {r for x in einsums for r in (*x.ranks, *x.over)}
    out = replace(c, ranks=tuple(r for r in (*c.ranks, Rank(window, n)) if r.name in used), einsums=einsums)
    fused = ranks.fuse(out, chunk, row)
    return (fused, window) if fused is not out else None


def _around(i: Expr, whole: Expr, extent: Mapping[str, Size]) -> Expr:
    """A coordinate with the row's own, `c·W + w`, as one addend."""
    if not whole.ranks <= i.ranks:
        return i
    rest = collected(i - whole, extent)
    return whole if rest.is_const and rest.value == 0 else whole + rest
