"""The value of a term in float64 by numpy: what a row program yields on a row that is made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..expr import Expr, walk

_NUMPY: Mapping[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "floor": np.floor, "ceil": np.ceil, "round": np.round, "trunc": np.trunc,
    "sign": np.sign, "isnan": np.isnan, "isinf": np.isinf, "not": np.logical_not, "exp": np.exp, "exp2": np.exp2,
    "expm1": np.expm1, "log": np.log, "log2": np.log2, "log1p": np.log1p, "tanh": np.tanh, "sqrt": np.sqrt,
    "reciprocal": np.reciprocal, "sin": np.sin, "cos": np.cos, "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "div": np.divide, "floordiv": np.floor_divide, "mod": np.mod, "max": np.maximum, "min": np.minimum,
    "pow": np.power, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "eq": np.equal,
    "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "rsqrt": lambda x: 1.0 / np.sqrt(x), "relu": lambda x: np.maximum(x, 0), "softplus": lambda x: np.logaddexp(0.0, x),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)), "erf": np.vectorize(math.erf),
}  # fmt: skip
REDUCE: Mapping[str, Callable[..., Any]] = {
    "add": np.sum,
    "max": np.max,
    "min": np.min,
    "mul": np.prod,
    "or": np.any,
    "and": np.all,
}


def number(root: Expr, loads: Mapping[str, object], known: Mapping[Expr, object] | None = None) -> Any:
    """The value of a term in float64: tensors by name, coordinates 0 unless `known` says otherwise."""
    memo: dict[Expr, Any] = {e: np.asarray(v) for e, v in (known or {}).items()}
    with np.errstate(all="ignore"):
        for e in walk(root):
            if e not in memo:
                memo[e] = _number(e, [memo[a] for a in e.args], loads)
    return memo[root]


def _number(e: Expr, args: list[Any], loads: Mapping[str, object]) -> Any:
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
    return np.asarray(_NUMPY[e.op](*args))
