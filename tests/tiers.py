"""Which parameters of a grid the fast tier tries: one of each kind, while the slow tier tries them all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
