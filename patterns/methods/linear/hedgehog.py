"""Hedgehog: learned feature maps that imitate a softmax's rows, alone or beside a window of exact ones.

    φ(x) = [softmax(x W); softmax(-x W)]       W[h, e, j] of the query's side and of the key's, learned a layer at a time
    w(p, m) = exp(gain) · φ(q_p)·φ(k_m) ≥ 0    2J numbers a token
    w(p, m) = exp(s - max of the window's s)   where the key is among the last `window` ones
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Cascade
from ...expr import Expr
from ...masks.split import split
from ...verdict import Refusal
from ..fitted import HeadsSeen
from ..method import Replacement, head_rank, positions
from ..selecting.steps import Learned
from .chunked import ChunkedRows
from .learned import LearnedInputs, LearnedMethod
from .rows import Operands, RowBuilder, is_softmax, operands


@dataclass(frozen=True)
class Hedgehog(LearnedMethod):
    """Linear attention with maps of `features` directions a head, kept in the file `maps` (safetensors).

    A calibration reads them there, or fits them on the examples that configure and writes the file. `learned` has those of
    one attention: query and key [heads, width, features], gain [heads]. The replacement has them as inputs of its own, WQ,
    WK, and with a window GAIN. Without maps that were fitted to the attention it is refused: at random they are another
    model. A window beside the maps is that of LoLCATs (arXiv 2410.10254, section 3.2), whose learned factor stands here at
    the far side; without one no kernel computes it, and it is not installed.
    """

    name: ClassVar[str] = "hedgehog"
    source: ClassVar[str] = "Zhang et al., The Hedgehog & the Porcupine (2402.04347), section 4"
    needs: ClassVar[tuple[str, ...]] = ("feature maps fitted to the attention",)

    maps: str = ""
    features: int = 64
    window: int = 0
    learned: tuple[Learned, ...] | None = None

    def __post_init__(self) -> None:
        if self.features < 1 or self.window < 0:
            raise ValueError(f"Hedgehog needs features ≥ 1 and window ≥ 0, not {self.features} and {self.window}")

    @property
    def is_fitted(self) -> bool:
        return self.learned is not None

    @property
    def file(self) -> str:
        return self.maps

    @property
    def parts(self) -> tuple[str, ...]:
        return ("query", "key", "gain")

    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, Hedgehog]:
        """Nothing: its maps are learned, and come by `with_parts`."""
        return {}

    def with_parts(self, parts: Mapping[str, Any]) -> Hedgehog:
        found = tuple(Learned.of(parts[n], 1 if n == "gain" else 3) for n in self.parts)
        if found[0].values.shape[2] != self.features or found[0].values.shape != found[1].values.shape:
            raise ValueError(f"its maps are of {found[0].values.shape[2]} features, where {self.features} are asked for")
        return replace(self, learned=found)

    def replace(self, a: Attention) -> Replacement | Refusal:
        if not self.maps:
            return self.refuse("it needs feature maps fitted to the attention: give their file as maps")
        if not is_softmax(a):
            return self.refuse("its rows are no softmax of their scores")
        found = operands(a)
        if isinstance(found, str):
            return self.refuse(found)
        if self.learned is not None and (wrong := self._unlike(a)):
            return self.refuse(wrong)
        if not self.window:
            return self._given(a, linear(a, found, self.features, str(self)))
        at = positions(a)
        if isinstance(at, Refusal):
            return self.refuse(at.reason)
        if not at.causal:
            return self.refuse("its window needs a causal attention: nothing says where the window of a row ends")
        return self._given(a, linear(a, found, self.features, str(self), at.row - at.key < self.window))

    def _given(self, a: Attention, made: Cascade) -> Replacement:
        own = tuple(t.name for t in made.inputs if t.name not in a.cascade.tensor)
        if self.learned is None:
            return Replacement(made, masks=False)
        named = {n[:2] if n[0] == "W" else "GAIN": n for n in own}
        names = tuple(named[n] for n in ("WQ", "WK", "GAIN") if n in named)
        supply = LearnedInputs(names, self.learned[: len(names)])
        if len(names) < 3:
            return Replacement(made, masks=False, supply=supply)
        direct = ChunkedRows.make(a, (names[0], names[1], names[2]), self.features, self.window)
        return Replacement(made, masks=False, supply=supply, direct=None if isinstance(direct, str) else direct)

    def _unlike(self, a: Attention) -> str:
        assert self.learned is not None
        head, width = head_rank(a), a.cascade.rank[a.products[0].over[0]].size if a.products[0].over else 0
        asked = (a.cascade.rank[head].size if head is not None else None, width)
        shape = self.learned[0].values.shape[:2]
        if shape == asked:
            return ""
        return f"its maps are for {shape[0]} heads of {shape[1]}, and this attention has {asked[0]} of {asked[1]}"


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
