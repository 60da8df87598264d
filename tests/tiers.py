"""Which parameters of a grid the fast tier tries: one of each kind, while the slow tier tries them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import pytest
from hypothesis import settings


def examples(n: int) -> settings:
    """So many draws where the slow tier runs as well, a fifth of them, and at least 20, in the fast one."""
    return settings(max_examples=n if settings.get_current_profile_name() != "fast" else max(n // 5, min(n, 20)))


def few(values: Iterable[Any], *kept: Any) -> list[Any]:
    """The parameters of a grid, of which all but the kept ones are slow. A value may be a tuple of several arguments."""
    values, missing = list(values), list(kept)
    params = []
    for v in values:
        fast = v in missing
        if fast:
            missing.remove(v)
        params.append(pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=() if fast else pytest.mark.slow))
    assert not missing, f"not in the grid: {missing}"
    return params


def one_in(n: int, values: Iterable[Any]) -> list[Any]:
    """The parameters of a grid whose points are of one kind: every n-th is tried in the fast tier."""
    values = list(values)
    return few(values, *values[::n])


def pairs(n: int, first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """A grid of two arguments whose points are of one kind: every n-th diagonal is fast, so that each value of both is tried."""
    rows: Sequence[Any] = list(second)
    return [
        pytest.param(a, b, marks=() if (i + j) % n == 0 else pytest.mark.slow)
        for i, a in enumerate(first)
        for j, b in enumerate(rows)
    ]


def thin_out(items: Sequence[pytest.Item]) -> None:
    """Marked `thin(n)`: of the points of a function's grid that are fast, every n-th and the last stay so.

    Mutants are tried on all of them.
    """
    if settings.get_current_profile_name() == "mutation":
        return
    for _, tests in groupby(items, lambda i: i.nodeid.partition("[")[0]):
        points = [i for i in tests if i.get_closest_marker("slow") is None]
        mark = points[0].get_closest_marker("thin") if points else None
        if mark is not None:
            for i, item in enumerate(points[:-1]):
                if i % mark.args[0]:
                    item.add_marker(pytest.mark.slow)
