"""Radial attention over video: the window of a frame halves whenever the distance between frames doubles.

    i, j = frames of row and key, k, l = places in them, s = tokens a frame, δ = |i − j|, b = ⌊log2 max(δ, 1)⌋
    keep = (2^b ≤ s ∧ (|k − l| + 1)·2^b ≤ s)  ∨  (δ mod ⌈2^b / s⌉ = 0 ∧ k = l)  ∨  j < sink
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...expr import FALSE, Expr
from ...verdict import Refusal
from ..method import StaticMethod, TokenPositions
from ..plane import checked_plane


@dataclass(frozen=True)
class Radial(StaticMethod):
    """`frames` of `tokens` each, and `sink` frames that every row keeps.

    The paper's rule, key by key. Its published code differs, and we from that: there frames one apart are full and the
    windows of others twice as wide, tiles that are thinly kept are dropped, which may empty a row, and what lies behind the
    last whole tile is never reached. Distance in a frame is that of places row by row, as published.
    """

    name: ClassVar[str] = "radial"
    source: ClassVar[str] = "Li et al., Radial Attention (2506.19852), section 4.2"
    needs: ClassVar[tuple[str, ...]] = ("frames of equal size",)

    frames: int
    tokens: int
    sink: int = 1

    def __post_init__(self) -> None:
        if min(self.frames, self.tokens) < 1 or not 0 <= self.sink <= self.frames:
            raise ValueError("Radial needs frames and tokens from 1, and sink from 0 to frames")

    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        if at.causal:
            return self.refuse("it looks ahead, and this attention is causal")
        found = checked_plane((self.frames, self.tokens), at, a)
        if isinstance(found, Refusal):
            return self.refuse(found.reason)
        (i, k), (j, other), _ = found
        apart, off = _distance(i, j), _distance(k, other)
        keep = j < self.sink if self.sink else FALSE
        for b in range(max(self.frames - 1, 1).bit_length()):
            # frames from 2^b up to 2^(b + 1) apart; a frame itself is among those one apart
            here = (apart >= 2**b if b else ex.TRUE) & (apart < 2 ** (b + 1))
            if 2**b <= self.tokens:
                keep = keep | (here & ((off + 1) * 2**b <= self.tokens))
            every = -(-(2**b) // self.tokens)
            keep = keep | (here & ex.equal(off, 0) & (ex.equal(apart % every, 0) if every > 1 else ex.TRUE))
        return keep


def _distance(x: Expr, y: Expr) -> Expr:
    return ex.maximum(x - y, y - x)
