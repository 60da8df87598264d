"""Hedgehog: learned feature maps that imitate a softmax's rows, alone or beside a window of exact ones.

    φ(x) = [softmax(x W); softmax(-x W)]       W[h, e, j] of the query's side and of the key's, learned a layer at a time
    w(p, m) = exp(gain) · φ(q_p)·φ(k_m) ≥ 0    2J numbers a token
    w(p, m) = exp(s - max of the window's s)   where the key is among the last `window` ones
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Cascade
from ...expr import Expr
from ...masks.split import split
from ...verdict import Refusal
from ..method import Method, Replacement, head_rank, positions
from .rows import Operands, RowBuilder, is_softmax, operands


@dataclass(frozen=True)
class Hedgehog(Method):
    """Linear attention with maps of `features` directions a head, whose weights are read from `maps` (safetensors).

    The replacement has inputs of its own: WQ and WK [heads, width, features], and with a window GAIN [heads]. Without maps
    that were fitted to the attention it is refused: at random they are another model. A window beside the maps is that of
    LoLCATs (arXiv 2410.10254, section 3.2), whose learned factor stands here at the far side.
    """

    name: ClassVar[str] = "hedgehog"
    source: ClassVar[str] = "Zhang et al., The Hedgehog & the Porcupine (2402.04347), section 4"
    needs: ClassVar[tuple[str, ...]] = ("feature maps fitted to the attention",)

    maps: str = ""
    features: int = 64
    window: int = 0

    def __post_init__(self) -> None:
        if self.features < 1 or self.window < 0:
            raise ValueError(f"Hedgehog needs features ≥ 1 and window ≥ 0, not {self.features} and {self.window}")

    def replace(self, a: Attention) -> Replacement | Refusal:
        if not self.maps:
            return self.refuse("it needs feature maps fitted to the attention: give their file as maps")
        if not is_softmax(a):
            return self.refuse("its rows are no softmax of their scores")
        found = operands(a)
        if isinstance(found, str):
            return self.refuse(found)
        if not self.window:
            return Replacement(linear(a, found, self.features, str(self)), masks=False)
        at = positions(a)
        if isinstance(at, Refusal):
            return self.refuse(at.reason)
        if not at.causal:
            return self.refuse("its window needs a causal attention: nothing says where the window of a row ends")
        return Replacement(linear(a, found, self.features, str(self), at.row - at.key < self.window), masks=False)


def linear(a: Attention, given: Operands, features: int, name: str, near: Expr | None = None) -> Cascade:
    """The quadratic form: weights are sums of the products of both halves' features; `near` keys have the softmax's."""
    rows, head = RowBuilder(a), head_rank(a)
    j = rows.rank("j", features)
    own = (*(() if head is None else (head,)), *given.over, j)
    halves: list[Expr] = []
    sides = []
    for side, x, token in (("Q", given.query, a.query), ("K", given.key, a.key)):
        w = rows.input(f"W{side}", own, "f32")
        at = (*a.batch, token, j)
        sides.append((at, side, rows.put(f"G{side}", at, x * w, "add", given.over)))
    for sign, half in ((1.0, "P"), (-1.0, "N")):
        q, k = (rows.softmax(g * sign if sign < 0 else g, at, j, f"F{side}{half}") for at, side, g in sides)
        halves.append(rows.put(f"S{half}", (*rows.row, a.key), q * k, "add", (j,)))
    weight = halves[0] + halves[1]
    if near is not None:
        s = split(a.score, a.key).full
        top = rows.put("LM", rows.row, ex.where(given.keep & near, s, float("-inf")), "max", (a.key,))
        gain = rows.input("GAIN", () if head is None else (head,), "f32")
        weight = ex.where(near, ex.exp(s - top), ex.exp(gain) * weight)
    weight = ex.where(given.keep, weight, 0.0)
    return rows.cascade(rows.mean(weight, "L"), name)
