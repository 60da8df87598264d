"""Neighbourhood attention over a line, a plane or a volume of tokens: each row the `window` nearest keys of every axis.

    x = p's coordinate, y = m's, in the group of those equal mod dilation; n = how many the group has; ℓ = the row that leads
    not causal   ℓ = min(⌊x/s⌋·s + ⌊s/2⌋, n − 1);  c = ℓ clamped so that the window lies inside;  −⌊k/2⌋ ≤ y − c < ⌈k/2⌉
    causal       ℓ = min(⌊x/s⌋·s + s − 1, n − 1);  y ≤ x ∧ ℓ − y < k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...expr import TRUE, Expr
from ...verdict import Refusal
from ..method import StaticMethod, TokenPositions
from ..plane import checked_plane


@dataclass(frozen=True)
class Neighbourhood(StaticMethod):
    """Keys near a row on each axis of `plane`, one number an axis in all fields; the last axis is the innermost.

    `plane`: the tokens of each axis, () for a line of all tokens; `stride`: rows that share a window; `dilation`: steps
    between keys; `causal`: axes on which a row sees none ahead. Off the borders windows move inward instead of being cut,
    so that a row of an axis that is not causal keeps `window` keys wherever it lies.
    """

    name: ClassVar[str] = "neighbourhood"
    source: ClassVar[str] = "Hassani et al., Generalized Neighborhood Attention (2504.16922), section 3"
    needs: ClassVar[tuple[str, ...]] = ("the sizes of the plane", "one set of tokens")

    window: tuple[int, ...] = (255,)
    stride: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (1,)
    causal: tuple[bool, ...] = (False,)
    plane: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = len(self.window)
        for field in ("stride", "dilation", "causal"):
            given = getattr(self, field)
            object.__setattr__(self, field, given * axes if len(given) == 1 else given)
        given = (self.stride, self.dilation, self.causal, *((self.plane,) if self.plane or axes > 1 else ()))
        if not 1 <= axes <= 3 or any(len(x) != axes for x in given):
            raise ValueError(
                "Neighbourhood needs one number an axis, of 1 to 3 axes, in window, stride, dilation, causal and plane"
            )
        for k, s, d in zip(self.window, self.stride, self.dilation):
            if not 1 <= s <= k or d < 1:
                raise ValueError(f"Neighbourhood needs 1 ≤ stride ≤ window and dilation ≥ 1, not {s}, {k} and {d}")
        for k, d, n in zip(self.window, self.dilation, self.plane):
            if k * d > n:
                raise ValueError(f"Neighbourhood: a window of {k} keys {d} apart does not fit an axis of {n}")

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        if at.causal and not (len(self.window) == 1 and self.causal[0]):
            return self.refuse("it looks ahead, and this attention is causal: causal=(True,) on one axis is for it")
        found = checked_plane(self.plane, at, a) if self.plane else ((at.row,), (at.key,), (at.keys,))
        if isinstance(found, Refusal):
            return self.refuse(found.reason)
        if not self.plane and at.keys.is_const and self.window[0] * self.dilation[0] > at.keys.value:
            return self.refuse(f"a window of {self.window[0]} keys {self.dilation[0]} apart does not fit {at.keys} tokens")
        if not self.plane and not at.keys.is_const and not self.causal[0]:
            return self.refuse("the number of tokens is open: nothing says that the window fits")
        keep: Expr = TRUE
        for axis, (p, m, n) in enumerate(zip(*found)):
            keep = keep & self._axis(axis, p, m, n)
        return keep

    def _axis(self, axis: int, p: Expr, m: Expr, size: Expr) -> Expr:
        k, s, d, causal = self.window[axis], self.stride[axis], self.dilation[axis], self.causal[axis]
        x, y, same, n = p, m, TRUE, size
        if d > 1:
            x, y, same = p // d, m // d, ex.equal(p % d, m % d)
            n = (size - p % d + (d - 1)) // d
        if causal:
            leader = x if s == 1 else ex.minimum(x // s * s + (s - 1), n - 1)
            return same & (y <= x) & (leader - y < k)
        before, after = k // 2, (k + 1) // 2 - 1
        leader = x if s == 1 else ex.minimum(x // s * s + s // 2, n - 1)
        centre = ex.minimum(ex.maximum(leader, before), n - 1 - after)
        return same & (centre - y <= before) & (y - centre <= after)


