"""An attention as kernels in torch compute it: our CPU kernels, SDPA and FlexAttention. Read off the cascade alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.rowstate import RowState, derive
from ...patterns.attention.score import hiding
from ...patterns.attention.traits import is_mask, masked_side, no_key_rule
from ...patterns.cascade import Cascade, size_term
from ...patterns.expr import FALSE, TRUE, Expr
from ...patterns.masks.rows import witnesses
from ...patterns.masks.split import VANISHING, Mask, split
from ...patterns.passes.further import with_numbers
from ...patterns.terms.conditions import conjunction, conjuncts, simplify_under
from ...patterns.terms.divisions import read_at
from ...patterns.terms.intervals import spans
from ...patterns.terms.narrow import LARGEST
from ...patterns.verdict import Obstacle
from . import skip
from .operands import Heads, Product, heads, product
from .scaled import FILLED, Ending, Scaled, ending, scaled
from .terms import uncast

# A fill below this may be taken beyond float32.
HIDING = -(2.0**100)
# exp(-UNDERFLOW) is 0 in float32.
UNDERFLOW = 104.0


@dataclass(frozen=True)
class Form:
    """An attention as tiles of queries and keys compute it.

    `rule`: which empty tiles may be skipped: "always"; "guarded", where all rows keep a key; "bounded", where besides
    that the scores are small enough for the fill to drown them; "never".
    `proof`: terms over the query, one of which has to hold in each row for it to keep a key; empty: every row does.
    """

    attention: Attention
    state: RowState
    products: tuple[Product, ...]
    values: Expr
    heads: Heads
    mask: Mask
    rule: str
    proof: tuple[Expr, ...]
    real: str

    @property
    def cascade(self) -> Cascade:
        return self.attention.cascade

    @property
    def guarded(self) -> bool:
        """Do rows have to be shown to keep a key at run time?"""
        return self.rule in ("guarded", "bounded") and bool(self.proof)

    @property
    def hidden(self) -> bool:
        """Is a fill left in the score that data may take to −∞ (`masked / temperature`)? Any row may be all of it."""
        a = self.attention
        masks = (e for e in ex.walk(self.mask.full) if is_mask(e, a.key))
        return any(masked_side(e).is_float and masked_side(e).value < HIDING for e in masks)

    @cached_property
    def no_key(self) -> str:
        """What a row without a key gives (`no_key_rule`); of a mask by arithmetic, `log(keep)`, the fills alone tell."""
        rule = no_key_rule(self.attention)
        return "nan" if rule == "never" and -math.inf in self.mask.fills else rule

    @property
    def skips(self) -> bool:
        """May tiles be skipped whatever the scores are?"""
        return self.rule in ("always", "guarded")


@lru_cache(maxsize=256)
def form(c: Cascade) -> Form | Obstacle:
    """The form of the attention that a cascade is, or why it has none."""
    a = with_numbers(c)
    if isinstance(a, Obstacle):
        return a
    state = derive(a)
    if isinstance(state, Obstacle):
        return state
    products: list[Product] = []
    for e in a.products:
        p = product(e, a.query, a.key)
        if isinstance(p, str):
            return Obstacle(p)
        products.append(p)
    values = uncast(a.values)
    if a.query in values.ranks:
        return Obstacle(f"the values vary over the query {a.query}: no product of weights and values")
    mask = split(a.score, a.key)
    rule = skip.rule(state, a.score, mask, a.key)
    if mask.keep is TRUE and (keep := skip.predicate(state, a.score, a.key)) is not TRUE:
        # a mask outside the score, or one whose fill adds nothing to the row rule
        mask, rule = Mask(keep, simplify_under(a.score, {keep: True}), ()), "always"
    elif rule == "never" and mask.fills and all(VANISHING < x < -2 * UNDERFLOW for x in mask.fills):
        rule = "bounded"
    at = heads(a, [*(p.far for p in products), values])
    proof = () if rule in ("always", "never") else rows_keep_a_key(a, mask.keep)
    return Form(a, state, tuple(products), values, at, mask, rule, proof, "f64" if _wide(a.cascade) else "f32")


def _wide(c: Cascade) -> bool:
    """Is anything computed in float64? A tensor of that type which is only read, and cast at once, is not."""
    made = [e for e in c.einsums if c.tensor[e.out.tensor].dtype == "f64"]
    terms = [x for e in c.einsums for x in ex.walk(e.body) if not (x.op == "cast" and x.args[0].op == "load")]
    return bool(made) or any(y.dtype == "f64" and ex.loads(y) for x in terms for y in x.args)


def rows_keep_a_key(a: Attention, keep: Expr) -> tuple[Expr, ...]:
    """Terms over the query, one of which proves that a row keeps a key; none where every row certainly does."""
    size = size_term(a.cascade.rank[a.key].size)
    extent = {r.name: r.size for r in a.cascade.ranks}
    out: list[Expr] = []
    for w in witnesses(keep, a.query, a.key, size):
        parts = [*conjuncts(read_at(keep, {ex.index(a.key): w}, extent)), w >= 0]
        if not (w is ex.index(a.query) and a.cascade.rank[a.query].size == a.cascade.rank[a.key].size):
            parts.append(w < size)
        parts = [p for p in parts if not _certain(p)]
        if not parts:
            return ()
        term = conjunction(tuple(parts))
        if term is not FALSE:
            out.append(term)
    # where no witness is left nothing is proved: a condition that no row meets, since "none" says the opposite
    return tuple(sorted(out, key=lambda e: sum(1 for _ in ex.walk(e)))[:4]) or (ex.index(a.query) < 0,)


def _certain(e: Expr) -> bool:
    """Does a condition hold for all coordinates from 0 and all sizes from 1?"""
    if e.is_const or ex.loads(e):
        return e is TRUE
    sizes = {ex.symbol(n): ex.index(f"size {n}") for n in ex.symbols(e)}
    e = ex.substitute(e, sizes)
    box = {r: (np.float64(1 if r.startswith("size ") else 0), np.float64(LARGEST)) for r in e.ranks}
    return bool(spans(e, box)[0])


@dataclass(frozen=True)
class Softmax:
    """The form as SDPA has it: one product, `scale · QK + added` under softmax, and how rows end.

    `limit`: the bound on |scale · QK| under which masked weights are 0 (None: no bound is needed). `chosen`: the fill
    stands in the place of the score and is too small to be added to it, but under that bound.
    """

    product: Product
    score: Scaled
    full: Scaled
    ending: Ending
    limit: float | None = None
    chosen: bool = False


def softmax(f: Form) -> Softmax | str:
    """Read a form as SDPA, or the reason why SDPA cannot compute it."""
    a = f.attention
    if len(f.products) != 1:
        return f"the score has {len(f.products)} products, SDPA has one"
    (p,) = f.products
    end = ending(a, f.state)
    if isinstance(end, str):
        return end
    outside = ex.load(p.name, a.products[0].out.index, a.cascade.tensor[p.name].dtype)
    table = {outside: outside * p.outside} if not (p.outside.is_const and p.outside.value == 1) else {}
    written, full = (ex.substitute(s, table) for s in (a.score, f.mask.full))
    score, kept = scaled(written, p.name), scaled(full, p.name)
    if isinstance(kept, str):
        return kept
    if end.counts and _may_be_filled(f, kept.added):
        return "a row without a key ends by how many keys were filled, which its log-sum-exp does not tell"
    limit = (-max(f.mask.fills) - UNDERFLOW) / 2 if f.rule == "bounded" and kept.added is None else None
    chosen = isinstance(score, str) and limit is not None and not f.proof and end.finish is None
    if chosen:
        score = scaled(written, p.name, max(f.mask.fills))
    if isinstance(score, str):
        return score
    if score.scale is not kept.scale:
        return "the scale depends on the mask"
    if score.scale.ranks or ex.loads(score.scale):
        if a.key in score.scale.ranks or any(t.dtype in ("f16", "bf16") for t in (p.near, p.far)):
            return f"the scale {score.scale} is no number"
        # one factor a query or a head: the queries take it in
        one = ex.const(1.0)
        p, score, kept = replace(p, near=p.near * score.scale), replace(score, scale=one), replace(kept, scale=one)
    return Softmax(p, score, kept, end, limit, chosen)


def _is_fill(x: Expr) -> bool:
    return x.is_const and x.is_float and -math.inf < x.value <= FILLED


def _may_be_filled(f: Form, added: Expr | None) -> bool:
    """May a row be all fills, each so large that the logarithm of their number is lost beside it?"""
    a = f.attention
    if added is not None and (hiding(added, a.key) or any(_is_fill(x) for x in ex.walk(added))):
        return True
    large = any(-math.inf < x <= FILLED for x in f.mask.fills)
    return (large or f.hidden) and bool(rows_keep_a_key(a, f.mask.keep))
