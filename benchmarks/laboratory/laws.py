"""Methods of the package on an attention of a laboratory model: the law's own cascade, run by the oracle.

Nothing here knows what a method does: its replacement is evaluated, its table is made by its program, and the mass that rows
keep is read off the replacement's mask, where its rows are a softmax under that mask (which is tried, not assumed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, verify
from reattend.patterns.cascade import Tensor as Declared
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.library.papers import Builder, softmax
from reattend.patterns.library.papers import attention as build
from reattend.patterns.masks.split import split
from reattend.patterns.methods.method import Method, Replacement
from reattend.patterns.verdict import Refusal

# How far an output may be from the softmax under the replacement's mask before it counts as another rule.
SAME = 1e-3


class Refused(ValueError):
    """A method that is none for the laboratory's attention, with its own sentence."""


@lru_cache
def site(n: int, heads: int, width: int, causal: bool, scale: float) -> Attention:
    """softmax(scale · QKᵀ) V of n tokens, as it would be lifted from the model."""

    def score(b: Builder, qk: Expr) -> Expr:
        scaled = qk * scale
        return ex.where(ex.index("m") <= ex.index("p"), scaled, float("-inf")) if causal else scaled

    made = attention(build("laboratory", softmax, score, h=heads, p=n, m=n, e=width, f=width))
    assert isinstance(made, Attention), made
    return made


@dataclass(frozen=True)
class Law:
    """A method with what it has learned: tensors by the replacement's input names, one mapping an attention of the model.

    `budget` is what it was asked to keep, `label` its name in tables, where that is not its own text.
    """

    method: Method
    learned: Sequence[Mapping[str, Tensor]] = ()
    budget: float = 1.0
    label: str = ""
    made: dict[tuple[int, int, int, bool, float], Replacement] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.label or str(self.method)

    def replacement(self, n: int, heads: int, width: int, causal: bool, scale: float) -> Replacement:
        key = (n, heads, width, causal, scale)
        if key not in self.made:
            made = self.method.replace(site(*key))
            if isinstance(made, Refusal):
                raise Refused(str(made))
            self.made[key] = made
        return self.made[key]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, N, F]; kept pairs [B or 1, H or 1, N, N], None where its rows are no masked softmax."""
        b, h, n, e = q.shape
        made = self.replacement(n, h, e, causal, scale)
        given = {"Q": q.contiguous(), "K": k.contiguous(), "V": v.contiguous()}
        if made.program is not None:
            given[made.table] = made.program.run(torch, given, {"B": b, "H": h, "P": n, "M": n, "E": e, "F": e})
        if self.learned:
            given |= self.learned[layer]
        out = evaluate(made.cascade, given, {"B": b})[made.cascade.outputs[0]]
        keep = kept(made, {t: x for t, x in given.items() if t == made.table}, b, h, n)
        if keep is None:
            return out, None
        masked = (q @ k.mT * scale).masked_fill(~keep, float("-inf")).softmax(-1) @ v
        same = float((masked - out).norm()) <= SAME * float(out.norm())
        return out, keep if same else None


def kept(made: Replacement, tables: Mapping[str, Tensor], b: int, h: int, n: int) -> Tensor | None:
    """The pairs that the replacement's mask keeps, None where there is no attention to read a mask off."""
    a = attention(made.cascade)
    if not isinstance(a, Attention):
        return None
    keep = split(a.score, a.key).keep
    if any(str(x.attr) not in tables for x in ex.loads(keep)):
        return None
    ranks = [("b", b), ("h", h), ("p", n), ("m", n)]
    used = [(r, s) for r, s in ranks if r in keep.ranks | {"p", "m"}]
    read = {str(x.attr) for x in ex.loads(keep)}
    declared = [t for t in made.cascade.inputs if t.name in read]
    out = Declared("KEPT", tuple(s for _, s in used), "b1")
    body = keep & (ex.index("p") >= 0) & (ex.index("m") >= 0)
    c = Cascade(
        "mask", tuple(Rank(r, s) for r, s in used), (*declared, out),
        (Einsum(Access("KEPT", tuple(ex.index(r) for r, _ in used)), body),), ("KEPT",),
    )
    pairs = evaluate(verify(c.with_sizes({"B": b})), {x: tables[x] for x in read})["KEPT"]
    names = [r for r, _ in used]
    return pairs.reshape([s if r in names else 1 for r, s in ranks])
