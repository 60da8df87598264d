"""Terms decided at every coordinate: where a term reads a tensor at several places, those that count may be one place.

    before   where(i // 4 = 0, where(j < 4, T[i,(i % 4 · 9 + j + 5) // 8], T[i,i % 4 + j]), T[…])
    after    T[i,i % 4 + j]                         where each choice that counts reads this, at all coordinates

A choice counts where its conditions may hold: what depends on data may hold anywhere. Nothing is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import expr as ex
from ..cascade import Size
from ..expr import Expr
from ..terms.divisions import DIVISIONS, Linear

Array: TypeAlias = NDArray[Any]

# Coordinates that are looked at for one term, some seconds; at once; and from which a place is read off.
MOST, AT_ONCE, SAMPLES = 1 << 24, 1 << 18, 256
_ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "mod": np.remainder,
    "min": np.minimum, "max": np.maximum, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}


class PlaceGrid:
    """Integer terms over ranks of known sizes, at all of their coordinates, or at those of a run of the first rank."""

    def __init__(self, sizes: Mapping[str, int], run: range | None = None) -> None:
        self.at = {r: range(s) if d or run is None else run for d, (r, s) in enumerate(sizes.items())}
        self.shape = tuple(map(len, self.at.values()))
        self._memo: dict[Expr, Array | None] = {}

    def values(self, e: Expr) -> Array | None:
        """The value at each coordinate, broadcast; None for what depends on data or on other ranks."""
        for x in ex.walk(e):
            if x not in self._memo:
                self._memo[x] = self._value(x, [self._memo[a] for a in x.args])
        return self._memo[e]

    def _value(self, e: Expr, args: list[Array | None]) -> Array | None:
        if e.op == "const":
            return np.asarray(e.value)
        if e.op == "index" and str(e.attr) in self.at:
            axis = list(self.at).index(str(e.attr))
            return np.asarray(self.at[str(e.attr)]).reshape([-1 if d == axis else 1 for d in range(len(self.at))])
        given = [a for a in args if a is not None]
        if len(given) < len(args) or not args:
            return None
        if e.op == "where" and e.args[0].dtype == "b1":
            return np.where(given[0], given[1], given[2])
        if e.op == "cast" and "b1" in (e.dtype, e.args[0].dtype):
            return np.asarray(given[0] != 0) if e.dtype == "b1" else given[0].astype(np.int64)
        if any(a.dtype not in ("i64", "b1") for a in e.args) or (e.op in DIVISIONS and not np.all(given[1] > 0)):
            return None
        if e.op in _ARITHMETIC:
            return np.asarray(_ARITHMETIC[e.op](*given))
        if e.dtype == "b1" and e.op in ("and", "or", "not"):
            return np.asarray({"and": np.logical_and, "or": np.logical_or, "not": np.logical_not}[e.op](*given))
        return None

    def may(self, e: Expr, value: bool) -> Array:
        """Where a predicate may have this value."""
        known = self.values(e)
        if known is not None:
            return np.asarray(known != 0) if value else np.asarray(known == 0)
        if e.op == "not" and e.dtype == "b1":
            return self.may(e.args[0], not value)
        if e.op in ("and", "or") and e.dtype == "b1":
            both = [self.may(a, value) for a in e.args]
            return np.asarray(np.logical_and(*both) if (e.op == "and") is value else np.logical_or(*both))
        return np.asarray(True)

    def counting(self, root: Expr, where: Expr) -> dict[Expr, Array]:
        """Where each sub-term counts in the whole, of the coordinates at which a predicate may hold."""
        found: dict[Expr, Array] = {root: self.may(where, True)}
        for e in reversed(tuple(ex.walk(root))):
            for k, a in enumerate(e.args):
                own = found[e] & self.may(e.args[0], k == 1) if e.op == "where" and k > 0 else found[e]
                found[a] = found[a] | own if a in found else own
        return found

    def samples(self, e: Expr, where: Array) -> Array:
        """Coordinates, and the value there, of some places: a row each."""
        at = np.nonzero(np.broadcast_to(where, self.shape))
        values = self.values(e)
        some = np.unique(np.linspace(0, len(at[0]) - 1, SAMPLES).astype(np.int64)) if len(at[0]) else np.arange(0)
        if values is None:
            return np.zeros((0, len(self.at) + 1), np.int64)
        starts = [r.start for r in self.at.values()]
        own = np.broadcast_to(values, self.shape)[tuple(x[some] for x in at)]
        return np.stack([*(x[some] + start for x, start in zip(at, starts)), own], axis=1)


def blocks(sizes: Mapping[str, int]) -> Iterator[PlaceGrid]:
    """All coordinates, so many at once."""
    first, *rest = sizes.values() or (1,)
    step = max(1, AT_ONCE // math.prod(rest))
    for start in range(0, first, step):
        yield PlaceGrid(sizes, range(start, min(first, start + step)))


def known_sizes(ranks: Collection[str], extent: Mapping[str, Size]) -> dict[str, int] | None:
    """The sizes of ranks, the longest first; None where these are open, or their coordinates too many."""
    known = {r: s for r, s in extent.items() if r in ranks and isinstance(s, int)}
    if len(known) < len(ranks) or math.prod(known.values()) > MOST:
        return None
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def settled(e: Expr, extent: Mapping[str, Size], where: Expr = ex.TRUE) -> Expr:
    """The term with one place for each tensor that it reads at several, where these agree; and without what never counts
    at the coordinates of a predicate."""
    reads, choices = _reads(e), [x for x in ex.walk(e) if x.op == "where"]
    # coordinates that may be one, each with the terms that read it
    alike: dict[tuple[str, int], dict[Expr, set[Expr]]] = {}
    for name, of in reads.items():
        for d in _untold(of):
            for x in of:
                alike.setdefault((name, d), {}).setdefault(x.args[d], set()).add(x)
    compared = [x for x in ex.walk(e) if x.op in ex.COMPARISONS and all(a.dtype == "i64" for a in x.args)]
    for x in compared:
        for a in x.args:
            if _divides_sums(a):
                alike.setdefault(("", 0), {}).setdefault(a, set()).add(x)
    read = (i for of in alike.values() for i in of)
    ranks = {r for x in (where, *(x.args[0] for x in choices), *read) for r in x.ranks}
    sizes = known_sizes(ranks, extent)
    if sizes is None or not (choices or alike):
        return e
    found = _SeenPlaces(e, sizes, where, choices, alike)
    at = {key: found.one(key) if key[0] else found.each(key) for key in alike}
    apart = {name for (name, _), table in at.items() if name and table is None}
    one = (of for name, of in reads.items() if name not in apart and (name, *_untold(of)[:1]) in at)
    moved = {x: _moved(x, at) for of in one for x in of}
    of_comparisons = at.get(("", 0)) or {}

    def rule(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
        if x in moved:
            return moved[x]
        if x.op in ex.COMPARISONS and any(a in of_comparisons for a in x.args):
            told = tuple(of_comparisons.get(a, new) for a, new in zip(x.args, args))
            return ex.make(x.op, told, None, x.dtype)
        seen = {v for v in (True, False) if (x, v) in found.may}
        if x.op == "where" and len(seen) == 1:
            return ex.cast(args[1] if True in seen else args[2], x.dtype)
        return None

    return ex.rebuild(e, rule)


class _SeenPlaces:
    """What is seen of a term at all coordinates: which choices it takes, and what its coordinates are where they count."""

    def __init__(
        self, e: Expr, sizes: Mapping[str, int], where: Expr, choices: list[Expr],
        alike: Mapping[tuple[str, int], Mapping[Expr, set[Expr]]],
    ) -> None:
        self.e, self.sizes, self.where, self.alike = e, sizes, where, alike
        self.may: set[tuple[Expr, bool]] = set()
        self.some: dict[tuple[tuple[str, int], Expr], list[Array]] = {}
        self.many: dict[Expr, int] = {}
        for grid in blocks(sizes):
            counts = grid.counting(e, where)
            for x in choices:
                self.may |= {(x, v) for v in (True, False) if np.any(counts[x] & grid.may(x.args[0], v))}
            for key, of in alike.items():
                for i, readers in of.items():
                    here = _any(counts, readers)
                    if np.any(here):
                        self.many[i] = self.many.get(i, 0) + int(np.count_nonzero(np.broadcast_to(here, grid.shape)))
                        self.some.setdefault((key, i), []).append(grid.samples(i, here))

    def forms(self, key: tuple[str, int]) -> list[Expr]:
        """Sums of ranks that coordinates may be, those first that are read at most places."""
        alive = sorted((i for i in self.alike[key] if (key, i) in self.some), key=lambda i: -self.many[i])
        read = [_linear(list(self.sizes), np.concatenate(self.some[key, i])) for i in alive]
        return list(dict.fromkeys(f for f in read if f is not None))

    def equal(self, key: tuple[str, int], pairs: Collection[tuple[Expr, Expr]]) -> set[tuple[Expr, Expr]]:
        """The pairs of a coordinate and a form that are equal wherever the coordinate is read."""
        left = set(pairs)
        for grid in blocks(self.sizes):
            counts = grid.counting(self.e, self.where)
            left = {(i, f) for i, f in left if _equal(grid, i, f, _any(counts, self.alike[key][i]))}
        return left

    def one(self, key: tuple[str, int]) -> dict[Expr, Expr] | None:
        """One form for all that count; None where there is none."""
        forms, alive = self.forms(key), [i for i in self.alike[key] if (key, i) in self.some]
        held = self.equal(key, [(i, f) for i in alive for f in forms])
        form = next((f for f in forms if all((i, f) in held for i in alive)), None)
        return dict.fromkeys(self.alike[key], form) if form is not None else None

    def each(self, key: tuple[str, int]) -> dict[Expr, Expr]:
        """For each coordinate the first form that it is equal to; those that never count are any."""
        forms = self.forms(key)
        held = self.equal(key, [(i, f) for i in self.alike[key] for f in forms])
        own = {i: next((f for f in forms if (i, f) in held), None) for i in self.alike[key]}
        return {i: f for i, f in own.items() if f is not None}


def _any(counts: Mapping[Expr, Array], readers: Collection[Expr]) -> Array:
    out = np.asarray(False)
    for x in readers:
        out = out | counts[x]
    return out


def _moved(x: Expr, at: Mapping[tuple[str, int], Mapping[Expr, Expr] | None]) -> Expr:
    places = (table[i] if (table := at.get((str(x.attr), d))) else i for d, i in enumerate(x.args))
    return ex.load(str(x.attr), tuple(places), x.dtype)


def _reads(e: Expr) -> dict[str, list[Expr]]:
    out: dict[str, list[Expr]] = {}
    for x in ex.loads(e):
        out.setdefault(str(x.attr), []).append(x)
    return out


def _untold(reads: list[Expr]) -> list[int]:
    """Dimensions whose coordinates differ among those who read a tensor, or are divisions of sums."""
    told = [len(set(places)) == 1 and not _divides_sums(places[0]) for places in zip(*(x.args for x in reads))]
    return [d for d, same in enumerate(told) if not same]


def _divides_sums(i: Expr) -> bool:
    return any(x.op in DIVISIONS and x.args[0].op != "index" for x in ex.walk(i))


def _linear(ranks: list[str], samples: Array) -> Expr | None:
    """Σ coefficient · rank + constant that has these values; samples are coordinates and a value, a row each."""
    if not len(samples):
        return None
    table = np.append(samples[:, :-1], np.ones((len(samples), 1), np.int64), axis=1)
    found = np.rint(np.linalg.lstsq(table.astype(np.float64), samples[:, -1].astype(np.float64), rcond=None)[0])
    whole = found.astype(np.int64)
    if not np.array_equal(table @ whole, samples[:, -1]):
        return None
    return Linear(tuple((ex.index(r), int(c)) for r, c in zip(ranks, whole) if c), int(whole[-1])).term()


def _equal(grid: PlaceGrid, a: Expr, b: Expr, where: Array) -> bool:
    x, y = grid.values(a), grid.values(b)
    return x is not None and y is not None and not np.any(where & (x != y))
