"""A mask put upon an attention: keep = the model's ∧ the method's, in whatever row rule it has.

    before   R[p] = ⊕_m g(S[p,m]);  O[p,f] = Σ_m w(S, R)·V[m,f]
    after    the same with  where(keep, S, none)  in the place of S;  none = −∞ or 0, which must weigh nothing in the row
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from .. import expr as ex
from ..attention.attention import Attention
from ..attention.traits import SCORES, made_up
from ..cascade import Access, Cascade, Einsum, Tensor, size_term, term_size, verify
from ..expr import Expr
from ..masks.split import conjuncts, split
from ..terms.affine import affine
from ..terms.constant import REDUCE, number
from ..verdict import Refusal


def masked(a: Attention, keep: Expr, name: str, tensors: tuple[Tensor, ...] = ()) -> Cascade | Refusal:
    """The attention in which a key counts only where `keep` holds as well; `tensors` are inputs that `keep` reads.

    Refused where no score stands for "no key" in its row rule.
    """
    none = nobody(a)
    if none is None:
        return Refusal(name, "no score stands for a key that is left out in this row rule")
    if any(t.name in a.cascade.tensor for t in tensors):
        return Refusal(name, f"the attention has a tensor {tensors[0].name} of its own")
    c = a.cascade
    table = {a.score: ex.where(keep, a.score, ex.const(none, a.score.dtype))}
    row = tuple(replace(e, body=ex.substitute(e.body, table)) for e in a.row)
    total = replace(a.contraction, body=ex.substitute(a.contraction.body, table))
    (output,) = c.outputs
    einsums = [*a.prelude, *a.products, *row, total]
    if output != total.out.tensor:
        (last,) = c.producers[output]
        einsums.append(Einsum(Access(output, last.out.index), ex.substitute(a.finish, table)))
    read = {str(x.attr) for e in einsums for x in e.reads} | {e.out.tensor for e in einsums}
    used = frozenset().union(*(e.ranks | set(e.over) for e in einsums))
    return verify(
        Cascade(
            f"{c.name} under {name}", tuple(r for r in c.ranks if r.name in used),
            tuple(t for t in (*c.tensors, *tensors) if t.name in read), tuple(einsums), c.outputs, c.accumulate, c.note,
        )
    )


def block_table(a: Attention, rows: int, keys: int, name: str = "KEEP") -> tuple[Tensor, Expr]:
    """The table of a selection: b1[batch…, ⌈P / rows⌉, ⌈M / keys⌉], and the predicate that reads it.

    Rows are counted from the first query of the call, keys from the first key.
    """
    ranks, c = (ex.index(a.query) // rows, ex.index(a.key) // keys), a.cascade
    sizes = [c.rank[r].size for r in (*a.batch, a.query, a.key)]
    last = (term_size((size_term(n) + (block - 1)) // block) for n, block in zip(sizes[-2:], (rows, keys)))
    return Tensor(name, (*sizes[:-2], *last), "b1"), ex.load(name, (*(ex.index(r) for r in a.batch), *ranks), "b1")


@lru_cache(maxsize=512)
def nobody(a: Attention) -> float | None:
    """The score of a key that is not there: a row with it ends as the row without it; None where there is no such score.

    Tried on made-up rows with several values for all that is not known.
    """
    return next((none for none in (-math.inf, 0.0) if all(_alike(a, row, none) for row in made_up(a, {}))), None)


def _alike(a: Attention, row: Mapping[Expr, object], none: float) -> bool:
    two: dict[Expr, Any] = {e: v for e, v in row.items() if e is not a.score}
    two |= {e: np.broadcast_to(v, (2,)) for e, v in two.items() if a.key in e.ranks}
    one = {e: v[:1] if a.key in e.ranks else v for e, v in two.items()}
    with_it = _end(a, {**two, a.score: np.array([SCORES[0], none])}, 2)
    alone = _end(a, {**one, a.score: SCORES[:1]}, 1)
    return bool(np.isfinite(alone)) and bool(np.isclose(with_it, alone, rtol=1e-12, atol=0.0))


def _end(a: Attention, known: Mapping[Expr, object], keys: int) -> float:
    """How a row of one or two keys with values 1 and 3 ends."""
    values: dict[str, object] = {}
    with np.errstate(all="ignore"):
        for r in a.row:
            assert r.op is not None
            values[r.out.tensor] = REDUCE[r.op](np.broadcast_to(number(r.body, values, known), (keys,)))
        weight = np.broadcast_to(number(a.weight, values, known), (keys,))
        values[a.contraction.out.tensor] = np.sum(weight * np.array([1.0, 3.0])[:keys])
        return float(number(a.finish, values, known))


def keeps_itself(a: Attention) -> bool:
    """Does every row keep the key at its own position under the model's mask, whatever run-time data says?"""
    keep, m, at = split(a.score, a.key).keep, ex.index(a.key), position(a)
    rows, keys = (a.cascade.rank[r].size for r in (a.query, a.key))
    if at is None and rows != keys:
        return False
    here = ex.substitute(keep, {m: ex.index(a.query) if at is None else at})
    return all(_trivial(part) for part in conjuncts(here))


def _trivial(e: Expr) -> bool:
    if e.op not in ("le", "ge") or any(x.dtype not in ex.INTEGERS for x in e.args):
        return e is ex.TRUE
    gap = affine(e.args[0]) - affine(e.args[1])
    return not gap.terms and (gap.constant <= 0 if e.op == "le" else gap.constant >= 0)


def position(a: Attention) -> Expr | None:
    """The last key that a row may see, as a term over the query: X of m ≤ X in the model's mask; None without one.

    It may be data (the positions of a cache that is not full). Rows over a cache lie at the end of the keys by this alone.
    """
    m = ex.index(a.key)
    for part in conjuncts(split(a.score, a.key).keep):
        if part.op not in ("lt", "le", "gt", "ge") or any(x.dtype not in ex.INTEGERS for x in part.args):
            continue
        low, high = part.args if part.op in ("lt", "le") else part.args[::-1]
        # low − high (+ 1) ≤ 0
        gap = affine(low) - affine(high) + affine(ex.const(int(part.op in ("lt", "gt"))))
        bound = affine(m) - gap
        if gap.coefficient(m) == 1 and a.query in bound.term().ranks and not any(a.key in x.ranks for x in bound.atoms):
            return bound.term()
    return None
