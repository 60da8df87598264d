"""RazorAttention: retrieval heads read everything, others the sink, a window, and one token in the place of what they drop.

    dropped(p) = sink … X(p) − W            X(p) the row's own place, W = max(least, ⌈M / part⌉), N_d their number
    k̂, v̂ = means of K and V over dropped    s_c = q·k̂·scale + log N_d
    O = (Σ_kept e^s V + e^{s_c} v̂) / (Σ_kept e^s + e^{s_c})          exact where all dropped keys are equal

By Jensen's inequality e^{s_c} is never above the weight of what is dropped: a needle there is not found, and a head that
needs one must be full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...expr import Expr
from ...masks.split import conjuncts, split
from ...verdict import Refusal
from ..fitted import FittedMethod, HeadsSeen, full_heads, largest
from ..linear.rows import RowBuilder, is_softmax
from ..method import Replacement, StaticMethod, TokenPositions, positions
from .compensation import CompensationToken

# What the released tools take: of all heads, by how they read tokens that repeat themselves.
INDUCTION, ECHO = 0.14, 0.01


@dataclass(frozen=True)
class RazorAttention(FittedMethod, StaticMethod):
    """`induction` and `echo`: shares of all query heads that are retrieval heads by either score; `full` names heads of
    keys of one attention. A head of keys is full where one of its query heads is one.

    Without `compensate` the dropped keys are lost, as in DuoAttention. The paper drops them from a cache, once; here every
    row has the token of what it drops itself.
    """

    name: ClassVar[str] = "razor-attention"
    source: ClassVar[str] = "Tang et al., RazorAttention (2407.15891), section 3"
    needs: ClassVar[tuple[str, ...]] = ("a causal attention", "several heads", "a calibration on token ids, or full heads")

    induction: float = INDUCTION
    echo: float = ECHO
    sink: int = 4
    least: int = 4000
    part: int = 5
    compensate: bool = True
    full: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.induction <= 1 and 0 <= self.echo <= 1) or self.sink < 0 or self.least < 1 or self.part < 1:
            raise ValueError("RazorAttention needs shares from 0 to 1, sink ≥ 0, least ≥ 1 and part ≥ 1")

    @property
    def is_fitted(self) -> bool:
        return self.full is not None

    @property
    def repeats(self) -> bool:
        return True

    @property
    def options(self) -> tuple[RazorAttention]:
        return (replace(self, full=()),)

    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, RazorAttention]:
        many = sum(len(x.echo) for x in seen.values())
        by_induction = largest({n: x.induction for n, x in seen.items()}, math.ceil(self.induction * many - 1e-9))
        by_echo = largest({n: x.echo for n, x in seen.items()}, math.ceil(self.echo * many - 1e-9))
        return {
            n: replace(self, full=tuple(sorted({h // x.group for h in (*by_induction[n], *by_echo[n])})))
            for n, x in seen.items()
        }

    def window(self, keys: Expr) -> Expr:
        """Keys up to a row, its own among them."""
        return ex.maximum((keys + (self.part - 1)) // self.part, self.least)

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        if not at.causal:
            return self.refuse("it needs a causal attention: nothing says where the window of a row ends")
        full = full_heads(self, self.full, "retrieval", at, a)
        if isinstance(full, Refusal):
            return full
        near = at.row - at.key < self.window(at.keys)
        return full | (at.key < self.sink) | near

    def replace(self, a: Attention) -> Replacement | Refusal:
        plain = super().replace(a)
        if isinstance(plain, Refusal) or not self.compensate:
            return plain
        if not is_softmax(a):
            return self.refuse("its rows are no softmax of their scores")
        if len(tuple(conjuncts(split(a.score, a.key).keep))) > 1:
            return self.refuse("its mask is more than causal: the mean would hold keys that the model masks")
        at = positions(a)
        assert not isinstance(at, Refusal), at
        keep = self.keep(at, a)
        assert not isinstance(keep, Refusal), keep
        rows = RowBuilder(a)
        score = rows.input("DROPPED", rows.row, "f32")
        mean = rows.input("DROPPED_MEAN", (*rows.row, a.value), "f32")
        names = str(score.attr), str(mean.attr)
        supply = CompensationToken.of(a, names, self.sink, self.window(at.keys), self.full or ())
        if isinstance(supply, str):
            return self.refuse(supply)
        s = ex.where(keep, a.score, float("-inf"))
        top = ex.maximum(rows.put("CM", rows.row, s, "max", (a.key,)), score)
        weight, more = ex.exp(s - top), ex.exp(score - top)
        total = rows.put("CD", rows.row, weight, "add", (a.key,)) + more
        summed = rows.put("CN", (*rows.row, a.value), weight * a.values, "add", (a.key,)) + more * mean
        return Replacement(rows.cascade(summed / total, str(self)), supply=supply)
