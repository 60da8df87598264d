"""The value of a term in float64 by numpy: what a row program yields on a row that is made up.

Nothing has a value by default: a leaf of which nothing is known is an error, or takes part in `tries`, which a law must
pass with every one of several values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..expr import Expr
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


# How many made-up values stand for what is not known.
TRIES = 5


def number(root: Expr, loads: Mapping[str, object], known: Mapping[Expr, object] | None = None) -> Values:
    """The value of a term in float64: tensors by name, other terms by `known`. Raises KeyError for a leaf without one."""
    memo: dict[Expr, Values] = {e: np.asarray(v) for e, v in (known or {}).items()}
    with np.errstate(all="ignore"):
        for e in _above((root,), memo.keys()):
            memo[e] = _number(e, [memo[a] for a in e.args if e.op != "load"], loads)
    return memo[root]


def tries(
    terms: Iterable[Expr], known: Mapping[Expr, object], names: Collection[str] = (), spread: str = ""
) -> Iterator[dict[Expr, object]]:
    """`known`, completed by values for all leaves that have none, other ones each time.

    `names` are tensors that have a value; what varies over the rank `spread` gets two elements.
    """
    open_ = [e for e in leaves(terms, known) if str(e.attr) not in names]
    for n in range(TRIES):
        rng = np.random.default_rng(n)
        yield {**known, **{e: _made_up(e, rng, 2 if spread in e.ranks else 1) for e in open_}}


def leaves(terms: Iterable[Expr], known: Collection[Expr]) -> list[Expr]:
    """The tensors, coordinates and sizes that the terms are made of beside the known ones."""
    return [e for e in _above(tuple(terms), known) if e.op in ("index", "symbol", "load")]


def _made_up(e: Expr, rng: np.random.Generator, count: int) -> Values:
    """Floats of both signs, coordinates and sizes from 1 on, conditions of both kinds."""
    made: Values = rng.integers(1, 4, count)
    if e.is_float:
        made = rng.normal(size=count) * 2
    elif e.dtype == "b1":
        made = rng.integers(0, 2, count).astype(bool)
    return made if count > 1 else np.asarray(made[0])


def _above(roots: tuple[Expr, ...], known: Collection[Expr]) -> list[Expr]:
    """The distinct sub-terms whose value is to be found, arguments first: nothing below a known one."""
    out: dict[Expr, None] = {}
    stack = [(r, False) for r in reversed(roots)]
    while stack:
        e, ready = stack.pop()
        if e in known or e in out:
            continue
        # the coordinates of a load do not tell its value
        args = () if e.op == "load" else e.args
        if ready or not args:
            out[e] = None
        else:
            stack += [(e, True), *((a, False) for a in reversed(args))]
    return list(out)


def _number(e: Expr, args: list[Values], loads: Mapping[str, object]) -> Values:
    match e.op:
        case "const":
            return np.asarray(e.value, dtype=float if e.is_float else None)
        case "index" | "symbol":
            raise KeyError(str(e))
        case "load":
            return np.asarray(loads[str(e.attr)])
        case "cast":
            return args[0].astype(float) if e.is_float else args[0]
        case "where":
            return np.where(args[0], args[1], args[2])
    return np.asarray(_FUNCTION[e.op](*args))
