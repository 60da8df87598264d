"""What can be said about an attention: the rule for rows without a key, a word for its row rule, its traits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from .. import expr as ex
from ..expr import Expr
from ..membership import membership
from ..operators import facts
from ..terms.conditions import FILL
from ..terms.constant import REDUCE, number, tries
from .attention import Attention
from .score import bends, factors, reading

# The made-up row: two products and two values.
SCORES, VALUES = np.array([0.3, -0.7]), np.array([1.0, 3.0])


def no_key_rule(a: Attention) -> str:
    """What the model computes for a row all of whose keys are masked, found by running its row program on such rows.

    "nan"; "uniform" (the mean over all keys); "zero"; "never" (no mask can empty a row); "unmasked" (an additive
    fill that is too small to drown the scores, or a fill the row rule shifts away: the row attends as if unmasked);
    "varies" (it depends on data). Only masks that stand in the terms count: a float tensor that is added is a bias.
    """
    masked = masked_row(a)
    if masked is None:
        return "never"
    kept: dict[Expr, object] = {e: ~np.asarray(v) for e, v in masked.items()}
    return _rule(a, masked, kept)


def low_row_rule(a: Attention, added: Collection[Expr]) -> str:
    """What the model computes for a row all of whose scores are −∞ because these tensors, which the scores read, are so."""
    masked = masked_row(a) or {}
    kept: dict[Expr, object] = {e: ~np.asarray(v) for e, v in masked.items()}
    low = {x: -np.inf for x in added if x.is_float}
    return _rule(a, {**kept, **low}, kept) if low else "never"


def _rule(a: Attention, empty: Mapping[Expr, object], whole: Mapping[Expr, object]) -> str:
    """How a row with these values ends, whatever the rest holds; rests with which even a whole row is NaN do not count."""
    endings = {_ending(a, row) for row in made_up(a, empty) if _ending(a, {**row, **_finite(row), **whole}) != "nan"}
    return endings.pop() if len(endings) == 1 else "varies"


def _finite(row: Mapping[Expr, object]) -> dict[Expr, object]:
    return {e: SCORES for e, v in row.items() if np.any(np.isneginf(np.asarray(v, float)))}


def _ending(a: Attention, known: dict[Expr, object]) -> str:
    """How the row ends of which the terms `known` have these values."""
    values = run_row(a, known)
    out = float(number(a.finish, values, known))
    if np.isnan(out):
        return "nan"
    if out == 0.0:
        return "zero"
    first, second = np.broadcast_to(number(a.weight, values, known), (2,))
    if first != second:
        return "unmasked"
    # exp(s - logsumexp) beside a fill that drowns the logarithm of their number weighs each key by 1
    return "uniform" if np.isclose(out, VALUES.mean()) else "varies"


def masked_row(a: Attention) -> dict[Expr, object] | None:
    """The conditions of all masks as they are for a row that keeps no key; None where no mask stands in the terms."""
    known: dict[Expr, object] = {}
    terms = (*(r.body for r in a.row), a.weight)
    rowed = {e for t in terms for e in reading(t, a.row_names)}
    for e in ex.walk(*terms):
        # a condition on what the row makes of a score follows from the scores
        if is_mask(e, a.key) and e.args[0] not in rowed:
            known[e.args[0]] = np.asarray(masked_side(e) is e.args[1])
    return known or None


def two_keys(a: Attention, known: Mapping[Expr, object]) -> dict[Expr, object]:
    """`known`, and a row of two keys with scores of their own."""
    scores = {ex.load(e.out.tensor, e.out.index, a.cascade.tensor[e.out.tensor].dtype): SCORES for e in a.products}
    return {**scores, ex.index(a.key): np.array([0, 1]), **known}


def made_up(
    a: Attention, known: Mapping[Expr, object], terms: Iterable[Expr] = (), names: Collection[str] = ()
) -> Iterator[dict[Expr, object]]:
    """Rows of two keys in which the terms `known` have these values, and what they leave open has other ones each time.

    `terms` are read of the row beside the attention's own; the tensors `names` follow from the rest.
    """
    own = (*(r.body for r in a.row), a.weight, a.finish)
    made = {*a.row_names, a.contraction.out.tensor, *names}
    return tries((*own, *terms), two_keys(a, known), made, spread=a.key)


def run_row(a: Attention, known: Mapping[Expr, object]) -> dict[str, object]:
    """Row tensors and contraction of one made-up row of two keys with values 1 and 3; `known` gives all else a value."""
    values: dict[str, object] = {}
    with np.errstate(all="ignore"):
        for r in a.row:
            assert r.op is not None
            values[r.out.tensor] = REDUCE[r.op](np.broadcast_to(number(r.body, values, known), (2,)))
        weight = np.broadcast_to(number(a.weight, values, known), (2,))
        values[a.contraction.out.tensor] = np.sum(weight * VALUES)
    return values


def is_mask(e: Expr, key: str) -> bool:
    """Does a term choose a constant for some keys, or a fill for all keys of some rows?"""
    if e.op != "where" or not (e.args[1].is_const or e.args[2].is_const):
        return False
    return key in e.args[0].ranks or (key in e.ranks and masked_side(e).value <= FILL)


def masked_side(e: Expr) -> Expr:
    """The side of a `where` that a masked key takes: the constant one, the smaller of two."""
    _, x, y = e.args
    if x.is_const and y.is_const:
        return x if x.value < y.value else y
    return x if x.is_const else y


def kind(a: Attention) -> str:
    """A word for the row rule. For people to read; no code depends on it.

    "selected" where rows name their keys; "softmax"; "exp" without a sum; else the outermost operator that bends a
    weight over its products; "power"; "linear".
    """
    if _members(a):
        return "selected"
    score = set(ex.walk(a.score))
    found = bends(a.weight, {e.out.tensor for e in a.products})
    # where the row rule is no map of the score, it is told by what stands in that
    rule = [e for e in found if e not in score] or list(found)
    if any(facts(e.op).law == "exponential" for e in rule if e not in score):
        return "softmax" if any(r.op == "add" for r in a.row) else "exp"
    maps = [e.op for e in rule if e.op in ex.UNARY and facts(e.op).curved]
    if maps:
        return maps[-1]
    if any(e.op == "pow" or (e.op == "mul" and e.args[0] is e.args[1]) for e in rule):
        return "power"
    return "pointwise" if rule else "linear"


def traits(a: Attention) -> frozenset[str]:
    """Words for what stands in the terms. For people to read; no code depends on them.

    top-k (keys that rows name), blocks (of keys), gqa, latent, causal, window, alibi, bias, mask (data), varlen (segment
    ids), softcap, sink, prelude, decode, cross.
    """
    out = _operands(a) | _limits(a)
    products, named = {e.out.tensor for e in a.products}, _members(a)
    for e in ex.walk(a.score):
        if e.op == "tanh":
            out.add("softcap")
        if e.op == "load" and str(e.attr) in named and a.key in e.ranks:
            out |= {"top-k", "blocks"} if any(i.op == "floordiv" for i in e.args) else {"top-k"}
        elif e.op == "load" and str(e.attr) not in products and a.key in e.ranks:
            out.add(_data(e, a))
        if e.op == "mul" and _slope(e, a):
            out.add("alibi")
    if any(str(e.attr) not in products | a.row_names for e in _row_loads(a)):
        out.add("sink")
    if any(e.out.tensor not in named for e in a.prelude):
        out.add("prelude")
    size = {n: a.cascade.rank[n].size for n in (a.query, a.key)}
    if size[a.query] == 1:
        out.add("decode")
    elif size[a.query] != size[a.key] and not out & {"causal", "window"}:
        out.add("cross")
    return frozenset(out)


def _members(a: Attention) -> frozenset[str]:
    """Masks of all pairs that are made of indices."""
    return frozenset(e.out.tensor for e in a.prelude if membership(e) is not None)


def _operands(a: Attention) -> set[str]:
    keyed = [f for e in a.products for f in factors(e.body)[0] if a.key in f.ranks]
    heads = [f.ranks & set(a.batch) for f in keyed]
    out = {"latent"} if any(h != heads[0] for h in heads) else set()
    if any(i.op == "floordiv" and i.ranks <= set(a.batch) for f in keyed for x in ex.loads(f) for i in x.args):
        out.add("gqa")
    return out


def _data(e: Expr, a: Attention) -> str:
    if not e.is_float:
        return "mask" if e.dtype == "b1" else "varlen"
    # slopes times positions, computed before: they vary over heads and keys and know no query
    return "alibi" if a.query not in e.ranks and len(e.ranks & set(a.batch)) > 1 else "bias"


def _limits(a: Attention) -> set[str]:
    """Does a mask cut off the keys after the query (causal), those far before it, or both (window)?"""
    out: set[str] = set()
    ahead = np.array([-900_000, -300, -100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100, 300, 900_000])
    known = {ex.index(a.key): 1_000_000 + ahead, ex.index(a.query): np.asarray(1_000_000)}
    for e in ex.walk(a.score, a.weight):
        if not is_mask(e, a.key):
            continue
        for c, positive in _comparisons(e.args[0], masked_side(e) is e.args[2]):
            if {a.key, a.query} <= c.ranks and not ex.loads(c):
                for some in tries((c,), known):
                    out |= _cut_off(np.broadcast_to(number(c, {}, some), ahead.shape) == positive)
    return out


def _cut_off(kept: np.ndarray) -> set[str]:
    """What a mask is called that keeps these of the keys around a query, the first far before it and the last far after."""
    out: set[str] = set()
    if kept.any() and not kept[-1]:
        out.add("causal" if kept[0] else "window")
    if kept.any() and not kept[0]:
        out.add("window")
    return out


def _comparisons(c: Expr, positive: bool) -> Iterator[tuple[Expr, bool]]:
    """The order comparisons of a condition, each with whether it stands for keeping."""
    if c.op in ("and", "or"):
        for x in c.args:
            yield from _comparisons(x, positive)
    elif c.op == "not":
        yield from _comparisons(c.args[0], not positive)
    elif c.op in ("lt", "le", "gt", "ge"):
        yield c, positive


def _row_loads(a: Attention) -> list[Expr]:
    """Loads without the key that meet row tensors, in row reductions, weight or epilogue."""
    out: list[Expr] = []
    for t in (*(r.body for r in a.row), a.weight, a.finish):
        for e in ex.walk(t):
            if e.op in ("max", "add") and a.key not in e.ranks and reading(e, a.row_names):
                out += [x for x in ex.loads(e) if x.ranks.isdisjoint([a.value]) and x.is_float]
    return out


def _slope(e: Expr, a: Attention) -> bool:
    """A product of the key's distance and something that varies over the batch ranks."""
    for x, y in (e.args, e.args[::-1]):
        if a.key in x.ranks and not ex.loads(x) and y.ranks <= set(a.batch) and not y.is_const:
            return True
    return False
