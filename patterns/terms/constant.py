"""The value of a term in float64 by numpy: what a row program yields on a row that is made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..expr import Expr, walk
from ..operators import OPERATORS

Values: TypeAlias = NDArray[np.float64 | np.int64 | np.bool_]
_FUNCTION: Mapping[str, Callable[..., Values]] = {o.name: o.in_numpy(np) for o in OPERATORS.values()}
REDUCE: Mapping[str, Callable[..., Values]] = {
    "add": np.sum,
    "max": np.max,
    "min": np.min,
    "mul": np.prod,
    "or": np.any,
    "and": np.all,
}


def number(root: Expr, loads: Mapping[str, object], known: Mapping[Expr, object] | None = None) -> Values:
    """The value of a term in float64: tensors by name, coordinates 0 unless `known` says otherwise."""
    memo: dict[Expr, Values] = {e: np.asarray(v) for e, v in (known or {}).items()}
    with np.errstate(all="ignore"):
        for e in walk(root):
            if e not in memo:
                memo[e] = _number(e, [memo[a] for a in e.args], loads)
    return memo[root]


def _number(e: Expr, args: list[Values], loads: Mapping[str, object]) -> Values:
    match e.op:
        case "const":
            return np.asarray(e.value, dtype=float if e.is_float else None)
        case "index":
            return np.asarray(0)
        case "symbol":
            return np.asarray(2)
        case "load":
            return np.asarray(loads.get(str(e.attr), 0.5 if e.is_float else 0))
        case "cast":
            return args[0].astype(float) if e.is_float else args[0]
        case "where":
            return np.where(args[0], args[1], args[2])
    return np.asarray(_FUNCTION[e.op](*args))
